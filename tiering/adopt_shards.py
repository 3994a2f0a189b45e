"""Taking up packs of the warm tier that the metadata does not know: shards say what they hold, and extents have checksums of their own."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stratum import erasure, packs, warm_disks
from stratum.blocks import blocks_match
from stratum.erasure import ShardInvalid
from stratum.errors import DataDamaged
from stratum.log import get_logger
from stratum.schema import STORED_SEGMENT, key_u64
from stratum.tier_rows import VALID, CopyRow, PackRow, Tier

if TYPE_CHECKING:
    from stratum.erasure import ShardHead
    from stratum.tier_rows import DiskRow
    from stratum.transaction import MetadataTransaction
    from stratum.volume import Volume

log = get_logger("adopt")


@dataclass(slots=True)
class Adopted:
    """`files` were sent to a remote after the backup; `lost` are those of which bytes are in no pack, and stay as the backup has them. `not_asked` says which
    remotes and disks, and why.
    """

    packs: int = 0
    extents: set[int] = field(default_factory=set)
    files: int = 0
    lost: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    not_asked: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        return {**asdict(self), "extents": len(self.extents)}


def adopt_shards(volume: Volume, done: Adopted) -> None:
    """For the only process that has the volume open. Raises `NoSpace` or `StorageFailed`."""
    with volume.snapshot() as reader:
        known = {number: row for number, row in packs.scan(reader) if row.tier == Tier.WARM}
        rows = warm_disks.disks(reader)
    found: dict[int, dict[int, int]] = {}
    for disk, row in rows.items():
        if row.state == "replaced":
            continue
        if not volume.warm.is_present(disk, row):
            done.not_asked.append(f"disk {row.path}: it is not there")
            continue
        for path in (Path(row.path) / "packs").rglob("*.shard"):
            parsed = warm_disks.parse_shard_name(path.name)
            if parsed is None:
                continue  # somebody else's
            number, index, _ = parsed
            if number not in known or (index < len(known[number].disks) and disk != known[number].disks[index]):
                found.setdefault(number, {})[index] = disk
    for number, shards in sorted(found.items()):
        if number in known:
            _note_where(volume, number, shards)
            continue
        try:
            _adopt_pack(volume, rows, number, shards, done)
        except (DataDamaged, ShardInvalid, OSError) as error:
            log.warning("pack_not_adopted", pack=f"{number:016x}", error=str(error))
            done.damaged.append(f"pack {number:016x}: {error}")


def _note_where(volume: Volume, number: int, shards: dict[int, int]) -> None:
    """Shards of a pack that is known have moved since: their disk was replaced or emptied."""

    def note(tx: MetadataTransaction) -> None:
        row = packs.get(tx, number)
        if row is None or row.state != VALID:
            return
        for index, disk in shards.items():
            if not row.disks[index] or not _has_shard(volume, row.disks[index], number, index):
                row.disks[index] = disk
        packs.put(tx, number, row)

    volume.mutate(note, frees=True)


def _has_shard(volume: Volume, disk: int, number: int, index: int) -> bool:
    try:
        return volume.warm.shard_path(disk, number, index).is_file()
    except FileNotFoundError:
        return False


def _adopt_pack(volume: Volume, rows: dict[int, DiskRow], number: int, shards: dict[int, int], done: Adopted) -> None:
    head = _any_head(rows, number, shards)
    row = PackRow(
        Tier.WARM, VALID, 0, head.length, "", int(time.time()), k=head.k, m=head.m, shard_bytes=head.shard_bytes, head_bytes=head.data_offset,
        disks=[shards.get(index, 0) for index in range(head.k + head.m)],
    )  # fmt: skip
    with volume.snapshot() as reader:
        wanted = [
            member
            for member in head.members
            if reader.get(key_u64(b"X", member[0])) is not None
            and (extent := reader.extent(member[0])[0]).references
            and (extent.length, extent.segment != STORED_SEGMENT) == (member[2], True)
        ]
    if not wanted:
        return
    data, bad = volume.warm.recover(number, row, 0, head.length, f"a pack from after the backup, {number:016x}")
    row.digest = hashlib.sha256(data).hexdigest()

    def take_up(tx: MetadataTransaction) -> list[int]:
        good = [
            (extent, CopyRow(number, offset, length))
            for extent, offset, length in wanted
            if blocks_match(data[offset : offset + length], tx.extent(extent)[1], 0)
        ]
        row.extents, row.live_bytes = len(good), sum(place.length for _, place in good)
        if good:
            packs.put(tx, number, row)
        for extent, place in good:
            packs.put_copy(tx, extent, Tier.WARM, place, packs.GRACE_S_LOCAL)
        if good and (bad or 0 in row.disks):
            packs.want_repair(tx, number, "it was found without some of its shards")
        return [extent for extent, _ in good]

    taken = volume.mutate(take_up, frees=True)
    done.packs += bool(taken)
    done.extents.update(taken)


def _any_head(rows: dict[int, DiskRow], number: int, shards: dict[int, int]) -> ShardHead:
    """Raises `ShardInvalid` or `OSError` if none can be read."""
    why: ShardInvalid | OSError | None = None
    for index, disk in sorted(shards.items()):
        try:
            with (Path(rows[disk].path) / warm_disks.shard_name(number, index)).open("rb") as file:
                first = file.read(erasure.PAGE_BYTES)
                return erasure.parse_head(first + file.read(max(erasure.table_bytes(first) - len(first), 0)))
        except (ShardInvalid, OSError) as error:
            why = error
    assert why is not None, "a pack is found by its shards"
    raise why
