"""Random operations on files of a real mount against plain byte strings, in the manner of fsx; seeded, S3 reading along.

`STRATUM_SEED` repeats a run.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
from typing import TYPE_CHECKING, Any

import pytest

from tests.mount.test_file_ranges import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, fallocate
from tests.support import longer, new_seed

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support import Server

SIZE_MAX = 600_000
OPERATIONS = longer(1500, 20_000)


class Subject:
    """One file, its descriptors and what it must hold."""

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.key = key
        self.content = bytearray()
        self.descriptors = [os.open(path, os.O_RDWR | os.O_CREAT, 0o644)]

    def any(self, rng: random.Random) -> int:
        return rng.choice(self.descriptors)

    def grow(self, size: int) -> None:
        if len(self.content) < size:
            self.content += bytes(size - len(self.content))


def check_holes(descriptor: int, content: bytearray, offset: int) -> None:
    """What is skipped must be zeros."""
    if offset >= len(content):
        return
    try:
        start = os.lseek(descriptor, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        start = len(content)
    assert not any(content[offset:start]), "bytes are taken for a hole"
    if start < len(content):
        assert start < os.lseek(descriptor, start, os.SEEK_HOLE) <= len(content)


def step(rng: random.Random, file: Subject, others: list[Subject], s3: Any, bucket: str) -> str:
    offset, length = rng.randrange(SIZE_MAX), rng.choice((1, 100, 4096, 5000, 70_000))
    data = rng.randbytes(length)
    action = rng.choice(
        (
            "write", "write", "write", "append", "truncate", "read", "read", "map", "map-write", "reopen", "open", "close", "fsync", "get", "rename",
            "stat", "punch", "zero", "allocate", "copy", "copy-within", "data",
        )
    )  # fmt: skip
    descriptor = file.any(rng)
    content = file.content
    if action == "write":
        assert os.pwrite(descriptor, data, offset) == length
        file.grow(offset + length)
        content[offset : offset + length] = data
    elif action == "append" and len(content) < SIZE_MAX:
        appender = os.open(file.path, os.O_WRONLY | os.O_APPEND)
        os.write(appender, data)
        os.close(appender)
        content += data
    elif action == "truncate":
        if rng.random() < 0.5:
            os.ftruncate(descriptor, offset)
        else:
            os.truncate(file.path, offset)
        file.grow(offset)
        del content[offset:]
    elif action == "read":
        assert os.pread(descriptor, length, offset) == bytes(content[offset : offset + length]), "a read is wrong"
    elif action in {"map", "map-write"} and content:
        with mmap.mmap(descriptor, len(content)) as mapping:
            at = min(offset, len(content) - 1)
            if action == "map-write":
                piece = data[: len(content) - at]
                mapping[at : at + len(piece)] = piece
                content[at : at + len(piece)] = piece
                if rng.random() < 0.5:
                    mapping.flush()
            else:
                assert mapping[at : at + length] == bytes(content[at : at + length]), "a mapping is wrong"
    elif action == "reopen":
        for old in file.descriptors:
            os.close(old)
        file.descriptors = [os.open(file.path, os.O_RDWR)]
    elif action == "open" and len(file.descriptors) < 4:
        file.descriptors.append(os.open(file.path, os.O_RDWR))
    elif action == "close" and len(file.descriptors) > 1:
        os.close(file.descriptors.pop())
    elif action == "fsync":
        os.fsync(descriptor)
    elif action == "get":
        os.fsync(descriptor)
        assert s3.get_object(Bucket=bucket, Key=file.key)["Body"].read() == bytes(content), "S3 shows other bytes"
    elif action == "rename":
        target = file.path.with_name(f"{file.path.name.partition('~')[0]}~{rng.randrange(1000)}")
        file.path.rename(target)
        file.key = file.key.rpartition("/")[0] + "/" + target.name
        file.path = target
    elif action in {"punch", "zero", "allocate"}:
        mode = {"punch": KEEP_SIZE | PUNCH_HOLE, "zero": ZERO_RANGE, "allocate": 0}[action]
        fallocate(descriptor, mode, offset, length)
        if action != "punch":
            file.grow(offset + length)
        if action != "allocate":
            stop = min(offset + length, len(content))
            content[offset:stop] = bytes(max(0, stop - offset))
    elif action in {"copy", "copy-within"}:
        source = file if action == "copy-within" else rng.choice(others)
        start = rng.randrange(SIZE_MAX)
        piece = bytes(source.content[start : start + length])
        if piece and (source is not file or abs(start - offset) >= len(piece)):
            assert os.copy_file_range(source.any(rng), descriptor, len(piece), start, offset) == len(piece)
            file.grow(offset)
            content[offset : offset + len(piece)] = piece
    elif action == "data":
        check_holes(descriptor, content, offset)
    elif action == "stat":
        assert file.path.stat().st_size == os.fstat(descriptor).st_size == len(content), "a size is wrong"
    return action


@pytest.mark.longer
def test_random_operations_on_files_match_a_model(mounted: Server, home: Path) -> None:
    number = new_seed()
    rng = random.Random(number)
    s3 = mounted.client()
    folder = home / "fsx"
    folder.mkdir()
    files = [Subject(folder / f"f{n}", f"fsx/f{n}") for n in range(3)]
    history: list[str] = []
    try:
        for at in range(OPERATIONS):
            which = rng.randrange(len(files))
            history.append(f"{at} f{which} {step(rng, files[which], files, s3, home.name)}")
        for file in files:
            assert file.path.read_bytes() == bytes(file.content)
            for descriptor in file.descriptors:
                os.close(descriptor)
            assert s3.get_object(Bucket=home.name, Key=file.key)["Body"].read() == bytes(file.content)
    except AssertionError as error:
        raise AssertionError(f"seed {number}: {error}; the last steps: {history[-12:]}") from error
