"""Frozen states of the namespace: what clones that are still being filled copy from.

A *freeze* is a number, given out in order. While one is active, whoever changes a row of the namespace for the first time since the newest freeze
keeps what it was under that number (table e; the first byte says whether there was a row). So the state that freeze f froze is, for each key, what lies under the least
number >= f, and else the row itself.

Invariants
* A freeze is active while a directory still waits for rows of it (table k). `Active` counts the active ones, a row of table w the directories of one.
* While it is active no extent of a file in the tree that it froze is reclaimed (filling.py).
* A directory that waits has the counts, links and times that it will have. It holds every entry up to its cursor, and those that table y names; what table y names and
  it does not hold has been removed.
* The bucket that a clone is made in is not cloned from while it is being filled: a frozen state never has directories that wait.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stratum import longkeys
from stratum.kv.contract import prefix_end
from stratum.schema import key_u64, key_u64_u64, pack_u64, prefix_range, unpack_u64

if TYPE_CHECKING:
    from stratum.kv.contract import Snapshot, Transaction
    from stratum.transaction import InodeReader, MetadataTransaction

ACTIVE = b"gfrozen"
TABLES = frozenset(b"DIMNSYi")
_PAIR = struct.Struct(">QQ")
_FREEZE = struct.Struct(">QQQ")
GARBAGE_AT_ONCE = 1000


def prefix(freeze: int) -> bytes:
    return b"e" + pack_u64(freeze)


def active(reader: Snapshot) -> tuple[int, int]:
    """The newest freeze, and how many are active."""
    raw = reader.get(ACTIVE)
    newest, count = _PAIR.unpack(raw) if raw is not None else (0, 0)
    return newest, count


class Preserving:
    """A transaction's rows, changed so that the newest freeze keeps what they were."""

    def __init__(self, kv: Transaction, newest: int) -> None:
        self._kv = kv
        self._prefix = prefix(newest)
        self._kept: set[bytes] = set()

    def put(self, key: bytes, value: bytes) -> None:
        if key[0] in TABLES:
            self._keep(key)
        self._kv.put(key, value)

    def delete(self, key: bytes) -> bool:
        if key[0] in TABLES:
            self._keep(key)
        return self._kv.delete(key)

    def _keep(self, key: bytes) -> None:
        if key in self._kept:
            return
        self._kept.add(key)
        row = self._prefix + key
        if self._kv.get(row) is not None:
            return
        before = self._kv.get(key)
        self._kv.put(row, b"\0" if before is None else b"\1" + before)


def begin(tx: MetadataTransaction, source: int, bucket: int) -> int:
    """Freeze what this transaction has come to; the number. The clone of directory `source` will be in `bucket`."""
    tx.flush()
    newest, count = active(tx)
    newest += 1
    tx.put(ACTIVE, _PAIR.pack(newest, count + 1))
    tx.put(key_u64(b"w", newest), _FREEZE.pack(bucket, source, 0))
    tx.preserve(newest)
    return newest


def _freeze(reader: InodeReader, freeze: int) -> tuple[int, int, int]:
    """(the clone's bucket, the directory that is cloned, how many directories wait)"""
    raw = reader.get(key_u64(b"w", freeze))
    assert raw is not None, f"freeze {freeze} has ended, and a directory waits for it"
    bucket, source, directories = _FREEZE.unpack(raw)
    return bucket, source, directories


def root_of(reader: InodeReader, freeze: int) -> int:
    return _freeze(reader, freeze)[1]


def scan_active(reader: InodeReader) -> list[tuple[int, int]]:
    """(freeze, the directory that is cloned)"""
    rows = reader.scan(*prefix_range(b"w"))
    return [(unpack_u64(key[1:])[0], _FREEZE.unpack(raw)[1]) for key, raw in rows]


def is_active(reader: InodeReader, freeze: int) -> bool:
    return reader.get(key_u64(b"w", freeze)) is not None


def end_if_unused(tx: MetadataTransaction, freeze: int) -> None:
    if _freeze(tx, freeze)[2]:
        return
    tx.delete(key_u64(b"w", freeze))
    newest, count = active(tx)
    tx.put(ACTIVE, _PAIR.pack(newest, count - 1))


def filling_bucket(reader: InodeReader, bucket: int) -> list[int]:
    """The freezes that clones in this bucket are filled from."""
    rows = reader.scan(*prefix_range(b"w"))
    return [unpack_u64(key[1:])[0] for key, raw in rows if _FREEZE.unpack(raw)[0] == bucket]


def directories_waiting(reader: InodeReader) -> int:
    """Those that exist; what lies below them does not yet."""
    return sum(_FREEZE.unpack(raw)[2] for _, raw in reader.scan(*prefix_range(b"w")))


# -- directories that wait ---------------------------------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class Waiting:
    """A directory whose entries up to `cursor` are those of `source` in the frozen state; the others are not there yet."""

    freeze: int
    source: int
    cursor: bytes

    def pack(self) -> bytes:
        return _PAIR.pack(self.freeze, self.source) + self.cursor

    @classmethod
    def unpack(cls, raw: bytes) -> Waiting:
        freeze, source = _PAIR.unpack_from(raw)
        return cls(freeze, source, raw[_PAIR.size :])


def waiting(reader: InodeReader, directory: int) -> Waiting | None:
    raw = reader.get(key_u64(b"k", directory)) if reader.any_frozen else None
    return Waiting.unpack(raw) if raw is not None else None


def scan_waiting(reader: InodeReader, limit: int, after: int = 0) -> list[tuple[int, Waiting]]:
    rows = reader.first_rows(key_u64(b"k", after + 1), b"l", limit)
    return [(unpack_u64(key[1:])[0], Waiting.unpack(raw)) for key, raw in rows]


def wait(tx: MetadataTransaction, directory: int, freeze: int, source: int) -> None:
    tx.put(key_u64(b"k", directory), Waiting(freeze, source, b"").pack())
    _count(tx, freeze, 1)


def advance(tx: MetadataTransaction, directory: int, row: Waiting) -> None:
    tx.put(key_u64(b"k", directory), row.pack())


def stop_waiting(tx: MetadataTransaction, directory: int) -> None:
    """It has all it should have, or is removed."""
    row = waiting(tx, directory)
    if row is not None:
        tx.delete(key_u64(b"k", directory))
        _count(tx, row.freeze, -1)
        end_if_unused(tx, row.freeze)


def _count(tx: MetadataTransaction, freeze: int, delta: int) -> None:
    bucket, source, directories = _freeze(tx, freeze)
    tx.put(key_u64(b"w", freeze), _FREEZE.pack(bucket, source, directories + delta))


def is_taken(reader: InodeReader, directory: int, row: Waiting, entry: bytes) -> bool:
    """Whether the directory has got, and perhaps lost again, this entry of its source."""
    return entry <= row.cursor or longkeys.get(reader, b"y", directory, entry) is not None


def take(tx: MetadataTransaction, directory: int, entry: bytes) -> None:
    """Note an entry that came before its turn."""
    longkeys.put(tx, b"y", directory, entry, b"", tx.new_id)


def take_in_turn(tx: MetadataTransaction, directory: int, entry: bytes) -> bool:
    """Whether it came before its turn; that need not be known any more."""
    return longkeys.delete(tx, b"y", directory, entry)


# -- links -------------------------------------------------------------------------------------------------------------


def link(tx: MetadataTransaction, freeze: int, source: int, number: int) -> None:
    """A file with several names in the frozen tree is this one in the clone."""
    tx.put(key_u64_u64(b"x", freeze, source), pack_u64(number))


def linked(reader: InodeReader, freeze: int, source: int) -> int:
    raw = reader.get(key_u64_u64(b"x", freeze, source))
    return unpack_u64(raw)[0] if raw is not None else 0


# -- what is left ------------------------------------------------------------------------------------------------------


def collect(tx: MetadataTransaction) -> bool:
    """Remove some rows that no active freeze needs; False when there are none."""
    newest, count = active(tx)
    if not newest:
        return False
    if count:
        oldest = tx.first_rows(b"w", b"x", 1)[0][0][1:]
        ranges = [(b"e", b"e" + oldest), (b"x", b"x" + oldest)]
    else:
        ranges = [(table, prefix_end(table)) for table in (b"e", b"x", b"y")]
    for start, stop in ranges:
        rows = tx.first_rows(start, stop, GARBAGE_AT_ONCE)
        for key, _ in rows:
            tx.delete(key)
        if rows:
            return True
    if not count:
        tx.delete(ACTIVE)
    return False
