"""Backups of the metadata: whole or refused, never over an open volume, and never a number given out twice."""

from __future__ import annotations

import gzip
import hashlib
import random
import threading
import zlib
from pathlib import Path

import pytest

from stratum import backup, drill, fsck, housekeeping, sessions
from stratum.errors import BackupDamaged, Busy, InvalidArgument, NotFound, VolumeInvalid
from stratum.schema import key_u64, pack_json, prefix_range
from stratum.volume import Volume
from tests.support import delete, get, make_volume, put

BODIES = {"inline": b"i" * 100, "extent": bytes(range(256)) * 2000, "tree/of/names": b"n" * 70_000}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "volume"
    make_volume(root)
    with Volume(root, "test") as opened:
        for key, body in BODIES.items():
            put(opened, key, body, inline_max=1000)
    return root


def save(root: Path, target: Path, *, keep: int = 0) -> Path:
    with Volume(root, "test") as opened:
        return backup.make(opened, target, keep=keep).path


def digest_of(root: Path) -> str:
    """Of every file below a folder but the log of who reads."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.name not in {"lock.mdb", "slots", "data.mdb", "journal", "checkpoint"}:
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


def test_a_restored_volume_is_what_was_saved_and_keeps_what_was_there(root: Path, tmp_path: Path) -> None:
    saved = save(root, tmp_path / "saved.tar.gz")
    assert saved.stat().st_mode & 0o777 == 0o600
    with Volume(root, "test") as opened:
        put(opened, "later", b"l" * 5000, inline_max=1000)
        delete(opened, "inline")
    told, replaced = backup.restore(saved, root)
    assert replaced is not None
    assert (replaced / "data.mdb").exists()
    with Volume(root, "test") as opened:
        assert told.instance == opened.instance
        assert {key: get(opened, key) for key in BODIES} == BODIES
        with pytest.raises(NotFound):
            get(opened, "later")
        assert [item for item in fsck.check(opened) if item.kind != "stray-file"] == []


def test_a_backup_is_one_committed_state_while_others_write(root: Path, tmp_path: Path) -> None:
    ending = threading.Event()

    def write(opened: Volume) -> None:
        number = 0
        while not ending.is_set():
            for name in ("a", "b"):
                put(opened, f"pair/{name}", str(number).encode())
            number += 1

    with Volume(root, "test") as opened:
        writer = threading.Thread(target=write, args=(opened,))
        writer.start()
        try:
            made = [backup.make(opened, tmp_path / f"{number}.tar.gz").path for number in range(5)]
        finally:
            ending.set()
            writer.join()
    for path in made:
        backup.restore(path, root)
        with Volume(root, "test") as opened:
            try:
                first, second = int(get(opened, "pair/a")), int(get(opened, "pair/b"))
            except NotFound:
                continue
            assert first - second in {0, 1}
            assert fsck.check(opened, data=False) == []


def test_numbers_given_out_after_the_backup_are_never_given_out_again(root: Path, tmp_path: Path) -> None:
    saved = save(root, tmp_path / "saved.tar.gz")
    with Volume(root, "test") as opened:
        newest = opened.new_id()
    backup.restore(saved, root)
    with Volume(root, "test") as opened:
        assert opened.new_id() >> 32 > (newest >> 32) + sessions.SKIPPED // 2
    # Also when nothing of the old metadata can be read: its data files tell.
    (root / "hot" / "00f00000").mkdir()
    (root / "meta" / "data.mdb").write_bytes(b"rubbish" * 4096)
    backup.restore(saved, root)
    with Volume(root, "test") as opened:
        assert opened.new_id() >> 32 > 0xF00000


def test_what_was_written_since_is_not_taken_for_something_else(root: Path, tmp_path: Path) -> None:
    """Rows of the restored state refer to the data files as they were, whatever was appended meanwhile."""
    with Volume(root, "test") as opened:
        saved = backup.make(opened, tmp_path / "saved.tar.gz").path
        put(opened, "extent", b"new" * 100_000, inline_max=1000)
        put(opened, "other", b"o" * 100_000, inline_max=1000)
    backup.restore(saved, root)
    with Volume(root, "test") as opened:
        housekeeping.run_once(opened)
        put(opened, "fresh", b"f" * 100_000, inline_max=1000)
        assert get(opened, "extent") == BODIES["extent"]
        assert get(opened, "fresh") == b"f" * 100_000
        assert fsck.check(opened) == []


def same_content(data: bytes, whole: bytes) -> bool:
    """A run of zeros may be copied from another place than before: not every changed bit changes something."""
    try:
        return gzip.decompress(data) == gzip.decompress(whole)
    except (OSError, EOFError, zlib.error):
        return False


def test_a_damaged_backup_is_refused_and_changes_nothing(root: Path, tmp_path: Path) -> None:
    saved = save(root, tmp_path / "saved.tar.gz")
    whole = saved.read_bytes()
    seed = 20261124
    choice = random.Random(seed)
    before = digest_of(root)
    bad = tmp_path / "bad.tar.gz"
    for attempt in range(80):
        if attempt % 2:
            data = whole[: choice.randrange(len(whole) - 8)]
        else:
            at = choice.randrange(10, len(whole))
            data = whole[:at] + bytes((whole[at] ^ (1 << choice.randrange(8)),)) + whole[at + 1 :]
        if same_content(data, whole):
            continue
        bad.write_bytes(data)
        with pytest.raises(BackupDamaged):
            backup.restore(bad, root)
        assert digest_of(root) == before, f"seed {seed}, attempt {attempt}"
    for data in (b"", b"no tar at all", (root / "stratum.toml").read_bytes()):
        bad.write_bytes(data)
        with pytest.raises(BackupDamaged):
            backup.verify(bad)
    with pytest.raises(NotFound):
        backup.verify(tmp_path / "nowhere")


def test_an_open_volume_and_a_stranger_s_folder_are_left_alone(root: Path, tmp_path: Path) -> None:
    saved = save(root, tmp_path / "saved.tar.gz")
    with Volume(root, "test") as opened:
        with pytest.raises(Busy, match="stop it first"):
            backup.restore(saved, root)
        assert get(opened, "extent") == BODIES["extent"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter").write_text("mine")
    with pytest.raises(VolumeInvalid):
        backup.restore(saved, other)
    assert [path.name for path in other.iterdir()] == ["letter"]


def test_data_folders_are_taken_over_only_when_told(root: Path, tmp_path: Path) -> None:
    text = (root / "stratum.toml").read_text().replace('hot = ["hot"]', f'hot = ["{root / "hot"}"]')
    (root / "stratum.toml").write_text(text)
    saved = save(root, tmp_path / "saved.tar.gz")
    with pytest.raises(InvalidArgument, match="--adopt-data"):
        backup.restore(saved, tmp_path / "new")
    assert not (tmp_path / "new" / "meta").exists()
    backup.restore(saved, tmp_path / "new", adopt=True)
    with Volume(tmp_path / "new", "test") as opened:
        assert get(opened, "extent") == BODIES["extent"]


def test_a_restore_that_fails_at_any_step_leaves_a_volume_or_can_be_repeated(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = save(root, tmp_path / "saved.tar.gz")
    rename = Path.rename
    for failing in (1, 2):
        calls: list[Path] = []

        def fail(self: Path, target: Path, failing: int = failing, calls: list[Path] = calls) -> Path:
            calls.append(self)
            if len(calls) == failing:
                raise OSError("the power is gone")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", fail)
        with pytest.raises(OSError, match="power"):
            backup.restore(saved, root)
        monkeypatch.setattr(Path, "rename", rename)
        backup.restore(saved, root)
        with Volume(root, "test") as opened:
            assert {key: get(opened, key) for key in BODIES} == BODIES


def test_the_mounts_of_then_are_forgotten(root: Path, tmp_path: Path) -> None:
    """Recovery behind them would detach what stands on their mountpoints now."""
    with Volume(root, "test") as opened:
        opened.mutate(lambda tx: tx.put(key_u64(b"T", 77), pack_json({"mountpoint": "/mnt"})))
        saved = backup.make(opened, tmp_path / "saved.tar.gz").path
        opened.mutate(lambda tx: tx.delete(key_u64(b"T", 77)))
    backup.restore(saved, root)
    with Volume(root, "test") as opened, opened.snapshot() as reader:
        assert list(reader.scan(*prefix_range(b"T"))) == []


def test_a_folder_keeps_the_newest_of_its_volume(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "backups"
    folder.mkdir()
    (folder / "stratum-0123456789ab-20200101-000000.tar.gz").write_text("of another volume")
    made = []
    with Volume(root, "test") as opened:
        for second in range(4):
            stamp = f"20261124-00000{second}"
            monkeypatch.setattr("time.strftime", lambda *_, stamp=stamp: stamp)
            made.append(backup.make(opened, folder, keep=2).path)
        with pytest.raises(InvalidArgument, match="exists"):
            backup.make(opened, folder, keep=2)
        assert backup.of_instance(folder, opened.instance) == made[2:]
        for target, word in (
            (tmp_path / "no" / "such", "no folder"),
            (opened.meta / "inside", "lies in the volume"),
            (made[3], "exists"),
        ):
            with pytest.raises(InvalidArgument, match=word):
                backup.make(opened, target)
    assert len(list(folder.iterdir())) == 3, "nothing half-made is left"


def test_the_drill_says_what_a_restore_would_bring_and_changes_nothing(root: Path, tmp_path: Path) -> None:
    save(root, tmp_path / "saved.tar.gz")
    before = digest_of(root)
    done = drill.drill(root, tmp_path / "saved.tar.gz", sample=10)
    assert (done.ok, done.files, done.sampled) == (True, 3, 3)
    assert done.read_bytes == sum(map(len, BODIES.values()))
    assert digest_of(root) == before
    with Volume(root, "test") as opened:
        delete(opened, "extent")
        housekeeping.run_once(opened)
    done = drill.drill(root, tmp_path / "saved.tar.gz", sample=10)
    assert (done.ok, done.changed, done.lost) == (True, 1, [])
    assert drill.drill(root, tmp_path / "saved.tar.gz", sample=1, seed=1).sampled == 1


def test_the_drill_finds_bytes_that_are_bad(root: Path, tmp_path: Path) -> None:
    saved = save(root, tmp_path / "saved.tar.gz")
    files = [path for path in (root / "hot").rglob("*") if path.is_file()]
    for path in files:
        path.write_bytes(bytes(path.stat().st_size))
    done = drill.drill(root, saved, sample=10)
    assert not done.ok
    assert len(done.lost) == 2, done.lost


def test_the_drill_wants_a_backup_of_this_volume(root: Path, tmp_path: Path) -> None:
    make_volume(tmp_path / "other")
    saved = save(tmp_path / "other", tmp_path / "other.tar.gz")
    with pytest.raises(InvalidArgument, match="another volume"):
        drill.drill(root, saved, sample=1)
    with pytest.raises(NotFound, match="no backup"):
        drill.drill(root, tmp_path, sample=1)
