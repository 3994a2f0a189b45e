"""Shards of a pack: Reed-Solomon coding and the format of a shard file. Pure: no disks, no volume.

The code is systematic (zfec, a port of L. Rizzo's "Effective Erasure Codes for Reliable Computer Communication Protocols", 1997):
the k data shards are the pack cut in k runs of `shard_bytes`, zero-filled at the end, and a healthy range read touches only the
runs it needs. The code works byte by byte across the shards, so any column range can be encoded or decoded alone.

A shard file:

    offset  size
    0       8    magic "STRSHARD"
    8       2    version, 1
    10      1    k
    11      1    m
    12      1    index: below k a data shard
    13      3    zero
    16      8    pack
    24      8    bytes of the pack
    32      8    bytes of the shard's data
    40      4    bytes of the checksum table
    44      4    bytes of the member table
    48      16   XXH3-128 of bytes 0 to 48, the checksum table and the member table
    64           checksum table: XXH3-128 of each BLOCK_BYTES of data
                 member table: extent, offset in the pack, length; 8 bytes each
                 zeros up to a multiple of 4096, then the data
Integers are big-endian.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import zfec

from stratum.blocks import CHECKSUM_BYTES, blocks_match, checksum

if TYPE_CHECKING:
    from collections.abc import Sequence

MAGIC = b"STRSHARD"
VERSION = 1
PAGE_BYTES = 4096
SHARDS_MAX = 64
_HEAD = struct.Struct(">8sHBBB3xQQQII")
_MEMBER = struct.Struct(">QQQ")
FIXED_BYTES = _HEAD.size + CHECKSUM_BYTES


class ShardInvalid(Exception):
    """These bytes are not the shard that was expected; the text says why."""


@functools.lru_cache(32)
def _encoder(k: int, n: int) -> zfec.Encoder:
    return zfec.Encoder(k, n)


@functools.lru_cache(32)
def _decoder(k: int, n: int) -> zfec.Decoder:
    return zfec.Decoder(k, n)


def shard_bytes(length: int, k: int) -> int:
    """The length of a shard's data, in whole pages so that its blocks stay aligned."""
    return max(-(-length // k // PAGE_BYTES) * PAGE_BYTES, PAGE_BYTES)


def parse_code(text: str) -> tuple[int, int]:
    """`K+M`. Raises `ValueError`."""
    k, plus, m = text.partition("+")
    if (
        not plus
        or not k.isdigit()
        or not m.isdigit()
        or not int(k) >= 1
        or not int(m) >= 1
        or int(k) + int(m) > SHARDS_MAX
    ):
        raise ValueError(f"{text!r} is not K+M with K and M at least 1 and at most {SHARDS_MAX} together")
    return int(k), int(m)


def split(data: bytes | bytearray | memoryview, k: int) -> list[bytes | memoryview]:
    """The k data shards of a pack."""
    view = memoryview(data)
    size = shard_bytes(len(view), k)
    shards: list[bytes | memoryview] = []
    for at in range(0, k * size, size):
        piece = view[at : at + size]
        shards.append(piece if len(piece) == size else bytes(piece).ljust(size, b"\0"))
    return shards


def parity(shards: Sequence[bytes | memoryview], m: int) -> list[bytes]:
    """The m parity columns of k equally long data columns."""
    k = len(shards)
    found: list[bytes] = _encoder(k, k + m).encode(shards, tuple(range(k, k + m)))
    return found


def reconstruct(columns: dict[int, bytes | memoryview], k: int, m: int, wanted: Sequence[int]) -> list[bytes]:
    """Columns `wanted` from any k columns by index, all equally long."""
    assert len(columns) >= k, "not enough shards"
    chosen = dict(sorted(columns.items())[:k])
    data: list[bytes] = _decoder(k, k + m).decode(list(chosen.values()), list(chosen))
    missing = tuple(index for index in wanted if index >= k)
    coded = dict(zip(missing, _encoder(k, k + m).encode(data, missing), strict=True)) if missing else {}
    return [bytes(data[index]) if index < k else coded[index] for index in wanted]


@dataclass(slots=True, frozen=True)
class ShardHead:
    """What a shard file says of itself."""

    k: int
    m: int
    index: int
    pack: int
    length: int
    shard_bytes: int
    checksums: bytes
    members: tuple[tuple[int, int, int], ...]

    def encode(self) -> bytes:
        members = b"".join(_MEMBER.pack(*member) for member in self.members)
        fixed = _HEAD.pack(
            MAGIC,
            VERSION,
            self.k,
            self.m,
            self.index,
            self.pack,
            self.length,
            self.shard_bytes,
            len(self.checksums),
            len(members),
        )
        tables = self.checksums + members
        raw = fixed + checksum(fixed + tables) + tables
        return raw.ljust(-(-len(raw) // PAGE_BYTES) * PAGE_BYTES, b"\0")

    @property
    def data_offset(self) -> int:
        size = FIXED_BYTES + len(self.checksums) + _MEMBER.size * len(self.members)
        return -(-size // PAGE_BYTES) * PAGE_BYTES

    def expect(self, pack: int, index: int, k: int, m: int) -> None:
        """Raises `ShardInvalid` if this is another shard."""
        if (self.pack, self.index, self.k, self.m) != (pack, index, k, m):
            raise ShardInvalid(
                f"it is shard {self.index} of {self.k}+{self.m} of pack {self.pack:#x}, not shard {index} of {k}+{m} of pack {pack:#x}"
            )

    def verify(self, column: bytes | memoryview, start: int) -> bool:
        """Whether the column that begins at `start`, in whole blocks, has the checksums it should."""
        return blocks_match(column, self.checksums, start)


def table_bytes(raw: bytes) -> int:
    """How long the head is whose first FIXED_BYTES these are. Raises `ShardInvalid`."""
    if len(raw) < FIXED_BYTES or raw[:8] != MAGIC:
        raise ShardInvalid("it does not begin like a shard")
    fields = _HEAD.unpack_from(raw)
    if fields[1] != VERSION:
        raise ShardInvalid(f"it has format {fields[1]}")
    return FIXED_BYTES + int(fields[8]) + int(fields[9])


def parse_head(raw: bytes) -> ShardHead:
    """The head from at least its `table_bytes`. Raises `ShardInvalid`."""
    size = table_bytes(raw)
    _, _, k, m, index, pack, length, column_bytes, checksums_size, members_size = _HEAD.unpack_from(raw)
    if len(raw) < size or members_size % _MEMBER.size:
        raise ShardInvalid("its tables are cut off")
    tables = raw[FIXED_BYTES:size]
    if checksum(raw[: _HEAD.size] + tables) != raw[_HEAD.size : FIXED_BYTES]:
        raise ShardInvalid("its head does not match its checksum")
    members = tuple(_MEMBER.iter_unpack(tables[checksums_size : checksums_size + members_size]))
    return ShardHead(k, m, index, pack, length, column_bytes, tables[:checksums_size], members)
