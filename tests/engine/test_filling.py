"""Clones are filled in behind everybody's back: whoever looks, whenever, sees what was cloned, and nobody waits for all of it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from stratum import (
    backup,
    buckets,
    clones,
    content,
    files,
    filling,
    frozen,
    fsck,
    housekeeping,
    leaks,
    listing,
    quotas,
)
from stratum.errors import NoSuchKey, NotFound, QuotaExceeded
from stratum.files import Attributes, Caller
from stratum.kv.memory_store import MemoryStore
from stratum.schema import key_u64, prefix_range
from stratum.transaction import MetadataTransaction
from stratum.volume import Volume
from tests.engine.test_clones import number_of, shape_of
from tests.engine.test_reclaim import allocated
from tests.support import BUCKET, delete, get, make_volume, put

if TYPE_CHECKING:
    from pathlib import Path

ME = Caller(0, 0)


def nobody(_: int) -> bool:
    return False


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages are small."""
    monkeypatch.setattr(filling, "ENTRIES_AT_ONCE", 3)
    monkeypatch.setattr(filling, "SLICES_AT_ONCE", 2)


def waiting(opened: Volume) -> list[int]:
    with opened.snapshot() as reader:
        return [number for number, _ in frozen.scan_waiting(reader, 1 << 20)]


def settle(opened: Volume) -> None:
    """Fill everything, and find nothing wrong and nothing left."""
    filling.fill_all(opened)
    while opened.mutate(frozen.collect):
        pass
    with opened.snapshot() as reader:
        for table in (b"e", b"k", b"w", b"x", b"y", frozen.ACTIVE):
            assert next(reader.scan(*prefix_range(table)), None) is None, table
    housekeeping.run_once(opened)
    assert fsck.check(opened) == []
    assert leaks.collect(opened) == []


# -- frozen states ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_a_frozen_state_stays_what_it_was(seed: int) -> None:
    chance = random.Random(seed)
    store = MemoryStore()
    dentries = [b"D" + bytes((number,)) * 8 + name for number in range(2) for name in (b"a", b"b", b"c", b"d\xff")]
    inodes = [key_u64(b"I", number) for number in range(4)]
    states: dict[int, dict[bytes, bytes]] = {}
    for _ in range(120):
        with store.transact() as kv:
            tx = MetadataTransaction(kv, 0, lambda: 0)
            for _ in range(chance.randrange(4)):
                key = chance.choice(dentries + inodes)
                if chance.random() < 0.4:
                    tx.delete(key)
                else:
                    tx.put(key, bytes((chance.randrange(256),)))
                if chance.random() < 0.1 and len(states) < 6:
                    freeze = frozen.begin(tx, 7, 8)
                    states[freeze] = dict(tx.kv.scan(b"D", b"J"))
            if states and chance.random() < 0.03:
                ended = chance.choice(list(states))
                del states[ended]
                frozen.end_if_unused(tx, ended)
            if chance.random() < 0.2:
                frozen.collect(tx)
        with store.snapshot() as snapshot:
            for freeze, rows in states.items():
                reader = filling.FrozenReader(snapshot, freeze)
                assert list(reader.scan(b"D", b"E")) == sorted((k, v) for k, v in rows.items() if k[:1] == b"D")
                start, stop = sorted(chance.sample([*dentries, *inodes, b"D", b"E", b"J"], 2))
                wanted = sorted((k, v) for k, v in rows.items() if start <= k < stop)
                assert list(reader.scan(start, stop)) == wanted
                assert reader.first_rows(start, stop, 2) == wanted[:2]
                assert all(reader.get(key) == rows.get(key) for key in dentries + inodes)


# -- one thing at a time ------------------------------------------------------------------------------------------------


def test_a_freeze_knows_what_its_own_transaction_did_before_it(opened: Volume) -> None:
    put(opened, "a", b"x")
    number = number_of(opened, b"bucket/a")

    def change(tx: MetadataTransaction) -> int:
        files.set_attributes(tx, number, Attributes(mode=0o600))
        freeze = frozen.begin(tx, number_of_bucket, number_of_bucket)
        files.set_attributes(tx, number, Attributes(mode=0o640))
        return freeze

    number_of_bucket = number_of(opened, BUCKET.encode())
    freeze = opened.mutate(change)
    with opened.snapshot() as reader:
        assert filling.FrozenReader(reader.kv, freeze).inode(number).mode == 0o600
        assert reader.inode(number).mode == 0o640


@pytest.mark.usefixtures("small_pages")
def test_it_takes_as_long_whatever_there_is(opened: Volume) -> None:
    """The same few commits, and nothing copied but the directory itself."""
    counts = []
    for size in (5, 200):
        for number in range(size):
            put(opened, f"d{size}/{number:03}/f", b"x")
        with opened.snapshot() as reader:
            rows, before = sum(1 for _ in reader.scan(b"I", b"J")), opened.committer.mutations
        clones.clone(opened, f"bucket/d{size}".encode(), f"bucket-{size}".encode())
        with opened.snapshot() as reader:
            counts.append((sum(1 for _ in reader.scan(b"I", b"J")) - rows, opened.committer.mutations - before))
    assert counts == [(1, 2), (1, 2)]
    assert get(opened, "150/f", bucket="bucket-200") == b"x"
    with opened.snapshot() as reader:  # the way to it, and nothing beside it
        assert sum(1 for _ in reader.scan(b"I", b"J")) - rows == 3
    settle(opened)


@pytest.mark.usefixtures("small_pages")
def test_a_directory_emptied_before_it_was_filled_can_go(opened: Volume) -> None:
    for number in range(8):
        put(opened, f"d/e/{number}", b"x")
    clones.clone(opened, b"bucket/d", b"bucket/copy")
    for number in range(8):
        delete(opened, f"copy/e/{number}")
    assert not waiting(opened)  # S3 takes emptied directories along: `copy` has gone with `e`
    with pytest.raises(NotFound):
        number_of(opened, b"bucket/copy")
    settle(opened)


@pytest.mark.usefixtures("small_pages")
def test_a_link_keeps_what_was_written_through_another(opened: Volume) -> None:
    put(opened, "d/a/one", b"x")
    put(opened, "d/b/else", b"x")
    one, two, out = (number_of(opened, path) for path in (b"bucket/d/a/one", b"bucket/d/b", b"bucket"))
    opened.mutate(lambda tx: files.link(tx, one, two, b"two"))
    opened.mutate(lambda tx: files.link(tx, one, out, b"outside"))
    clones.clone(opened, b"bucket/d", b"bucket/copy")
    copied, parent = number_of(opened, b"bucket/copy/a/one"), number_of(opened, b"bucket/copy/a")
    with opened.snapshot() as reader:
        assert reader.inode(copied).nlink == 2
    opened.mutate(lambda tx: files.set_attributes(tx, copied, Attributes(mode=0o600)))
    opened.mutate(lambda tx: files.unlink(tx, parent, b"one", nobody))
    assert number_of(opened, b"bucket/copy/b/two") == copied
    with opened.snapshot() as reader:
        assert (reader.inode(copied).nlink, reader.inode(copied).mode) == (1, 0o600)
        assert reader.inode(one).nlink == 3
    settle(opened)


@pytest.mark.usefixtures("small_pages")
def test_a_snapshot_that_was_never_filled_is_removed_with_its_links(opened: Volume) -> None:
    put(opened, "a/one", b"x" * 100_000)
    put(opened, "b/else", b"x")
    one, two = number_of(opened, b"bucket/a/one"), number_of(opened, b"bucket/b")
    opened.mutate(lambda tx: files.link(tx, one, two, b"two"))
    name = clones.create_snapshot(opened, b"bucket", "s")
    assert get(opened, "a/one", bucket=name) == b"x" * 100_000
    delete(opened, "a/one")
    delete(opened, "b/two")
    clones.remove_snapshot(opened, b"bucket", "s")
    settle(opened)
    assert allocated(opened) == 0


def in_pieces(opened: Volume, key: str, pieces: int) -> bytes:
    """A file of many extents."""
    parts = [os.urandom(20_000) for _ in range(pieces)]
    put(opened, key, b"")
    number = number_of(opened, f"bucket/{key}".encode())
    for at, part in enumerate(parts):
        put(opened, "part", part)
        source = number_of(opened, b"bucket/part")

        def move(tx: MetadataTransaction, at: int = at, source: int = source) -> None:
            target = tx.inode(number)
            content.share(tx, tx.inode(source), target, at=at * 20_000)
            tx.dirty(target)

        opened.mutate(move)
    delete(opened, "part")
    return b"".join(parts)


@pytest.mark.usefixtures("small_pages")
def test_a_file_of_many_extents_is_copied_in_pieces(opened: Volume) -> None:
    data = in_pieces(opened, "d/many", 9)
    clones.clone(opened, b"bucket/d", b"bucket/copy")
    delete(opened, "d/many")
    before = opened.committer.mutations
    assert get(opened, "copy/many") == data
    assert opened.committer.mutations - before >= 6
    clones.clone(opened, b"bucket/copy/many", b"bucket/again")
    assert get(opened, "again") == data
    clones.clone(opened, b"bucket/copy", b"bucket/copy2")
    put(opened, "copy2/many", b"overwritten before it was there")
    delete(opened, "copy/many")
    delete(opened, "again")
    settle(opened)
    assert allocated(opened) == 0


@pytest.mark.usefixtures("small_pages")
def test_what_was_copied_in_pieces_for_nothing_goes(opened: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else fills it in meanwhile."""
    data = in_pieces(opened, "d/many", 9)
    clones.clone(opened, b"bucket/d", b"bucket/copy")
    copy_file = filling.copy_file

    def overtaken(volume: Volume, *args: Any, **kwargs: Any) -> int:
        monkeypatch.setattr(filling, "copy_file", copy_file)
        number = copy_file(volume, *args, **kwargs)
        filling.fill_all(volume)
        return number

    monkeypatch.setattr(filling, "copy_file", overtaken)
    assert get(opened, "copy/many") == data
    settle(opened)
    with opened.snapshot() as reader:
        assert next(reader.scan(*prefix_range(b"Q")), None) is None


@pytest.mark.usefixtures("small_pages")
def test_a_quota_is_asked_before_a_clone_appears(opened: Volume) -> None:
    for number in range(10):
        put(opened, f"d/{number}/f", b"x" * 1000)
    bucket = number_of(opened, b"bucket")
    opened.mutate(lambda tx: quotas.set_bucket(tx, bucket, quotas.Quota(bytes=15_000)))
    with pytest.raises(QuotaExceeded):
        clones.clone(opened, b"bucket/d", b"bucket/copy")
    with pytest.raises(NotFound):
        number_of(opened, b"bucket/copy")
    settle(opened)
    opened.mutate(lambda tx: quotas.set_bucket(tx, bucket, quotas.Quota(bytes=25_000)))
    clones.clone(opened, b"bucket/d", b"bucket/copy")
    assert not waiting(opened)
    settle(opened)


def test_a_quota_set_later_does_not_keep_a_clone_from_its_files(
    opened: Volume,
    small_pages: None,
) -> None:
    for number in range(10):
        put(opened, f"d/{number}/f", b"x" * 1000)
    clones.clone(opened, b"bucket/d", b"bucket/copy")
    bucket = number_of(opened, b"bucket")
    opened.mutate(lambda tx: quotas.set_bucket(tx, bucket, quotas.Quota(bytes=12_000)))
    assert get(opened, "copy/7/f") == b"x" * 1000
    settle(opened)
    with pytest.raises(QuotaExceeded):
        put(opened, "more", b"x")


@pytest.mark.usefixtures("small_pages")
def test_what_no_clone_waits_for_is_reclaimed_at_once(opened: Volume) -> None:
    for key in ("d/e/kept", "d/e/moved", "other", "new"):
        put(opened, key, os.urandom(1_000_000))
    kept, moved = get(opened, "d/e/kept"), get(opened, "d/e/moved")
    clones.clone(opened, b"bucket/d", b"bucket/copy")
    put(opened, "d/e/new", os.urandom(1_000_000))
    before, root = number_of(opened, b"bucket/d/e"), number_of(opened, b"bucket")
    opened.mutate(lambda tx: files.rename(tx, before, b"moved", root, b"moved", 0, nobody))
    for key in ("d/e/kept", "moved", "other", "new", "d/e/new"):
        delete(opened, key)
    housekeeping.run_once(opened)
    assert 2_000_000 <= allocated(opened) < 3_000_000
    assert (get(opened, "copy/e/kept"), get(opened, "copy/e/moved")) == (kept, moved)
    settle(opened)
    delete(opened, "copy/e/kept")
    delete(opened, "copy/e/moved")
    housekeeping.run_once(opened)
    assert allocated(opened) == 0


def test_the_housekeeper_fills_and_waits_for_space(opened: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(10):
        put(opened, f"d/{number}/f", b"x")
    clones.clone(opened, b"bucket/d", b"bucket/copy")
    background = filling.Background(opened, lambda: False)
    with monkeypatch.context() as patch:
        patch.setattr(opened.committer, "_may_grow", lambda: False)
        background.run()
        assert waiting(opened)
        assert get(opened, "copy/5/f") == b"x"  # who asks gets it: of what is there one can make room
    background.run()
    assert waiting(opened), "it does not try each second"
    background = filling.Background(opened, lambda: False)
    background.run()
    assert not waiting(opened)
    with opened.snapshot() as reader:
        assert not reader.any_frozen


@pytest.mark.usefixtures("small_pages")
def test_a_long_directory_is_listed_and_looked_into_in_any_order(opened: Volume) -> None:
    keys = [f"d/{number:03}" for number in range(60)]
    for key in keys:
        put(opened, key, key.encode())
    before = shape_of(opened, number_of(opened, b"bucket/d"))
    clones.clone(opened, b"bucket/d", b"bucket/copy")
    for number in (50, 7, 31):
        assert get(opened, f"copy/{number:03}") == f"d/{number:03}".encode()
    assert objects_below(opened) == 63
    delete(opened, "copy/031")
    put(opened, "copy/031", b"new")
    put(opened, "copy/0310", b"between")
    delete(opened, "copy/050")

    def page(after: bytes) -> list[bytes]:
        with opened.snapshot() as reader:
            found = listing.list_page(reader, buckets.get(reader, BUCKET), prefix=b"copy/", after=after, limit=10)
            return [key for key, *_ in found.objects]

    listed: list[bytes] = []
    while found := filling.patiently(opened, partial(page, listed[-1] if listed else b"")):
        listed += found
    wanted = {f"copy/{number:03}".encode() for number in range(60)} - {b"copy/050"} | {b"copy/0310"}
    assert listed == sorted(wanted)
    assert get(opened, "copy/031") == b"new"
    clones.clone(opened, b"bucket/d", b"other")
    assert shape_of(opened, number_of(opened, b"other")) == before
    settle(opened)


def objects_below(opened: Volume) -> int:
    with opened.snapshot() as reader:
        return buckets.usage(reader, buckets.get(reader, BUCKET))[0]


@pytest.mark.usefixtures("small_pages")
def test_several_fill_at_once(opened: Volume) -> None:
    for number in range(200):
        put(opened, f"d/{number % 7}/{number:03}", b"x")
    before = shape_of(opened, number_of(opened, b"bucket/d"))
    clones.clone(opened, b"bucket/d", b"copy")
    threads = [threading.Thread(target=filling.fill_all, args=(opened,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(0, 200, 9):
        assert get(opened, f"{number % 7}/{number:03}", bucket="copy") == b"x"
    for thread in threads:
        thread.join()
    assert shape_of(opened, number_of(opened, b"copy")) == before
    settle(opened)


@pytest.mark.parametrize("commits", range(1, 14))
def test_whoever_makes_or_fills_a_clone_may_be_killed_anywhere(opened: Volume, commits: int) -> None:
    for number in range(12):
        put(opened, f"d/{number % 2}/{number:03}", b"x")
    data = in_pieces(opened, "d/many", 5)
    source = number_of(opened, b"bucket/d")
    before = shape_of(opened, source)
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom stratum import clones, filling\nfrom stratum.committer import Committer\n"
        "from stratum.volume import Volume\nfilling.ENTRIES_AT_ONCE, filling.SLICES_AT_ONCE = 3, 2\nleft = int(sys.argv[2])\n"
        "attempt = Committer._attempt\ndef counted(self, *args, **kwargs):\n    global left\n    done = attempt(self, *args, **kwargs)\n"
        "    left -= 1\n    if left == 0:\n        os.kill(os.getpid(), signal.SIGKILL)\n    return done\n"
        "volume = Volume(Path(sys.argv[1]), 'clone')\nCommitter._attempt = counted\n"
        "clones.clone(volume, b'bucket/d', b'bucket/copy', wait=True)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(opened.root), str(commits)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    try:
        assert shape_of(opened, number_of(opened, b"bucket/copy")) == before
    except NotFound:
        assert commits == 1
    else:
        assert commits > 1
        assert get(opened, "copy/many") == data
    assert shape_of(opened, source) == before
    housekeeping.run_once(opened)
    settle(opened)
    with opened.snapshot() as reader:
        assert next(reader.scan(*prefix_range(b"Q")), None) is None


@pytest.mark.usefixtures("small_pages")
def test_fsck_fills_first(opened: Volume) -> None:
    put(opened, "d/e/f", b"x")
    clones.clone(opened, b"bucket/d", b"bucket/copy")
    assert fsck.check(opened) == []
    assert not waiting(opened)
    clones.clone(opened, b"bucket/d", b"bucket/copy2")
    opened.committer._may_grow = lambda: False
    assert [finding.kind for finding in fsck.check(opened)] == ["unfilled-clone"]


@pytest.mark.usefixtures("small_pages")
def test_what_the_source_has_lost_the_clone_goes_without(opened: Volume) -> None:
    for name in "fgh":
        put(opened, f"d/e/{name}", b"x" * 50_000)
    lost, broken = number_of(opened, b"bucket/d/e/g"), number_of(opened, b"bucket/d/e/h")
    with opened.snapshot() as reader:
        extent = reader.slices(broken)[0].extent
    with opened.store.transact() as tx:  # as a disk that forgets would
        tx.delete(key_u64(b"I", lost))
        tx.delete(key_u64(b"X", extent))
    clones.clone(opened, b"bucket/d", b"bucket/copy", wait=True)
    assert get(opened, "copy/e/f") == b"x" * 50_000
    with pytest.raises(NotFound, match="has no row"):
        get(opened, "copy/e/h")
    with pytest.raises(NoSuchKey):
        get(opened, "copy/e/g")
    found = {(finding.kind, finding.thing) for finding in fsck.check(opened)}
    e, copied = (number_of(opened, path) for path in (b"bucket/d/e", b"bucket/copy/e"))
    assert ("dangling-entry", f"entry b'g' of directory {e:#x}") in found
    assert not any(f"{copied:#x}" in thing for _, thing in found)


@pytest.mark.usefixtures("small_pages")
def test_a_directory_that_lost_its_own_object_is_cloned_without(opened: Volume) -> None:
    put(opened, "d/e/", b"x" * 100)
    put(opened, "d/e/f", b"x" * 50_000)
    with opened.snapshot() as reader:
        owned = reader.inode(number_of(opened, b"bucket/d/e")).object_inode
    assert owned
    with opened.store.transact() as tx:
        tx.delete(key_u64(b"I", owned))
    clones.clone(opened, b"bucket/d", b"bucket/copy", wait=True)
    assert get(opened, "copy/e/f") == b"x" * 50_000
    with pytest.raises(NoSuchKey):
        get(opened, "copy/e/")
    copied = number_of(opened, b"bucket/copy/e")
    assert not any(f"{copied:#x}" in finding.thing for finding in fsck.check(opened))


@pytest.mark.usefixtures("small_pages")
def test_a_backup_of_a_volume_with_a_clone_that_waits(tmp_path: Path) -> None:
    root = tmp_path / "volume"
    make_volume(root)
    with Volume(root, "test") as opened:
        put(opened, "d/f", b"x" * 100_000)
        clones.clone(opened, b"bucket/d", b"bucket/copy")
        delete(opened, "d/f")
        made = backup.make(opened, tmp_path / "saved.tar.gz")
    backup.restore(made.path, root)
    with Volume(root, "test") as restored:
        assert waiting(restored)
        housekeeping.run_once(restored)
        assert get(restored, "copy/f") == b"x" * 100_000
        settle(restored)
