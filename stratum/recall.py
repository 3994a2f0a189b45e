"""Bytes of cold packs on their way in: fetched once for all readers of all processes, and kept a while.

A pack is cut in cells of CELL_BYTES; a cell is a file in `recall/` that grows as its bytes arrive. Who holds the flock of a cell
file fetches it; the others watch its size. One request of a remote fills as many consecutive cells as are wanted and nobody
else is fetching, so a long read streams, and a hundred readers of one object make one request.

A cell file is CELL_MAGIC, where in the cell its bytes begin (u32, little-endian), and the bytes. Whoever wants the middle of a
cell first fetches from there on: what lies before would keep him waiting.

Invariants
* A cell file's bytes have no gap, whatever crashed: a fetcher only appends, and goes on where the last one stopped. One whose
  bytes begin behind what is wanted is given up for a new one, by who holds its lock, and the new one begins with the cell.
* Nothing here is verified or durable: the reader verifies, and `drop`s what was wrong.
"""

from __future__ import annotations

import enum
import fcntl
import os
import struct
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from stratum.descriptors import is_owned
from stratum.errors import TierUnavailable
from stratum.segments import EXTENT_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from stratum.deadlines import Deadline

    Fetcher = Callable[[int, int], Iterator[bytes]]
    """Streams bytes [first, last) of a pack."""

CELL_BYTES = 1024 * 1024
LATE = "the bytes did not arrive from the remote in time; see `stratum cold check`, then try again"
AHEAD_CELLS_MAX = EXTENT_BYTES_MAX // CELL_BYTES
CELL_MAGIC = b"cell"
_HEADER = struct.Struct("<4sI")
WATCH_S = 0.001
"""Between two looks at a cell that another process fills. This one's own fetches wake who waits."""
CLAIMED_A_PIECE = 4
FETCHES_MAX = 4
"""Of one cell for one reader: one fetch is enough unless somebody gives up what came."""
TRIM_EVERY_BYTES = 16 * 1024 * 1024


class _Cell(enum.Enum):
    """What there is of a cell's last bytes."""

    MISSING = enum.auto()
    """And nobody fetches them."""
    THERE = enum.auto()
    OURS = enum.auto()
    THEIRS = enum.auto()
    """A fetch of this process, or of another, is on its way to them."""


def _cell_stop(length: int, cell: int) -> int:
    """Of a pack of `length`: where a cell ends."""
    return min((cell + 1) * CELL_BYTES, length)


def _span(fd: int, cell: int) -> tuple[int, int] | None:
    """Which bytes of its pack a cell file has; None if none, and none will be appended."""
    size = os.fstat(fd).st_size
    if size < _HEADER.size:
        return None
    magic, begin = _HEADER.unpack(os.pread(fd, _HEADER.size, 0).ljust(_HEADER.size, b"\0"))
    if magic != CELL_MAGIC or begin > CELL_BYTES:
        return None
    begin += cell * CELL_BYTES
    return begin, begin + size - _HEADER.size


def _bytes(fd: int, span: tuple[int, int], start: int, stop: int) -> bytes:
    """Of a cell file that has `span`, from `start` on."""
    return os.pread(fd, min(stop, span[1]) - start, _HEADER.size + start - span[0])


class RecallCache:
    """`folder` is shared by the processes of a volume."""

    def __init__(self, folder: Path, bytes_max: int) -> None:
        self._folder = folder
        self._bytes_max = bytes_max
        self._since_trim = TRIM_EVERY_BYTES
        self._arrivals = 0
        self._arrived = threading.Condition()
        self._fetches: frozenset[_Fetch] = frozenset()
        """Of this process; changed under `_arrived`."""
        folder.mkdir(exist_ok=True, mode=0o700)

    def _path(self, pack: int, cell: int) -> Path:
        return self._folder / f"{pack:016x}.{cell:04d}"

    def read(
        self,
        pack: int,
        length: int,
        start: int,
        least_stop: int,
        stop: int,
        wanted_stop: int,
        fetch: Fetcher,
        deadline: Deadline,
        patience_s: float = 0.0,
    ) -> bytes:
        """Bytes of a pack of `length` from `start` to at least `least_stop`, and on to `stop` as far as they are there.

        While they are arriving it waits for those up to `stop`, or the end of the cell, for `patience_s`.
        Fetches run on to `wanted_stop`, for who asks next, one after the other without a gap.
        Raises what `fetch` raises, and `TierUnavailable` when the deadline has passed.
        """
        pieces = []
        while start < stop:
            cell = start // CELL_BYTES
            end = min((cell + 1) * CELL_BYTES, stop)
            if start < least_stop:
                least = min(end, least_stop)
                piece = self._read_cell(pack, length, cell, start, least, end, wanted_stop, fetch, deadline, patience_s)
            else:
                piece = self._there(pack, cell, start, end)
            pieces.append(piece)
            start += len(piece)
            if start < end:
                break  # the rest is on its way
        half_way = start + (wanted_stop - start) // 2
        if half_way > stop and self._look(pack, length, half_way // CELL_BYTES) == _Cell.MISSING:
            self.ask(pack, length, start, wanted_stop, fetch)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def ask(self, pack: int, length: int, start: int, wanted_stop: int, fetch: Fetcher) -> None:
        """Fetch what nobody has or fetches yet between `start` and `wanted_stop`, in one go; waits for nothing.

        Behind what another process fetches it asks for nothing: that may go on, and only that process knows how far.
        """
        cell = start // CELL_BYTES
        while cell * CELL_BYTES < wanted_stop:
            state = self._look(pack, length, cell)
            if state == _Cell.MISSING:
                break
            if state == _Cell.THEIRS:
                return
            cell += 1
        else:
            return
        fd = os.open(self._path(pack, cell), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            span = _span(fd, cell)
            if os.fstat(fd).st_nlink and (span is None or span[1] < _cell_stop(length, cell)):
                self._begin(fd, pack, length, cell, span, max(start, cell * CELL_BYTES), wanted_stop, fetch)
                fd = -1
        except BlockingIOError:
            return
        finally:
            if fd >= 0:
                os.close(fd)

    def _begin(
        self, fd: int, pack: int, length: int, cell: int, span: tuple[int, int] | None, start: int, wanted_stop: int, fetch: Fetcher
    ) -> _Fetch:  # fmt: skip
        """Fill cells from `cell` on, whose file `fd` is locked and has `span`; an empty one from `start` on. Takes `fd`.

        Now and then this makes room for what has come since the last time.
        """
        if span is None:
            span = (start, start)
            os.ftruncate(fd, 0)
            os.pwrite(fd, _HEADER.pack(CELL_MAGIC, start - cell * CELL_BYTES), 0)
        last = cell
        while last - cell < AHEAD_CELLS_MAX and (last + 1) * CELL_BYTES < min(wanted_stop, length):
            if not self._seems_empty(pack, last + 1):
                break
            last += 1
        begun = _Fetch(self, pack, fd, cell, span, _cell_stop(length, last), fetch)
        self._since_trim += begun.size
        if self._since_trim >= TRIM_EVERY_BYTES:
            self.trim()
        return begun

    def _seems_empty(self, pack: int, cell: int) -> bool:
        """What `claim` will find, most likely."""
        try:
            return os.stat(self._path(pack, cell)).st_size <= _HEADER.size  # noqa: PTH116  a third of Path.stat()'s time
        except FileNotFoundError:
            return True

    def claim(self, pack: int, cell: int) -> int:
        """A descriptor of a cell that is nobody's and has no bytes, locked; -1 if it is not like that."""
        with suppress(OSError):  # somebody's, or no room: who comes there will see it
            fd = os.open(self._path(pack, cell), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                now = os.fstat(fd)
                if now.st_nlink and now.st_size <= _HEADER.size:
                    os.pwrite(fd, _HEADER.pack(CELL_MAGIC, 0), 0)
                    claimed, fd = fd, -1
                    return claimed
            finally:
                if fd >= 0:
                    os.close(fd)
        return -1

    def _look(self, pack: int, length: int, cell: int) -> _Cell:
        if any(fetch.pack == pack and fetch.has(cell) for fetch in self._fetches):
            return _Cell.OURS
        try:
            fd = os.open(self._path(pack, cell), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return _Cell.MISSING
        try:
            span = _span(fd, cell)
            if span is not None and span[1] >= _cell_stop(length, cell):
                return _Cell.THERE
            return _Cell.THEIRS if is_owned(fd) else _Cell.MISSING
        finally:
            os.close(fd)

    def _there(self, pack: int, cell: int, start: int, stop: int) -> bytes:
        """What there is of a cell behind `start`, perhaps nothing."""
        try:
            fd = os.open(self._path(pack, cell), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return b""
        try:
            span = _span(fd, cell)
            if span is None or not span[0] <= start < span[1]:
                return b""
            return _bytes(fd, span, start, stop)
        finally:
            os.close(fd)

    def _read_cell(
        self, pack: int, length: int, cell: int, start: int, stop: int, most: int, wanted_stop: int,
        fetch: Fetcher, deadline: Deadline, patience_s: float,
    ) -> bytes:  # fmt: skip
        """Bytes of one cell from `start` to at least `stop`, at most `most`, for which it waits a while."""
        patient_s = time.monotonic() + patience_s if patience_s else 0.0
        begin = start
        mine: _Fetch | None = None
        fetches = 0
        while True:
            fd = os.open(self._path(pack, cell), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                watched = 0
                while True:
                    arrivals = self._arrivals
                    span = _span(fd, cell)
                    if (
                        span is not None
                        and span[0] <= start
                        and stop <= span[1]
                        and (most <= span[1] or time.monotonic() >= patient_s)
                    ):
                        return _bytes(fd, span, start, most)
                    try:
                        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        if deadline.passed:
                            raise TierUnavailable(LATE) from None
                    watched += 1
                    self._wait(arrivals, WATCH_S if watched < 50 else 5 * WATCH_S)
                span = _span(fd, cell)
                if span is not None and span[0] <= start and stop <= span[1]:
                    return _bytes(fd, span, start, most)  # it came before the lock, or nobody fetches the rest
                if mine is not None and mine.error is not None:
                    if fetches > 1 or span is None or not span[0] < start:
                        raise mine.error
                    # It may have failed at what lies before in the cell; these bytes need not be damaged.
                    self._path(pack, cell).unlink(missing_ok=True)
                    begin, mine = start, None
                    continue
                if fetches == FETCHES_MAX or deadline.passed:
                    raise TierUnavailable(LATE)  # at FETCHES_MAX: others give up what we fetch, again and again
                if os.fstat(fd).st_nlink == 0:
                    continue  # given up
                if span is not None and span[0] > start:
                    self._path(pack, cell).unlink(missing_ok=True)
                    begin = cell * CELL_BYTES  # else who reads backwards would begin anew each time
                    continue
                fetches += 1
                mine = self._begin(fd, pack, length, cell, span, begin, max(wanted_stop, stop), fetch)
                fd = -1  # the fetch has it, and its lock
            finally:
                if fd >= 0:
                    os.close(fd)

    def begins(self, fetch: _Fetch) -> None:
        with self._arrived:
            self._fetches |= {fetch}

    def ends(self, fetch: _Fetch) -> None:
        with self._arrived:
            self._fetches -= {fetch}
        self.wake()

    def wake(self) -> None:
        """Bytes have arrived, or will not."""
        with self._arrived:
            self._arrivals += 1
            self._arrived.notify_all()

    def _wait(self, arrivals: int, timeout_s: float) -> None:
        """For something to arrive since there were so many arrivals, or a while."""
        with self._arrived:
            if self._arrivals == arrivals:
                self._arrived.wait(timeout_s)

    def drop(self, pack: int) -> None:
        """What is here of the pack is wrong, or not wanted any more."""
        for path in self._folder.glob(f"{pack:016x}.*"):
            path.unlink(missing_ok=True)

    def trim(self) -> None:
        """Remove what was fetched first until the rest is below the limit."""
        self._since_trim = 0
        found = []
        for path in self._folder.iterdir():
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            found.append((stat.st_mtime_ns, stat.st_blocks * 512, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self._bytes_max:
                break
            path.unlink(missing_ok=True)
            total -= size


class _Fetch:
    """Fills cells in a thread of its own: who asked first reads along like everybody else, and may go away.

    `fd` is the file of `cell`, locked, with its header and bytes up to the end of `span`. The cells behind it are claimed when the
    first bytes have arrived, for whoever waits waits for these: CLAIMED_A_PIECE with each piece, and always the one into which the next byte
    goes, so that who reads along finds it taken. The fetch ends at `end`, or before a cell that is not to be had.
    """

    def __init__(
        self, cache: RecallCache, pack: int, fd: int, cell: int, span: tuple[int, int], end: int, fetch: Fetcher
    ) -> None:
        self.error: Exception | None = None
        begin, self._at = span
        self.size = end - self._at
        self._end = end
        self._fetch = fetch
        self._cache = cache
        self.pack = pack
        self._fds = {cell: fd}
        self._next = cell + 1
        """The cell to claim."""
        self._shift = _HEADER.size - begin + cell * CELL_BYTES
        """From where in its cell a byte is to where in the file; of the first one."""
        cache.begins(self)
        try:
            threading.Thread(target=self._run, name="fetch", daemon=True).start()
        except RuntimeError:  # too many threads
            cache.ends(self)
            raise

    def _run(self) -> None:
        try:
            for piece in self._fetch(self._at, self._end):
                self._claim_to((self._at + len(piece)) // CELL_BYTES)
                if not self._append(memoryview(piece)):
                    break
                self._cache.wake()
                self._claim_to(self._next + CLAIMED_A_PIECE - 1)
            if self._at < self._end:  # else whoever waits would have it fetched again, for ever
                self.error = TierUnavailable(f"the remote sent {self._end - self._at} bytes less than were asked for")
        except OSError as error:
            self.error = TierUnavailable(f"the volume has no room to pass on what a remote sends ({error})")
        except Exception as error:  # noqa: BLE001  whoever waits for it gets it
            self.error = error
        finally:
            for fd in self._fds.values():
                os.close(fd)
            self._cache.ends(self)

    def has(self, cell: int) -> bool:
        """Whether it will fill that one, as far as it knows."""
        return self._at < (cell + 1) * CELL_BYTES and cell * CELL_BYTES < self._end

    def _claim_to(self, cell: int) -> None:
        """Up to that one, if it is wanted; not beyond one that is not to be had."""
        while self._next <= cell and self._next * CELL_BYTES < self._end:
            fd = self._cache.claim(self.pack, self._next)
            if fd < 0:
                self._end = self._next * CELL_BYTES
                return
            self._fds[self._next] = fd
            self._next += 1

    def _append(self, view: memoryview) -> bool:
        """Whether more is wanted."""
        while view and self._at < self._end:
            cell, inside = divmod(self._at, CELL_BYTES)
            part = view[: CELL_BYTES - inside]
            os.pwrite(self._fds[cell], part, inside + self._shift)
            self._at += len(part)
            view = view[len(part) :]
            if self._at % CELL_BYTES == 0:
                os.close(self._fds.pop(cell))
                self._shift = _HEADER.size
        return self._at < self._end
