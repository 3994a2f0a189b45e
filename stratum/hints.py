"""What users say about where a file should lie: priority and pin, on a file or inherited.

    x-amz-meta-stratum-priority: hot | warm | cold | auto        the same as user.s3.meta.stratum-priority
    x-amz-meta-stratum-pin-until: 2027-01-31 or 2027-01-31T12:00:00Z: until then the priority holds; without it, for ever
    user.stratum.priority, user.stratum.pin-until                the same as attributes of a file, a directory or a bucket

What stands on the file wins over its directory, that over the directory above, up to the bucket.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stratum import evidence, iso_dates
from stratum.errors import Gone, InvalidArgument
from stratum.schema import ROOT_INODE, key_u64, pack_u64
from stratum.tier_rows import TIER_OF_CLASS, MoveRow, Tier

if TYPE_CHECKING:
    from stratum.schema import Inode, ObjectMetadata
    from stratum.transaction import InodeReader, MetadataTransaction

PRIORITY, PIN_UNTIL = "stratum-priority", "stratum-pin-until"
ATTRIBUTE_PRIORITY, ATTRIBUTE_PIN_UNTIL = b"user.stratum.priority", b"user.stratum.pin-until"
ATTRIBUTES = frozenset((ATTRIBUTE_PRIORITY, ATTRIBUTE_PIN_UNTIL))
TIERS = {"hot": Tier.HOT, "warm": Tier.WARM, "cold": Tier.COLD}
DEPTH_MAX = 4096


@dataclass(slots=True, frozen=True)
class Hint:
    """`tier` is None without a priority in force. `source` names what it stands on."""

    tier: Tier | None
    source: str = ""
    until_s: float | None = None


NO_HINT = Hint(None)


def check(name: str, value: str) -> None:
    """Raises `InvalidArgument` for a value that means nothing."""
    if name == PRIORITY and value not in {*TIERS, "auto"}:
        raise InvalidArgument(f"{PRIORITY} is hot, warm, cold or auto, not {value!r}")
    if name == PIN_UNTIL:
        _moment(value)


def check_metadata(user: dict[str, str]) -> None:
    """Raises `InvalidArgument` if user metadata has a hint that means nothing."""
    for name in (PRIORITY, PIN_UNTIL):
        if name in user:
            check(name, user[name])


def _moment(text: str) -> float:
    seconds = iso_dates.seconds(text)
    if seconds is None:
        raise InvalidArgument(f"{PIN_UNTIL} is a date like 2027-01-31 or 2027-01-31T12:00:00Z, not {text!r}")
    return seconds


def _hint(priority: str | None, until: str | None, source: str, now_s: float) -> Hint | None:
    """None if nothing is said here, so that what is above counts."""
    if priority is None:
        return None
    try:
        until_s = _moment(until) if until is not None else None
    except InvalidArgument:
        until_s = 0.0
    if until_s is not None and until_s <= now_s:
        return None
    return Hint(TIERS.get(priority), source, until_s)


def _attribute(reader: InodeReader, inode: int, name: bytes) -> str | None:
    raw = reader.get(key_u64(b"Y", inode) + name)
    return None if raw is None else raw.decode("latin-1")


def of(reader: InodeReader, inode: Inode, metadata: ObjectMetadata, now_s: float | None = None) -> Hint:
    """The hint in force for a file."""
    now_s = time.time() if now_s is None else now_s
    said = _hint(metadata.user.get(PRIORITY), metadata.user.get(PIN_UNTIL), "object metadata", now_s)
    number, where = inode.number, "file"
    for _ in range(DEPTH_MAX):
        if said is not None:
            return said
        said = _hint(
            _attribute(reader, number, ATTRIBUTE_PRIORITY),
            _attribute(reader, number, ATTRIBUTE_PIN_UNTIL),
            where,
            now_s,
        )
        if said is None:
            try:
                number = reader.inode(number).parent
            except Gone:
                return NO_HINT
            if number in {0, ROOT_INODE}:
                return NO_HINT
            where = f"directory {number:#x}"
    return said or NO_HINT


def changed(tx: MetadataTransaction, inode: Inode) -> None:
    """A hint of this file or directory changed: it is looked at soon."""
    ask(tx, inode.number, MoveRow(0, "hint", tx.now_ns))


def metadata_set(tx: MetadataTransaction, inode: Inode, metadata: ObjectMetadata) -> None:
    """An object got metadata: if they say where it should lie, it is brought there soon."""
    if PRIORITY in metadata.user:
        changed(tx, inode)
    elif metadata.storage_class and metadata.storage_class != "STANDARD":
        ask(
            tx,
            inode.number,
            MoveRow(TIER_OF_CLASS[metadata.storage_class], f"storage class {metadata.storage_class}", tx.now_ns),
        )


def bring_back(tx: MetadataTransaction, inode: Inode, storage_class: str) -> None:
    """A copy shares the bytes of its source wherever they lie; one of class STANDARD shall be hot."""
    row = evidence.get(tx, inode.number)
    if row is not None and row.tier != Tier.HOT and storage_class in {"", "STANDARD"}:
        ask(tx, inode.number, MoveRow(Tier.HOT, "copy of class STANDARD", tx.now_ns))


def ask(tx: MetadataTransaction, inode: int, row: MoveRow) -> None:
    """Ask the mover to look at a file (tier 0) or to bring it somewhere."""
    tx.put(b"m" + pack_u64(inode), row.encode())
