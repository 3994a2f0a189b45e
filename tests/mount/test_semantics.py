"""Statements of SEMANTICS.md that no other test is about."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from stratum import files
from stratum.errors import TooManyLinks
from stratum.schema import LINKS_MAX
from stratum.volume import Volume
from tests.mount.test_several_mounts import SHARED, mounting
from tests.support import serving

if TYPE_CHECKING:
    from collections.abc import Callable

    from stratum.transaction import MetadataTransaction
    from tests.support import Server


def code_of(call: Callable[[], Any]) -> int:
    with pytest.raises(OSError, match=r"\[Errno") as caught:
        call()
    return caught.value.errno or 0


def test_fsync_of_a_directory(home: Path) -> None:
    descriptor = os.open(home, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(descriptor)
    os.close(descriptor)


def test_s3_ignores_mode_bits(home: Path, s3: Any) -> None:
    file = home / "f"
    file.write_bytes(b"nobody may read this")
    file.chmod(0)
    os.chown(file, 4242, 4242)
    assert s3.get_object(Bucket=home.name, Key="f")["Body"].read() == b"nobody may read this"


def test_access_times_stay(home: Path) -> None:
    file = home / "f"
    file.write_bytes(b"x")
    os.utime(file, ns=(1_000_000_000, 2_000_000_000))
    assert file.read_bytes() == b"x"
    assert file.stat().st_atime_ns == 1_000_000_000


def test_times_far_away(home: Path) -> None:
    file = home / "f"
    file.write_bytes(b"x")
    for time_ns in (-1, -86_400_000_000_000 * 365 * 50 + 7, 2**31 * 10**9 + 123_456_789, 2**32 * 10**9 + 1):
        os.utime(file, ns=(time_ns, time_ns))
        found = file.stat()
        assert (found.st_atime_ns, found.st_mtime_ns) == (time_ns, time_ns)


def test_locks_within_a_mount(home: Path) -> None:
    (home / "f").write_bytes(b"x" * 100)
    first, second = (os.open(home / "f", os.O_RDWR) for _ in range(2))
    fcntl.flock(first, fcntl.LOCK_EX)
    assert code_of(lambda: fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)) == errno.EAGAIN
    fcntl.flock(first, fcntl.LOCK_UN)
    fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    record = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 50, 0)
    set_open_file_lock = 37  # F_OFD_SETLK
    fcntl.fcntl(first, set_open_file_lock, record)
    assert code_of(lambda: fcntl.fcntl(second, set_open_file_lock, record)) == errno.EAGAIN
    fcntl.lockf(first, fcntl.LOCK_EX, 10, 60)
    other = (
        "import fcntl, sys\nfcntl.lockf(open(sys.argv[1], 'r+b'), fcntl.LOCK_EX | fcntl.LOCK_NB, 10, int(sys.argv[2]))"
    )
    for start, free in ((60, False), (80, True)):
        words = [sys.executable, "-c", other, str(home / "f"), str(start)]
        assert (subprocess.run(words, capture_output=True).returncode == 0) == free
    os.close(first)
    os.close(second)


def test_what_is_not_there(home: Path) -> None:
    descriptor = os.open(home / "f", os.O_RDWR | os.O_CREAT)
    get_flags = 0x80086601  # FS_IOC_GETFLAGS
    assert code_of(lambda: fcntl.ioctl(descriptor, get_flags, bytes(8))) == errno.ENOTTY
    os.close(descriptor)


def test_the_last_flush_of_two_mounts_wins(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "served") as server,
        mounting(server, tmp_path / "a", SHARED) as first,
        mounting(server, tmp_path / "b", SHARED) as second,
    ):
        server.client().create_bucket(Bucket="one")
        (first / "one" / "f").write_bytes(b"")
        here, there = (os.open(side / "one" / "f", os.O_WRONLY) for side in (first, second))
        os.write(here, b"first")
        os.write(there, b"2nd")
        os.fsync(here)
        assert (second / "one" / "f").stat().st_size in {3, 5}
        os.fsync(there)
        assert (first / "one" / "f").read_bytes() == b"2nd"
        os.close(here)
        os.close(there)
        assert (first / "one" / "f").read_bytes() == (second / "one" / "f").read_bytes() == b"2nd"


def test_a_mount_is_named_by_its_volume(mounted: Server) -> None:
    assert f"{mounted.root} {mounted.mount} fuse.stratum" in Path("/proc/self/mounts").read_text()


def test_statfs_is_true(mounted: Server, home: Path) -> None:
    ours, disk = os.statvfs(home), os.statvfs(mounted.root)
    reserve = 64 * 1024 * 1024
    assert ours.f_namemax == 255
    assert ours.f_blocks * ours.f_frsize == pytest.approx(disk.f_blocks * disk.f_frsize, rel=0.01)
    free = ours.f_bavail * ours.f_frsize
    assert free <= disk.f_bavail * disk.f_frsize - reserve + disk.f_blocks * disk.f_frsize // 100
    assert free == pytest.approx(disk.f_bavail * disk.f_frsize - reserve, rel=0.05)


def test_statfs_counts_inodes(mounted: Server, home: Path, tmp_path: Path) -> None:
    def used(folder: Path) -> int:
        found = os.statvfs(folder)
        assert found.f_files > found.f_ffree == found.f_favail > 1000
        return found.f_files - found.f_ffree

    def until(folder: Path, wanted: int) -> None:
        deadline = time.monotonic() + 20  # names that are gone may still be on their way to somebody
        while used(folder) != wanted:
            assert time.monotonic() < deadline, f"{used(folder)} inodes, not {wanted}"
            time.sleep(0.1)

    with mounting(mounted, tmp_path / "one", "--read-only", "--bucket", home.name) as one:
        assert used(one) == 1
        (home / "d").mkdir()
        for number in range(20):
            (home / "d" / str(number)).write_bytes(b"x")
        (home / "link").symlink_to("d")
        os.link(home / "d" / "0", home / "again")
        assert used(one) == 1 + 22
        assert used(home) > used(one)
        for number in range(20):
            (home / "d" / str(number)).unlink()
        with (home / "open").open("wb") as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
            (home / "open").unlink()
            until(one, 1 + 4)  # d, link, what has another name, what is open
        until(one, 1 + 3)
        lines = subprocess.run(["df", "-i", one], capture_output=True, text=True, check=True).stdout.splitlines()
        assert int(lines[1].split()[2]) == 4


@pytest.mark.parametrize("closed", [False, True], ids=["not written back yet", "closed"])
def test_blocks_are_what_is_allocated(home: Path, *, closed: bool) -> None:
    """And never none for a file with bytes, which tar would take for a hole."""
    path = home / f"sparse-{closed}"

    def blocks() -> int:
        if not closed:
            return os.fstat(file.fileno()).st_blocks
        os.fsync(file.fileno())
        return path.stat().st_blocks

    with path.open("w+b") as file:
        assert blocks() == 0
        file.write(b"x")
        file.flush()
        assert blocks() == 1
        file.seek(10 << 30)
        file.write(b"x")
        file.flush()
        assert 1 <= blocks() <= 64
        file.seek(1 << 20)
        file.write(b"x" * 1_000_000)
        file.flush()
        assert 1_000_000 // 512 <= blocks() <= 1_000_000 // 512 + 64
        file.truncate(100)
        assert 1 <= blocks() <= 40
        file.truncate(10 << 30)
        assert 1 <= blocks() <= 40
        file.truncate(0)
        assert blocks() == 0


def test_a_sparse_file_is_copied_as_it_is(home: Path, tmp_path: Path) -> None:
    path, archive = home / "sparse", tmp_path / "archive.tar"
    with path.open("wb") as file:
        file.truncate(1 << 30)
        file.seek(1 << 29)
        file.write(b"in the middle")
    (home / "small").write_bytes(b"small")
    told = subprocess.run(["du", "-k", path], capture_output=True, text=True, check=True).stdout
    assert int(told.split()[0]) <= 64
    subprocess.run(["tar", "-S", "-C", home, "-cf", archive, "sparse", "small"], check=True)
    assert archive.stat().st_size < 1 << 20
    subprocess.run(["tar", "-C", tmp_path, "-xf", archive], check=True)
    assert (tmp_path / "small").read_bytes() == b"small"
    with (tmp_path / "sparse").open("rb") as file:
        file.seek(1 << 29)
        assert file.read(13) == b"in the middle"


def test_links_end(mounted: Server, home: Path) -> None:
    (home / "f").write_bytes(b"x")
    number = (home / "f").stat().st_ino
    parent = home.stat().st_ino
    with Volume(mounted.root, "test") as volume:

        def link(tx: MetadataTransaction) -> None:
            inode = tx.inode(number)
            links, inode.nlink = inode.nlink, LINKS_MAX
            try:
                files.link(tx, number, parent, b"one too many")
            finally:
                inode.nlink = links

        with pytest.raises(TooManyLinks):
            volume.mutate(link)
    assert (home / "f").stat().st_nlink == 1


def test_quotas_of_a_bucket(home: Path, mounted: Server, tmp_path: Path) -> None:
    from tests.support import stratum

    stratum("quota", "set", mounted.root, "--bucket", home.name, "--bytes", "100000", "--objects", "3")
    (home / "a").write_bytes(b"x" * 60_000)
    with (home / "b").open("wb", buffering=0) as file:
        assert file.write(b"x" * 40_000) == 40_000
        assert code_of(lambda: file.write(b"x")) == errno.EDQUOT
    assert (home / "b").stat().st_size == 40_000
    assert code_of(lambda: os.truncate(home / "a", 60_001)) == errno.EDQUOT
    os.truncate(home / "a", 10_000)
    os.truncate(home / "a", 60_000)  # a hole counts, and fits
    (home / "c").touch()
    assert code_of((home / "d").touch) == errno.EDQUOT
    assert not (home / "d").exists()
    with mounting(mounted, tmp_path / "one", "--read-only", "--bucket", home.name):
        space = os.statvfs(tmp_path / "one")
        assert space.f_blocks * space.f_frsize <= 100_000
        assert space.f_bavail == 0
    (home / "b").unlink()
    assert {
        row["objects_max"]
        for row in json.loads(stratum("quota", "show", mounted.root, "--bucket", home.name, "--json").stdout)["quotas"]
    } == {3}
    stratum("quota", "set", mounted.root, "--bucket", home.name, "--remove")
    (home / "d").write_bytes(b"x" * 200_000)
