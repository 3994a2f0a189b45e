"""After a restore: what left the hot tier since the backup is found in the packs that were made since."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from stratum import backup, fsck, objects, packs, tree
from stratum.buckets import get as get_bucket
from stratum.errors import NoSuchKey
from stratum.housekeeping import run_once
from stratum.tier_rows import Tier
from stratum.tiering import leftovers, snapshots
from stratum.tiering.adopt import adopt
from stratum.tiering.mover import Mover
from stratum.tiering.rebuild import rebuild
from stratum.volume import Volume
from tests.support import BUCKET, delete, get, put
from tests.tiers.conftest import directory_row, make_tiered, where

if TYPE_CHECKING:
    from pathlib import Path

    from stratum.schema import Inode
    from stratum.tiering.adopt_shards import Adopted


def move(opened: Volume, tier: Tier, *inodes: Inode) -> None:
    outcome = Mover(opened).move([inode.number for inode in inodes], tier, cause="test", alone=True)
    assert outcome.failed == {}
    run_once(opened)


def restored(tmp_path: Path, archive: Path) -> Adopted:
    backup.restore(archive, tmp_path / "volume")
    with Volume(tmp_path / "volume", "restore") as opened:
        return adopt(opened)


def content(opened: Volume) -> dict[str, bytes]:
    with opened.snapshot() as reader:
        row = get_bucket(reader, BUCKET)
        names = [entry.decode() for entry, _ in tree.scan_dentries(reader, row.inode)]
    return {name: get(opened, name) for name in names}


def test_what_moved_since_the_backup_is_read_where_it_is_now(tmp_path: Path) -> None:
    data = {name: os.urandom(100_000) for name in ("warm", "cold", "both", "hot")}
    with Volume(make_tiered(tmp_path), "test") as opened:
        inodes = {name: put(opened, name, body) for name, body in data.items()}
        made = backup.make(opened, tmp_path / "backup")
        move(opened, Tier.WARM, inodes["warm"], inodes["both"])
        move(opened, Tier.COLD, inodes["cold"], inodes["both"])
    (tmp_path / "d0" / "packs" / "notes.shard").write_text("somebody's")
    done = restored(tmp_path, made.path)
    assert (done.files, done.lost, done.damaged, done.not_asked) == (2, [], [], [])
    with Volume(tmp_path / "volume", "test") as opened:
        assert content(opened) == data
        found = {name: where(opened, inode) for name, inode in inodes.items()}
        assert found == {"warm": ["warm"], "cold": ["cold"], "both": ["warm", "cold"], "hot": ["hot"]}
        assert fsck.check(opened, data=True) == []


def test_files_that_were_sent_since_the_backup_come_back_as_they_were_sent(tmp_path: Path) -> None:
    with Volume(make_tiered(tmp_path, cold__delete_after_s=7 * 86400.0), "test") as opened:
        first = {name: put(opened, name, name.encode() * 20_000) for name in ("kept", "changed", "deleted")}
        move(opened, Tier.COLD, *first.values())
        made = backup.make(opened, tmp_path / "backup")
        move(opened, Tier.COLD, put(opened, "changed", b"newer" * 20_000))
        move(opened, Tier.COLD, put(opened, "new", b"new" * 20_000))
        put(opened, "hot and new", b"it is on the hot disk alone, and without a name" * 1000)
        delete(opened, "deleted")
    done = restored(tmp_path, made.path)
    assert (done.packs, done.files, done.lost, done.damaged) == (2, 2, [], [])
    with Volume(tmp_path / "volume", "test") as opened:
        assert {name: body[:3] for name, body in content(opened).items()} == {
            "kept": b"kep", "changed": b"new", "new": b"new", "deleted": b"del",
        }  # fmt: skip
        assert fsck.check(opened) == []
        # What is written from here on is newer than what was sent in the time that the restore took back.
        for _ in range(3):
            put(opened, "changed", b"newest" * 20_000)
        with opened.snapshot() as reader:
            inode = objects.head(reader, get_bucket(reader, BUCKET), b"changed").inode
        move(opened, Tier.COLD, inode)
    report = rebuild(tmp_path / "again", {"volume.ec": ""}, [], "archive", directory_row(tmp_path / "archive"))
    assert report.lost == []
    with Volume(tmp_path / "again", "test") as opened:
        assert get(opened, "changed") == b"newest" * 20_000


def test_packs_that_were_compacted_or_moved_to_other_disks_are_found(tmp_path: Path) -> None:
    with Volume(make_tiered(tmp_path, disks=4), "test") as opened:
        kept, gone = put(opened, "kept", os.urandom(100_000)), put(opened, "gone", os.urandom(300_000))
        body = get(opened, "kept")
        other = put(opened, "other", os.urandom(100_000))
        move(opened, Tier.WARM, kept, gone)
        move(opened, Tier.WARM, other)
        made = backup.make(opened, tmp_path / "backup")
        delete(opened, "gone")
        run_once(opened)
        assert leftovers.compact(Mover(opened))
        leftovers.remove_condemned(Mover(opened))
        # The shards of the other pack go elsewhere, as they do when disks are replaced.
        with opened.snapshot() as reader:
            (number, row) = max(
                packs.scan(reader), key=lambda item: item[1].length - 200_000 if item[1].extents else -1
            )
        moved = _turn(opened, tmp_path, number, row.disks)
    assert moved
    done = restored(tmp_path, made.path)
    assert done.damaged == []
    with Volume(tmp_path / "volume", "test") as opened:
        assert get(opened, "kept") == body
        assert len(get(opened, "other")) == 100_000


def _turn(opened: Volume, tmp_path: Path, number: int, disks: list[int]) -> bool:
    """Move the first shard of a pack to the disk that has none of it."""
    free = next(disk for disk in opened.warm.present() if disk not in disks)
    source = opened.warm.shard_path(disks[0], number, 0)
    target = opened.warm.shard_path(free, number, 0)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(source, target)
    return not source.exists()


def test_what_cannot_be_asked_is_told(tmp_path: Path) -> None:
    with Volume(make_tiered(tmp_path), "test") as opened:
        inode = put(opened, "k", os.urandom(100_000))
        made = backup.make(opened, tmp_path / "backup")
        move(opened, Tier.WARM, inode)
    (tmp_path / "archive").rename(tmp_path / "unplugged")
    (tmp_path / "d1").rename(tmp_path / "d1-away")
    done = restored(tmp_path, made.path)
    assert [line.partition(":")[0] for line in done.not_asked] == [f"disk {tmp_path / 'd1'}", "remote archive"]
    with Volume(tmp_path / "volume", "test") as opened:
        assert len(get(opened, "k")) == 100_000, "two of three shards are enough"
        with opened.snapshot() as reader:
            assert list(reader.scan(b"h", b"i")), "and the third is to be made"


def test_a_damaged_pack_gives_no_copy(tmp_path: Path) -> None:
    with Volume(make_tiered(tmp_path), "test") as opened:
        inode = put(opened, "k", os.urandom(100_000))
        made = backup.make(opened, tmp_path / "backup")
        move(opened, Tier.WARM, inode)
    for shard in list(tmp_path.glob("d*/packs/**/*.shard"))[:2]:
        raw = bytearray(shard.read_bytes())
        raw[-5000] ^= 1
        shard.write_bytes(bytes(raw))
    done = restored(tmp_path, made.path)
    assert len(done.damaged) == 1
    assert not done.extents


def test_a_restored_store_gives_back_what_had_been_freed_before_the_backup(tmp_path: Path) -> None:
    """Its transactions count from 1 again."""
    with Volume(make_tiered(tmp_path), "test") as opened:
        for number in range(50):
            put(opened, "k", b"%d" % number * 40_000)
        with opened.snapshot() as reader:
            assert list(reader.scan(b"F", b"G"))
        made = backup.make(opened, tmp_path / "backup")
        assert made.transaction > 50
    backup.restore(made.path, tmp_path / "volume")
    with Volume(tmp_path / "volume", "test") as opened:
        for _ in range(5):
            run_once(opened)
        with opened.snapshot() as reader:
            assert not list(reader.scan(b"F", b"G"))


@pytest.mark.parametrize("what", ["snapshot", "none"])
def test_a_volume_that_was_restored_is_rebuilt_from_what_came_after(tmp_path: Path, what: str) -> None:
    with Volume(make_tiered(tmp_path, cold__delete_after_s=7 * 86400.0), "test") as opened:
        move(opened, Tier.COLD, put(opened, "k", b"1" * 50_000))
        made = backup.make(opened, tmp_path / "backup")
        for _ in range(20):
            put(opened, "noise", b"n" * 50_000)
        move(opened, Tier.COLD, put(opened, "k", b"2" * 50_000))
    backup.restore(made.path, tmp_path / "volume")
    with Volume(tmp_path / "volume", "test") as opened:
        move(opened, Tier.COLD, put(opened, "k", b"3" * 50_000))
        if what == "snapshot":
            snapshots.take(opened, "archive")
    arguments: Any = (tmp_path / "again", {"volume.ec": ""}, [], "archive", directory_row(tmp_path / "archive"))
    rebuild(*arguments)
    with Volume(tmp_path / "again", "test") as opened:
        assert get(opened, "k") == b"3" * 50_000
        with pytest.raises(NoSuchKey):
            get(opened, "noise")
        assert fsck.check(opened) == []
