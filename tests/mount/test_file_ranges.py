"""Parts of files through the mount: holes, copies that share bytes, files without a name."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import random
import stat
import subprocess
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from stratum.volume import Volume
from tests.mount.test_semantics import code_of
from tests.mount.test_several_mounts import mount_process, mounting
from tests.support import serving, stratum

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support import Server

KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO_RANGE, INSERT = 1, 2, 8, 16, 32
EXCHANGE, WHITEOUT = 2, 4
FICLONE = 0x40049409
_libc = ctypes.CDLL(None, use_errno=True)


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    if _libc.fallocate(descriptor, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
        raise OSError(ctypes.get_errno(), f"[Errno {ctypes.get_errno()}] fallocate")


def rename(old: Path, new: Path, flags: int) -> None:
    if _libc.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags):
        raise OSError(ctypes.get_errno(), f"[Errno {ctypes.get_errno()}] renameat2")


def copy(source: int, target: int, length: int, start: int, at: int) -> int:
    """All of it, as programs do."""
    done = 0
    while done < length:
        copied = os.copy_file_range(source, target, length - done, start + done, at + done)
        if not copied:
            break
        done += copied
    return done


def extents_of(server: Server, number: int) -> set[int]:
    with Volume(server.root, "test") as volume, volume.snapshot() as reader:
        return {piece.extent for piece in reader.slices(number)}


@pytest.fixture
def file(home: Path) -> Iterator[int]:
    descriptor = os.open(home / "f", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


def body(s3: Any, bucket: str, key: str) -> bytes:
    found: bytes = s3.get_object(Bucket=bucket, Key=key)["Body"].read()
    return found


# -- fallocate and lseek --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [9000, 300_000], ids=["inline", "extents"])
def test_a_hole_is_punched(home: Path, s3: Any, file: int, size: int) -> None:
    data = bytearray(random.Random(size).randbytes(size))
    os.write(file, data)
    os.fsync(file)
    before = s3.head_object(Bucket=home.name, Key="f")["ETag"]
    os.pwrite(file, b"unflushed", 100)
    data[100:109] = b"unflushed"
    blocks = os.fstat(file).st_blocks
    fallocate(file, KEEP_SIZE | PUNCH_HOLE, 50, size // 2)
    assert os.fstat(file).st_blocks < blocks or size < 16384, "a hole takes no room"
    data[50 : 50 + size // 2] = bytes(size // 2)
    assert os.pread(file, size, 0) == data
    assert body(s3, home.name, "f") == data, "S3 sees it at once"
    assert s3.head_object(Bucket=home.name, Key="f")["ETag"] != before
    assert os.fstat(file).st_size == size
    fallocate(file, KEEP_SIZE | PUNCH_HOLE, size - 10, 5000)
    data[-10:] = bytes(10)
    assert (home / "f").read_bytes() == data
    assert (os.fstat(file).st_size, len(body(s3, home.name, "f"))) == (size, size)


def test_a_range_is_zeroed_and_the_file_grows_with_it(home: Path, s3: Any, file: int) -> None:
    os.write(file, b"x" * 100_000)
    fallocate(file, ZERO_RANGE, 90_000, 110_000)
    assert os.fstat(file).st_size == 200_000
    assert body(s3, home.name, "f") == b"x" * 90_000 + bytes(110_000)
    fallocate(file, ZERO_RANGE | KEEP_SIZE, 0, 10)
    fallocate(file, ZERO_RANGE | KEEP_SIZE, 300_000, 10)
    assert os.pread(file, 20, 0) == bytes(10) + b"x" * 10
    assert os.fstat(file).st_size == 200_000


def test_room_is_asked_for_and_the_file_grows(home: Path, s3: Any, file: int) -> None:
    fallocate(file, 0, 0, 70_000)
    os.pwrite(file, b"x" * 10, 65_000)
    fallocate(file, 0, 10_000, 10)
    fallocate(file, KEEP_SIZE, 0, 500_000)
    assert os.pread(file, 100_000, 0) == bytes(65_000) + b"x" * 10 + bytes(4990)
    os.fsync(file)
    assert body(s3, home.name, "f") == bytes(65_000) + b"x" * 10 + bytes(4990)
    assert code_of(lambda: fallocate(file, KEEP_SIZE, 0, 1 << 50)) == errno.ENOSPC
    assert code_of(lambda: fallocate(file, 0, 0, 1 << 50)) == errno.ENOSPC
    assert os.fstat(file).st_size == 70_000
    for mode in (COLLAPSE, INSERT):
        assert code_of(partial(fallocate, file, mode, 4096, 4096)) == errno.EOPNOTSUPP
    assert code_of(lambda: fcntl.ioctl(file, FICLONE, file)) == errno.EOPNOTSUPP


def test_a_quota_is_asked_when_a_file_grows(home: Path, mounted: Server, file: int) -> None:
    stratum("quota", "set", mounted.root, "--bucket", home.name, "--bytes", "100000")
    assert code_of(lambda: fallocate(file, 0, 0, 100_001)) == errno.EDQUOT
    assert code_of(lambda: fallocate(file, ZERO_RANGE, 0, 100_001)) == errno.EDQUOT
    fallocate(file, 0, 0, 60_000)
    with (home / "g").open("wb") as other:
        assert code_of(lambda: os.copy_file_range(file, other.fileno(), 60_000, 0, 0)) == errno.EDQUOT
    stratum("quota", "set", mounted.root, "--bucket", home.name, "--remove")


def test_holes_are_seen(home: Path, file: int) -> None:
    def parts() -> list[tuple[int, int]]:
        found, at, size = [], 0, os.fstat(file).st_size
        with suppress(OSError):
            while at < size:
                start = os.lseek(file, at, os.SEEK_DATA)
                at = os.lseek(file, start, os.SEEK_HOLE)
                found.append((start, at))
        return found

    os.ftruncate(file, 1 << 40)
    assert parts() == []
    assert os.lseek(file, 5, os.SEEK_HOLE) == 5
    os.pwrite(file, b"x" * 50_000, 1_000_000)
    assert parts() == [(1_000_000, 1_050_000)], "what is not committed yet counts"
    os.fsync(file)
    assert parts() == [(1_000_000, 1_050_000)]
    os.pwrite(file, b"y" * 10, 1_050_000)
    os.pwrite(file, b"z", (1 << 40) - 1)
    assert parts() == [(1_000_000, 1_050_010), ((1 << 40) - 1, 1 << 40)]
    os.ftruncate(file, 1_020_000)
    os.ftruncate(file, 2_000_000)
    assert parts() == [(1_000_000, 1_020_000)]
    fallocate(file, KEEP_SIZE | PUNCH_HOLE, 1_005_000, 1000)
    assert parts() == [(1_000_000, 1_005_000), (1_006_000, 1_020_000)]
    for whence in (os.SEEK_DATA, os.SEEK_HOLE):
        assert code_of(partial(os.lseek, file, 2_000_000, whence)) == errno.ENXIO
        assert code_of(partial(os.lseek, file, -1, whence)) == errno.ENXIO
    with mmap.mmap(file, 2_000_000) as mapping:
        mapping[1_900_000:1_900_003] = b"abc"
        start = os.lseek(file, 1_500_000, os.SEEK_DATA)
        assert start <= 1_900_000, "what was stored to a mapping is no hole"
    (home / "small").write_bytes(b"x" * 10)
    with (home / "small").open("r+b") as small:
        small.truncate(100)
        assert os.lseek(small.fileno(), 0, os.SEEK_HOLE) == 10


def test_a_file_in_very_many_pieces(home: Path, mounted: Server, file: int) -> None:
    """More slices than are read or shared at once."""
    pieces = 3000
    for number in range(pieces):
        os.pwrite(file, b"%d" % (number % 10), 100_000 + number * 2)
    os.fsync(file)
    data = os.pread(file, 200_000, 0)
    assert len(extents_of(mounted, os.fstat(file).st_ino)) > 1024
    with (home / "copy").open("w+b") as target:
        assert copy(file, target.fileno(), len(data), 0, 5) == len(data)
    assert (home / "copy").read_bytes() == bytes(5) + data
    at = 100_000
    for _ in range(pieces - 1):
        assert os.lseek(file, at, os.SEEK_HOLE) == at + 1
        at = os.lseek(file, at + 1, os.SEEK_DATA)
    assert os.lseek(file, 0, os.SEEK_DATA) == 100_000


# -- copies ---------------------------------------------------------------------------------------------------------------


def test_a_copy_shares_bytes(home: Path, s3: Any, mounted: Server) -> None:
    data = random.Random(1).randbytes(5_000_000)
    (home / "f").write_bytes(data)
    subprocess.run(["cp", home / "f", home / "g"], check=True)
    assert body(s3, home.name, "g") == data
    numbers = [(home / name).stat().st_ino for name in "fg"]
    assert extents_of(mounted, numbers[0]) == extents_of(mounted, numbers[1]) != set()
    (home / "f").unlink()
    assert (home / "g").read_bytes() == data
    other = mounted.mount / f"{home.name}-2" if mounted.mount else Path()
    other.mkdir()
    (home / "d").mkdir()
    subprocess.run(["mv", home / "g", home / "d" / "g"], check=True)
    subprocess.run(["mv", home / "d", other], check=True)
    assert body(s3, other.name, "d/g") == data
    assert extents_of(mounted, (other / "d" / "g").stat().st_ino)
    assert not (home / "d").exists()
    subprocess.run(["rm", "-r", other], check=True)


def test_parts_of_files_are_copied(home: Path, s3: Any, mounted: Server) -> None:
    """Against a model: inline and not, within a file and between two, with bytes that nobody has flushed, up to the end and beyond."""
    rng = random.Random(7)
    for size, other in (
        (0, 0),
        (3000, 0),
        (3000, 9000),
        (3000, 100_000),
        (100_000, 0),
        (100_000, 9000),
        (400_000, 400_000),
    ):
        names = f"s{size}-{other}", f"t{size}-{other}"
        contents = bytearray(rng.randbytes(size)), bytearray(rng.randbytes(other))
        descriptors = [os.open(home / name, os.O_RDWR | os.O_CREAT) for name in names]
        for descriptor, content in zip(descriptors, contents, strict=True):
            os.write(descriptor, content)
        for _ in range(30):
            source, target = rng.randrange(2), rng.randrange(2)
            if rng.random() < 0.4:
                at, piece = rng.randrange(len(contents[source]) + 1), rng.randbytes(rng.choice((10, 5000)))
                os.pwrite(descriptors[source], piece, at)
                contents[source][at : at + len(piece)] = piece
            start, at, length = (rng.choice((0, 1, 4096, rng.randrange(500_000))) for _ in range(3))
            clipped = max(0, min(length, len(contents[source]) - start))
            if source == target and start < at + clipped and at < start + clipped:
                continue
            piece = bytes(contents[source][start : start + length])
            if source == target:
                length = clipped  # whoever asks for more gets what it has copied itself
            assert copy(descriptors[source], descriptors[target], length, start, at) == len(piece)
            if piece:
                content = contents[target]
                content += bytes(max(0, at - len(content)))
                content[at : at + len(piece)] = piece
            assert os.pread(descriptors[target], 1 << 20, 0) == contents[target]
        for name, descriptor, content in zip(names, descriptors, contents, strict=True):
            os.close(descriptor)
            assert body(s3, home.name, name) == content
    stratum("fsck", mounted.root)


def test_a_part_is_not_copied_onto_itself(file: int) -> None:
    os.write(file, b"x" * 10)
    assert code_of(lambda: os.copy_file_range(file, file, 2, 0, 1)) == errno.EINVAL
    assert os.copy_file_range(file, file, 2, 10, 1) == 0


def test_holes_are_copied_as_holes(home: Path, mounted: Server) -> None:
    with (home / "f").open("w+b") as file, (home / "g").open("w+b") as other:
        file.truncate(1 << 40)
        assert copy(file.fileno(), other.fileno(), 1 << 40, 0, 0) == 1 << 40
    assert (home / "g").stat().st_size == 1 << 40
    assert extents_of(mounted, (home / "g").stat().st_ino) == set()


def test_other_mounts_see_it_at_once(home: Path, mounted: Server, tmp_path: Path) -> None:
    with mounting(mounted, tmp_path / "other", "--read-only") as other, (home / "f").open("w+b", 0) as file:
        there = other / home.name
        file.write(b"abc" * 1000)
        (home / "g").write_bytes(b"x" * 100_000)
        os.fsync(file)
        assert (there / "f").read_bytes() == b"abc" * 1000
        fallocate(file.fileno(), KEEP_SIZE | PUNCH_HOLE, 0, 1000)
        assert (there / "f").read_bytes()[:1003] == bytes(1000) + (b"abc" * 1000)[1000:1003]
        with (home / "g").open("rb") as source:
            copy(source.fileno(), file.fileno(), 100_000, 0, 10)
        assert (there / "f").read_bytes() == bytes(10) + b"x" * 100_000


# -- names ----------------------------------------------------------------------------------------------------------------


def test_two_names_are_exchanged_and_a_whiteout_is_left(home: Path, s3: Any) -> None:
    (home / "a").write_bytes(b"a")
    (home / "d").mkdir()
    (home / "d" / "b").write_bytes(b"b")
    rename(home / "a", home / "d", EXCHANGE)
    assert ((home / "d").read_bytes(), (home / "a" / "b").read_bytes()) == (b"a", b"b")
    assert {row["Key"] for row in s3.list_objects_v2(Bucket=home.name)["Contents"]} == {"d", "a/b"}
    for old, new in (("d", "e"), ("a", "c")):
        rename(home / old, home / new, WHITEOUT)
        found = (home / old).lstat()
        assert (stat.S_ISCHR(found.st_mode), found.st_rdev) == (True, 0)
    assert ((home / "e").read_bytes(), (home / "c" / "b").read_bytes()) == (b"a", b"b")
    assert {row["Key"] for row in s3.list_objects_v2(Bucket=home.name)["Contents"]} == {"e", "c/b"}
    assert code_of(lambda: rename(home / "e", home / "c", EXCHANGE | WHITEOUT)) == errno.EINVAL
    for name in "da":
        (home / name).unlink()


def nameless(folder: Path, flags: int = 0) -> int:
    return os.open(folder, os.O_TMPFILE | os.O_RDWR | flags, 0o640)


def give_name(descriptor: int, path: Path) -> None:
    follow = 0x400  # os.link does not ask for it
    if _libc.linkat(-100, b"/proc/self/fd/%d" % descriptor, -100, os.fsencode(path), follow):
        raise OSError(ctypes.get_errno(), f"[Errno {ctypes.get_errno()}] linkat")


def test_a_file_without_a_name_gets_one(home: Path, s3: Any) -> None:
    before = os.umask(0o027)
    try:
        for size in (0, 100, 200_000):
            descriptor = nameless(home)
            found = os.fstat(descriptor)
            assert (found.st_nlink, stat.S_IMODE(found.st_mode), found.st_size) == (0, 0o640, 0)
            os.write(descriptor, b"x" * size)
            assert os.listdir(home) == []
            give_name(descriptor, home / "f")
            assert body(s3, home.name, "f") == b"x" * size, "it appears as a whole"
            assert os.fstat(descriptor).st_nlink == 1
            os.write(descriptor, b"y")
            os.close(descriptor)
            assert (home / "f").read_bytes() == b"x" * size + b"y"
            (home / "f").unlink()
    finally:
        os.umask(before)


def test_a_file_without_a_name_goes_when_it_is_closed(mounted: Server, home: Path) -> None:
    descriptor = nameless(home, os.O_EXCL)
    os.write(descriptor, b"x" * 100_000)
    os.fsync(descriptor)
    number = os.fstat(descriptor).st_ino
    assert os.pread(descriptor, 200_000, 0) == b"x" * 100_000
    assert code_of(lambda: give_name(descriptor, home / "f")) == errno.ENOENT
    (home / "taken").write_bytes(b"")
    os.close(descriptor)
    again = nameless(home)
    assert code_of(lambda: give_name(again, home / "taken")) == errno.EEXIST
    give_name(again, home / "g")
    os.close(again)
    assert (home / "g").read_bytes() == b""
    with Volume(mounted.root, "test") as volume:
        while True:
            with volume.snapshot() as reader:
                if not reader.has_inode(number):
                    break
    assert code_of(lambda: nameless(mounted.mount or Path())) == errno.EPERM
    stratum("fsck", mounted.root)


def test_files_without_names_go_with_a_mount_that_is_killed(tmp_path: Path) -> None:
    with serving(tmp_path / "served", allow_errors=True) as server:
        server.client().create_bucket(Bucket="one")
        number = 0
        with suppress(AssertionError), mount_process(server, tmp_path / "a") as mount:
            descriptor = nameless(tmp_path / "a" / "one")
            os.write(descriptor, b"x" * 100_000)
            os.fsync(descriptor)
            number = os.fstat(descriptor).st_ino
            mount.kill()
            mount.wait()
        with mounting(server, tmp_path / "b"):
            pass
        with Volume(server.root, "test") as volume:
            while True:
                with volume.snapshot() as reader:
                    if not reader.has_inode(number):
                        break
        stratum("fsck", server.root)
