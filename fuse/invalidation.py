"""Following the change log: make the kernel forget what others changed, then say so.

The rows of a change are announced before it is committed, so that they are there when the poke comes; a poke that confirms them spares
reading the log. A mount that sleeps when they come tells the kernel at once, while the disk works. If it has taken no request until the poke,
the kernel cannot have asked for what was still the old state, and there is nothing left to do. It says so in shared memory (`stratum/stillness.py`),
and the writer does not even wait for the poke to be answered.

The steps for a poke, in this order:
1. A barrier through the trio loop. A handler that read an older state has replied when the barrier runs, so what it told the
   kernel is there to be invalidated; a handler that starts later reads the new state. A loop that sleeps in its selector is
   past the barrier already: handlers do not await between a snapshot and the reply to it.
2. In a thread of its own (never in the loop: the kernel may hold the directory's lock while it waits for a handler),
   read the log from `applied` on and invalidate.
3. Publish `applied` in the slot table, then answer the poke.
"""

from __future__ import annotations

import os
import selectors
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from stratum import mount_names
from stratum.acknowledge import ANSWER, CONFIRMATION, MESSAGE_BYTES_MAX, POKE, Announcement
from stratum.fuse import _negotiate
from stratum.log import get_logger
from stratum.schema import ChangeRow, key_u64_u64, split_u64_u64
from stratum.stillness import Stillness, name_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stratum.fuse.operations import Operations
    from stratum.volume import Volume

Told = tuple[int, bytes, int, bool]
log = get_logger("invalidation")
ROWS_AT_ONCE = 1000
TOLD_AT_ONCE = 64
IDLE_CHECK_S = 0.5
"""How often the log is read without a poke, for writers that died between commit and poke."""


class Idle(trio.abc.Instrument):
    """Whether the loop sleeps."""

    def __init__(self) -> None:
        self.now = False

    def before_io_wait(self, timeout: float) -> None:
        self.now = timeout > 0

    def after_io_wait(self, timeout: float) -> None:  # noqa: ARG002  trio calls it so
        self.now = False


@dataclass(slots=True)
class _Announced:
    """Rows that may be committed. `told_at`: how many requests had been taken when the kernel was told of them; None if it was not."""

    announcement: Announcement
    told_at: int | None = None


class Follower:
    """Owns the poke socket and the invalidation thread of one mount."""

    def __init__(self, volume: Volume, operations: Operations, token: trio.lowlevel.TrioToken, idle: Idle) -> None:
        """`idle` must be an instrument of the loop that `token` belongs to."""
        self._idle = idle
        self._volume = volume
        self._operations = operations
        self._token = token
        _, _, self._applied = volume.session.read_slot(volume.session.slot)
        if not self._applied:  # nobody has followed for this mount yet: the kernel knows nothing
            self._applied = volume.store.last_id()
            volume.session.publish_applied(self._applied)
        self.socket_name = f"mount-{volume.session.id}.sock"
        self._folder_fd = os.open(volume.meta, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with suppress(FileNotFoundError):
            (volume.meta / self.socket_name).unlink()
        self._listener.bind(f"/proc/self/fd/{self._folder_fd}/{self.socket_name}")
        (volume.meta / self.socket_name).chmod(0o600)
        self._listener.listen(64)
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="invalidator", daemon=True)
        self._ending = False
        self._paused = False
        self._following = threading.Lock()
        """Held while the kernel is being told."""
        self._loop_ended = threading.Event()
        self._announced: dict[socket.socket, _Announced] = {}
        self._owing: list[socket.socket] = []
        """Who asked and has no answer yet."""
        self._word = volume.session.applied_word()
        self.stillness: Stillness | None = None
        with suppress(OSError):  # a full disk: then writers wait for answers
            self.stillness = Stillness(volume.session.file_of(volume.session.id))
            self._count = self.stillness.count
            _negotiate.count_in(self._count)
        self._committed: dict[int, _Announced] = {}
        """Rows of the change log that writers have sent along, by transaction."""

    def start(self) -> None:
        self._thread.start()

    def pause(self) -> None:
        """Tell the kernel nothing until `resume`. Blocks until what is being told has been taken, for which the kernel may need the loop."""
        with self._following:
            self._paused = True

    def resume(self) -> None:
        self._paused = False
        self._wake_writer.send(b"x")

    def stop(self) -> None:
        self._ending = True
        self._wake_writer.send(b"x")
        if self._thread.is_alive():
            self._thread.join()
        self._listener.close()
        (self._volume.meta / self.socket_name).unlink(missing_ok=True)
        os.close(self._folder_fd)
        self._word.release()
        if self.stillness is not None:
            _negotiate.count_in(None)
            self._count.release()
            self.stillness.close()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._wake_reader, selectors.EVENT_READ)
            while not self._ending:
                ready = selector.select(IDLE_CHECK_S)
                follows = not ready
                announced: list[_Announced] = []
                for key, _ in ready:
                    connection = key.fileobj
                    assert isinstance(connection, socket.socket)
                    if connection is self._listener:
                        accepted, _ = self._listener.accept()
                        selector.register(accepted, selectors.EVENT_READ)
                        continue
                    try:
                        message = connection.recv(MESSAGE_BYTES_MAX)
                    except OSError:
                        message = b""
                    if not message:
                        selector.unregister(connection)
                        self._announced.pop(connection, None)
                        self._owing = [owed for owed in self._owing if owed is not connection]
                        connection.close()
                    elif connection is not self._wake_reader:
                        if len(message) == CONFIRMATION.size:
                            self._confirm(connection, *CONFIRMATION.unpack(message)[:2])
                        elif len(message) > POKE.size:
                            self._announced[connection] = _Announced(Announcement.unpack(message))
                            announced.append(self._announced[connection])
                            continue
                        else:  # an older program that is still running announces nothing, and its pokes are shorter
                            self._confirm(connection, *POKE.unpack(message.ljust(POKE.size, b"\0")))
                            self._owing.append(connection)
                    follows = True
                try:
                    with self._following:
                        if self._paused:
                            continue
                        if follows:  # first: somebody may wait for it
                            self._follow()
                        for one in announced:
                            self._tell_early(one)
                except Exception:
                    log.exception("change_log_not_followed")

    def _confirm(self, connection: socket.socket, transaction_id: int, number: int) -> None:
        """What was announced under this number is committed now. (Of one that was not, the transaction's id is used again.)"""
        announced = self._announced.pop(connection, None)
        if announced is None:
            return
        announcement = announced.announcement
        if (announcement.transaction_id, announcement.number) == (transaction_id, number):
            self._committed[transaction_id] = announced

    def _tell_early(self, announced: _Announced) -> None:
        """Before the commit, if no handler runs that may have seen the state before it and has not replied."""
        session = self._operations.commits.session
        if session is None:
            return
        # Read first: a request that is taken after the loop was seen asleep is then one more than these.
        taken = _negotiate.taken()
        if session.is_waiting or not self._idle.now or self._loop_ended.is_set():
            return
        rows = [ChangeRow.unpack(raw) for raw in announced.announcement.rows]
        told = self._known(rows)
        if self.stillness is not None:
            self.stillness.begin()
        if told:
            _negotiate.forget(told, self._word, self._applied, [])
        announced.told_at = taken
        if self.stillness is not None:
            self.stillness.told(name_of(rows[0].origin, announced.announcement.number), taken)

    def _knows_since(self, announced: _Announced) -> bool:
        """Whether the kernel may know again what it was told to forget of these rows, or was not told."""
        return announced.told_at != _negotiate.taken()

    def _follow(self) -> None:
        """From `applied` on: what has been announced if nothing came between, else the change log."""
        announced = self._committed.pop(self._applied + 1, None)
        if announced is not None:
            knows = self._knows_since(announced)
            if knows:
                self._barrier()
            self._forget(announced.announcement.rows, self._applied + 1, told=None if knows else [])
            if not self._committed:
                return
        self._committed.clear()
        at = key_u64_u64(b"L", self._applied + 1, 0)
        newest = 0
        while True:
            with self._volume.snapshot() as reader:
                newest = newest or reader.id
                if newest <= self._applied:
                    break
                found = reader.first_rows(at, key_u64_u64(b"L", newest + 1, 0), ROWS_AT_ONCE)
            if found:
                self._barrier()
            rows = [raw for _, raw in found]
            if len(rows) < ROWS_AT_ONCE:
                self._forget(rows, newest)
                return
            self._forget(rows)
            transaction, number = split_u64_u64(found[-1][0])
            at = key_u64_u64(b"L", transaction, number + 1)
        self._forget([], self._applied)

    def loop_ended(self) -> None:
        """No handler runs any more, so there is nothing to wait for; the kernel's cache must still be kept right until umount."""
        self._loop_ended.set()

    def _barrier(self) -> None:
        if self._idle.now:
            return
        passed = threading.Event()
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(passed.set)
        while not passed.wait(0.02) and not self._loop_ended.is_set():
            pass

    def _known(self, rows: Sequence[ChangeRow]) -> list[Told]:
        """What the kernel may know of what others changed: directory, name in it and inode, each empty if it does not; and whether that was the inode's
        last name. (Not of directories: one that is told too early, and then not committed, would stay dead for the kernel.)
        """
        nameless = {row.inode for row in rows if row.orphan}
        operations = self._operations
        known = operations.open_files.lookups
        told = []
        for row in rows:
            if row.origin == self._volume.session.id:
                continue
            parent = operations.kernel_number(row.parent) if row.parent in known or row.parent == operations.root else 0
            inode = operations.kernel_number(row.inode) if row.inode in known or row.inode == operations.root else 0
            name = mount_names.name_to_forget(row.entry) if parent and operations.names_cached else b""
            if parent or inode:
                deleted = bool(name and inode) and row.inode in nameless and not row.entry.endswith(b"/")
                told.append((parent, name, inode, deleted))
        return told

    def _forget(self, raw_rows: list[bytes], applied: int | None = None, told: list[Told] | None = None) -> None:
        """Make the kernel forget what others changed; then say that the log has been followed up to `applied`, if it has, and answer who asked.

        `told`: what is to be forgotten, if that is not all.
        """
        rows = [ChangeRow.unpack(raw) for raw in raw_rows]
        if told is None:
            told = self._known(rows)
        while len(told) > TOLD_AT_ONCE or (told and applied is None):
            _negotiate.forget(told[:TOLD_AT_ONCE], self._word, self._applied, [])
            told = told[TOLD_AT_ONCE:]
        if applied is not None:
            answers, later = self._owing[:TOLD_AT_ONCE], self._owing[TOLD_AT_ONCE:]
            _negotiate.forget(told, self._word, applied, [connection.fileno() for connection in answers])
            self._applied = applied
            self._owing = []
            for connection in later:
                with suppress(OSError):
                    connection.send(ANSWER.pack(applied))
        for row in rows:
            if row.orphan and row.origin != self._volume.session.id and not self._loop_ended.is_set():
                with suppress(trio.RunFinishedError):  # it ends this moment: nobody holds anything open any more
                    self._token.run_sync_soon(self._orphaned, row.inode)

    def _orphaned(self, number: int) -> None:
        """In the trio loop: S3 took an inode's last name; hold it only while it is open here."""
        state = self._operations.open_files.state(number)
        if state is not None and state.handles:
            state.nameless = True
        else:
            self._operations.add_orphan(number)
