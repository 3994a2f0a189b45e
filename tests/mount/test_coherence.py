"""Once one face has answered, the other shows it, with the kernel's caches hot."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import threading
import uuid
from typing import TYPE_CHECKING, Any

import pytest
from botocore.exceptions import ClientError

from tests.mount.test_several_mounts import mounting
from tests.s3.test_objects import refused
from tests.support import longer, new_seed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support import Server

ROUNDS = 50


def fresh(mounted: Server) -> tuple[Any, str, Path]:
    assert mounted.mount is not None
    client = mounted.client()
    name = f"c-{uuid.uuid4().hex[:10]}"
    client.create_bucket(Bucket=name)
    return client, name, mounted.mount / name


def test_s3_to_mount_is_right_at_the_first_ask(mounted: Server) -> None:
    client, bucket, home = fresh(mounted)
    path = home / "dir" / "f"
    client.put_object(Bucket=bucket, Key="dir/f", Body=b"v0000")
    for number in range(1, ROUNDS):
        os.stat(path)
        assert path.read_bytes() == b"v%04d" % (number - 1)
        os.listdir(home / "dir")
        client.put_object(Bucket=bucket, Key="dir/f", Body=b"v%04d" % number)  # the same size, within one second
        assert path.read_bytes() == b"v%04d" % number
        client.put_object(Bucket=bucket, Key="dir/f", Body=b"x" * (number + 100))
        assert os.stat(path).st_size == number + 100
        client.put_object(Bucket=bucket, Key=f"dir/new{number}", Body=b"")
        assert os.stat(home / "dir" / f"new{number}").st_size == 0
        assert f"new{number}" in os.listdir(home / "dir")
        client.delete_object(Bucket=bucket, Key=f"dir/new{number}")
        assert not os.path.exists(home / "dir" / f"new{number}")
        assert f"new{number}" not in os.listdir(home / "dir")
        client.put_object(Bucket=bucket, Key="dir/f", Body=b"v%04d" % number)
        client.copy_object(Bucket=bucket, Key="dir/copy", CopySource={"Bucket": bucket, "Key": "dir/f"})
        assert (home / "dir" / "copy").read_bytes() == b"v%04d" % number


def test_mount_to_s3_is_right_at_the_first_ask(mounted: Server) -> None:
    client, bucket, home = fresh(mounted)

    def has(key: str) -> bytes | None:
        try:
            data: bytes = client.get_object(Bucket=bucket, Key=key)["Body"].read()
        except ClientError:
            return None
        return data

    for number in range(ROUNDS):
        (home / "f").write_bytes(b"v%d" % number)
        assert has("f") == b"v%d" % number
        (home / "tmp").write_bytes(b"t%d" % number)
        (home / "tmp").rename(home / "f")
        assert (has("f"), has("tmp")) == (b"t%d" % number, None)
        (home / "f").unlink()
        assert has("f") is None
        with (home / "open").open("wb") as file:
            file.write(b"s%d" % number)
            file.flush()
            os.fsync(file.fileno())
            assert has("open") == b"s%d" % number


def test_a_listing_that_the_kernel_keeps_is_never_old(mounted: Server, second: Path) -> None:
    """Other programs list all the time, so that what they fill the cache with races with what drops it."""
    client, bucket, home = fresh(mounted)
    (home / "d").mkdir()
    for number in range(300):
        (home / "d" / f"there{number:03}").touch()
    ending = threading.Event()

    def list_always(directory: Path) -> None:
        while not ending.is_set():
            os.listdir(directory)

    sides = [home / "d", second / bucket / "d"]
    threads = [threading.Thread(target=list_always, args=(side,)) for side in sides for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for number in range(60):
            client.put_object(Bucket=bucket, Key=f"d/new{number}", Body=b"")
            assert [f"new{number}" in os.listdir(side) for side in sides] == [True, True]
            client.delete_object(Bucket=bucket, Key=f"d/there{number:03}")
            assert [f"there{number:03}" in os.listdir(side) for side in sides] == [False, False]
            client.put_object(
                Bucket=bucket, Key=f"d/new{number}/below", Body=b""
            )  # `new` gives its name to a directory
            assert [f".s3~file~new{number}" in os.listdir(side) for side in sides] == [True, True]
        client.put_object(Bucket=bucket, Key="d/", Body=b"a body")
        assert [".s3~body" in os.listdir(side) for side in sides] == [True, True]
        client.put_object(Bucket=bucket, Key="d/", Body=b"")
        assert [".s3~body" in os.listdir(side) for side in sides] == [False, False]
        (sides[0] / "made").touch()
        assert ["made" in os.listdir(side) for side in sides] == [True, True]
        (sides[0] / "made").rename(home / "away")
        assert ["made" in os.listdir(side) for side in sides] == [False, False]
    finally:
        ending.set()
        for thread in threads:
            thread.join()
    roots = [home.parent, second]
    for number in range(5):
        name = f"{bucket}-{number}"
        assert [name in os.listdir(root) for root in roots] == [False, False]
        client.create_bucket(Bucket=name)
        assert [name in os.listdir(root) for root in roots] == [True, True]
        client.delete_bucket(Bucket=name)
        assert [name in os.listdir(root) for root in roots] == [False, False]


@pytest.fixture
def second(mounted: Server, tmp_path: Path) -> Iterator[Path]:
    """A read-only mount beside the writable one."""
    with mounting(mounted, tmp_path / "second", "--read-only") as directory:
        yield directory


def test_read_only_mounts(mounted: Server, second: Path, tmp_path: Path) -> None:
    client, bucket, home = fresh(mounted)
    client.put_object(Bucket=bucket, Key="d/f", Body=b"through S3")
    other = second / bucket
    assert (other / "d" / "f").read_bytes() == b"through S3"
    for call in (
        (other / "new").touch, lambda: (other / "d" / "f").write_bytes(b""), (other / "d" / "f").unlink, (other / "m").mkdir,
        lambda: os.setxattr(other / "d" / "f", "user.a", b"1"), lambda: (other / "d" / "f").chmod(0o600), lambda: os.truncate(other / "d" / "f", 0),
    ):  # fmt: skip
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.EROFS
    # An open file survives its removal through the other mount, and through S3.
    with (other / "d" / "f").open("rb") as held:
        (home / "d" / "f").unlink()
        assert not (other / "d" / "f").exists()
        assert held.read() == b"through S3"
    refused = subprocess.run(
        [sys.executable, "-m", "stratum.cli.main", "mount", str(mounted.root), str(tmp_path / "third")],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert refused.returncode != 0
    assert "--read-only" in refused.stderr


@pytest.mark.longer
def test_a_seeded_history_of_both_faces(mounted: Server, second: Path) -> None:
    """Each operation through one face is checked through the other and a read-only mount at once, against a dictionary."""
    client, bucket, home = fresh(mounted)
    seed = new_seed()
    dice = random.Random(seed)
    model: dict[str, bytes] = {}
    names = ["a", "b", "d/a", "d/b", "d/e/a", "z/y/x"]
    for step in range(longer(600, 10_000)):
        key = dice.choice(names)
        data = dice.randbytes(dice.choice([0, 1, 100, 20_000, 150_000]))
        match dice.choice(["put", "put", "delete", "write", "append", "unlink", "rename", "copy"]):
            case "put":
                client.put_object(Bucket=bucket, Key=key, Body=data)
                model[key] = data
            case "delete":
                client.delete_object(Bucket=bucket, Key=key)
                model.pop(key, None)
            case "write":
                (home / key).parent.mkdir(parents=True, exist_ok=True)
                (home / key).write_bytes(data)
                model[key] = data
            case "append" if key in model:
                with (home / key).open("ab") as file:
                    file.write(data)
                model[key] += data
            case "unlink" if key in model:
                (home / key).unlink()
                del model[key]
            case "rename" if key in model:
                other = dice.choice(names)
                (home / other).parent.mkdir(parents=True, exist_ok=True)
                (home / key).rename(home / other)
                model[other] = model.pop(key) if other != key else model[key]
            case "copy" if key in model:
                other = dice.choice([name for name in names if name != key])
                client.copy_object(Bucket=bucket, Key=other, CopySource={"Bucket": bucket, "Key": key})
                model[other] = model[key]
        for name in (key, dice.choice(names)):
            if name in model:
                assert (home / name).stat().st_size == len(model[name]), (seed, step, name)
                assert (home / name).read_bytes() == model[name], (seed, step, name)
                assert (second / bucket / name).stat().st_size == len(model[name]), (seed, step, name)
                assert (second / bucket / name).read_bytes() == model[name], (seed, step, name)
                assert client.get_object(Bucket=bucket, Key=name)["Body"].read() == model[name], (seed, step, name)
            else:
                assert not (home / name).exists(), (seed, step, name)
                assert not (second / bucket / name).exists(), (seed, step, name)
        if step % 20 == 0:
            listed = [
                item["Key"]
                for item in client.list_objects_v2(Bucket=bucket).get("Contents", [])
                if not item["Key"].endswith("/")
            ]
            assert listed == sorted(model), (seed, step)


def test_a_get_is_one_state_while_the_mount_writes(mounted: Server) -> None:
    """Whatever is written meanwhile, the bytes of a GET match its ETag: all of one letter."""
    client, bucket, home = fresh(mounted)
    size = 3_000_000
    (home / "f").write_bytes(b"a" * size)
    ending = threading.Event()

    def write() -> None:
        letters = b"bcdefgh"
        number = 0
        while not ending.is_set():
            number += 1
            (home / "next").write_bytes(letters[number % 7 : number % 7 + 1] * size)
            (home / "next").rename(home / "f")
            client.put_object(Bucket=bucket, Key="f", Body=letters[number % 5 : number % 5 + 1] * size)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(40):
            answer = client.get_object(Bucket=bucket, Key="f")
            data = answer["Body"].read()
            assert len(data) == size == answer["ContentLength"]
            assert data == data[:1] * size
            local = (home / "f").read_bytes()
            assert local == local[:1] * len(local)
    finally:
        ending.set()
        writer.join()


def test_a_name_that_is_always_there_is_always_found(mounted: Server) -> None:
    """An open that meets an inode S3 just replaced is looked up again by the kernel, never ENOENT."""
    client, bucket, home = fresh(mounted)
    client.put_object(Bucket=bucket, Key="f", Body=b"0")
    ending = threading.Event()

    def replace() -> None:
        while not ending.is_set():
            client.put_object(Bucket=bucket, Key="f", Body=b"1")

    writers = [threading.Thread(target=replace) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        for _ in range(3000):
            assert (home / "f").read_bytes() in {b"0", b"1"}
            assert (home / "f").stat().st_size == 1
    finally:
        ending.set()
        for writer in writers:
            writer.join()


def test_a_stale_etag_always_loses(mounted: Server) -> None:
    """If-Match on the ETag of a file that the mount edited since: refused in every round."""
    client, bucket, home = fresh(mounted)
    (home / "f").write_bytes(b"0")
    for number in range(100):
        etag = client.head_object(Bucket=bucket, Key="f")["ETag"]
        with (home / "f").open("r+b") as file:
            file.write(b"%d" % (number % 10))
        refused(client.put_object, 412, "PreconditionFailed", Bucket=bucket, Key="f", Body=b"lost", IfMatch=etag)
