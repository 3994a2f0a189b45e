"""Disks of the warm tier that are replaced or drained: what is still on them, how fast it goes, and when they can be forgotten.

What is on a leaving disk is put into the repair queue, which the healer works through a pack at a time; so an interrupted rebuild goes
on where it was. How far it is stands in the store: what there was to do at the beginning, and what was left at some moments since.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from stratum import packs, warm_disks
from stratum.schema import key_u64, pack_json, prefix_range, unpack_u64
from stratum.tier_rows import VALID

if TYPE_CHECKING:
    from collections.abc import Callable

    from stratum.transaction import InodeReader, MetadataTransaction
    from stratum.volume import Volume

LOOK_S = 2.0
"""How often all packs are looked through: a million of them take some seconds, and a rebuild of them hours."""
QUEUED_AT_ONCE = 1024
SAMPLES_MAX = 30
SAMPLE_GAP_S_MAX = 60.0
"""After a longer silence nobody was working: the rate begins anew."""
KEY = b"gleaving_disks"


@dataclass(slots=True, frozen=True)
class Rebuild:
    """How far the shards of one disk are. `eta_s` None: nothing has moved yet, or nobody works on it."""

    total_bytes: int
    done_bytes: int
    bytes_per_s: float
    eta_s: float | None
    since_s: int

    def document(self) -> dict[str, Any]:
        return asdict(self)


class LeavingDisks:
    """The healer's view. `clock` is wall time."""

    def __init__(self, volume: Volume, clock: Callable[[], float]) -> None:
        self._volume = volume
        self._clock = clock
        self._looked_s = float("-inf")

    def look(self, *, idle: bool) -> None:
        """Queue what is on them, note what is left, and forget those that are empty. `idle`: the queue has nothing that is due."""
        now_s = self._clock()
        if not idle and 0 <= now_s - self._looked_s < LOOK_S:
            return
        with self._volume.snapshot() as reader:
            leaving = {number for number, row in warm_disks.disks(reader).items() if row.state != "active"}
            noted = packs.setting(reader, "leaving_disks")
            if not leaving and not noted:
                return
            on_them = [
                (number, row) for number, row in packs.scan(reader) if row.state == VALID and leaving & set(row.disks)
            ]
            queued = {unpack_u64(key[1:])[0] for key, _ in reader.scan(*prefix_range(b"h"))}
        self._looked_s = now_s
        left_bytes = dict.fromkeys(leaving, 0)
        for _, row in on_them:
            for disk in leaving & set(row.disks):
                left_bytes[disk] += row.shard_bytes
        missing = [number for number, _ in on_them if number not in queued][:QUEUED_AT_ONCE]
        empty = {disk for disk, left in left_bytes.items() if not left}
        rows = {
            str(disk): _sampled(noted.get(str(disk)), left, now_s)
            for disk, left in left_bytes.items()
            if disk not in empty
        }

        def note(tx: MetadataTransaction) -> None:
            for number in missing:
                if packs.get(tx, number) is not None:
                    packs.want_repair(tx, number, "a disk is leaving")
            for number in empty:
                tx.delete(key_u64(b"d", number))
            if rows != noted:
                tx.put(KEY, pack_json(rows))

        if missing or empty or rows != noted:
            self._volume.mutate(note, frees=True)


def _sampled(before: Any, left_bytes: int, now_s: float) -> dict[str, Any]:
    """The row of one disk with what is left now. A row that says 1 is of a program that did not count."""
    if not isinstance(before, dict):
        return {"since_s": int(now_s), "total_bytes": left_bytes, "samples": [[now_s, left_bytes]]}
    samples = list(before["samples"])
    last_s, last_bytes = samples[-1]
    if last_bytes == left_bytes and 0 <= now_s - last_s < SAMPLE_GAP_S_MAX:
        return before
    if not 0 <= now_s - last_s < SAMPLE_GAP_S_MAX:
        samples = []
    elif now_s - last_s < LOOK_S and len(samples) > 1:
        samples.pop()
    samples = [*samples, [now_s, left_bytes]][-SAMPLES_MAX:]
    return {**before, "total_bytes": max(before["total_bytes"], left_bytes), "samples": samples}


def progress(reader: InodeReader, disk: int) -> Rebuild | None:
    """How far a leaving disk is; None if it is not leaving, or nobody has looked yet."""
    row = packs.setting(reader, "leaving_disks").get(str(disk))
    if not isinstance(row, dict):
        return None
    (first_s, first_bytes), (last_s, last_bytes) = row["samples"][0], row["samples"][-1]
    rate = max(0.0, (first_bytes - last_bytes) / (last_s - first_s)) if last_s > first_s else 0.0
    return Rebuild(
        total_bytes=row["total_bytes"],
        done_bytes=row["total_bytes"] - last_bytes,
        bytes_per_s=rate,
        eta_s=last_bytes / rate if rate else None,
        since_s=row["since_s"],
    )
