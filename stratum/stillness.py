"""What a mount says of the kernel's cache in shared memory, so that a writer need not wake it to know.

Three words of eight bytes in the file of the mount's session (`meta/sessions/NUMBER`):
  0  how many requests of the kernel were taken so far, each counted before its handler reads anything
  1  how many these were when the kernel was told of an announcement (`fuse/invalidation.py`)
  2  which one that was; 0 while words 1 and 2 change
If word 2 names the announcement of a commit, and words 0 and 1 are equal after the commit, the kernel has asked for nothing since it forgot. What it
asks for next comes from the state after the commit: the mount counts, then reads; the writer commits, then reads the count. The count is
sequentially consistent (`fuse/negotiate.c`), and between commit and look the writer takes locks.
"""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_BYTES = 24
_TAKEN, _TOLD, _WHICH = 0, 1, 2


def name_of(session: int, number: int) -> int:
    """Of the announcement that a session made as its `number`th; never 0."""
    return (session & 0xFFFFFFFF) << 32 | number & 0xFFFFFFFF


class Stillness:
    """The side of the mount."""

    def __init__(self, path: Path) -> None:
        """Raises `OSError`."""
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.fstat(descriptor).st_size < _BYTES:
                # Taken from the disk now: on a full one a mapping without blocks would end the process when it is written.
                os.pwrite(descriptor, bytes(_BYTES), 0)
            self._map = mmap.mmap(descriptor, _BYTES)
        finally:
            os.close(descriptor)
        self._words = memoryview(self._map).cast("Q")
        self.begin()

    @property
    def count(self) -> memoryview:
        """Word 0, for whoever counts. Let go of it before `close`."""
        return memoryview(self._map)[:8]

    def begin(self) -> None:
        """What was told is not to be believed any more."""
        self._words[_WHICH] = 0

    def told(self, which: int, taken: int) -> None:
        self._words[_TOLD] = taken
        self._words[_WHICH] = which

    def close(self) -> None:
        self.begin()
        self._words.release()
        self._map.close()


class StillnessOf:
    """The side of a writer."""

    def __init__(self, path: Path) -> None:
        """Raises `OSError` or `ValueError` for a mount that does not say."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._map = mmap.mmap(descriptor, _BYTES, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)
        self._words = memoryview(self._map).cast("Q")

    def holds(self, which: int) -> bool:
        """Whether the kernel knows nothing of an announcement whose commit is visible by now."""
        words = self._words
        return words[_WHICH] == which and words[_TOLD] == words[_TAKEN] and words[_WHICH] == which

    def close(self) -> None:
        self._words.release()
        self._map.close()
