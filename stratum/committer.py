"""Group commit: one thread a process turns queued mutations into transactions.

A mutation is a function of a `MetadataTransaction` that checks everything first and then writes. Callers queue
it and sleep; the committer drains whatever has gathered (never waiting for more) into one transaction, so concurrency
makes groups and a lone caller pays no delay.

If a mutation raises before its first write, it alone fails. If it raises later, the whole batch is aborted and replayed
one by one, so nobody inherits half of another's rows.

Measured on 2 cores with 4 KiB values: 335 us a commit alone, 25 us each in groups of 16.
"""

from __future__ import annotations

import queue
import threading
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from stratum import metrics
from stratum.errors import NoSpace, SessionDead, StorageFailed, StratumError
from stratum.transaction import MetadataTransaction
from stratum.turn import turn

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from stratum.kv.contract import Store

T = TypeVar("T")

BATCH_MUTATIONS_MAX = 256
PAUSE_S_MAX = 0.0005
"""Several times what a mutation takes to compute; another process may have the store's lock."""


class Mutation(Generic[T]):
    """A queued closure and where its outcome goes. `done` runs in the committer's (or acknowledger's) thread."""

    __slots__ = ("_lock", "computed", "done", "error", "finished", "frees", "function", "result", "transaction_id")

    def __init__(
        self,
        function: Callable[[MetadataTransaction], T],
        *,
        frees: bool,
        done: Callable[[Mutation[T]], None] | None = None,
    ) -> None:
        self.function = function
        self.frees = frees
        self.result: T | None = None
        self.error: BaseException | None = None
        self.transaction_id = 0
        self.finished = False
        self.done = done
        self.computed: threading.Lock | None = None
        """Held by the committer until the function has run."""
        self._lock: threading.Lock | None = None
        if done is None:
            self._lock = threading.Lock()
            self._lock.acquire()

    def let_go(self) -> None:
        """The function has run, or never will: who stands still for it goes on."""
        if self.computed is not None:
            self.computed.release()
            self.computed = None

    def finish(self) -> None:
        self.finished = True
        self.let_go()
        if self._lock is not None:
            self._lock.release()
        elif self.done is not None:
            self.done(self)

    def wait(self) -> T:
        assert self._lock is not None, "only a mutation without a callback can be waited for"
        self._lock.acquire()
        return self.outcome()

    def outcome(self) -> T:
        if self.error is not None:
            raise self.error
        return self.result  # type: ignore[return-value]  # set by the committer when error is None


class Committer:
    """Owns the write side of one process."""

    def __init__(
        self,
        store: Store,
        session: int,
        new_id: Callable[[], int],
        *,
        announce: Callable[[int, list[bytes], list[int]], None],
        acknowledge: Callable[[list[Mutation[Any]], int], None],
        may_grow: Callable[[], bool],
        release_reserve: Callable[[], bool],
    ) -> None:
        self.undisturbed: AbstractContextManager[object] = nullcontext()
        """Entered while mutations run, for a process whose other threads can be asked to hold still meanwhile."""
        self._store = store
        self._session = session
        self._new_id = new_id
        self._announce = announce
        self._acknowledge = acknowledge
        self._may_grow = may_grow
        self._release_reserve = release_reserve
        self._queue: queue.SimpleQueue[Mutation[Any] | None] = queue.SimpleQueue()
        self.failed: StratumError | None = None
        self.batches = 0
        self.mutations = 0
        self._batch_before = 0
        self._idle = False
        self._stopping = False
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="committer", daemon=True)
        self._thread.start()

    def submit(self, mutation: Mutation[Any]) -> None:
        if self.failed is not None:
            raise self.failed
        if self._stopping:
            raise SessionDead("the volume is closing in this process; try again after the restart")
        self._queue.put(mutation)

    def submit_and_pause(self, mutation: Mutation[Any]) -> None:
        """The same, and if the committer has nothing else to do, let it compute undisturbed before this thread goes on.

        LMDB lets go of the interpreter in every call, and a thread that computes meanwhile takes it each time: a create through the
        mount was 12 switches, and is half of them.
        """
        if self._idle:
            lock = mutation.computed = threading.Lock()
            lock.acquire()
            self.submit(mutation)
            lock.acquire(timeout=PAUSE_S_MAX)
        else:
            self.submit(mutation)

    def stop(self) -> None:
        """Commit what is queued, then end."""
        self._stopping = True
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._idle = self._queue.empty()
            first = self._queue.get()
            self._idle = False
            if first is None:
                return
            batch = [first]
            try:
                self._commit(batch, more=True)
            except BaseException as error:  # noqa: BLE001  a dead committer would leave every caller waiting for ever
                self.failed = StorageFailed(
                    f"the committer failed ({type(error).__name__}: {error}); restart this process"
                )
                self._fail([mutation for mutation in batch if not mutation.finished], self.failed)
            if self._ending:
                return

    def _gather(self, batch: list[Mutation[Any]]) -> None:
        """Add what is queued. Mutations that wait for the store's lock meanwhile make the batch larger."""
        while len(batch) < BATCH_MUTATIONS_MAX:
            try:
                mutation = self._queue.get_nowait()
            except queue.Empty:
                return
            if mutation is None:
                self._ending = True
                return
            batch.append(mutation)

    def _commit(self, batch: list[Mutation[Any]], *, more: bool = False, settled: bool = False) -> None:
        """`more`: the batch may grow by what is queued when the transaction begins.

        `settled`: a checkpoint has already given back the pages that commits before this one freed.
        """
        may_grow = self._may_grow()
        if self.failed is not None:
            self._fail(batch, self.failed)
            return
        if not may_grow:
            refused = [mutation for mutation in batch if not mutation.frees]
            self._fail(refused, NoSpace("the disk is full down to the reserve; delete something, then try again"))
            batch = [mutation for mutation in batch if mutation.frees]
            more = False
        if not batch:
            return
        began = time.perf_counter()
        try:
            logged, transaction_id = self._attempt(batch, more=more)
        except (StorageFailed, SessionDead) as error:
            self.failed = error
            self._fail(batch, error)
            return
        except NoSpace as error:
            if not settled and self._settle():
                self._commit(batch, settled=True)
            elif all(mutation.frees for mutation in batch):
                if self._release_reserve():
                    self._commit(batch, settled=True)
                else:
                    self._fail(batch, error)
            else:
                self._fail([mutation for mutation in batch if not mutation.frees], error)
                self._commit([mutation for mutation in batch if mutation.frees], settled=True)
            return
        except BaseException as error:  # noqa: BLE001  whatever a closure raised after it wrote goes to its own caller
            if len(batch) == 1:
                self._fail(batch, error)
                return
            for mutation in batch:
                self._commit([mutation])
            return
        metrics.COMMIT_SECONDS.observe(time.perf_counter() - began)
        metrics.MUTATIONS.add(amount=len(batch))
        self.batches += 1
        self._batch_before = len(batch)
        self.mutations += len(batch)
        for mutation in batch:
            mutation.transaction_id = transaction_id
        if logged:
            self._acknowledge(batch, transaction_id)
        else:
            for mutation in batch:
                mutation.finish()

    def _settle(self) -> bool:
        try:
            self._store.checkpoint()
        except StratumError:
            return False
        return True

    def _attempt(self, batch: list[Mutation[Any]], *, more: bool) -> tuple[bool, int]:
        with self._store.transact() as kv:
            # Who commits alone waits for nobody: holding a loop still costs it a wake-up.
            alone = self._batch_before <= 1 and self._queue.empty()
            with turn, nullcontext() if alone else self.undisturbed:
                if more:
                    self._gather(batch)
                tx = MetadataTransaction(kv, self._session, self._new_id)
                for mutation in batch:
                    before = tx.writes
                    mutation.error = None
                    try:
                        mutation.result = mutation.function(tx)
                        tx.check_quotas(frees=mutation.frees)
                    except Exception as error:
                        if tx.writes != before:
                            raise
                        mutation.error = error
                tx.flush()
            for mutation in batch:
                mutation.let_go()
            if tx.changes:
                self._announce(tx.id, tx.changes, tx.live_mounts())
            return bool(tx.changes), tx.id

    @staticmethod
    def _fail(batch: list[Mutation[Any]], error: BaseException) -> None:
        for mutation in batch:
            mutation.error = error
            mutation.finish()
