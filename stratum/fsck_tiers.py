"""The part of `fsck` that looks at the tiers: copies, packs, owners and evidence agree, and every shard has its checksums.

Cold objects are not read: that may cost money. Scrub does, at its pace, and `stratum cold check` asks for them.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from stratum import evidence, packs
from stratum.damage import Thing
from stratum.schema import ELSEWHERE_SEGMENT, ExtentRow, key_u64, key_u64_u64, prefix_range, split_u64_u64, unpack_u64
from stratum.tier_rows import CONDEMNED, VALID, AccessRow, CopyRow, Tier

if TYPE_CHECKING:
    from collections.abc import Callable

    from stratum.tier_rows import PackRow
    from stratum.transaction import InodeReader, MetadataTransaction
    from stratum.volume import Volume

    Repair = Callable[[MetadataTransaction], None]
    Found = Callable[[str, str, str, "Repair | None"], None]

DAMAGE = {
    "damaged-extent": Thing.EXTENT,
    "lost-extent": Thing.EXTENT,
    "lost-pack": Thing.PACK,
    "damaged-content": Thing.CONTENT,
}
"""Kinds of findings that no repair mends, and what their thing's number is of."""


def tell(volume: Volume, kind: str, thing: str, what: str) -> None:
    """Have damage remembered that fsck finds."""
    if kind in DAMAGE:
        number = int(thing.partition(" ")[2], 16)
        with volume.snapshot() as reader:
            heals = kind == "damaged-extent" and bool(packs.copies(reader, number))
        volume.damages.found(DAMAGE[kind], number, what, by="fsck", heals=heals)


def _deleting(*keys: bytes) -> Repair:
    def repair(tx: MetadataTransaction) -> None:
        for key in keys:
            tx.delete(key)

    return repair


def check_copies(reader: InodeReader, extents: dict[int, ExtentRow], found: Found) -> None:
    """Every extent can be read somewhere; packs hold what copies say."""
    rows = dict(packs.scan(reader))
    held: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    with_copy: set[int] = set()
    for key, raw in reader.scan(*prefix_range(b"c")):
        number, tier, place = unpack_u64(key[1:9])[0], key[9], CopyRow.decode(raw)
        thing = f"{Tier(tier).name.lower()} copy of extent {number:#x}"
        row = rows.get(place.pack)
        if number not in extents:
            found("stray-copy", thing, "its extent is gone", _deleting(key, key_u64_u64(b"q", place.pack, number)))
        elif row is None or row.state != VALID or row.tier != tier:
            found("dangling-copy", thing, f"its pack {place.pack:#x} does not hold it", _deleting(key))
        else:
            with_copy.add(number)
            held[place.pack][0] += 1
            held[place.pack][1] += place.length
            if reader.get(key_u64_u64(b"q", place.pack, number)) != raw:
                found("copy-without-member", thing, "its pack does not list it", _putting(place.pack, number, raw))
    for key, raw in reader.scan(*prefix_range(b"q")):
        pack, number = split_u64_u64(key)
        row = rows.get(pack)
        if row is None or reader.get(packs.copy_key(number, row.tier)) != raw:
            found("stray-member", f"extent {number:#x} in pack {pack:#x}", "the extent does not know", _deleting(key))
    for number, extent in extents.items():
        if extent.segment == ELSEWHERE_SEGMENT and extent.references and number not in with_copy:
            found(
                "lost-extent", f"extent {number:#x}", "has neither hot bytes nor a copy; its files cannot be read", None
            )
    for number, row in rows.items():
        wanted = tuple(held[number]) if number in held else (0, 0)
        if row.state == VALID and (row.extents, row.live_bytes) != wanted:
            what = f"counts {row.extents} extents, {row.live_bytes} bytes; there are {wanted}"
            found("pack-counts", f"pack {number:#x}", what, _recounting(number, *wanted))
        if row.state == CONDEMNED and reader.get(key_u64_u64(b"r", row.due_s, number)) is None:
            found("unremoved-pack", f"pack {number:#x}", "is condemned and not queued", _condemning(number))


def _putting(pack: int, extent: int, raw: bytes) -> Repair:
    return lambda tx: tx.put(key_u64_u64(b"q", pack, extent), raw)


def _recounting(number: int, extents: int, live_bytes: int) -> Repair:
    def repair(tx: MetadataTransaction) -> None:
        row = packs.get(tx, number)
        if row is not None:
            row.extents, row.live_bytes = extents, live_bytes
            if extents:
                packs.put(tx, number, row)
            else:
                packs.condemn(tx, number, row, 0.0)

    return repair


def _condemning(number: int) -> Repair:
    def repair(tx: MetadataTransaction) -> None:
        row = packs.get(tx, number)
        if row is not None:
            packs.condemn(tx, number, row, 0.0)

    return repair


def check_owners(reader: InodeReader, slices: set[tuple[int, int]], files: dict[int, int], found: Found) -> None:
    """`slices` are (extent, inode) pairs, `files` inodes with slices and their mtime in ns: each pair has its owner row, each
    file its evidence.
    """
    missing = slices - {split_u64_u64(key) for key, _ in reader.scan(*prefix_range(b"o"))}
    for extent, inode in missing:
        found("unowned-extent", f"extent {extent:#x}", f"does not know inode {inode:#x}", _owning(extent, inode))
    rows = {unpack_u64(key[1:])[0]: AccessRow.unpack(raw) for key, raw in reader.scan(*prefix_range(b"a"))}
    for inode in files.keys() - rows.keys():
        found("no-evidence", f"inode {inode:#x}", "has extents and no row of its use", _adopting(inode, files[inode]))
    wanted = {row.key(inode) for inode, row in rows.items()}
    there = {key for key, _ in reader.scan(*prefix_range(b"b"))}
    for key in there - wanted:
        found("stray-recency", f"row {key.hex()}", "no evidence has this key", _deleting(key))
    for key in wanted - there:
        found("missing-recency", f"row {key.hex()}", "evidence without its place in the order", _adding(key))


def _owning(extent: int, inode: int) -> Repair:
    return lambda tx: tx.put(key_u64_u64(b"o", extent, inode), b"")


def _adding(key: bytes) -> Repair:
    return lambda tx: tx.put(key, b"")


def _adopting(inode: int, used_ns: int) -> Repair:
    used_s = max(used_ns, 0) // 1_000_000_000
    return lambda tx: evidence.put(tx, inode, AccessRow(Tier.HOT, used_s, used_s, last_write_s=used_s), None)


def check_shards(volume: Volume, reader: InodeReader, found: Found) -> None:
    """Read every shard of the warm tier."""
    for number, row in packs.scan(reader):
        if row.state != VALID or row.tier != Tier.WARM:
            continue
        bad = volume.warm.examine(number, row)
        while bad and (now := _disks_now(volume, number)) != row.disks:
            row.disks = now  # it moved, or was removed, since this check began
            bad = volume.warm.examine(number, row) if now else {}
        if bad:
            left = row.k + row.m - len(bad)
            kind = "damaged-pack" if left >= row.k else "lost-pack"
            what = f"{left} good shards of {row.k}+{row.m}: {volume.warm.describe(number, row, bad)}"
            found(kind, f"pack {number:#x}", what, _rebuilding(volume, number, row, bad) if left >= row.k else None)


def _disks_now(volume: Volume, number: int) -> list[int]:
    """Where the shards of a pack lie; nowhere if it is not wanted any more."""
    with volume.snapshot() as reader:
        row = packs.get(reader, number)
    return row.disks if row is not None and row.state == VALID else []


def _rebuilding(volume: Volume, number: int, row: PackRow, bad: dict[int, str]) -> Repair:
    """The shards are written where they belong before the transaction, which then has nothing to change."""

    def repair(tx: MetadataTransaction) -> None:
        targets = {index: row.disks[index] for index in bad if row.disks[index]}
        volume.warm.rebuild(number, row, targets)
        tx.delete(key_u64(b"h", number))

    return repair
