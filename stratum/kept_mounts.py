"""What the mount helper keeps while a daemon restarts: the connection to the kernel, so that the mount stays and who uses it waits.

A daemon that ends passes on three descriptors: the connection, the lock of its session, and a file that says what the kernel counts
on (`fuse/takeover.py`). The next one for the same mountpoint claims them. To the helper they are only descriptors.

Invariants
* What is kept is a mount of who asks, and only that user or root gets it back.
* Nothing is kept longer than agreed on: then the mount is detached and the descriptors are closed, which ends every request that
  waits. Those who touch a mount that was stopped for good wait no longer than that.
* It is given out once.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DESCRIPTORS = 3
KEPT_MAX = 64
KEEP_S = 30.0
"""Python and a volume take a second to start; a machine that is busy with an upgrade, some more."""


@dataclass(slots=True, frozen=True, eq=False)
class _Kept:
    uid: int
    descriptors: tuple[int, ...]
    timer: threading.Timer

    def end(self) -> None:
        self.timer.cancel()
        for number in self.descriptors:
            os.close(number)


class KeptMounts:
    """By mountpoint. `detach` is called, with its path, for a mount that nobody came back for."""

    def __init__(self, seconds: float, detach: Callable[[str], None]) -> None:
        self._seconds = seconds
        self._detach = detach
        self._lock = threading.Lock()
        self._kept: dict[str, _Kept] = {}

    def keep(self, path: str, uid: int, descriptors: Sequence[int]) -> bool:
        """Whether it is kept; if so, the descriptors are ours from now on."""
        with self._lock:
            if self._seconds <= 0 or path in self._kept or len(self._kept) >= KEPT_MAX:
                return False
            timer = threading.Timer(self._seconds, self._overdue, (path,))
            timer.daemon = True
            self._kept[path] = _Kept(uid, tuple(descriptors), timer)
            timer.start()
            return True

    def claim(self, path: str, uid: int) -> Sequence[int]:
        """The descriptors, which are the caller's from now on; none if nothing is kept there for `uid`."""
        with self._lock:
            kept = self._kept.get(path)
            if kept is None or uid not in {0, kept.uid}:
                return ()
            del self._kept[path]
        kept.timer.cancel()
        return kept.descriptors

    def drop(self, path: str) -> None:
        """Close what is kept for a mount that has been detached."""
        with self._lock:
            kept = self._kept.pop(path, None)
        if kept is not None:
            kept.end()

    def _overdue(self, path: str) -> None:
        with self._lock:
            kept = self._kept.get(path)
            if kept is None or kept.timer is not threading.current_thread():
                return
            del self._kept[path]
        self._give_up(path, kept)

    def _give_up(self, path: str, kept: _Kept) -> None:
        """First nobody finds it any more, then those who wait for an answer in there get an error."""
        try:
            self._detach(path)
        finally:
            kept.end()

    def end(self) -> None:
        """Nobody can come back for them any more."""
        with self._lock:
            left, self._kept = self._kept, {}
        for path, kept in left.items():
            self._give_up(path, kept)
