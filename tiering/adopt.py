"""Taking up packs that restored metadata does not know.

What left the hot tier since a backup lies in packs that were made since, and nowhere else. Shards and remote objects say what they hold, so right after
a restore, before anybody else has the volume open, extents get their copies back; and files that were sent to a remote since come back as its
manifests have them (`rebuild_files.py`). What is in the store already and at its place is left as it is.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stratum import cold, content, erasure, evidence, manifest, packs, warm
from stratum.blocks import blocks_match
from stratum.cold_backends.contract import RemoteDamaged, RemoteError
from stratum.erasure import ShardInvalid
from stratum.errors import DataDamaged, StratumError
from stratum.log import get_logger
from stratum.schema import STORED_SEGMENT, key_u64
from stratum.tier_rows import VALID, CopyRow, PackRow, Tier
from stratum.tiering.mover import FREED_AT_ONCE, hottest
from stratum.tiering.rebuild import Manifests, file_beside, read_pack
from stratum.tiering.rebuild_files import Builder

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stratum.erasure import ShardHead
    from stratum.manifest import Moment
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


def adopt(volume: Volume) -> Adopted:
    """For a volume whose metadata was restored, by the only process that has it open. Raises `NoSpace` or `StorageFailed`."""
    done = Adopted()
    _adopt_shards(volume, done)
    with volume.snapshot() as reader:
        remotes = cold.rows(reader)
        restored = packs.setting(reader, manifest.TIMELINE)
    for name, row in remotes.items():
        told = {
            "epoch": row.epoch,
            "timeline": restored.get("before", 0),
            "transaction": restored.get("transaction", 0),
        }
        since = manifest.moment_of(told)
        try:
            volume.cold.check_marker(name)
            _adopt_remote(volume, name, since, done)
        except (StratumError, RemoteError) as error:
            log.warning("remote_not_asked", remote=name, error=error.message)
            done.not_asked.append(f"remote {name}: {error.message}")
    _leave_what_is_gone(volume, done.extents)
    return done


def _leave_what_is_gone(volume: Volume, extents: Iterable[int]) -> None:
    """Of extents that were taken up: those that the backup has in the hot tier, and whose bytes were given back since."""
    gone = [number for number in sorted(extents) if _is_gone(volume, number)]
    for at in range(0, len(gone), FREED_AT_ONCE):
        batch = gone[at : at + FREED_AT_ONCE]
        volume.mutate(partial(_leave, extents=batch), frees=True)


def _is_gone(volume: Volume, number: int) -> bool:
    with volume.snapshot() as reader:
        if reader.get(key_u64(b"X", number)) is None:
            return False
        row, checksums = reader.extent(number)
    if not packs.is_hot(row) or row.segment == STORED_SEGMENT:
        return False
    try:
        for at in range(0, row.length, content.READ_BYTES):
            stop = min(at + content.READ_BYTES, row.length)
            volume.segments.read(number, row.segment, row.offset, row.length, checksums, at, stop)
    except DataDamaged:
        return True
    return False


def _leave(tx: MetadataTransaction, extents: list[int]) -> None:
    for number in extents:
        packs.free_hot(tx, number, tx.extent(number)[0].generation)
    for owner in {owner for number in extents for owner in packs.owners(tx, number)}:
        if tx.has_inode(owner):
            evidence.set_tier(tx, owner, hottest(tx, [piece.extent for piece in tx.slices(owner)]))


# -- shards -----------------------------------------------------------------------------------------------------------


def _adopt_shards(volume: Volume, done: Adopted) -> None:
    with volume.snapshot() as reader:
        known = {number: row for number, row in packs.scan(reader) if row.tier == Tier.WARM}
        rows = warm.disks(reader)
    found: dict[int, dict[int, int]] = {}
    for disk, row in rows.items():
        if row.state == "replaced":
            continue
        if not volume.warm.is_present(disk, row):
            done.not_asked.append(f"disk {row.path}: it is not there")
            continue
        for path in (Path(row.path) / "packs").rglob("*.shard"):
            number, index = (int(part, base) for part, base in zip(path.name.split("."), (16, 10), strict=False))
            if number not in known or disk != known[number].disks[index]:
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
            with (Path(rows[disk].path) / warm.shard_name(number, index)).open("rb") as file:
                first = file.read(erasure.PAGE_BYTES)
                return erasure.parse_head(first + file.read(max(erasure.table_bytes(first) - len(first), 0)))
        except (ShardInvalid, OSError) as error:
            why = error
    assert why is not None, "a pack is found by its shards"
    raise why


# -- remotes ----------------------------------------------------------------------------------------------------------


def _adopt_remote(volume: Volume, name: str, since: Moment, done: Adopted) -> None:
    _, remote = volume.cold.remote(name)
    with volume.snapshot() as reader:
        known = {row.key for _, row in packs.scan(reader) if row.tier == Tier.COLD and row.remote == name}
    prefix = f"v1/{volume.instance}/"
    with file_beside(volume.root) as spool:
        found = Manifests(spool)
        for info in remote.sealed.list(prefix):
            if info.key in known or info.key.startswith(prefix + "_"):
                continue
            try:
                found.add(*read_pack(remote, name, info))
            except (RemoteDamaged, ValueError) as error:
                done.damaged.append(f"{info.key}: {error}")
        builder = Builder(volume, name)
        for number, row, moment, told in found.in_order():
            done.packs += 1
            done.extents.update(builder.add_pack(number, row, told, takes_over=moment > since))
        for _, _, moment, told in found.in_order():  # a file may lie in several packs
            if moment > since:
                count, left_out = builder.add_files(told, only_whole=True)
                done.files += count
                done.lost += left_out
        for _, _, _, told in found.in_order():
            builder.free_unused(told)
