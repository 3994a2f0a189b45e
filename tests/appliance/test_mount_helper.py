"""`mount.stratum` as mount(8) calls it, and commands of root on a volume that is not root's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from stratum.cli import mount_helper
from tests.support import make_volume, need_fuse, unseal

NOBODY = 65534


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("/v /m", ["mount", "/v", "/m", "--background"]),
        ("/v /m -o rw,nofail,_netdev,x-systemd.automount", ["mount", "/v", "/m", "--background"]),
        ("/v /m -n -v -o ro -o bucket=a", ["mount", "/v", "/m", "--background", "--read-only", "--bucket", "a"]),
        ("-s /v /m -o whatever,shared_without_locks", ["mount", "/v", "/m", "--background", "--shared-without-locks"]),
        ("/v /m -f -o ro", None),
    ],
)
def test_options_of_fstab(words: str, wanted: list[str] | None) -> None:
    assert mount_helper.translate(words.split()) == wanted


@pytest.mark.parametrize("words", ["", "/v", "/v /m /n", "/v /m -o bogus", "/v /m -o bucket=", "/v /m --what"])
def test_wrong_usage_is_1(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert mount_helper.main(words.split()) == mount_helper.USAGE
    assert "mount.stratum: " in capsys.readouterr().err


def run_helper(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stratum.cli.mount_helper", *map(str, words)], capture_output=True, text=True, timeout=60
    )


def gone(volume: Path) -> bool:
    return not any((volume / "meta" / "sessions").iterdir())


def test_it_returns_when_it_is_mounted_and_umount_ends_the_daemon(tmp_path: Path) -> None:
    need_fuse()
    make_volume(tmp_path / "volume")
    mountpoint = tmp_path / "mount"
    failed = run_helper(tmp_path / "none", mountpoint)
    assert (failed.returncode, "not a volume" in failed.stderr) == (32, True)
    done = run_helper(tmp_path / "volume", mountpoint, "-o", "nofail")
    assert (done.returncode, done.stderr) == (0, "")
    try:
        (mountpoint / "bucket" / "file").write_text("kept")
    finally:
        subprocess.run(["umount", mountpoint], check=True)
    deadline = time.monotonic() + 20
    while not gone(tmp_path / "volume"):
        assert time.monotonic() < deadline, "the daemon outlives its mount"
        time.sleep(0.05)
    assert run_helper(tmp_path / "volume", mountpoint, "-o", "ro,bucket=bucket").returncode == 0
    try:
        assert (mountpoint / "file").read_text() == "kept"
        with pytest.raises(OSError, match="Read-only"):
            (mountpoint / "other").write_text("")
    finally:
        subprocess.run(["umount", mountpoint], check=True)


# Everything is imported before the rights are given up: the checkout need not be readable for everybody.
AS_ROOT = """
import sys
import stratum.cli.main, stratum.cli.commands, stratum.status, stratum.health, encodings.latin_1, encodings.unicode_escape
sys.exit(stratum.cli.main.main(sys.argv[1:]))
"""


def test_root_leaves_nothing_behind_that_locks_the_owner_out() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    root = Path(tempfile.mkdtemp(prefix="stratum-owner-", dir="/var/tmp"))
    try:
        root.chmod(0o755)
        make_volume(root / "volume")
        for path in [root / "volume", *(root / "volume").rglob("*")]:
            os.chown(path, NOBODY, NOBODY)
        for words in (["bucket", "create", root / "volume", "made-by-root"], ["status", root / "volume"]):
            done = subprocess.run(
                [sys.executable, "-c", AS_ROOT, *map(str, words)],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert done.returncode == 0, done.stderr
        owners = {path: path.stat().st_uid for path in (root / "volume").rglob("*")}
        assert set(owners.values()) == {NOBODY}, owners
    finally:
        unseal(root)
        shutil.rmtree(root)
