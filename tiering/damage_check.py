"""What became of damage that was found: looked at again, with pauses that grow, until its row can go.

What has another copy is written anew from it. What is right again (a disk came back, an object was put back), was overwritten or
deleted, is forgotten.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from stratum import content, damage, damaged_objects, metrics, packs
from stratum.clocks import come
from stratum.cold_backends.contract import RemoteError
from stratum.damage import DamageRow, Thing
from stratum.errors import DataDamaged, StratumError
from stratum.log import get_logger
from stratum.manifest import Names
from stratum.tier_rows import VALID, Tier

if TYPE_CHECKING:
    from collections.abc import Callable

    from stratum.tiering.heal import Healer
    from stratum.tiering.mover import Mover
    from stratum.transaction import MetadataTransaction
    from stratum.volume import Volume

log = get_logger("damage")
AT_ONCE = 8
PAUSE_S = 60.0
PAUSE_S_MAX = 3600.0
LOOK_S = 1.0


class DamageCheck:
    """Part of `Tierd`. `clock` is wall time."""

    def __init__(self, volume: Volume, mover: Mover, healer: Healer, *, clock: Callable[[], float] = time.time) -> None:
        self._volume = volume
        self._mover = mover
        self._healer = healer
        self._clock = clock
        self._looked_s = float("-inf")

    def run(self, *, now: bool = False) -> bool:
        """Look at some rows whose time has come, or `now` at all of them; whether there are more. Raises `Preempted`."""
        now_s = self._clock()
        if not now and 0 <= now_s - self._looked_s < LOOK_S:
            return False
        self._looked_s = now_s
        with self._volume.snapshot() as reader:
            due = [item for item in damage.scan(reader) if now or self._is_due(item[2], now_s)]
        due.sort(key=lambda item: (item[2].attempts, item[2].tried_s))
        for thing, number, row in self._mover.in_turn(due if now else due[:AT_ONCE]):
            try:
                gone = self._is_right(thing, number, row)
            except (StratumError, OSError) as error:
                log.info("damage_stays", number=f"{number:016x}", error=getattr(error, "message", str(error)))
                gone = False
            self._note(thing, number, row, gone=gone)
        return len(due) > AT_ONCE

    @staticmethod
    def _is_due(row: DamageRow, now_s: float) -> bool:
        """What has a copy is healed at once."""
        first_s = 0.0 if row.heals else PAUSE_S
        pause_s = min(PAUSE_S * 2 ** min(row.attempts - 1, 10), PAUSE_S_MAX) if row.attempts else first_s
        return come(max(row.tried_s, row.found_s) + pause_s, now_s, PAUSE_S_MAX)

    def _note(self, thing: Thing, number: int, row: DamageRow, *, gone: bool) -> None:
        key = damage.row_key(thing, number)

        def note(tx: MetadataTransaction) -> None:
            raw = tx.get(key)
            if raw is None:
                return
            if gone:
                tx.delete(key)
                return
            current = DamageRow.decode(raw)
            current.attempts, current.tried_s = row.attempts + 1, self._clock()
            current.heals = False if row.heals else current.heals  # its copy was not good after all
            tx.put(key, current.encode())

        self._volume.mutate(note, frees=True)
        if gone:
            log.info("damage_gone", thing=thing.name.lower(), number=f"{number:016x}")

    def _is_right(self, thing: Thing, number: int, row: DamageRow) -> bool:
        """Whether nobody misses anything any more. Raises what reading does."""
        with self._volume.snapshot() as reader:
            shown = damaged_objects.objects_of(reader, Names(reader), thing, number, row)
        if not shown or thing == Thing.CONTENT:
            return not shown
        return self._pack_is_right(number) if thing == Thing.PACK else self._extent_is_right(number, row)

    def _extent_is_right(self, number: int, row: DamageRow) -> bool:
        with self._volume.snapshot() as reader:
            extent, _ = reader.extent(number)
            cold = packs.copies(reader, number).get(Tier.COLD)
        if packs.is_hot(extent) and row.heals and self._healer.heal_hot(number):
            metrics.HEALED.add("healed")
            return True
        if cold is not None:
            self._volume.cold.cache.drop(cold.pack)  # what was recalled before says nothing of what is there now
        stop = min(row.last or extent.length, extent.length)
        at = row.first
        while at < stop:
            end = min(at + content.READ_BYTES, stop)
            at += len(content.read_extent(self._volume, number, at, end))
        return True

    def _pack_is_right(self, number: int) -> bool:
        with self._volume.snapshot() as reader:
            pack = packs.get(reader, number)
        if pack is None or pack.state != VALID:
            return True
        if pack.tier == Tier.WARM:
            heads, _ = self._volume.warm.good_heads(number, pack)
            return len(heads) >= pack.k
        try:
            size = self._volume.cold.remote(pack.remote)[1].sealed.head(pack.key).size
        except RemoteError as error:
            raise DataDamaged(f"pack {number:016x}: {error.message}", f"remote {pack.remote!r}") from error
        if size < pack.length:
            return False
        self._volume.cold.cache.drop(number)
        return True
