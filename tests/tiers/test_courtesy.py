"""Background work makes way for users, but not for long and not when a disk fills."""

from __future__ import annotations

import os
import threading
from array import array
from typing import TYPE_CHECKING

import pytest

from stratum import counting, courtesy, metrics
from stratum.courtesy import Courtesy
from stratum.errors import ConfigInvalid
from stratum.tier_rows import Tier
from stratum.tiering import daemon
from stratum.tiering.mover import Mover
from stratum.volume import Volume
from tests.support import get, put
from tests.tiers.conftest import at_boundary, gauge_of, make_tiered, where

if TYPE_CHECKING:
    from pathlib import Path


class Users:
    """Who ask for `rate` things a second, on a clock that only work and rests move."""

    def __init__(self, share: float = 0.25) -> None:
        self.now_s, self.rate, self.asked = 100.0, 0.0, 0.0
        self.is_filling = False
        self.rests: list[float] = []
        self.courtesy = Courtesy(
            share, lambda: self.asked, lambda: self.is_filling, clock=lambda: self.now_s, pause=self.rest
        )

    def pass_by(self, seconds: float) -> None:
        self.now_s += seconds
        self.asked += self.rate * seconds

    def rest(self, seconds: float) -> None:
        self.rests.append(seconds)
        self.pass_by(seconds)

    def work(self, pieces: int, seconds: float = 0.01) -> None:
        for _ in range(pieces):
            with self.courtesy.piece():
                self.pass_by(seconds)


def test_it_works_its_share_while_users_ask_and_all_the_time_when_they_stop() -> None:
    users = Users()
    users.work(100)
    assert not users.rests, "nobody asks"
    users.rate = 50.0
    users.work(200)
    users.rests.clear()
    began_s = users.now_s
    users.work(100)
    assert users.now_s - began_s == pytest.approx(4.0)
    assert users.rests == pytest.approx([0.03] * 100)
    users.rate = 0.0
    users.work(200)
    users.rests.clear()
    users.work(100)
    assert not users.rests


def test_a_monitor_is_no_user() -> None:
    users = Users()
    users.rate = 5.0
    users.work(1000)
    assert not users.rests


@pytest.mark.parametrize("why", ["filling", "urgent", "share"])
def test_nobody_rests_when_there_is_a_reason(why: str) -> None:
    users = Users(1.0 if why == "share" else 0.25)
    users.rate = 1000.0
    users.is_filling = why == "filling"
    users.courtesy.urgent = why == "urgent"
    users.work(300)
    assert not users.rests
    assert users.courtesy.window_bytes == courtesy.WINDOW_BYTES


def test_a_long_piece_asks_for_a_short_rest() -> None:
    users = Users(0.01)
    users.rate = 1000.0
    users.work(200)
    users.rests.clear()
    users.work(1, seconds=5.0)
    assert users.rests == [courtesy.REST_S_MAX]


def test_pieces_come_one_at_a_time() -> None:
    users = Users()
    users.rate = 1000.0
    users.work(200)
    inside, most = [0], [0]

    def work() -> None:
        for _ in range(50):
            with users.courtesy.piece():
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_what_a_polite_mover_writes_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when users come and go between two windows of a shard."""
    turns = iter(range(1 << 30))
    monkeypatch.setattr(Courtesy, "is_polite", property(lambda _: next(turns) % 3 == 0))
    monkeypatch.setattr(courtesy, "WINDOW_BYTES_POLITE", 70_000)
    with Volume(make_tiered(tmp_path), "test") as opened:
        mover = Mover(opened)
        rests: list[float] = []
        mover.courtesy._pause = rests.append
        for size in (1, 70_000, 3_000_001):
            data = os.urandom(size)
            inode = put(opened, "k", data)
            for tier in (Tier.WARM, Tier.COLD, Tier.HOT):
                mover.move([inode.number], tier, cause="test", alone=True)
                assert get(opened, "k") == data
        assert rests


def test_relief_does_not_rest(tmp_path: Path) -> None:
    with Volume(make_tiered(tmp_path), "test") as opened:
        inode = put(opened, "k", os.urandom(200_000))
        worker = daemon.Tierd(opened, gauge=gauge_of(opened, [90.0]))
        urgent = []
        with at_boundary(lambda name: urgent.append(worker.mover.courtesy.urgent) if name == "mover.copied" else None):
            worker.step()
        assert urgent == [True]
        assert where(opened, inode) == ["warm"]
        worker._guarded("asked", worker._answer_asked)
        assert not worker.mover.courtesy.urgent


def test_requests_of_all_processes_count(tmp_path: Path) -> None:
    now = [100.0]
    totals = counting.Totals(
        tmp_path / "metrics", {metrics.S3_REQUESTS: 1.0, metrics.S3_SENT: 0.5}, clock=lambda: now[0]
    )
    assert totals.value() == 0
    (tmp_path / "metrics").mkdir()
    size = counting._HEAD.size + counting._numbers.size * 8
    words = [0.0] * counting._numbers.size
    words[metrics.S3_REQUESTS.span.start] = 3.0
    words[metrics.S3_REQUESTS.span.stop - 1] = 4.0
    words[metrics.S3_SENT.span.start] = 10.0
    words[metrics.S3_SENT.span.stop] = 1e9
    body = counting._HEAD.pack(counting._MAGIC, counting._numbers.fingerprint(), 1.0, 0.0, 0.0)
    body += array("d", words).tobytes()
    assert len(body) == size
    seen = []
    for number in range(3):
        (tmp_path / "metrics" / f"s3-worker-{number}").write_bytes(body)
        now[0] += counting.FILES_LOOK_S
        seen.append(totals.value())
    (tmp_path / "metrics" / "other").write_bytes(body[:-8])
    now[0] += counting.FILES_LOOK_S
    assert totals.value() == seen[-1]
    assert seen == [12.0, 24.0, 36.0]


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5])
def test_a_share_is_part_of_the_time(tmp_path: Path, share: float) -> None:
    with pytest.raises(ConfigInvalid, match="busy_share"):
        Volume(make_tiered(tmp_path, tiering__busy_share=share), "test")
