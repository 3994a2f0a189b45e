"""A folder that is not there may be a disk that is not mounted: no command makes it unless it is told to."""

from __future__ import annotations

import json
import stat
from typing import TYPE_CHECKING

import pytest

from stratum import warm_disks
from stratum.volume import Volume
from tests.support import stratum

if TYPE_CHECKING:
    from pathlib import Path


def test_init_makes_no_folder_for_data_elsewhere(tmp_path: Path) -> None:
    for option in ("--hot", "--warm"):
        words = [option, str(tmp_path / "gone"), *(["--ec", "1+0"] if option == "--warm" else [])]
        stratum("init", tmp_path / "v", *words, expect=6)
        assert not (tmp_path / "v").exists()
        assert not (tmp_path / "gone").exists()
    words = [word for name in ("d0", "d1", "d2") for word in ("--warm", str(tmp_path / name))]
    done = stratum("init", tmp_path / "v", "--hot", tmp_path / "hot", *words, "--ec", "2+1", expect=6)
    assert "--create" in done.stderr
    assert "mount the disk" in done.stderr
    stratum("init", tmp_path / "v", "--hot", tmp_path / "hot", *words, "--ec", "2+1", "--create")
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("hot", "d0", "d1", "d2")} == {0o700}


@pytest.fixture
def warm(tmp_path: Path) -> Path:
    root = tmp_path / "v"
    words = [word for name in ("d0", "d1", "d2") for word in ("--warm", str(tmp_path / name))]
    stratum("init", root, *words, "--ec", "2+1", "--create")
    return root


def states(root: Path) -> dict[str, str]:
    return {disk["path"]: disk["state"] for disk in json.loads(stratum("disk", "list", root, "--json").stdout)["disks"]}


def test_a_disk_that_is_not_there_is_not_added(warm: Path, tmp_path: Path) -> None:
    gone = tmp_path / "below" / "gone"
    before = states(warm)
    assert "--create" in stratum("disk", "add", warm, gone, expect=6).stderr
    stratum("disk", "replace", warm, tmp_path / "d1", gone, expect=6)
    assert states(warm) == before, "the old disk goes on"
    assert not gone.parent.exists()
    (tmp_path / "file").write_text("")
    assert "no folder" in stratum("disk", "add", warm, tmp_path / "file", "--create", expect=6).stderr
    stratum("disk", "add", warm, gone, "--create")
    assert states(warm)[str(gone)] == "active"


def test_a_disk_that_was_unmounted_is_not_written_to(warm: Path, tmp_path: Path) -> None:
    """Its mountpoint is an empty folder of the disk above it."""
    with Volume(warm, "test") as opened:
        name = tmp_path / "d1" / warm_disks.shard_name(opened.new_id(), 0)
        (tmp_path / "d1").rename(tmp_path / "away")
        for mountpoint in (False, True):
            if mountpoint:
                (tmp_path / "d1").mkdir()
            with pytest.raises(FileNotFoundError):
                opened.warm._write_file(name, [b"shard"])
        assert list((tmp_path / "d1").iterdir()) == []
        (tmp_path / "d1").rmdir()
        (tmp_path / "away").rename(tmp_path / "d1")
        opened.warm._write_file(name, [b"shard"])
    assert name.read_bytes() == b"shard"


def test_a_backup_goes_to_a_folder_that_is_there(warm: Path, tmp_path: Path) -> None:
    folder = tmp_path / "backups"
    refused = stratum("meta", "backup", warm, folder, expect=6)
    assert "--create" in refused.stderr
    assert not folder.exists()
    made = json.loads(stratum("meta", "backup", warm, folder, "--create", "--json").stdout)
    assert folder.is_dir()
    assert made["backup"].startswith(f"{folder}/stratum-")
    stratum("meta", "backup", warm, folder / "mine.tar.gz")
    assert (folder / "mine.tar.gz").is_file()
    stratum("meta", "backup", warm, tmp_path / "other" / "mine.tar.gz", expect=6)
    stratum("upgrade", warm, "--backup", tmp_path / "other", expect=6)
