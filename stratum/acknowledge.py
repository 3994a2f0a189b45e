"""Waiting until every live mount has forgotten what a commit replaced.

A commit that logged changes is finished only when, for each mount that was live inside that transaction, the slot table
says `applied >= transaction`. The poke over the mount's socket is a hint that makes it quick; what counts is the change log
and the slot, so a writer that dies between commit and poke leaves nothing stale: the mount reads the log on its own.

Before the commit is durable its rows are announced to the mounts, as a hint too: while the disk works they wake up and take it apart,
and read the change log only if other commits came between. A mount that sleeps otherwise makes the kernel forget at once, and says in shared
memory that it was asked for nothing since (`stillness.py`): then nobody waits for it.

A mount that does not answer by the deadline is fenced (`fencing.py`). Only then does the writer answer.
"""

from __future__ import annotations

import queue
import select
import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stratum import metrics
from stratum.errors import StorageFailed
from stratum.fencing import fence
from stratum.log import get_logger
from stratum.mount_rows import mount_rows
from stratum.stillness import StillnessOf, name_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from stratum.committer import Mutation
    from stratum.volume import Volume

POKE = struct.Struct("<QQ")
"""A transaction that is committed, and the number of its announcement or 0."""
CONFIRMATION = struct.Struct("<QQB")
"""The same, of a commit that nobody waits for: it is not answered."""
ANSWER = struct.Struct("<Q")
"""The transaction up to which a mount has followed."""
ANNOUNCED_ROWS_MAX = 16
MESSAGE_BYTES_MAX = 8192
ANSWER_S_MAX = 0.25
"""How long an answer is waited for before it is looked whether the mount lives."""
UNREACHABLE_S = 0.005
log = get_logger("acknowledge")


@dataclass(slots=True, frozen=True)
class Announcement:
    """Rows of the change log that a transaction will have written if it is committed. `number` counts what a process announced."""

    transaction_id: int
    number: int
    rows: list[bytes]

    def pack(self) -> bytes:
        """Longer than a poke: each row stands behind its length."""
        assert self.rows, "nothing to announce"
        rows = b"".join(len(row).to_bytes(2, "little") + row for row in self.rows)
        assert len(rows) > 1, "as long as a confirmation"
        return POKE.pack(self.transaction_id, self.number) + rows

    @classmethod
    def unpack(cls, message: bytes) -> Announcement:
        rows = []
        at = POKE.size
        while at < len(message):
            stop = at + 2 + int.from_bytes(message[at : at + 2], "little")
            rows.append(message[at + 2 : stop])
            at = stop
        transaction_id, number = POKE.unpack_from(message)
        return cls(transaction_id, number, rows)


class _Link:
    """A connection to one mount. `unanswered` counts pokes without an answer yet."""

    __slots__ = ("socket", "stillness", "unanswered")

    def __init__(self, connection: socket.socket, stillness: StillnessOf | None) -> None:
        self.socket = connection
        self.stillness = stillness
        self.unanswered = 0

    def close(self) -> None:
        self.socket.close()
        if self.stillness is not None:
            self.stillness.close()

    def is_still(self, announcement: int) -> bool:
        return self.stillness is not None and self.stillness.holds(announcement)

    def poke(self, transaction_id: int, announced: int = 0) -> None:
        """Raises `OSError`, also when the mount has not taken the pokes before."""
        self.socket.send(POKE.pack(transaction_id, announced))
        self.unanswered += 1


class Acknowledger:
    """One thread a process; started by the first commit that needs it."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._queue: queue.SimpleQueue[tuple[list[Mutation[Any]], int] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._links: dict[int, _Link] = {}
        self._announcements = 0
        self._announced = 0
        """The number of what was announced for the transaction at hand; the committer's."""
        self._live: Collection[int] = ()
        """The mounts that were live inside it."""
        self._lock = threading.Lock()
        """Over `_links` and their counts: the committer pokes, too."""

    def announce(self, transaction_id: int, rows: list[bytes], live: Collection[int]) -> None:
        """Called by the committer, inside the transaction: what mounts will have to forget if it is committed, and which are `live` now."""
        self._announced = 0
        self._live = live
        if not self._links or len(rows) > ANNOUNCED_ROWS_MAX:
            return
        self._announcements += 1
        message = Announcement(transaction_id, self._announcements, rows).pack()
        if len(message) > MESSAGE_BYTES_MAX:
            return
        self._announced = self._announcements
        self._tell(lambda link: link.socket.send(message))

    def submit(self, batch: list[Mutation[Any]], transaction_id: int) -> None:
        """Called by the committer: finish these mutations once the mounts have followed."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="acknowledger", daemon=True)
            self._thread.start()
        if self._announced and self._all_still():
            for mutation in batch:
                mutation.finish()
            self._tell(lambda link: link.socket.send(CONFIRMATION.pack(transaction_id, self._announced, 0)))
            metrics.INVALIDATION_SECONDS.observe(0.0)
            return
        # The mounts begin while our thread wakes up.
        self._tell(lambda link: link.poke(transaction_id, self._announced))
        self._queue.put((batch, transaction_id))

    def _all_still(self) -> bool:
        """Whether no kernel knows what this transaction has changed."""
        which = name_of(self._volume.session.id, self._announced)
        with self._lock:
            return all(
                session == self._volume.session.id or (session in self._links and self._links[session].is_still(which))
                for session in self._live
            )

    def _tell(self, tell: Callable[[_Link], object]) -> None:
        with self._lock:
            for link in self._links.values():
                with suppress(OSError):
                    tell(link)

    def stop(self) -> None:
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
        for link in self._links.values():
            link.close()

    def _run(self) -> None:
        while True:
            item = self._queue.get()
            if item is None:
                return
            waiting = [item]
            ending = False
            while True:
                try:
                    more = self._queue.get_nowait()
                except queue.Empty:
                    break
                if more is None:
                    ending = True
                    break
                waiting.append(more)
            failure = None
            try:
                self._wait(max(transaction_id for _, transaction_id in waiting))
            except Exception as error:
                log.exception("acknowledge_failed")
                # Of this class, so that nobody takes back the bytes of a change that may have happened: this one has.
                failure = StorageFailed(
                    f"the change is committed, but it is not known whether every mount shows it ({type(error).__name__}); look at the log"
                )
            for batch, _ in waiting:
                for mutation in batch:
                    if failure is not None and mutation.error is None:
                        mutation.error = failure
                    mutation.finish()
            if ending:
                return

    def _mounts(self) -> dict[int, dict[str, Any]]:
        with self._volume.snapshot() as reader:
            rows = mount_rows(reader)
        rows.pop(self._volume.session.id, None)
        return rows

    def _wait(self, transaction_id: int) -> None:
        """All mounts at once. Who is dead, or has not followed at the deadline, is fenced."""
        began = time.monotonic()
        deadline = began + self._volume.config.mount_acknowledge_s_max
        mounts = self._mounts()
        while True:
            mounts = {
                session: row for session, row in mounts.items() if not self._applied(session, row, transaction_id)
            }
            late = time.monotonic() > deadline
            for session, row in list(mounts.items()):
                if late or self._volume.session.is_dead(session):
                    self._drop(session)
                    fence(self._volume, session, mounts.pop(session))
                else:
                    self._ask(session, row, transaction_id)
            if not mounts:
                metrics.INVALIDATION_SECONDS.observe(time.monotonic() - began)
                return
            self._listen(mounts, min(deadline - time.monotonic(), ANSWER_S_MAX))

    def _applied(self, session: int, row: dict[str, Any], transaction_id: int) -> bool:
        owner, _, applied = self._volume.session.read_slot(row["slot"])
        return owner == session and applied >= transaction_id

    def _ask(self, session: int, row: dict[str, Any], transaction_id: int) -> None:
        """Poke a mount that owes no answer."""
        link = self._links.get(session)
        try:
            if link is None:
                connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                connection.setblocking(False)
                stillness = None
                with suppress(OSError, ValueError):  # one of an older program, or of a disk that was full
                    if row.get("still"):
                        stillness = StillnessOf(self._volume.session.file_of(session))
                link = _Link(connection, stillness)
                with self._lock:
                    self._links[session] = link
                with self._volume.meta_descriptor() as folder:  # keeps the path below the limit of 108 bytes
                    connection.connect(f"/proc/self/fd/{folder}/{row['socket']}")
            with self._lock:
                if not link.unanswered:
                    link.poke(transaction_id)
        except OSError:
            self._drop(session)

    def _listen(self, sessions: Collection[int], seconds: float) -> None:
        """Take answers, or wait a little for mounts that cannot be reached."""
        links = {session: link for session in sessions if (link := self._links.get(session)) is not None}
        poll = select.poll()  # select(2) knows no descriptor beyond 1,023
        for link in links.values():
            poll.register(link.socket, select.POLLIN)
        reachable = len(links) == len(sessions)
        ready = {number for number, _ in poll.poll(max(0.0, seconds if reachable else UNREACHABLE_S) * 1000)}
        for session, link in links.items():
            if link.socket.fileno() not in ready:
                continue
            try:
                answered = bool(link.socket.recv(ANSWER.size))
            except OSError:
                answered = False
            if answered:
                with self._lock:
                    link.unanswered -= 1
            else:
                self._drop(session)
                time.sleep(UNREACHABLE_S)

    def _drop(self, session: int) -> None:
        with self._lock:
            link = self._links.pop(session, None)
        if link is not None:
            link.close()
