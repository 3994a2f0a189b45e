"""The bytes of an inode: inline for small ones, slices of extents otherwise; how they are put, read and freed.

Invariants
* Content reaches an inode only in the transaction that makes it durable and visible.
* A read works on the slices of one snapshot; the volume's reader guard keeps their extents until it ends.
* Every byte returned was verified against its checksum.
* Inline bytes are a prefix of the file; what lies behind them up to its size is a hole.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stratum import copies, evidence, frozen, stored_extents
from stratum.blocks import checksum, verified
from stratum.damage import Thing
from stratum.deadlines import Deadline
from stratum.errors import DataDamaged, NotFound, TierUnavailable
from stratum.read_ahead import ReadAhead
from stratum.schema import (
    ELSEWHERE_SEGMENT,
    ETAG_PARTS_VERSIONED,
    STORED_SEGMENT,
    Inode,
    Kind,
    Slice,
    key_u64,
    prefix_range,
)
from stratum.transaction import SLICES_FREED_AT_ONCE_MAX

if TYPE_CHECKING:
    from collections.abc import Callable

    from stratum.segments import PreparedExtent
    from stratum.tier_rows import CopyRow
    from stratum.transaction import InodeReader, MetadataTransaction
    from stratum.volume import Volume

INLINE_BYTES_MAX = 16 * 1024
"""Files up to this size live in the metadata store. See docs/decisions/0003-inline-size.md."""
READ_BYTES = 1024 * 1024
EMPTY_MD5 = hashlib.md5(b"").digest()
_ZEROS = bytes(READ_BYTES)


@dataclass(slots=True)
class NewContent:
    """Bytes ready to be committed: either `inline` or durable `extents`."""

    size: int
    inline: bytes | None = None
    extents: list[PreparedExtent] = field(default_factory=list)


def get_inline(reader: InodeReader, number: int) -> bytes:
    """The content of an inline file, verified."""
    return verified(reader.get(key_u64(b"N", number)), f"the content of inode {number}")


def put_inline(tx: MetadataTransaction, inode: Inode, data: bytes) -> None:
    inode.flags |= Inode.INLINE
    if inode.kind == Kind.FILE:
        inode.allocated = len(data)
    tx.put(key_u64(b"N", inode.number), checksum(data) + data)


def drop_inline(tx: MetadataTransaction, inode: Inode) -> None:
    if inode.flags & Inode.INLINE:
        inode.flags &= ~Inode.INLINE
        if inode.kind == Kind.FILE:
            inode.allocated = 0
        tx.delete(key_u64(b"N", inode.number))


def set_size(tx: MetadataTransaction, inode: Inode, size: int) -> None:
    tx.usage(inode.bucket, 0, size - inode.size)
    inode.size = size
    tx.dirty(inode)


def copy_etag(source: Inode, target: Inode) -> None:
    """Equal bytes, equal ETag: the counter form of a file that the mount wrote becomes a plain value."""
    if source.kind == Kind.FILE and source.etag_parts == ETAG_PARTS_VERSIONED:
        target.etag, target.etag_parts = bytes.fromhex(source.etag_text.split("-")[0]), 1
    else:
        target.etag, target.etag_parts = source.etag, source.etag_parts


def put_new(tx: MetadataTransaction, inode: Inode, new: NewContent) -> None:
    """Give a fresh inode its content."""
    if new.inline is not None:
        if new.inline:
            put_inline(tx, inode, new.inline)
    else:
        at = 0
        for prepared in new.extents:
            tx.add_extent(prepared)
            tx.put_slice(inode.number, Slice(at, prepared.length, prepared.number, 0))
            at += prepared.length
        assert at == new.size, "the extents are not as long as the content"
    set_size(tx, inode, new.size)


def share(
    tx: MetadataTransaction, source: Inode, target: Inode, *, start: int = 0, stop: int | None = None, at: int = 0
) -> None:
    """Let `target` show bytes [start, stop) of `source` from `at` on, without copying extents.

    Inline content is copied, which needs `target` to be empty so far.
    """
    stop = source.size if stop is None else stop
    if source.flags & Inode.INLINE:
        assert at == 0, "inline content starts a file"
        put_inline(tx, target, get_inline(tx, source.number)[start:stop])
    else:
        pieces = tx.slices(source.number, start, stop)
        for piece in pieces:
            first, last = max(piece.file_offset, start), min(piece.end, stop)
            shown = Slice(
                at + first - start, last - first, piece.extent, piece.extent_offset + first - piece.file_offset
            )
            tx.put_slice(target.number, shown, moved=True)
            tx.reference_extent(piece.extent, 1)
        if pieces:
            evidence.shared(tx, target.number, source.number)
    set_size(tx, target, max(target.size, at + stop - start))


def free_inode(tx: MetadataTransaction, inode: Inode) -> None:
    """Remove an inode without names; many slices go later, in small transactions."""
    number = inode.number
    drop_inline(tx, inode)
    if inode.flags & Inode.HAS_METADATA:
        tx.delete(key_u64(b"M", number))
    for key, _ in list(tx.scan(*prefix_range(key_u64(b"Y", number)))):
        tx.delete(key)
    if inode.kind == Kind.FILE:
        tx.usage(inode.bucket, 0, -inode.size)
        evidence.forget(tx, number)
        if not tx.free_slices(number, SLICES_FREED_AT_ONCE_MAX):
            tx.put(key_u64(b"W", number), b"")
    elif inode.kind == Kind.DIRECTORY:
        frozen.stop_waiting(tx, number)
    tx.remove_inode(number)


@dataclass(slots=True)
class ReadPlan:
    """One committed state of a file's bytes."""

    inode: Inode
    inline: bytes | None
    slices: list[Slice]


def plan_read(reader: InodeReader, inode: Inode, start: int = 0, stop: int | None = None) -> ReadPlan:
    """What is needed to read [start, stop) later. With slices, the caller must hold the volume's reader guard."""
    if inode.flags & Inode.INLINE:
        return ReadPlan(inode, get_inline(reader, inode.number), [])
    if inode.kind != Kind.FILE or not inode.size:
        return ReadPlan(inode, b"", [])
    return ReadPlan(inode, None, reader.slices(inode.number, start, inode.size if stop is None else stop))


def read_extent(
    volume: Volume,
    number: int,
    start: int,
    stop: int,
    *,
    may_wait: bool = True,
    may_recall: bool = True,
    goes_to: Callable[[CopyRow, int], int] = copies.to_its_end,
    deadline: Deadline | None = None,
    patience_s: float = copies.PATIENCE_S,
) -> bytes | memoryview:
    """Bytes of an extent from `start` on, wherever they lie: up to `stop`, or fewer of a cold one (at least one).

    `goes_to` says how far the reader of a pack is likely to go on (`ReadAhead`), `patience_s` how long he waits for more than a block. `deadline` is the request's; without one
    a remote has `cold.recall_s_max`. On damage the extent's row is read again: it may have moved since.
    Raises `DataDamaged`, `TierUnavailable` or `NeedsRestore`, `WouldWait` if a disk must be asked and `may_wait` is not set, and
    `WouldRecall` if a remote must be and `may_recall` is not.
    """
    generation = 0
    while True:
        with volume.snapshot() as reader:
            row, checksums = reader.extent(number)
            if row.segment == STORED_SEGMENT:
                return _stored(volume, reader, number)[start:stop]
            hot = row.segment != ELSEWHERE_SEGMENT
            again = row.generation == generation
            located = copies.locate(reader, number) if again or not hot else []
        generation = row.generation
        try:
            if hot and not (again and located):
                return volume.segments.read(
                    number, row.segment, row.offset, row.length, checksums, start, stop, may_wait=may_wait
                )
            deadline = deadline or Deadline(volume.config.cold_recall_s_max)
            data = copies.read(
                volume, number, row, checksums, located, start, stop, may_wait=may_wait, may_recall=may_recall,
                goes_to=goes_to, deadline=deadline, patience_s=patience_s,
            )  # fmt: skip
        except (DataDamaged, TierUnavailable) as error:
            late = isinstance(error, TierUnavailable) and deadline is not None and deadline.passed
            if again or late:
                if isinstance(error, DataDamaged):
                    volume.damages.read(number, start, stop, error, other_places=hot or len(located) > 1)
                raise
        else:
            if hot:
                what = f"the hot bytes of extent {number:016x} are damaged or gone, and a copy is good"
                volume.damages.found(Thing.EXTENT, number, what, by="read", heals=True)
            return data


def _stored(volume: Volume, reader: InodeReader, number: int) -> bytes:
    try:
        return stored_extents.get(reader, number)
    except DataDamaged as error:
        volume.damages.found(Thing.EXTENT, number, error.message, by="read")
        raise


class PlannedRead:
    """The bytes [start, stop) of a plan, in pieces of at most READ_BYTES; holes are zeros.

    An iterator that stands still when a piece raises: what would have to wait can be asked for again by somebody who may.
    `ahead` knows where the reader goes on behind `stop`; without it, nothing beyond that is asked of a remote. `deadline` is the request's;
    without one each piece has its own.
    """

    def __init__(
        self,
        volume: Volume,
        plan: ReadPlan,
        start: int,
        stop: int,
        *,
        may_wait: bool,
        may_recall: bool,
        ahead: ReadAhead | None = None,
        deadline: Deadline | None = None,
    ) -> None:
        self._volume = volume
        self._plan = plan
        self._at = start
        self._stop = stop
        self._slice = 0
        self._began = False
        self._ahead = ahead
        self._deadline = deadline
        self.may_wait = may_wait
        self.may_recall = may_recall

    def __iter__(self) -> PlannedRead:
        return self

    def __next__(self) -> bytes | memoryview:
        if self._at >= self._stop:
            raise StopIteration
        piece = self._next()
        self._at += len(piece)
        self._began = True
        return piece

    def _next(self) -> bytes | memoryview:
        plan, at, stop = self._plan, self._at, self._stop
        if plan.inline is not None:
            return plan.inline[at:stop] if at < len(plan.inline) else _zeros(stop - at)
        slices = plan.slices
        while self._slice < len(slices) and slices[self._slice].end <= at:
            self._slice += 1
        if self._slice == len(slices):
            return _zeros(stop - at)
        piece = slices[self._slice]
        if piece.file_offset > at:
            return _zeros(min(piece.file_offset, stop) - at)
        end = min(piece.end, stop)
        inside = at - piece.file_offset + piece.extent_offset
        count = min(READ_BYTES - inside % READ_BYTES, end - at)
        return read_extent(
            self._volume, piece.extent, inside, inside + count, may_wait=self.may_wait, may_recall=self.may_recall,
            goes_to=self._goes_to, deadline=self._deadline, patience_s=copies.PATIENCE_S if self._began else 0.0,
        )  # fmt: skip

    def _goes_to(self, place: CopyRow, at: int) -> int:
        if self._ahead is None:
            self._ahead = ReadAhead(self._volume, self._plan.slices, self._stop)
        return self._ahead.goes_to(self._at, place, at)


def read_planned(
    volume: Volume,
    plan: ReadPlan,
    start: int,
    stop: int,
    *,
    may_wait: bool = True,
    may_recall: bool = True,
    ahead: ReadAhead | None = None,
    deadline: Deadline | None = None,
) -> PlannedRead:
    """See `PlannedRead`. Its pieces raise what `read_extent` does."""
    return PlannedRead(
        volume, plan, start, stop, may_wait=may_wait, may_recall=may_recall, ahead=ahead, deadline=deadline
    )


def _zeros(count: int) -> bytes:
    return _ZEROS if count >= READ_BYTES else bytes(count)


def require_inode(reader: InodeReader, number: int) -> Inode | None:
    try:
        return reader.inode(number)
    except NotFound:
        return None
