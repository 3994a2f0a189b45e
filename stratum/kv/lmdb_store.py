"""The contract on LMDB.

Invariants
* Sync and metasync stay on: a transaction that ended is on the disk.
* The map has one fixed size for the life of a volume; it is address space, not disk space. Resizing at run time
  kills another process that is reading (SIGBUS, measured).
* One Environment a process, opened after fork. Nothing else opens files in the folder.
* Read transactions live microseconds; a long one keeps every page freed since from being used again.
"""

from __future__ import annotations

import errno
import os
from bisect import bisect_left
from contextlib import contextmanager
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, cast

import lmdb

from stratum.errors import NoSpace, StorageFailed, StratumError
from stratum.kv.contract import KEY_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

PAGE_BYTES = 4096


class LmdbSnapshot:
    __slots__ = ("_cursor", "_txn", "get", "id")

    def __init__(self, txn: lmdb.Transaction) -> None:
        self._txn = txn
        # The hottest call of the engine: no wrapper around it. Values are bytes because the transaction has no buffers.
        self.get = cast("Callable[[bytes], bytes | None]", txn.get)
        self.id: int = txn.id()

    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        return dict(cast("list[tuple[bytes, bytes]]", self._txn.cursor().getmulti(keys)))

    def scan(self, start: bytes, stop: bytes) -> Iterator[tuple[bytes, bytes]]:
        cursor = self._txn.cursor()
        if not cursor.set_range(start):
            return
        for row in cast("Iterator[tuple[bytes, bytes]]", cursor.iternext()):
            if row[0] >= stop:
                return
            yield row

    def first_rows(self, start: bytes, stop: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        cursor = self._txn.cursor()
        if not cursor.set_range(start):
            return []
        rows = list(islice(cast("Iterator[tuple[bytes, bytes]]", cursor.iternext()), limit))
        if rows and rows[-1][0] >= stop:
            del rows[bisect_left(rows, stop, key=itemgetter(0)) :]
        return rows

    def last_before(self, start: bytes, stop: bytes) -> tuple[bytes, bytes] | None:
        cursor = self._txn.cursor()
        found = cursor.prev() if cursor.set_range(stop) else cursor.last()
        if not found:
            return None
        row = cast("tuple[bytes, bytes]", cursor.item())
        return row if row[0] >= start else None


class LmdbTransaction(LmdbSnapshot):
    __slots__ = ()

    def put(self, key: bytes, value: bytes) -> None:
        self._txn.put(key, value)

    def delete(self, key: bytes) -> bool:
        deleted: bool = self._txn.delete(key)
        return deleted


_READER_BYTES = 64


def _allocate_lock_file(path: Path, readers_max: int) -> None:
    """Give the reader table real blocks: LMDB maps it sparse, and a slot first used on a full disk is a SIGBUS.

    Before this process opens the environment, so that closing the descriptor drops no lock of ours.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        wanted = -(-(readers_max + 2) * _READER_BYTES // PAGE_BYTES) * PAGE_BYTES
        if os.fstat(fd).st_blocks * 512 < wanted:
            os.posix_fallocate(fd, 0, wanted)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
    finally:
        os.close(fd)


FULL_DISK_BYTES = 1024 * 1024


def _translate(error: lmdb.Error, folder: str = "") -> StratumError:
    """LMDB's exception as one of ours. ENOSPC and a full map lose nothing; anything else is a broken disk.

    A write that was cut short by a full disk reaches us as EIO (mdb_page_flush), so EIO on a disk without space is ENOSPC.
    """
    text = str(error)
    full = (
        isinstance(error, lmdb.MapFullError) or "No space left" in text or "ENOSPC" in text or "quota exceeded" in text
    )
    if not full and folder and "Input/output error" in text:
        disk = os.statvfs(folder)
        full = disk.f_bavail * disk.f_frsize < FULL_DISK_BYTES
    if full:
        return NoSpace(f"the metadata store cannot grow ({text}); nothing was changed; free space and try again")
    if isinstance(error, lmdb.ReadersFullError):
        return StratumError(f"all reader slots of the metadata store are taken ({text}); raise metadata.readers_max")
    if isinstance(error, lmdb.BadValsizeError):
        return StratumError(f"a key outside 1 to {KEY_BYTES_MAX} bytes reached the metadata store ({text})")
    return StorageFailed(f"the metadata store failed ({text}); look at the disk, then restart")


class _SnapshotBlock:
    """The `with` block of a snapshot; a generator would cost as much as the transaction."""

    __slots__ = ("_env", "_txn")

    def __init__(self, env: lmdb.Environment) -> None:
        self._env = env

    def __enter__(self) -> LmdbSnapshot:
        try:
            self._txn = self._env.begin()
        except lmdb.Error as error:
            raise _translate(error) from error
        return LmdbSnapshot(self._txn)

    def __exit__(self, *_: object) -> None:
        self._txn.abort()


class LmdbStore:
    def __init__(self, folder: str, *, map_bytes: int, readers_max: int, create: bool = False) -> None:
        self._folder = folder
        _allocate_lock_file(Path(folder) / "lock.mdb", readers_max)
        try:
            self._env = lmdb.open(
                folder,
                map_size=map_bytes,
                max_readers=readers_max,
                max_dbs=0,
                create=create,
                meminit=False,
                readahead=True,
                mode=0o600,
            )
        except lmdb.Error as error:
            raise _translate(error) from error

    def snapshot(self) -> _SnapshotBlock:
        return _SnapshotBlock(self._env)

    @contextmanager
    def transact(self) -> Iterator[LmdbTransaction]:
        try:
            txn = self._env.begin(write=True)
        except lmdb.Error as error:
            raise _translate(error) from error
        try:
            yield LmdbTransaction(txn)
            txn.commit()
        except lmdb.Error as error:
            txn.abort()
            raise _translate(error, self._folder) from error
        except OSError as error:
            txn.abort()
            if error.errno == errno.ENOSPC:
                raise NoSpace(
                    "the metadata store cannot grow; nothing was changed; free space and try again"
                ) from error
            raise
        except BaseException:
            txn.abort()
            raise

    def last_id(self) -> int:
        """Asked of a read transaction, not of the environment: the newest meta page is visible through the map while its
        commit still syncs, and snapshots begun in that window do not include it.
        """
        with self.snapshot() as snapshot:
            return snapshot.id

    def used_bytes(self) -> int:
        pages: int = self._env.info()["last_pgno"] + 1
        return pages * PAGE_BYTES

    def check_readers(self) -> int:
        cleared: int = self._env.reader_check()
        return cleared

    def copy_to(self, folder: str) -> None:
        self._env.copy(folder, compact=True)

    def close(self) -> None:
        self._env.close()
