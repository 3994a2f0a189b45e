"""The bucket rows by what is not their key: by directory and by owner.

The row `gbuckets` is another one after each change of a bucket row, whoever makes it; so whoever has read them all once need not do it again. A
quota of a user asks for them in each transaction, and the audit log at each open(2).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stratum.schema import BucketRow, pack_json, unpack_json

if TYPE_CHECKING:
    from stratum.transaction import InodeReader, MetadataTransaction

KEY = b"gbuckets"
KEPT_MAX = 8


@dataclass(slots=True)
class Inventory:
    """`by_inode` maps a directory to (name, row), `by_owner` a user to names by directory."""

    by_inode: dict[int, tuple[str, BucketRow]] = field(default_factory=dict)
    by_owner: dict[str, dict[int, str]] = field(default_factory=dict)


_kept: dict[bytes, Inventory] = {}


def put(tx: MetadataTransaction, name: str, row: BucketRow) -> None:
    tx.put(b"B" + name.encode(), row.pack())
    changed(tx)


def delete(tx: MetadataTransaction, name: str) -> None:
    tx.delete(b"B" + name.encode())
    changed(tx)


def changed(tx: MetadataTransaction) -> None:
    # Not a count: a transaction that is aborted would give its number to the next one.
    tx.put(KEY, pack_json({"generation": os.urandom(16).hex()}))


def row_of(reader: InodeReader, directory: int) -> BucketRow | None:
    """The bucket whose directory this is."""
    found = of(reader).by_inode.get(directory)
    return None if found is None else found[1]


def of(reader: InodeReader) -> Inventory:
    """Not to be changed by the caller."""
    generation = reader.get(KEY)
    found = _kept.get(generation) if generation is not None else None
    if found is None:
        found = Inventory()
        for key, raw in reader.scan_prefix(b"B"):
            name, row = key[1:].decode(), BucketRow(**unpack_json(raw))
            found.by_inode[row.inode] = name, row
            found.by_owner.setdefault(row.owner, {})[row.inode] = name
        if generation is not None:
            if len(_kept) >= KEPT_MAX:
                _kept.clear()
            _kept[generation] = found
    return found
