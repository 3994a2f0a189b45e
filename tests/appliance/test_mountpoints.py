"""Where a volume may be mounted: not where it lies, not in another mount, not over files that nobody would see any more."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

import pytest

from stratum import health
from stratum.cli.exit_codes import COULD_NOT_RUN, REFUSED
from stratum.volume import Volume
from tests.support import Server, make_volume, need_fuse, serving, stratum

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    "where", [".", "..", "hot", "meta", "hot/deep", "../fast", "../link/volume", "../fast/disk/below"]
)
def test_a_volume_is_not_mounted_where_it_lies(tmp_path: Path, where: str) -> None:
    """The daemon would wait for itself in the kernel, for ever."""
    need_fuse()
    root = tmp_path / "volume"
    (tmp_path / "link").symlink_to(tmp_path)
    words: list[str | Path] = ["init", root, "--hot", root / "hot", "--hot", tmp_path / "fast" / "disk", "--create"]
    refused = stratum(*words, "--mount", root / where, expect=REFUSED)
    assert "the mountpoint" in refused.stderr
    assert not root.exists()
    stratum(*words)
    (root / where).mkdir(parents=True, exist_ok=True)
    refused = stratum("mount", root, root / where, expect=COULD_NOT_RUN)
    assert "choose another folder" in refused.stderr


def test_a_bind_mount_of_the_volume_is_the_volume(tmp_path: Path) -> None:
    need_fuse()
    make_volume(tmp_path / "volume")
    (tmp_path / "bound").mkdir()
    subprocess.run(["mount", "--bind", tmp_path / "volume" / "hot", tmp_path / "bound"], check=True)
    try:
        refused = stratum("mount", tmp_path / "volume", tmp_path / "bound", expect=COULD_NOT_RUN)
        assert "is a hot folder" in refused.stderr
    finally:
        subprocess.run(["umount", tmp_path / "bound"], check=True)


def test_a_disk_of_the_warm_tier_is_no_mountpoint(tmp_path: Path) -> None:
    disks: list[str | Path] = []
    for number in range(3):
        (tmp_path / "warm" / f"d{number}").mkdir(parents=True)
        disks += ["--warm", tmp_path / "warm" / f"d{number}"]
    words: list[str | Path] = ["init", tmp_path / "volume", *disks, "--ec", "2+1"]
    refused = stratum(*words, "--mount", tmp_path / "warm", expect=REFUSED)
    assert "holds a disk of the warm tier" in refused.stderr
    stratum(*words)
    refused = stratum("mount", tmp_path / "volume", tmp_path / "warm" / "d1", expect=COULD_NOT_RUN)
    assert "is a disk of the warm tier" in refused.stderr


def test_a_mount_lies_in_no_other_mount(tmp_path: Path) -> None:
    need_fuse()
    (tmp_path / "first").mkdir()
    with serving(tmp_path / "first", mount=True) as first:
        assert first.mount is not None
        inside = first.mount / "bucket" / "deep"
        inside.mkdir(parents=True)
        make_volume(tmp_path / "second")
        for root in (tmp_path / "second", first.root):
            refused = stratum("mount", root, inside, "--read-only", expect=COULD_NOT_RUN)
            assert f"lies in the Stratum mount {first.mount}" in refused.stderr
        refused = stratum("init", tmp_path / "third", "--mount", inside, expect=REFUSED)
        assert "lies in the Stratum mount" in refused.stderr


def test_a_folder_that_holds_something_is_mounted_over_only_on_demand(tmp_path: Path) -> None:
    need_fuse()
    server = Server(tmp_path, mount=True)
    assert server.mount is not None
    server.mount.mkdir()
    (server.mount / "hidden").touch()
    refused = stratum("serve", server.root, expect=COULD_NOT_RUN)
    assert f"mount cannot run: {server.mount} is not empty" in refused.stderr
    assert "--over" in refused.stderr
    assert codes(server.root) == [str(server.mount)], "it is told before anything is mounted"
    server.start("--over")
    assert (server.mount / "hidden").exists() is False
    assert codes(server.root) == [str(server.mount)]
    assert server.stop() == 0
    stratum("mount", server.root, server.mount, "--release")
    (server.mount / "hidden").unlink()
    assert codes(server.root) == []
    server.start()
    assert codes(server.root) == []
    assert server.stop() == 0


def codes(root: Path) -> list[str]:
    with Volume(root, "test") as opened:
        return [item.thing for item in health.examine(opened) if item.code == "STR-MOUNT-HIDES"]


def test_init_refuses_two_roles_of_one_place(tmp_path: Path) -> None:
    root = tmp_path / "volume"
    refused = stratum(
        "init", root, "--hot", tmp_path / "a", "--hot", tmp_path / "a" / "b", "--create", "--json", expect=REFUSED
    )
    assert "holds a hot folder" in json.loads(refused.stdout)["message"]
    assert not root.exists()
