"""Clones and snapshots beside a mount and S3 that are in use."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from botocore.exceptions import ClientError

from tests.support import stratum

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support import Server

BIG = os.urandom(1_500_000)
CLONE = "user.stratum.clone"


def fill(home: Path) -> Path:
    source = home / "d"
    (source / "e").mkdir(parents=True)
    (source / "big").write_bytes(BIG)
    (source / "e" / "small").write_bytes(b"small")
    os.link(source / "big", source / "e" / "linked")
    return source


def test_a_clone_is_there_when_the_command_returns(mounted: Server, home: Path, s3: Any) -> None:
    fill(home)
    assert sorted(os.listdir(home)) == ["d"]
    done = stratum("clone", mounted.root, f"{home.name}/d", f"{home.name}/copy", "--json")
    assert json.loads(done.stdout) == {
        "schema": "stratum.clone/1",
        "source": f"{home.name}/d",
        "target": f"{home.name}/copy",
    }
    assert (home / "copy" / "e" / "linked").read_bytes() == BIG
    assert (home / "copy" / "big").stat().st_nlink == 2
    assert s3.get_object(Bucket=home.name, Key="copy/e/small")["Body"].read() == b"small"
    (home / "copy" / "e" / "small").write_bytes(b"other")
    assert (home / "d" / "e" / "small").read_bytes() == b"small"
    assert stratum("clone", mounted.root, f"{home.name}/d", f"{home.name}/copy", expect=5).returncode == 5


def test_nothing_in_a_snapshot_changes(mounted: Server, home: Path, s3: Any) -> None:
    fill(home)
    stratum("snapshot", "create", mounted.root, home.name, "first")
    bucket = f"{home.name}.snap.first"
    frozen = home.parent / bucket / "d"
    (home / "d" / "big").write_bytes(b"new")
    assert (frozen / "big").read_bytes() == BIG
    small = frozen / "e" / "small"
    held_open = small.open("rb")  # an open file is truncated another way
    changes: list[Callable[[], Any]] = [
        lambda: small.write_bytes(b"x"),
        lambda: small.open("r+b"),
        lambda: small.open("ab"),
        small.unlink,
        lambda: small.chmod(0o600),
        lambda: os.utime(small),
        lambda: os.truncate(small, 1),
        lambda: os.setxattr(small, "user.x", b"y"),
        lambda: os.setxattr(small, CLONE, f"{home.name}/d/big".encode()),
        lambda: (frozen / "new").write_bytes(b"x"),
        (frozen / "new").mkdir,
        lambda: (frozen / "new").symlink_to("x"),
        lambda: os.mkfifo(frozen / "new"),
        lambda: os.link(small, frozen / "new"),
        lambda: small.rename(frozen / "new"),
        lambda: (home / "d" / "big").rename(frozen / "new"),
        (home.parent / bucket).rmdir,
    ]
    (home / "d" / "twin").mkdir()
    s3.put_object(Bucket=home.name, Key="d/twin", Body=b"beside the directory")
    stratum("snapshot", "create", mounted.root, home.name, "second")
    alias = home.parent / f"{home.name}.snap.second" / "d" / ".s3~file~twin"
    changes += [
        lambda: (home / "d" / "big").rename(alias),  # an alias that is there needs no new name
        lambda: alias.rename(home / "d" / "out"),
    ]
    for number, change in enumerate(changes):
        with pytest.raises(OSError, match=r"\[Errno") as caught:
            change()
        assert caught.value.errno == errno.EROFS, number
    held_open.close()
    assert small.read_bytes() == b"small"
    assert alias.read_bytes() == b"beside the directory"
    requests: list[Callable[[], Any]] = [
        lambda: s3.put_object(Bucket=bucket, Key="k", Body=b"x"),
        lambda: s3.put_object(Bucket=bucket, Key="k", Body=BIG),
        lambda: s3.delete_object(Bucket=bucket, Key="d/e/small"),
        lambda: s3.copy_object(Bucket=bucket, Key="k", CopySource={"Bucket": home.name, "Key": "d/big"}),
        lambda: s3.create_multipart_upload(Bucket=bucket, Key="k"),
        lambda: s3.put_object_acl(Bucket=bucket, Key="d/e/small", ACL="public-read"),
        lambda: s3.delete_bucket(Bucket=bucket),
    ]
    for request in requests:
        with pytest.raises(ClientError) as refused:
            request()
        assert refused.value.response["Error"]["Code"] == "AccessDenied"
    failed = s3.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": "d/big"}]})["Errors"]
    assert [error["Code"] for error in failed] == ["AccessDenied"]
    stratum("snapshot", "remove", mounted.root, home.name, "second")
    rows = json.loads(stratum("snapshot", "list", mounted.root, home.name, "--json").stdout)["snapshots"]
    assert [(row["path"], row["name"], row["bucket"]) for row in rows] == [(home.name, "first", bucket)]
    with small.open("rb") as held:
        stratum("snapshot", "remove", mounted.root, home.name, "first")
        assert not (home.parent / bucket).exists()
        assert held.read() == b"small"
    with pytest.raises(ClientError):
        s3.head_bucket(Bucket=bucket)
    stratum("snapshot", "remove", mounted.root, home.name, "first", expect=4)


def test_a_file_takes_the_content_of_another(home: Path, s3: Any) -> None:
    source = fill(home) / "big"
    target = home / "target"
    with target.open("wb") as file:
        file.write(b"not yet flushed")
        file.flush()
        os.setxattr(target, CLONE, f"/{home.name}/d/big".encode())
    assert target.read_bytes() == BIG
    assert s3.get_object(Bucket=home.name, Key="target")["Body"].read() == BIG
    with target.open("r+b") as file:
        file.write(b"mine")
    assert source.read_bytes() == BIG
    assert target.read_bytes() == b"mine" + BIG[4:]
    for path, code in (
        ("nowhere/x", errno.ENOENT),
        (f"{home.name}/d", errno.EINVAL),
        (f"{home.name}/../x", errno.EINVAL),
    ):
        with pytest.raises(OSError, match=r"\[Errno") as caught:
            os.setxattr(target, CLONE, path.encode())
        assert caught.value.errno == code
    with pytest.raises(OSError, match="No data"):
        os.getxattr(target, CLONE)


def test_cached_pages_of_the_same_size_are_forgotten(home: Path) -> None:
    source, target = fill(home) / "big", home / "target"
    target.write_bytes(bytes(len(BIG)))
    for _ in range(3):
        assert target.read_bytes() == bytes(len(BIG))
        os.setxattr(target, CLONE, f"{home.name}/d/big".encode())
        assert target.read_bytes() == BIG
        target.write_bytes(bytes(len(BIG)))
    assert source.read_bytes() == BIG


def test_a_user_clones_only_what_it_may_read(home: Path) -> None:
    source = fill(home) / "big"
    target = home / "target"
    target.write_bytes(b"")
    os.chown(target, 1001, 1001)
    script = (
        "import os, sys\nos.chdir(sys.argv[1])\nos.setgroups([])\nos.setgid(1001)\nos.setuid(1001)\n"
        "os.setxattr('target', 'user.stratum.clone', os.fsencode(sys.argv[2]))\n"
    )
    words = [sys.executable, "-c", script, str(home), f"{home.name}/d/big"]
    source.chmod(0o600)
    refused = subprocess.run(words, capture_output=True, text=True)
    assert "PermissionError" in refused.stderr
    assert target.read_bytes() == b""
    source.chmod(0o644)
    os.chown(target, 0, 0)
    target.chmod(0o6777)  # whose program it is must not lend its rights to what somebody else puts there
    subprocess.run(words, check=True)
    assert target.read_bytes() == BIG
    assert stat.S_IMODE(target.stat().st_mode) == 0o777


def test_a_young_clone_is_whole_from_the_first_look(mounted: Server, home: Path, s3: Any) -> None:
    """Each look is the first at a clone of its own, while the source changes."""
    wanted = {f"{folder}/{number:03}": f"{folder}/{number}".encode() for folder in "abc" for number in range(150)}
    for name, data in wanted.items():
        s3.put_object(Bucket=home.name, Key=f"d/{name}", Body=data)
    os.link(home / "d" / "a" / "000", home / "d" / "b" / "linked")
    wanted["b/linked"] = wanted["a/000"]
    copies = iter(range(100))
    changed = iter(list(wanted))

    def young() -> Path:
        name = f"copy{next(copies)}"
        stratum("clone", mounted.root, f"{home.name}/d", f"{home.name}/{name}")
        gone = home / "d" / next(changed)
        gone.write_bytes(b"later")
        gone.rename(gone.with_name(f"moved-{name}"))
        return home / name

    def restore(copy: Path) -> None:
        """The next clone is of what the first was of."""
        subprocess.run(["rm", "-r", home / "d"], check=True)
        copy.rename(home / "d")

    def walked(copy: Path) -> dict[str, bytes]:
        return {str(file.relative_to(copy)): file.read_bytes() for file in sorted(copy.rglob("*")) if not file.is_dir()}

    copy = young()
    assert walked(copy) == wanted
    restore(copy)
    copy = young()
    pages = s3.get_paginator("list_objects_v2").paginate(
        Bucket=home.name, Prefix=f"{copy.name}/", PaginationConfig={"PageSize": 100}
    )
    assert [item["Key"] for page in pages for item in page["Contents"]] == sorted(
        f"{copy.name}/{name}" for name in wanted
    )
    restore(copy)
    copy = young()
    assert (copy / "b" / "linked").stat().st_nlink == 2
    (copy / "a" / "000").write_bytes(b"through the other name")
    assert (copy / "b" / "linked").read_bytes() == b"through the other name"
    (copy / "a" / "000").write_bytes(wanted["a/000"])
    restore(copy)
    copy = young()
    (copy / "c" / "140").unlink()
    (copy / "c" / "new").write_bytes(b"new")
    (copy / "b").rename(copy / "c" / "b")
    s3.put_object(Bucket=home.name, Key=f"{copy.name}/a/007", Body=b"put")
    assert not (copy / "a" / "none").exists()
    with pytest.raises(OSError, match="not empty"):
        (copy / "a").rmdir()
    now = {name.replace("b/", "c/b/"): data for name, data in wanted.items()} | {"c/new": b"new", "a/007": b"put"}
    del now["c/140"]
    assert walked(copy) == now
    assert {name: s3.get_object(Bucket=home.name, Key=f"{copy.name}/{name}")["Body"].read() for name in now} == now
    subprocess.run(["rm", "-r", copy], check=True)
    assert not copy.exists()
