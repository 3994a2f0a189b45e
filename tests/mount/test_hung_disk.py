"""A data disk that hangs holds up who reads from it, and nobody else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import serving

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
READERS = 12
BIG = os.urandom(400_000)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A filesystem of ours as the data disk, and the process to stop."""
    folder = tmp_path / "disk"
    folder.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.appliance.forgetful", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "mounted\n"
    yield folder, process.pid
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=30)
    subprocess.run(["umount", "--lazy", str(folder)], check=False, capture_output=True)


@contextmanager
def home_on(folder: Path, root: Path) -> Iterator[Path]:
    """A bucket of a mount whose data lie in `folder`."""
    (folder / "hot").mkdir()
    with serving(root, mount=True, settings={"volume": {"hot": [str(folder / "hot")]}}) as server:
        assert server.mount is not None
        home = server.mount / "home"
        home.mkdir()
        yield home


def test_a_hung_disk_does_not_freeze_the_mount(disk: tuple[Path, int], tmp_path: Path) -> None:
    folder, pid = disk
    with home_on(folder, tmp_path / "served") as home:
        for number in range(READERS):
            (home / f"big{number}").write_bytes(BIG)
        (home / "small").write_bytes(b"small")
        Path("/proc/sys/vm/drop_caches").write_text("3")
        os.kill(pid, signal.SIGSTOP)
        read: list[bytes] = []
        readers = [
            threading.Thread(
                target=lambda number=number: read.append((home / f"big{number}").read_bytes()), daemon=True
            )
            for number in range(READERS)
        ]
        try:
            for reader in readers:
                reader.start()
            readers[0].join(0.5)
            assert read == []
            for number in range(READERS):
                assert (home / f"big{number}").stat().st_size == len(BIG)
            assert (home / "small").read_bytes() == b"small"
            assert len(os.listdir(home)) == READERS + 1
        finally:
            os.kill(pid, signal.SIGCONT)
        for reader in readers:
            reader.join(60)
        assert read == [BIG] * READERS


def test_what_a_reader_waited_for_is_read_again_if_it_changed(disk: tuple[Path, int], tmp_path: Path) -> None:
    folder, pid = disk
    with home_on(folder, tmp_path / "served") as home:
        file = home / "file"
        file.write_bytes(BIG)
        Path("/proc/sys/vm/drop_caches").write_text("3")
        os.kill(pid, signal.SIGSTOP)
        read: list[bytes] = []
        descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)  # past the kernel's pages: the answer is the daemon's
        reader = threading.Thread(target=lambda: read.append(os.pread(descriptor, 8192, 0)), daemon=True)
        try:
            reader.start()
            reader.join(0.5)
            assert read == []
            with file.open("r+b", buffering=0) as writer:
                writer.write(b"new!")
                os.fsync(writer.fileno())  # travels in the commit: no data disk is needed
        finally:
            os.kill(pid, signal.SIGCONT)
        reader.join(60)
        os.close(descriptor)
        assert read[0][:4] == b"new!"
        assert read[0][4:] == BIG[4:8192]
