"""A real mount: what people do with files, and what S3 says about it at once."""

from __future__ import annotations

import errno
import json
import mmap
import os
import socket
import stat
import subprocess
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.s3.test_objects import refused
from tests.support import stratum

if TYPE_CHECKING:
    from tests.support import Server

BIG = os.urandom(9_000_000)


def keys(s3: Any, home: Path) -> list[str]:
    return [
        item["Key"]
        for page in s3.get_paginator("list_objects_v2").paginate(Bucket=home.name)
        for item in page.get("Contents", [])
    ]


def body(s3: Any, home: Path, key: str) -> bytes:
    data: bytes = s3.get_object(Bucket=home.name, Key=key)["Body"].read()
    return data


def test_the_file_system_says_what_it_is(mounted: Server, home: Path) -> None:
    line = next(
        line.split()
        for line in Path("/proc/self/mounts").read_text().splitlines()
        if line.split()[1] == str(mounted.mount)
    )
    assert line[2] == "fuse.stratum"
    found = os.statvfs(home)
    assert found.f_namemax == 255
    assert 0 < found.f_bavail <= found.f_blocks


@pytest.mark.parametrize("size", [0, 1, 16384, 16385, 200_000, len(BIG)])
def test_files_are_objects(s3: Any, home: Path, size: int) -> None:
    (home / "f").write_bytes(BIG[:size])
    assert body(s3, home, "f") == BIG[:size]
    assert (home / "f").read_bytes() == BIG[:size]
    assert (home / "f").stat().st_size == size
    s3.put_object(Bucket=home.name, Key="g", Body=BIG[:size])
    assert (home / "g").read_bytes() == BIG[:size]


def test_append_truncate_and_overwrite(s3: Any, home: Path) -> None:
    path = home / "f"
    path.write_bytes(b"a" * 20_000)
    etags = [s3.head_object(Bucket=home.name, Key="f")["ETag"]]
    with path.open("ab") as file:
        file.write(b"b" * 20_000)
    assert body(s3, home, "f") == b"a" * 20_000 + b"b" * 20_000
    etags.append(s3.head_object(Bucket=home.name, Key="f")["ETag"])
    with path.open("r+b") as file:
        file.seek(10)
        file.write(b"mid")
        file.flush()
        os.fsync(file.fileno())
        assert body(s3, home, "f")[:15] == b"aaaaaaaaaamidaa"
    os.truncate(path, 5)
    assert body(s3, home, "f") == b"aaaaa"
    os.truncate(path, 70_000)
    assert body(s3, home, "f") == b"aaaaa" + bytes(69_995)
    etags.append(s3.head_object(Bucket=home.name, Key="f")["ETag"])
    assert len(set(etags)) == 3
    assert all(etag.strip('"').count("-") == 1 for etag in etags)
    refused(s3.put_object, 412, "PreconditionFailed", Bucket=home.name, Key="f", Body=b"", IfMatch=etags[0])
    with path.open("wb") as file:
        file.write(b"new")
    assert body(s3, home, "f") == b"new"


def test_user_metadata_survives_edits(s3: Any, home: Path) -> None:
    s3.put_object(
        Bucket=home.name,
        Key="f",
        Body=b"x",
        Metadata={"kept": "yes"},
        ContentType="text/css",
        ChecksumAlgorithm="SHA256",
    )
    with (home / "f").open("ab") as file:
        file.write(b"y")
    answer = s3.get_object(Bucket=home.name, Key="f", ChecksumMode="ENABLED")
    assert (answer["Body"].read(), answer["Metadata"], answer["ContentType"]) == (b"xy", {"kept": "yes"}, "text/css")
    assert "ChecksumSHA256" not in answer


def test_rename(s3: Any, home: Path) -> None:
    (home / "dir" / "sub").mkdir(parents=True)
    for name in ("dir/a", "dir/sub/b"):
        (home / name).write_text(name)
    (home / "dir").rename(home / "moved")
    assert keys(s3, home) == ["moved/a", "moved/sub/b"]
    (home / "other").write_text("o")
    (home / "moved/a").rename(home / "other")
    assert body(s3, home, "other") == b"dir/a"
    with pytest.raises(OSError, match="not empty"):
        os.rmdir(home / "moved")
    with pytest.raises(OSError) as caught:
        (home / "moved").rename(home / "moved" / "sub" / "deeper")
    assert caught.value.errno == errno.EINVAL
    assert (home / "moved/sub/b").read_text() == "dir/sub/b"


def test_links_and_special_files(s3: Any, home: Path) -> None:
    (home / "f").write_text("shared")
    os.link(home / "f", home / "hard")
    assert (home / "f").stat().st_nlink == 2
    assert body(s3, home, "hard") == b"shared"
    s3.put_object(Bucket=home.name, Key="hard", Body=b"broken")
    assert ((home / "f").read_text(), (home / "hard").read_text(), (home / "f").stat().st_nlink) == (
        "shared",
        "broken",
        1,
    )
    os.symlink("f", home / "soft")
    os.mkfifo(home / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(home / "sock"))
    assert (home / "soft").read_text() == "shared"
    assert stat.S_ISFIFO((home / "pipe").stat().st_mode)
    assert keys(s3, home) == ["f", "hard"]
    for key in ("soft", "pipe", "sock"):
        refused(s3.get_object, 404, "NoSuchKey", Bucket=home.name, Key=key)
    s3.delete_object(Bucket=home.name, Key="f")
    s3.delete_object(Bucket=home.name, Key="hard")
    error = refused(s3.delete_bucket, 409, "BucketNotEmpty", Bucket=home.name)
    assert all(name in str(error) for name in ("soft", "pipe", "sock"))
    s3.put_object(Bucket=home.name, Key="pipe", Body=b"now a file")
    assert (home / "pipe").read_text() == "now a file"


def test_directories_and_buckets(mounted: Server, s3: Any, home: Path) -> None:
    assert mounted.mount is not None
    (home / "made").mkdir()
    assert keys(s3, home) == ["made/"]
    s3.put_object(Bucket=home.name, Key="implied/deep/key", Body=b"")
    assert (home / "implied/deep").is_dir()
    s3.delete_object(Bucket=home.name, Key="implied/deep/key")
    assert not (home / "implied").exists()
    s3.put_object(Bucket=home.name, Key="kept/key", Body=b"")
    (home / "kept/key").unlink()
    assert (home / "kept").is_dir()
    s3.delete_object(Bucket=home.name, Key="kept/")
    assert not (home / "kept").exists()
    other = mounted.mount / f"new-{uuid.uuid4().hex[:8]}"
    other.mkdir()
    (other / "only" / "directories").mkdir(parents=True)
    s3.delete_bucket(Bucket=other.name)
    assert not other.exists()
    for call, code in (
        ((mounted.mount / "Bad_Name").mkdir, errno.EINVAL),
        (lambda: (mounted.mount / "file").write_text(""), errno.EPERM),
        (lambda: os.symlink("x", mounted.mount / "link"), errno.EPERM),
        (lambda: home.rename(mounted.mount / "renamed"), errno.EPERM),
    ):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == code
    s3.create_bucket(Bucket=other.name)
    assert other.is_dir()
    other.rmdir()
    refused(s3.head_bucket, 404, "404", Bucket=other.name)


def test_modes_and_owners(mounted: Server, s3: Any, home: Path) -> None:
    stratum(
        "bucket",
        "set",
        mounted.root,
        home.name,
        "--uid",
        "1234",
        "--gid",
        "4321",
        "--file-mode",
        "0640",
        "--dir-mode",
        "0750",
    )
    s3.put_object(Bucket=home.name, Key="d/f", Body=b"")
    found = (home / "d/f").stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 4321, 0o640)
    assert stat.S_IMODE((home / "d").stat().st_mode) == 0o750
    os.chmod(home / "d/f", 0o600)
    os.chown(home / "d/f", 7, 8)
    s3.put_object(Bucket=home.name, Key="d/f", Body=b"new")
    found = (home / "d/f").stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (7, 8, 0o600)
    for moment_ns in (-(10**18), 10**18 * 5 + 7, 0):
        os.utime(home / "d/f", ns=(moment_ns, moment_ns))
        assert (home / "d/f").stat().st_mtime_ns == moment_ns


def test_extended_attributes(home: Path) -> None:
    path = home / "f"
    path.write_text("x")
    os.setxattr(path, "user.a", b"v" * 65536)
    assert (os.listxattr(path), os.getxattr(path, "user.a")) == (["user.a"], b"v" * 65536)
    os.removexattr(path, "user.a")
    with pytest.raises(OSError) as caught:
        os.getxattr(path, "user.a")
    assert caught.value.errno == errno.ENODATA


def test_the_s3_side_of_a_file_as_attributes(s3: Any, home: Path) -> None:
    s3.put_object(
        Bucket=home.name, Key="f", Body=b"x", ContentType="text/x", CacheControl="no-cache", Metadata={"a": "1"}
    )
    path = home / "f"
    etag = s3.head_object(Bucket=home.name, Key="f")["ETag"].strip('"')
    assert os.getxattr(path, "user.s3.etag") == etag.encode()
    assert os.getxattr(path, "user.s3.storage-class") == b"STANDARD"
    assert os.getxattr(path, "user.s3.content-type") == b"text/x"
    assert os.getxattr(path, "user.s3.cache-control") == b"no-cache"
    assert os.getxattr(path, "user.s3.meta.a") == b"1"
    assert sorted(os.listxattr(path)) == ["user.s3.cache-control", "user.s3.content-type", "user.s3.meta.a"]
    os.setxattr(path, "user.s3.content-type", b"image/png")
    os.setxattr(path, "user.s3.meta.b", b"caf\xe9")
    os.removexattr(path, "user.s3.meta.a")
    os.removexattr(path, "user.s3.cache-control")
    found = s3.head_object(Bucket=home.name, Key="f")
    assert (found["ContentType"], found["Metadata"], found["ETag"]) == ("image/png", {"b": "caf\xe9"}, f'"{etag}"')
    assert "CacheControl" not in found
    for name, value, code in (
        ("user.s3.etag", b"x", errno.EPERM), ("user.s3.owner", b"x", errno.EPERM), ("user.s3.meta.A", b"x", errno.EINVAL),
        ("user.s3.meta.c", b"a\r\nX-Evil: 1", errno.EINVAL), ("user.s3.meta.c", b"x" * 2048, errno.ENOSPC),
    ):  # fmt: skip
        with pytest.raises(OSError) as caught:
            os.setxattr(path, name, value)
        assert caught.value.errno == code, name
    s3.put_object_tagging(Bucket=home.name, Key="f", Tagging={"TagSet": [{"Key": "größe", "Value": "groß"}]})
    assert os.getxattr(path, "user.s3.tag.größe") == "groß".encode()
    os.setxattr(path, "user.s3.tag.a b", b"c/d")
    os.removexattr(path, "user.s3.tag.größe")
    assert s3.get_object_tagging(Bucket=home.name, Key="f")["TagSet"] == [{"Key": "a b", "Value": "c/d"}]
    assert "user.s3.tag.a b" in os.listxattr(path)
    for tag, value in ((b"user.s3.tag.aws:x", b"1"), (b"user.s3.tag.x", b"\xff"), (b"user.s3.tag.\xff", b"")):
        with pytest.raises(OSError) as caught:
            os.setxattr(path, tag, value)
        assert caught.value.errno == errno.EINVAL, tag
    for number in range(9):
        os.setxattr(path, f"user.s3.tag.{number}", b"")
    with pytest.raises(OSError) as caught:
        os.setxattr(path, "user.s3.tag.more", b"")
    assert caught.value.errno == errno.ENOSPC
    (home / "plain").write_text("x")
    assert os.listxattr(home / "plain") == []
    with pytest.raises(OSError) as caught:
        os.getxattr(home / "plain", "user.s3.content-type")
    assert caught.value.errno == errno.ENODATA
    with path.open("ab") as file:
        file.write(b"more")
    assert s3.head_object(Bucket=home.name, Key="f")["Metadata"] == {"b": "caf\xe9"}
    assert len(s3.get_object_tagging(Bucket=home.name, Key="f")["TagSet"]) == 10
    assert os.getxattr(path, "user.s3.etag") == s3.head_object(Bucket=home.name, Key="f")["ETag"].strip('"').encode()


def test_unlinked_while_open(s3: Any, home: Path) -> None:
    for by_s3 in (False, True):
        (home / "f").write_bytes(BIG)
        with (home / "f").open("r+b") as file:
            if by_s3:
                s3.delete_object(Bucket=home.name, Key="f")
            else:
                (home / "f").unlink()
            assert not (home / "f").exists()
            assert file.read() == BIG
            file.seek(0)
            file.write(b"still")
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            assert file.read(5) == b"still"
        assert keys(s3, home) == []


def test_a_held_descriptor_keeps_the_old_bytes(s3: Any, home: Path) -> None:
    s3.put_object(Bucket=home.name, Key="f", Body=b"old" * 100_000)
    with (home / "f").open("rb") as file:
        assert file.read(3) == b"old"
        s3.put_object(Bucket=home.name, Key="f", Body=b"new" * 100_000)
        assert (home / "f").read_bytes() == b"new" * 100_000
        assert file.read() == b"old" * 99_999


def test_a_shared_mapping_reaches_s3(s3: Any, home: Path) -> None:
    (home / "f").write_bytes(bytes(100_000))
    with (home / "f").open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        mapping[50_000:50_005] = b"store"
        mapping.flush()
        os.fsync(file.fileno())
        assert body(s3, home, "f")[50_000:50_005] == b"store"
        mapping[0:5] = b"later"
    assert (home / "f").read_bytes()[:5] == b"later"


def test_keys_a_path_cannot_hold(s3: Any, home: Path) -> None:
    for key in ("a", "a/b", "x//y", "/lead", "./dot", "../up", "d/", "q/" + "L" * 300, ".s3~file~odd", "M" * 1024):
        s3.put_object(Bucket=home.name, Key=key, Body=key.encode())
    found = {str(path.relative_to(home)): path.read_bytes().decode() for path in home.rglob("*") if path.is_file()}
    assert sorted(found.values()) == sorted(keys(s3, home))
    assert found["a/b"] == "a/b"
    assert found[".s3~file~a"] == "a"
    assert found["x/.s3~dir~/y"] == "x//y"
    assert found[".s3~dir~/lead"] == "/lead"
    assert found[".s3~dir~./dot"] == "./dot"
    assert found[".s3~dir~../up"] == "../up"
    assert found["d/.s3~body"] == "d/"
    assert found[".s3~file~.s3~file~odd"] == ".s3~file~odd"
    for path in home.rglob("*"):
        assert len(path.name.encode()) <= 255
        path.stat()
    with (home / ".s3~file~a").open("ab") as file:
        file.write(b"!")
    assert body(s3, home, "a") == b"a!"
    s3.delete_object(Bucket=home.name, Key="a/b")
    assert (home / "a").read_bytes() == b"a!"
    with pytest.raises(OSError) as caught:
        (home / ".s3~file~made-up").write_text("")
    assert caught.value.errno == errno.EINVAL


def test_every_key_has_one_path_and_every_path_one_key(mounted: Server, s3: Any, home: Path) -> None:
    assert mounted.mount is not None
    odd = [
        "a",
        "a/b",
        "x//y",
        "/lead",
        "./dot",
        "../up",
        "d/",
        "e/",
        "q/" + "L" * 300,
        "Q" * 300 + "/x",
        ".s3~file~odd",
        "M" * 1024,
    ]
    odd += ["new\nline", "tab\t", "\x01", "é/ü", "..", ".", "a/../../etc/passwd", "%2e%2e/x", " ", "emoji \U0001f600"]
    for key in odd:
        s3.put_object(Bucket=home.name, Key=key, Body=b"" if key == "e/" else key.encode())
    for key in odd:
        path = json.loads(stratum("path", "to-path", mounted.root, f"{home.name}/{key}", "--json").stdout)["path"]
        shown = mounted.mount / path
        assert shown.is_dir() if key == "e/" else shown.read_bytes().decode() == key
        back = json.loads(stratum("path", "to-key", mounted.root, path, "--json").stdout)
        assert (back["bucket"], back["key"]) == (home.name, key)
    # What is not there yet is translated as it would be shown.
    for key, wanted in (("none", "none"), ("no/ne", "no/ne"), ("a/./b", "a/.s3~dir~./b"), ("new//x", "new/.s3~dir~/x")):
        assert stratum("path", "to-path", mounted.root, f"{home.name}/{key}").stdout == f"{home.name}/{wanted}\n"
    assert stratum("path", "to-key", mounted.root, home.name).stdout == f"{home.name}/\n"
    stratum("path", "to-key", mounted.root, f"{home.name}/.s3~file~made-up", expect=4)
    stratum("path", "to-key", mounted.root, f"{home.name}/../x", expect=6)
    stratum("path", "to-path", mounted.root, "no-such-bucket/k", expect=4)


def test_a_large_directory(s3: Any, home: Path) -> None:
    (home / "many").mkdir()
    names = {f"{number:05}" for number in range(3000)}
    for name in names:
        (home / "many" / name).touch()
    with os.scandir(home / "many") as entries:
        seen = []
        for at, entry in enumerate(entries):
            seen.append(entry.name)
            if at % 3 == 0:  # names vanish while they are being listed
                os.unlink(entry.path)
    assert sorted(seen) == sorted(names)
    assert len(os.listdir(home / "many")) == 2000


def test_tools(home: Path, tmp_path: Path) -> None:
    source = Path(__file__).resolve().parents[2]
    script = f"""
    set -e
    cd {home}
    cp -r {source}/stratum/kv copied
    diff -r {source}/stratum/kv copied
    mv copied moved && rm -r moved
    git init -q repo && cd repo && git config user.email t@example.org && git config user.name t
    cp {source}/stratum/*.py . && git add -A && git commit -qm one && git fsck --strict --no-progress
    cd .. && git clone -q repo clone && diff -r -x .git repo clone && rm -rf repo clone
    sqlite3 db "pragma journal_mode=delete; create table t(a); insert into t values (1),(2); select sum(a) from t;" | grep -qx 3
    sqlite3 db "pragma journal_mode=wal; insert into t values (3); select sum(a) from t;" | grep -qx 6
    tar cf tree.tar -C {source} tests && mkdir x && tar xf tree.tar -C x && diff -r {source}/tests x/tests
    sed -i s/a/b/ tree.tar
    rm -rf x
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr


def test_errors_have_the_right_number(home: Path) -> None:
    (home / "f").write_text("x")
    (home / "d").mkdir()
    cases: list[tuple[Any, int]] = [
        ((home / ("n" * 256)).touch, errno.ENAMETOOLONG), ((home / "f" / "x").touch, errno.ENOTDIR), ((home / "d").mkdir, errno.EEXIST),
        (lambda: os.rmdir(home / "f"), errno.ENOTDIR), (lambda: os.unlink(home / "none"), errno.ENOENT), (lambda: os.link(home / "d", home / "l"), errno.EPERM),
        (lambda: (home / "f").rename(home / "d"), errno.EISDIR), (lambda: (home / "d").rename(home / "f"), errno.ENOTDIR),
        (lambda: open(os.fsencode(home) + b"/\xff", "w").close(), errno.EINVAL), (lambda: os.open(home / "f", os.O_CREAT | os.O_EXCL), errno.EEXIST),
    ]  # fmt: skip
    for call, code in cases:
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == code


def test_a_name_of_a_bucket_costs_no_time(home: Path) -> None:
    """Checked by a pattern that backtracked, such a name stopped the whole mount."""
    for name in ("-" * 60 + "_", "a-" * 30 + "_"):
        done = subprocess.run(["mkdir", home.parent / name], capture_output=True, text=True, timeout=30)
        assert "Invalid argument" in done.stderr


def test_a_file_that_is_emptied_by_who_only_reads_is_empty_in_s3(s3: Any, home: Path) -> None:
    """Linux empties it though the descriptor cannot write. Closing others that cannot is no longer told to us."""
    (home / "f").write_bytes(b"full")
    other = os.open(home / "f", os.O_RDONLY)
    os.close(os.open(home / "f", os.O_RDONLY | os.O_TRUNC))
    assert body(s3, home, "f") == b""
    with (home / "f").open("r+b") as file:
        file.write(b"again")
        file.flush()
        os.close(other)
        assert (home / "f").read_bytes() == b"again"
    assert body(s3, home, "f") == b"again"


def test_a_created_file_reaches_s3_when_it_is_closed(s3: Any, home: Path) -> None:
    """Until then the mount shows it, and whatever needs its name finds it."""
    (home / "d").mkdir()
    path = home / "d" / "f"
    with path.open("wb") as file:
        file.write(b"one")
        assert os.fstat(file.fileno()).st_size == 0  # still in Python's buffer
        file.flush()
        assert (path.stat().st_size, path.read_bytes()) == (3, b"one")
        path.chmod(0o640)
        os.utime(path, ns=(5, 7))
    assert body(s3, home, "d/f") == b"one"
    assert (path.stat().st_mode & 0o777, path.stat().st_mtime_ns) == (0o640, 7)
    with (home / "d" / "synced").open("wb") as file:
        os.fsync(file.fileno())
        assert "d/synced" in keys(s3, home)
    for name, act in (
        ("listed", lambda p: os.listdir(p.parent)), ("moved", lambda p: p.rename(p.with_name("there"))), ("linked", lambda p: os.link(p, p.with_name("other"))),
        ("attribute", lambda p: os.setxattr(p, "user.a", b"1")), ("parent", lambda p: p.parent.stat()),
    ):  # fmt: skip
        descriptor = os.open(home / "d" / name, os.O_CREAT | os.O_RDWR)
        act(home / "d" / name)
        os.write(descriptor, b"x")
        os.close(descriptor)
    assert {"d/listed", "d/there", "d/linked", "d/other", "d/attribute", "d/parent"} <= set(keys(s3, home))
    gone = os.open(home / "d" / "gone", os.O_CREAT | os.O_RDWR)
    os.unlink(home / "d" / "gone")
    os.write(gone, b"still here")
    assert os.pread(gone, 100, 0) == b"still here"
    os.close(gone)
    assert "d/gone" not in keys(s3, home)
    waits = os.open(home / "d" / "waits", os.O_CREAT | os.O_RDWR)
    deadline = time.monotonic() + 10
    while "d/waits" not in keys(s3, home):
        assert time.monotonic() < deadline, "a file nobody closes must come to S3 within about a second"
        time.sleep(0.1)
    os.close(waits)


def test_files_are_found_while_they_are_being_committed(s3: Any, home: Path) -> None:
    """Names are looked up afresh, because the kernel forgets them all the time, in every phase of a file's first commit."""
    ending = threading.Event()

    def forget() -> None:
        while not ending.is_set():
            Path("/proc/sys/vm/drop_caches").write_text("2")

    def work(number: int) -> list[str]:
        wrong = []
        for at in range(60):
            path = home / f"{number}-{at}"
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_EXCL)
            os.write(descriptor, b"first ")
            syncer = threading.Thread(target=os.fsync, args=(descriptor,))
            syncer.start()
            for _ in range(5):
                if path.stat().st_ino != os.fstat(descriptor).st_ino:
                    wrong.append(f"{path.name}: another inode")
            syncer.join()
            os.write(descriptor, b"second")
            os.close(descriptor)
            if path.read_bytes() != b"first second":
                wrong.append(f"{path.name}: {path.read_bytes()!r}")
        return wrong

    forgetter = threading.Thread(target=forget)
    forgetter.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            assert [line for lines in pool.map(work, range(4)) for line in lines] == []
    finally:
        ending.set()
        forgetter.join()
    assert len(keys(s3, home)) == 240
    assert {body(s3, home, key) for key in keys(s3, home)[::10]} == {b"first second"}


def test_a_created_file_whose_name_s3_takes(s3: Any, home: Path) -> None:
    descriptor = os.open(home / "f", os.O_CREAT | os.O_RDWR)
    os.write(descriptor, b"from the mount")
    s3.put_object(Bucket=home.name, Key="f", Body=b"from S3")
    assert (home / "f").read_bytes() == b"from S3"
    assert os.pread(descriptor, 100, 0) == b"from the mount"
    assert os.fstat(descriptor).st_nlink == 0
    os.close(descriptor)
    assert (home / "f").read_bytes() == body(s3, home, "f") == b"from S3"


def test_a_created_file_whose_directory_s3_removes(s3: Any, home: Path) -> None:
    """Nothing was promised yet, and close says that nothing is kept."""
    s3.put_object(Bucket=home.name, Key="d/only", Body=b"x")
    descriptor = os.open(home / "d" / "f", os.O_CREAT | os.O_RDWR)
    os.write(descriptor, b"lost")
    s3.delete_object(Bucket=home.name, Key="d/only")
    with pytest.raises(OSError) as caught:
        os.fsync(descriptor)
    assert caught.value.errno == errno.ENOENT
    os.close(descriptor)
    assert not (home / "d").exists()
