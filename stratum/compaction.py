"""Putting together what many small writes have left in many pieces.

A write never touches committed bytes, so a file that is written in small pieces becomes a slice a piece, and an extent keeps all of its
bytes as long as one of them is referred to. When such a file has been quiet, the housekeeper writes the parts of it that lie in many pieces anew,
in one piece each, and swaps the slices. (What is left of an extent in a part that lies in few pieces is not moved.) Nobody sees a difference: bytes, version, ETag and times stay.

Invariants
* The slices are swapped only if they are those that were read, in the transaction that swaps them.
* Bytes that are shared with another file, have a copy in another tier or have left the hot one stay where they are: writing them anew would
  take more room than it gives back. Holes stay holes.
* A file that may want this has an f row, which a commit of small writes leaves now and then; it goes when the file was gone through.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from stratum import content, packs
from stratum.errors import DataDamaged, NotFound
from stratum.log import get_logger
from stratum.schema import ELSEWHERE_SEGMENT, Inode, Kind, Slice, key_u64, key_u64_u64, split_u64_u64, unpack_u64

if TYPE_CHECKING:
    from stratum.transaction import InodeReader, MetadataTransaction
    from stratum.volume import Volume

log = get_logger("compaction")
FILE_BYTES_MIN = 1 << 20
"""Of smaller files the pieces do not matter: they are read whole, or lie in the metadata store."""
NOTED_EVERY = 16
"""Commits of small writes, in a file that big, between two f rows: each would be another row a commit."""
PIECES_NOTED = 16
"""One commit that leaves so many pieces notes the file at once."""
WINDOW_BYTES = 4 << 20
PIECES_MIN = 32
"""Of a window; 128 KiB on average, below which a read of the disk costs more for getting there than for the bytes."""
QUIET_S = 30.0
ROUND_BYTES = 32 << 20
"""Written anew in one round of the housekeeper, at most a second's worth."""
FILES_AT_ONCE = 16


def note(tx: MetadataTransaction, inode: Inode, pieces: int) -> None:
    """A commit has put so many pieces into a file."""
    if inode.size < FILE_BYTES_MIN or (pieces < PIECES_NOTED and tx.id % NOTED_EVERY):
        return
    key = key_u64(b"f", inode.number)
    if tx.get(key) is None:
        tx.put(key, b"")


class Compactor:
    """Part of the housekeeper. Remembers how far it is in each file; nothing is lost if it forgets."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._cursors: dict[int, tuple[int, int]] = {}
        """By inode: the version that is gone through, and the offset it has come to."""
        self._after = b"f"

    def run(self) -> int:
        """One round; how many bytes were written anew."""
        if not self._volume.has_space():
            return 0
        with self._volume.snapshot() as reader:
            rows = reader.first_rows(self._after, b"g", FILES_AT_ONCE)
        numbers = [unpack_u64(key[1:])[0] for key, _ in rows]
        # Files that are written all the time must not keep others waiting.
        self._after = rows[-1][0] + b"\0" if len(rows) == FILES_AT_ONCE else b"f"
        written = 0
        for number in numbers:
            written += self._file(number, ROUND_BYTES - written)
            if written >= ROUND_BYTES:
                break
        return written

    def _file(self, number: int, budget: int) -> int:
        with self._volume.snapshot() as reader:
            inode = content.require_inode(reader, number)
        if inode is None or inode.kind != Kind.FILE or inode.flags & Inode.INLINE:
            self._finish(number, None)
            return 0
        if time.time_ns() - inode.ctime_ns < QUIET_S * 1e9:
            return 0
        version, at = self._cursors.get(number, (inode.version, 0))
        if version != inode.version:
            at = 0
        written = 0
        while at < inode.size and written < budget:
            stop = at + WINDOW_BYTES
            with self._volume.snapshot() as reader:
                pieces = reader.slices(number, at, stop)
                wanted = len(pieces) >= PIECES_MIN and all(_is_alone(reader, number, piece) for piece in pieces)
                following = _next_slice(reader, number, stop)
            if wanted:
                try:
                    written += self._rewrite(inode, at, min(stop, inode.size), pieces)
                except (DataDamaged, NotFound) as error:
                    log.warning("not_compacted", inode=number, offset=at, error=error.message)
            at = max(stop, following // WINDOW_BYTES * WINDOW_BYTES)
        if at >= inode.size:
            self._finish(number, inode.version)
        else:
            self._cursors[number] = inode.version, at
        return written

    def _finish(self, number: int, version: int | None) -> None:
        """Take the f row away, unless the file has changed since."""
        self._cursors.pop(number, None)

        def forget(tx: MetadataTransaction) -> None:
            if version is None or not tx.has_inode(number) or tx.inode(number).version == version:
                tx.delete(key_u64(b"f", number))

        self._volume.mutate(forget, frees=True)

    def _rewrite(self, inode: Inode, start: int, stop: int, pieces: list[Slice]) -> int:
        """Raises what reading and writing do; nothing has changed then."""
        volume, number = self._volume, inode.number
        runs = _runs(pieces, start, stop)
        with ExitStack() as stack:
            stack.enter_context(volume.reading())
            with volume.snapshot() as reader:
                if reader.slices(number, start, start + WINDOW_BYTES) != pieces:
                    return 0
                plan = content.plan_read(reader, inode, start, stop)
            writers = []
            for at, end in runs:
                writer = stack.enter_context(volume.segments.writer(end - at, hot_only=True))
                for piece in content.read_planned(volume, plan, at, end):
                    writer.write(piece)
                writer.seal()
                writers.append(writer)
            volume.segments.sync_writers(writers)

            def swap(tx: MetadataTransaction) -> bool:
                if not tx.has_inode(number) or tx.slices(number, start, start + WINDOW_BYTES) != pieces:
                    return False
                for (at, end), writer in zip(runs, writers, strict=True):
                    tx.cut_slices(number, at, end, moved=True)
                    (extent,) = writer.extents
                    tx.add_extent(extent)
                    tx.put_slice(number, Slice(at, end - at, extent.number, 0), moved=True)
                return True

            for writer in writers:
                writer.committing()
            swapped = volume.mutate(swap)
            for writer in writers:
                if swapped:
                    writer.keep()
                else:
                    writer.reopen()  # written meanwhile: what was put together goes
        log.debug("compacted", inode=number, offset=start, pieces=len(pieces), runs=len(runs), swapped=swapped)
        return sum(end - at for at, end in runs) if swapped else 0


def _is_alone(reader: InodeReader, number: int, piece: Slice) -> bool:
    """Whether a piece's extent is this file's only, hot, and nowhere else."""
    return (
        reader.extent(piece.extent)[0].segment != ELSEWHERE_SEGMENT
        and packs.owners(reader, piece.extent) == [number]
        and not packs.copies(reader, piece.extent)
    )


def _next_slice(reader: InodeReader, number: int, start: int) -> int:
    """Where the first slice from `start` on begins, or the end of all; a petabyte of hole is one step."""
    rows = reader.first_rows(key_u64_u64(b"S", number, start), key_u64_u64(b"S", number, (1 << 64) - 1), 1)
    return split_u64_u64(rows[0][0])[1] if rows else 1 << 63


def _runs(pieces: list[Slice], start: int, stop: int) -> list[tuple[int, int]]:
    """The parts of [start, stop) without holes."""
    found: list[tuple[int, int]] = []
    for piece in pieces:
        at, end = max(piece.file_offset, start), min(piece.end, stop)
        if found and found[-1][1] == at:
            found[-1] = found[-1][0], end
        else:
            found.append((at, end))
    return found
