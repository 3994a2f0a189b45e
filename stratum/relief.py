"""What writers do while a hot disk fills and something can be done about it: they slow down, then write to the warm tier.

Between the `high` and the `emergency` mark of a disk each written mebibyte waits a little, longer the nearer the emergency is, so
that writers take the pace of the mover. At the mark new extents go to the warm tier straight away, if there is one with room.
Without other tiers nothing waits: there would be nothing to wait for.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from typing import TYPE_CHECKING

from stratum import cold, packs
from stratum.errors import NoSpace, TierUnavailable
from stratum.tier_rows import CONDEMNED, COPYING, VALID, PackRow, Tier

if TYPE_CHECKING:
    from pathlib import Path

    from stratum.transaction import MetadataTransaction
    from stratum.volume import Volume

LOOK_S = 0.02
TIERS_LOOK_S = 2.0
WAIT_S_A_MIB = 0.002
"""Half-way to the ceiling. Four writers on a disk of 512 MiB, warm shards on the same device: 50 to 59 MB/s, as fast as the mover."""
WAIT_S_A_MIB_MAX = 1.0
CEILING = 0.7
"""Of the way from `high` to `emergency`: there writers nearly stand still. What is on its way passes it: on a disk of 512 MiB four
writers reached 95.1 % with a ceiling of 1, and 93.3 to 94.7 % with 0.85."""
STANDSTILL = 0.85
"""Of the same way: from there each piece waits until the disk is emptier. With the mover short of a processor, four writers that
kept on creeping reached 95.4 %."""
STANDSTILL_S_MAX = 3.0
"""If nothing leaves the disk, waiting does not help: the emergency and then the end of the disk are to come."""
EXTENT_BYTES = 16 * 1024 * 1024
"""Of an extent written to the warm tier at once: it waits in memory until it is whole."""
MIB = 1024 * 1024


class Relief:
    """Of one process. Thread-safe."""

    def __init__(self, volume: Volume, folders: list[Path]) -> None:
        self._volume = volume
        self._folders = folders
        self._lock = threading.Lock()
        self._looked_s = 0.0
        self._percent = 0.0
        self._tiers_s = 0.0
        self._tiers = False

    def possible(self) -> bool:
        """Whether data can leave the hot tier at all."""
        now = time.monotonic()
        if now - self._tiers_s > TIERS_LOOK_S:
            self._tiers_s = now
            self._tiers = bool(self._volume.config.volume_ec)
            if not self._tiers:
                with self._volume.snapshot() as reader:
                    self._tiers = cold.active(reader) is not None
        return self._tiers

    def used_percent(self) -> float:
        """Of the fullest hot disk, at most LOOK_S ago."""
        now = time.monotonic()
        if now - self._looked_s > LOOK_S:
            self._looked_s = now
            self._percent = max(map(_used_percent, self._folders))
        return self._percent

    def pause(self, size: int) -> None:
        """Called before `size` bytes are written to the hot tier."""
        config = self._volume.config
        if not self.possible():
            return
        percent = self.used_percent()
        high, emergency = config.tiering_high_percent, config.tiering_emergency_percent
        if percent < high:
            return
        ceiling = high + (emergency - high) * CEILING
        left = max((ceiling - percent) / (ceiling - high), 0.001)
        time.sleep(min(WAIT_S_A_MIB * (1 / left - 1), WAIT_S_A_MIB_MAX) * max(size / MIB, 0.06))
        until = time.monotonic() + STANDSTILL_S_MAX
        while high + (emergency - high) * STANDSTILL <= self.used_percent() < emergency and time.monotonic() < until:
            time.sleep(LOOK_S)

    def divert(self) -> bool:
        """Whether new extents go to the warm tier."""
        config = self._volume.config
        return (
            bool(config.volume_ec)
            and self.used_percent() >= config.tiering_emergency_percent
            and self._volume.warm.room() > EXTENT_BYTES
        )

    def write(self, extent: int, data: bytes) -> tuple[int, PackRow]:
        """Put an extent's bytes into a warm pack of their own, durably; the transaction that adds the extent adds the copy.

        Raises `NoSpace` if the warm tier cannot take it.
        """
        volume = self._volume
        number = volume.new_id()
        row = PackRow(
            Tier.WARM, COPYING, volume.session.id, len(data), hashlib.sha256(data).hexdigest(), int(time.time()),
            intent=[[extent, 1, 0, len(data)]],
        )  # fmt: skip
        try:
            volume.warm.plan(number, row)
            volume.mutate(lambda tx: packs.put(tx, number, row), frees=True)
            volume.warm.write(number, row, data, [(extent, 0, len(data))])
        except TierUnavailable as error:
            self.discard(number)
            raise NoSpace(f"the hot disks are full and the warm tier takes nothing ({error.message})") from error
        row.state, row.session, row.intent, row.extents, row.live_bytes = VALID, 0, [], 1, len(data)
        return number, row

    def discard(self, number: int) -> None:
        """The pack is not wanted after all."""

        def condemn(tx: MetadataTransaction) -> None:
            row = packs.get(tx, number)
            if row is not None and row.state != CONDEMNED:
                packs.condemn(tx, number, row, 0.0)

        self._volume.mutate(condemn, frees=True)


def _used_percent(folder: Path) -> float:
    """What only root may fill counts as used, as in stratum/tiering/pressure.py."""
    stat = os.statvfs(folder)
    return 100.0 * (1 - stat.f_bavail / stat.f_blocks) if stat.f_blocks else 100.0
