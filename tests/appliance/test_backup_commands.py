"""Backup, restore and drill as somebody types them, beside a served volume."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from stratum import backup, backup_remote, cold, cold_files
from stratum.errors import InvalidArgument
from stratum.volume import Volume
from tests.support import make_volume, serving, stratum


def test_a_served_volume_is_backed_up_drilled_lost_and_restored(tmp_path: Path) -> None:
    folder = tmp_path / "backups"
    folder.mkdir()
    with serving(tmp_path) as server:
        s3 = server.client()
        s3.create_bucket(Bucket="photos")
        for number in range(20):
            s3.put_object(Bucket="photos", Key=f"{number}", Body=bytes((number,)) * (number * 5000))
        made = json.loads(stratum("meta", "backup", server.root, folder, "--keep", "2", "--json").stdout)
        stratum("meta", "verify", made["backup"])
        drilled = json.loads(stratum("drill", "restore", server.root, folder, "--json").stdout)
        assert (drilled["ok"], drilled["files"], drilled["sampled"]) == (True, 20, 20)
        refused = stratum("meta", "restore", server.root, made["backup"], expect=3)
        assert "stop it first" in refused.stderr
    (server.root / "meta" / "data.mdb").write_bytes(b"")
    assert stratum("fsck", server.root, expect=None).returncode not in {0, 1, 2}
    restored = json.loads(stratum("meta", "restore", server.root, made["backup"], "--json").stdout)
    assert restored["replaced"]
    stratum("fsck", server.root)
    server.start()
    try:
        s3 = server.client()
        for number in range(20):
            assert s3.get_object(Bucket="photos", Key=f"{number}")["Body"].read() == bytes((number,)) * (number * 5000)
        s3.put_object(Bucket="photos", Key="new", Body=b"n")
    finally:
        assert server.stop() == 0
    stratum("fsck", server.root)


def test_wrong_words_are_refused_with_what_to_do(tmp_path: Path) -> None:
    stratum("init", tmp_path / "volume")
    assert "at least 1" in stratum("meta", "backup", tmp_path / "volume", tmp_path, "--keep", "0", expect=6).stderr
    stratum("meta", "verify", tmp_path / "none", expect=4)
    stratum("meta", "verify", tmp_path / "volume" / "stratum.toml", expect=70)
    stratum("drill", "restore", tmp_path / "volume", tmp_path, "--sample", "-1", expect=2)
    stratum("drill", "restore", tmp_path / "volume", tmp_path, expect=4)


def test_a_backup_goes_to_a_remote_and_comes_back_from_it_alone(tmp_path: Path) -> None:
    root, remote, key = tmp_path / "volume", tmp_path / "remote", tmp_path / "key"
    folder = tmp_path / "backups"
    for made_folder in (folder, remote, tmp_path / "open", tmp_path / "empty"):
        made_folder.mkdir()
    key.write_text("ab" * 32)
    key.chmod(0o600)
    stratum("init", root)
    stratum("bucket", "create", root, "photos")
    stratum("cold", "add", root, "open", "--directory", tmp_path / "open")
    refused = stratum("meta", "backup", root, folder, "--to-cold", "open", expect=6)
    assert "--unencrypted" in refused.stderr
    assert list(folder.iterdir()) == []
    stratum("cold", "add", root, "far", "--directory", remote, "--encryption-key", key)
    for number in range(3):
        target = tmp_path / f"saved-{number}.tar.gz"
        made = json.loads(stratum("meta", "backup", root, target, "--to-cold", "far", "--json").stdout)
        assert "/_backup/" in made["remote_key"]
        time.sleep(1.01)  # names count seconds
    sent = [path for path in (remote / "objects").rglob("*") if path.is_file() and "/_backup/" in str(path)]
    assert len(sent) == 3
    assert not any(b"photos" in path.read_bytes() or path.read_bytes().startswith(b"\x1f\x8b") for path in sent)
    assert stratum("cold", "check", root, "far").returncode == 0
    shutil.rmtree(root)
    words = ("--directory", remote, "--encryption-key", key)
    stratum("meta", "fetch", folder, "--directory", remote, expect=None)
    assert list(folder.iterdir()) == []
    fetched = json.loads(stratum("meta", "fetch", folder, *words, "--json").stdout)
    assert Path(fetched["backup"]).read_bytes() == (tmp_path / "saved-2.tar.gz").read_bytes()
    assert stratum("meta", "fetch", fetched["backup"], *words, expect=6).returncode
    assert "no volume" not in stratum("meta", "fetch", folder, "--directory", tmp_path / "empty", expect=4).stderr
    stratum("meta", "restore", root, fetched["backup"])
    assert "photos" in stratum("bucket", "list", root).stdout
    stratum("rebuild", tmp_path / "again", "--from-cold", "far", *words)


def test_a_large_backup_is_sent_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cold_files, "MULTIPART_BYTES_MIN", 1)
    monkeypatch.setattr(cold_files, "PART_BYTES", 4096)
    root = tmp_path / "volume"
    make_volume(root)
    (tmp_path / "remote").mkdir()
    stratum("cold", "add", root, "far", "--directory", tmp_path / "remote")
    told: list[tuple[int, int]] = []
    with Volume(root, "test") as opened:
        with pytest.raises(InvalidArgument):
            backup_remote.check(opened, "far", plain=False)
        made = backup.make(opened, tmp_path)
        for number in range(3):
            made.made_s += number
            key = backup_remote.send(opened, made, "far", keep=2, watch=lambda *far: told.append(far))
        with opened.snapshot() as reader:
            row = cold.get_row(reader, "far")
        _, remote = opened.cold.remote("far")
        kept = [info.key for info in remote.sealed.list(key.rpartition("/")[0])]
    assert kept[-1] == key
    assert len(kept) == 2
    assert told[-1] == (2 * made.size, 2 * made.size)
    fetched = backup_remote.fetch(row, tmp_path / "fetched", lambda _done, _total: None)
    assert fetched.path.read_bytes() == made.path.read_bytes()
