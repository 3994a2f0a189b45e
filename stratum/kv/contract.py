"""What the engine asks of a metadata store: an ordered map of bytes with snapshots and one atomic transaction.

Keys are 1 to 511 bytes and smaller than RESERVED, values up to 1 GiB, order is that of `bytes`. `tests/engine/test_kv_contract.py` is the
conformance suite; every implementation runs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

KEY_BYTES_MAX = 511
RESERVED = b"\xff"
"""Keys from here on are the store's own; no scan shows them."""


class Snapshot(Protocol):
    """One committed state. Valid only inside its `with` block; copy out and leave."""

    @property
    def id(self) -> int:
        """The id of the last transaction this state includes; a transaction's own id while inside one."""

    def get(self, key: bytes, /) -> bytes | None: ...

    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """The present ones of `keys`."""

    def scan(self, start: bytes, stop: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Rows with start <= key < stop, ascending. The map must not change while it runs."""

    def first_rows(self, start: bytes, stop: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        """The first `limit` rows of `scan`, at once: a third of the cost of a row."""

    def last_before(self, start: bytes, stop: bytes) -> tuple[bytes, bytes] | None:
        """The greatest row with start <= key < stop."""


class Transaction(Snapshot, Protocol):
    """A snapshot that can be changed; all or nothing at the end of its `with` block."""

    def put(self, key: bytes, value: bytes) -> None: ...

    def delete(self, key: bytes) -> bool:
        """True if the key was there."""


class Store(Protocol):
    def snapshot(self) -> AbstractContextManager[Snapshot]: ...

    def transact(self) -> AbstractContextManager[Transaction]:
        """Commits durably when the block ends; an exception aborts.

        Raises `NoSpace` when the disk is full (nothing changed) and `StorageFailed` when it refused to sync.
        """

    def last_id(self) -> int:
        """Id of the newest transaction that every snapshot begun from now on includes."""

    def checkpoint(self) -> None:
        """Bring what was committed to where it stays. Never needed for what it says; it gives space back."""

    def used_bytes(self) -> int: ...

    def check_readers(self) -> int:
        """Clear slots of dead readers; how many there were."""

    def copy_to(self, folder: str) -> None:
        """A consistent copy into an empty folder."""

    def close(self) -> None: ...


def prefix_end(prefix: bytes) -> bytes:
    """The smallest key greater than every key that starts with `prefix`."""
    stripped = prefix.rstrip(b"\xff")
    return stripped[:-1] + bytes((stripped[-1] + 1,)) if stripped else b"\xff" * (KEY_BYTES_MAX + 1)
