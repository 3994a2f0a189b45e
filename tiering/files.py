"""Facts about files, gathered for the policy and for `explain`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stratum import evidence, hints, objects, packs
from stratum.errors import Gone
from stratum.schema import Inode, Kind, key_u64
from stratum.storage_classes import STANDARD
from stratum.tier_rows import TIER_OF_CLASS, Tier
from stratum.tiering.policy import Facts, Settings, Surroundings

if TYPE_CHECKING:
    from stratum.tier_rows import AccessRow
    from stratum.transaction import InodeReader
    from stratum.volume import Volume


@dataclass(slots=True)
class Known:
    """A file and what is known of it."""

    inode: Inode
    facts: Facts
    hint: hints.Hint


def known(reader: InodeReader, number: int, settings: Settings, now_s: float | None = None) -> Known | None:
    """None if the inode is gone or not a file."""
    now_s = time.time() if now_s is None else now_s
    try:
        inode = reader.inode(number)
    except Gone:
        return None
    if inode.kind != Kind.FILE:
        return None
    metadata = objects.metadata_of(reader, inode)
    row = evidence.get(reader, number)
    hint = hints.of(reader, inode, metadata, now_s)
    restored = reader.get(key_u64(b"t", number)) is not None
    asked = TIER_OF_CLASS.get(metadata.storage_class) if metadata.storage_class not in {"", STANDARD} else None
    facts = Facts(
        tier=Tier(row.tier) if row is not None else Tier.HOT,
        size=inode.size,
        idle_s=idle_s(row, inode, now_s),
        reads_recent=evidence.reads_since(row, max(now_s - settings.promote_window_s, row.moved_s)) if row else 0,
        reads=row.reads if row else 0,
        average_fast=row.average_fast if row else 0.0,
        average_slow=row.average_slow if row else 0.0,
        moved_ago_s=now_s - row.moved_s if row is not None and row.moved_s else None,
        pin=Tier.HOT if restored else hint.tier,
        pin_source="restore" if restored else hint.source,
        asked=asked,
        asked_by=f"storage class {metadata.storage_class}" if asked is not None else "",
    )
    return Known(inode, facts, hint)


def idle_s(row: AccessRow | None, inode: Inode, now_s: float) -> float:
    """Without evidence the modification time is all there is. A clock that went back makes a file fresh, not old."""
    last_s = row.last_access_s if row is not None else inode.mtime_ns / 1e9
    return max(now_s - last_s, 0.0)


def surroundings(volume: Volume, level: str) -> Surroundings:
    """What the other tiers can take now."""
    with volume.snapshot() as reader:
        drained = packs.setting(reader, "drain").get("tier")
    warm = drained != "warm" and volume.warm.room() > 0
    return Surroundings(level, warm, drained != "cold" and volume.cold.available() is not None)
