"""A small map that processes of one machine share and that does not outlive its boot: LMDB without a sync.

A process that is killed leaves it whole; a machine that loses power may not, so each boot has a file of its own.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lmdb

from stratum.kv.contract import prefix_end

if TYPE_CHECKING:
    from collections.abc import Iterator

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
MAP_BYTES = 64 << 20


class Full(Exception):
    """There is no room for another row."""


class VolatileMap:
    def __init__(self, folder: Path, name: str) -> None:
        """Raises `OSError`."""
        path = folder / f"{name}-{BOOT_ID.read_text().strip()}"
        for old in folder.glob(f"{name}-*"):
            if not old.name.startswith(path.name):
                with suppress(FileNotFoundError):
                    old.unlink()
        self._environment = lmdb.open(
            str(path), subdir=False, map_size=MAP_BYTES, sync=False, metasync=False, mode=0o600, max_spare_txns=1
        )

    @contextmanager
    def transact(self) -> Iterator[Rows]:
        """One process at a time; all or nothing. Raises `Full`."""
        try:
            with self._environment.begin(write=True) as transaction:
                yield Rows(transaction)
        except lmdb.MapFullError:
            raise Full from None

    def close(self) -> None:
        self._environment.close()


class Rows:
    """Of one transaction."""

    def __init__(self, transaction: Any) -> None:
        self._transaction = transaction

    def put(self, key: bytes, value: bytes) -> None:
        self._transaction.put(key, value)

    def delete(self, key: bytes) -> None:
        self._transaction.delete(key)

    def scan(self, prefix: bytes) -> list[tuple[bytes, bytes]]:
        stop = prefix_end(prefix)
        found: list[tuple[bytes, bytes]] = []
        with self._transaction.cursor() as cursor:
            if cursor.set_range(prefix):
                for key, value in cursor:
                    if key >= stop:
                        break
                    found.append((key, value))
        return found
