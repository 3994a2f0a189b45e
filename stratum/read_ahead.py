"""Where a reader of cold bytes goes on to: through one pack by one request, and into the next pack before the first has ended.

A file that came in parts, or by many writes, has many extents, which the mover puts into packs one behind the other. Without this
each would be a request of its own, for whose first byte the reader waits (a far remote: 50 ms and more).

This only guesses: what is asked for and not read, or has moved meanwhile, is fetched in vain. Holds no bytes and no transaction.
"""

from __future__ import annotations

from bisect import bisect_right
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stratum import packs
from stratum.errors import StratumError
from stratum.schema import key_u64
from stratum.tier_rows import Tier

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stratum.schema import Inode, Slice
    from stratum.tier_rows import CopyRow
    from stratum.transaction import InodeReader
    from stratum.volume import Volume

WINDOW_BYTES_MIN = 8 * 1024 * 1024
WINDOW_BYTES_MAX = 64 * 1024 * 1024
SLICES_MAX = 1024
"""A run ends there; then the next one is looked for."""
SOON_BYTES = 16 * 1024 * 1024
"""So much of a run is left when the next one is asked for: 130 ms of a line of 1 Gbit/s."""


@dataclass(slots=True, frozen=True)
class _Run:
    """Bytes [begin, end) of the file lie behind each other in a pack, up to `stop` in it. `following`: the index of the slice behind them."""

    pack: int
    begin: int
    end: int
    stop: int
    following: int


class ReadAhead:
    """Of one reader, through `slices` in order, not beyond `stop` of the file."""

    def __init__(self, volume: Volume, slices: Sequence[Slice], stop: int) -> None:
        self._volume = volume
        self._slices = slices
        self.stop = stop
        self._run: _Run | None = None
        self._asked = -1

    def goes_to(self, file_at: int, place: CopyRow, at: int) -> int:
        """How far in its pack the reader goes on who is at `file_at` of the file, in an extent that has that place, which is `at` of the pack."""
        run = self._run
        if run is None or run.pack != place.pack or not run.begin <= file_at < run.end:
            index = bisect_right(self._slices, file_at, key=lambda piece: piece.file_offset) - 1
            if index < 0 or file_at >= self._slices[index].end:
                return at
            with self._volume.snapshot() as reader:
                run = self._run = self._look(reader, index, place)
        if run.stop - at <= SOON_BYTES and self._asked < run.following < len(self._slices):
            self._asked = run.following
            self._ask(run.following)
        return run.stop

    def _look(self, reader: InodeReader, index: int, place: CopyRow) -> _Run:
        slices, pack = self._slices, place.pack
        following = index
        while True:
            piece = slices[following]
            end = max(min(piece.end, self.stop), piece.file_offset)
            stop = place.offset + piece.extent_offset + end - piece.file_offset
            following += 1
            if stop < place.offset + place.length or following == min(len(slices), index + SLICES_MAX):
                break
            found = self._cold_place(reader, following)
            if found is None or (found.pack, found.offset + slices[following].extent_offset) != (pack, stop):
                break
            place = found
        return _Run(pack, slices[index].file_offset, end, stop, following)

    def _cold_place(self, reader: InodeReader, index: int) -> CopyRow | None:
        """Where the bytes of a slice must be asked for; None if they are nearer, gone, or not wanted."""
        piece = self._slices[index]
        if piece.file_offset >= self.stop or reader.get(key_u64(b"X", piece.extent)) is None:
            return None
        row, _ = reader.extent(piece.extent)
        found = packs.copies(reader, piece.extent)
        return found[Tier.COLD] if not packs.is_hot(row) and list(found) == [Tier.COLD] else None

    def _ask(self, index: int) -> None:
        with suppress(StratumError):  # whoever comes there will see it
            with self._volume.snapshot() as reader:
                place = self._cold_place(reader, index)
                row = packs.get(reader, place.pack) if place is not None else None
                if place is None or row is None:
                    return
                stop = self._look(reader, index, place).stop
            self._volume.cold.ask(place.pack, row, place.offset + self._slices[index].extent_offset, stop)


class Follower:
    """Of a reader who comes with one read after the other. What he reads without a gap widens the window in which bytes are asked for."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._begin = 0
        self._end = 0
        self._ahead: ReadAhead | None = None
        self._version = 0
        """Of the file that `_ahead` knows."""

    def comes(self, start: int, stop: int) -> None:
        """The next read."""
        if start != self._end:
            self._begin = start
            self._ahead = None
        self._end = stop

    def ahead(self, inode: Inode, at: int, stop: int) -> ReadAhead | None:
        """For a read of [at, stop); None if it goes on from nothing."""
        begin = self._begin
        if begin == at and begin != 0:
            return None
        window = min(max(at - begin, WINDOW_BYTES_MIN), WINDOW_BYTES_MAX)
        ahead = self._ahead
        if ahead is None or self._version != inode.version or min(at + window // 2, inode.size) > ahead.stop:
            until = min(stop + window, inode.size)
            with self._volume.snapshot() as reader:
                slices = reader.slices(inode.number, at, until)
            self._version = inode.version
            ahead = self._ahead = ReadAhead(self._volume, slices, until)
        return ahead
