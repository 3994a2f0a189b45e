"""The decision as a pure function, the levels of a disk, and what the daemon does with them."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stratum import evidence, files, fsck, hints, objects, packs, stored_extents, volume
from stratum.blocks import checksum
from stratum.buckets import get as get_bucket
from stratum.errors import ConfigInvalid, InvalidArgument
from stratum.housekeeping import run_once
from stratum.schema import Slice, key_u64
from stratum.tier_rows import AccessRow, MoveRow, Tier
from stratum.tiering import daemon, leftovers
from stratum.tiering.explain import explain
from stratum.tiering.files import known
from stratum.tiering.policy import LEVELS, Facts, Settings, Surroundings, decide, relief_order
from stratum.tiering.pressure import Gauge, Usage
from stratum.volume import Volume
from tests.support import BUCKET, get, put
from tests.tiers.conftest import gauge_of, make_tiered, where

if TYPE_CHECKING:
    from pathlib import Path

SETTINGS = Settings(False, 1000.0, 5000.0, 3, 100.0, 50.0)
STRICT = replace(SETTINGS, strict=True)
FACTS = Facts(Tier.HOT, 1000, 0.0, 0, 0, 0.0, 0.0)
AROUND = Surroundings("ok", warm=True, cold=True)
DATA = os.urandom(200_000)


@pytest.mark.parametrize(
    ("facts", "settings", "around", "expected"),
    [
        ({}, STRICT, AROUND, (None, None, "stay")),
        ({"idle_s": 999.0}, STRICT, AROUND, (None, None, "stay")),
        ({"idle_s": 1000.0}, STRICT, AROUND, (Tier.WARM, None, "idle-warm")),
        ({"idle_s": 5000.0}, STRICT, AROUND, (Tier.COLD, None, "idle-cold")),
        ({"idle_s": 5000.0}, STRICT, Surroundings("ok", warm=True, cold=False), (Tier.WARM, None, "idle-warm")),
        ({"idle_s": 1000.0}, SETTINGS, AROUND, (None, Tier.WARM, "idle-warm")),
        ({"idle_s": 1000.0}, SETTINGS, Surroundings("ok", warm=False, cold=True), (None, Tier.COLD, "idle-cold")),
        ({"idle_s": 1000.0}, SETTINGS, Surroundings("ok", warm=False, cold=False), (None, None, "stay")),
        ({"idle_s": 1000.0, "moved_ago_s": 10.0}, STRICT, AROUND, (None, Tier.WARM, "idle-warm")),
        ({"idle_s": 9999.0, "pin": Tier.HOT}, STRICT, AROUND, (None, None, "pin")),
        ({"pin": Tier.COLD}, SETTINGS, AROUND, (Tier.COLD, None, "pin")),
        ({"pin": Tier.COLD}, SETTINGS, Surroundings("ok", warm=True, cold=False), (None, None, "pin")),
        ({"tier": Tier.COLD, "pin": Tier.HOT}, SETTINGS, AROUND, (Tier.HOT, None, "pin")),
        ({"tier": Tier.COLD, "pin": Tier.HOT}, SETTINGS, Surroundings("emergency", warm=True, cold=True), (None, None, "pin")),
        ({"asked": Tier.WARM}, SETTINGS, AROUND, (Tier.WARM, None, "asked")),
        ({"tier": Tier.WARM, "asked": Tier.WARM, "reads_recent": 9}, SETTINGS, AROUND, (None, None, "asked")),
        ({"tier": Tier.WARM, "reads_recent": 2}, SETTINGS, AROUND, (None, None, "stay")),
        ({"tier": Tier.WARM, "reads_recent": 3}, SETTINGS, AROUND, (Tier.HOT, None, "repeated-read")),
        ({"tier": Tier.COLD, "reads_recent": 3}, SETTINGS, Surroundings("high", warm=True, cold=True), (None, None, "repeated-read")),
        ({"tier": Tier.WARM, "idle_s": 5000.0}, STRICT, AROUND, (Tier.COLD, None, "idle-cold")),
        ({"tier": Tier.WARM, "idle_s": 5000.0}, SETTINGS, AROUND, (None, Tier.COLD, "idle-cold")),
    ],
)  # fmt: skip
def test_decisions(facts: dict[str, Any], settings: Settings, around: Surroundings, expected: tuple[Any, ...]) -> None:
    decision = decide(replace(FACTS, **facts), settings, around)
    assert (decision.target, decision.copy_to, decision.rule) == expected
    assert decision.next
    assert decision.inputs["hot_disks"] == around.level


@given(
    st.builds(
        Facts, st.sampled_from(Tier), st.integers(0, 1 << 45), st.floats(0, 1e9), st.integers(0, 8), st.integers(0, 1 << 40), st.floats(0, 1e6),
        st.floats(0, 1e6), st.none() | st.floats(0, 1e9), st.none() | st.sampled_from(Tier), st.just("x"), st.none() | st.sampled_from(Tier),
    ),
    st.booleans(), st.sampled_from(LEVELS), st.booleans(), st.booleans(),
)  # fmt: skip
def test_every_decision_can_be_carried_out(facts: Facts, strict: bool, level: str, warm: bool, cold: bool) -> None:
    around = Surroundings(level, warm=warm, cold=cold)
    decision = decide(facts, replace(SETTINGS, strict=strict), around)
    for target in (decision.target, decision.copy_to):
        assert target is None or target != facts.tier
        assert target != Tier.WARM or warm
        assert target != Tier.COLD or cold
    assert decision.target != Tier.HOT or level != "emergency"
    assert decision == decide(facts, replace(SETTINGS, strict=strict), around)


def test_the_least_used_byte_leaves_first() -> None:
    used = replace(FACTS, average_slow=5.0)
    order = relief_order([
        (1, replace(used, size=1000)), (2, replace(used, size=100_000)), (3, replace(FACTS, idle_s=10.0)), (4, replace(FACTS, idle_s=99.0)),
    ])  # fmt: skip
    assert order == [4, 3, 2, 1]


def test_levels_have_hysteresis(tiered: Volume) -> None:
    percents = [0.0]
    gauge = gauge_of(tiered, percents)
    seen = []
    for percent in (50, 74.9, 75, 84, 85, 80, 76, 74, 80, 96, 90, 86, 84, 74):
        percents.append(percent)
        seen.append(gauge.look())
    assert seen == [
        "ok",
        "ok",
        "low",
        "low",
        "high",
        "high",
        "high",
        "ok",
        "low",
        "emergency",
        "emergency",
        "emergency",
        "high",
        "ok",
    ]


def test_inodes_count_too(tiered: Volume) -> None:
    gauge = Gauge(tiered.segments.folders, tiered.config, lambda folder: Usage(str(folder), 100, 1, 1.0, 97.0))
    assert gauge.look() == "emergency"


@pytest.mark.parametrize("marks", [(75, 75, 95), (90, 85, 95), (0, 85, 95), (75, 85, 101)])
def test_marks_must_rise(tmp_path: Path, marks: tuple[float, float, float]) -> None:
    names = ("low", "high", "emergency")
    with pytest.raises(ConfigInvalid):
        volume.create(
            tmp_path / "v", {f"tiering.{name}_percent": float(mark) for name, mark in zip(names, marks, strict=True)}
        )


# -- the daemon -------------------------------------------------------------------------------------------------------------


def test_pressure_frees_what_is_copied_then_the_coldest_and_never_a_pin(tiered: Volume) -> None:
    inodes = {name: put(tiered, name, DATA) for name in ("pinned", "dual", "old", "new")}
    percents = [50.0]
    worker = daemon.Tierd(tiered, gauge=gauge_of(tiered, percents))

    def age(tx: Any) -> None:
        now_s = int(time.time())
        for name, idle_s in (("pinned", 9000), ("dual", 100), ("old", 5000), ("new", 10)):
            before = evidence.get(tx, inodes[name].number)
            assert before is not None
            row = AccessRow.unpack(before.pack())
            row.last_access_s = now_s - idle_s
            evidence.put(tx, inodes[name].number, row, before)
        files.set_attribute(tx, inodes["pinned"].number, hints.ATTRIBUTE_PRIORITY, b"hot")

    tiered.mutate(age)
    with tiered.snapshot() as reader:
        worker.mover.copy([piece.extent for piece in reader.slices(inodes["dual"].number)], Tier.COLD, alone=True)
    percents.append(86.0)
    worker._gauge.look()
    assert worker._relieve_some(1) >= len(DATA)
    assert where(tiered, inodes["dual"]) == ["cold"], "copied ahead: it goes first"
    assert where(tiered, inodes["old"]) == ["hot"]
    assert worker._relieve_some(1) >= len(DATA)
    assert where(tiered, inodes["old"]) == ["warm"]
    assert where(tiered, inodes["new"]) == ["hot"]
    worker._relieve_some(1 << 30)
    assert where(tiered, inodes["new"]) == ["warm"]
    assert where(tiered, inodes["pinned"]) == ["hot"]
    for name in inodes:
        assert get(tiered, name) == DATA
    assert fsck.check(tiered) == []


def test_idle_files_are_copied_ahead_and_leave_by_a_transaction(tmp_path: Path) -> None:
    root = make_tiered(tmp_path, tiering__idle_s=0.0)
    with Volume(root, "test") as opened:
        numbers = [put(opened, f"k{number}", DATA).number for number in range(5)]
        percents = [50.0]
        worker = daemon.Tierd(opened, gauge=gauge_of(opened, percents))
        worker.step()
        assert where(opened, numbers[0]) == ["hot", "warm"]
        before = worker.mover.moved_bytes["warm"]
        percents.append(90.0)
        worker.step()
        assert worker.mover.moved_bytes["warm"] == before, "nothing was copied again"
        assert where(opened, numbers[0]) == ["warm"]


def test_strict_mode_moves_what_is_idle(tmp_path: Path) -> None:
    root = make_tiered(tmp_path, tiering__mode="strict", tiering__idle_s=0.0)
    with Volume(root, "test") as opened:
        inode = put(opened, "k", DATA)
        worker = daemon.Tierd(opened, gauge=gauge_of(opened, [10.0]))
        worker.step()
        assert where(opened, inode) == ["warm"]
        assert explain(opened, BUCKET, b"k")["moves"][0]["cause"] == "idle"


def test_a_dead_remote_turns_relief_to_the_warm_tier_and_says_so(tmp_path: Path) -> None:
    root = make_tiered(tmp_path, disks=3)
    with Volume(root, "test") as opened:
        inode = put(opened, "k", DATA)
        (tmp_path / "archive").rename(tmp_path / "unplugged")
        worker = daemon.Tierd(opened, gauge=gauge_of(opened, [97.0]))
        worker.step()
        assert where(opened, inode) == ["warm"]
        with opened.snapshot() as reader:
            status = packs.setting(reader, "tierd")
        assert status["level"] == "emergency"


def test_three_reads_bring_a_file_back(tiered: Volume) -> None:
    inode = put(tiered, "k", DATA)
    percents = [90.0]
    worker = daemon.Tierd(tiered, gauge=gauge_of(tiered, percents))
    worker.mover.move([inode.number], Tier.WARM, cause="test")
    for _ in range(3):
        tiered.evidence.read(inode.number, len(DATA))
    tiered.evidence.flush()
    assert worker._gauge_is_high()
    worker._answer_asked()
    assert where(tiered, inode) == ["warm"], "no room"
    percents.append(10.0)
    worker.level = "ok"
    for _ in range(3):
        tiered.evidence.read(inode.number, len(DATA))
    tiered.evidence.flush()
    worker._answer_asked()
    assert where(tiered, inode) == ["hot", "warm"]


def test_a_read_is_a_whole_one_or_an_episode(tiered: Volume) -> None:
    inode = put(tiered, "k", DATA)
    for number in range(8):
        tiered.evidence.read(inode.number, 1000, begins=number == 0)
    tiered.evidence.flush()
    with tiered.snapshot() as reader:
        row = evidence.get(reader, inode.number)
    assert row is not None
    assert (row.reads, row.read_bytes) == (1, 8000)


def test_hints_are_inherited_and_expire(tiered: Volume) -> None:
    inode = put(tiered, "a/b/c", DATA)
    with tiered.snapshot() as reader:
        bucket = get_bucket(reader, BUCKET).inode
        parent = reader.inode(inode.number).parent
        above = reader.inode(parent).parent
    settings = Settings.of(tiered.config)

    def pin_of() -> tuple[Any, str]:
        with tiered.snapshot() as reader:
            found = known(reader, inode.number, settings)
        assert found is not None
        return found.facts.pin, found.facts.pin_source

    def attribute(number: int, name: bytes, value: bytes) -> None:
        tiered.mutate(lambda tx: files.set_attribute(tx, number, name, value))

    assert pin_of()[0] is None
    attribute(bucket, hints.ATTRIBUTE_PRIORITY, b"cold")
    assert pin_of()[0] == Tier.COLD
    attribute(above, hints.ATTRIBUTE_PRIORITY, b"hot")
    assert pin_of() == (Tier.HOT, f"directory {above:#x}")
    attribute(above, hints.ATTRIBUTE_PIN_UNTIL, b"2020-01-01")
    assert pin_of()[0] == Tier.COLD, "what has expired says nothing"
    attribute(parent, hints.ATTRIBUTE_PRIORITY, b"auto")
    assert pin_of()[0] is None, "auto ends what is inherited"
    attribute(inode.number, b"user.s3.meta.stratum-priority", b"warm")
    assert pin_of() == (Tier.WARM, "object metadata")
    for name, value in (
        (hints.ATTRIBUTE_PRIORITY, b"lukewarm"),
        (hints.ATTRIBUTE_PIN_UNTIL, b"soon"),
        (b"user.s3.meta.stratum-priority", b"x"),
    ):
        with pytest.raises(InvalidArgument):
            attribute(inode.number, name, value)


def test_a_hint_on_a_directory_moves_what_is_below(tiered: Volume) -> None:
    inode = put(tiered, "a/b/c", DATA)
    other = put(tiered, "other", DATA)
    with tiered.snapshot() as reader:
        above = reader.inode(reader.inode(inode.number).parent).parent
    tiered.mutate(lambda tx: files.set_attribute(tx, above, hints.ATTRIBUTE_PRIORITY, b"warm"))
    worker = daemon.Tierd(tiered, gauge=gauge_of(tiered, [10.0]))
    for _ in range(3):
        worker.step()
    assert where(tiered, inode) == ["warm"]
    assert where(tiered, other) == ["hot"]


def test_a_move_that_fails_says_why_and_is_tried_again(tiered: Volume, tmp_path: Path) -> None:
    inode = put(tiered, "k", DATA)
    (tmp_path / "archive").rename(tmp_path / "unplugged")
    now = [time.time()]
    worker = daemon.Tierd(tiered, gauge=gauge_of(tiered, [10.0]), clock=lambda: now[0], monotonic=lambda: now[0])
    tiered.mutate(lambda tx: hints.ask(tx, inode.number, MoveRow(Tier.COLD, "test", 1)))
    tiered.cold.remote("archive")[1].retrying._pause = lambda _: None
    worker.step()
    document = explain(tiered, BUCKET, b"k")
    assert "plug in or mount its disk" in document["asked"]["error"]
    assert document["moves"][0]["event"] == "not moved"
    assert where(tiered, inode) == ["hot"]
    (tmp_path / "unplugged").rename(tmp_path / "archive")
    tiered.cold._remotes.clear()
    now[0] += 30
    worker.step()
    assert where(tiered, inode) == ["cold"]


def test_explain_says_where_why_and_what_next(tiered: Volume) -> None:
    inode = put(tiered, "döner/k", DATA)
    assert explain(tiered, BUCKET, "döner/k".encode())["location"] == "Local"
    worker = daemon.Tierd(tiered, gauge=gauge_of(tiered, [10.0]))
    worker.mover.move([inode.number], Tier.WARM, cause="why not")
    document = explain(tiered, BUCKET, "döner/k".encode())
    assert (document["bucket"], document["key"], document["tier"], document["location"]) == (
        BUCKET,
        "döner/k",
        "warm",
        "Local",
    )
    assert document["extents"][0]["shards"] == ["Local"] * 3
    next(iter(tiered.root.parent.glob("d1/packs/**/*.shard"))).unlink()
    assert sorted(explain(tiered, BUCKET, "döner/k".encode())["extents"][0]["shards"]) == ["Local", "Local", "Missing"]
    assert document["moves"][0]["cause"] == "why not"
    assert "3 reads within 24 h" in document["next"]
    for _ in range(30):
        worker.mover.move([inode.number], Tier.HOT, cause="x")
        worker.mover.move([inode.number], Tier.WARM, cause="x")
    with tiered.snapshot() as reader:
        assert len(reader.first_rows(key_u64(b"j", inode.number), key_u64(b"j", inode.number + 1), 100)) == 10
        state = objects.head(reader, get_bucket(reader, BUCKET), "döner/k".encode())
    assert state.size == len(DATA)


def test_plan_is_a_dry_run(tiered: Volume) -> None:
    put(tiered, "k", DATA)
    assert daemon.plan(tiered, "ok", 0) == []
    (row,) = daemon.plan(tiered, "ok", 49 * 3600)
    assert (row["from"], row["to"], row["action"], row["rule"]) == ("hot", "warm", "copy ahead", "idle-warm")
    (row,) = daemon.plan(tiered, "ok", 31 * 86400)
    assert row["to"] == "cold"


def test_in_an_emergency_new_data_goes_to_the_warm_tier(tiered: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what moves within the hot tier stays in it: an extent of the metadata store, a file that comes back."""
    monkeypatch.setattr(tiered.relief, "used_percent", lambda: 96.0)
    monkeypatch.setattr(tiered.relief, "pause", lambda _size: None)
    inode = put(tiered, "k", DATA)
    big = put(tiered, "big", DATA * 200)
    assert where(tiered, inode) == ["warm"]
    assert get(tiered, "big") == DATA * 200
    with tiered.snapshot() as reader:
        assert len(reader.slices(big.number)) == 3
    extent = tiered.new_id()

    def store(tx: Any) -> None:
        tx.add_stored_extent(extent, 5)
        tx.put(key_u64(b"E", extent), checksum(b"store") + b"store")
        tx.cut_slices(inode.number, 0, 5)
        tx.put_slice(inode.number, Slice(0, 5, extent, 0))

    tiered.mutate(store)
    assert stored_extents.move(tiered, [extent]) == 1
    assert get(tiered, "k") == b"store" + DATA[5:]
    worker = daemon.Tierd(tiered, gauge=gauge_of(tiered, [10.0]))
    worker.mover.move([big.number], Tier.HOT, cause="test")
    assert where(tiered, big) == ["hot", "warm"]
    with tiered.segments.writer(len(DATA)) as writer:  # nobody keeps it
        writer.write(DATA)
        writer.finish()
    for _ in range(2):
        run_once(tiered)
        leftovers.remove_condemned(worker.mover)
    assert fsck.check(tiered) == []
    with tiered.snapshot() as reader:
        shards = {path.name.split(".")[0] for path in tiered.root.parent.glob("d*/packs/**/*.shard")}
        assert shards == {f"{number:016x}" for number, _ in packs.scan(reader)}
