"""A wall clock that is set forth or back: what goes by age waits a while, and what waits by the clock does not wait for days."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from stratum import backup, buckets, lifecycle, packs
from stratum.clocks import LeapWatch, by_stamp, come
from stratum.errors import NoSuchKey, TierUnavailable
from stratum.housekeeping import run_once
from stratum.lifecycle import Rule, When
from stratum.schema import key_u64, pack_json
from stratum.tier_rows import MoveRow, Tier
from stratum.tiering import daemon
from stratum.tiering.heal import Healer
from stratum.volume import Volume
from tests.support import BUCKET, get, put
from tests.tiers.conftest import gauge_of, make_tiered

if TYPE_CHECKING:
    from pathlib import Path

DAYS_S = 3 * 86400.0
DATA = b"something" * 10_000


class Clocks:
    def __init__(self, opened: Volume) -> None:
        self.wall_s, self.ticking_s = time.time(), 1000.0
        self.tierd = daemon.Tierd(
            opened, gauge=gauge_of(opened, [10.0]), clock=lambda: self.wall_s, monotonic=lambda: self.ticking_s
        )

    def passes(self, seconds: float) -> None:
        self.wall_s += seconds
        self.ticking_s += seconds
        self.tierd.step()
        self.tierd._snapshots.settle()


def test_a_moment_that_a_clock_put_out_of_reach_has_come() -> None:
    assert not come(100.0, 99.0, 10.0)
    assert not come(100.0, 90.0, 10.0)
    assert come(100.0, 100.0, 10.0)
    assert come(100.0, 89.0, 10.0), "nobody waits for more than ten seconds"


def test_what_was_made_by_a_clock_that_was_ahead_is_the_oldest() -> None:
    now_s = 1_795_641_200.0  # 2026-11-25 21:13
    names = [
        "stratum-12345678abcd-20261125-211000.x",
        "stratum-ab1212345678-20291231-235959.x",
        "stratum-123456789012-20261124-000000.x",
        "stratum-12345678abcd-20291130-000000.x",
        "stratum-12345678abcd-20261125-215959.x",
    ]
    assert by_stamp(names, now_s) == [names[3], names[1], names[2], names[0], names[4]]


def test_a_backup_that_was_just_made_is_kept(tmp_path: Path) -> None:
    """Also beside one from a night in which the clock was ahead."""
    with Volume(make_tiered(tmp_path), "test") as opened:
        (tmp_path / "backups").mkdir()
        first = backup.make(opened, tmp_path / "backups")
        first.path.rename(first.path.with_name(f"stratum-{opened.instance[:12]}-29991231-235959{backup.SUFFIX}"))
        made = backup.make(opened, tmp_path / "backups", keep=1)
        assert list((tmp_path / "backups").iterdir()) == [made.path]


def test_half_of_a_leap_is_believed_each_time() -> None:
    watch = LeapWatch(0.0, 0.0, 100.0)
    assert watch.leapt_s(1099.0, 1000.0) == 0.0
    assert [watch.leapt_s(2099.0, 1000.0) for _ in range(5)] == [1000.0, 500.0, 250.0, 125.0, 0.0]
    assert watch.leapt_s(0.0, 1000.0) < -1000


def expire_after_a_day(opened: Volume) -> None:
    rule = Rule("old", True, expiration=When(days=1))
    opened.mutate(lambda tx: lifecycle.put(tx, buckets.get(tx, BUCKET).inode, [rule]))


def expire_at_once(opened: Volume) -> None:
    rule = Rule("past", True, expiration=When(date_s=86400))
    opened.mutate(lambda tx: lifecycle.put(tx, buckets.get(tx, BUCKET).inode, [rule]))


def test_nothing_expires_because_a_clock_leapt(tmp_path: Path) -> None:
    with Volume(make_tiered(tmp_path), "test") as opened:
        put(opened, "k", DATA)
        expire_after_a_day(opened)
        clocks = Clocks(opened)
        clocks.passes(1)
        clocks.wall_s += DAYS_S
        for _ in range(10):
            clocks.passes(60)
        assert get(opened, "k") == DATA
        clocks.wall_s -= DAYS_S  # somebody set it right
        for _ in range(200):
            clocks.passes(60)
        assert get(opened, "k") == DATA
        for _ in range(48):
            clocks.passes(3600)
        with pytest.raises(NoSuchKey):
            get(opened, "k")


def test_nor_while_another_step_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Volume(make_tiered(tmp_path), "test") as opened:
        put(opened, "k", DATA)
        expire_after_a_day(opened)
        clocks = Clocks(opened)

        def fail() -> bool:
            raise TierUnavailable("nothing can be copied ahead")

        monkeypatch.setattr(clocks.tierd, "_background", fail)
        clocks.passes(1)
        clocks.wall_s += DAYS_S
        for _ in range(10):
            clocks.passes(1)
        assert get(opened, "k") == DATA


def test_nor_because_it_leapt_while_an_earlier_step_worked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step before the one that expires may move data for minutes."""
    with Volume(make_tiered(tmp_path), "test") as opened:
        put(opened, "k", DATA)
        expire_after_a_day(opened)
        clocks = Clocks(opened)

        def leap() -> bool:
            clocks.wall_s += DAYS_S
            return False

        monkeypatch.setattr(clocks.tierd, "_background", leap)
        clocks.passes(1)
        assert get(opened, "k") == DATA


def test_a_leap_holds_back_nothing_that_waits_for_no_time(tmp_path: Path) -> None:
    """A disk that is written all day would fill with what nobody needs. In a remote it is kept for its time."""
    with Volume(make_tiered(tmp_path, cold__delete_after_s=3 * 3600.0), "test") as opened:
        clocks = Clocks(opened)
        clocks.passes(1)
        for tier in (Tier.WARM, Tier.COLD):
            inode = put(opened, "k", DATA)
            clocks.tierd.mover.move([inode.number], tier, cause="test", alone=True)
        clocks.wall_s += DAYS_S
        put(opened, "k", b"something else")
        run_once(opened)
        clocks.passes(1)
        assert not list(tmp_path.glob("d*/packs/**/*.shard"))
        with opened.snapshot() as reader:
            assert [row.tier for _, row in packs.scan(reader)] == [Tier.COLD]
        clocks.wall_s -= DAYS_S
        for _ in range(400):
            clocks.passes(60)
        with opened.snapshot() as reader:
            assert not list(packs.scan(reader))


def test_a_leap_that_stays_is_believed(tmp_path: Path) -> None:
    with Volume(make_tiered(tmp_path), "test") as opened:
        put(opened, "k", DATA)
        expire_after_a_day(opened)
        clocks = Clocks(opened)
        clocks.wall_s += DAYS_S
        for _ in range(200):
            clocks.passes(60)
        with pytest.raises(NoSuchKey):
            get(opened, "k")


def test_a_clock_that_is_set_back_puts_nothing_off(tmp_path: Path) -> None:
    """Retries, the daily snapshot, what `tier status` shows, and lifecycle: by minutes, not by three days."""
    with Volume(make_tiered(tmp_path), "test") as opened:
        put(opened, "k", DATA)
        inode = put(opened, "asked", DATA)
        clocks = Clocks(opened)
        clocks.passes(1)
        later_s = clocks.wall_s + 60
        opened.mutate(
            lambda tx: tx.put(key_u64(b"m", inode.number), MoveRow(1, "tier move", 0, not_before_s=later_s).encode())
        )
        opened.mutate(
            lambda tx: tx.put(key_u64(b"h", 7), pack_json({"why": "test", "not_before_s": clocks.wall_s + 20}))
        )
        assert not Healer(opened, clocks.tierd.mover, clock=lambda: clocks.wall_s)._due()
        taken = published(opened, "index_snapshots")["archive"]
        assert abs(taken - clocks.wall_s) < 5
        clocks.wall_s -= DAYS_S
        assert Healer(opened, clocks.tierd.mover, clock=lambda: clocks.wall_s)._due()
        for _ in range(70):
            clocks.passes(60)
        assert abs(published(opened, "tierd")["at_s"] - clocks.wall_s) < 100
        assert published(opened, "index_snapshots")["archive"] <= clocks.wall_s
        with opened.snapshot() as reader:
            assert reader.get(key_u64(b"m", inode.number)) is None, "the move somebody asked for"
        expire_at_once(opened)
        clocks.wall_s -= DAYS_S
        for _ in range(80):
            clocks.passes(60)
        with pytest.raises(NoSuchKey):
            get(opened, "k")


def published(opened: Volume, name: str) -> dict[str, float]:
    with opened.snapshot() as reader:
        found: dict[str, float] = packs.setting(reader, name)
    return found
