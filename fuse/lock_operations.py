"""The handlers of locks, for a mount that shares them (`locks.py`), and the answers to all requests that the binding does not know."""

from __future__ import annotations

import errno
import fcntl
from typing import TYPE_CHECKING, Any

import pyfuse3

from stratum.file_locks import FLOCK, RANGES
from stratum.fuse import _negotiate, extra_operations
from stratum.fuse.base import handler
from stratum.fuse.extra_operations import ExtraOperations

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from stratum.file_locks import Lock
    from stratum.fuse.locks import Locks


class LockOperations(ExtraOperations):
    """Handlers on locks. Types are those of fcntl(2); `last` is included."""

    def share_locks(self, locks: Locks) -> None:
        """Before the mount is made: let the kernel ask for each lock and tell each close."""
        self.locks = locks
        self.open_files.tells_closes = True
        _negotiate.share_locks()

    def _lock(self, kind: int, fh: int, owner: int, lock_type: int, start: int, last: int, pid: int) -> Lock:
        if self.locks is None:
            raise pyfuse3.FUSEError(errno.ENOSYS)
        inode = self.open_files.handles[fh].state.number
        return self.locks.lock(
            kind, inode, owner, start, last, exclusive=lock_type == fcntl.F_WRLCK, pid=pid, handle=fh
        )

    @handler
    async def getlk(self, fh: int, owner: int, lock_type: int, start: int, last: int, pid: int) -> Lock | None:
        """A lock that stands in the way of this one."""
        wanted = self._lock(RANGES, fh, owner, lock_type, start, last, pid)
        assert self.locks is not None
        return self.locks.table.obstacle(wanted)

    @handler
    async def setlk(
        self,
        number: int,
        kind: int,
        fh: int,
        owner: int,
        lock_type: int,
        start: int,
        last: int,
        pid: int,
        *,
        waits: bool,
    ) -> bool:
        """False: the request of that `number` is answered later. Whoever gives up a lock for writing has others see what it wrote first."""
        wanted = self._lock(kind, fh, owner, lock_type, start, last, pid)
        assert self.locks is not None
        state = self.open_files.handles[fh].state
        if not wanted.exclusive and state.uncommitted:
            await self._flush(state)
        if lock_type == fcntl.F_UNLCK:
            self.locks.give_up(wanted)
            return True
        code = self.locks.take(wanted, number, waits=waits)
        if code:
            raise pyfuse3.FUSEError(code)
        return code is not None


async def answering(operations: LockOperations, name: str, request: object, arguments: tuple[Any, ...]) -> None:
    """Handle and answer a request that the binding does not know."""
    try:
        await ANSWERS[name](operations, request, *arguments)
    except pyfuse3.FUSEError as error:
        _negotiate.refuse(request, error.errno)


async def _getlk(operations: LockOperations, request: object, *arguments: int) -> None:
    found = await operations.getlk(*arguments[:-1])
    if found is None:
        _negotiate.answer_obstacle(request, fcntl.F_UNLCK, 0, 0, 0)
    else:
        lock_type = fcntl.F_WRLCK if found.exclusive else fcntl.F_RDLCK
        _negotiate.answer_obstacle(request, lock_type, found.start, found.last, found.pid)


async def _set(operations: LockOperations, request: object, kind: int, *arguments: int) -> None:
    number, _ = _negotiate.request()
    if await operations.setlk(number, kind, *arguments[:-1], waits=bool(arguments[-1])):
        _negotiate.refuse(request, 0)
    else:
        _negotiate.leave(request)


async def _setlk(operations: LockOperations, request: object, *arguments: int) -> None:
    await _set(operations, request, RANGES, *arguments)


async def _flock(operations: LockOperations, request: object, *arguments: int) -> None:
    await _set(operations, request, FLOCK, *arguments)


ANSWERS: dict[str, Callable[..., Coroutine[Any, Any, None]]] = {
    **extra_operations.ANSWERS,
    "getlk": _getlk,
    "setlk": _setlk,
    "flock": _flock,
}
