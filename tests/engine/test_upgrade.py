"""Formats: a newer one is refused, an older one is upgraded in place, after a backup, and interrupted anywhere it goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from stratum import backup, buckets, clones, config, files, fsck, tree, upgrade
from stratum.errors import Busy, InvalidArgument, VolumeInvalid
from stratum.kv.lmdb_store import LmdbStore
from stratum.manifest import Names
from stratum.schema import FORMAT_VERSION, Inode, pack_json, pack_u64, unpack_json, unpack_u64
from stratum.volume import Volume
from tests.support import BUCKET, get, make_volume, put

if TYPE_CHECKING:
    from pathlib import Path

    from stratum.transaction import MetadataTransaction

KEYS = [b"d/e/f", b"d/" + b"long" * 120, b"d/", b"d/e/" + b"long" * 120 + b"/g", b"h"]
LINKED = {b"h", b"d/second", b"d/e/" + b"long" * 60}
NAMES = [BUCKET, *(f"more-{number}" for number in range(7))]


def set_format(root: Path, version: int) -> None:
    with backup.opened_store(root / "meta", config.load(root)) as store, store.transact() as tx:
        tx.put(b"Cformat", pack_u64(version))


def get_format(root: Path) -> int:
    with backup.opened_store(root / "meta", config.load(root)) as store, store.snapshot() as snapshot:
        return int(unpack_u64(snapshot.get(b"Cformat") or b"")[0])


def give_names(tx: MetadataTransaction) -> None:
    """Hard links, of which the newest name goes again."""
    number = clones.find(tx, b"bucket/h").number
    folder = clones.find(tx, b"bucket/d/e").number
    files.link(tx, number, clones.find(tx, b"bucket/d").number, b"second")
    for name in (b"long" * 60, b"gone"):
        files.link(tx, number, folder, name)
    files.unlink(tx, folder, b"gone", lambda _: False)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A volume as a program of format 1 left it."""
    root = tmp_path / "volume"
    user = make_volume(root)
    with Volume(root, "test") as opened:
        for name in NAMES[1:]:
            opened.mutate(lambda tx, name=name: buckets.create(tx, name, user))  # type: ignore[misc]  # bound now, called in time
        put(opened, "key", b"body" * 10_000)
        for key in KEYS:
            put(opened, key, b"x")
        opened.mutate(give_names)
    with backup.opened_store(root / "meta", config.load(root)) as store, store.transact() as tx:
        for key, raw in list(tx.scan(b"B", b"C")):
            row = unpack_json(raw)
            del row["audit_reads"]
            tx.put(key, pack_json(row))
        tx.delete(b"ginstance")
        for number_key, raw in list(tx.scan(b"I", b"J")):
            inode = Inode.unpack(unpack_u64(number_key[1:])[0], raw)
            inode.flags &= ~Inode.SEVERAL_NAMES
            tx.put(number_key, inode.pack_attributes())
        for name_key, _ in list(tx.scan(b"i", b"j")):
            tx.delete(name_key)
        tx.put(b"Cformat", pack_u64(1))
    return root


def check(root: Path) -> None:
    with Volume(root, "test") as opened:
        assert get(opened, "key") == b"body" * 10_000
        assert opened.instance
        with opened.snapshot() as reader:
            assert sorted(name for name, _ in buckets.scan(reader)) == sorted(NAMES)
            assert all("audit_reads" in unpack_json(raw) for _, raw in reader.scan(b"B", b"C"))
            assert reader.get(b"gupgrade") is None
            for key in KEYS:
                inode = tree.find_object(reader, buckets.get(reader, BUCKET), key)
                assert inode is not None
                _, found = Names(reader).of(inode)
                assert set(found) == (LINKED if key in LINKED else {key})
        assert fsck.check(opened) == []


def test_a_newer_volume_is_refused_and_left_alone(tmp_path: Path) -> None:
    root = tmp_path / "volume"
    make_volume(root)
    set_format(root, FORMAT_VERSION + 1)
    with pytest.raises(VolumeInvalid, match="newer"):
        Volume(root, "test")
    with pytest.raises(VolumeInvalid, match="newer"):
        upgrade.upgrade(root, tmp_path)
    assert get_format(root) == FORMAT_VERSION + 1


def test_an_older_volume_says_what_to_do_and_is_upgraded_after_a_backup(old: Path, tmp_path: Path) -> None:
    with pytest.raises(VolumeInvalid, match=r"stratum upgrade .* --backup"):
        Volume(old, "test")
    with pytest.raises(InvalidArgument, match="--backup"):
        upgrade.upgrade(old, None)
    with pytest.raises(InvalidArgument):
        upgrade.upgrade(old, tmp_path / "no" / "folder")
    assert get_format(old) == 1
    done = upgrade.upgrade(old, tmp_path)
    assert (done.before, done.after) == (1, FORMAT_VERSION)
    check(old)
    assert upgrade.upgrade(old, None) == upgrade.Upgraded(FORMAT_VERSION, FORMAT_VERSION, None)
    assert done.backup is not None
    backup.restore(done.backup, old)
    assert get_format(old) == 1, "the way back"
    upgrade.upgrade(old, tmp_path / "again.tar.gz")
    check(old)


def test_interrupted_at_any_commit_it_goes_on(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upgrade, "ROWS_AT_ONCE", 2)
    real = LmdbStore.transact
    saved = tmp_path / "saved.tar.gz"
    interrupted = 0
    for allowed in range(40):
        count = 0

        def limited(self: LmdbStore, allowed: int = allowed) -> Any:
            nonlocal count
            count += 1
            if count > allowed:
                raise KeyboardInterrupt
            return real(self)

        monkeypatch.setattr(LmdbStore, "transact", limited)
        try:
            upgrade.upgrade(old, saved)
        except KeyboardInterrupt:
            interrupted += 1
            monkeypatch.setattr(LmdbStore, "transact", real)
            with pytest.raises(VolumeInvalid, match="interrupted" if allowed else "--backup"):
                Volume(old, "test")
            # Each try goes on a little from where the first one began anew.
            first = backup.verify(saved)
            if allowed:
                upgrade.upgrade(old, None)
                check(old)
                backup.restore(saved, old)
            assert first.rows
            saved.unlink()
        else:
            break
        finally:
            monkeypatch.setattr(LmdbStore, "transact", real)
    assert interrupted > 4
    check(old)


def test_an_open_volume_is_left_alone(tmp_path: Path) -> None:
    root = tmp_path / "volume"
    make_volume(root)
    with Volume(root, "test"), pytest.raises(Busy):
        upgrade.upgrade(root, tmp_path)


def test_every_format_has_its_step() -> None:
    assert sorted(upgrade.STEPS) == list(range(1, FORMAT_VERSION))
