"""Quotas of buckets and of users, in bytes and objects.

Invariants
* A quota is checked inside the transaction that would pass it, and there is one writer: it is exact, whoever writes.
* What does not grow is never refused: deletes, and overwrites by less, work above a quota.
* A user's quota is over all buckets that the user owns.

Rows: `gquotas` {"count": rows below}, so that who has none pays one lookup; `u bucket inode` and `v user id`, JSON {bytes, objects}.
The bytes of parts of unfinished uploads count.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from stratum import inventory
from stratum.errors import InvalidArgument, QuotaExceeded
from stratum.schema import key_u64, pack_json, unpack_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from stratum.transaction import InodeReader, MetadataTransaction

UNLIMITED = 1 << 62


@dataclass(slots=True, frozen=True)
class Quota:
    """0 is no limit."""

    bytes: int = 0
    objects: int = 0


def any_set(reader: InodeReader) -> bool:
    return reader.get(b"gquotas") is not None


def of_bucket(reader: InodeReader, bucket: int) -> Quota | None:
    raw = reader.get(key_u64(b"u", bucket))
    return None if raw is None else Quota(**unpack_json(raw))


def of_user(reader: InodeReader, user_id: str) -> Quota | None:
    raw = reader.get(b"v" + user_id.encode())
    return None if raw is None else Quota(**unpack_json(raw))


def set_bucket(tx: MetadataTransaction, bucket: int, quota: Quota | None) -> None:
    """Raises `InvalidArgument`."""
    _put(tx, key_u64(b"u", bucket), quota)


def set_user(tx: MetadataTransaction, user_id: str, quota: Quota | None) -> None:
    """Raises `InvalidArgument`."""
    _put(tx, b"v" + user_id.encode(), quota)


def _put(tx: MetadataTransaction, key: bytes, quota: Quota | None) -> None:
    if quota is not None and (min(quota.bytes, quota.objects) < 0 or quota == Quota()):
        raise InvalidArgument("a quota is a number of bytes, of objects or both, above 0")
    before = tx.get(key) is not None
    if quota is None:
        tx.delete(key)
    else:
        tx.put(key, pack_json(asdict(quota)))
    raw = tx.get(b"gquotas")
    _set_count(tx, (int(unpack_json(raw)["count"]) if raw else 0) + (quota is not None) - before)


def recount(tx: MetadataTransaction) -> None:
    """After rows came in by themselves."""
    _set_count(tx, sum(1 for table in (b"u", b"v") for _ in tx.scan_prefix(table)))


def _set_count(tx: MetadataTransaction, count: int) -> None:
    if count:
        tx.put(b"gquotas", pack_json({"count": count}))
    else:
        tx.delete(b"gquotas")
    inventory.changed(tx)  # a volume from before the inventory has none until something changes


def owned_by(reader: InodeReader, user_id: str) -> dict[int, str]:
    """The buckets of a user: inode and name."""
    return inventory.of(reader).by_owner.get(user_id, {})


def _limits(reader: InodeReader, bucket: int) -> Iterator[tuple[str, Quota, int, int]]:
    """What bounds a bucket: (whose quota, quota, objects used, bytes used)."""
    quota = of_bucket(reader, bucket)
    if quota is not None:
        yield "the bucket", quota, *reader.usage_of(bucket)
    if next(iter(reader.scan_prefix(b"v")), None) is None:
        return
    row = inventory.row_of(reader, bucket)
    quota = of_user(reader, row.owner) if row is not None else None
    if row is not None and quota is not None:
        used = [reader.usage_of(number) for number in owned_by(reader, row.owner)]
        yield "its owner", quota, sum(objects for objects, _ in used), sum(size for _, size in used)


def check(tx: MetadataTransaction, growth: Mapping[int, tuple[int, int]]) -> None:
    """`growth` maps a bucket to the (objects, bytes) a mutation added. Raises `QuotaExceeded`."""
    for bucket, (objects, size) in growth.items():
        if objects <= 0 and size <= 0:
            continue
        for whose, quota, objects_used, bytes_used in _limits(tx, bucket):
            if size > 0 and quota.bytes and bytes_used > quota.bytes:
                raise QuotaExceeded(
                    f"{whose} may hold {quota.bytes} bytes, and this would make it {bytes_used}; delete something, or raise the quota"
                )
            if objects > 0 and quota.objects and objects_used > quota.objects:
                raise QuotaExceeded(
                    f"{whose} may hold {quota.objects} objects, and this would make it {objects_used}; delete something, or raise the quota"
                )


def room(reader: InodeReader, bucket: int) -> tuple[int, int]:
    """How many (objects, bytes) a bucket may still grow by; `UNLIMITED` without a quota."""
    objects_left = bytes_left = UNLIMITED
    if any_set(reader):
        for _, quota, objects_used, bytes_used in _limits(reader, bucket):
            objects_left = min(objects_left, quota.objects - objects_used if quota.objects else UNLIMITED)
            bytes_left = min(bytes_left, quota.bytes - bytes_used if quota.bytes else UNLIMITED)
    return max(0, objects_left), max(0, bytes_left)


@dataclass(slots=True, frozen=True)
class Limited:
    """A quota and what is used of it. `kind` is bucket or user."""

    kind: str
    name: str
    quota: Quota
    objects: int
    bytes: int


def everything(reader: InodeReader) -> Iterator[Limited]:
    if not any_set(reader):
        return
    names = {inode: name for inode, (name, _) in inventory.of(reader).by_inode.items()}
    for key, raw in reader.scan_prefix(b"u"):
        bucket = int.from_bytes(key[1:], "big")
        if bucket in names:
            yield Limited("bucket", names[bucket], Quota(**unpack_json(raw)), *reader.usage_of(bucket))
    for key, raw in reader.scan_prefix(b"v"):
        user = reader.get(b"R" + key[1:])
        if user is not None:
            used = [reader.usage_of(number) for number in owned_by(reader, key[1:].decode())]
            yield Limited(
                "user", str(unpack_json(user)["name"]), Quota(**unpack_json(raw)),
                sum(objects for objects, _ in used), sum(size for _, size in used),
            )  # fmt: skip


def near(reader: InodeReader, share: float) -> Iterator[tuple[str, str]]:
    """Quotas of which more than `share` is used: (whose, how much)."""
    for item in everything(reader):
        for what, used, allowed in (
            ("bytes", item.bytes, item.quota.bytes),
            ("objects", item.objects, item.quota.objects),
        ):
            if allowed and used >= allowed * share:
                yield f"{item.kind} {item.name}", f"{used} of {allowed} {what} are used"
                break
