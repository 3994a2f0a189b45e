"""Names and limits of extended attributes, beside a local file system."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import disk_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

NAMES = [
    b"", b"bare", b"bare.name", b"user", b"user.", b"user.a", b"user." + b"x" * 250, b"user." + b"x" * 251, b"User.a", b".a",
    b"user.\xff\xfe", b"user.a/b", b"trusted.", b"trusted.a", b"security", b"security.", b"security.a", b"security.selinux", b"system.", b"system.a",
    b"system.nfs4_acl", b"os2.a", b"osx.a", b"btrfs.a", b"x" * 300,
]  # fmt: skip
NOBODY = 65534


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with disk_of(tmp_path_factory.mktemp("local"), 32 << 20) as disk:
        yield disk


def answered(call: Callable[..., object], *arguments: Any, **named: Any) -> object:
    try:
        return call(*arguments, **named)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def _answers(folder: Path, name: bytes) -> list[object]:
    found: list[object] = []
    link = {"follow_symlinks": False}
    for kind in ("file", "directory", "symlink", "fifo"):
        path = folder / kind
        found += [
            answered(os.setxattr, path, name, b"v", **link),
            answered(os.getxattr, path, name, **link),
            os.fsdecode(name) in os.listxattr(path, follow_symlinks=False),
            answered(os.setxattr, path, name, b"w", os.XATTR_CREATE, **link),
            answered(os.setxattr, path, name, b"w", os.XATTR_REPLACE, **link),
            answered(os.removexattr, path, name, **link),
            answered(os.removexattr, path, name, **link),
        ]
    return found


def _filled(folder: Path) -> Path:
    made = folder / "names"
    made.mkdir(exist_ok=True)
    (made / "file").touch()
    (made / "directory").mkdir(exist_ok=True)
    if not (made / "symlink").is_symlink():
        (made / "symlink").symlink_to("file")
        os.mkfifo(made / "fifo")
    return made


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name[:16]))
def test_only_names_that_local_file_systems_take(home: Path, local: Path, name: bytes) -> None:
    assert _answers(_filled(home), name) == _answers(_filled(local), name)


def test_trusted_attributes_are_the_administrators(home: Path, local: Path) -> None:
    """Others neither see nor set them: their names do not stand in the list."""
    program = "import os,sys; fd = int(sys.argv[1]); print(sorted(os.listxattr(fd)), end=' ')\ntry: print(os.getxattr(fd, 'trusted.a'))\nexcept OSError as e: print(e.errno)"
    told = []
    for folder in (home, local):
        path = folder / "trusting"
        path.touch()
        os.setxattr(path, "trusted.a", b"v")
        os.setxattr(path, "user.a", b"v")
        with path.open("rb") as file:
            told.append([
                subprocess.run(
                    [sys.executable, "-c", program, str(file.fileno())], user=user, group=user, extra_groups=[], pass_fds=[file.fileno()],
                    capture_output=True, text=True, check=True,
                ).stdout
                for user in (0, NOBODY)
            ])  # fmt: skip
    assert told[0][1] == told[1][1] == f"['user.a'] {errno.ENODATA}\n"
    assert told[0][0] == told[1][0] == "['trusted.a', 'user.a'] b'v'\n"


def test_values_and_lists_have_the_kernels_limits(home: Path) -> None:
    path = home / "limits"
    path.touch()
    os.setxattr(path, "user.most", b"x" * 65536)
    assert len(os.getxattr(path, "user.most")) == 65536
    assert answered(os.setxattr, path, "user.most", b"x" * 65537) == "E2BIG"
    names = [f"user.{number:04d}" + "x" * 240 for number in range(270)]
    codes = [answered(os.setxattr, path, name, b"") for name in names]
    assert set(codes) == {None, "ENOSPC"}, "no more than can be listed"
    assert len(os.listxattr(path)) == 1 + codes.count(None)
    assert answered(os.setxattr, path, names[0], b"again") is None


def test_what_s3_keeps_can_be_copied_off(s3: Any, home: Path, local: Path, tmp_path: Path) -> None:
    long = "n" * 300  # longer than the name of an attribute may be
    s3.put_object(Bucket=home.name, Key="from/f", Body=b"x", ContentType="text/x", Metadata={"a": "1", long: "2"})
    s3.put_object_tagging(Bucket=home.name, Key="from/f", Tagging={"TagSet": [{"Key": "größe", "Value": "groß"}]})
    os.setxattr(home / "from", "user.of-a-folder", b"v")
    source, target = home / "from", local / "to"
    archive = tmp_path / "archive.tar"
    commands: list[list[str | Path]] = [
        ["cp", "-a", source, target],
        ["tar", "--xattrs", "--xattrs-include=*", "-C", home, "-cf", archive, "from"],
    ]
    if shutil.which("rsync"):
        commands.append(["rsync", "-aAX", f"{source}/", f"{target}-synced/"])
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
    names = {"user.s3.content-type", "user.s3.meta.a", "user.s3.tag.größe"}
    for copy in [target, *([local / "to-synced"] if shutil.which("rsync") else [])]:
        assert set(os.listxattr(copy / "f")) == names
        assert os.getxattr(copy, "user.of-a-folder") == b"v"
    done = subprocess.run(["cp", "-a", target, home / "back"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert s3.head_object(Bucket=home.name, Key="back/f")["ContentType"] == "text/x"
    assert s3.get_object_tagging(Bucket=home.name, Key="back/f")["TagSet"] == [{"Key": "größe", "Value": "groß"}]
