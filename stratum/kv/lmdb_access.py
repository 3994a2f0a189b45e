"""LMDB without the journal: snapshots, what a transaction does, its errors as ours, and stores that are only read.

`lmdb_store.py` is the store; what must hold stands there.
"""

from __future__ import annotations

import errno
import os
import struct
from bisect import bisect_left
from itertools import islice
from operator import itemgetter
from typing import TYPE_CHECKING, cast

import lmdb

from stratum.errors import NoSpace, StorageFailed, StratumError
from stratum.kv.contract import KEY_BYTES_MAX, RESERVED
from stratum.kv.journal import DELETED, pack_row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

PAGE_BYTES = 4096
LINEAGE_AT, LINEAGE = 4064, b"stratum lineage\0"
"""In the first meta page, behind all that LMDB writes: names the file, so that a checkpoint is never applied to another one."""

TAIL = RESERVED + b"journal"
TAIL_VALUE = struct.Struct("<QQQ")
"""Epoch, where the next record begins, how many there are."""


class LmdbSnapshot:
    __slots__ = ("_txn", "get", "id")

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
        stop = min(stop, RESERVED)
        for row in cast("Iterator[tuple[bytes, bytes]]", cursor.iternext()):
            if row[0] >= stop:
                return
            yield row

    def first_rows(self, start: bytes, stop: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        cursor = self._txn.cursor()
        if not cursor.set_range(start):
            return []
        rows = list(islice(cast("Iterator[tuple[bytes, bytes]]", cursor.iternext()), limit))
        stop = min(stop, RESERVED)
        if rows and rows[-1][0] >= stop:
            del rows[bisect_left(rows, stop, key=itemgetter(0)) :]
        return rows

    def last_before(self, start: bytes, stop: bytes) -> tuple[bytes, bytes] | None:
        cursor = self._txn.cursor()
        stop = min(stop, RESERVED)
        found = cursor.prev() if cursor.set_range(stop) else cursor.last()
        if not found:
            return None
        row = cast("tuple[bytes, bytes]", cursor.item())
        return row if row[0] >= start else None


class LmdbTransaction(LmdbSnapshot):
    """Keeps what it changes for the journal."""

    __slots__ = ("parts",)

    def __init__(self, txn: lmdb.Transaction) -> None:
        super().__init__(txn)
        self.parts: list[bytes] = []

    def put(self, key: bytes, value: bytes) -> None:
        self._txn.put(key, value)
        self.parts += (pack_row(len(key), len(value)), key, value)

    def delete(self, key: bytes) -> bool:
        deleted: bool = self._txn.delete(key)
        if deleted:
            self.parts += (pack_row(len(key), DELETED), key)
        return deleted


_READER_BYTES = 64


def allocate_lock_file(path: Path, readers_max: int) -> None:
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


def translate(error: lmdb.Error, folder: str = "") -> StratumError:
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


class SnapshotBlock:
    """The `with` block of a snapshot; a generator would cost as much as the transaction."""

    __slots__ = ("_env", "_txn")

    def __init__(self, env: lmdb.Environment) -> None:
        self._env = env

    def __enter__(self) -> LmdbSnapshot:
        try:
            self._txn = self._env.begin()
        except lmdb.Error as error:
            raise translate(error) from error
        return LmdbSnapshot(self._txn)

    def __exit__(self, *_: object) -> None:
        self._txn.abort()


def lineage_of(path: Path) -> bytes | None:
    """What names a store's file; None if it has no name, because it never had a journal."""
    try:
        with path.open("rb") as file:
            raw = os.pread(file.fileno(), 32, LINEAGE_AT)
    except FileNotFoundError:
        return None
    return raw[16:] if raw[:16] == LINEAGE else None


class LmdbCopy:
    """A store without a journal, for reading: a copy that `copy_to` made, or one of an older format, which others may have open.

    It is not given a name, so the next one to open it begins a journal of its own.
    """

    def __init__(self, folder: str, *, shared: bool = False) -> None:
        try:
            self._env = lmdb.open(folder, readonly=True, lock=shared, max_dbs=0, create=False)
        except lmdb.Error as error:
            raise translate(error) from error

    def snapshot(self) -> SnapshotBlock:
        return SnapshotBlock(self._env)

    def copy_to(self, folder: str) -> None:
        self._env.copy(folder, compact=True)

    def close(self) -> None:
        self._env.close()
