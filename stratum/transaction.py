"""A metadata transaction as the engine sees it: decoded inodes, link and usage counts, the change log.

Invariants
* Decoded inodes, extents and segments live in this object's caches until `flush`; a row that changed several times in one
  batch is packed once. Nobody else reads or writes those rows in the same transaction.
* `writes` grows with every change, cached ones included: a closure that raised before its first write left nothing.
* Every mutation that a mount could have cached calls `changed`.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from stratum import evidence, frozen, packs, quotas
from stratum.blocks import CHECKSUM_BYTES
from stratum.errors import Gone, NotFound, SessionDead
from stratum.kv.contract import prefix_end
from stratum.schema import (
    ELSEWHERE_SEGMENT,
    EXTENT_CHECKSUMS_INLINE_BYTES_MAX,
    STORED_SEGMENT,
    ChangeRow,
    ExtentRow,
    Inode,
    SegmentRow,
    Slice,
    key_u64,
    key_u64_u64,
    pack_json,
    pack_u64,
    split_u64_u64,
    unpack_json,
)  # fmt: skip

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from stratum.kv.contract import Snapshot, Transaction
    from stratum.segments import PreparedExtent

SLICES_FREED_AT_ONCE_MAX = 1024


class InodeReader:
    """Typed reads over any snapshot."""

    may_change = False

    def __init__(self, kv: Snapshot) -> None:
        self.kv = kv
        self.get = kv.get
        self.id = kv.id
        self._any_frozen: bool | None = None

    @property
    def any_frozen(self) -> bool:
        """Whether a clone may still be being filled (frozen.py)."""
        if self._any_frozen is None:
            self._any_frozen = self.get(frozen.ACTIVE) is not None
        return self._any_frozen

    def see_rows_only(self) -> None:
        """Show directories of clones as they are, without what they still wait for."""
        self._any_frozen = False

    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        return self.kv.get_many(keys)

    def scan(self, start: bytes, stop: bytes) -> Iterator[tuple[bytes, bytes]]:
        return self.kv.scan(start, stop)

    def first_rows(self, start: bytes, stop: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        return self.kv.first_rows(start, stop, limit)

    def scan_prefix(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        return self.kv.scan(prefix, prefix_end(prefix))

    def last_before(self, start: bytes, stop: bytes) -> tuple[bytes, bytes] | None:
        return self.kv.last_before(start, stop)

    def inode(self, number: int) -> Inode:
        """Raises `Gone` if the inode is."""
        raw = self.get(key_u64(b"I", number))
        if raw is None:
            raise Gone(f"inode {number} is gone: its last name was removed", inode=number)
        return Inode.unpack(number, raw)

    def has_inode(self, number: int) -> bool:
        return self.get(key_u64(b"I", number)) is not None

    def extent(self, number: int) -> tuple[ExtentRow, bytes]:
        """The row and its block checksums."""
        raw = self.get(key_u64(b"X", number))
        if raw is None:
            raise NotFound(f"extent {number:#x} has no row; run `stratum fsck`", extent=number)
        row, checksums = ExtentRow.unpack(raw)
        if row.segment == STORED_SEGMENT:
            return row, b""
        return row, checksums or self.get(key_u64(b"K", number)) or b""

    def usage_of(self, bucket: int) -> tuple[int, int]:
        """(objects, bytes) that a bucket holds."""
        raw = self.get(key_u64(b"H", bucket))
        found = unpack_json(raw) if raw else {"objects": 0, "bytes": 0}
        return found["objects"], found["bytes"]

    def allocated_by_rows(self, inode: Inode, limit: int) -> int | None:
        """What `Inode.allocated` should be, counted; None if more than `limit` slices would have to be."""
        if inode.flags & Inode.INLINE:
            return len(self.get(key_u64(b"N", inode.number)) or b"") - CHECKSUM_BYTES
        rows = self.first_rows(key_u64_u64(b"S", inode.number, 0), key_u64_u64(b"S", inode.number, 1 << 63), limit + 1)
        return sum(Slice.unpack(0, raw).length for _, raw in rows) if len(rows) <= limit else None

    def has_slices(self, inode: int, stop: int) -> bool:
        """Whether anything of [0, stop) lies in an extent; a file may have a hundred thousand of them."""
        return bool(self.first_rows(key_u64_u64(b"S", inode, 0), key_u64_u64(b"S", inode, stop), 1))

    def slices(self, inode: int, start: int = 0, stop: int = 1 << 63) -> list[Slice]:
        """The slices that touch [start, stop), ascending."""
        found: list[Slice] = []
        before = self.last_before(key_u64_u64(b"S", inode, 0), key_u64_u64(b"S", inode, start))
        if before is not None:
            first = Slice.unpack(split_u64_u64(before[0])[1], before[1])
            if first.end > start:
                found.append(first)
        for key, raw in self.scan(key_u64_u64(b"S", inode, start), key_u64_u64(b"S", inode, stop)):
            found.append(Slice.unpack(split_u64_u64(key)[1], raw))
        return found


class MetadataTransaction(InodeReader):
    """One batch of mutations. Made by the committer only."""

    may_change = True

    def __init__(self, kv: Transaction, session: int, new_id: Callable[[], int]) -> None:
        super().__init__(kv)
        self._plain = kv
        self._kv: Transaction | frozen.Preserving = kv
        newest, active = frozen.active(kv)
        self._any_frozen = newest > 0
        if active:
            self.preserve(newest)
        self.session = session
        self.new_id = new_id
        self.now_ns = time.time_ns()
        self.writes = 0
        self.changes: list[bytes] = []
        """What mounts must forget, as rows of the change log."""
        self._inodes: dict[int, Inode] = {}
        self._dirty: set[int] = set()
        self._added: set[int] = set()
        """Inodes that are not counted in their bucket yet."""
        self._extents: dict[int, tuple[ExtentRow, bytes]] = {}
        self._extents_new: set[int] = set()
        self._segments: dict[int, SegmentRow] = {}
        self._usage: dict[int, list[int]] = {}
        """By bucket: objects, bytes and inodes more than before."""
        self._growth: dict[int, tuple[int, int]] = {}
        self._written: set[int] = set()
        self._mounts: list[int] | None = None
        if session and self.get(key_u64(b"Z", session)) is None:
            raise SessionDead("this process was declared dead by another one and may not write any more; restart it")

    # -- rows ---------------------------------------------------------------------------------------------------------

    def put(self, key: bytes, value: bytes) -> None:
        self.writes += 1
        self._kv.put(key, value)

    def delete(self, key: bytes) -> bool:
        self.writes += 1
        return self._kv.delete(key)

    def preserve(self, newest: int) -> None:
        """From now on keep what changed rows were, for this freeze."""
        self._any_frozen = True
        self._kv = frozen.Preserving(self._plain, newest)

    @contextmanager
    def filling(self) -> Iterator[None]:
        """While rows of a clone are put, of which no frozen state knows."""
        before, self._kv = self._kv, self._plain
        try:
            yield
        finally:
            self._kv = before

    def flush(self) -> None:
        """Write what the caches hold. The committer calls it last, a freeze in between."""
        put = self._kv.put
        for number in self._written:
            if self.has_inode(number):
                evidence.wrote(self, number)
        self._written.clear()
        for number in self._dirty:
            put(key_u64(b"I", number), self._inodes[number].pack())
        for number, (row, checksums) in self._extents.items():
            put(key_u64(b"X", number), row.pack(checksums))
            if number in self._extents_new and len(checksums) > EXTENT_CHECKSUMS_INLINE_BYTES_MAX:
                put(key_u64(b"K", number), checksums)
        for number, segment in self._segments.items():
            put(key_u64(b"G", number), segment.pack())
        for number in self._added:
            self._usage.setdefault(self._inodes[number].bucket, [0, 0, 0])[2] += 1
        for bucket, (objects, size, inodes) in self._usage.items():
            if not self.has_inode(bucket):
                continue  # the last users of its files let go after the bucket went
            key = key_u64(b"H", bucket)
            counts = unpack_json(self.get(key) or b'{"objects":0,"bytes":0}')
            counted = "inodes" if "inodes" in counts or bucket in self._added else "since"
            for name, more in (("objects", objects), ("bytes", size), (counted, inodes)):
                counts[name] = counts.get(name, 0) + more
            put(key, pack_json(counts))
        self._dirty.clear()
        self._added.clear()
        self._extents.clear()
        self._extents_new.clear()
        self._segments.clear()
        self._usage.clear()

    # -- inodes -------------------------------------------------------------------------------------------------------

    def inode(self, number: int) -> Inode:
        cached = self._inodes.get(number)
        if cached is None:
            cached = self._inodes[number] = super().inode(number)
        return cached

    def has_inode(self, number: int) -> bool:
        return number in self._inodes or super().has_inode(number)

    def add_inode(self, inode: Inode) -> Inode:
        self._inodes[inode.number] = inode
        self._added.add(inode.number)
        self.dirty(inode)
        return inode

    def dirty(self, inode: Inode) -> None:
        self.writes += 1
        self._dirty.add(inode.number)

    def remove_inode(self, number: int) -> None:
        if number in self._added:
            self._added.remove(number)
        elif self.has_inode(number):
            self._usage.setdefault(self.inode(number).bucket, [0, 0, 0])[2] -= 1
        self._inodes.pop(number, None)
        self._dirty.discard(number)
        self.delete(key_u64(b"I", number))

    def move_inode(self, inode: Inode, bucket: int) -> None:
        """To another bucket, without what it counts for there."""
        if inode.number not in self._added:
            self._usage.setdefault(inode.bucket, [0, 0, 0])[2] -= 1
            self._usage.setdefault(bucket, [0, 0, 0])[2] += 1
        inode.bucket = bucket
        self.dirty(inode)

    def usage(self, bucket: int, objects: int, size: int, *, checked: bool = True) -> None:
        """`checked`: quotas are asked about it."""
        if objects or size:
            self.writes += 1
            entry = self._usage.setdefault(bucket, [0, 0, 0])
            entry[0] += objects
            entry[1] += size
            if not checked:
                return
            before = self._growth.get(bucket, (0, 0))
            self._growth[bucket] = (before[0] + objects, before[1] + size)

    def usage_of(self, bucket: int) -> tuple[int, int]:
        objects, size = super().usage_of(bucket)
        more = self._usage.get(bucket, (0, 0, 0))
        return objects + more[0], size + more[1]

    def check_quotas(self, *, frees: bool) -> None:
        """Called after each mutation of a batch. Raises `QuotaExceeded` if this one passed a quota."""
        growth, self._growth = self._growth, {}
        if growth and not frees and quotas.any_set(self):
            quotas.check(self, growth)

    def forget_usage(self, bucket: int) -> None:
        self._usage.pop(bucket, None)
        self.delete(key_u64(b"H", bucket))

    # -- extents ------------------------------------------------------------------------------------------------------

    def extent(self, number: int) -> tuple[ExtentRow, bytes]:
        cached = self._extents.get(number)
        return cached if cached is not None else super().extent(number)

    def has_extent(self, number: int) -> bool:
        return number in self._extents or self.get(key_u64(b"X", number)) is not None

    def relocate_extent(self, number: int, segment: int, offset: int) -> None:
        """The bytes are elsewhere now; whoever located them before finds out by the generation."""
        row, checksums = self.extent(number)
        self.writes += 1
        row.segment, row.offset = segment, offset
        row.generation += 1
        self._extents[number] = (row, checksums)

    def set_checksums(self, number: int, checksums: bytes) -> None:
        """Of an extent whose row had none, because its bytes had one of their own."""
        self.writes += 1
        self._extents[number] = (self.extent(number)[0], checksums)
        self._extents_new.add(number)

    def segment(self, number: int) -> SegmentRow | None:
        cached = self._segments.get(number)
        if cached is None:
            raw = self.get(key_u64(b"G", number))
            if raw is None:
                return None
            cached = SegmentRow.unpack(raw)
        return cached

    def put_segment(self, number: int, row: SegmentRow) -> None:
        self.writes += 1
        self._segments[number] = row

    def add_extent(self, prepared: PreparedExtent) -> None:
        """Commit bytes that are already durable in a segment; the extent starts with one reference."""
        self.writes += 1
        self._extents[prepared.number] = (
            ExtentRow(prepared.length, prepared.segment, prepared.offset, 1),
            prepared.checksums,
        )
        self._extents_new.add(prepared.number)
        if prepared.copy is not None:
            packs.add_copy(self, prepared.number, prepared.length, *prepared.copy)
        else:
            self.count_in_segment(prepared)

    def count_in_segment(self, prepared: PreparedExtent) -> None:
        segment = self.segment(prepared.segment) or SegmentRow(prepared.path, 0, 0)
        segment.extents += 1
        segment.live_bytes += prepared.length
        self.put_segment(prepared.segment, segment)

    def uncount_in_segment(self, number: int, length: int) -> None:
        """Bytes of one extent were given back."""
        segment = self.segment(number)
        if segment is not None:
            segment.extents -= 1
            segment.live_bytes -= length
            self.put_segment(number, segment)

    def add_stored_extent(self, number: int, length: int) -> None:
        """An extent with one reference whose bytes the caller puts into an E row."""
        self.writes += 1
        self._extents[number] = (ExtentRow(length, STORED_SEGMENT, 0, 1), b"")

    def place_extent(self, number: int, prepared: PreparedExtent) -> bool:
        """Move a stored extent to durable bytes in a segment; False if it was freed or moved meanwhile."""
        if not self.has_extent(number):
            return False
        row, _ = self.extent(number)
        if row.segment != STORED_SEGMENT or not row.references:
            return False
        assert row.length == prepared.length, f"extent {number:#x} changes its length"
        row.segment, row.offset = prepared.segment, prepared.offset
        row.generation += 1
        self.delete(key_u64(b"E", number))
        self._extents[number] = (row, prepared.checksums)
        self._extents_new.add(number)
        self.count_in_segment(prepared)
        return True

    def reference_extent(self, number: int, delta: int) -> None:
        """Change the reference count. At zero the extent stays readable until no reader is older than this transaction."""
        row, checksums = self.extent(number)
        if row.references == 0 and delta > 0:  # a clone of an older state takes it up again: its F row is void
            row.generation += 1
        row.references += delta
        assert row.references >= 0, f"extent {number:#x} has fewer than no references"
        self.writes += 1
        self._extents[number] = (row, checksums)
        if row.references == 0:
            self._free_later(number, row)

    def _free_later(self, number: int, row: ExtentRow) -> None:
        self.put(key_u64_u64(b"F", self.id, number), pack_u64(row.generation))

    def set_references(self, number: int, references: int) -> None:
        """Overwrite a wrong count (fsck)."""
        row, checksums = self.extent(number)
        row.references = references
        self.writes += 1
        self._extents[number] = (row, checksums)
        if references == 0:
            self._free_later(number, row)

    def remove_extent(self, number: int) -> None:
        """Forget an extent whose bytes are reclaimed."""
        row, checksums = self.extent(number)
        self._extents.pop(number, None)
        self.delete(key_u64(b"X", number))
        if row.segment == STORED_SEGMENT:
            self.delete(key_u64(b"E", number))
            return
        if len(checksums) > EXTENT_CHECKSUMS_INLINE_BYTES_MAX:
            self.delete(key_u64(b"K", number))
        if row.segment != ELSEWHERE_SEGMENT:
            self.uncount_in_segment(row.segment, row.length)

    # -- slices -------------------------------------------------------------------------------------------------------

    def _allocate(self, number: int, size: int) -> None:
        """Before a slice comes or goes: the file has `size` bytes more in extents. All changes of slices pass here."""
        if not self.has_inode(number):
            return  # its slices are freed after it
        inode = self.inode(number)
        allocated = inode.allocated
        if allocated is None:
            allocated = self.allocated_by_rows(inode, SLICES_FREED_AT_ONCE_MAX)
        if allocated is not None:
            inode.allocated = allocated + size
            self.dirty(inode)

    def put_slice(self, inode: int, piece: Slice, *, moved: bool = False) -> None:
        """`moved`: the file's bytes are what they were, so this is no evidence of use."""
        self._allocate(inode, piece.length)
        self.put(key_u64_u64(b"S", inode, piece.file_offset), piece.pack())
        self.put(key_u64_u64(b"o", piece.extent, inode), b"")
        if not moved:
            self._written.add(inode)

    def cut_slices(self, inode: int, start: int, stop: int, *, moved: bool = False) -> None:
        """Make [start, stop) a hole. What a cut leaves of a slice keeps its extent. `moved`: as of `put_slice`."""
        for piece in self.slices(inode, start, stop):
            left, right = start - piece.file_offset, piece.end - stop
            self._allocate(inode, -piece.length)
            self.delete(key_u64_u64(b"S", inode, piece.file_offset))
            if left > 0:
                self.put_slice(inode, Slice(piece.file_offset, left, piece.extent, piece.extent_offset), moved=moved)
            if right > 0:
                rest = Slice(stop, right, piece.extent, piece.extent_offset + piece.length - right)
                self.put_slice(inode, rest, moved=moved)
            kept = (left > 0) + (right > 0)
            if kept != 1:
                self.reference_extent(piece.extent, kept - 1)

    def free_slices(self, inode: int, limit: int) -> bool:
        """Free at most `limit` slices; True when none is left."""
        batch: list[tuple[bytes, Slice]] = []
        for key, raw in self.scan_prefix(key_u64(b"S", inode)):
            batch.append((key, Slice.unpack(split_u64_u64(key)[1], raw)))
            if len(batch) >= limit:
                break
        self._allocate(inode, -sum(piece.length for _, piece in batch))
        for key, piece in batch:
            self.delete(key)
            self.reference_extent(piece.extent, -1)
        return len(batch) < limit

    # -- what mounts must forget ---------------------------------------------------------------------------------------

    def live_mounts(self) -> list[int]:
        """Their sessions."""
        if self._mounts is None:
            self._mounts = [int.from_bytes(key[1:], "big") for key, _ in self.scan_prefix(b"T")]
        return self._mounts

    def changed(self, parent: int, entry: bytes, inode: int, *, orphan: bool = False) -> None:
        """Log that `entry` of `parent` (empty: nothing of it) and the attributes of `inode` are not what they were."""
        mounts = self.live_mounts()
        if not mounts or mounts == [self.session]:
            return
        row = ChangeRow(self.session, parent, inode, orphan, entry).pack()
        self.changes.append(row)
        self.put(key_u64_u64(b"L", self.id, len(self.changes)), row)
