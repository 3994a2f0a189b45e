"""Open files for reading, kept while they are used and a little longer; and whether somebody owns a file."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections import OrderedDict
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator
    from pathlib import Path


class WouldWait(Exception):
    """The bytes are not in memory: somebody who may wait for a disk must fetch them."""


class WouldRecall(WouldWait):
    """The bytes are in the cold tier: somebody who may wait for a network must fetch them."""


def read_cached(fd: int, length: int, offset: int) -> bytes:
    """`os.pread`, if it needs no disk: preadv2(2) with RWF_NOWAIT. Raises `WouldWait`."""
    buffer = bytearray(length)
    try:
        done = os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno in {errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL}:
            raise WouldWait from None
        raise
    if done < length:
        raise WouldWait  # the rest is on the disk, or the file is too short: who may wait finds out
    return cast("bytes", buffer)  # a buffer like another


def is_owned(fd: int) -> bool:
    """Whether somebody holds the flock of a file for himself.

    It is tried shared: several who ask at once would otherwise take each other for the owner.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


class Descriptors:
    """At most about `kept_max` open files that nobody is using."""

    def __init__(self, kept_max: int) -> None:
        self._kept_max = kept_max
        self._lock = threading.Lock()
        self._open: OrderedDict[Hashable, list[int]] = OrderedDict()  # key -> [fd, users]

    @contextmanager
    def use(self, key: Hashable, find: Callable[[], Path], *, may_wait: bool = True) -> Iterator[int]:
        """A descriptor that stays open inside the block; the least used ones are closed.

        Raises `OSError`, and `WouldWait` if the file must be opened and may not be waited for.
        """
        with self._lock:
            entry = self._open.get(key)
            if entry is not None:
                entry[1] += 1
                self._open.move_to_end(key)
        if entry is None:
            if not may_wait:
                raise WouldWait
            fd = os.open(find(), os.O_RDONLY | os.O_CLOEXEC)  # not under the lock: a disk may hang
            with self._lock:
                entry = self._open.setdefault(key, [fd, 0])
                entry[1] += 1
                if entry[0] != fd:
                    os.close(fd)
                self._close_unused()
        try:
            yield entry[0]
        finally:
            with self._lock:
                entry[1] -= 1
                if entry[1] == 0 and self._open.get(key) is not entry:
                    os.close(entry[0])  # dropped meanwhile

    def _close_unused(self) -> None:
        """Under the lock."""
        if len(self._open) > self._kept_max:
            for key, (fd, users) in list(self._open.items()):
                if users == 0:
                    os.close(fd)
                    del self._open[key]
                    break

    def drop(self, key: Hashable) -> None:
        """The file under this name may be another one now."""
        with self._lock:
            entry = self._open.pop(key, None)
            if entry is not None and entry[1] == 0:
                os.close(entry[0])

    def close(self) -> None:
        with self._lock:
            for fd, users in self._open.values():
                if users == 0:
                    os.close(fd)
            self._open.clear()
