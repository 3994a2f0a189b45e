"""Emptying a remote, or a whole tier, without a moment in which bytes have no good place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stratum import cold, evidence, packs
from stratum.tier_rows import VALID, Tier
from stratum.tiering.mover import hottest

if TYPE_CHECKING:
    from stratum.tiering.mover import Mover
    from stratum.transaction import MetadataTransaction
    from stratum.volume import Volume

DRAINABLE = {"warm": Tier.WARM, "cold": Tier.COLD}
PACKS_AT_ONCE = 16


class Drainer:
    """Part of `Tierd`. What is drained is taken from the rows each time, so it goes on after a restart."""

    def __init__(self, volume: Volume, mover: Mover) -> None:
        self._volume = volume
        self._mover = mover

    def run(self) -> bool:
        """Empty some packs; whether there may be more. Raises what the mover does."""
        with self._volume.snapshot() as reader:
            leaving = {name for name, row in cold.rows(reader).items() if row.state == "draining"}
            drained = DRAINABLE.get(str(packs.setting(reader, "drain").get("tier", "")))
            if not leaving and drained is None:
                return False
            found = [
                (Tier(row.tier), [extent for extent, _ in packs.members(reader, number)])
                for number, row in packs.scan(reader)
                if (row.remote in leaving or row.tier == drained) and row.state == VALID
            ][:PACKS_AT_ONCE]
        for tier, extents in self._mover.in_turn(found):
            if tier == Tier.COLD and drained != Tier.COLD and self._volume.cold.available() is not None:
                self._mover.copy(extents, Tier.COLD, again=True, alone=True)
            else:
                self._bring_home(extents, tier, drained)
        return bool(found)

    def _bring_home(self, extents: list[int], tier: Tier, drained: Tier | None) -> None:
        """The bytes come back from a tier that is to hold nothing, or from a remote that has no successor."""
        if tier == Tier.COLD and drained != Tier.WARM and self._volume.warm.room() > 0:
            self._mover.copy(extents, Tier.WARM)
        self._mover.promote([extent for extent in extents if not self._is_elsewhere(extent, tier)])
        grace_s = self._volume.config.cold_delete_after_s if tier == Tier.COLD else 0.0

        def release(tx: MetadataTransaction) -> None:
            for extent in extents:
                if tx.has_extent(extent):
                    packs.release(tx, extent, tier, tx.extent(extent)[0].generation, grace_s)
                    for owner in packs.owners(tx, extent):
                        if tx.has_inode(owner):
                            held = [piece.extent for piece in tx.slices(owner)]
                            evidence.set_tier(tx, owner, hottest(tx, held))

        self._volume.mutate(release, frees=True)

    def _is_elsewhere(self, extent: int, tier: Tier) -> bool:
        """Whether another tier below the hot one has it."""
        with self._volume.snapshot() as reader:
            return bool(set(packs.copies(reader, extent)) - {tier})
