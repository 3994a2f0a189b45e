"""Bytes of cold packs on their way in: fetched once for all readers of all processes, and kept a while.

A pack is cut in cells of CELL_BYTES; a cell is a file in `recall/` that grows as its bytes arrive. Who holds the flock of a cell
file fetches it; the others watch its size. One request of a remote fills as many consecutive cells as are wanted and nobody
else is fetching, so a long read streams, and a hundred readers of one object make one request.

Invariants
* A cell file's bytes are a prefix of the cell, whatever crashed: a fetcher only appends, and goes on where the last one stopped.
* Nothing here is verified or durable: the reader verifies, and `drop`s what was wrong.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from typing import TYPE_CHECKING

from stratum.descriptors import is_owned
from stratum.errors import TierUnavailable
from stratum.segments import EXTENT_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CELL_BYTES = 1024 * 1024
AHEAD_CELLS_MAX = EXTENT_BYTES_MAX // CELL_BYTES
WATCH_S = 0.001
TRIM_EVERY_BYTES = 16 * 1024 * 1024


def _cell_bytes(length: int, cell: int) -> int:
    """Of a cell of a pack of `length`, when it is whole."""
    return min(CELL_BYTES, length - cell * CELL_BYTES)


class RecallCache:
    """`folder` is shared by the processes of a volume."""

    def __init__(self, folder: Path, bytes_max: int) -> None:
        self._folder = folder
        self._bytes_max = bytes_max
        self._since_trim = TRIM_EVERY_BYTES
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
        fetch: Callable[[int, int], Iterator[bytes]],
        deadline_s: float,
    ) -> bytes:
        """Bytes of a pack of `length` from `start` to at least `least_stop`, and on to `stop` as far as they are there.

        Fetches run on to `wanted_stop`, for who asks next, one after the other without a gap.
        `fetch(first, last)` streams bytes of the pack. Raises what it raises, and `TierUnavailable` after `deadline_s`
        (monotonic).
        """
        pieces = []
        while start < stop:
            cell = start // CELL_BYTES
            end = min((cell + 1) * CELL_BYTES, stop)
            if start < least_stop:
                least = min(end, least_stop)
                piece = self._read_cell(pack, length, cell, start, least, end, wanted_stop, fetch, deadline_s)
            else:
                piece = self._there(pack, cell, start, end)
            pieces.append(piece)
            start += len(piece)
            if start < end:
                break  # the rest is on its way
        half_way = start + (wanted_stop - start) // 2
        if half_way > stop and self._is_free(pack, length, half_way // CELL_BYTES):
            self.ask(pack, length, start, wanted_stop, fetch)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def ask(
        self, pack: int, length: int, start: int, wanted_stop: int, fetch: Callable[[int, int], Iterator[bytes]]
    ) -> None:
        """Fetch what nobody has or fetches yet between `start` and `wanted_stop`, in one go; waits for nothing."""
        cell = start // CELL_BYTES
        while cell * CELL_BYTES < wanted_stop and not self._is_free(pack, length, cell):
            cell += 1
        if cell * CELL_BYTES >= wanted_stop:
            return
        fds = self._claim(pack, length, cell, [], wanted_stop)
        if fds:
            self._begin(fds, cell, length, fetch)

    def _begin(self, fds: list[int], cell: int, length: int, fetch: Callable[[int, int], Iterator[bytes]]) -> _Fetch:
        """Fill cells from `cell` on, and now and then make room for what has come since the last time."""
        begun = _Fetch(fds, cell, length, fetch)
        self._since_trim += begun.size
        if self._since_trim >= TRIM_EVERY_BYTES:
            self.trim()
        return begun

    def _is_free(self, pack: int, length: int, cell: int) -> bool:
        """Whether a cell has not all its bytes, and nobody fetches them."""
        try:
            fd = os.open(self._path(pack, cell), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            return os.fstat(fd).st_size < _cell_bytes(length, cell) and not is_owned(fd)
        finally:
            os.close(fd)

    def _there(self, pack: int, cell: int, start: int, stop: int) -> bytes:
        """What there is of a cell behind `start`, perhaps nothing."""
        try:
            fd = os.open(self._path(pack, cell), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return b""
        try:
            return os.pread(fd, stop - start, start - cell * CELL_BYTES)
        finally:
            os.close(fd)

    def _read_cell(
        self, pack: int, length: int, cell: int, start: int, stop: int, most: int, wanted_stop: int,
        fetch: Callable[[int, int], Iterator[bytes]], deadline_s: float,
    ) -> bytes:  # fmt: skip
        """Bytes of one cell from `start` to at least `stop`, at most `most`."""
        first = cell * CELL_BYTES
        mine: _Fetch | None = None
        while True:
            fd = os.open(self._path(pack, cell), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                watched = 0
                while True:
                    if os.fstat(fd).st_size >= stop - first:
                        return os.pread(fd, most - start, start - first)
                    if mine is not None and mine.error is not None:
                        raise mine.error
                    try:
                        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        if time.monotonic() > deadline_s:
                            raise TierUnavailable(
                                "the bytes did not arrive from the remote in time; see `stratum cold check`, then try again"
                            ) from None
                    watched += 1
                    time.sleep(WATCH_S if watched < 50 else 5 * WATCH_S)
                now = os.fstat(fd)
                if now.st_nlink == 0 or now.st_size >= stop - first:
                    continue  # trimmed, or filled, between looking and locking
                fds = self._claim(pack, length, cell, [fd], max(wanted_stop, stop))
                fd = -1  # the fetch has it, and its lock
                mine = self._begin(fds, cell, length, fetch)
            finally:
                if fd >= 0:
                    os.close(fd)

    def _claim(self, pack: int, length: int, cell: int, fds: list[int], wanted_stop: int) -> list[int]:
        """Take cells from `cell` on that are wanted, empty and nobody's, locked. `fds`: of the first, if its lock is held already."""
        last_cell = (min(wanted_stop, length) - 1) // CELL_BYTES
        for following in range(cell + len(fds), min(last_cell, cell + AHEAD_CELLS_MAX) + 1):
            other = os.open(self._path(pack, following), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                now = os.fstat(other)
                missing = now.st_size < _cell_bytes(length, following)
                free = now.st_nlink > 0 and missing and (now.st_size == 0 or following == cell)
            except BlockingIOError:
                free = False
            if not free:
                os.close(other)
                break
            fds.append(other)
        return fds

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

    `fds` are consecutive cells from `cell` on, open and locked; they are closed, and so given up, one by one.
    """

    def __init__(self, fds: list[int], cell: int, length: int, fetch: Callable[[int, int], Iterator[bytes]]) -> None:
        self.error: Exception | None = None
        self._fds = fds
        self._cell = cell
        self._fetch = fetch
        self._at = cell * CELL_BYTES + os.fstat(fds[0]).st_size
        self._end = min((cell + len(fds)) * CELL_BYTES, length)
        self.size = self._end - self._at
        threading.Thread(target=self._run, name="fetch", daemon=True).start()

    def _run(self) -> None:
        done = 0
        try:
            for piece in self._fetch(self._at, self._end):
                view = memoryview(piece)
                while view:
                    part = view[: CELL_BYTES - self._at % CELL_BYTES]
                    os.pwrite(self._fds[self._at // CELL_BYTES - self._cell], part, self._at % CELL_BYTES)
                    self._at += len(part)
                    view = view[len(part) :]
                while (done + 1) * CELL_BYTES <= self._at - self._cell * CELL_BYTES and done < len(self._fds):
                    os.close(self._fds[done])
                    done += 1
        except OSError as error:
            self.error = TierUnavailable(f"the volume has no room to pass on what a remote sends ({error})")
        except Exception as error:  # noqa: BLE001  whoever waits for it gets it
            self.error = error
        finally:
            for fd in self._fds[done:]:
                os.close(fd)
