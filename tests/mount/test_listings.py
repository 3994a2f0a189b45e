"""Listings of a mount while the directory changes."""

from __future__ import annotations

import ctypes
import os
import platform
import random
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

GETDENTS64 = {"x86_64": 217, "aarch64": 61}[platform.machine()]


class RawListing:
    """getdents64(2) with a buffer of the caller's size: it stops anywhere, not only where a library does."""

    def __init__(self, directory: Path) -> None:
        self._descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        self._libc = ctypes.CDLL(None, use_errno=True)

    def read(self, size: int) -> list[str]:
        buffer = ctypes.create_string_buffer(size)
        got = self._libc.syscall(ctypes.c_long(GETDENTS64), self._descriptor, buffer, size)
        assert got >= 0, os.strerror(ctypes.get_errno())
        names, at = [], 0
        while at < got:
            length = int.from_bytes(buffer.raw[at + 16 : at + 18], "little")
            names.append(buffer.raw[at + 19 : at + length].split(b"\0")[0].decode())
            at += length
        return names

    def close(self) -> None:
        os.close(self._descriptor)


@pytest.mark.parametrize("filled", [False, True], ids=["not kept yet", "kept by the kernel"])
@pytest.mark.parametrize("meanwhile", ["nothing", "put", "list", "put and list"])
def test_who_removes_what_he_lists_leaves_nothing(s3: Any, home: Path, meanwhile: str, *, filled: bool) -> None:
    """Although the kernel keeps listings, whoever is half-way through one gets every name that was there all the time."""
    folder = home / "full"
    folder.mkdir()
    wanted = {f"name-{number:04d}" for number in range(1500)}
    for name in wanted:
        (folder / name).touch()
    if filled:
        assert set(os.listdir(folder)) == wanted
    listing = RawListing(folder)
    seen: list[str] = []
    dice = random.Random(f"{meanwhile} {filled}")
    put = 0
    while names := listing.read(dice.choice([300, 1000, 5000])):
        for name in names:
            if name in wanted:
                seen.append(name)
                (folder / name).unlink(missing_ok=True)
        if "put" in meanwhile:
            put += 1
            s3.put_object(Bucket=home.name, Key=f"full/a-new-{put}", Body=b"")
        if "list" in meanwhile:
            assert not wanted & set(seen) & set(os.listdir(folder))
    listing.close()
    assert set(seen) == wanted
    assert not wanted & set(os.listdir(folder))
