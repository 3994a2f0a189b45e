"""How many requests of a remote a reader makes, and when."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest

from stratum import content, packs, read_ahead, recall, segments
from stratum.blocks import BLOCK_BYTES
from stratum.cold import Remote
from stratum.cold_backends.contract import RemoteError
from stratum.cold_backends.decorator import Decorator
from stratum.cold_backends.retry import Retrying
from stratum.errors import TierUnavailable
from stratum.housekeeping import run_once
from stratum.tier_rows import Tier
from stratum.tiering import mover
from stratum.tiering.mover import Mover
from stratum.volume import Volume
from tests.support import get, put
from tests.tiers.conftest import make_tiered, where

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from stratum.cold_backends.contract import Backend, RemoteBody

MIB = 1 << 20


class Watched(Decorator):
    """`ranges` lists what was asked for; of a key in `failing` one request fails, of `None` every one of any."""

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.ranges: list[tuple[str, int, int]] = []
        self.failing: set[str | None] = set()

    def get(self, key: str, start: int = 0, stop: int | None = None) -> RemoteBody:
        assert stop is not None
        self.ranges.append((key, start, stop))
        if None in self.failing or key in self.failing:
            self.failing.discard(key)
            raise RemoteError("on purpose")
        return super().get(key, start, stop)


@pytest.fixture
def pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Volume]:
    """Extents of 1 MiB."""
    monkeypatch.setattr(segments, "EXTENT_BYTES_MAX", MIB)
    with Volume(make_tiered(tmp_path), "test") as opened:
        yield opened


def watched(opened: Volume) -> Watched:
    row, remote = opened.cold.remote("archive")
    made = Watched(remote.raw)
    opened.cold._remotes["archive"] = (row.encode(), Remote(made, made, Retrying(made), made))
    return made


def cold(opened: Volume, size: int) -> tuple[int, bytes, Watched]:
    data = os.urandom(size)
    number = put(opened, "k", data).number
    Mover(opened).move([number], Tier.COLD, cause="test", alone=True)
    run_once(opened)
    assert where(opened, number) == ["cold"]
    return number, data, watched(opened)


def plan(opened: Volume, number: int) -> content.ReadPlan:
    with opened.snapshot() as reader:
        return content.plan_read(reader, reader.inode(number))


def test_many_extents_of_one_pack_are_one_request(pieces: Volume) -> None:
    _, data, remote = cold(pieces, 20_500_000)
    assert get(pieces, "k") == data
    assert [(start, stop) for _, start, stop in remote.ranges] == [(0, len(data))]


def test_the_next_pack_is_asked_for_before_the_first_has_been_read(
    pieces: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mover, "PACK_BYTES", 8 * MIB)
    monkeypatch.setattr(read_ahead, "SOON_BYTES", 3 * MIB)
    number, data, remote = cold(pieces, 20 * MIB)
    with pieces.reading():
        reading = content.read_planned(pieces, plan(pieces, number), 0, len(data))
        found = b""
        while len(found) < 4 * MIB:
            found += next(reading)
        assert len(remote.ranges) == 1
        while len(found) < 6 * MIB:
            found += next(reading)
        deadline = time.monotonic() + 20
        while len(remote.ranges) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        found += b"".join(reading)
    assert found == data
    assert [(start, stop) for _, start, stop in remote.ranges] == [(0, 8 * MIB), (0, 8 * MIB), (0, 4 * MIB)]
    assert len({key for key, _, _ in remote.ranges}) == 3


def test_a_range_brings_no_more_than_it_needs(pieces: Volume) -> None:
    number, data, remote = cold(pieces, 20 * MIB)
    with pieces.reading():
        assert b"".join(content.read_planned(pieces, plan(pieces, number), 100, 200)) == data[100:200]
        at = 5 * MIB - 1000
        assert b"".join(content.read_planned(pieces, plan(pieces, number), at, at + 2000)) == data[at : at + 2000]
    assert [(start, stop) for _, start, stop in remote.ranges] == [(0, MIB), (5 * MIB - BLOCK_BYTES, 6 * MIB)]


def test_who_reads_on_bit_by_bit_has_no_gaps(pieces: Volume) -> None:
    """As the mount does: a read at a time, and what is asked for ahead grows."""
    number, data, remote = cold(pieces, 60 * MIB)
    follower = read_ahead.Follower(pieces)
    with pieces.reading():
        for at in range(0, len(data), MIB // 2):
            found = plan(pieces, number)
            follower.comes(at, at + MIB // 2)
            ahead = follower.ahead(found.inode, at, at + MIB // 2)
            assert (
                b"".join(content.read_planned(pieces, found, at, at + MIB // 2, ahead=ahead))
                == data[at : at + MIB // 2]
            )
    spans = sorted((start, stop) for _, start, stop in remote.ranges)
    assert len(spans) <= 8
    assert spans[0] == (0, 9 * MIB)
    assert [before[1] for before in spans[:-1]] == [after[0] for after in spans[1:]], "nothing twice, nothing left out"
    assert spans[-1][1] == len(data)


def test_who_jumps_about_brings_nothing_ahead(pieces: Volume) -> None:
    number, data, remote = cold(pieces, 40 * MIB)
    follower = read_ahead.Follower(pieces)
    with pieces.reading():
        for at in (30 * MIB, 5 * MIB, 17 * MIB, 12 * MIB):
            found = plan(pieces, number)
            follower.comes(at, at + 100)
            read = content.read_planned(pieces, found, at, at + 100, ahead=follower.ahead(found.inode, at, at + 100))
            assert b"".join(read) == data[at : at + 100]
    assert [stop - start for _, start, stop in remote.ranges] == [MIB] * 4


def test_what_is_nearer_is_not_asked_for(pieces: Volume) -> None:
    number, data, remote = cold(pieces, 12 * MIB)
    with pieces.snapshot() as reader:
        extents = [piece.extent for piece in reader.slices(number)]
    assert Mover(pieces).promote(extents[4:8]) == 4 * MIB
    assert [(start, stop) for _, start, stop in remote.ranges] == [(4 * MIB, 8 * MIB)], "a promotion is one request too"
    remote.ranges.clear()
    for path in (pieces.root / "recall").iterdir():
        path.unlink()
    assert get(pieces, "k") == data
    assert [(start, stop) for _, start, stop in remote.ranges] == [(0, 4 * MIB), (8 * MIB, 12 * MIB)]


def test_what_fails_ahead_is_asked_for_again_by_who_needs_it(pieces: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mover, "PACK_BYTES", 4 * MIB)
    number, data, remote = cold(pieces, 8 * MIB)
    with pieces.snapshot() as reader:
        last = packs.copies(reader, reader.slices(number)[-1].extent)[Tier.COLD].pack
        row = packs.get(reader, last)
    assert row is not None
    remote.failing = {row.key}
    with pieces.reading():
        found = b"".join(content.read_planned(pieces, plan(pieces, number), 0, len(data)))
    assert found == data
    assert [key for key, _, _ in remote.ranges].count(row.key) == 2
    (pieces.root / "recall").rename(pieces.root / "before")
    (pieces.root / "recall").mkdir()
    remote.failing = {None}
    with pytest.raises(TierUnavailable, match="on purpose"):
        get(pieces, "k")
    remote.failing = set()
    assert get(pieces, "k") == data


def test_what_comes_ahead_counts_for_the_limit_of_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "EXTENT_BYTES_MAX", MIB)
    monkeypatch.setattr(mover, "PACK_BYTES", 8 * MIB)
    monkeypatch.setattr(recall, "TRIM_EVERY_BYTES", 8 * MIB)
    with Volume(make_tiered(tmp_path, cold__cache_bytes_max=24 * MIB), "test") as opened:
        number, data, remote = cold(opened, 120 * MIB)
        with opened.reading():
            at = 0
            for piece in content.read_planned(opened, plan(opened, number), 0, len(data)):
                assert piece == data[at : at + len(piece)]
                at += len(piece)
        kept = sum(path.stat().st_blocks * 512 for path in (opened.root / "recall").iterdir())
        assert at == len(data)
        assert kept <= 64 * MIB
        assert len(remote.ranges) <= 20
