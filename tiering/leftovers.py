"""What movers leave behind: packs that were not finished, packs that nothing needs any more, and packs that are mostly waste."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from stratum import packs
from stratum.boundaries import boundary
from stratum.errors import StratumError, TierUnavailable
from stratum.log import get_logger
from stratum.schema import key_u64
from stratum.tier_rows import COPYING, PackRow, Tier
from stratum.tiering.mover import Member

if TYPE_CHECKING:
    from stratum.tiering.mover import Mover
    from stratum.transaction import MetadataTransaction

log = get_logger("mover")


def recover(mover: Mover) -> int:
    """End or undo what dead movers left COPYING. How many packs there were."""
    with mover.volume.snapshot() as reader:
        found = [
            (number, row)
            for number, row in packs.scan(reader)
            if row.state == COPYING and row.session != mover.volume.session.id
        ]
    left = 0
    for number, row in found:
        if not mover.volume.session.is_dead(row.session):
            continue
        left += 1
        if row.tier == Tier.COLD and row.upload_id and _resume(mover, number, row):
            continue
        mover.volume.mutate(partial(packs.condemn, number=number, row=row, grace_s=0.0), frees=True)
    return left


def _resume(mover: Mover, number: int, row: PackRow) -> bool:
    """Go on with a long upload, if everything that goes into it is still there unchanged."""
    pieces: list[bytes] = []
    try:
        for extent, generation, _, length in row.intent:
            with mover.volume.snapshot() as reader:
                known = reader.get(key_u64(b"X", extent)) is not None and reader.extent(extent)[0]
            if not known or known.generation != generation or not known.references:
                return False
            pieces.append(mover.read(Member(extent, generation, length)))
        data = b"".join(pieces)
        if hashlib.sha256(data).hexdigest() != row.digest:
            return False
        resumed = replace(row, session=mover.volume.session.id)
        mover.volume.mutate(lambda tx: packs.put(tx, number, resumed), frees=True)
        mover.finish_pack(number, resumed, data)
    except StratumError as error:
        log.warning("upload_not_resumed", pack=f"{number:016x}", error=error.message)
        return False
    log.info("upload_resumed", pack=f"{number:016x}")
    return True


def remove_condemned(mover: Mover, now_s: float = 0.0, limit: int = 256) -> int:
    """Remove bytes of packs that nothing needs any more and whose time has come: at 0, those that are given no time. How many went.

    A remote that refuses one is not asked for the others. Raises `TierUnavailable` if nothing went, with what is waited for.
    """
    with mover.volume.snapshot() as reader:
        found = [(number, row) for number in packs.due(reader, now_s, limit) if (row := packs.get(reader, number))]
    gone = []
    waits: dict[str, str] = {}
    for number, row in found:
        if row.remote in waits:
            continue
        try:
            if row.tier == Tier.WARM:
                mover.volume.warm.delete(number, row)
            else:
                mover.volume.cold.delete(row)
                mover.volume.cold.cache.drop(number)
            gone.append(number)
        except (StratumError, OSError) as error:
            if row.tier == Tier.COLD:
                waits[row.remote] = getattr(error, "message", str(error))
            else:
                waits[f"pack {number:016x}"] = str(error)
        boundary("mover.removed")
        if mover.pressing():
            break

    def forget(tx: MetadataTransaction) -> None:
        for number in gone:
            packs.forget_pack(tx, number)

    if gone:
        mover.volume.mutate(forget, frees=True)
    elif waits:
        raise TierUnavailable(f"{len(found)} packs wait to be removed: {'; '.join(list(waits.values())[:3])}")
    return len(gone)


def compact(mover: Mover) -> int:
    """Write packs anew of which less than half is wanted. How many bytes were copied. Raises `Preempted`."""
    with mover.volume.snapshot() as reader:
        wasteful = [
            (number, Tier(row.tier), row.remote, [extent for extent, _ in packs.members(reader, number)])
            for number, row in packs.scan(reader)
            if row.state == "valid" and 0 < row.live_bytes < row.length // 2
        ]
    copied = 0
    for _, tier, remote, extents in wasteful:
        if copied:
            mover.make_room()
        copied += mover.copy(extents, tier, again=True, remote=remote, alone=True)
    return copied
