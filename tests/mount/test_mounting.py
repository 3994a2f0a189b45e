"""Mounts are replaced in one step, and ended by their id, as the kernel does it."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import threading
from typing import TYPE_CHECKING

import pytest

from stratum import mount_table, mounting
from stratum.errors import UnfinishedMount
from tests.support import need_fuse

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    need_fuse()
    made = tmp_path / "a folder"
    made.mkdir()
    yield made
    while mount_table.mount_at(str(made)) is not None:
        subprocess.run(["umount", "--lazy", made], check=True)
    unsealed(made)


def unsealed(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        mounting.seal(descriptor, sealed=False)
    finally:
        os.close(descriptor)


def mounted(folder: Path, *, dead: bool) -> tuple[int, int]:
    """The id of a mount there that nobody serves, and its connection, which is closed if it is to be dead."""
    fresh = mounting.make("/a/volume", 0, 0, read_only=False)
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        mounting.put(fresh, descriptor)
    finally:
        os.close(descriptor)
        fresh.close()
    if dead:
        os.close(fresh.connection)
    return fresh.id, fresh.connection


def error_at(folder: Path) -> int:
    try:
        os.statvfs(folder)
    except OSError as error:
        return error.errno or 0
    return 0


def test_a_stale_mount_is_replaced_in_one_step(folder: Path) -> None:
    stale, _ = mounted(folder, dead=True)
    ending = threading.Event()
    landed = []

    def write() -> None:
        while not ending.is_set():
            with contextlib.suppress(OSError):
                (folder / "lost").touch()
                landed.append(1)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(50):
            fresh = mounting.make("/a/volume", 0, 0, read_only=False)
            os.close(fresh.connection)
            mounting.replace(fresh, str(folder), stale)
            fresh.close()
            stale = fresh.id
    finally:
        ending.set()
        thread.join()
    assert landed == []
    assert len(mount_table.stacked_at(str(folder))) == 1
    line = mount_table.mount_at(str(folder))
    assert line is not None
    assert (line.file_system, line.source) == ("fuse.stratum", "/a/volume")


def test_where_the_kernel_cannot_do_it_in_one_step_it_takes_two(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stale, _ = mounted(folder, dead=True)
    real = mounting._called

    def older(number: int, *arguments: int | bytes | None) -> int:
        if number == mounting._MOVE_MOUNT and int(arguments[-1] or 0) & mounting._BENEATH:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(number, *arguments)

    monkeypatch.setattr(mounting, "_called", older)
    assert mounting.cover(str(folder), stale, 0, 0)
    with mounting.top(folder) as now:
        assert now is not None
        assert now.id != stale
    assert error_at(folder) == errno.ENOTCONN


def test_a_mount_is_ended_by_its_id(folder: Path) -> None:
    first, connection = mounted(folder, dead=False)
    waiting = threading.Thread(target=lambda: error_at(folder), daemon=True)
    waiting.start()
    assert not mounting.detach(folder, first + 1)
    assert not mounting.cover(str(folder), first + 1, 0, 0)
    with pytest.raises(UnfinishedMount, match="meanwhile"):
        mounting.replace(mounting.make("x", 0, 0, read_only=False), str(folder), first + 1)
    assert waiting.is_alive()
    assert mounting.detach(folder, first)
    # Who waits for an answer gets an error at once, though the connection is still open.
    waiting.join(10)
    assert not waiting.is_alive()
    os.close(connection)
    second, _ = mounted(folder, dead=True)
    assert second != first
    assert not mounting.detach(folder, first)
    assert mounting.detach(folder, second)
    assert mount_table.mount_at(str(folder)) is None


@pytest.mark.parametrize("usual", [True, False])
def test_a_connection_is_aborted_whether_or_not_fusectl_is_mounted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, usual: bool
) -> None:
    place = "/sys/fs/fuse/connections"
    was = mount_table.mount_at(place)
    if usual and was is None:
        subprocess.run(["mount", "-t", "fusectl", "none", place], check=True)
    if not usual:
        monkeypatch.setattr(mount_table, "mounts", list)
    try:
        number, connection = mounted(folder, dead=False)
        assert not mounting.abort(1 << 19)
        monkeypatch.undo()
        line = mount_table.mount_at(str(folder))
        assert line is not None
        if not usual:
            monkeypatch.setattr(mount_table, "mounts", list)
        assert mounting.abort(line.minor)
        assert error_at(folder) == errno.ENOTCONN
        os.close(connection)
        monkeypatch.undo()
        assert mounting.detach(folder, number)
    finally:
        if usual and was is None:
            subprocess.run(["umount", place], check=True)


def test_what_is_written_while_nothing_is_mounted_is_refused(folder: Path) -> None:
    (folder / "before").touch()
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if why := mounting.seal(descriptor):
            pytest.skip(f"this file system has no such flag: {why}")
        with pytest.raises(PermissionError):
            (folder / "lost").touch()
        with pytest.raises(PermissionError):
            (folder / "before").unlink()
        number, _ = mounted(folder, dead=True)
        assert mounting.detach(folder, number)
        assert mounting.seal(descriptor, sealed=False) == ""
        (folder / "before").unlink()
        assert mounting.seal(os.open("/proc", os.O_RDONLY)) != ""
    finally:
        os.close(descriptor)
