"""Locks of files that several mounts share: fcntl(2) on ranges, flock(2) on whole files.

They are rows of a map that all mounts of a volume on this machine have open (`kv/volatile.py`):

    L kind, inode, session, owner, start -> a lock, its last byte included
    W session, owner, number             -> a request that waits, and what it wants

Invariants
* A lock belongs to a session, and counts as long as that lives: whoever finds one of a dead session in the way removes them all. A session that goes on
  in another program keeps its locks.
* An owner is whom the kernel says: a process for fcntl, a description of an open file for flock and F_OFD_SETLK.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from stratum.kv.volatile import VolatileMap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from stratum.kv.volatile import Rows

RANGES, FLOCK = 1, 2
TO_THE_END = (1 << 63) - 1
_KEY = struct.Struct(">cBQQQQ")
_PREFIX = struct.Struct(">cBQ")
_VALUE = struct.Struct(">?QIQ")
_WAITS = struct.Struct(">cQQQ")
_WAITS_OF = struct.Struct(">cQQ")
_WANTED = struct.Struct(">BQ?QQ")


@dataclass(slots=True, frozen=True)
class Lock:
    """Of `start` to `last`, one that is held or wanted. `handle` is the open file it came through."""

    kind: int
    inode: int
    session: int
    owner: int
    start: int
    last: int
    exclusive: bool
    pid: int = 0
    handle: int = 0

    @property
    def key(self) -> bytes:
        return _KEY.pack(b"L", self.kind, self.inode, self.session, self.owner, self.start)

    @property
    def value(self) -> bytes:
        return _VALUE.pack(self.exclusive, self.last, self.pid, self.handle)

    @classmethod
    def unpack(cls, key: bytes, value: bytes) -> Lock:
        _, kind, inode, session, owner, start = _KEY.unpack(key)
        exclusive, last, pid, handle = _VALUE.unpack(value)
        return cls(kind, inode, session, owner, start, last, exclusive, pid, handle)

    def is_of(self, other: Lock) -> bool:
        return (self.session, self.owner) == (other.session, other.owner)

    def excludes(self, other: Lock) -> bool:
        overlaps = self.start <= other.last and other.start <= self.last
        return overlaps and (self.exclusive or other.exclusive) and not self.is_of(other)


class LockTable:
    """The side of one session. Nothing in it waits for another process longer than that takes to change some rows."""

    def __init__(self, folder: Path, session: int, is_dead: Callable[[int], bool]) -> None:
        """Raises `OSError`."""
        self.session = session
        self._is_dead = is_dead
        self._map = VolatileMap(folder, "locks")
        self._by_handle: dict[int, set[int]] = {}
        """The inodes that each of our open files may have locked; a program that goes on with a session finds them in the map."""
        with self._map.transact() as rows:
            every = _locks(rows, b"L")
            for other in {lock.session for lock in every}:
                if is_dead(other):
                    _forget_session(rows, other)
            for lock in every:
                if lock.session == session:
                    self._by_handle.setdefault(lock.handle, set()).add(lock.inode)

    def close(self) -> None:
        self._map.close()

    def obstacle(self, wanted: Lock) -> Lock | None:
        """A lock that stands in the way of another."""
        with self._map.transact() as rows:
            return self._obstacle(rows, wanted)

    def take(self, wanted: Lock) -> Lock | None:
        """Take a lock; if one is in the way, that one. Raises `Full`.

        flock(2) gives up what the owner has before it looks, as it does in the kernel: two that want more would else wait for each other.
        """
        with self._map.transact() as rows:
            own = [lock for lock in _of_inode(rows, wanted.kind, wanted.inode) if lock.is_of(wanted)]
            if wanted.kind == FLOCK:
                _cut(rows, own, 0, TO_THE_END)
                own = []
            obstacle = self._obstacle(rows, wanted)
            if obstacle is not None:
                return obstacle
            start, last = wanted.start, wanted.last
            for lock in own:
                if lock.exclusive == wanted.exclusive and lock.start <= last + 1 and start <= lock.last + 1:
                    start, last = min(start, lock.start), max(last, lock.last)
            _cut(rows, own, start, last)
            taken = replace(wanted, start=start, last=last)
            rows.put(taken.key, taken.value)
        self._by_handle.setdefault(wanted.handle, set()).add(wanted.inode)
        return None

    def give_up(self, given: Lock) -> None:
        """Give up what the owner has of a range."""
        with self._map.transact() as rows:
            own = [lock for lock in _of_inode(rows, given.kind, given.inode) if lock.is_of(given)]
            _cut(rows, own, given.start, given.last)

    def all_of(self, kind: int, inode: int) -> list[Lock]:
        with self._map.transact() as rows:
            return _of_inode(rows, kind, inode)

    def has_any(self, inode: int) -> bool:
        """Whether this session may have a lock of a file."""
        return any(inode in inodes for inodes in self._by_handle.values())

    def give_up_all(self, inode: int, owner: int) -> bool:
        """What an owner has of the ranges of a file: it has closed a descriptor of it. Whether it had any."""
        if not self.has_any(inode):
            return False
        with self._map.transact() as rows:
            own = [
                lock for lock in _of_inode(rows, RANGES, inode) if (lock.session, lock.owner) == (self.session, owner)
            ]
            for lock in own:
                rows.delete(lock.key)
        return bool(own)

    def forget_handle(self, handle: int) -> bool:
        """What came through an open file that is none any more. Whether there was any."""
        inodes = self._by_handle.pop(handle, None)
        if inodes is None:
            return False
        with self._map.transact() as rows:
            for inode in inodes:
                for kind in (RANGES, FLOCK):
                    for lock in _of_inode(rows, kind, inode):
                        if (lock.session, lock.handle) == (self.session, handle):
                            rows.delete(lock.key)
        return True

    def forget_session(self, session: int) -> None:
        with self._map.transact() as rows:
            _forget_session(rows, session)

    # -- waiting ----------------------------------------------------------------------------------------------------------

    def wait(self, number: int, wanted: Lock) -> bool:
        """Note that a request waits, until `waits_no_more`. False, and nothing noted, if it would wait for itself: only ranges are looked at."""
        with self._map.transact() as rows:
            if wanted.kind == RANGES and self._waits_for_itself(rows, wanted):
                return False
            raw = _WANTED.pack(wanted.kind, wanted.inode, wanted.exclusive, wanted.start, wanted.last)
            rows.put(_WAITS.pack(b"W", wanted.session, wanted.owner, number), raw)
        return True

    def waits_no_more(self, number: int, wanted: Lock) -> None:
        with self._map.transact() as rows:
            rows.delete(_WAITS.pack(b"W", wanted.session, wanted.owner, number))

    def _waits_for_itself(self, rows: Rows, wanted: Lock) -> bool:
        seen: set[tuple[int, int]] = set()
        todo = list(self._obstacles(rows, wanted))
        while todo:
            holder = todo.pop()
            if holder.is_of(wanted):
                return True
            who = holder.session, holder.owner
            if who in seen:
                continue
            seen.add(who)
            for _, raw in rows.scan(_WAITS_OF.pack(b"W", *who)):
                kind, inode, exclusive, start, last = _WANTED.unpack(raw)
                todo += self._obstacles(rows, Lock(kind, inode, *who, start, last, exclusive))
        return False

    def _obstacles(self, rows: Rows, wanted: Lock) -> list[Lock]:
        return [lock for lock in _of_inode(rows, wanted.kind, wanted.inode) if lock.excludes(wanted)]

    def _obstacle(self, rows: Rows, wanted: Lock) -> Lock | None:
        while True:
            found = self._obstacles(rows, wanted)
            dead = next((lock.session for lock in found if self._is_dead(lock.session)), None)
            if dead is None:
                return found[0] if found else None
            _forget_session(rows, dead)


def _of_inode(rows: Rows, kind: int, inode: int) -> list[Lock]:
    return _locks(rows, _PREFIX.pack(b"L", kind, inode))


def _locks(rows: Rows, prefix: bytes) -> list[Lock]:
    return [Lock.unpack(key, value) for key, value in rows.scan(prefix)]


def _cut(rows: Rows, own: Iterable[Lock], start: int, last: int) -> None:
    """Take [start, last] away from locks of one owner."""
    for lock in own:
        if lock.start > last or lock.last < start:
            continue
        rows.delete(lock.key)
        for left in (replace(lock, last=start - 1), replace(lock, start=last + 1)):
            if left.start <= left.last:
                rows.put(left.key, left.value)


def _forget_session(rows: Rows, session: int) -> None:
    for lock in _locks(rows, b"L"):
        if lock.session == session:
            rows.delete(lock.key)
    for key, _ in rows.scan(b"W"):
        if _WAITS.unpack(key)[1] == session:
            rows.delete(key)
