"""Written bytes of one file on their way to a commit: what a mount keeps between write and fsync.

Invariants
* What a reader of this mount sees is: the committed content below `base_limit`, overlaid by `spilled` (oldest first),
  overlaid by `memory`; zeros where none of them has bytes; cut at `size`.
* Nothing of it is visible to S3 or after a crash before `commit` returns, and then all of it is.
* A failed commit loses nothing: the buffer is as it was, and the next commit tries again.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from stratum import compaction, content, objects, stored_extents, tree
from stratum.content import INLINE_BYTES_MAX
from stratum.errors import NotFound, TryAgain
from stratum.schema import ETAG_PARTS_VERSIONED, Inode, Kind, Slice
from stratum.stored_extents import STORED_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stratum.segments import ExtentWriter, PreparedExtent
    from stratum.transaction import MetadataTransaction
    from stratum.volume import Volume

SPILL_BYTES = 4 * 1024 * 1024
"""Memory of one file beyond this goes to a data file, unsynced, before the commit."""
STORED_PIECES_MAX = 16
MERGED_BYTES_MAX = 64 * 1024
"""Larger writes are kept as they came: to put them together would copy each byte again, into memory that is new to the process."""
FOREVER = 1 << 63


@dataclass(slots=True, frozen=True)
class _Piece:
    """The first `length` bytes of an extent belong at file offset `at`."""

    at: int
    length: int
    extent: PreparedExtent


def _start_of(piece: tuple[int, bytes | bytearray]) -> int:
    return piece[0]


def _runs(memory: list[tuple[int, bytes | bytearray]]) -> Iterator[tuple[int, list[bytes | bytearray]]]:
    """Pieces that follow on each other, together, and where they begin."""
    run: list[bytes | bytearray] = []
    begin = stop = 0
    for at, data in memory:
        if run and at != stop:
            yield begin, run
            run = []
        if not run:
            begin = at
        run.append(data)
        stop = at + len(data)
    if run:
        yield begin, run


class WriteBuffer:
    """Changes of one inode. Not thread-safe: the owner serialises calls."""

    def __init__(self, volume: Volume, inode: Inode) -> None:
        self._volume = volume
        self.number = inode.number
        self.size = inode.size
        self.base_limit = FOREVER
        self.mtime_ns = 0
        self.memory: list[tuple[int, bytes | bytearray]] = []
        self.memory_bytes = 0
        self.spilled: list[_Piece] = []
        self._cut_off: list[PreparedExtent] = []
        self._writers: list[ExtentWriter] = []

    @property
    def dirty(self) -> bool:
        return self.mtime_ns != 0

    @property
    def written_bytes(self) -> int:
        """Those that have been written."""
        return self.memory_bytes + sum(piece.length for piece in self.spilled)

    # -- changes ------------------------------------------------------------------------------------------------------

    def write(self, offset: int, data: bytes | memoryview, now_ns: int) -> None:
        self.mtime_ns = now_ns
        self.size = max(self.size, offset + len(data))
        end = offset + len(data)
        at = bisect_right(self.memory, offset, key=_start_of) - 1
        if at >= 0:
            start, piece = self.memory[at]
            following = self.memory[at + 1][0] if at + 1 < len(self.memory) else FOREVER
            inside = end <= start + len(piece)
            appends = isinstance(piece, bytearray) and offset <= start + len(piece) and end <= following
            if len(data) < MERGED_BYTES_MAX and (inside or appends):
                if not isinstance(piece, bytearray):
                    piece = bytearray(piece)
                    self.memory[at] = (start, piece)
                before = len(piece)
                piece[offset - start : end - start] = data
                self.memory_bytes += len(piece) - before
                return
        self._cut_memory(offset, end)
        at = bisect_right(self.memory, offset, key=_start_of)
        kept = data if isinstance(data, bytes) and len(data) >= MERGED_BYTES_MAX else bytearray(data)
        self.memory.insert(at, (offset, kept))
        self.memory_bytes += len(data)

    def _cut_memory(self, start: int, stop: int) -> None:
        """O(pieces cut), whatever else there is: a database writes thousands of separate pages between two flushes."""
        first = max(0, bisect_right(self.memory, start, key=_start_of) - 1)
        last = bisect_left(self.memory, stop, lo=first, key=_start_of)
        kept: list[tuple[int, bytes | bytearray]] = []
        for at, piece in self.memory[first:last]:
            end = at + len(piece)
            self.memory_bytes -= len(piece)
            if end <= start:
                kept.append((at, piece))
                continue
            if at < start:
                kept.append((at, piece[: start - at]))
            if end > stop:
                kept.append((stop, piece[stop - at :]))
        self.memory_bytes += sum(len(piece) for _, piece in kept)
        self.memory[first:last] = kept

    def truncate(self, size: int, now_ns: int) -> None:
        self.mtime_ns = now_ns
        if size < self.size:
            self._cut_memory(size, FOREVER)
            self.base_limit = min(self.base_limit, size)
            self._cut_off += [piece.extent for piece in self.spilled if piece.at >= size]
            self.spilled = [
                _Piece(piece.at, min(piece.length, size - piece.at), piece.extent)
                for piece in self.spilled
                if piece.at < size
            ]
        self.size = size

    def spill(self) -> None:
        """Move memory to a data file, without syncing. Raises `NoSpace`."""
        self.spilled += self._write_out(self.memory, self._writers)
        self.memory = []
        self.memory_bytes = 0

    def _write_out(self, memory: list[tuple[int, bytes | bytearray]], writers: list[ExtentWriter]) -> list[_Piece]:
        pieces: list[_Piece] = []
        for at, run in _runs(memory):
            writer = self._volume.segments.writer(sum(map(len, run)))
            writers.append(writer)
            for data in run:
                writer.write(data)
            offset = at
            for extent in writer.seal():
                pieces.append(_Piece(offset, extent.length, extent))
                offset += extent.length
        return pieces

    # -- reading ------------------------------------------------------------------------------------------------------

    def overlay(self, start: int, base: bytearray) -> None:
        """Put what lies in this buffer over `base`, which shows the file from `start` on."""
        stop = start + len(base)
        if self.base_limit < stop:
            first = max(self.base_limit, start)
            base[first - start :] = bytes(stop - first)
        for spilled in self.spilled:
            first, last = max(spilled.at, start), min(spilled.at + spilled.length, stop)
            if first < last:
                extent = spilled.extent
                if extent.copy is not None:
                    found, _ = self._volume.warm.recover(
                        *extent.copy, first - spilled.at, last - spilled.at, f"extent {extent.number:016x}"
                    )
                    base[first - start : last - start] = found
                    continue
                base[first - start : last - start] = self._volume.segments.read(
                    extent.number,
                    extent.segment,
                    extent.offset,
                    extent.length,
                    extent.checksums,
                    first - spilled.at,
                    last - spilled.at,
                )
        for at, piece in self.memory:
            first, last = max(at, start), min(at + len(piece), stop)
            if first < last:
                base[first - start : last - start] = piece[first - at : last - at]

    def not_covered(self, start: int, stop: int) -> tuple[int, int]:
        """Of [start, stop) what is left if its beginning and its end are cut off as far as they lie in this buffer: all that a reader needs of the file."""
        spilled = [(piece.at, piece.at + piece.length) for piece in self.spilled]
        stop = min(stop, max(self.base_limit, start))
        before = -1, -1
        while before != (start, stop) and start < stop:
            before = start, stop
            for at, end in (*self._around(start), *self._around(stop - 1), *spilled):
                if at <= start < end:
                    start = min(end, stop)
                if at < stop <= end:
                    stop = max(at, start)
        return start, stop

    def _around(self, offset: int) -> list[tuple[int, int]]:
        """The piece in memory that has this byte, if there is one."""
        index = bisect_right(self.memory, offset, key=_start_of) - 1
        found = [(at, at + len(data)) for at, data in self.memory[max(index, 0) : index + 1]]
        return [(at, end) for at, end in found if offset < end]

    def parts(self) -> list[tuple[int, int]]:
        """Where there are bytes in this buffer: (start, stop), by where they begin; they may overlap."""
        spilled = [(piece.at, piece.at + piece.length) for piece in self.spilled]
        return sorted(spilled + [(at, at + len(data)) for at, data in self.memory])

    # -- commit -------------------------------------------------------------------------------------------------------

    def commit(self) -> Inode | None:
        """Make everything durable and visible; None if the file is gone. Blocks: call it in a thread.

        Raises `NoSpace` or `StorageFailed`; the buffer then still holds everything.
        """
        while True:
            try:
                return self._commit_once()
            except TryAgain:
                continue
            except NotFound:
                self.forget()
                return None

    def _base(self) -> tuple[Inode, bytes, bool]:
        """(the committed inode, its inline bytes that still count, whether slices count)."""
        with self._volume.snapshot() as reader:
            inode = reader.inode(self.number)
            if inode.flags & Inode.INLINE:
                return inode, content.get_inline(reader, self.number)[: self.base_limit], False
            stop = min(inode.size, self.base_limit)
            return inode, b"", stop > 0 and reader.has_slices(self.number, stop)

    def mutation(self, created: Inode | None = None) -> Callable[[MetadataTransaction], Inode] | None:
        """The commit as one mutation, if it needs no data file; call `forget` when it is done.

        `created` is the inode of a file that has no row yet and gets it earlier in the same transaction.

        The mutation raises `NotFound` if the file is gone.
        """
        if self.spilled or self.memory_bytes > STORED_BYTES_MAX:
            return None
        if created is not None:
            inode, prefix, has_slices = created, b"", False
        else:
            try:
                inode, prefix, has_slices = self._base()
            except NotFound:
                return None
        version = inode.version
        if self.size <= INLINE_BYTES_MAX and not has_slices:
            whole = bytearray(prefix[: self.size].ljust(self.size, b"\0"))
            self.overlay(0, whole)
            data = bytes(whole)
            return lambda tx: self._apply_inline(tx, version, data)
        if prefix or len(self.memory) > STORED_PIECES_MAX:
            return None
        base_limit = 0 if inode.flags & Inode.INLINE else self.base_limit
        pieces = [(at, bytes(data)) for at, data in self.memory]
        return lambda tx: self._apply_stored(tx, version, base_limit, pieces)

    def _commit_once(self) -> Inode:
        function = self.mutation()
        if function is not None:
            return self._finish(self._volume.mutate(function))
        inode, prefix, _ = self._base()
        version = inode.version
        inline_now = bool(inode.flags & Inode.INLINE)
        writers: list[ExtentWriter] = []
        try:
            pieces = self._write_out([(0, bytearray(prefix[: self.size]))] if prefix else [], writers)
            pieces += self.spilled
            pieces += self._write_out(self.memory, writers)
            self._volume.segments.sync_writers([*self._writers, *writers])
            for writer in [*self._writers, *writers]:
                writer.committing()
            base_limit = 0 if inline_now else self.base_limit
            inode = self._volume.mutate(lambda tx: self._apply_extents(tx, version, base_limit, pieces))
        except BaseException as error:
            for writer in self._writers:
                writer.reopen()
            for writer in writers:
                writer.__exit__(type(error), error, None)
            raise
        for writer in [*self._writers, *writers]:
            writer.keep()
        for writer in writers:
            writer.close()
        return self._finish(inode)

    def _finish(self, inode: Inode) -> Inode:
        self.forget()
        return inode

    def forget(self) -> None:
        """Drop everything: it is committed, or nobody can ask for it any more."""
        for writer in self._writers:
            writer.close()
        for extent in self._cut_off:
            if extent.copy is not None:
                self._volume.relief.discard(extent.copy[0])
                continue
            self._volume.segments.free(extent.segment, extent.offset, extent.length, whole=extent.private)
        self._writers = []
        self._cut_off = []
        self.spilled = []
        self.memory = []
        self.memory_bytes = 0
        self.mtime_ns = 0
        self.base_limit = FOREVER

    def _current(self, tx: MetadataTransaction, version: int) -> Inode:
        inode = tx.inode(self.number)
        if inode.version != version:
            raise TryAgain("the file changed between preparing and committing")
        return inode

    def _apply_inline(self, tx: MetadataTransaction, version: int, data: bytes) -> Inode:
        inode = self._current(tx, version)
        if not inode.flags & Inode.INLINE:
            tx.cut_slices(self.number, 0, FOREVER)
        if data:
            content.put_inline(tx, inode, data)
        else:
            content.drop_inline(tx, inode)
        return self._touch(tx, inode)

    def _apply_extents(self, tx: MetadataTransaction, version: int, base_limit: int, pieces: list[_Piece]) -> Inode:
        inode = self._current(tx, version)
        content.drop_inline(tx, inode)
        if base_limit < inode.size:
            tx.cut_slices(self.number, base_limit, FOREVER)
        for piece in pieces:
            tx.cut_slices(self.number, piece.at, piece.at + piece.length)
            tx.add_extent(piece.extent)
            tx.put_slice(self.number, Slice(piece.at, piece.length, piece.extent.number, 0))
        compaction.note(tx, inode, len(pieces))
        return self._touch(tx, inode)

    def _apply_stored(
        self, tx: MetadataTransaction, version: int, base_limit: int, pieces: list[tuple[int, bytes]]
    ) -> Inode:
        inode = self._current(tx, version)
        content.drop_inline(tx, inode)
        if base_limit < inode.size:
            tx.cut_slices(self.number, base_limit, FOREVER)
        for offset, data in pieces:
            extent, at, length = stored_extents.put(tx, self.number, offset, data)
            tx.cut_slices(self.number, at, at + length)
            tx.put_slice(self.number, Slice(at, length, extent, 0))
        compaction.note(tx, inode, len(pieces))
        return self._touch(tx, inode)

    def _touch(self, tx: MetadataTransaction, inode: Inode) -> Inode:
        assert inode.kind == Kind.FILE, "only files have content"
        content.set_size(tx, inode, self.size)
        changed_content(tx, inode, self.mtime_ns)
        return inode


def changed_content(tx: MetadataTransaction, inode: Inode, mtime_ns: int) -> None:
    """What every change of content does: a new version and so a new ETag; checksums and parts are no longer true."""
    inode.version += 1
    inode.etag_parts = ETAG_PARTS_VERSIONED
    inode.mtime_ns = mtime_ns
    inode.ctime_ns = tx.now_ns
    metadata = objects.metadata_of(tx, inode)
    if metadata.checksums or metadata.part_sizes or metadata.upload_id:
        objects.set_metadata(
            tx, inode, replace(metadata, checksums={}, checksum_type="", part_sizes=[], part_checksums=[], upload_id="")
        )
    tx.dirty(inode)
    tx.changed(0, b"", inode.number)


def truncate_now(tx: MetadataTransaction, number: int, size: int) -> Inode:
    """truncate(2) of a file nobody has open for writing here. O(slices cut); growing is O(1)."""
    inode = tx.inode(number)
    tree.check_writable(tx, inode)
    if size < inode.size:
        if inode.flags & Inode.INLINE:
            data = content.get_inline(tx, number)[:size]
            content.drop_inline(tx, inode)
            if data:
                content.put_inline(tx, inode, data)
        else:
            tx.cut_slices(number, size, FOREVER)
    content.set_size(tx, inode, size)
    changed_content(tx, inode, tx.now_ns)
    return inode
