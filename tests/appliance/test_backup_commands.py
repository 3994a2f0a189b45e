"""Backup, restore and drill as somebody types them, beside a served volume."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tests.support import serving, stratum

if TYPE_CHECKING:
    from pathlib import Path


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
    stratum("drill", "restore", tmp_path / "volume", tmp_path, "--sample", "-1", expect=6)
    stratum("drill", "restore", tmp_path / "volume", tmp_path, expect=4)
