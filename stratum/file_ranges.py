"""Parts of files as such: where there are bytes, making holes, and letting one file show a part of another.

Invariants
* What is shared are extents, which are immutable and count their references; only inline bytes are copied.
* Each change is one transaction: the file is as it was or as it is to be, with a new version, for both faces at once.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from stratum import compaction, content, evidence, stored_extents, tree
from stratum.content import INLINE_BYTES_MAX
from stratum.errors import InvalidArgument
from stratum.schema import Inode, Kind, Slice, key_u64_u64, split_u64_u64
from stratum.write_buffer import FOREVER, changed_content

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from stratum.transaction import InodeReader, MetadataTransaction
    from stratum.volume import Volume

SLICES_AT_ONCE = 1024
"""Shared in one transaction, and read in one snapshot."""


def _first_slices(reader: InodeReader, number: int, start: int, stop: int) -> list[Slice]:
    """The first SLICES_AT_ONCE of those that touch [start, stop), ascending: a file may have a hundred thousand."""
    found = reader.slices(number, start, start)  # the one that begins before it
    rows = reader.first_rows(key_u64_u64(b"S", number, start), key_u64_u64(b"S", number, stop), SLICES_AT_ONCE)
    found += [Slice.unpack(split_u64_u64(key)[1], raw) for key, raw in rows]
    return found[:SLICES_AT_ONCE]


# -- where there are bytes ----------------------------------------------------------------------------------------------


def _committed(volume: Volume, number: int, start: int, limit: int) -> Iterator[tuple[int, int]]:
    """Parts (start, stop) that hold bytes, ascending, from the one around or behind `start` on; none at or beyond `limit`."""
    while True:
        with volume.snapshot() as reader:
            inode = content.require_inode(reader, number)
            if inode is None:
                return
            if inode.flags & Inode.INLINE:
                yield 0, min(limit, len(content.get_inline(reader, number)))
                return
            pieces = _first_slices(reader, number, start, limit)
        for piece in pieces:
            yield piece.file_offset, min(limit, piece.end)
        if len(pieces) < SLICES_AT_ONCE:
            return
        start = pieces[-1].end


def next_data(parts: Iterable[tuple[int, int]], offset: int, size: int) -> int | None:
    """Where the first byte from `offset` on is, as SEEK_DATA has it; None if a hole goes to the end."""
    for start, stop in parts:
        if stop > offset:
            found = max(start, offset)
            return found if found < size else None
    return None


def next_hole(parts: Iterable[tuple[int, int]], offset: int, size: int) -> int:
    """Where the first hole from `offset` on begins, as SEEK_HOLE has it: the end of a file is one."""
    for start, stop in parts:
        if start > offset or offset >= size:
            break
        offset = max(offset, stop)
    return min(offset, size)


def parts_with_bytes(
    volume: Volume, number: int, start: int, *, limit: int = FOREVER, unwritten: Iterable[tuple[int, int]] = ()
) -> Iterator[tuple[int, int]]:
    """The parts of a file that hold bytes, from the one around or behind `start` on, by where they begin; they may overlap.

    `unwritten` are those that only a mount knows, ascending; of what is committed nothing counts from `limit` on.
    """
    return heapq.merge(_committed(volume, number, start, limit), unwritten)


def hole_bytes(reader: InodeReader, inode: Inode, start: int, stop: int) -> int:
    """How much of [start, stop) takes no room."""
    if inode.flags & Inode.INLINE:
        return max(0, stop - max(start, len(content.get_inline(reader, inode.number))))
    pieces = reader.slices(inode.number, start, stop)
    return stop - start - sum(min(piece.end, stop) - max(piece.file_offset, start) for piece in pieces)


# -- changes ------------------------------------------------------------------------------------------------------------


def make_hole(tx: MetadataTransaction, number: int, start: int, stop: int, *, grows: bool) -> Inode:
    """Let [start, stop) read as zeros and take no room; what of it lies beyond the end counts only if the file `grows`."""
    inode = tx.inode(number)
    tree.check_writable(tx, inode)
    if inode.flags & Inode.INLINE:
        data = content.get_inline(tx, number)
        data = data[:start] + bytes(max(0, min(stop, len(data)) - start)) + data[stop:]
        content.drop_inline(tx, inode)
        if stop >= len(data):
            data = data[:start]
        if data:
            content.put_inline(tx, inode, data)
    else:
        tx.cut_slices(number, start, stop, moved=True)
    if grows and stop > inode.size:
        content.set_size(tx, inode, stop)
    changed_content(tx, inode, tx.now_ns)
    return inode


def share(tx: MetadataTransaction, source: int, start: int, target: int, at: int, length: int) -> int:
    """Let `target` show from `at` on what `source` shows from `start` on, up to its end.

    Returns for how many bytes it does; fewer than `length` before the end of `source` if those lie in many pieces. Raises `InvalidArgument`.
    """
    origin, inode = tx.inode(source), tx.inode(target)
    if origin.kind != Kind.FILE or inode.kind != Kind.FILE:
        raise InvalidArgument("only a regular file has a part that another one can show")
    tree.check_writable(tx, inode)
    stop = min(start + length, origin.size)
    if start >= stop:
        return 0
    if source == target and abs(start - at) < stop - start:
        raise InvalidArgument("a part of a file cannot be copied onto itself")
    if origin.flags & Inode.INLINE:
        _copy_inline(tx, content.get_inline(tx, source)[start:stop], inode, at, stop - start)
    else:
        stop = _share_slices(tx, source, start, stop, inode, at)
    content.set_size(tx, inode, max(inode.size, at + stop - start))
    changed_content(tx, inode, tx.now_ns)
    return stop - start


def _copy_inline(tx: MetadataTransaction, data: bytes, inode: Inode, at: int, length: int) -> None:
    """Put `data`, and zeros up to `length`, into a file at `at`."""
    is_small = at + length <= INLINE_BYTES_MAX and inode.size <= INLINE_BYTES_MAX
    if is_small and not tx.has_slices(inode.number, INLINE_BYTES_MAX):
        before = content.get_inline(tx, inode.number) if inode.flags & Inode.INLINE else b""
        whole = before[:at].ljust(at, b"\0") + data.ljust(length, b"\0") + before[at + length :]
        content.put_inline(tx, inode, whole)
        return
    _leave_inline(tx, inode)
    tx.cut_slices(inode.number, at, at + length, moved=True)
    _store(tx, inode.number, at, data)


def _leave_inline(tx: MetadataTransaction, inode: Inode) -> None:
    """Put inline bytes into an extent, so that others can stand beside them."""
    if inode.flags & Inode.INLINE:
        data = content.get_inline(tx, inode.number)
        content.drop_inline(tx, inode)
        _store(tx, inode.number, 0, data)


def _store(tx: MetadataTransaction, number: int, at: int, data: bytes) -> None:
    if data:
        extent, at, length = stored_extents.put(tx, number, at, data)
        tx.cut_slices(number, at, at + length)
        tx.put_slice(number, Slice(at, length, extent, 0))


def _share_slices(tx: MetadataTransaction, source: int, start: int, stop: int, inode: Inode, at: int) -> int:
    """Where in `source` it has come to."""
    pieces = _first_slices(tx, source, start, stop)
    if len(pieces) == SLICES_AT_ONCE:
        stop = min(stop, pieces[-1].end)
    _leave_inline(tx, inode)
    for piece in pieces:
        tx.reference_extent(piece.extent, 1)  # first: they may lie in what is cut next, and in nothing else
    tx.cut_slices(inode.number, at, at + stop - start, moved=True)
    for piece in pieces:
        first, last = max(piece.file_offset, start), min(piece.end, stop)
        inside = piece.extent_offset + first - piece.file_offset
        tx.put_slice(inode.number, Slice(at + first - start, last - first, piece.extent, inside), moved=True)
    if pieces:
        evidence.shared(tx, inode.number, source)
        compaction.note(tx, inode, len(pieces))
    return stop
