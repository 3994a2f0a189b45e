"""`stratum tierd`: the process that moves, heals and expires.

One step at a time, the pressing first: relief of full disks, moves that were asked for, repair, then everything that can wait.
No step holds up what is more pressing: between two packs, or two pages of a walk, it asks whether a disk fills, a move is asked for or the end has
come. Then it stops where it is, and goes on when its turn comes again.

Invariants
* It holds `mover.exclusive` while it works; a second one waits.
* A failure of one step is logged and the others go on.
"""

from __future__ import annotations

import re
import threading
import time
from typing import TYPE_CHECKING, Any

from stratum import counting, evidence, filling, housekeeping, packs
from stratum.clocks import LeapWatch, come
from stratum.errors import Busy, StillFilling, StratumError, TierUnavailable
from stratum.log import get_logger
from stratum.schema import ExtentRow, SegmentRow, key_u64, pack_json, prefix_range, split_u64_u64, unpack_u64
from stratum.tier_rows import AccessRow, Tier
from stratum.tiering import files, leftovers
from stratum.tiering.asked import Asked
from stratum.tiering.damage_check import DamageCheck
from stratum.tiering.drain import Drainer
from stratum.tiering.heal import Healer
from stratum.tiering.lifecycle import LifecycleRunner, Restorer
from stratum.tiering.mover import Mover, Preempted, exclusive
from stratum.tiering.policy import Settings, decide, relief_order
from stratum.tiering.pressure import Gauge
from stratum.tiering.remote_watch import RemoteWatch
from stratum.tiering.snapshots import IndexSnapshots

if TYPE_CHECKING:
    from collections.abc import Callable

    from stratum.tiering.files import Known
    from stratum.tiering.policy import Surroundings
    from stratum.transaction import InodeReader
    from stratum.volume import Volume

log = get_logger("tierd")
WINDOW_FILES = 512
RELIEF_BYTES = 256 * 1024 * 1024
RETRY_S = 5.0
RETRY_S_MAX = 300.0
PRESSING = frozenset(("relief", "asked", "repair"))
"""Steps that are tried at the same pace however often they fail."""
RESCAN_S = 3600.0
DISKS_TOLD_S = 10.0
PRESSURE_LOOK_S = 0.1
COMPACT_S = 60.0
CLOCK_JUMP_S = 3600.0
_DIGITS = re.compile(r"(?<![0-9a-f])[0-9a-f]*[0-9][0-9a-f]*")
HALF_BELIEVED_S = 60.0
HELD_BY_A_LEAP_S = {"background": HALF_BELIEVED_S, "lifecycle": 3600.0, "graces": 3600.0}
"""Steps that go by age, and what they wait after the clock leapt. What they do cannot be undone where it is an hour."""


class Tierd:
    """`clock` is the wall clock, `monotonic` the other; tests set both."""

    def __init__(
        self,
        volume: Volume,
        *,
        gauge: Gauge | None = None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._volume = volume
        self._settings = Settings.of(volume.config)
        self._gauge = gauge or Gauge(volume.segments.folders, volume.config)
        self._clock = clock
        self._monotonic = monotonic
        self._believing_until_s = 0.0
        self._leaps = LeapWatch(clock(), monotonic(), CLOCK_JUMP_S)
        self._ending = threading.Event()
        self._step = ""
        self.mover = Mover(volume, pressing=self._pressing)
        self._healer = Healer(volume, self.mover, clock=clock)
        self._damage = DamageCheck(volume, self.mover, self._healer, clock=clock)
        self._lifecycle = LifecycleRunner(volume, pressing=self._pressing, clock=clock)
        self._restorer = Restorer(volume, self.mover, clock=clock)
        self._drainer = Drainer(volume, self.mover)
        self._asked = Asked(volume, self.mover, clock=clock)
        self._remotes = RemoteWatch(volume, monotonic=monotonic)
        self._snapshots = IndexSnapshots(volume, clock=clock)
        self._cursors: dict[Tier, bytes] = {}
        self._rescan_s = monotonic()
        self._compacted_s = monotonic()
        self._failing: dict[str, tuple[float, str]] = {}
        """Steps that failed: when they are tried again, and why they did."""
        self._failures: dict[str, tuple[int, str]] = {}
        """How often in a row, and why but for its numbers."""
        self._beaten_s = monotonic()
        self.level = "ok"

    # -- the loop -----------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        self._ending.set()

    def run(self) -> None:
        """Until `stop`."""
        while not self._ending.is_set():
            try:
                with exclusive(self._volume):
                    log.info("moving_begins")
                    leftovers.recover(self.mover)
                    while not self._ending.is_set():
                        busy = self.step()
                        if self._volume.failed is not None:
                            return
                        if not busy:
                            self._rest()
            except Busy:
                self._beat()
                self._ending.wait(self._volume.config.tiering_interval_s)
            except StratumError as error:
                log.error("tierd_failed", error=error.message)
                self._ending.wait(self._volume.config.tiering_interval_s)

    def _rest(self) -> None:
        """Until the next round is due, or a disk fills."""
        until = self._monotonic() + self._volume.config.tiering_interval_s
        while not self._ending.wait(min(PRESSURE_LOOK_S, max(until - self._monotonic(), 0.0))):
            self._beat()
            self.mover.courtesy.look()
            if self._monotonic() >= until or self._gauge_is_high():
                return

    def step(self) -> bool:
        """One round of everything; whether there is more to do at once."""
        self._beat()
        busy = self._guarded("relief", self._relieve)
        self._publish()
        if self._paused():
            self._guarded("asked", self._answer_asked)
            return False
        for name, work in (
            ("asked", self._answer_asked), ("remotes", self._remotes.run), ("repair", self._healer.repair), ("damage", self._damage.run), ("background", self._background), ("lifecycle", self._lifecycle.run),
            ("restores", self._restorer.run),
            ("condemned", self._remove_condemned), ("graces", self._end_graces), ("drains", self._drainer.run), ("scrub", self._healer.scrub), ("compact", self._compact),
            ("snapshot", self._snapshots.run),
        ):  # fmt: skip
            if self._ending.is_set():
                return False
            self._beat()
            busy = self._guarded(name, work) or busy
            if name != "asked" and (self._gauge_is_high() or self._asked_waits()):
                return not self._ending.is_set()
        return busy and not self._ending.is_set()

    def _pressing(self) -> bool:
        """Whether the step at hand should stop where it is."""
        self._beat()
        if self._ending.is_set():
            return True
        if self._step == "relief":
            return False
        return self._gauge_is_high() or (self._step != "asked" and self._asked_waits())

    def _asked_waits(self) -> bool:
        return "asked" not in self._failing and self._asked.waits()

    def _watch_clock(self) -> None:
        """A wall clock that leaps must not make every file look idle, or old enough to expire."""
        if self._monotonic() < self._believing_until_s:
            return
        leap_s = self._leaps.leapt_s(self._clock(), self._monotonic())
        if leap_s:
            self._believing_until_s = self._monotonic() + HALF_BELIEVED_S
            log.warning("clock_jumped", seconds=round(leap_s))
            for step, pause_s in HELD_BY_A_LEAP_S.items():
                why = f"the clock leapt by {leap_s:.0f} seconds; what goes by age waits, in case it is set right again"
                self._failing[step] = self._monotonic() + pause_s, why

    def _beat(self) -> None:
        self._beaten_s = self._monotonic()
        counting.beat()

    def silent_s(self) -> float:
        """Since a step last began or the loop last rested."""
        return self._monotonic() - self._beaten_s

    def _guarded(self, name: str, work: Callable[[], bool]) -> bool:
        """Run a step; one that failed, or that the clock holds back, waits before it is tried again."""
        self._watch_clock()  # before each: one of them may work for minutes, and the next goes by age
        if name in self._failing and self._monotonic() < self._failing[name][0]:
            return False
        self._step = name
        self.mover.courtesy.urgent = name == "relief"
        try:
            found = work()
        except Preempted:
            return True
        except StillFilling as error:
            filling.provide(self._volume, error)
            return True
        except (StratumError, OSError) as error:
            self._put_off(name, getattr(error, "message", str(error)))
            return False
        self._failing.pop(name, None)
        self._failures.pop(name, None)
        return found

    def _put_off(self, name: str, why: str) -> None:
        """Told once as long as it fails in the same way, and tried after pauses that grow, unless somebody waits for it."""
        kind = _DIGITS.sub("#", why)
        count, before = self._failures.get(name, (0, ""))
        count = count + 1 if kind == before else 1
        self._failures[name] = count, kind
        if count == 1:
            log.warning("step_failed", step=name, error=why)
        pause_s = RETRY_S if name in PRESSING else min(RETRY_S * 2 ** (min(count, 10) - 1), RETRY_S_MAX)
        self._failing[name] = self._monotonic() + pause_s, why

    def _gauge_is_high(self) -> bool:
        self.level = self._gauge.look()
        return self.level in {"high", "emergency"} and "relief" not in self._failing

    def _paused(self) -> bool:
        with self._volume.snapshot() as reader:
            return bool(packs.setting(reader, "paused"))

    def _publish(self) -> None:
        """What `stratum tier status` shows."""
        document = {
            "level": self.level, "at_s": int(self._clock()), "troubles": {name: why for name, (_, why) in sorted(self._failing.items())},
            "disks": [{"path": usage.path, "used_percent": round(usage.used_percent, 1), "inodes_percent": round(usage.inodes_percent, 1)} for usage in self._gauge.usages],
            "moved_bytes": dict(self.mover.moved_bytes),
        }  # fmt: skip
        with self._volume.snapshot() as reader:
            before = packs.setting(reader, "tierd")
        period_s = 60.0 if before.get("disks") == document["disks"] else DISKS_TOLD_S
        due = come(int(str(before.get("at_s", 0))) + period_s, self._clock(), period_s)
        # Somebody always writes a little to a disk: that alone is no reason for a commit every round.
        same = all(before.get(name) == told for name, told in document.items() if name not in {"at_s", "disks"})
        if not same or due:
            self._volume.mutate(lambda tx: tx.put(b"gtierd", pack_json(document)), frees=True)

    def scrub_now(self) -> None:
        """A piece of the scrub that is running, for somebody who waits for it."""
        self._healer.scrub()

    def repair_now(self) -> None:
        """Some packs of the repair queue, for somebody who waits for them."""
        self._guarded("repair", self._healer.repair)

    def move_asked(self) -> None:
        """What was asked for and is due, for somebody who waits for it."""
        self.level = self._gauge.look()
        self._guarded("asked", self._answer_asked)

    # -- pressure -----------------------------------------------------------------------------------------------------

    def _relieve(self) -> bool:
        """Free hot bytes until every disk is at `low`: first what is copied already, then by the least use per byte."""
        self.level = self._gauge.look()
        if self.level not in {"high", "emergency"}:
            return False
        wanted = min(max(self._gauge.excess_bytes(), 1 << 20), RELIEF_BYTES)
        freed = self._relieve_some(wanted)
        while housekeeping.give_back(self._volume):
            pass
        if not freed:
            raise TierUnavailable(
                f"a hot disk is above its {self.level} mark and nothing can leave it: no other tier can take data, or all is pinned"
            )
        return True

    def _relieve_some(self, wanted: int) -> int:
        around = files.surroundings(self._volume, self.level)
        freed = 0
        after = b""
        while freed < wanted and not self._ending.is_set():
            window, after = self._oldest(Tier.HOT, after)
            if not window:
                break
            freed += self._leave(window, wanted - freed, around)
        return freed

    def _leave(self, window: list[Known], wanted: int, around: Surroundings) -> int:
        """Of these files, those that must, out of the hot tier; bytes freed."""
        movable = [item for item in window if item.facts.pin != Tier.HOT]
        by_number = {item.inode.number: item for item in movable}
        order = relief_order([(item.inode.number, item.facts) for item in movable])
        with self._volume.snapshot() as reader:
            dual = {number: tier for number in order if (tier := self._copied_to(reader, number)) is not None}
        freed = 0
        for tier in (Tier.WARM, Tier.COLD):
            ready = [number for number in order if dual.get(number) == tier]
            freed += self._move_until(ready, tier, "pressure: it was copied ahead", wanted - freed, by_number)
        rest = [number for number in order if number not in dual]
        targets = [tier for tier, takes in ((Tier.WARM, around.warm), (Tier.COLD, around.cold)) if takes]
        for target in targets:
            rest = self._still_hot(rest)
            if freed >= wanted or not rest:
                break
            try:
                freed += self._move_until(rest, target, "pressure: the least used per byte", wanted - freed, by_number)
            except TierUnavailable as error:
                log.warning("relief_turns_away", tier=target.name.lower(), error=error.message)
        return freed

    def _still_hot(self, numbers: list[int]) -> list[int]:
        with self._volume.snapshot() as reader:
            rows = [(number, evidence.get(reader, number)) for number in numbers]
        return [number for number, row in rows if row is not None and row.tier == Tier.HOT]

    def _move_until(self, numbers: list[int], tier: Tier, cause: str, wanted: int, known: dict[int, Known]) -> int:
        freed, at = 0, 0
        while at < len(numbers) and freed < wanted:
            batch: list[int] = []
            size = 0
            while at < len(numbers) and len(batch) < 256 and size < min(wanted - freed, 64 << 20):
                batch.append(numbers[at])
                size += known[numbers[at]].facts.size
                at += 1
            used_s = max(self._clock() - known[number].facts.idle_s for number in batch)
            inputs = {number: {"idle_s": round(known[number].facts.idle_s), "level": self.level} for number in batch}
            outcome = self.mover.move(batch, tier, cause=cause, inputs=inputs, stays=self._busier_than(used_s))
            freed += outcome.freed_bytes
        return freed

    def _busier_than(self, used_s: float) -> Callable[[InodeReader, int], bool]:
        """Whether another owner of an extent keeps it hot: a pin, or a use since then."""

        def stays(reader: InodeReader, number: int) -> bool:
            found = files.known(reader, number, self._settings, self._clock())
            return found is not None and (found.facts.pin == Tier.HOT or self._clock() - found.facts.idle_s > used_s)

        return stays

    def _copied_to(self, reader: InodeReader, number: int) -> Tier | None:
        """The hottest colder tier that has good copies of all a file's extents."""
        common = {Tier.WARM, Tier.COLD}
        extents = {piece.extent for piece in reader.slices(number)}
        for extent in extents:
            common &= set(packs.copies(reader, extent))
        return min(common) if common and extents else None

    def _oldest(self, tier: Tier, after: bytes) -> tuple[list[Known], bytes]:
        """The next files of a tier in the order of their last use, and where to go on. None on a disk that has room."""
        start = after + b"\0" if after else b"b" + bytes((tier,))
        full = self._gauge.full_folders() if len(self._volume.segments.folders) > 1 else None
        found: list[Known] = []
        while not found:
            with self._volume.snapshot() as reader:
                rows = reader.first_rows(start, b"b" + bytes((tier + 1,)), WINDOW_FILES)
                for key, _ in rows:
                    number = split_u64_u64(key[1:])[1]
                    item = files.known(reader, number, self._settings, self._clock())
                    if item is not None and (full is None or self._lies_on(reader, number, full)):
                        found.append(item)
            if not rows:
                break
            after = rows[-1][0]
            start = after + b"\0"
        return found, after

    @staticmethod
    def _lies_on(reader: InodeReader, number: int, folders: set[int]) -> bool:
        for piece in reader.slices(number):
            raw = reader.get(key_u64(b"X", piece.extent))
            segment = reader.get(key_u64(b"G", ExtentRow.unpack(raw)[0].segment)) if raw is not None else None
            if segment is not None and SegmentRow.unpack(segment).path in folders:
                return True
        return False

    # -- background ---------------------------------------------------------------------------------------------------

    def _background(self) -> bool:
        """Copies ahead, or moves in the mode "strict"; each file is looked at once until it is used again."""
        if self._monotonic() - self._rescan_s > RESCAN_S:
            self._rescan_s = self._monotonic()
            self._cursors.clear()
        around = files.surroundings(self._volume, self.level)
        more = False
        for tier in (Tier.HOT, Tier.WARM):
            if (tier == Tier.HOT and (around.warm or around.cold)) or (tier == Tier.WARM and around.cold):
                more = self._background_of(tier, around) or more
        return more

    def _background_of(self, tier: Tier, around: Surroundings) -> bool:
        cutoff_s = self._settings.idle_s if tier == Tier.HOT else self._settings.cold_after_s
        if self._cursors.get(tier, b"")[2:10] > int(self._clock() - cutoff_s).to_bytes(8, "big"):
            return False
        with self._volume.snapshot() as reader:
            after = self._cursors.get(tier)
            start = after + b"\0" if after else b"b" + bytes((tier,))
            stop = b"b" + bytes((tier,)) + max(int(self._clock() - cutoff_s) + 1, 0).to_bytes(8, "big")
            keys = [key for key, _ in reader.first_rows(start, stop, WINDOW_FILES)] if start < stop else []
            items = [files.known(reader, split_u64_u64(key[1:])[1], self._settings, self._clock()) for key in keys]
        moves: dict[Tier, list[Known]] = {}
        ahead: dict[Tier, list[Known]] = {}
        for item in items:
            if item is None:
                continue
            decision = decide(item.facts, self._settings, around)
            if decision.target is not None:
                moves.setdefault(decision.target, []).append(item)
            elif decision.copy_to is not None:
                ahead.setdefault(decision.copy_to, []).append(item)
        for target, found in moves.items():
            used_s = self._clock() - min(item.facts.idle_s for item in found)
            inputs = {item.inode.number: decide(item.facts, self._settings, around).inputs for item in found}
            self.mover.move(
                [item.inode.number for item in found],
                target,
                cause="idle",
                inputs=inputs,
                stays=self._busier_than(used_s),
            )
        for target, found in ahead.items():
            with self._volume.snapshot() as reader:
                extents = [piece.extent for item in found for piece in reader.slices(item.inode.number)]
            self.mover.copy(extents, target)
        if keys:
            self._cursors[tier] = keys[-1]
        return len(keys) == WINDOW_FILES

    def _answer_asked(self) -> bool:
        return self._asked.run(self.level)

    def _remove_condemned(self) -> bool:
        return leftovers.remove_condemned(self.mover) > 0

    def _end_graces(self) -> bool:
        """What was given up in a remote is kept for a while, for those who restore metadata that still point there."""
        return leftovers.remove_condemned(self.mover, self._clock()) > 0

    def _compact(self) -> bool:
        if self._monotonic() - self._compacted_s < COMPACT_S:
            return False
        self._compacted_s = self._monotonic()
        return leftovers.compact(self.mover) > 0


def plan(volume: Volume, level: str, horizon_s: float) -> list[dict[str, Any]]:
    """What would move within `horizon_s` if nothing were used: the dry run."""
    settings = Settings.of(volume.config)
    around = files.surroundings(volume, level)
    found: list[dict[str, Any]] = []
    with volume.snapshot() as reader:
        rows = [(unpack_u64(key[1:])[0], AccessRow.unpack(raw)) for key, raw in reader.scan(*prefix_range(b"a"))]
        for number, _ in rows:
            item = files.known(reader, number, settings, time.time() + horizon_s)
            if item is None:
                continue
            decision = decide(item.facts, settings, around)
            target = decision.target or decision.copy_to
            if target is not None:
                found.append(
                    {"inode": number, "size": item.facts.size, "from": item.facts.tier.name.lower(), "to": target.name.lower(),
                     "action": "move" if decision.target else "copy ahead", "rule": decision.rule}
                )  # fmt: skip
    return found
