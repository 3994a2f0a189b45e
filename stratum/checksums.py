"""The checksums S3 clients send, over whole objects and over parts.

Source: Amazon S3 user guide, "Checking object integrity". Values are base64 of the big-endian digest. FULL_OBJECT over
parts exists for the CRCs, which combine; COMPOSITE is the checksum of the parts' raw digests, shown as `value-N`. What
comes without a checksum gets a CRC64NVME.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import zlib
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import xxhash

from stratum.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable

DIGEST_BYTES = {
    "CRC32": 4, "CRC32C": 4, "CRC64NVME": 8, "SHA1": 20, "SHA256": 32, "SHA512": 64, "MD5": 16, "XXHASH64": 8,
    "XXHASH3": 8, "XXHASH128": 16,
}  # fmt: skip
ALGORITHMS = tuple(DIGEST_BYTES)
FULL_OBJECT_ALGORITHMS = ("CRC32", "CRC32C", "CRC64NVME")
COMPOSITE_ALGORITHMS = tuple(name for name in ALGORITHMS if name != "CRC64NVME")
DEFAULT = "CRC64NVME"
"""The one that is computed when the client names none."""


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


@cache
def _crt() -> Any:
    from awscrt import checksums  # when it is needed: it takes 45 ms, a fifth of what a command needs to start

    return checksums


def new(algorithm: str) -> Hasher:
    match algorithm:
        case "CRC64NVME":
            return _Crc(_crt().crc64nvme, 8)
        case "CRC32":
            return _Crc(zlib.crc32, 4)
        case "CRC32C":
            return _Crc(_crt().crc32c, 4)
        case "SHA1":
            return hashlib.sha1()
        case "SHA256":
            return hashlib.sha256()
        case "SHA512":
            return hashlib.sha512()
        case "MD5":
            return hashlib.md5()
        case "XXHASH64":
            return xxhash.xxh64()
        case "XXHASH3":
            return xxhash.xxh3_64()
        case "XXHASH128":
            return xxhash.xxh3_128()
    raise InvalidArgument(f"checksum algorithm {algorithm!r} is not one of {', '.join(ALGORITHMS)}")


def encode(digest: bytes) -> str:
    return base64.b64encode(digest).decode()


def is_well_formed(algorithm: str, value: str) -> bool:
    try:
        return len(base64.b64decode(value, validate=True)) == DIGEST_BYTES[algorithm]
    except (binascii.Error, ValueError):
        return False


def default_type(algorithm: str) -> str:
    """How the parts of an upload make its checksum when the client does not say."""
    return "COMPOSITE" if algorithm in COMPOSITE_ALGORITHMS else "FULL_OBJECT"


def matches(sent: str, wanted: str) -> bool:
    """Whether a client's checksum is the object's. S3 takes a composite one with and without the count of its parts."""
    return sent in {wanted, wanted.partition("-")[0]}


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
