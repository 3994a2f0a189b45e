"""getdents64(2) as a program sees it that calls it itself."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

GETDENTS64 = {"x86_64": 217, "aarch64": 61}[platform.machine()]


class RawListing:
    """getdents64(2) with a buffer of the caller's size: it stops anywhere, not only where a library does."""

    def __init__(self, directory: Path) -> None:
        self._descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        self._libc = ctypes.CDLL(None, use_errno=True)

    def read(self, size: int) -> list[str]:
        """Names alone."""
        return [name for name, *_ in self.entries(size)]

    def entries(self, size: int) -> list[tuple[str, int, int, int]]:
        """(name, inode, kind, where the listing goes on behind it)."""
        buffer = ctypes.create_string_buffer(size)
        got = self._libc.syscall(ctypes.c_long(GETDENTS64), self._descriptor, buffer, size)
        assert got >= 0, os.strerror(ctypes.get_errno())
        found, at = [], 0
        while at < got:
            inode, offset, length, kind = struct.unpack_from("<QqHB", buffer.raw, at)
            name = buffer.raw[at + 19 : at + length].split(b"\0")[0].decode()
            found.append((name, inode, kind, offset))
            at += length
        return found

    def rest(self, size: int = 65536) -> list[tuple[str, int, int, int]]:
        found = []
        while entries := self.entries(size):
            found += entries
        return found

    def seek(self, offset: int) -> None:
        os.lseek(self._descriptor, offset, os.SEEK_SET)

    def close(self) -> None:
        os.close(self._descriptor)
