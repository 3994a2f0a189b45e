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
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from stratum.errors import TierUnavailable
from stratum.segments import EXTENT_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CELL_BYTES = 1024 * 1024
AHEAD_CELLS_MAX = EXTENT_BYTES_MAX // CELL_BYTES
WATCH_S = 0.002
TRIM_EVERY_BYTES = 16 * 1024 * 1024

Fetch = "Callable[[int, int], Iterator[bytes]]"


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
        stop: int,
        wanted_stop: int,
        fetch: Callable[[int, int], Iterator[bytes]],
        deadline_s: float,
    ) -> bytes:
        """Bytes [start, stop) of a pack of `length`; one fetch may run on to `wanted_stop`, for who asks next.

        `fetch(first, last)` streams bytes of the pack. Raises what it raises, and `TierUnavailable` after `deadline_s`
        (monotonic).
        """
        pieces = []
        while start < stop:
            cell = start // CELL_BYTES
            end = min((cell + 1) * CELL_BYTES, stop)
            pieces.append(self._read_cell(pack, length, cell, start, end, wanted_stop, fetch, deadline_s))
            start = end
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _read_cell(
        self, pack: int, length: int, cell: int, start: int, stop: int, wanted_stop: int,
        fetch: Callable[[int, int], Iterator[bytes]], deadline_s: float,
    ) -> bytes:  # fmt: skip
        first = cell * CELL_BYTES
        while True:
            path = self._path(pack, cell)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                while True:
                    if os.fstat(fd).st_size >= stop - first:
                        return os.pread(fd, stop - start, start - first)
                    try:
                        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        if time.monotonic() > deadline_s:
                            raise TierUnavailable(
                                "the bytes did not arrive from the remote in time; see `stratum cold check`, then try again"
                            ) from None
                        time.sleep(WATCH_S)
                        continue
                    break
                now = os.fstat(fd)
                if now.st_nlink == 0 or now.st_size >= stop - first:
                    continue  # trimmed, or filled, between looking and locking
                self._fill(pack, length, cell, fd, stop, wanted_stop, fetch, deadline_s)
            finally:
                os.close(fd)

    def _fill(
        self, pack: int, length: int, cell: int, fd: int, stop: int, wanted_stop: int,
        fetch: Callable[[int, int], Iterator[bytes]], deadline_s: float,
    ) -> None:  # fmt: skip
        """Fetch this cell, whose lock is held, and those after it that are wanted, empty and nobody's."""
        with ExitStack() as stack:
            fds = [fd]
            last_cell = (min(max(wanted_stop, stop), length) - 1) // CELL_BYTES
            for following in range(cell + 1, min(last_cell, cell + AHEAD_CELLS_MAX) + 1):
                other = os.open(self._path(pack, following), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                stack.callback(os.close, other)
                try:
                    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    break
                if os.fstat(other).st_size:
                    break
                fds.append(other)
            at = cell * CELL_BYTES + os.fstat(fd).st_size
            end = min((cell + len(fds)) * CELL_BYTES, length)
            for piece in fetch(at, end):
                view = memoryview(piece)
                while view:
                    target = fds[at // CELL_BYTES - cell]
                    part = view[: CELL_BYTES - at % CELL_BYTES]
                    try:
                        os.pwrite(target, part, at % CELL_BYTES)
                    except OSError as error:
                        raise TierUnavailable(
                            f"the volume has no room to pass on what a remote sends ({error})"
                        ) from error
                    at += len(part)
                    view = view[len(part) :]
                    if at % CELL_BYTES == 0 and at < end:
                        fcntl.flock(target, fcntl.LOCK_UN)
                if time.monotonic() > deadline_s and at < stop:
                    raise TierUnavailable("the remote is too slow; see `stratum cold check`, then try again")
            self._since_trim += end - cell * CELL_BYTES
        if self._since_trim >= TRIM_EVERY_BYTES:
            self.trim()

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
