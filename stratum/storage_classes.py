"""S3's storage classes and our tiers: STANDARD is hot, STANDARD_IA warm, GLACIER_IR and GLACIER cold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stratum import cold, evidence
from stratum.cold_admin import ARCHIVES
from stratum.schema import key_u64
from stratum.tier_rows import TIER_OF_CLASS, Tier

if TYPE_CHECKING:
    from stratum.schema import Inode, ObjectMetadata
    from stratum.transaction import InodeReader
    from stratum.volume import Volume

STANDARD = "STANDARD"


def is_known(volume: Volume, reader: InodeReader, name: str) -> bool:
    """Whether an object may be put with the class: it is one of ours and its tier is there."""
    tier = TIER_OF_CLASS.get(name)
    if tier is None:
        return False
    if tier == Tier.WARM:
        return bool(volume.config.volume_ec)
    return tier == Tier.HOT or cold.active(reader) is not None


def of(reader: InodeReader, inode: Inode, metadata: ObjectMetadata | None = None) -> str:
    """The class that says where an object is now. `metadata` is read if it is needed and not given."""
    row = evidence.get(reader, inode.number) if not inode.flags & inode.INLINE and inode.size else None
    if row is None or (row.tier == Tier.HOT and reader.get(key_u64(b"t", inode.number)) is None):
        return STANDARD
    if row.tier == Tier.WARM:
        return "STANDARD_IA"
    if metadata is None:
        from stratum import objects

        metadata = objects.metadata_of(reader, inode)
    if TIER_OF_CLASS.get(metadata.storage_class) == Tier.COLD:
        return metadata.storage_class
    return "GLACIER" if _archived(reader) else "GLACIER_IR"


def _archived(reader: InodeReader) -> bool:
    return any(row.storage_class in ARCHIVES for row in cold.rows(reader).values())
