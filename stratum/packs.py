"""Where extents lie beside their segment: the rows of packs and of the copies in them.

Invariants
* A pack is COPYING before its first byte is written and VALID after its bytes were verified. Only a VALID pack has c rows.
* An extent without hot bytes (ELSEWHERE_SEGMENT) has a c row of a VALID pack: `free_hot` and `release` check it in their
  transaction, so the last good copy is never given away.
* c and q rows come and go together; a pack's `extents` and `live_bytes` count its q rows.
* A pack that holds nothing is CONDEMNED and has an r row; its bytes go when that is due, then its row.
* Bytes that a free left behind in a segment have an l row until they are given back.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from stratum.blocks import block_checksums, verified
from stratum.errors import NotFound
from stratum.schema import (
    ELSEWHERE_SEGMENT,
    STORED_SEGMENT,
    ExtentRow,
    key_u64,
    key_u64_u64,
    pack_json,
    pack_u64,
    prefix_range,
    split_u64_u64,
    unpack_json,
    unpack_u64,
)
from stratum.tier_rows import CONDEMNED, VALID, CopyRow, PackRow, Tier

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stratum.transaction import InodeReader, MetadataTransaction

GRACE_S_LOCAL = 0.0
"""A reader whose pack is gone reads the extent's rows again, so local bytes need not outlive their last row."""


def copy_key(extent: int, tier: int) -> bytes:
    return key_u64(b"c", extent) + bytes((tier,))


def get(reader: InodeReader, number: int) -> PackRow | None:
    raw = reader.get(key_u64(b"p", number))
    return None if raw is None else PackRow.decode(raw)


def put(tx: MetadataTransaction, number: int, row: PackRow) -> None:
    tx.put(key_u64(b"p", number), row.encode())


def scan(reader: InodeReader, after: int = 0) -> Iterator[tuple[int, PackRow]]:
    for key, raw in reader.scan(key_u64(b"p", after), b"q"):
        yield unpack_u64(key[1:])[0], PackRow.decode(raw)


def members(reader: InodeReader, number: int) -> list[tuple[int, CopyRow]]:
    """(extent, where in the pack), in the order of the extents' numbers."""
    return [
        (split_u64_u64(key)[1], CopyRow.decode(raw)) for key, raw in reader.scan(*prefix_range(key_u64(b"q", number)))
    ]


def copies(reader: InodeReader, extent: int) -> dict[Tier, CopyRow]:
    """The verified copies of an extent, hottest first."""
    return {Tier(key[9]): CopyRow.decode(raw) for key, raw in reader.scan(*prefix_range(key_u64(b"c", extent)))}


def is_hot(row: ExtentRow) -> bool:
    return row.segment != ELSEWHERE_SEGMENT


def tier_of(reader: InodeReader, extent: int, row: ExtentRow) -> Tier:
    """The hottest tier with a copy."""
    return Tier.HOT if is_hot(row) else min(copies(reader, extent))


def publish(tx: MetadataTransaction, number: int, row: PackRow, grace_s: float) -> int:
    """The verified pack becomes VALID, with a copy of each extent that its intent lists.

    The compare-and-swap of a move: what was freed or has changed its place since it was read is left out. A copy in another
    pack of the tier is given up for the one in this. How many copies there are now; with none the pack is condemned.
    """
    before = get(tx, number)
    if before is None or before.state == CONDEMNED:
        return 0
    row.extents = row.live_bytes = 0
    for extent, generation, offset, length in row.intent:
        if not tx.has_extent(extent):
            continue
        found, _ = tx.extent(extent)
        if not found.references or found.generation != generation:
            continue
        put_copy(tx, extent, row.tier, CopyRow(number, offset, length), grace_s)
        row.extents += 1
        row.live_bytes += length
    row.state, row.session, row.upload_id, row.intent = VALID, 0, "", []
    put(tx, number, row)
    if not row.extents:
        condemn(tx, number, row, 0.0)
    return row.extents


def add_copy(tx: MetadataTransaction, extent: int, length: int, number: int, row: PackRow) -> None:
    """A new extent whose bytes are all of a pack already."""
    put(tx, number, row)
    put_copy(tx, extent, row.tier, CopyRow(number, 0, length), GRACE_S_LOCAL)
    missing = [index for index, disk in enumerate(row.disks) if not disk]
    if missing:
        want_repair(tx, number, f"written without shards {missing}")


def put_copy(tx: MetadataTransaction, extent: int, tier: int, place: CopyRow, grace_s: float) -> None:
    """Where an extent lies in a tier. A copy in another pack of the tier is given up for it; the counts of `place.pack` are the caller's."""
    drop_copy(tx, extent, tier, grace_s)
    tx.put(copy_key(extent, tier), place.encode())
    tx.put(key_u64_u64(b"q", place.pack, extent), place.encode())


def condemn(tx: MetadataTransaction, number: int, row: PackRow, grace_s: float) -> None:
    """Its bytes go after `grace_s`; 0 is at once, whatever the clock says."""
    row.state = CONDEMNED
    row.due_s = int(time.time() + grace_s) if grace_s else 0
    put(tx, number, row)
    tx.delete(key_u64(b"h", number))
    tx.put(key_u64_u64(b"r", row.due_s, number), b"")


def drop_copy(tx: MetadataTransaction, extent: int, tier: int, grace_s: float) -> None:
    """The copy is not wanted any more: its extent is gone, or has another."""
    key = copy_key(extent, tier)
    raw = tx.get(key)
    if raw is None:
        return
    place = CopyRow.decode(raw)
    tx.delete(key)
    tx.delete(key_u64_u64(b"q", place.pack, extent))
    row = get(tx, place.pack)
    if row is None:
        return
    row.extents -= 1
    row.live_bytes -= place.length
    if row.extents:
        put(tx, place.pack, row)
    else:
        condemn(tx, place.pack, row, grace_s)


def release(tx: MetadataTransaction, extent: int, tier: int, generation: int, grace_s: float) -> bool:
    """Drop a copy if another good one is left: the hot bytes, or a copy in another tier. False: it stays."""
    if not tx.has_extent(extent):
        return False
    row, _ = tx.extent(extent)
    others = [other for other in copies(tx, extent) if other != tier]
    if row.generation != generation or not row.references or not (is_hot(row) or _any_valid(tx, extent, others)):
        return False
    drop_copy(tx, extent, tier, grace_s)
    # Who located the copy before reads the rows again when it finds it gone.
    tx.relocate_extent(extent, row.segment, row.offset)
    return True


def _any_valid(reader: InodeReader, extent: int, tiers: list[Tier]) -> bool:
    for tier in tiers:
        raw = reader.get(copy_key(extent, tier))
        row = get(reader, CopyRow.decode(raw).pack) if raw is not None else None
        if row is not None and row.state == VALID:
            return True
    return False


def leave_behind(tx: MetadataTransaction, row: ExtentRow) -> None:
    """The bytes of an extent in its segment are to be given back once no reader can look for them there."""
    tx.put(key_u64_u64(b"l", row.segment, row.offset), pack_u64(row.length))


def free_hot(tx: MetadataTransaction, extent: int, generation: int) -> int:
    """Give up the hot bytes of an extent that has a verified copy elsewhere; how many bytes that frees (0: none)."""
    if not tx.has_extent(extent):
        return 0
    row, _ = tx.extent(extent)
    if row.generation != generation or not is_hot(row) or not row.references:
        return 0
    if not _any_valid(tx, extent, list(copies(tx, extent))):
        return 0
    if row.segment == STORED_SEGMENT:
        data = verified(tx.get(key_u64(b"E", extent)), f"extent {extent:#x}")
        tx.set_checksums(extent, block_checksums(data))
        tx.delete(key_u64(b"E", extent))
    else:
        leave_behind(tx, row)
    tx.relocate_extent(extent, ELSEWHERE_SEGMENT, 0)
    return row.length


def forget_extent(tx: MetadataTransaction, extent: int, grace_s: float) -> None:
    """The extent is gone: its copies and owner rows go too."""
    for tier in copies(tx, extent):
        drop_copy(tx, extent, tier, grace_s if tier == Tier.COLD else GRACE_S_LOCAL)
    for key, _ in list(tx.scan(*prefix_range(key_u64(b"o", extent)))):
        tx.delete(key)


def owners(reader: InodeReader, extent: int) -> list[int]:
    """Inodes that have, or had, a slice of the extent."""
    return [split_u64_u64(key)[1] for key, _ in reader.scan(*prefix_range(key_u64(b"o", extent)))]


def left_behind(reader: InodeReader, limit: int) -> list[tuple[int, int, int]]:
    """(segment, offset, length) of hot bytes to give back."""
    return [(*split_u64_u64(key), unpack_u64(raw)[0]) for key, raw in reader.first_rows(b"l", b"m", limit)]


def due(reader: InodeReader, now_s: float, limit: int) -> list[int]:
    """Condemned packs whose bytes may go."""
    rows = reader.first_rows(b"r", key_u64_u64(b"r", int(now_s) + 1, 0), limit)
    return [split_u64_u64(key)[1] for key, _ in rows]


def forget_pack(tx: MetadataTransaction, number: int) -> None:
    """The bytes of a condemned pack are gone."""
    row = get(tx, number)
    if row is not None:
        tx.delete(key_u64_u64(b"r", row.due_s, number))
    tx.delete(key_u64(b"p", number))
    tx.delete(key_u64(b"h", number))


def setting(reader: InodeReader, name: str) -> dict[str, Any]:
    raw = reader.get(b"g" + name.encode())
    return {} if raw is None else unpack_json(raw)


def want_repair(tx: MetadataTransaction, number: int, why: str) -> None:
    row = get(tx, number)
    if row is None:
        raise NotFound(f"pack {number:#x} is gone")
    if row.state == VALID:
        tx.put(key_u64(b"h", number), pack_json({"why": why, "since_s": int(time.time())}))
