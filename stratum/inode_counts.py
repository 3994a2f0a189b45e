"""How many inodes a bucket has: for the free and used inodes of statfs(2).

The H row of a bucket counts them in each transaction. One from a version that did not count says how many more there are since then;
the housekeeper counts once what there was before, and from then on the row is as any other.
"""

from __future__ import annotations

import struct
from collections import Counter
from typing import TYPE_CHECKING

from stratum.schema import INODE_STRUCT, key_u64, pack_json, prefix_range, unpack_json, unpack_u64

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stratum.transaction import InodeReader, MetadataTransaction
    from stratum.volume import Volume

_BUCKET = struct.Struct(f">{INODE_STRUCT.size - 16}xQ8x")
"""Of a packed inode: the last number but one."""


def _rows(reader: InodeReader) -> Iterator[tuple[int, dict[str, int]]]:
    for key, raw in reader.scan(*prefix_range(b"H")):
        yield unpack_u64(key[1:])[0], unpack_json(raw)


def _known(row: dict[str, int]) -> int:
    """Its inodes, or at least as many."""
    return int(row["inodes"] if "inodes" in row else max(row["objects"], row.get("since", 0)))


def used(reader: InodeReader, bucket: int | None = None) -> int:
    """Of a bucket; without one of the volume, the root included."""
    if bucket is None:
        return 1 + sum(_known(row) for _, row in _rows(reader))
    raw = reader.get(key_u64(b"H", bucket))
    return _known(unpack_json(raw)) if raw else 1


def count(reader: InodeReader) -> Counter[int]:
    """By bucket, from the inodes themselves."""
    return Counter(_BUCKET.unpack_from(raw)[0] for _, raw in reader.scan(*prefix_range(b"I")))


def complete(volume: Volume) -> None:
    """Count what was there before the buckets' rows began to."""
    with volume.snapshot() as reader:
        if all("inodes" in row for _, row in _rows(reader)):
            return
        counted = count(reader)
        before = {bucket: counted[bucket] - row.get("since", 0) for bucket, row in _rows(reader) if "inodes" not in row}

    def tell(tx: MetadataTransaction) -> None:
        tx.flush()  # what the transaction has counted so far is in the rows then
        for bucket, inodes in before.items():
            raw = tx.get(key_u64(b"H", bucket))
            row = unpack_json(raw) if raw else {}
            if raw and "inodes" not in row:
                row["inodes"] = inodes + row.pop("since", 0)
                tx.put(key_u64(b"H", bucket), pack_json(row))

    volume.mutate(tell, frees=True)
