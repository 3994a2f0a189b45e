"""Long work of the tiering daemon makes room for what is more pressing, and goes on afterwards."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from stratum import buckets, files, hints, lifecycle, packs, tree
from stratum.errors import NoSuchKey
from stratum.lifecycle import Rule, When
from stratum.tier_rows import MoveRow, Tier
from stratum.tiering import asked as asked_module
from stratum.tiering import daemon, mover
from stratum.tiering import lifecycle as runner
from stratum.tiering.heal import start_scrub
from stratum.volume import Volume
from tests.support import BUCKET, get, put
from tests.tiers.conftest import at_boundary, gauge_of, make_tiered, where

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import pytest

    from stratum.schema import Inode
    from stratum.transaction import InodeReader, MetadataTransaction

DATA = os.urandom(200_000)
FILES = 6


def ask(opened: Volume, inode: Inode, tier: Tier) -> None:
    opened.mutate(lambda tx: hints.ask(tx, inode.number, MoveRow(int(tier), "test", tx.now_ns)))


def asked(opened: Volume) -> int:
    with opened.snapshot() as reader:
        return len(reader.first_rows(b"m", b"n", 100))


@contextmanager
def each_file_a_pack(opened: Volume, monkeypatch: pytest.MonkeyPatch, after_first: object) -> Iterator[list[str]]:
    """The boundaries that are passed; `after_first` is called when the first pack has been published."""
    monkeypatch.setattr(mover, "PACK_BYTES", len(DATA))
    passed: list[str] = []

    def look(name: str) -> None:
        passed.append(name)
        if passed.count("mover.published") == 1 and name == "mover.published":
            assert callable(after_first)
            after_first()

    with at_boundary(look):
        yield passed


def test_a_disk_that_fills_does_not_wait_for_a_long_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Volume(make_tiered(tmp_path, tiering__idle_s=0.0), "test") as opened:
        inodes = [put(opened, f"k{number}", DATA) for number in range(FILES)]
        percents = [50.0]
        worker = daemon.Tierd(opened, gauge=gauge_of(opened, percents))
        with each_file_a_pack(opened, monkeypatch, lambda: percents.append(90.0)) as passed:
            assert worker.step(), "there is more to do at once"
            assert passed.count("mover.published") == 1
            worker.step()
            assert "mover.freed" in passed
            percents.append(10.0)
            while worker.step():
                pass
        assert all("warm" in where(opened, inode) for inode in inodes)
        assert all(get(opened, f"k{number}") == DATA for number in range(FILES))


def test_nor_for_moves_that_were_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Volume(make_tiered(tmp_path), "test") as opened:
        inodes = [put(opened, f"k{number}", DATA) for number in range(FILES)]
        for inode in inodes:
            ask(opened, inode, Tier.COLD)
        percents = [50.0]
        worker = daemon.Tierd(opened, gauge=gauge_of(opened, percents))
        with each_file_a_pack(opened, monkeypatch, lambda: percents.append(90.0)) as passed:
            assert worker.step()
            assert passed.count("mover.published") == 1
            assert asked(opened) == FILES
            percents.append(10.0)
            while worker.step():
                pass
        assert not asked(opened)
        assert [where(opened, inode) for inode in inodes] == [["cold"]] * FILES
        assert passed.count("mover.published") == FILES, "nothing was sent twice"


def test_nor_for_files_that_come_back(tmp_path: Path) -> None:
    """What is brought to a full disk would fill it further."""
    with Volume(make_tiered(tmp_path), "test") as opened:
        inodes = [put(opened, f"k{number}", DATA) for number in range(FILES)]
        percents = [50.0]
        worker = daemon.Tierd(opened, gauge=gauge_of(opened, percents))
        worker.mover.move([inode.number for inode in inodes], Tier.WARM, cause="test")
        for inode in inodes:
            ask(opened, inode, Tier.HOT)
        with at_boundary(lambda name: percents.append(90.0) if name == "promote.placed" else None):
            worker.step()
        assert sum("hot" in where(opened, inode) for inode in inodes) == 1


def test_who_waits_for_a_move_does_not_wait_for_copies_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Volume(make_tiered(tmp_path, tiering__idle_s=0.0), "test") as opened:
        inodes = [put(opened, f"k{number}", DATA) for number in range(FILES)]
        worker = daemon.Tierd(opened, gauge=gauge_of(opened, [10.0]))
        with each_file_a_pack(opened, monkeypatch, lambda: ask(opened, inodes[-1], Tier.WARM)) as passed:
            assert worker.step()
            assert passed.count("mover.published") == 1
            worker._guarded("asked", worker._answer_asked)
            assert where(opened, inodes[-1]) == ["warm"]


def test_a_step_ends_with_the_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Volume(make_tiered(tmp_path, tiering__idle_s=0.0), "test") as opened:
        for number in range(FILES):
            put(opened, f"k{number}", DATA)
        worker = daemon.Tierd(opened, gauge=gauge_of(opened, [10.0]))
        with each_file_a_pack(opened, monkeypatch, worker.stop) as passed:
            assert not worker.step()
            assert passed.count("mover.published") == 1


def test_a_step_that_makes_room_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Volume(make_tiered(tmp_path, tiering__idle_s=0.0), "test") as opened:
        for number in range(FILES):
            put(opened, f"k{number}", DATA)
        percents = [50.0]
        worker = daemon.Tierd(opened, gauge=gauge_of(opened, percents))
        with each_file_a_pack(opened, monkeypatch, lambda: percents.append(90.0)):
            worker.step()
            worker.step()
        with opened.snapshot() as reader:
            assert packs.setting(reader, "tierd")["troubles"] == {}


def test_a_long_step_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [time.time()]
    with Volume(make_tiered(tmp_path, tiering__idle_s=0.0), "test") as opened:
        for number in range(FILES):
            put(opened, f"k{number}", DATA)
        worker = daemon.Tierd(opened, gauge=gauge_of(opened, [10.0]), monotonic=lambda: now[0])
        silent = []

        def look(name: str) -> None:
            if name == "mover.published":
                silent.append(worker.silent_s())
                now[0] += 100

        monkeypatch.setattr(mover, "PACK_BYTES", len(DATA))
        with at_boundary(look):
            worker.step()
        assert len(silent) == FILES
        assert max(silent) < 100


def test_a_walk_of_rules_makes_room_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "PAGE", 1)
    with Volume(make_tiered(tmp_path), "test") as opened:
        for number in range(FILES):
            put(opened, f"k{number}", DATA)
        rule = Rule("past", True, expiration=When(date_s=86400))
        opened.mutate(lambda tx: lifecycle.put(tx, buckets.get(tx, BUCKET).inode, [rule]))
        percents = [10.0]
        worker = daemon.Tierd(opened, gauge=gauge_of(opened, percents))
        expire = worker._lifecycle._expire

        def fill(tx: MetadataTransaction, **what: object) -> None:
            percents.append(90.0)
            expire(tx, **what)  # type: ignore[arg-type]

        monkeypatch.setattr(worker._lifecycle, "_expire", fill)
        assert worker.step()
        left = [number for number in range(FILES) if _is_there(opened, f"k{number}")]
        assert len(left) == FILES - 1
        monkeypatch.setattr(worker._lifecycle, "_expire", expire)
        percents.append(10.0)
        while worker.step():
            pass
        assert not any(map(partial(_is_there, opened), [f"k{number}" for number in range(FILES)]))


def test_a_rule_that_was_taken_away_meanwhile_does_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A walk may have made room for hours."""
    monkeypatch.setattr(runner, "PAGE", 1)
    with Volume(make_tiered(tmp_path), "test") as opened:
        for number in range(FILES):
            put(opened, f"k{number}", DATA)
        rule = Rule("past", True, expiration=When(date_s=86400))
        with opened.snapshot() as reader:
            bucket = buckets.get(reader, BUCKET).inode
        opened.mutate(lambda tx: lifecycle.put(tx, bucket, [rule]))
        pressing = [True]
        rules = runner.LifecycleRunner(opened, pressing=lambda: pressing[0])
        assert rules.run()
        assert rules.run()
        left = [number for number in range(FILES) if _is_there(opened, f"k{number}")]
        assert len(left) == FILES - 2
        opened.mutate(lambda tx: lifecycle.put(tx, bucket, []))
        pressing[0] = False
        assert not rules.run()
        assert [number for number in range(FILES) if _is_there(opened, f"k{number}")] == left


def test_a_scrub_makes_room_and_goes_on(tmp_path: Path) -> None:
    with Volume(make_tiered(tmp_path), "test") as opened:
        for number in range(FILES):
            put(opened, f"k{number}", DATA)
        percents = [10.0]
        worker = daemon.Tierd(opened, gauge=gauge_of(opened, percents))
        start_scrub(opened)
        percents.append(90.0)
        worker._gauge.look()
        worker._healer.scrub()
        assert _scrub(opened)["checked"] == 1
        percents.append(10.0)
        until = time.monotonic() + 60
        while _scrub(opened)["state"] == "running" and time.monotonic() < until:
            worker._healer.scrub()
        assert _scrub(opened)["checked"] == FILES


def test_a_hint_reaches_all_of_a_large_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asked_module, "AT_ONCE", 3)
    with Volume(make_tiered(tmp_path), "test") as opened:
        for number in range(10):
            for folder in ("d", "d/e", "d/e/f"):
                put(opened, f"{folder}/k{number}", DATA)
        opened.mutate(lambda tx: files.set_attribute(tx, _directory(tx), hints.ATTRIBUTE_PRIORITY, b"warm"))
        worker = daemon.Tierd(opened, gauge=gauge_of(opened, [10.0]))
        assert asked(opened) == 1
        with opened.snapshot() as reader:
            directory = _directory(reader)
        worker._asked._ask_below(directory)
        assert asked(opened) == 30


def _scrub(opened: Volume) -> dict[str, object]:
    with opened.snapshot() as reader:
        return packs.setting(reader, "scrub")


def _directory(reader: InodeReader) -> int:
    dentry = tree.get_dentry(reader, buckets.get(reader, BUCKET).inode, b"d/")
    assert dentry is not None
    return dentry.inode


def _is_there(opened: Volume, key: str) -> bool:
    try:
        get(opened, key)
    except NoSuchKey:
        return False
    return True
