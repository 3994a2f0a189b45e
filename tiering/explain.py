"""Why is this file where it is, and what would move it next."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from stratum import buckets, copies, damage, objects, packs, warm_disks
from stratum.schema import STORED_SEGMENT, Inode, key_u64
from stratum.tier_rows import MoveRow, Tier
from stratum.tiering import files, records
from stratum.tiering.policy import Settings, decide

if TYPE_CHECKING:
    from stratum.schema import Slice
    from stratum.transaction import InodeReader
    from stratum.volume import Volume


def explain(volume: Volume, bucket: str, key: bytes) -> dict[str, Any]:
    """The document of `stratum explain`. Raises `NoSuchBucket` or `NoSuchKey`."""
    with volume.snapshot() as reader:
        state = objects.head(reader, buckets.get(reader, bucket), key)
    document = explain_inode(volume, state.inode.number)
    return {"bucket": bucket, "key": key.decode("utf-8", "surrogateescape"), **document}


def explain_inode(volume: Volume, number: int) -> dict[str, Any]:
    """The same of an inode, without its name."""
    settings = Settings.of(volume.config)
    with volume.snapshot() as reader:
        status = packs.setting(reader, "tierd")
        level = str(status.get("level", "ok"))
        inode = reader.inode(number)
        extents = _extents(volume, reader, inode)
        known = files.known(reader, number, settings)
        moves = records.of(reader, number)
        raw = reader.get(key_u64(b"m", number))
    decision = decide(known.facts, settings, files.surroundings(volume, level)) if known is not None else None
    remote = [entry["tier"] == "cold" for entry in extents]
    document: dict[str, Any] = {
        "location": "Remote" if remote and all(remote) else "Mixed" if any(remote) else "Local",
        "tier": min((entry["tier"] for entry in extents), key=("hot", "warm", "cold").index, default="hot"),
        "extents": extents,
        "rule": decision.rule if decision else "stay",
        "inputs": decision.inputs if decision else {},
        "next": decision.next if decision else "directories do not move",
        "moves": [
            {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(move.pop("time_ns") // 1_000_000_000)), **move}
            for move in moves
        ],
    }
    if raw is not None:
        asked = MoveRow.decode(raw)
        document["asked"] = {
            "to": Tier(asked.tier).name.lower() if asked.tier else "", "cause": asked.cause, "attempts": asked.attempts, "error": asked.error,
        }  # fmt: skip
    return document


def arrived_bytes(reader: InodeReader, number: int, tier: Tier) -> tuple[int, int]:
    """(bytes of a file that lie in a tier or are copied to it, all its bytes in extents)."""
    arrived = total = 0
    for piece in reader.slices(number):
        total += piece.length
        if tier == Tier.HOT:
            there = packs.is_hot(reader.extent(piece.extent)[0])
        else:
            there = any(found == tier for found, _, _ in copies.locate(reader, piece.extent))
        arrived += piece.length if there else 0
    return arrived, total


def _extents(volume: Volume, reader: InodeReader, inode: Inode) -> list[dict[str, Any]]:
    if inode.flags & Inode.INLINE:
        return [_hot(0, inode.size, "metadata store")]
    entries = []
    for piece in reader.slices(inode.number):
        entry = _extent(volume, reader, piece)
        what = damage.of_extent(
            reader, piece.extent, [place.pack for _, place, _ in copies.locate(reader, piece.extent)]
        )
        entries.append({**entry, "damaged": what} if what else entry)
    return entries


def _hot(offset: int, length: int, place: str) -> dict[str, Any]:
    return {"offset": offset, "length": length, "tier": "hot", "shards": ["Local"], "place": place, "copies": []}


def _extent(volume: Volume, reader: InodeReader, piece: Slice) -> dict[str, Any]:
    row, _ = reader.extent(piece.extent)
    located = copies.locate(reader, piece.extent)
    if packs.is_hot(row):
        place = "metadata store" if row.segment == STORED_SEGMENT else str(volume.segments.find(row.segment))
        found = _hot(piece.file_offset, piece.length, place)
        found["copies"] = [tier.name.lower() for tier, _, _ in located]
        return found
    entry = {
        "offset": piece.file_offset,
        "length": piece.length,
        "tier": "",
        "shards": [],
        "place": "nowhere",
        "copies": [],
    }
    if not located:
        entry["shards"] = ["Missing"]
        return entry
    tier, copy, pack = located[0]
    entry["tier"] = tier.name.lower()
    entry["copies"] = [other.name.lower() for other, _, _ in located[1:]]
    if tier == Tier.COLD:
        entry["shards"] = ["Remote"]
        entry["place"] = f"remote {pack.remote}: {pack.key} at {copy.offset}"
        return entry
    disks = warm_disks.disks(reader)
    shards = []
    for index, disk in enumerate(pack.disks):
        there = disk in disks and volume.warm.shard_path(disk, copy.pack, index, reader).exists()
        shards.append("Local" if there else "Missing")
    entry["shards"] = shards
    entry["place"] = f"pack {copy.pack:016x} at {copy.offset}, {pack.k}+{pack.m} on " + ", ".join(
        disks[disk].path for disk in pack.disks if disk in disks
    )
    return entry
