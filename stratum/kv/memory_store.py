"""The contract in memory, for tests: a sorted map copied on every transaction."""

from __future__ import annotations

import threading
from bisect import bisect_left
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING

from stratum.errors import StratumError
from stratum.kv.contract import KEY_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class MemorySnapshot:
    def __init__(self, identity: int, rows: dict[bytes, bytes], order: list[bytes]) -> None:
        self.id = identity
        self.rows = rows
        self.order = order

    def get(self, key: bytes) -> bytes | None:
        return self.rows.get(key)

    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        return {key: self.rows[key] for key in keys if key in self.rows}

    def scan(self, start: bytes, stop: bytes) -> Iterator[tuple[bytes, bytes]]:
        for key in self.order[bisect_left(self.order, start) : bisect_left(self.order, stop)]:
            yield key, self.rows[key]

    def first_rows(self, start: bytes, stop: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        return list(islice(self.scan(start, stop), limit))

    def last_before(self, start: bytes, stop: bytes) -> tuple[bytes, bytes] | None:
        at = bisect_left(self.order, stop) - 1
        if at < 0 or self.order[at] < start:
            return None
        return self.order[at], self.rows[self.order[at]]


class MemoryTransaction(MemorySnapshot):
    def put(self, key: bytes, value: bytes) -> None:
        if not 1 <= len(key) <= KEY_BYTES_MAX:
            raise StratumError(f"a key of {len(key)} bytes; 1 to {KEY_BYTES_MAX} are allowed")
        if key not in self.rows:
            self.order.insert(bisect_left(self.order, key), key)
        self.rows[key] = bytes(value)

    def delete(self, key: bytes) -> bool:
        if self.rows.pop(key, None) is None:
            return False
        del self.order[bisect_left(self.order, key)]
        return True


class MemoryStore:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._current = MemorySnapshot(0, {}, [])

    @contextmanager
    def snapshot(self) -> Iterator[MemorySnapshot]:
        yield self._current

    @contextmanager
    def transact(self) -> Iterator[MemoryTransaction]:
        with self._lock:
            base = self._current
            transaction = MemoryTransaction(base.id + 1, dict(base.rows), list(base.order))
            yield transaction
            self._current = MemorySnapshot(transaction.id, transaction.rows, transaction.order)

    def last_id(self) -> int:
        return self._current.id

    def checkpoint(self) -> None:
        """There is nothing to bring anywhere."""

    def used_bytes(self) -> int:
        return sum(len(k) + len(v) for k, v in self._current.rows.items())

    def check_readers(self) -> int:
        return 0

    def copy_to(self, folder: str) -> None:
        raise StratumError(f"a memory store cannot be copied to {folder}: use LMDB")

    def close(self) -> None:
        self._current = MemorySnapshot(0, {}, [])
