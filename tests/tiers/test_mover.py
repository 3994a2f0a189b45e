"""The mover's failures: no byte lost, every read right at every instant, and everything settles afterwards."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from stratum import cold, content, evidence, fsck, hints, objects, packs, segments
from stratum.buckets import get as get_bucket
from stratum.cold import Remote
from stratum.cold_backends.contract import PART_BYTES, RemoteRefused
from stratum.cold_backends.decorator import Decorator
from stratum.cold_backends.faults import Faulty
from stratum.cold_backends.retry import Retrying
from stratum.errors import Busy, DataDamaged, NeedsRestore, NoSpace, StratumError, TierUnavailable, VolumeInvalid
from stratum.housekeeping import run_once
from stratum.schema import key_u64
from stratum.tier_rows import MoveRow, PackRow, Tier
from stratum.tiering import daemon, leftovers
from stratum.tiering.explain import arrived_bytes
from stratum.tiering.heal import Healer
from stratum.tiering.mover import Mover, exclusive
from stratum.volume import Volume
from tests.support import BUCKET, delete, get, put
from tests.tiers.conftest import at_boundary, gauge_of, make_tiered, where

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from stratum.schema import Inode

DATA = os.urandom(300_000)
OTHER = os.urandom(300_000)


def faulty(opened: Volume, plan: Callable[[str, str], str]) -> Faulty:
    """Put faults between the volume and its remote."""
    row, remote = opened.cold.remote("archive")
    made = Faulty(remote.raw, plan)
    retrying = Retrying(made, pause=lambda _: None)
    opened.cold._remotes["archive"] = (row.encode(), Remote(retrying, retrying, retrying, made))
    return made


def settled(opened: Volume, mover: Mover) -> None:
    """Nothing unfinished is left, here or there."""
    leftovers.recover(mover)
    for _ in range(3):
        run_once(opened)
        leftovers.remove_condemned(mover)
    with opened.snapshot() as reader:
        known = dict(packs.scan(reader))
    assert all(row.state == "valid" for row in known.values())
    assert fsck.check(opened) == []
    shards = {path.name.split(".")[0] for path in opened.root.parent.glob("d*/packs/**/*.shard")}
    assert shards == {f"{number:016x}" for number, row in known.items() if row.tier == Tier.WARM}
    objects_there = {
        path.name
        for path in (opened.root.parent / "archive" / "objects" / "v1").rglob("*")
        if path.is_file() and path.parent.name != "_index"
    }
    assert objects_there == {row.key.rpartition("/")[2] for row in known.values() if row.tier == Tier.COLD}
    assert list((opened.root.parent / "archive").glob("uploads/*")) == []


# -- 1: killed anywhere -----------------------------------------------------------------------------------------------------

_KILLED = """
import sys
from pathlib import Path
from stratum.volume import Volume
from stratum.tiering.mover import Mover
from stratum.tier_rows import Tier
with Volume(Path(sys.argv[1]), "test") as opened:
    Mover(opened).move([int(sys.argv[2])], Tier[sys.argv[3]], cause="test", alone=True)
"""
POINTS = {
    Tier.WARM: ["mover.planned", "mover.intended", "mover.copied", "mover.verified", "mover.published", "mover.freed"],
    Tier.COLD: [
        "mover.intended",
        "mover.upload_began",
        "mover.copied",
        "mover.verified",
        "mover.published",
        "mover.freed",
    ],
    Tier.HOT: ["promote.written", "promote.placed"],
}


def killed_at(point: str, root: Path, number: int, tier: Tier) -> None:
    """Another process moves the file and is killed at a boundary."""
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(root), str(number), tier.name],
        env={**os.environ, "STRATUM_FAULT": point}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == -9, done.stderr


@pytest.mark.parametrize(("tier", "point"), [(tier, point) for tier, points in POINTS.items() for point in points])
def test_01_killed_at_each_boundary(tmp_path: Path, tier: Tier, point: str) -> None:
    data = os.urandom(2 * PART_BYTES + 100_000) if point == "mover.upload_began" else DATA
    root = make_tiered(tmp_path)
    with Volume(root, "test") as opened:
        inode = put(opened, "k", data)
        if tier == Tier.HOT:
            Mover(opened).move([inode.number], Tier.WARM, cause="test")
    killed_at(point, root, inode.number, tier)
    with Volume(root, "test") as opened:
        run_once(opened)  # recovers the dead session
        assert get(opened, "k") == data
        mover = Mover(opened)
        settled(opened, mover)
        outcome = mover.move([inode.number], tier, cause="test", alone=True)
        assert outcome.failed == {}
        settled(opened, mover)
        assert where(opened, inode)[0] == tier.name.lower()
        assert get(opened, "k") == data


# -- 2 to 7: the remote fails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "operation", "fault"),
    [
        ("02", "put", "refuse"),
        ("04", "get", "truncate"),
        ("05", "put", "flip"),
        ("05", "get", "flip"),
        ("12", "head", "refuse"),
    ],
)
def test_02_to_05_a_remote_that_fails_costs_nothing(tiered: Volume, number: str, operation: str, fault: str) -> None:
    """Always: the move fails, the source stays, and once the remote is well it succeeds."""
    assert number
    inode = put(tiered, "k", DATA)
    mover = Mover(tiered)
    broken = [True]
    _distrust(tiered)
    faulty(tiered, lambda asked, key: fault if broken[0] and asked == operation and key.startswith("v1/") else "")
    with pytest.raises(TierUnavailable):
        mover.move([inode.number], Tier.COLD, cause="test", alone=True)
    assert where(tiered, inode) == ["hot"]
    assert get(tiered, "k") == DATA
    broken[0] = False
    assert mover.move([inode.number], Tier.COLD, cause="test", alone=True).moved_files == 1
    assert where(tiered, inode) == ["cold"]
    settled(tiered, mover)
    assert get(tiered, "k") == DATA


def _distrust(opened: Volume) -> None:
    """A remote that does not compare checksums: what is sent is read back."""

    def change(tx: Any) -> None:
        row = cold.get_row(tx, "archive")
        row.can["checksums"] = False
        tx.put(b"narchive", row.encode())

    opened.mutate(change)


def test_06_a_lost_answer_to_a_put_is_mended_by_the_retry(tiered: Volume) -> None:
    inode = put(tiered, "k", DATA)
    lost = [2]

    def plan(operation: str, key: str) -> str:
        if operation == "put" and key.startswith("v1/") and lost[0]:
            lost[0] -= 1
            return "lose"
        return ""

    mover = Mover(tiered)
    made = faulty(tiered, plan)
    assert mover.move([inode.number], Tier.COLD, cause="test", alone=True).moved_files == 1
    assert len({key for operation, key in made.calls if operation == "put"}) == 1
    settled(tiered, mover)
    assert get(tiered, "k") == DATA


def test_07_a_long_upload_goes_on_with_the_parts_that_are_there(tmp_path: Path) -> None:
    data = os.urandom(3 * PART_BYTES)
    root = make_tiered(tmp_path)
    with Volume(root, "test") as opened:
        inode = put(opened, "k", data)
    killed_at("mover.upload_began", root, inode.number, Tier.COLD)
    (folder,) = (tmp_path / "archive" / "uploads").iterdir()
    with Volume(root, "test") as opened:
        run_once(opened)
        with opened.snapshot() as reader:
            ((_, row),) = list(packs.scan(reader))
        opened.cold.remote("archive")[1].sealed.upload_part(row.key, folder.name, 1, data[:PART_BYTES])
        made = faulty(opened, lambda *_: "")
        mover = Mover(opened)
        assert leftovers.recover(mover) == 1
        assert sum(1 for operation, _ in made.calls if operation == "upload_part") == 3, "of four parts one was there"
        assert mover.move([inode.number], Tier.COLD, cause="test").copied_bytes == 0
        settled(opened, mover)
        assert where(opened, inode) == ["cold"]
        assert get(opened, "k") == data


def test_07_an_upload_that_expired_begins_again(tmp_path: Path) -> None:
    data = os.urandom(2 * PART_BYTES + 5)
    root = make_tiered(tmp_path)
    with Volume(root, "test") as opened:
        inode = put(opened, "k", data)
    killed_at("mover.upload_began", root, inode.number, Tier.COLD)
    shutil.rmtree(tmp_path / "archive" / "uploads")
    with Volume(root, "test") as opened:
        run_once(opened)
        mover = Mover(opened)
        leftovers.recover(mover)
        mover.move([inode.number], Tier.COLD, cause="test")
        settled(opened, mover)
        assert get(opened, "k") == data


# -- 8 to 10: users go on meanwhile -----------------------------------------------------------------------------------------

STEPS = ["mover.planned", "mover.intended", "mover.copied", "mover.verified", "mover.published"]


@pytest.mark.parametrize("tier", [Tier.WARM, Tier.COLD])
@pytest.mark.parametrize("point", STEPS)
@pytest.mark.parametrize("deed", ["overwrite", "delete", "recreate", "read"])
def test_08_09_10_what_users_do_at_each_step(tiered: Volume, tier: Tier, point: str, deed: str) -> None:
    inode = put(tiered, "k", DATA)
    mover = Mover(tiered)

    def act(name: str) -> None:
        if name != point:
            return
        if deed in {"delete", "recreate"}:
            delete(tiered, "k")
        if deed in {"overwrite", "recreate"}:
            put(tiered, "k", OTHER)
        run_once(tiered)
        if deed != "delete":
            assert get(tiered, "k") == (DATA if deed == "read" else OTHER)

    with at_boundary(act):
        mover.move([inode.number], tier, cause="test", alone=True)
    if deed == "delete":
        with tiered.snapshot() as reader:
            assert not reader.has_inode(inode.number)
    else:
        assert get(tiered, "k") == (DATA if deed == "read" else OTHER)
    settled(tiered, mover)


@pytest.mark.parametrize("tier", [Tier.WARM, Tier.COLD])
def test_10_a_reader_in_the_middle_reads_on(tiered: Volume, tier: Tier) -> None:
    """The place of the bytes changes under it, both ways, and the old bytes are given back at once."""
    data = os.urandom(5_000_000)
    inode = put(tiered, "k", data)
    mover = Mover(tiered)
    with tiered.reading():
        with tiered.snapshot() as reader:
            state = objects.head(reader, get_bucket(reader, BUCKET), b"k")
            plan = objects.plan(reader, state, 0, state.size)
        pieces = content.read_planned(tiered, plan, 0, state.size)
        found = bytes(next(pieces))
        mover.move([inode.number], tier, cause="test", alone=True)
        run_once(tiered)
        found += bytes(next(pieces))
        mover.move([inode.number], Tier.HOT, cause="test")
        run_once(tiered)
        found += b"".join(pieces)
    assert found == data
    settled(tiered, mover)


# -- 11: no space -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_11_no_space_while_promoting(tiered: Volume, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inode = put(tiered, "k", DATA)
    mover = Mover(tiered)
    mover.move([inode.number], Tier.WARM, cause="test")
    run_once(tiered)

    def full(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(NoSpace):
            mover.move([inode.number], Tier.HOT, cause="test")
    with monkeypatch.context() as patch:
        patch.setattr(tiered, "_may_grow", lambda: False)
        patch.setattr(tiered.committer, "_may_grow", lambda: False)
        with pytest.raises(NoSpace):
            mover.move([inode.number], Tier.HOT, cause="test")
    assert get(tiered, "k") == DATA
    settled(tiered, mover)
    mover.move([inode.number], Tier.HOT, cause="test")
    assert where(tiered, inode) == ["hot", "warm"]
    settled(tiered, mover)


# -- 12 to 15: things happen to the copies ----------------------------------------------------------------------------------


def test_12_revoked_credentials_condemn_nothing_and_hot_reads_go_on(tiered: Volume) -> None:
    first, second = put(tiered, "cold", DATA), put(tiered, "dual", OTHER)
    mover = Mover(tiered)
    mover.move([first.number], Tier.COLD, cause="test", alone=True)
    mover.copy([_extent(tiered, second)], Tier.COLD, alone=True)

    class Revoked(Decorator):
        def __getattribute__(self, name: str) -> Any:
            def refuse(*_: Any, **__: Any) -> Any:
                raise RemoteRefused(f"{name}: the remote answered 403 InvalidAccessKeyId")

            return refuse if name in {"get", "put", "head", "delete"} else super().__getattribute__(name)

    row, remote = tiered.cold.remote("archive")
    revoked = Revoked(remote.raw)
    retrying = Retrying(revoked, pause=lambda _: pytest.fail("a refusal was retried"))
    tiered.cold._remotes["archive"] = (row.encode(), Remote(retrying, retrying, retrying, revoked))
    with pytest.raises(TierUnavailable, match="403"):
        get(tiered, "cold")
    assert get(tiered, "dual") == OTHER
    assert where(tiered, first) == ["cold"]
    with pytest.raises(StratumError):
        mover.move([put(tiered, "more", DATA).number], Tier.COLD, cause="test", alone=True)
    del tiered.cold._remotes["archive"]
    assert get(tiered, "cold") == DATA
    settled(tiered, mover)


def _extent(opened: Volume, inode: Inode) -> int:
    with opened.snapshot() as reader:
        return reader.slices(inode.number)[0].extent


def test_13_a_remote_object_that_vanished_is_a_clear_error_and_other_copies_serve(
    tiered: Volume, tmp_path: Path
) -> None:
    lost, kept = put(tiered, "lost", DATA), put(tiered, "kept", OTHER)
    mover = Mover(tiered)
    mover.move([lost.number], Tier.COLD, cause="test", alone=True)
    mover.move([kept.number], Tier.COLD, cause="test", alone=True)
    mover.move([kept.number], Tier.HOT, cause="test")
    shutil.rmtree(tmp_path / "archive" / "objects" / "v1")
    with pytest.raises(DataDamaged, match="gone"):
        get(tiered, "lost")
    assert get(tiered, "kept") == OTHER
    Healer(tiered, mover)
    daemon_scrub(tiered, mover)
    with tiered.snapshot() as reader:
        state = packs.setting(reader, "scrub")
    assert (state["found"], state["healed"], len(state["unhealed"])) == (2, 1, 1)
    mover.move([kept.number], Tier.COLD, cause="test")
    assert get(tiered, "kept") == OTHER


def daemon_scrub(opened: Volume, mover: Mover) -> None:
    from stratum.tiering.heal import start_scrub

    healer = Healer(opened, mover)
    start_scrub(opened)
    for _ in range(1000):
        healer.scrub()
        with opened.snapshot() as reader:
            if packs.setting(reader, "scrub")["state"] == "done":
                return
    raise AssertionError("the pass does not end")


def test_13_an_archived_object_needs_a_restore(tiered: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    from stratum.cold_backends.contract import RemoteArchived
    from stratum.cold_backends.directory import DirectoryBackend

    inode = put(tiered, "k", DATA)
    Mover(tiered).move([inode.number], Tier.COLD, cause="test", alone=True)

    def archived(_self: Any, key: str, *_: Any) -> Any:
        raise RemoteArchived(f"{key}: in an archive")

    with monkeypatch.context() as patch:
        patch.setattr(DirectoryBackend, "get", archived)
        with pytest.raises(NeedsRestore):
            get(tiered, "k")
    assert get(tiered, "k") == DATA


def test_15_a_shard_lost_between_verify_and_free(tiered: Volume) -> None:
    inode = put(tiered, "k", DATA)
    mover = Mover(tiered)

    def lose(name: str) -> None:
        if name == "mover.verified":
            next(iter(tiered.root.parent.glob("d1/packs/**/*.shard"))).unlink()

    with at_boundary(lose):
        mover.move([inode.number], Tier.WARM, cause="test")
    run_once(tiered)
    with tiered.snapshot() as reader:
        tiered.warm.forget_descriptors(*next(packs.scan(reader)))
    assert get(tiered, "k") == DATA
    deadline = time.monotonic() + 5
    while not _queued(tiered) and time.monotonic() < deadline:
        time.sleep(0.01)
    Healer(tiered, mover).repair()
    settled(tiered, mover)


def _queued(opened: Volume) -> bool:
    with opened.snapshot() as reader:
        return bool(reader.first_rows(b"h", b"i", 1))


# -- 16 to 22 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jump_s", [72 * 3600.0, -72 * 3600.0])
def test_16_a_leaping_clock_moves_nothing(tmp_path: Path, jump_s: float) -> None:
    root = make_tiered(tmp_path, tiering__mode="strict", tiering__idle_s=48 * 3600.0)
    with Volume(root, "test") as opened:
        inode = put(opened, "k", DATA)
        wall = [time.time()]
        ticking = [0.0]
        worker = daemon.Tierd(
            opened, gauge=gauge_of(opened, [10.0]), clock=lambda: wall[0], monotonic=lambda: ticking[0]
        )
        worker.step()
        wall[0] += jump_s
        for _ in range(5):
            worker.step()
        assert where(opened, inode) == ["hot"]
        for _ in range(60):  # two real days
            wall[0] += 3600
            ticking[0] += 3600
            worker.step()
        assert get(opened, "k") == DATA


def test_how_much_of_a_file_has_arrived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "EXTENT_BYTES_MAX", 1 << 20)
    root = make_tiered(tmp_path)
    with Volume(root, "test") as opened:
        size = 3_500_000
        inode = put(opened, "k", os.urandom(size)).number

        def arrived(tier: Tier) -> tuple[int, int]:
            with opened.snapshot() as reader:
                return arrived_bytes(reader, inode, tier)

        assert (arrived(Tier.HOT), arrived(Tier.WARM)) == ((size, size), (0, size))
        with opened.snapshot() as reader:
            first = reader.slices(inode)[0]
        Mover(opened).copy([first.extent], Tier.WARM, alone=True)
        assert arrived(Tier.WARM) == (first.length, size)
        Mover(opened).move([inode], Tier.WARM, cause="test", alone=True)
        assert (arrived(Tier.HOT), arrived(Tier.WARM)) == ((0, size), (size, size))


def test_17_a_hundred_readers_make_one_fetch(tiered: Volume) -> None:
    data = os.urandom(6_000_000)
    inode = put(tiered, "k", data)
    Mover(tiered).move([inode.number], Tier.COLD, cause="test", alone=True)
    run_once(tiered)
    made = faulty(tiered, lambda *_: "")
    ready = threading.Barrier(100)

    def read() -> bool:
        ready.wait()
        return get(tiered, "k") == data

    with ThreadPoolExecutor(100) as pool:
        assert all(pool.map(lambda _: read(), range(100)))
    assert sum(1 for operation, _ in made.calls if operation == "get") == 1


def test_17_a_reader_that_goes_away_does_not_take_the_others_along(tiered: Volume) -> None:
    data = os.urandom(8_000_000)
    inode = put(tiered, "k", data)
    Mover(tiered).move([inode.number], Tier.COLD, cause="test", alone=True)
    run_once(tiered)
    broken = [True]

    def plan(operation: str, _key: str) -> str:
        if operation == "get" and broken[0]:
            broken[0] = False
            return "truncate"
        return ""

    faulty(tiered, plan)
    with ThreadPoolExecutor(8) as pool:
        assert all(found == data for found in pool.map(lambda _: get(tiered, "k"), range(8)))


def test_18_one_read_of_everything_promotes_nothing(tiered: Volume) -> None:
    numbers = [put(tiered, f"k{number}", DATA).number for number in range(20)]
    worker = daemon.Tierd(tiered, gauge=gauge_of(tiered, [10.0]))
    worker.mover.move(numbers, Tier.WARM, cause="test")
    for times in range(4):
        for number in numbers[: 20 if times < 2 else 1]:
            tiered.evidence.read(number, len(DATA))
        tiered.evidence.flush()
        worker.step()
    with tiered.snapshot() as reader:
        tiers = [evidence.get(reader, number) for number in numbers]
    assert [row.tier for row in tiers if row is not None] == [Tier.HOT] + [Tier.WARM] * 19


def test_20_two_movers_do_not_meet(tiered: Volume) -> None:
    with exclusive(tiered), pytest.raises(Busy), exclusive(tiered):
        pass
    with exclusive(tiered):
        pass


def test_21_sizes_and_names_at_the_edges(tiered: Volume) -> None:
    cases = {
        "empty": b"",
        "one": b"x",
        "käse/ü\x01": b"unicode" * 5000,
        "block": bytes(65536),
        "block+1": os.urandom(65537),
    }
    numbers = [put(tiered, key, data).number for key, data in cases.items()]
    sparse = put(tiered, "sparse", DATA)

    def stretch(tx: Any) -> None:
        content.set_size(tx, tx.inode(sparse.number), 5 << 40)

    tiered.mutate(stretch)
    mover = Mover(tiered)
    for tier in (Tier.WARM, Tier.COLD, Tier.HOT, Tier.COLD):
        outcome = mover.move([*numbers, sparse.number], tier, cause="test", alone=True)
        assert outcome.failed == {}, tier
        for key, data in cases.items():
            assert get(tiered, key) == data
        with tiered.snapshot() as reader:
            state = objects.head(reader, get_bucket(reader, BUCKET), b"sparse")
            plan = objects.plan(reader, state, 0, 400_000)
        assert b"".join(content.read_planned(tiered, plan, 0, 400_000)) == DATA.ljust(400_000, b"\0")
    settled(tiered, mover)


def test_22_an_unknown_state_refuses(tiered: Volume) -> None:
    row = PackRow(Tier.WARM, "valid", 0, 0, "", 0)
    raw = row.encode().replace(b"valid", b"novel")
    tiered.mutate(lambda tx: tx.put(key_u64(b"p", 99), raw))
    with tiered.snapshot() as reader, pytest.raises(VolumeInvalid, match="newer"):
        packs.get(reader, 99)
    tiered.mutate(lambda tx: tx.delete(key_u64(b"p", 99)))


# -- shared extents ---------------------------------------------------------------------------------------------------------


def copy_of(opened: Volume, key: str) -> Inode:
    request = objects.CopyRequest(BUCKET, b"k", BUCKET, key.encode(), None, "", "")
    return opened.mutate(lambda tx: objects.copy(tx, request))


def test_an_extent_is_as_hot_as_its_hottest_owner(tiered: Volume) -> None:
    """A pinned copy holds the bytes where they are; unpinned, they go."""
    inode = put(tiered, "k", DATA)
    other = copy_of(tiered, "copy")

    def pin(tx: Any, value: str) -> None:
        found = tx.inode(other.number)
        metadata = objects.metadata_of(tx, found)
        from dataclasses import replace

        objects.set_metadata(tx, found, replace(metadata, user={hints.PRIORITY: value}))

    tiered.mutate(lambda tx: pin(tx, "hot"))
    worker = daemon.Tierd(tiered, gauge=gauge_of(tiered, [10.0]))
    tiered.mutate(lambda tx: hints.ask(tx, inode.number, MoveRow(Tier.WARM, "test", 1)))
    worker.step()
    assert where(tiered, inode) == ["hot", "warm"]
    tiered.mutate(lambda tx: pin(tx, "auto"))
    tiered.mutate(lambda tx: hints.ask(tx, inode.number, MoveRow(Tier.WARM, "test", 2)))
    worker.step()
    assert where(tiered, other) == ["warm"]
    assert get(tiered, "copy") == DATA
    delete(tiered, "k")
    run_once(tiered)
    assert get(tiered, "copy") == DATA
    delete(tiered, "copy")
    settled(tiered, worker.mover)


def test_packs_that_are_mostly_waste_are_written_anew(tiered: Volume) -> None:
    numbers = [put(tiered, f"k{number}", DATA).number for number in range(8)]
    mover = Mover(tiered)
    mover.move(numbers, Tier.COLD, cause="test")
    mover.move(numbers, Tier.WARM, cause="test")
    for number in range(1, 8):
        delete(tiered, f"k{number}")
    run_once(tiered)
    assert leftovers.compact(mover) > 0
    settled(tiered, mover)
    with tiered.snapshot() as reader:
        assert all(row.live_bytes == row.length for _, row in packs.scan(reader))
    assert get(tiered, "k0") == DATA


def test_a_volume_from_before_the_tiers_gets_what_it_lacks(tmp_path: Path) -> None:
    """Its name when it is opened; owners and evidence of its files by `fsck --repair`."""
    root = make_tiered(tmp_path, remote=False)
    with Volume(root, "test") as opened:
        inode = put(opened, "k", DATA)

        def forget(tx: Any) -> None:
            tx.delete(b"ginstance")
            for table in (b"a", b"b", b"o"):
                for key, _ in list(tx.scan(table, bytes((table[0] + 1,)))):
                    tx.delete(key)

        opened.mutate(forget)
    with Volume(root, "test") as opened:
        assert len(opened.instance) == 32
        assert {finding.kind for finding in fsck.check(opened)} == {"no-evidence", "unowned-extent"}
        fsck.check(opened, repair=True)
        assert fsck.check(opened) == []
        with opened.snapshot() as reader:
            assert evidence.get(reader, inode.number) is not None
    with Volume(root, "test") as opened:
        assert len(opened.instance) == 32


def test_a_copy_of_what_is_being_freed_is_left_to_the_one_who_frees_it(tiered: Volume) -> None:
    """Giving up its copy would change its generation, and nobody would free it any more."""
    inode = put(tiered, "k", DATA)
    mover = Mover(tiered)
    mover.copy([_extent(tiered, inode)], Tier.COLD, alone=True)
    extent = _extent(tiered, inode)
    with tiered.reading():
        delete(tiered, "k")
        assert not tiered.mutate(lambda tx: packs.release(tx, extent, Tier.COLD, tx.extent(extent)[0].generation, 0.0))
    settled(tiered, mover)
