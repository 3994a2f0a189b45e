"""A volume from its bucket alone."""

from __future__ import annotations

import itertools
import os
import random
import struct
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import pytest

from stratum import (
    buckets,
    clones,
    cold,
    cold_admin,
    cold_files,
    files,
    fsck,
    longkeys,
    manifest,
    objects,
    quotas,
    tree,
    warm_disks,
)
from stratum.buckets import get as get_bucket
from stratum.cold_backends.contract import RemoteError
from stratum.content import INLINE_BYTES_MAX
from stratum.errors import (
    Busy,
    ForeignRemote,
    InvalidArgument,
    NotFound,
    QuotaExceeded,
    StratumError,
    TierUnavailable,
    VolumeInvalid,
)
from stratum.files import Attributes
from stratum.housekeeping import run_once
from stratum.identity import Identities
from stratum.listing import list_page
from stratum.quotas import Quota
from stratum.schema import FORMAT_VERSION, Inode, Kind, ObjectMetadata
from stratum.tier_rows import Tier
from stratum.tiering import snapshots
from stratum.tiering.heal import Healer
from stratum.tiering.mover import Mover
from stratum.tiering.rebuild import Report, rebuild
from stratum.volume import Volume
from tests.support import BUCKET, delete, get, put
from tests.tiers.conftest import directory_row, make_tiered, where

if TYPE_CHECKING:
    from pathlib import Path


def fill(opened: Volume, count: int, seed: int = 3) -> dict[bytes, bytes]:
    """Objects of all sizes and odd names, with metadata, modes and attributes."""
    chance = random.Random(seed)
    made: dict[bytes, bytes] = {}
    for number in range(count):
        key = chance.choice(
            [f"plain-{number}", f"a/b/{number}", f"döner {number}", f"a//x{number}", f"./{number}"]
        ).encode()
        data = chance.randbytes(chance.choice([1, 100, 5000, 16_384, 16_385, 70_000]))
        inode = put(opened, key, data)
        made[key] = data

        def decorate(tx: Any, inode: int = inode.number, number: int = number) -> None:
            found = tx.inode(inode)
            objects.set_metadata(tx, found, ObjectMetadata(content_type="text/x", user={"n": str(number)}, owner="o"))
            files.set_attributes(
                tx, inode, Attributes(mode=0o600 + number % 8, uid=number, mtime_ns=number * 10**9 + 7)
            )
            files.set_attribute(tx, inode, b"user.x", b"value %d" % number)

        opened.mutate(decorate)
    return made


def picture(opened: Volume) -> dict[bytes, tuple[Any, ...]]:
    """Everything a user can see of the bucket's objects."""
    found: dict[bytes, tuple[Any, ...]] = {}
    with opened.snapshot() as reader:
        row = get_bucket(reader, BUCKET)
        after, pages = b"", []
        while True:
            page = list_page(reader, row, after=after)
            pages += page.objects
            after = page.last
            if not page.truncated:
                break
        for key, size, mtime_ns, etag in pages:
            state = objects.head(reader, row, key)
            inode = state.inode
            attributes = [
                (name, files.get_attribute(reader, inode.number, name))
                for name in files.list_attributes(reader, inode.number)
            ]
            found[key] = (
                size,
                mtime_ns,
                etag,
                inode.mode,
                inode.uid,
                inode.gid,
                inode.version,
                state.metadata,
                attributes,
            )
    return found


def all_files(opened: Volume) -> list[int]:
    with opened.snapshot() as reader:
        from stratum.schema import unpack_u64

        rows = ((unpack_u64(key[1:])[0], raw) for key, raw in reader.scan(b"I", b"J"))
        return [number for number, raw in rows if Inode.unpack(number, raw).kind == Kind.FILE]


def again(tmp_path: Path, **changed: Any) -> tuple[Report, Path]:
    row = directory_row(tmp_path / "archive", **changed)
    return rebuild(tmp_path / "new", {"volume.ec": ""}, [], "archive", row), tmp_path / "new"


@pytest.mark.parametrize("with_snapshot", [False, True])
def test_the_bucket_alone_brings_everything_back(tmp_path: Path, with_snapshot: bool) -> None:
    with Volume(make_tiered(tmp_path), "test") as opened:
        made = fill(opened, 300)
        outcome = Mover(opened).move(all_files(opened), Tier.COLD, cause="test", alone=True)
        assert outcome.failed == {}
        before = picture(opened)
        if with_snapshot:
            snapshots.take(opened, "archive")
        sizes = [
            path.stat().st_size
            for path in (tmp_path / "archive" / "objects" / "v1").rglob("*")
            if path.is_file() and "_index" not in str(path)
        ]
        assert all(size >= 128 * 1024 for size in sizes)
        assert len(sizes) < 20, "small objects are packed"
    report, root = again(tmp_path)
    assert (report.lost, report.damaged) == ([], [])
    with Volume(root, "test") as opened:
        assert picture(opened) == before
        for key, data in made.items():
            assert get(opened, key) == data, key
        assert fsck.check(opened) == []
        Identities(opened)
        assert report.access_key, "an unencrypted snapshot holds no keys, so there is a fresh one"


def test_files_newer_than_the_snapshot_come_from_packs(tmp_path: Path) -> None:
    with Volume(make_tiered(tmp_path), "test") as opened:
        put(opened, "old", b"o" * 30_000)
        put(opened, "inline", b"only in the snapshot")
        mover = Mover(opened)
        mover.move(all_files(opened)[:1], Tier.COLD, cause="test", alone=True)
        snapshots.take(opened, "archive")
        put(opened, "late", b"l" * 30_000)
        put(opened, "never sent", b"n" * 30_000)
        with opened.snapshot() as reader:
            late = objects.head(reader, get_bucket(reader, BUCKET), b"late").inode.number
        mover.move([late], Tier.COLD, cause="test", alone=True)
    report, root = again(tmp_path)
    assert report.snapshot
    with Volume(root, "test") as opened:
        assert get(opened, "old") == b"o" * 30_000
        assert get(opened, "inline") == b"only in the snapshot"
        assert get(opened, "late") == b"l" * 30_000
        assert sorted(picture(opened)) == [b"inline", b"late", b"old"]
        assert fsck.check(opened) == []


def send(opened: Volume, *keys: str) -> None:
    with opened.snapshot() as reader:
        row = get_bucket(reader, BUCKET)
        inodes = [objects.head(reader, row, key.encode()).inode.number for key in keys]
    assert Mover(opened).move(inodes, Tier.COLD, cause="test", alone=True).failed == {}


@pytest.mark.parametrize("snapshot", ["none", "before", "between", "after"])
def test_the_newest_object_of_a_key_comes_back(tmp_path: Path, snapshot: str) -> None:
    """What it replaced may lie in the bucket for a week more."""
    with Volume(make_tiered(tmp_path, cold__delete_after_s=7 * 86400.0), "test") as opened:
        for moment, data in (("before", b"1"), ("between", b"2"), ("after", b"3")):
            put(opened, "k", data * 50_000)
            send(opened, "k")
            if snapshot == moment:
                snapshots.take(opened, "archive")
        run_once(opened)
    report, root = again(tmp_path)
    assert (report.files, report.lost, report.packs) == (1, [], 3)
    with Volume(root, "test") as opened:
        assert get(opened, "k") == b"3" * 50_000
        assert list(picture(opened)) == [b"k"]
        assert fsck.check(opened) == []


def test_what_was_deleted_before_the_snapshot_stays_away(tmp_path: Path) -> None:
    with Volume(make_tiered(tmp_path, cold__delete_after_s=7 * 86400.0), "test") as opened:
        for key in ("gone", "kept"):
            put(opened, key, key.encode() * 10_000)
        opened.mutate(lambda tx: buckets.create(tx, "second", get_bucket(tx, BUCKET).owner))
        put(opened, "k", b"k" * 50_000, bucket="second")
        assert Mover(opened).move(all_files(opened), Tier.COLD, cause="test", alone=True).failed == {}
        delete(opened, "gone")
        delete(opened, "k", bucket="second")
        opened.mutate(lambda tx: buckets.remove(tx, "second"))
        snapshots.take(opened, "archive")
    report, root = again(tmp_path)
    assert report.files == 1
    with Volume(root, "test") as opened:
        assert list(picture(opened)) == [b"kept"]
        with opened.snapshot() as reader:
            assert [name for name, _ in buckets.scan(reader)] == [BUCKET]
        assert fsck.check(opened) == []


def test_without_a_snapshot_what_was_deleted_comes_back(tmp_path: Path) -> None:
    """Nothing in the bucket says that it was."""
    with Volume(make_tiered(tmp_path, cold__delete_after_s=7 * 86400.0), "test") as opened:
        put(opened, "gone", b"g" * 50_000)
        send(opened, "gone")
        delete(opened, "gone")
        run_once(opened)
    _, root = again(tmp_path)
    with Volume(root, "test") as opened:
        assert get(opened, "gone") == b"g" * 50_000
        assert fsck.check(opened) == []


@pytest.mark.parametrize("with_snapshot", [False, True])
def test_a_file_that_was_renamed_and_sent_again_has_its_new_name(tmp_path: Path, with_snapshot: bool) -> None:
    with Volume(make_tiered(tmp_path, cold__delete_after_s=7 * 86400.0), "test") as opened:
        inode = put(opened, "d/old", b"1" * 50_000)
        put(opened, "d/other", b"o" * 50_000)
        send(opened, "d/old", "d/other")
        if with_snapshot:
            snapshots.take(opened, "archive")

        def rename_and_write(tx: Any) -> None:
            row = get_bucket(tx, BUCKET)
            directory = tree.walk(tx, row.inode, [b"d/"])
            assert directory is not None
            files.rename(tx, directory, b"old", row.inode, b"new", 0, lambda _: False)
            tx.dirty(tx.inode(inode.number))

        opened.mutate(rename_and_write)
        with opened.snapshot() as reader:
            extents = [piece.extent for piece in reader.slices(inode.number)]
        Mover(opened).copy(extents, Tier.COLD, again=True, alone=True)
        put(opened, "d/old", b"2" * 50_000)
        send(opened, "d/old")
    _, root = again(tmp_path)
    with Volume(root, "test") as opened:
        assert {key: get(opened, key)[:1] for key in picture(opened)} == {
            b"new": b"1",
            b"d/old": b"2",
            b"d/other": b"o",
        }
        assert fsck.check(opened) == []


@pytest.mark.parametrize("with_snapshot", [False, True])
def test_all_names_of_a_file_come_back(tmp_path: Path, with_snapshot: bool) -> None:
    """Those in other directories, those that are left when the newest is gone, and those of directories' own objects, cloned ones too."""
    with Volume(make_tiered(tmp_path), "test") as opened:
        inode = put(opened, "a/first", b"1" * 50_000)
        put(opened, "b/own/", b"o" * 50_000)
        put(opened, "b/other", b"x" * 50_000)

        def link(tx: Any) -> None:
            other = clones.find(tx, b"bucket/b").number
            for name in (b"second", b"third", *(b"%d" % number for number in range(200)), b"newest"):
                files.link(tx, inode.number, other, name)
            files.unlink(tx, other, b"newest", lambda _: False)

        opened.mutate(link)
        lonely = put(opened, "a/lonely", b"2" * 50_000)
        opened.mutate(lambda tx: files.link(tx, lonely.number, clones.find(tx, b"bucket/b").number, b"gone"))
        opened.mutate(lambda tx: files.unlink(tx, clones.find(tx, b"bucket/b").number, b"gone", lambda _: False))
        clones.clone(opened, b"bucket/b", b"bucket/c", wait=not with_snapshot)  # a snapshot waits by itself
        assert not Mover(opened).move(all_files(opened), Tier.COLD, cause="test", alone=True).failed
        if with_snapshot:
            snapshots.take(opened, "archive")
        before = picture(opened)
    _, root = again(tmp_path)
    with Volume(root, "test") as opened:
        # Of an own object S3 shows the directory's attributes too, and a manifest has none of directories.
        assert {key: told[2] for key, told in picture(opened).items()} == {key: told[2] for key, told in before.items()}
        assert {b"a/lonely", b"b/own/", b"c/own/"} <= before.keys()
        with opened.snapshot() as reader:
            assert objects.head(reader, get_bucket(reader, BUCKET), b"b/third").inode.nlink == 203
        assert fsck.check(opened) == []


def test_to_tell_of_a_file_reads_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may hold millions."""
    with Volume(make_tiered(tmp_path), "test") as opened:
        fill(opened, 20)
        numbers = all_files(opened)
        scan = longkeys.scan

        def without_entries(reader: Any, table: bytes, *args: Any) -> Any:
            assert table != b"D", "a directory is read"
            return scan(reader, table, *args)

        monkeypatch.setattr(longkeys, "scan", without_entries)
        assert not Mover(opened).move(numbers, Tier.COLD, cause="test", alone=True).failed


def test_warm_disks_that_survived_are_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies only there, too. A fresh disk may stand beside them."""
    with Volume(make_tiered(tmp_path), "test") as opened:
        inodes = {name: put(opened, name, name.encode() * 50_000) for name in ("warm", "cold", "both", "hot", "gone")}
        move = Mover(opened).move
        assert not move([inodes["warm"].number, inodes["gone"].number], Tier.WARM, cause="test").failed
        assert not move([inodes["both"].number], Tier.WARM, cause="test").failed
        assert not move([inodes["cold"].number, inodes["both"].number], Tier.COLD, cause="test", alone=True).failed
        instance = opened.instance
        snapshots.take(opened, "archive")
    (tmp_path / "d1").rename(tmp_path / "lost")
    (tmp_path / "fresh").mkdir()
    with pytest.raises(InvalidArgument, match="not empty"):
        rebuild(tmp_path / "new", {}, [tmp_path / "archive"], "archive", directory_row(tmp_path / "archive"))
    paths = [tmp_path / name for name in ("d0", "fresh", "d2")]
    before = [(path / warm_disks.MARKER).read_bytes() for path in paths[::2]]
    with monkeypatch.context() as patched:
        patched.setattr(cold, "write_marker", Mock(side_effect=RemoteError("it refuses")))
        with pytest.raises(TierUnavailable, match="it refuses"):
            rebuild(tmp_path / "new", {"volume.ec": "2+1"}, paths, "archive", directory_row(tmp_path / "archive"))
    assert [(path / warm_disks.MARKER).read_bytes() for path in paths[::2]] == before, "the old volume could go on"
    report = rebuild(tmp_path / "new", {"volume.ec": "2+1"}, paths, "archive", directory_row(tmp_path / "archive"))
    assert (report.lost, report.warm.damaged, report.warm.not_asked) == ([f"{BUCKET}/hot"], [], [])
    with Volume(tmp_path / "new", "test") as opened:
        assert opened.instance == instance
        for name in ("warm", "cold", "both", "gone"):
            assert get(opened, name) == name.encode() * 50_000
        assert [where(opened, inodes[name]) for name in ("warm", "cold")] == [["warm"], ["cold"]]
        assert {finding.kind for finding in fsck.check(opened)} == {"damaged-pack"}, "a shard of each was lost"
        healer = Healer(opened, Mover(opened))
        while healer.repair():
            pass
        assert fsck.check(opened) == []
        fresh = put(opened, "fresh", b"f" * 50_000)
        assert not Mover(opened).move([fresh.number], Tier.WARM, cause="test").failed
    with Volume(tmp_path / "volume", "test") as old:
        assert old.warm.present() == {}, "whoever still has the old metadata does not write there"
    with pytest.raises(InvalidArgument, match="another volume"):
        warm_disks.disk_of(tmp_path / "d0", "somebody else")


def test_a_snapshot_of_before_format_4_is_told_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Volume(make_tiered(tmp_path), "test") as opened:
        made = fill(opened, 50)
        number = put(opened, "a/linked", b"x" * 50_000).number
        opened.mutate(lambda tx: files.link(tx, number, clones.find(tx, b"bucket/a/b").number, b"second"))

        def as_before(tx: Any) -> None:
            for key, raw in list(tx.scan(b"I", b"J")):
                inode = Inode.unpack(int.from_bytes(key[1:], "big"), raw)
                inode.flags &= ~Inode.SEVERAL_NAMES
                tx.put(key, inode.pack_attributes())
            for key, _ in list(tx.scan(b"i", b"j")):
                tx.delete(key)

        opened.mutate(as_before)
        with monkeypatch.context() as patched:
            patched.setattr(snapshots, "FORMAT_VERSION", 3)
            snapshots.take(opened, "archive")
    _, root = again(tmp_path)
    with Volume(root, "test") as opened:
        assert not fsck.check(opened), "what lies inline is in the snapshot"
        assert picture(opened).keys() == {key for key, data in made.items() if len(data) <= INLINE_BYTES_MAX}


def test_a_snapshot_of_a_newer_program_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Volume(make_tiered(tmp_path), "test") as opened:
        put(opened, "k", b"1" * 50_000)
        send(opened, "k")
        with monkeypatch.context() as patched:
            patched.setattr(snapshots, "FORMAT_VERSION", FORMAT_VERSION + 1)
            snapshots.take(opened, "archive")
    with pytest.raises(VolumeInvalid, match="rebuild with the program that took it"):
        again(tmp_path)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("with_snapshot", [False, True])
def test_a_snapshot_of_an_older_program_takes_nothing_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_snapshot: bool
) -> None:
    """It does not say what it is of, and neither do manifests; they tell the time."""
    monkeypatch.setattr(snapshots, "TAKEN_KEY", b"\0other")
    describe = manifest.describe

    def without_transaction(*args: Any) -> dict[str, Any]:
        told = describe(*args)
        del told["transaction"]
        return told

    monkeypatch.setattr(manifest, "describe", without_transaction)
    with Volume(make_tiered(tmp_path, cold__delete_after_s=7 * 86400.0), "test") as opened:
        put(opened, "k", b"1" * 50_000)
        put(opened, "gone", b"g" * 50_000)
        send(opened, "k", "gone")
        delete(opened, "gone")
        put(opened, "k", b"only in the snapshot" if with_snapshot else b"2" * 50_000)
        if with_snapshot:
            snapshots.take(opened, "archive")
        else:
            send(opened, "k")
    _, root = again(tmp_path)
    with Volume(root, "test") as opened:
        assert get(opened, "k") == (b"only in the snapshot" if with_snapshot else b"2" * 50_000)
        assert get(opened, "gone") == b"g" * 50_000, "it may have been made while the snapshot was on its way"
        assert fsck.check(opened) == []


def test_a_snapshot_of_a_clock_that_was_ahead_is_not_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = SimpleNamespace(strftime=lambda *_: "29991231-235959", gmtime=lambda: 0)
    with Volume(make_tiered(tmp_path), "test") as opened:
        put(opened, "k", b"old")
        send_all = Mover(opened).move(all_files(opened), Tier.COLD, cause="test", alone=True)
        assert not send_all.failed
        with monkeypatch.context() as patched:
            patched.setattr(snapshots, "time", ahead)
            snapshots.take(opened, "archive")
        put(opened, "k", b"only in the newer snapshot")
        newest = snapshots.take(opened, "archive")
    report, root = again(tmp_path)
    assert report.snapshot == newest
    with Volume(root, "test") as opened:
        assert get(opened, "k") == b"only in the newer snapshot"


def test_a_damaged_snapshot_gives_way_to_the_one_before_it(tmp_path: Path) -> None:
    with Volume(make_tiered(tmp_path), "test") as opened:
        put(opened, "inline", b"only in the snapshot")
        put(opened, "k", b"1" * 50_000)
        send(opened, "k")
        first = snapshots.take(opened, "archive")
        time.sleep(1.1 - time.time() % 1)  # their names tell seconds
        second = snapshots.take(opened, "archive")
    (found,) = (tmp_path / "archive" / "objects").rglob(second.rpartition("/")[2] + "*")
    raw = bytearray(found.read_bytes())
    raw[len(raw) // 2] ^= 1
    found.write_bytes(bytes(raw))
    report, root = again(tmp_path)
    assert (report.snapshot, report.damaged) == (first, [second])
    with Volume(root, "test") as opened:
        assert get(opened, "inline") == b"only in the snapshot"
        assert get(opened, "k") == b"1" * 50_000
        assert fsck.check(opened) == []


def test_what_was_open_without_a_name_does_not_come_back(tmp_path: Path) -> None:
    with Volume(make_tiered(tmp_path), "test") as opened:
        put(opened, "k", b"1" * 50_000)
        inode = put(opened, "open", b"2" * 50_000)
        send(opened, "k", "open")

        def unlink(tx: Any) -> None:
            tx._mounts = [tx.session]
            files.unlink(tx, get_bucket(tx, BUCKET).inode, b"open", lambda _: True)

        opened.mutate(unlink)
        with opened.snapshot() as reader:
            assert reader.inode(inode.number).nlink == 0
        snapshots.take(opened, "archive")
    report, root = again(tmp_path)
    assert (report.files, report.size) == (1, 50_000)
    with Volume(root, "test") as opened:
        run_once(opened)
        assert fsck.check(opened) == []
        assert all_files(opened) == [number for number in all_files(opened) if number != inode.number]


def test_quotas_and_limits_come_back_with_a_snapshot(tmp_path: Path) -> None:
    with Volume(make_tiered(tmp_path), "test") as opened:
        put(opened, "k", b"1" * 50_000)
        send(opened, "k")
        with opened.snapshot() as reader:
            row = get_bucket(reader, BUCKET)
        opened.mutate(lambda tx: quotas.set_bucket(tx, row.inode, Quota(bytes=60_000)))
        opened.mutate(lambda tx: quotas.set_user(tx, row.owner, Quota(objects=1)))
        opened.mutate(lambda tx: tx.put(b"glimits", b'{"anonymous":{"requests_per_s":5}}'))
        snapshots.take(opened, "archive")
    _, root = again(tmp_path)
    with Volume(root, "test") as opened:
        with opened.snapshot() as reader:
            assert reader.get(b"glimits") == b'{"anonymous":{"requests_per_s":5}}'
            assert sorted(item.quota.bytes + item.quota.objects for item in quotas.everything(reader)) == [1, 60_000]
        with pytest.raises(QuotaExceeded):
            put(opened, "k", b"2" * 70_000)
        opened.mutate(lambda tx: quotas.set_bucket(tx, row.inode, None))
        opened.mutate(lambda tx: quotas.set_user(tx, row.owner, None))
        with opened.snapshot() as reader:
            assert not quotas.any_set(reader)


def test_access_lists_come_back_in_force(tmp_path: Path) -> None:
    with Volume(make_tiered(tmp_path), "test") as opened:
        inode = put(opened, "k", b"1" * 50_000).number
        entries = struct.pack("<I", 2) + b"".join(
            struct.pack("<HHI", *entry) for entry in ((1, 6, 0xFFFFFFFF), (2, 7, 4242), (4, 0, 0xFFFFFFFF), (16, 7, 0xFFFFFFFF), (32, 0, 0xFFFFFFFF))
        )  # fmt: skip
        opened.mutate(lambda tx: files.set_attribute(tx, inode, b"system.posix_acl_access", entries))
        with opened.snapshot() as reader:
            assert reader.inode(inode).flags & Inode.ACCESS_LIST
        send(opened, "k")
    _, root = again(tmp_path)
    with Volume(root, "test") as opened, opened.snapshot() as reader:
        found = objects.head(reader, get_bucket(reader, BUCKET), b"k").inode
        assert found.flags & Inode.ACCESS_LIST
        assert files.get_attribute(reader, found.number, b"system.posix_acl_access") == entries


def test_numbers_of_the_old_volume_are_not_given_out_again(tmp_path: Path) -> None:
    """Directories are made anew, whichever session made the files."""
    with Volume(make_tiered(tmp_path), "test") as opened:
        made = {b"d%d/e/k" % number: b"%d" % number * 3000 for number in range(100)}
        opened.session.id = 1  # as the rebuilding program's would be; it has given out some numbers
        opened.session._counter = itertools.count(30)
        for key, data in made.items():
            put(opened, key, data)
        opened.session.id = 2
        assert Mover(opened).move(all_files(opened), Tier.COLD, cause="test", alone=True).failed == {}
    _, root = again(tmp_path)
    with Volume(root, "test") as opened:
        assert {key: get(opened, key) for key in made} == made
        assert fsck.check(opened) == []


def test_what_lay_only_on_the_lost_disks_is_listed(tmp_path: Path) -> None:
    with Volume(make_tiered(tmp_path), "test") as opened:
        put(opened, "hot", b"h" * 50_000)
        cold_one = put(opened, "d/cold", b"c" * 50_000)
        Mover(opened).move([cold_one.number], Tier.COLD, cause="test", alone=True)
        snapshots.take(opened, "archive")
    report, root = again(tmp_path)
    assert report.lost == [f"{BUCKET}/hot"]
    with Volume(root, "test") as opened:
        assert get(opened, "d/cold") == b"c" * 50_000
        assert fsck.check(opened) == []


def test_encrypted_snapshots_bring_keys_back(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text(os.urandom(32).hex())
    key.chmod(0o600)
    (tmp_path / "archive").mkdir()
    with Volume(make_tiered(tmp_path, remote=False), "test") as opened:
        identities = Identities(opened)
        _, access, _ = identities.add_user("somebody")
        cold_admin.add(opened, "archive", directory_row(tmp_path / "archive", encryption_key=str(key)))
        inode = put(opened, "k", b"x" * 50_000)
        Mover(opened).move([inode.number], Tier.COLD, cause="test", alone=True)
        snapshots.take(opened, "archive")
    with pytest.raises(StratumError):
        again(tmp_path)
    assert not (tmp_path / "new").exists()
    report, root = again(tmp_path, encryption_key=str(key))
    assert report.access_key == ""
    with Volume(root, "test") as opened:
        assert access in {row["access_key"] for row in Identities(opened).access_keys()}
        assert get(opened, "k") == b"x" * 50_000


def test_the_old_volume_refuses_to_write_once_another_took_over(tmp_path: Path) -> None:
    root = make_tiered(tmp_path)
    with Volume(root, "test") as opened:
        first, second = put(opened, "a", b"a" * 50_000), put(opened, "b", b"b" * 50_000)
        Mover(opened).move([first.number], Tier.COLD, cause="test", alone=True)
    again(tmp_path)
    with Volume(root, "test") as opened:
        with pytest.raises(ForeignRemote):
            Mover(opened).move([second.number], Tier.COLD, cause="test", alone=True)
        assert get(opened, "a") == b"a" * 50_000
        assert get(opened, "b") == b"b" * 50_000
    with Volume(tmp_path / "new", "test") as opened:
        inode = put(opened, "c", b"c" * 50_000)
        assert Mover(opened).move([inode.number], Tier.COLD, cause="test", alone=True).moved_files == 1


def test_a_foreign_bucket_is_refused_and_an_empty_one_is_no_volume(tmp_path: Path) -> None:
    make_tiered(tmp_path)
    (tmp_path / "other").mkdir()
    with Volume(make_tiered(tmp_path / "other", remote=False), "test") as opened:
        with pytest.raises(ForeignRemote):
            cold_admin.add(opened, "theirs", directory_row(tmp_path / "archive"))
        with opened.snapshot() as reader:
            assert cold.rows(reader) == {}
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFound):
        rebuild(tmp_path / "new", {}, [], "x", directory_row(tmp_path / "empty"))


def test_a_damaged_pack_costs_only_what_it_holds(tmp_path: Path) -> None:
    with Volume(make_tiered(tmp_path), "test") as opened:
        mover = Mover(opened)
        for name in ("a", "b"):
            mover.move([put(opened, name, name.encode() * 150_000).number], Tier.COLD, cause="test", alone=True)
    packs = [path for path in (tmp_path / "archive" / "objects" / "v1").rglob("*") if path.is_file()]
    raw = bytearray(packs[0].read_bytes())
    raw[-10] ^= 1
    packs[0].write_bytes(raw)
    report, root = again(tmp_path)
    assert len(report.damaged) == 1
    with Volume(root, "test") as opened:
        assert len(picture(opened)) == 1
        assert fsck.check(opened) == []


def test_a_snapshot_larger_than_a_part_goes_in_parts_and_comes_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cold_files, "MULTIPART_BYTES_MIN", 2 << 20)
    monkeypatch.setattr(cold_files, "PART_BYTES", 1 << 20)
    with Volume(make_tiered(tmp_path), "test") as opened:
        for number in range(40):
            put(opened, f"stored/{number}", os.urandom(100_000), inline_max=200_000)
        key = snapshots.take(opened, "archive")
        _, remote = opened.cold.remote("archive")
        assert remote.sealed.head(key).size > 3 << 20
        found = dict(snapshots.parse(remote.sealed.get(key).pieces))
        with opened.snapshot() as reader:
            for table in (b"I", b"D"):
                assert dict(reader.scan_prefix(table)) == {k: v for k, v in found.items() if k.startswith(table)}
        whole = b"".join(remote.sealed.get(key).pieces)
        assert dict(snapshots.parse(whole[at : at + 1] for at in range(len(whole)))) == found
        for cut in (0, 1, len(whole) // 2, len(whole) - 1):
            with pytest.raises(ValueError, match="cut off"):
                list(snapshots.parse([whole[:cut]]))


def test_a_snapshot_ends_with_the_volume(tmp_path: Path) -> None:
    with Volume(make_tiered(tmp_path), "test") as opened:
        put(opened, "k", b"x" * 1000)
        with pytest.raises(Busy):
            snapshots.take(opened, "archive", ending=lambda: True)
        taker = snapshots.IndexSnapshots(opened)
        assert not taker.run()
    assert taker._thread is not None
    assert not taker._thread.is_alive()


def test_what_a_bucket_snapshot_lost_does_not_stop_a_rebuild(tmp_path: Path) -> None:
    with Volume(make_tiered(tmp_path), "test") as opened:
        put(opened, "hot", b"h" * 50_000)
        put(opened, "d/cold", b"c" * 50_000)
        send(opened, "d/cold")
        clones.create_snapshot(opened, BUCKET.encode(), "monday")
        snapshots.take(opened, "archive")
    report, root = again(tmp_path)
    assert sorted(report.lost) == [f"{BUCKET}.snap.monday/hot", f"{BUCKET}/hot"]
    with Volume(root, "test") as opened:
        assert get(opened, "d/cold") == b"c" * 50_000
        assert get(opened, "d/cold", bucket=f"{BUCKET}.snap.monday") == b"c" * 50_000
        assert fsck.check(opened) == []
