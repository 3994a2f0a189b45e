"""The contract on LMDB.

LMDB makes a commit durable by writing every page it changed to its place and flushing twice. Here a commit is one write and one
flush: the rows it changed go to the end of a journal (`stratum/kv/journal.py`), and LMDB's own pages to their place whenever the kernel likes,
until a *checkpoint* flushes them. After a power cut the store is put back to its last checkpoint and the journal is applied again.
Why, and what it brings: docs/decisions/0010-journal.md.

Invariants
* A transaction that ended is on the disk, and none is visible before it is.
* The pages of the last checkpoint are not overwritten before the next one is on the disk: whoever commits holds a reader ("the
  pin") on a state no newer than it. A process that has none makes a checkpoint first.
* Where the journal ends is a row of the store (TAIL), so a commit moves both or neither. A record behind it belongs to a commit
  that nobody was told of; the next one is written over it.
* Only under LMDB's write lock are records written, marks written, and the pin changed.
* Nobody opens the store before the first one to come has mended it (`Marks.gate`).
* Who sees the disk refuse a flush says so to all; none commits until all have ended and the journal was applied again.
* The map has one fixed size for the life of a volume; it is address space, not disk space. Resizing at run time
  kills another process that is reading (SIGBUS, measured).
* One Environment a process, opened after fork. Nothing else opens files in the folder.
* Read transactions live microseconds; a long one keeps every page freed since from being used again.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lmdb

from stratum.errors import Busy, NoSpace, StorageFailed, StratumError
from stratum.kv import condition
from stratum.kv.condition import TRANSACTION_AT, Keep
from stratum.kv.journal import HEAD_BYTES, Journal, Mark, Marks, record
from stratum.kv.lmdb_access import (
    LINEAGE,
    LINEAGE_AT,
    PAGE_BYTES,
    TAIL,
    TAIL_VALUE,
    LmdbTransaction,
    SnapshotBlock,
    allocate_lock_file,
    lineage_of,
    translate,
)
from stratum.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

log = get_logger("store")
JOURNAL_BYTES = 16 << 20
JOURNAL_RECORDS_MAX = 4096
"""A checkpoint comes after so many bytes or records at the latest, while everybody waits: until then LMDB uses none of the pages again
that commits free."""
CHECKPOINT_S = 1.0
CHECKPOINT_SHARE = 8
"""A thread makes one after so long, and after this part of the above."""
TRICKLE_RECORDS = 64
"""How often the disk is asked to begin with what the next checkpoint will wait for. Without it the p99 of 4 KiB PUTs by 8 clients was 9 to
10 ms, with it 6 to 8; it was 5 before there was a journal."""
_SYNC_FILE_RANGE_WRITE = 2
_sync_file_range = ctypes.CDLL(None).sync_file_range
_sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


class LmdbStore:
    def __init__(
        self,
        folder: str,
        *,
        map_bytes: int,
        readers_max: int,
        create: bool = False,
        journal_bytes: int = 0,
        keep: Keep | None = None,
    ) -> None:
        """`keep` says what counts of a damaged store. Raises `StoreDamaged` if it is damaged and nobody has said, `Busy` if somebody has
        said and others have the store open.
        """
        self._folder = folder
        self._path = Path(folder) / "data.mdb"
        self._journal_bytes = journal_bytes or JOURNAL_BYTES
        self._pin: lmdb.Transaction | None = None
        self._failed = False
        self._committed = threading.Event()
        self._hurry = threading.Event()
        self._ending = False
        self._due = False
        self._checkpoint_s = 0.0
        self._checkpointer: threading.Thread | None = None
        self._starting = threading.Lock()
        self._last_commit = self._last_checkpoint = 0
        allocate_lock_file(Path(folder) / "lock.mdb", readers_max)
        options = {
            "map_size": map_bytes,
            "max_readers": readers_max,
            "max_dbs": 0,
            "create": create,
            "meminit": False,
            "mode": 0o600,
        }
        with ExitStack() as opened:
            try:
                self._journal = Journal(Path(folder) / "journal")
                opened.callback(self._journal.close)
                self._marks = Marks(Path(folder) / "checkpoint")
                opened.callback(self._marks.close)
                with self._marks.gate():
                    alone = self._journal.take()
                    if alone:
                        self._journal.fill(self._journal_bytes)
                    self._open(options, opened, keep, alone=alone)
                    self._journal.share()
            except lmdb.Error as error:
                raise translate(error) from error
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    raise NoSpace(f"the journal of the metadata store has no room in {folder}; free space") from error
                raise
            opened.pop_all()

    # -- opening ------------------------------------------------------------------------------------------------------

    def _open(self, options: dict[str, Any], opened: ExitStack, keep: Keep | None, *, alone: bool) -> None:
        mark, mending = self._marks.newest(), False
        lineage = lineage_of(self._path)
        named = lineage is not None or condition.has_damaged_name(self._path)
        if keep is not None and not alone:
            raise Busy(f"a process has the store in {self._folder} open; stop it first")
        if alone and named:
            found = condition.examine(Path(self._folder), self._marks, self._journal)
            if found.fault and keep is None:
                raise found.error
            mark = found.mark if keep is not Keep.STORE else None
            mending = mark is not None and (found.newest != mark.transaction or self._marks.failed or bool(keep))
            if mark is not None and mending:
                self._put_back(mark)
        self._env = lmdb.open(self._folder, sync=False, metasync=False, readahead=True, **options)
        opened.callback(self._env.close)
        if alone and keep is Keep.STORE:
            mark = self._begin_again(lineage)
        elif alone and not named:
            mark = self._begin()
        elif mark is None:
            raise StorageFailed(f"the metadata store in {self._folder} has no checkpoint")
        self._mark = mark
        self._data_fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        opened.callback(os.close, self._data_fd)
        if alone:
            self._marks.clear_failure()
            self._marks.note_boot()
        if mending:
            self._apply_again(mark)

    def _begin(self) -> Mark:
        """The first checkpoint of a file: it gets its name once a mark of that name is on the disk."""
        self._env.sync(True)
        lineage = os.urandom(16)
        mark = self._mark_now(self._marks.epoch() + 1, lineage)
        self._marks.write(mark)
        self._write_store([(LINEAGE_AT, LINEAGE + lineage)])
        return mark

    def _begin_again(self, lineage: bytes | None) -> Mark:
        """A new checkpoint of the store as it stands. The mark that held before is overwritten by none but the next one."""
        self._env.sync(True)
        before = self._marks.newest()
        with self._env.begin() as txn:
            epoch = 1 + max(before.epoch if before else 0, self._tail_epoch(txn))
        if before is not None and (epoch - before.epoch) % 2 == 0:
            epoch += 1
        mark = self._mark_now(epoch, lineage or os.urandom(16))
        self._marks.write(mark)
        if lineage is None:
            self._write_store([(LINEAGE_AT, LINEAGE + mark.lineage)])
        return mark

    @staticmethod
    def _tail_epoch(txn: lmdb.Transaction) -> int:
        raw = txn.get(TAIL)
        return int(TAIL_VALUE.unpack(raw)[0]) if raw is not None else 0

    def _mark_now(self, epoch: int, lineage: bytes) -> Mark:
        """A mark of the newest state, which is on the disk already and stays while this is called."""
        transaction = int(self._env.info()["last_txnid"])
        with self._path.open("rb") as file:
            head = os.pread(file.fileno(), HEAD_BYTES, transaction % 2 * PAGE_BYTES)
        found = int.from_bytes(head[TRANSACTION_AT : TRANSACTION_AT + 8], "little")
        assert found == transaction, f"meta page {transaction % 2} is of transaction {found}, not {transaction}"
        return Mark(epoch, transaction, os.urandom(16), lineage, head)

    def _write_store(self, pieces: list[tuple[int, bytes]]) -> None:
        fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        try:
            for at, data in pieces:
                os.pwrite(fd, data, at)
            os.fsync(fd)
        finally:
            os.close(fd)

    def _put_back(self, mark: Mark) -> None:
        """Make the state of the mark the newest one: both meta pages become its own. Interrupted, it is done again."""
        pages = [(number * PAGE_BYTES, struct.pack("<Q", number) + mark.head[8:]) for number in (0, 1)]
        self._write_store([*pages, (LINEAGE_AT, LINEAGE + mark.lineage)])

    def _apply_again(self, mark: Mark) -> None:
        self._pin = self._env.begin()
        assert self._pin.id() == mark.transaction, "a store that was put back begins with its checkpoint"
        count = 0
        for transaction, following, rows in self._journal.records(mark):
            count += 1
            with self._env.begin(write=True) as txn:
                assert txn.id() == transaction, f"record {transaction} is applied as {txn.id()}"
                for key, value in rows:
                    if value is None:
                        txn.delete(key)
                    else:
                        txn.put(key, value)
                txn.put(TAIL, TAIL_VALUE.pack(mark.epoch, following, count))
        self._locked(self._checkpoint)
        log.info("journal_applied", transactions=count, newest=mark.transaction + count)

    # -- reading ------------------------------------------------------------------------------------------------------

    def snapshot(self) -> SnapshotBlock:
        return SnapshotBlock(self._env)

    def last_id(self) -> int:
        """Asked of a read transaction, not of the environment: the newest meta page is visible through the map while its
        commit still runs, and snapshots begun in that window do not include it.
        """
        with self.snapshot() as snapshot:
            return snapshot.id

    # -- changing -----------------------------------------------------------------------------------------------------

    @contextmanager
    def transact(self) -> Iterator[LmdbTransaction]:
        txn, at, records = self._begin_writing()
        written = False
        try:
            changes = LmdbTransaction(txn)
            yield changes
            if not changes.parts:
                txn.abort()
                return
            data = record(self._mark, changes.id, changes.parts)
            txn.put(TAIL, TAIL_VALUE.pack(self._mark.epoch, at + len(data), records + 1))
            written = True
            self._write_record(data, at)
            txn.commit()
        except lmdb.Error as error:
            txn.abort()
            if written:
                self._cancel(at)
            raise translate(error, self._folder) from error
        except OSError as error:
            txn.abort()
            if written:
                self._cancel(at)
            if error.errno == errno.ENOSPC:
                raise NoSpace(
                    "the metadata store cannot grow; nothing was changed; free space and try again"
                ) from error
            raise
        except BaseException:
            txn.abort()
            if written and not self._failed:
                self._cancel(at)
            raise
        self._last_commit = changes.id
        if not self._committed.is_set():
            self._wake()
        self._due = records * CHECKPOINT_SHARE > JOURNAL_RECORDS_MAX or at * CHECKPOINT_SHARE > self._journal_bytes
        if self._due or records % TRICKLE_RECORDS == 0:
            self._hurry.set()

    def _begin_writing(self) -> tuple[lmdb.Transaction, int, int]:
        """(a write transaction under a valid pin, where its record begins, how many there are)."""
        try:
            txn = self._env.begin(write=True)
        except lmdb.Error as error:
            raise translate(error) from error
        try:
            self._look()
            at, records = self._tail(txn)
            if self._pin is None or at >= self._journal_bytes or records >= JOURNAL_RECORDS_MAX:
                self._checkpoint(txn)
                at = records = 0
        except BaseException:
            txn.abort()
            raise
        return txn, at, records

    def _look(self) -> None:
        """Under the write lock: take note of checkpoints that other processes made. Raises `StorageFailed`."""
        if self._failed or self._marks.failed:
            raise StorageFailed(
                "the disk of the metadata store refused a flush; look at it, then restart all processes of the volume"
            )
        if self._marks.epoch() != self._mark.epoch:
            try:
                self._marks.sync()
            except OSError as error:
                raise self._disk_failed(error) from error
            newest = self._marks.newest()
            assert newest is not None, "a mark is never overwritten by anything but another one"
            self._mark = newest

    def _tail(self, txn: lmdb.Transaction) -> tuple[int, int]:
        raw = txn.get(TAIL)
        if raw is None:
            return 0, 0
        epoch, at, records = TAIL_VALUE.unpack(raw)
        return (at, records) if epoch == self._mark.epoch else (0, 0)

    def _write_record(self, data: bytes, at: int) -> None:
        try:
            self._journal.write(data, at)
        except OSError as error:
            if error.errno == errno.ENOSPC:  # a record beyond the end of the file
                raise
            raise self._disk_failed(error) from error

    def _disk_failed(self, error: Exception) -> StorageFailed:
        self._failed = True
        self._marks.fail()
        return StorageFailed(f"the disk of the metadata store refused a flush ({error}); look at it, then restart")

    def _cancel(self, at: int) -> None:
        """A commit failed behind its record, and its caller will be told that nothing has changed: the record has to go."""

        def cancel(txn: lmdb.Transaction) -> None:
            if self._tail(txn)[0] == at:  # else the next commit has already been written over it
                try:
                    self._journal.cancel(at)
                except OSError as error:
                    raise self._disk_failed(error) from error

        self._locked(cancel)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def checkpoint(self) -> None:
        """Bring all that was committed to its place, so that pages freed since the last time can be used again."""
        self._locked(self._checkpoint)

    def _locked(self, work: Callable[[lmdb.Transaction], None]) -> None:
        """Do something under the write lock that changes no row."""
        try:
            txn = self._env.begin(write=True)
        except lmdb.Error as error:
            raise translate(error, self._folder) from error
        try:
            self._look()
            work(txn)
        finally:
            txn.abort()

    def _checkpoint(self, _: lmdb.Transaction) -> None:
        """Under the write lock. The old pin goes when the new mark is on the disk, not before."""
        try:
            self._env.sync(True)
            pin = self._env.begin()
            mark = self._mark_now(self._mark.epoch + 1, self._mark.lineage)
            assert pin.id() == mark.transaction, f"the pin is of {pin.id()}, the mark of {mark.transaction}"
            self._marks.write(mark)
        except (lmdb.Error, OSError) as error:
            raise self._disk_failed(error) from error
        old, self._pin, self._mark = self._pin, pin, mark
        self._last_checkpoint = mark.transaction
        self._checkpoint_s = time.monotonic()
        if old is not None:
            old.abort()

    def _drop_pin(self, _: lmdb.Transaction | None = None) -> None:
        if self._pin is not None:
            self._pin.abort()
            self._pin = None

    def _wake(self) -> None:
        with self._starting:
            if self._checkpointer is None:
                self._checkpointer = threading.Thread(target=self._keep_checkpointing, name="checkpointer", daemon=True)
                self._checkpointer.start()
        self._committed.set()

    def _keep_checkpointing(self) -> None:
        """Every CHECKPOINT_S while this process commits; then it lets go of its pin, which would hold freed pages."""
        while True:
            self._committed.wait()
            due_s = self._checkpoint_s + CHECKPOINT_S
            early = self._hurry.wait(max(0.0, due_s - time.monotonic())) and not self._due
            self._hurry.clear()
            if self._ending:
                return
            if early:  # it only begins to write; what it says of errors, the checkpoint's flush says again
                _sync_file_range(self._data_fd, 0, 0, _SYNC_FILE_RANGE_WRITE)
                continue
            try:
                if self._last_commit > self._last_checkpoint:
                    # Most of it without the lock: what is left for under it is what was written meanwhile.
                    os.fdatasync(self._data_fd)
                    self._locked(self._checkpoint)
                    continue
                self._checkpoint_s = time.monotonic()
                self._committed.clear()
                if self._last_commit > self._last_checkpoint:
                    self._committed.set()
                else:
                    self._locked(self._drop_pin)
            except (StratumError, OSError) as error:
                if not isinstance(error, StratumError):
                    self._disk_failed(error)
                log.error("checkpoint_failed", error=str(error))
                return

    # -- the rest -----------------------------------------------------------------------------------------------------

    def used_bytes(self) -> int:
        pages: int = self._env.info()["last_pgno"] + 1
        return pages * PAGE_BYTES

    def check_readers(self) -> int:
        cleared: int = self._env.reader_check()
        return cleared

    def copy_to(self, folder: str) -> None:
        self._env.copy(folder, compact=True)

    def close(self) -> None:
        """Leaves nothing to mend, unless the disk failed."""
        self._ending = True
        self._committed.set()
        self._hurry.set()
        if self._checkpointer is not None:
            self._checkpointer.join()
        if not self._failed and self._last_commit > self._last_checkpoint:
            try:
                self._locked(self._checkpoint)
            except StratumError as error:
                log.error("checkpoint_failed", error=error.message)
        self._drop_pin()
        os.close(self._data_fd)
        self._env.close()
        self._marks.close()
        self._journal.close()
