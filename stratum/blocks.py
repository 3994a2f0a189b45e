"""Bytes are checked in blocks: an extent has the checksum of each, so a range is verified by the blocks it touches."""

from __future__ import annotations

import xxhash

from stratum.errors import DataDamaged

BLOCK_BYTES = 64 * 1024
CHECKSUM_BYTES = 16

checksum = xxhash.xxh3_128_digest
"""XXH3-128 (github.com/Cyan4973/xxHash, doc/xxhash_spec.md), seed 0, big-endian digest of 16 bytes."""


def verified(raw: bytes | None, what: str) -> bytes:
    """The bytes of a row of the metadata store that begins with their checksum. Raises `DataDamaged`, also for no row."""
    if raw is None:
        raise DataDamaged(f"{what} (its row is gone)", "the metadata store")
    data = raw[CHECKSUM_BYTES:]
    if checksum(data) != raw[:CHECKSUM_BYTES]:
        raise DataDamaged(what, "the metadata store")
    return data


def block_checksums(data: bytes | memoryview) -> bytes:
    """The checksum of each block."""
    view = memoryview(data)
    return b"".join(checksum(view[at : at + BLOCK_BYTES]) for at in range(0, len(view), BLOCK_BYTES))


def blocks_match(data: bytes | memoryview, checksums: bytes, start: int) -> bool:
    """Whether bytes of an extent that begin at `start`, in whole blocks, have the checksums the extent has there."""
    view = memoryview(data)
    at = start // BLOCK_BYTES * CHECKSUM_BYTES
    for block in range(0, len(view), BLOCK_BYTES):
        if checksum(view[block : block + BLOCK_BYTES]) != checksums[at : at + CHECKSUM_BYTES]:
            return False
        at += CHECKSUM_BYTES
    return True
