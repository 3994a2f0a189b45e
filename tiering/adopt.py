"""Taking up packs that restored metadata does not know.

What left the hot tier since a backup lies in packs that were made since, and nowhere else. Shards and remote objects say what they hold, so right after
a restore, before anybody else has the volume open, extents get their copies back; and files that were sent to a remote since come back as its
manifests have them (`rebuild_files.py`). What is in the store already and at its place is left as it is.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from stratum import cold, content, evidence, manifest, packs
from stratum.cold_backends.contract import RemoteDamaged, RemoteError
from stratum.errors import DataDamaged, StratumError
from stratum.log import get_logger
from stratum.schema import STORED_SEGMENT, key_u64
from stratum.tier_rows import Tier
from stratum.tiering.adopt_shards import Adopted, adopt_shards
from stratum.tiering.mover import FREED_AT_ONCE, hottest
from stratum.tiering.rebuild import Manifests, file_beside, read_pack
from stratum.tiering.rebuild_files import Builder

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stratum.manifest import Moment
    from stratum.transaction import MetadataTransaction
    from stratum.volume import Volume

log = get_logger("adopt")


def adopt(volume: Volume) -> Adopted:
    """For a volume whose metadata was restored, by the only process that has it open. Raises `NoSpace` or `StorageFailed`."""
    done = Adopted()
    adopt_shards(volume, done)
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
