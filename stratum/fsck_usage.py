"""What a check looks at in counts that nothing depends on but what is shown: allocated bytes of files, inodes of buckets."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from stratum import buckets, fsck_repairs
from stratum.blocks import CHECKSUM_BYTES
from stratum.schema import Inode, Kind, Slice, key_u64, prefix_range, split_u64_u64, unpack_json, unpack_u64

if TYPE_CHECKING:
    from collections.abc import Callable

    from stratum.schema import BucketRow
    from stratum.transaction import InodeReader

    Found = Callable[[str, str, str, fsck_repairs.Repair | None], None]


def check(reader: InodeReader, inodes: dict[int, Inode], rows: dict[str, BucketRow], found: Found) -> None:
    """Rows of versions that did not count are no fault."""
    allocated: Counter[int] = Counter()
    for key, raw in reader.scan(*prefix_range(b"S")):
        allocated[split_u64_u64(key)[0]] += Slice.unpack(0, raw).length
    for key, raw in reader.scan(*prefix_range(b"N")):
        allocated[unpack_u64(key[1:])[0]] += len(raw) - CHECKSUM_BYTES
    for number, inode in inodes.items():
        if inode.kind == Kind.FILE and inode.allocated not in {None, allocated[number]}:
            what = f"says it has {inode.allocated} bytes allocated, counted {allocated[number]}"
            found("allocated-count", f"inode {number:#x}", what, fsck_repairs.set_allocated(number, allocated[number]))
    counted = Counter(inode.bucket for inode in inodes.values())
    for name, row in rows.items():
        usage = unpack_json(reader.get(key_u64(b"H", row.inode)) or b"{}")
        if usage.get("inodes", counted[row.inode]) != counted[row.inode]:
            what = f"says it has {usage['inodes']} inodes, counted {counted[row.inode]}"
            objects, size = buckets.usage(reader, row)
            found("inode-count", name, what, fsck_repairs.set_usage(row.inode, objects, size, counted[row.inode]))
