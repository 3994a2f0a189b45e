"""Waiting for a commit in a handler.

A commit takes two tenths of a millisecond, and going to sleep in trio and being woken takes half as long again. So while nobody else
wants the loop, the handler waits where it stands: for the commit, the next request of the kernel, or at most WAIT_US. Only
then does it wait as every task does.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, TypeVar

import trio

from stratum.fuse import _negotiate

if TYPE_CHECKING:
    from collections.abc import Callable

    from stratum.committer import Mutation
    from stratum.fuse.session import Session
    from stratum.transaction import MetadataTransaction
    from stratum.volume import Volume

T = TypeVar("T")
WAIT_US = 1000


class Commits:
    """Of one mount. The lock is over the moment at which a commit ends or its handler goes to sleep."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._lock = threading.Lock()
        self._ended = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.session: Session | None = None

    async def run(self, function: Callable[[MetadataTransaction], T], *, frees: bool) -> T:
        """Await a durable mutation. Not cancelled half-way: the caller must know what happened."""
        token = trio.lowlevel.current_trio_token()
        outcome: list[Mutation[T]] = []
        asleep: list[trio.Event] = []

        def done(mutation: Mutation[T]) -> None:
            with self._lock:
                outcome.append(mutation)
                if not asleep:
                    os.eventfd_write(self._ended, 1)
            if asleep:
                token.run_sync_soon(asleep[0].set)

        stands = self.session is not None and self.session.is_alone
        if not stands:
            asleep.append(trio.Event())
        self._volume.mutate_later(function, done, frees=frees)
        if stands:
            _negotiate.wait(self._ended, WAIT_US)
            with self._lock:
                if not outcome:
                    asleep.append(trio.Event())
                else:
                    os.eventfd_read(self._ended)
        if asleep:
            with trio.CancelScope(shield=True):
                await asleep[0].wait()
        return outcome[0].outcome()
