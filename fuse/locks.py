"""Locks that the mounts of a tree share: the mount's side of `stratum/file_locks.py`.

What waits for a lock is a request that the loop has left unanswered, under its number. It is looked at again when a lock of this mount goes, and every
now and then for the locks of others. So it holds up neither the loop nor a program that takes the mount over, which goes on waiting for it.
"""

from __future__ import annotations

import errno
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

import trio

from stratum.file_locks import Lock
from stratum.fuse import _negotiate
from stratum.kv.volatile import Full

if TYPE_CHECKING:
    from stratum.file_locks import LockTable

LOOK_S = 0.02
"""Between two looks at what another mount has locked. Nobody tells when that goes."""
LOOK_AT_OURS_S = 1.0


class Locks:
    def __init__(self, table: LockTable) -> None:
        self.table = table
        self.waiting: dict[int, Lock] = {}
        """By the number of the request, in the order in which they came."""
        self._obstructed_by_others = False
        self._changed = trio.Event()

    def lock(
        self, kind: int, inode: int, owner: int, start: int, last: int, *, exclusive: bool, pid: int, handle: int
    ) -> Lock:
        return Lock(kind, inode, self.table.session, owner, start, last, exclusive, pid, handle)

    def take(self, wanted: Lock, number: int, *, waits: bool) -> int | None:
        """0: it is taken; otherwise an errno. None: the request of that number waits for it."""
        try:
            obstacle = self.table.take(wanted)
            if obstacle is None:
                self._wake()  # a lock for reading may stand where one for writing stood
                return 0
            if not waits:
                return errno.EAGAIN
            if not self.table.wait(number, wanted):
                return errno.EDEADLK
        except Full:
            return errno.ENOLCK
        self.waiting[number] = wanted
        self._obstructed_by_others = self._obstructed_by_others or obstacle.session != self.table.session
        self._wake()
        return None

    def give_up(self, given: Lock) -> None:
        self.table.give_up(given)
        self._wake()

    def closed(self, inode: int, owner: int) -> None:
        """A process has closed a descriptor, and has no locks of ranges of the file any more (fcntl(2))."""
        if self.table.give_up_all(inode, owner):
            self._wake()

    def released(self, handle: int) -> None:
        """Nobody has an open file any more."""
        if self.table.forget_handle(handle):
            self._wake()

    def interrupted(self, number: int) -> bool:
        """Whether a request of that number waited."""
        wanted = self.waiting.pop(number, None)
        if wanted is None:
            return False
        self.table.waits_no_more(number, wanted)
        _negotiate.answer_lock(number, errno.EINTR)
        return True

    def _wake(self) -> None:
        if self.waiting:
            self._changed.set()

    async def run(self) -> None:
        """The task of a mount."""
        while True:
            with trio.move_on_after(LOOK_S if self._obstructed_by_others else LOOK_AT_OURS_S):
                await self._changed.wait()
            self._changed = trio.Event()
            self._look()

    def _look(self) -> None:
        """Answer those that have what they wait for."""
        self._obstructed_by_others = False
        for number, wanted in list(self.waiting.items()):
            try:
                obstacle = self.table.take(wanted)
            except Full:
                continue  # looked at again when something goes
            if obstacle is not None:
                self._obstructed_by_others = self._obstructed_by_others or obstacle.session != self.table.session
                continue
            del self.waiting[number]
            self.table.waits_no_more(number, wanted)
            _negotiate.answer_lock(number, 0)

    def told(self) -> list[tuple[Any, ...]]:
        """What waits, for another program to take over."""
        return [(number, *astuple(wanted)) for number, wanted in self.waiting.items()]

    def take_over(self, told: list[tuple[Any, ...]]) -> None:
        for number, *wanted in told:
            self.waiting[number] = Lock(*wanted)
        self._obstructed_by_others = True

    def close(self, *, forget: bool) -> None:
        """`forget`: the session does not go on."""
        if forget:
            self.table.forget_session(self.table.session)
        self.table.close()
