"""The checksums S3 clients send: CRC32, CRC32C, CRC64NVME, SHA-1, SHA-256, over whole objects and over parts.

Source: Amazon S3 user guide, "Checking object integrity". Values are base64 of the big-endian digest. FULL_OBJECT over
parts exists for the CRCs, which combine; COMPOSITE is the checksum of the parts' raw digests, shown as `value-N`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import zlib
from typing import TYPE_CHECKING, Any, Protocol

from stratum.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable

ALGORITHMS = ("CRC32", "CRC32C", "CRC64NVME", "SHA1", "SHA256")
FULL_OBJECT_ALGORITHMS = ("CRC32", "CRC32C", "CRC64NVME")
DIGEST_BYTES = {"CRC32": 4, "CRC32C": 4, "CRC64NVME": 8, "SHA1": 20, "SHA256": 32}


class Hasher(Protocol):
    def update(self, data: bytes | memoryview, /) -> None: ...

    def digest(self) -> bytes: ...


class _Crc:
    def __init__(self, function: Callable[[bytes | memoryview, int], int], digest_bytes: int) -> None:
        self._function = function
        self._bytes = digest_bytes
        self._value = 0

    def update(self, data: bytes | memoryview, /) -> None:
        self._value = self._function(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(self._bytes, "big")


def _crt() -> Any:
    from awscrt import checksums  # when it is needed: it takes 45 ms, a fifth of what a command needs to start

    return checksums


def new(algorithm: str) -> Hasher:
    match algorithm:
        case "CRC32":
            return _Crc(zlib.crc32, 4)
        case "CRC32C":
            return _Crc(_crt().crc32c, 4)
        case "CRC64NVME":
            return _Crc(_crt().crc64nvme, 8)
        case "SHA1":
            return hashlib.sha1()
        case "SHA256":
            return hashlib.sha256()
    raise InvalidArgument(f"checksum algorithm {algorithm!r} is not one of {', '.join(ALGORITHMS)}")


def encode(digest: bytes) -> str:
    return base64.b64encode(digest).decode()


def is_well_formed(algorithm: str, value: str) -> bool:
    try:
        return len(base64.b64decode(value, validate=True)) == DIGEST_BYTES[algorithm]
    except (binascii.Error, ValueError):
        return False


def composite(algorithm: str, parts: list[str]) -> str:
    """The checksum of the parts' digests, with the count behind it."""
    hasher = new(algorithm)
    for part in parts:
        hasher.update(base64.b64decode(part))
    return f"{encode(hasher.digest())}-{len(parts)}"


def full_object(algorithm: str, parts: list[tuple[str, int]]) -> str:
    """The CRC of the whole from (value, length) of each part."""
    crt = _crt()
    combine = {"CRC32": crt.combine_crc32, "CRC32C": crt.combine_crc32c, "CRC64NVME": crt.combine_crc64nvme}[algorithm]
    total = 0
    for value, length in parts:
        total = combine(total, int.from_bytes(base64.b64decode(value), "big"), length)
    return encode(total.to_bytes(DIGEST_BYTES[algorithm], "big"))
