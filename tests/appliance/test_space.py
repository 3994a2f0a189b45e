"""A full disk: nothing half-written, a clear answer, and deletes go on working."""

from __future__ import annotations

import os
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest
from botocore.exceptions import ClientError

from tests.support import Server, need_fuse, stratum

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Server]:
    """A served and mounted volume on a disk of 160 MiB."""
    need_fuse()
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160m", "tmpfs", str(disk)], check=True)
    try:
        server = Server(disk, mount=True, settings={"volume": {"free_bytes_min": 0}})
        server.log = tmp_path / "serve.log"
        server.start()
        try:
            yield server
        finally:
            assert server.stop() == 0
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(client: Any) -> list[str]:
    """Put objects of all sizes until nothing more fits; the keys that were acknowledged."""
    stored: list[str] = []
    for size in (6_000_000, 300_000, 16_000, 100):
        for number in range(20_000):
            try:
                client.put_object(Bucket="full", Key=f"{size}-{number}", Body=b"x" * size)
            except ClientError as error:
                if error.response["Error"]["Code"] != "InsufficientStorage":
                    raise
                break
            stored.append(f"{size}-{number}")
    return stored


def write_until_full(fd: int) -> None:
    for _ in range(100):
        os.write(fd, b"y" * 1_000_000)
        os.fsync(fd)


def take_the_last_bytes(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


def put_once_space_is_back(client: Any, key: str, body: bytes) -> None:
    """Deleted bytes are reclaimed behind the answer to the delete, by the housekeeper's next rounds."""
    deadline_s = time.monotonic() + 30
    while True:
        try:
            client.put_object(Bucket="full", Key=key, Body=body)
        except ClientError as error:
            if error.response["Error"]["Code"] != "InsufficientStorage" or time.monotonic() > deadline_s:
                raise
            time.sleep(0.1)
        else:
            return


def test_at_zero_bytes_free(small: Server) -> None:
    client = small.client()
    client.create_bucket(Bucket="full")
    stored = fill(client)
    # Take the last bytes as well.
    ballast = small.root.parent / "ballast"
    with pytest.raises(OSError, match="No space left"):
        take_the_last_bytes(ballast)
    assert os.statvfs(small.root).f_bavail == 0
    listed = [
        item["Key"]
        for page in client.get_paginator("list_objects_v2").paginate(Bucket="full")
        for item in page["Contents"]
    ]
    assert sorted(listed) == sorted(stored)
    assert client.get_object(Bucket="full", Key=stored[0])["Body"].read() == b"x" * 6_000_000
    assert small.mount is not None
    fd = os.open(small.mount / "full" / "file", os.O_CREAT | os.O_WRONLY)
    with pytest.raises(OSError, match="No space left"):
        write_until_full(fd)
    with pytest.raises(OSError, match="No space left"):
        os.close(fd)
    assert len([process for process in small.processes() if process["role"] == "s3"]) == 2
    for key in stored:
        client.delete_object(Bucket="full", Key=key)
    (small.mount / "full" / "file").unlink(missing_ok=True)
    ballast.unlink()
    put_once_space_is_back(client, "again", b"z" * 1000)
    assert client.get_object(Bucket="full", Key="again")["Body"].read() == b"z" * 1000


def test_the_soft_limit(tmp_path: Path) -> None:
    """Below volume.free_bytes_min writes stop with 507 and ENOSPC while deletes go on."""
    from tests.support import serving

    with serving(tmp_path) as server:
        client = server.client()
        client.create_bucket(Bucket="soft")
        client.put_object(Bucket="soft", Key="k", Body=b"x")
        server.stop()
        server.configure({"volume": {"free_bytes_min": 1 << 60}})
        server.start()
        with pytest.raises(ClientError, match="InsufficientStorage"):
            client.put_object(Bucket="soft", Key="k2", Body=b"x")
        assert "only deletes" in stratum("status", server.root, expect=2).stdout
        client.delete_object(Bucket="soft", Key="k")
        assert client.list_objects_v2(Bucket="soft")["KeyCount"] == 0
