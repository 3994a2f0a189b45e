"""Shards: coding, the file format, and every way to lose some."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stratum import erasure, fsck, housekeeping, packs, warm_disks
from stratum.blocks import block_checksums
from stratum.erasure import ShardHead, ShardInvalid
from stratum.errors import DataDamaged, InvalidArgument, TierUnavailable
from stratum.housekeeping import run_once
from stratum.segments import SegmentStore
from stratum.tier_rows import VALID, Tier
from stratum.tiering import leaving, leftovers
from stratum.tiering.heal import Healer
from stratum.tiering.mover import Mover
from stratum.volume import Volume
from tests.support import get, put, stratum
from tests.tiers.conftest import make_tiered

if TYPE_CHECKING:
    from pathlib import Path

    from stratum.tier_rows import PackRow

DATA = os.urandom(700_001)
DAMAGES = ("lost", "truncated", "flipped", "swapped", "head")


@given(st.binary(min_size=1, max_size=60_000), st.integers(1, 6), st.integers(1, 3), st.randoms())
@settings(max_examples=60, deadline=None)
def test_any_k_shards_give_everything_back(data: bytes, k: int, m: int, chance: random.Random) -> None:
    columns = erasure.split(data, k)
    shards = [bytes(column) for column in columns] + erasure.parity(columns, m)
    assert b"".join(shards[:k])[: len(data)] == data
    kept = dict(chance.sample(list(enumerate(shards)), k))
    made = erasure.reconstruct(dict(kept), k, m, range(k + m))
    assert made == shards


@given(st.binary(max_size=200_000), st.lists(st.tuples(*[st.integers(0, 2**64 - 1)] * 3), max_size=300))
@settings(max_examples=30, deadline=None)
def test_a_head_says_what_was_written(data: bytes, members: list[tuple[int, int, int]]) -> None:
    head = ShardHead(4, 2, 5, 77, 123, len(data), block_checksums(data), tuple(members))
    raw = head.encode()
    assert len(raw) == head.data_offset
    assert erasure.parse_head(raw) == head
    for at in {0, 9, 20, 50, len(raw) // 2} - set(range(erasure.table_bytes(raw), len(raw))):
        wrong = bytearray(raw)
        wrong[at] ^= 4
        with pytest.raises(ShardInvalid):
            erasure.parse_head(bytes(wrong))
    with pytest.raises(ShardInvalid):
        erasure.parse_head(raw[:40])


@pytest.mark.parametrize("text", ["", "4", "4+", "+2", "0+2", "4+0", "60+9", "a+b", "4+2+1", "-4+2"])
def test_codes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="K\\+M"):
        erasure.parse_code(text)


def shard_files(opened: Volume) -> list[Path]:
    """The shard files of the only pack, by index."""
    with opened.snapshot() as reader:
        found = [(number, row) for number, row in packs.scan(reader) if row.tier == Tier.WARM and row.state == VALID]
    number, row = found[0]
    assert len(found) == 1
    return [opened.warm.shard_path(disk, number, index) for index, disk in enumerate(row.disks)]


def damage(kind: str, files: list[Path], index: int) -> None:
    path = files[index]
    if kind == "lost":
        path.unlink()
    elif kind == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif kind == "swapped":
        shutil.copyfile(files[index - 1], path)
    else:
        raw = bytearray(path.read_bytes())
        raw[30 if kind == "head" else len(raw) - 5000] ^= 1
        path.write_bytes(raw)


@pytest.mark.parametrize(("code", "disks"), [("2+1", 3), ("4+2", 6)])
def test_every_loss_up_to_m_reads_right_and_heals(tmp_path: Path, code: str, disks: int) -> None:
    """Each combination of up to m shards, each lost, truncated, flipped, swapped or with a broken head."""
    k, m = erasure.parse_code(code)
    chance = random.Random(7)
    with Volume(make_tiered(tmp_path, code=code, disks=disks), "test") as opened:
        inode = put(opened, "k", DATA)
        mover = Mover(opened)
        assert mover.move([inode.number], Tier.WARM, cause="test").moved_files == 1
        run_once(opened)
        files = shard_files(opened)
        whole = [path.read_bytes() for path in files]
        healer = Healer(opened, mover)
        for count in range(1, m + 1):
            for lost in itertools.combinations(range(k + m), count):
                for kind in DAMAGES if count == 1 else (chance.choice(DAMAGES),):
                    for index in lost:
                        damage(kind, files, index)
                    with opened.snapshot() as reader:
                        number, row = next(packs.scan(reader))
                    opened.warm.forget_descriptors(number, row)
                    assert get(opened, "k") == DATA, (lost, kind)
                    opened.mutate(partial(packs.want_repair, number=number, why="test"))
                    healer.repair()
                    assert [path.read_bytes() for path in files] == whole, (lost, kind)
                    with opened.snapshot() as reader:
                        assert reader.first_rows(b"h", b"i", 1) == []
        assert fsck.check(opened) == []


def test_more_than_m_lost_is_an_error_that_names_extent_and_paths(tiered: Volume) -> None:
    inode = put(tiered, "k", DATA)
    Mover(tiered).move([inode.number], Tier.WARM, cause="test")
    files = shard_files(tiered)
    for index in (0, 2):
        files[index].unlink()
    with tiered.snapshot() as reader:
        extent = reader.slices(inode.number)[0].extent
        tiered.warm.forget_descriptors(*next(packs.scan(reader)))
    with pytest.raises(DataDamaged) as caught:
        get(tiered, "k")
    for word in (f"{extent:016x}", str(files[0]), str(files[2])):
        assert word in caught.value.message
    assert {finding.kind for finding in fsck.check(tiered)} == {"lost-pack"}


def test_what_moves_meanwhile_is_not_lost(tiered: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fsck beside a served volume: a pack that is written anew, and hot bytes that leave, between its snapshot and its look."""
    warm_one, hot_one = put(tiered, "warm", DATA), put(tiered, "hot", DATA)
    mover = Mover(tiered)
    mover.move([warm_one.number], Tier.WARM, cause="test")
    with tiered.snapshot() as reader:
        extents = [piece.extent for piece in reader.slices(warm_one.number)]
    examine, read = tiered.warm.examine, SegmentStore.read
    moved: list[str] = []

    def rewritten(number: int, row: PackRow) -> dict[int, str]:
        if "pack" not in moved:
            moved.append("pack")
            mover.copy(extents, Tier.WARM, again=True)
            assert leftovers.remove_condemned(mover) == 1
        return examine(number, row)

    def left(self: SegmentStore, *words: Any, **more: Any) -> Any:
        if "hot" not in moved:
            moved.append("hot")
            mover.move([hot_one.number], Tier.WARM, cause="test")
            while housekeeping.give_back(tiered):
                pass
        return read(self, *words, **more)

    monkeypatch.setattr(tiered.warm, "examine", rewritten)
    monkeypatch.setattr(SegmentStore, "read", left)
    assert fsck.check(tiered) == []
    assert moved == ["hot", "pack"]
    assert get(tiered, "warm") == get(tiered, "hot") == DATA


def test_healthy_ranges_read_only_the_shards_they_need(tiered: Volume) -> None:
    inode = put(tiered, "k", DATA)
    Mover(tiered).move([inode.number], Tier.WARM, cause="test")
    run_once(tiered)
    files = shard_files(tiered)
    files[1].unlink()
    files[2].unlink()
    with tiered.snapshot() as reader:
        tiered.warm.forget_descriptors(*next(packs.scan(reader)))
        number = reader.slices(inode.number)[0].extent
    from stratum.content import read_extent

    assert bytes(read_extent(tiered, number, 1000, 66_000)) == DATA[1000:66_000]
    assert tiered.warm.reconstructed == 0


def test_writing_goes_on_with_m_disks_missing_and_stops_beyond(tiered: Volume, tmp_path: Path) -> None:
    first, second = put(tiered, "a", DATA), put(tiered, "b", DATA)
    mover = Mover(tiered)
    (tmp_path / "d1").rename(tmp_path / "gone1")
    assert mover.move([first.number], Tier.WARM, cause="test").moved_files == 1
    with tiered.snapshot() as reader:
        assert len(reader.first_rows(b"h", b"i", 9)) == 1
    (tmp_path / "d2").rename(tmp_path / "gone2")
    with pytest.raises(TierUnavailable):
        mover.move([second.number], Tier.WARM, cause="test")
    assert get(tiered, "b") == DATA
    findings = json.loads(stratum("status", tiered.root, "--json", expect=2).stdout)["findings"]
    found = {(item["code"], item["thing"], item["what"]) for item in findings}
    assert (
        "STR-WARM-DISK-MISSING",
        str(tmp_path / "d1"),
        "it is missing; mount it, or `stratum disk replace` it",
    ) in found
    assert ("STR-WARM-DEGRADED", "warm tier", "1 packs wait to be repaired") in found
    (tmp_path / "gone1").rename(tmp_path / "d1")
    (tmp_path / "gone2").rename(tmp_path / "d2")
    assert get(tiered, "a") == DATA
    Healer(tiered, mover).repair()
    assert all(path.exists() for path in shard_files(tiered))
    assert fsck.check(tiered) == []


def test_an_empty_folder_where_a_disk_was_is_no_disk(tiered: Volume, tmp_path: Path) -> None:
    """A mount that did not come up must not be written to."""
    shutil.rmtree(tmp_path / "d0")
    (tmp_path / "d0").mkdir()
    inode = put(tiered, "k", DATA)
    Mover(tiered).move([inode.number], Tier.WARM, cause="test")
    assert list((tmp_path / "d0").iterdir()) == []
    assert get(tiered, "k") == DATA


def test_a_replaced_disk_is_rebuilt_and_a_drained_one_forgotten(tiered: Volume, tmp_path: Path) -> None:
    numbers = [put(tiered, f"k{number}", DATA).number for number in range(5)]
    mover = Mover(tiered)
    for number in numbers:
        mover.move([number], Tier.WARM, cause="test")
    healer = Healer(tiered, mover)
    shutil.rmtree(tmp_path / "d1")
    successor = tiered.warm.add(tmp_path / "new", create=True)
    with tiered.snapshot() as reader:
        old = warm_disks.find_disk(reader, tmp_path / "d1")
        row = warm_disks.disks(reader)[old]
    row.state, row.successor = "replaced", successor
    tiered.mutate(lambda tx: warm_disks.set_disk(tx, old, row))
    while healer.repair():
        pass
    healer.repair()
    with tiered.snapshot() as reader:
        assert old not in warm_disks.disks(reader)
        assert all(old not in pack.disks and 0 not in pack.disks for _, pack in packs.scan(reader))
    assert sum(1 for _ in (tmp_path / "new").rglob("*.shard")) == 5
    assert fsck.check(tiered) == []
    tiered.warm.add(tmp_path / "more", create=True)
    with tiered.snapshot() as reader:
        leaving = warm_disks.find_disk(reader, tmp_path / "d0")
        row = warm_disks.disks(reader)[leaving]
    row.state = "draining"
    tiered.mutate(lambda tx: warm_disks.set_disk(tx, leaving, row))
    for _ in range(3):
        healer.repair()
    assert list((tmp_path / "d0").rglob("*.shard")) == []
    with tiered.snapshot() as reader:
        assert leaving not in warm_disks.disks(reader)
    assert all(get(tiered, f"k{number}") == DATA for number in range(5))
    assert fsck.check(tiered) == []


def test_a_rebuild_says_how_far_it_is_and_goes_on_after_an_interruption(tiered: Volume, tmp_path: Path) -> None:
    mover = Mover(tiered)
    for number in range(40):
        mover.move([put(tiered, f"k{number}", DATA).number], Tier.WARM, cause="test")
    now = [1000.0]
    healer = Healer(tiered, mover, clock=lambda: now[0])
    shutil.rmtree(tmp_path / "d1")
    successor = tiered.warm.add(tmp_path / "new", create=True)
    with tiered.snapshot() as reader:
        old = warm_disks.find_disk(reader, tmp_path / "d1")
        row = warm_disks.disks(reader)[old]
        on_it = [pack for _, pack in packs.scan(reader) if old in pack.disks]
    total = sum(pack.shard_bytes for pack in on_it)
    row.state, row.successor = "replaced", successor
    tiered.mutate(lambda tx: warm_disks.set_disk(tx, old, row))

    def far() -> leaving.Rebuild:
        with tiered.snapshot() as reader:
            found = leaving.progress(reader, old)
        assert found is not None
        return found

    assert healer.repair()
    assert (far().total_bytes, far().done_bytes, far().eta_s) == (total, 0, None)
    now[0] += 4
    assert healer.repair()
    assert far().done_bytes == 8 * total // 40  # what the round before it had done
    assert far().bytes_per_s == far().done_bytes / 4
    assert far().eta_s == (total - far().done_bytes) / far().bytes_per_s
    now[0] += 3600  # nobody worked for an hour: the rate is of what happens now
    healer = Healer(tiered, mover, clock=lambda: now[0])
    assert healer.repair()
    assert (far().done_bytes, far().bytes_per_s, far().eta_s) == (16 * total // 40, 0.0, None)
    while healer.repair():
        now[0] += 4
        healer.repair()
    healer.repair()
    with tiered.snapshot() as reader:
        assert leaving.progress(reader, old) is None
        assert old not in warm_disks.disks(reader)
    assert sum(1 for _ in (tmp_path / "new").rglob("*.shard")) == len(on_it)
    assert fsck.check(tiered) == []


def test_a_repair_that_cannot_be_done_waits_and_is_listed(tiered: Volume, tmp_path: Path) -> None:
    inode = put(tiered, "k", DATA)
    mover = Mover(tiered)
    mover.move([inode.number], Tier.WARM, cause="test")
    now = [1000.0]
    healer = Healer(tiered, mover, clock=lambda: now[0])
    shutil.rmtree(tmp_path / "d1")
    with tiered.snapshot() as reader:
        number, _ = next(packs.scan(reader))
    tiered.mutate(lambda tx: packs.want_repair(tx, number, "test"))
    healer.repair()
    with tiered.snapshot() as reader:
        ((_, raw),) = reader.first_rows(b"h", b"i", 2)
    assert b"there is no disk for shards" in raw
    tiered.warm.add(tmp_path / "fresh", create=True)
    healer.repair()
    assert not list((tmp_path / "fresh").rglob("*.shard"))
    now[0] += 60
    healer.repair()
    assert len(list((tmp_path / "fresh").rglob("*.shard"))) == 1


def test_a_disk_begins_empty_and_is_added_once(tiered: Volume, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "x").write_text("somebody's")
    for path in (tmp_path / "used", tmp_path / "d0"):
        with pytest.raises(InvalidArgument):
            tiered.warm.add(path)
    assert warm_disks.same_devices([tmp_path / "d0", tmp_path / "d1"]) == [(tmp_path / "d0", tmp_path / "d1")]
