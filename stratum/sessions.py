"""Who has the volume open.

A session is a process: a row in the Z table and a file `meta/sessions/<id>` on which the process holds an flock until it
dies. It is dead exactly when that lock can be taken. Whoever finds a dead one deletes its row first, so that nothing it
still might do can commit (every commit checks its own row), and only then cleans up behind it.

The slot table `meta/slots` is one shared mapping of SLOTS records of four 8-byte words:
    session, oldest transaction id it may still read (NOT_READING: none), newest change-log transaction its mount has
    applied, spare.
A reader publishes *before* it takes its snapshot; a reclaimer notes the newest transaction *before* it looks at the slots.
So what the reclaimer frees was freed before every snapshot it did not see.
"""

from __future__ import annotations

import fcntl
import itertools
import mmap
import os
import struct
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stratum.descriptors import is_owned
from stratum.errors import Busy, NoSpace, SessionDead, StratumError
from stratum.schema import key_u64, pack_json, pack_u64, unpack_json, unpack_u64

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from stratum.kv.contract import Store
    from stratum.transaction import MetadataTransaction

SLOTS = 1024
SKIPPED = 1 << 20
"""Numbers begin with the session that gave them out. Metadata from a copy goes on so many sessions behind the newest one that is known; there may have been others."""
NO_PROCESS = (1 << 31) - 1
"""Stands for the process in the row of a session that waits for its next one; no process has it (proc(5): 2^22 at most)."""
FULL_DISK_TRIES = 8
FULL_DISK_S = 0.5
_SLOT = struct.Struct("<QQQQ")
_WORD = struct.Struct("<Q")
NOT_READING = (1 << 64) - 1


@dataclass(slots=True, frozen=True)
class Inherited:
    """A session that one program passes to the next: `lock` is the descriptor that holds the flock, `counter` the next number."""

    id: int
    slot: int
    lock: int
    counter: int = 0


def is_folder(name: str) -> bool:
    """Whether a folder of a hot disk is called like that of a session's data files."""
    return len(name) == 8 and all(letter in "0123456789abcdef" for letter in name)


class Session:
    """The entry of the process itself."""

    def __init__(self, meta: Path, store: Store, role: str, inherited: Inherited | None = None) -> None:
        """Raises `SessionDead` if `inherited` has been declared dead."""
        self.role = role
        self._store = store
        self._folder = meta / "sessions"
        self._slots_file = (meta / "slots").open("r+b")
        self._slots = mmap.mmap(self._slots_file.fileno(), SLOTS * _SLOT.size)
        self._lock = threading.Lock()
        self._reading: dict[int, int] = {}
        self._tickets = itertools.count()
        self._passed_on = False
        if inherited is None:
            self.id, self.slot, self._lock_fd = self._register_patiently(store, role)
            self._counter = itertools.count(1)
            self._write(2, 0)
        else:
            self.id, self.slot, self._lock_fd = inherited.id, inherited.slot, inherited.lock
            self._counter = itertools.count(inherited.counter)
            self._go_on(store)
        self._write(1, NOT_READING)
        self._write(0, self.id)

    def _register_patiently(self, store: Store, role: str) -> tuple[int, int, int]:
        """On a full disk: what others have freed can be used again when they have let go of their last checkpoint."""
        for _ in range(FULL_DISK_TRIES):
            try:
                return self._register(store, role)
            except NoSpace:
                store.checkpoint()
                time.sleep(FULL_DISK_S)
        return self._register(store, role)

    def _register(self, store: Store, role: str) -> tuple[int, int, int]:
        fd = -1
        try:
            with store.transact() as tx:
                raw = tx.get(b"Csession")
                identity = (unpack_u64(raw)[0] if raw else 0) + 1
                taken = {unpack_json(value)["slot"] for _, value in tx.scan(b"Z", b"[")}
                slot = next((number for number in range(SLOTS) if number not in taken), None)
                if slot is None:
                    raise Busy(f"{SLOTS} processes have this volume open; end some")
                # The lock comes before the row: a row without a held lock is a dead session.
                fd = os.open(self._folder / str(identity), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                tx.put(b"Csession", pack_u64(identity))
                tx.put(
                    key_u64(b"Z", identity),
                    pack_json({"role": role, "pid": os.getpid(), "started_ns": time.time_ns(), "slot": slot}),
                )
        except BaseException:
            if fd >= 0:
                os.close(fd)
            raise
        return identity, slot, fd

    def _go_on(self, store: Store) -> None:
        """Another program has passed the session on."""
        key = key_u64(b"Z", self.id)
        with store.transact() as tx:
            raw = tx.get(key)
            if raw is None or unpack_json(raw).get("fenced"):
                raise SessionDead("the session that was passed on is dead; restart the process")
            row = {**unpack_json(raw), "pid": os.getpid(), "started_ns": time.time_ns()}
            row.pop("kept", None)
            tx.put(key, pack_json(row))

    def tell_kept(self, tx: MetadataTransaction, *, kept: bool) -> None:
        """The process ends, and its session waits for another one: the lock is held, and belongs to no process."""
        key = key_u64(b"Z", self.id)
        raw = tx.get(key)
        assert raw is not None, "whoever commits has a row"
        tx.put(key, pack_json({**unpack_json(raw), "pid": NO_PROCESS if kept else os.getpid(), "kept": kept}))

    def forbid(self, session: int) -> bool:
        """If a session waits for its next process: let none go on with it. Returns whether it waited."""
        key = key_u64(b"Z", session)
        with self._store.transact() as tx:
            raw = tx.get(key)
            if raw is None or not unpack_json(raw).get("kept"):
                return False
            tx.put(key, pack_json({**unpack_json(raw), "fenced": True}))
            return True

    def new_id(self) -> int:
        """A number for an inode, extent, segment or key node; never given out twice."""
        counter = next(self._counter)
        if counter >= 1 << 32:
            raise StratumError("this process gave out 2^32 numbers; restart it")
        return self.id << 32 | counter

    # -- slots --------------------------------------------------------------------------------------------------------

    def _write(self, word: int, value: int) -> None:
        _WORD.pack_into(self._slots, self.slot * _SLOT.size + word * 8, value)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside the block no extent that a snapshot begun here can see is reclaimed."""
        ticket = next(self._tickets)
        with self._lock:
            self._reading[ticket] = self._store.last_id()
            self._write(1, next(iter(self._reading.values())))
        try:
            yield
        finally:
            with self._lock:
                del self._reading[ticket]
                self._write(1, next(iter(self._reading.values()), NOT_READING))

    def applied_word(self) -> memoryview:
        """Where the session says how far its mount has followed. Let go of it before the session is closed."""
        at = self.slot * _SLOT.size + 2 * _WORD.size
        return memoryview(self._slots)[at : at + _WORD.size]

    def publish_applied(self, transaction_id: int) -> None:
        self._write(2, transaction_id)

    def read_slot(self, slot: int) -> tuple[int, int, int]:
        """(session, oldest read, applied)."""
        session, oldest, applied, _ = _SLOT.unpack_from(self._slots, slot * _SLOT.size)
        return session, oldest, applied

    def oldest_read(self, live: dict[int, int], newest: int) -> int:
        """The oldest transaction any live session may still read; `newest` was read before this call."""
        oldest = newest
        for session, slot in live.items():
            owner, reading, _ = self.read_slot(slot)
            if owner == session:
                oldest = min(oldest, reading)
        return oldest

    # -- the living and the dead ----------------------------------------------------------------------------------------

    def is_dead(self, session: int) -> bool:
        if session == self.id:
            return False
        try:
            fd = os.open(self._folder / str(session), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            return not is_owned(fd)
        finally:
            os.close(fd)

    def rows(self) -> dict[int, dict[str, object]]:
        with self._store.snapshot() as snapshot:
            return {int.from_bytes(key[1:], "big"): unpack_json(raw) for key, raw in snapshot.scan(b"Z", b"[")}

    def file_of(self, session: int) -> Path:
        """Whoever holds its lock is the session; a mount has words in it (`stillness.py`)."""
        return self._folder / str(session)

    def forget_file(self, session: int) -> None:
        self.file_of(session).unlink(missing_ok=True)

    @property
    def lock(self) -> int:
        """The descriptor that holds the flock."""
        return self._lock_fd

    def pass_on(self) -> Inherited:
        """It goes on in another program: `close` leaves the row, the slot and the lock. The counter is for `next_number` to tell."""
        self._passed_on = True
        return Inherited(self.id, self.slot, self._lock_fd)

    def next_number(self) -> int:
        return next(self._counter)

    def close(self, remove_row: Callable[[], None]) -> None:
        """A clean end: the row goes first, then the lock."""
        if not self._passed_on:
            remove_row()
            self._write(0, 0)
            self.forget_file(self.id)
            os.close(self._lock_fd)
        self._write(1, NOT_READING)
        self._slots.close()
        self._slots_file.close()
