"""What a program that watches files learns of changes through S3."""

from __future__ import annotations

import ctypes
import os
import select
import struct
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ALL_EVENTS, CREATE, DELETE, DELETE_SELF = 0xFFF, 0x100, 0x200, 0x400
_EVENT = struct.Struct("iIII")


class Watches:
    """inotify(7)."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.inotify_init1(os.O_CLOEXEC)
        self._names: dict[int, str] = {}

    def add(self, path: Path) -> None:
        number = self._libc.inotify_add_watch(self._descriptor, os.fsencode(path), ALL_EVENTS)
        assert number >= 0, os.strerror(ctypes.get_errno())
        self._names[number] = path.name

    def events(self, seconds: float) -> Iterator[tuple[str, int, str]]:
        """(what is watched, event, name in it), until so long nothing has come."""
        while select.select([self._descriptor], [], [], seconds)[0]:
            told, at = os.read(self._descriptor, 65536), 0
            while at < len(told):
                number, mask, _, length = _EVENT.unpack_from(told, at)
                name = told[at + _EVENT.size : at + _EVENT.size + length].rstrip(b"\0").decode()
                at += _EVENT.size + length
                yield self._names[number], mask & ALL_EVENTS, name

    def until(self, wanted: tuple[str, int, str]) -> list[tuple[str, int, str]]:
        seen = []
        for event in self.events(20):
            seen.append(event)
            if event == wanted:
                return seen
        raise AssertionError(f"no {wanted} among {seen}")

    def close(self) -> None:
        os.close(self._descriptor)


@pytest.fixture
def watches() -> Iterator[Watches]:
    made = Watches()
    yield made
    made.close()


@pytest.mark.parametrize("change", ["deleted", "overwritten"])
def test_a_watched_file_that_s3_takes_away_says_so(s3: Any, home: Path, watches: Watches, change: str) -> None:
    path = home / "watched"
    path.write_bytes(b"old")
    watches.add(path)
    if change == "deleted":
        s3.delete_object(Bucket=home.name, Key="watched")
        assert not path.exists()
    else:
        s3.put_object(Bucket=home.name, Key="watched", Body=b"new")
        assert path.read_bytes() == b"new"
    watches.until(("watched", DELETE_SELF, ""))
    path.write_bytes(b"newer")
    assert path.read_bytes() == b"newer"
    assert path.stat().st_nlink == 1


def test_a_watched_directory_hears_of_the_mounts_changes_alone(s3: Any, home: Path, watches: Watches) -> None:
    (home / "old").write_bytes(b"x")
    watches.add(home)
    s3.put_object(Bucket=home.name, Key="new", Body=b"x")
    s3.delete_object(Bucket=home.name, Key="old")
    assert sorted(os.listdir(home)) == ["new"]
    (home / "by-the-mount").touch()
    seen = watches.until((home.name, CREATE, "by-the-mount"))
    assert not [event for event in seen if event[2] in {"new", "old"} and event[1] in {CREATE, DELETE}]


def test_a_name_of_several_that_s3_removes_kills_nothing(s3: Any, home: Path, watches: Watches) -> None:
    (home / "one").write_bytes(b"x")
    os.link(home / "one", home / "two")
    watches.add(home / "two")
    s3.delete_object(Bucket=home.name, Key="one")
    assert not (home / "one").exists()
    assert (home / "two").stat().st_nlink == 1
    assert not [event for event in watches.events(0.3) if event[1] == DELETE_SELF]


def test_what_is_open_when_s3_deletes_it_stays_readable(s3: Any, home: Path, watches: Watches) -> None:
    path = home / "open"
    path.write_bytes(b"old")
    with path.open("r+b") as file:
        watches.add(path)
        s3.delete_object(Bucket=home.name, Key="open")
        assert not path.exists()
        assert file.read() == b"old"
        file.write(b" and more")
        file.flush()
        assert os.fstat(file.fileno()).st_nlink == 0
        assert os.fstat(file.fileno()).st_size == 12
        path.write_bytes(b"another")
    watches.until(("open", DELETE_SELF, ""))
    assert path.read_bytes() == b"another"
