"""Repair and scrub: what is damaged, missing or on a disk that goes is made whole again, and everything is looked at in turn.

Repair works through the h table, a pack at a time, so an interrupted one goes on where it was. Scrub is a pass over hot extents,
warm packs and remote objects with a cursor in the store; it reads at most so many bytes a second and puts what it finds into
the repair queue.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stratum import content, copies, metrics, packs, warm, warm_disks
from stratum.clocks import come
from stratum.cold_backends.contract import RemoteArchived, RemoteError, RemoteNotFound
from stratum.damage import Thing
from stratum.errors import DataDamaged, StratumError, TierUnavailable
from stratum.log import get_logger
from stratum.schema import (
    ELSEWHERE_SEGMENT,
    STORED_SEGMENT,
    SegmentRow,
    key_u64,
    pack_json,
    prefix_range,
    unpack_json,
    unpack_u64,
)
from stratum.segments import SegmentStore
from stratum.tier_rows import VALID, Tier
from stratum.tiering.leaving import LeavingDisks

if TYPE_CHECKING:
    from collections.abc import Callable

    from stratum.tier_rows import DiskRow, PackRow
    from stratum.tiering.mover import Mover
    from stratum.transaction import MetadataTransaction
    from stratum.volume import Volume

log = get_logger("heal")
REPAIRS_AT_ONCE = 8
RETRY_S = 30.0
PHASES = ("hot", "warm", "cold")
UNHEALED_MAX = 100
STEP_S_MAX = 1.0


class Healer:
    """Part of `Tierd`. `clock` is wall time."""

    def __init__(self, volume: Volume, mover: Mover, *, clock: Callable[[], float] = time.time) -> None:
        self._volume = volume
        self._mover = mover
        self._clock = clock
        self._scrubbed_s = clock()
        self._leaving = LeavingDisks(volume, clock)

    # -- repair -------------------------------------------------------------------------------------------------------

    def repair(self) -> bool:
        """Heal some packs of the queue; whether more are due. Raises `Preempted`."""
        due = self._due()
        self._leaving.look(idle=not due)
        due = due or self._due()
        for number, why in self._mover.in_turn(due[:REPAIRS_AT_ONCE]):
            try:
                error = self.heal_pack(number)
            except (StratumError, OSError) as failure:
                error = getattr(failure, "message", str(failure))
            metrics.HEALED.add("failed" if error else "healed")
            if error:
                self._put_off(number, why, error)
        return len(due) > REPAIRS_AT_ONCE

    def _due(self) -> list[tuple[int, dict[str, Any]]]:
        """The first of the queue that need not wait, and one more if there are."""
        now_s = self._clock()
        due = []
        with self._volume.snapshot() as reader:
            for key, raw in reader.scan(*prefix_range(b"h")):
                why = unpack_json(raw)
                if come(why.get("not_before_s", 0), now_s, RETRY_S):
                    due.append((unpack_u64(key[1:])[0], why))
                    if len(due) > REPAIRS_AT_ONCE:
                        break
        return due

    def _put_off(self, number: int, why: dict[str, Any], error: str) -> None:
        row = {**why, "error": error, "attempts": why.get("attempts", 0) + 1, "not_before_s": self._clock() + RETRY_S}
        if why.get("error") != error:
            log.warning("pack_not_repaired", pack=f"{number:016x}", error=error)

        def put(tx: MetadataTransaction) -> None:
            if tx.get(key_u64(b"h", number)) is not None:
                tx.put(key_u64(b"h", number), pack_json(row))

        self._volume.mutate(put, frees=True)

    def heal_pack(self, number: int) -> str:
        """Make a warm pack whole; what is in the way, or nothing."""
        with self._volume.snapshot() as reader:
            row = packs.get(reader, number)
            disks = warm_disks.disks(reader)
        if row is None or row.state != VALID or row.tier != Tier.WARM:
            self._done(number, None, {})
            return ""
        bad = self._volume.warm.examine(number, row)
        for index, disk in enumerate(row.disks):
            if disk and index not in bad and (disk not in disks or disks[disk].state != "active"):
                bad[index] = "its disk is leaving"
        unreadable = [index for index, why in bad.items() if why != "its disk is leaving"]
        if row.k + row.m - len(unreadable) < row.k:
            return self._rescue(number, row, bad)
        targets = self._targets(row, bad, disks)
        if targets:
            self._volume.warm.rebuild(number, row, targets)
            log.info("pack_repaired", pack=f"{number:016x}", shards=",".join(map(str, sorted(targets))))
        left = sorted(bad.keys() - targets.keys())
        self._done(number, row, targets, keep=bool(left))
        self._volume.noted.forget(number)
        return f"there is no disk for shards {left}; add or free one" if left else ""

    def _targets(self, row: PackRow, bad: dict[int, str], disks: dict[int, DiskRow]) -> dict[int, int]:
        """Where each bad shard goes: where it was, to the disk's successor, or to the emptiest disk without one."""
        present = {
            number: disk
            for number, disk in disks.items()
            if disk.state == "active" and self._volume.warm.is_present(number, disk)
        }
        used = {disk for index, disk in enumerate(row.disks) if index not in bad}
        targets: dict[int, int] = {}
        for index in sorted(bad):
            before = row.disks[index]
            successor = disks[before].successor if before in disks else 0
            free = sorted(
                (number for number in present if number not in used), key=lambda n: -_free_bytes(Path(present[n].path))
            )
            choice = next((disk for disk in (before, successor) if disk in free), free[0] if free else 0)
            if choice:
                targets[index] = choice
                used.add(choice)
        return targets

    def _done(self, number: int, row: PackRow | None, targets: dict[int, int], *, keep: bool = False) -> None:
        leftovers: list[tuple[int, int]] = []

        def done(tx: MetadataTransaction) -> None:
            current = packs.get(tx, number)
            if current is not None and row is not None and current.state == VALID:
                for index, disk in targets.items():
                    if current.disks[index] not in {0, disk}:
                        leftovers.append((index, current.disks[index]))
                    current.disks[index] = disk
                current.verified_s = int(self._clock())
                packs.put(tx, number, current)
            if not keep:
                tx.delete(key_u64(b"h", number))

        self._volume.mutate(done, frees=True)
        for index, disk in leftovers:  # the shard has moved: the old one goes, if its disk is still there
            try:
                self._volume.warm.shard_path(disk, number, index).unlink(missing_ok=True)
            except OSError:
                continue

    def _rescue(self, number: int, row: PackRow, bad: dict[int, str]) -> str:
        """Too few shards: what has another copy is copied anew, the rest is lost until disks come back."""
        with self._volume.snapshot() as reader:
            extents = [extent for extent, _ in packs.members(reader, number)]
        lost = []
        for extent in extents:
            try:
                self._mover.copy([extent], Tier.WARM, again=True)
            except (DataDamaged, TierUnavailable):
                lost.append(extent)
        if not lost:
            return ""
        what = f"{len(lost)} extents are lost unless disks come back: {self._volume.warm.describe(number, row, bad)}"
        self._volume.damages.found(Thing.PACK, number, f"pack {number:016x}: {what}", by="scrub")
        return what

    # -- scrub --------------------------------------------------------------------------------------------------------

    def scrub(self) -> bool:
        """Go on with the pass that is running, or begin one that is due; whether to go on at once."""
        with self._volume.snapshot() as reader:
            state = packs.setting(reader, "scrub")
            speed = int(
                str(packs.setting(reader, "scrub_speed").get("bytes_per_s", self._volume.config.scrub_bytes_per_s_max))
            )
        now_s = self._clock()
        if state.get("state") != "running":
            period_s = self._volume.config.scrub_period_s
            last_s = float(str(state.get("ended_s", 0)))
            if (
                state.get("state") == "paused"
                or not period_s
                or not come(last_s + period_s, now_s, period_s)
                or not self._anything()
            ):
                return False
            start_scrub(self._volume)
            return True
        budget = int(min(max(now_s - self._scrubbed_s, 0.05), 1.0) * speed)
        self._scrubbed_s = now_s
        scrub = Scrub(self._volume, self, self._mover, dict(state))
        scrub.go_on(budget)
        return False

    def _anything(self) -> bool:
        with self._volume.snapshot() as reader:
            return bool(reader.first_rows(b"p", b"q", 1))

    def heal_hot(self, extent: int) -> bool:
        """Write an extent's hot bytes anew from a copy elsewhere; False without one."""
        volume = self._volume
        with volume.snapshot() as reader:
            if reader.get(key_u64(b"X", extent)) is None:
                return True
            row, checksums = reader.extent(extent)
            located = copies.locate(reader, extent)
        if not located:
            return False
        data = copies.read_whole(volume, extent, row, checksums, located)
        self._mover.write_hot(extent, row.generation, data, checksums)
        log.info("extent_repaired", extent=f"{extent:016x}")
        return True


def _free_bytes(path: Path) -> int:
    try:
        stat = os.statvfs(path)
    except OSError:
        return 0
    return stat.f_bavail * stat.f_frsize


def start_scrub(volume: Volume) -> None:
    """Begin a pass, unless one is running or paused: that goes on."""

    def start(tx: MetadataTransaction) -> None:
        before = packs.setting(tx, "scrub")
        if before.get("state") == "paused":
            tx.put(b"gscrub", pack_json({**before, "state": "running"}))
        elif before.get("state") != "running":
            total = sum(
                row.k * row.shard_bytes + row.m * row.shard_bytes for _, row in packs.scan(tx) if row.tier == Tier.WARM
            )
            hot = sum(SegmentRow.unpack(raw).live_bytes for _, raw in tx.scan(*prefix_range(b"G")))
            cold = sum(row.length for _, row in packs.scan(tx) if row.tier == Tier.COLD)
            document = {
                "total_bytes": hot + total + cold, "state": "running", "phase": "hot", "cursor": 0, "began_s": int(time.time()), "ended_s": before.get("ended_s", 0),
                "read_bytes": 0, "warm_bytes": total, "checked": 0, "found": 0, "healed": 0, "unhealed": [],
            }  # fmt: skip
            tx.put(b"gscrub", pack_json(document))

    volume.mutate(start, frees=True)


class Scrub:
    """A pass as its row has it."""

    def __init__(self, volume: Volume, healer: Healer, mover: Mover, state: dict[str, Any]) -> None:
        self._volume = volume
        self._healer = healer
        self._mover = mover
        self._state = state

    def go_on(self, budget: int) -> None:
        """Read about `budget` bytes further, less if something else comes first, then note how far."""
        left = budget
        until = time.monotonic() + STEP_S_MAX
        while left > 0 and self._state["state"] == "running":
            phase = str(self._state["phase"])
            read = {"hot": self._hot, "warm": self._warm, "cold": self._cold}[phase]()
            if read is None:
                self._next_phase(phase)
            else:
                left -= read
                self._state["read_bytes"] += read
                # A remote that answers slowly is asked thousands of times for what a disk would read in a second.
                if time.monotonic() > until or self._mover.pressing():
                    break

        def note(tx: MetadataTransaction) -> None:
            current = packs.setting(tx, "scrub").get("state")
            if current == "paused" and self._state["state"] == "running":
                self._state["state"] = "paused"
            tx.put(b"gscrub", pack_json(self._state))

        self._volume.mutate(note, frees=True)

    def _next_phase(self, phase: str) -> None:
        following = PHASES.index(phase) + 1
        self._state["cursor"] = 0
        if following < len(PHASES):
            self._state["phase"] = PHASES[following]
            return
        self._state["state"] = "done"
        self._state["ended_s"] = int(time.time())
        log.info("scrub_done", checked=self._state["checked"], found=self._state["found"], healed=self._state["healed"])

    def _found(self, thing: str, *, healed: bool) -> None:
        self._state["found"] += 1
        if healed:
            self._state["healed"] += 1
        elif len(self._state["unhealed"]) < UNHEALED_MAX:
            self._state["unhealed"].append(thing)

    def _hot(self) -> int | None:
        with self._volume.snapshot() as reader:
            rows = reader.first_rows(key_u64(b"X", self._state["cursor"] + 1), b"Y", 1)
            if not rows:
                return None
            number = unpack_u64(rows[0][0][1:])[0]
            row, checksums = reader.extent(number)
        self._state["cursor"] = number
        if row.segment in {STORED_SEGMENT, ELSEWHERE_SEGMENT} or not row.references:
            return 64
        self._state["checked"] += 1
        # Descriptors of its own: one that was open before would hide that a file is gone.
        segments = SegmentStore(self._volume.segments.folders, 0, self._volume.new_id, on_failure=lambda _: None)
        try:
            for at in range(0, row.length, content.READ_BYTES):
                stop = min(at + content.READ_BYTES, row.length)
                segments.read(number, row.segment, row.offset, row.length, checksums, at, stop)
        except DataDamaged as error:
            with self._volume.snapshot() as reader:
                gone = reader.get(key_u64(b"X", number)) is None
                moved = gone or reader.extent(number)[0].generation != row.generation
            if not moved:
                healed = self._healer.heal_hot(number)
                self._found(error.message, healed=healed)
                if not healed:
                    self._volume.damages.found(
                        Thing.EXTENT, number, error.message, by="scrub", first=at, last=min(at + content.READ_BYTES, row.length)
                    )  # fmt: skip
        finally:
            segments.close()
        return row.length

    def _next_pack(self, tier: Tier) -> tuple[int, PackRow] | None:
        with self._volume.snapshot() as reader:
            for number, row in packs.scan(reader, self._state["cursor"] + 1):
                self._state["cursor"] = number
                if row.tier == tier and row.state == VALID:
                    return number, row
        return None

    def _warm(self) -> int | None:
        found = self._next_pack(Tier.WARM)
        if found is None:
            return None
        number, row = found
        self._state["checked"] += 1
        bad = self._volume.warm.examine(number, row)
        if bad:
            try:
                error = self._healer.heal_pack(number)
            except (StratumError, OSError) as failure:
                error = getattr(failure, "message", str(failure))
            self._found(f"pack {number:016x}: {error or 'healed'}", healed=not error)
            if error:
                self._volume.mutate(lambda tx: warm.note_damage(tx, number, error), frees=True)
        return row.shard_bytes * (row.k + row.m)

    def _cold(self) -> int | None:
        """Ask whether the object is there and as long as it should be; reading it may cost money."""
        found = self._next_pack(Tier.COLD)
        if found is None:
            return None
        number, row = found
        self._state["checked"] += 1
        try:
            info = self._volume.cold.remote(row.remote)[1].sealed.head(row.key)
            missing, good_bytes = info.size < row.length, info.size
        except RemoteNotFound:
            try:
                self._volume.cold.check_marker(row.remote, anew=True)  # else more than this object is gone
            except StratumError:
                return 4096
            missing, good_bytes = True, 0
        except (RemoteArchived, RemoteError, StratumError):
            return 4096  # not to be known now
        if missing:
            what = f"pack {number:016x}: its object in remote {row.remote!r} is gone or cut off"
            healed = self._replace(number)
            self._found(what, healed=healed)
            if not healed:
                self._volume.damages.found(Thing.PACK, number, what, by="scrub", first=good_bytes)
        return 4096

    def _replace(self, number: int) -> bool:
        """Send anew what still has another copy here."""
        with self._volume.snapshot() as reader:
            extents = [extent for extent, _ in packs.members(reader, number)]
        try:
            self._mover.copy(extents, Tier.COLD, again=True, alone=True)
        except StratumError:
            return False
        return True
