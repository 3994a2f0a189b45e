"""What only the volume's owner may use, whatever the umask; the key that secrets are sealed with."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from stratum import fsck
from stratum.errors import StoreDamaged, StratumError
from stratum.identity import Identities
from stratum.volume import Volume
from tests.support import BUCKET, make_volume, put, stratum

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o277])
def test_init_makes_what_only_the_owner_may_use(tmp_path: Path, umask: int) -> None:
    root = tmp_path / "volume"
    words = [sys.executable, "-m", "stratum.cli.main", "init", str(root)]
    done = subprocess.run(words, umask=umask, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    stratum("bucket", "create", root, BUCKET)
    before = os.umask(umask)
    try:
        with Volume(root, "test") as opened:
            put(opened, "key", b"x" * 100_000)
            found = {path: path.lstat().st_mode for path in [root, *root.rglob("*")]}
    finally:
        os.umask(before)
    assert len(found) > 12
    for path, mode in found.items():
        assert stat.S_IMODE(mode) & 0o077 == 0, path
        if umask != 0o277:
            assert stat.S_IMODE(mode) == (0o700 if stat.S_ISDIR(mode) else 0o600), path


def test_a_seal_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "volume"
    make_volume(root)
    (root / "meta" / "seal.key").chmod(0o640)
    done = stratum("user", "list", root, expect=3)
    assert f"chmod 0600 {root}/meta/seal.key" in done.stderr
    with Volume(root, "test") as opened:
        assert [finding.kind for finding in fsck.check(opened)] == ["seal-key"]
    (root / "meta" / "seal.key").chmod(0o600)
    stratum("user", "list", root)


def test_a_damaged_seal_key_says_where_and_what_to_do(tmp_path: Path) -> None:
    root = tmp_path / "volume"
    make_volume(root)
    file = root / "meta" / "seal.key"
    whole = file.read_bytes()
    for damaged, byte in ((whole[:20], 20), (whole + b"\n", 32), (b"", 0)):
        file.write_bytes(damaged)
        done = stratum("user", "list", root, expect=3)
        assert f"seal.key is damaged at byte {byte}" in done.stderr
        assert f"meta restore {root} BACKUP" in done.stderr
    file.write_bytes(bytes((whole[0] ^ 1,)) + whole[1:])
    with Volume(root, "test") as opened:
        identities = Identities(opened)
        with pytest.raises(StoreDamaged, match="opens none of the 1 access keys"):
            identities.refuse_another_seal()
        assert [finding.kind for finding in fsck.check(opened)] == ["unreadable-secret"]
        identities.create_key("admin")
        identities.refuse_another_seal()
    file.unlink()
    with Volume(root, "test") as opened, pytest.raises(StratumError, match="is missing"):
        Identities(opened)
