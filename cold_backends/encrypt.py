"""Encryption before anything leaves: AES-256-GCM over chunks, so that ranges can be read.

Each object has a random salt; its key is HKDF-SHA256(master key, salt), so the nonce of a chunk is just its number (12 bytes,
big-endian). A chunk's additional data are the object's key, the plain length where it is known at once, and the chunk's
number: chunks cannot be swapped, moved to another object or dropped from the end. Salt and key id travel in the metadata.
An object of n bytes becomes n + 16 x chunks (NIST SP 800-38D for GCM, RFC 5869 for HKDF).
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from stratum.cold_backends.contract import PART_BYTES, ObjectInfo, RemoteBody, RemoteDamaged, RemoteRefused
from stratum.cold_backends.decorator import Decorator

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from stratum.cold_backends.contract import Backend

CHUNK_BYTES = 64 * 1024
TAG_BYTES = 16
SEALED_BYTES = CHUNK_BYTES + TAG_BYTES
SALT, KEY_ID = "stratum-salt", "stratum-key-id"
assert PART_BYTES % CHUNK_BYTES == 0, "a part is whole chunks"


def key_id(master: bytes) -> str:
    """Names a key without giving it away."""
    return hashlib.sha256(b"stratum key id" + master).hexdigest()[:16]


def plain_size(size: int) -> int:
    """0 for what is too short to have been sealed."""
    return max(size - TAG_BYTES * -(-size // SEALED_BYTES), 0)


class Encrypting(Decorator):
    """`master` is 32 bytes."""

    def __init__(self, inner: Backend, master: bytes) -> None:
        super().__init__(inner)
        if len(master) != 32:
            raise RemoteRefused(f"the encryption key has {len(master)} bytes; 32 are wanted")
        self._master = master
        self._id = key_id(master)

    def _cipher(self, salt: bytes) -> AESGCM:
        return AESGCM(HKDF(hashes.SHA256(), 32, salt, b"stratum cold object").derive(self._master))

    @staticmethod
    def _seal(cipher: AESGCM, key: str, data: bytes | memoryview, first: int, *, last: bool) -> bytes:
        view = memoryview(data)
        sealed = []
        for at in range(0, len(view), CHUNK_BYTES):
            number = first + at // CHUNK_BYTES
            end = last and at + CHUNK_BYTES >= len(view)
            sealed.append(
                cipher.encrypt(number.to_bytes(12, "big"), bytes(view[at : at + CHUNK_BYTES]), _bound(key, end=end))
            )
        return b"".join(sealed)

    def _metadata(self, metadata: Mapping[str, str], salt: bytes) -> dict[str, str]:
        return {**metadata, SALT: salt.hex(), KEY_ID: self._id}

    def put(
        self, key: str, data: bytes | memoryview, metadata: Mapping[str, str], *, storage_class: str = "", sha256: bytes = b"",
        if_absent: bool = False,
    ) -> str:  # fmt: skip
        if sha256 and hashlib.sha256(data).digest() != sha256:
            raise RemoteDamaged(f"{key}: the bytes do not have the checksum that came with them")
        salt = os.urandom(32)
        sealed = self._seal(self._cipher(salt), key, data, 0, last=True)
        return super().put(
            key, sealed, self._metadata(metadata, salt), storage_class=storage_class,
            sha256=hashlib.sha256(sealed).digest() if sha256 else b"", if_absent=if_absent,
        )  # fmt: skip

    def _open(self, info: ObjectInfo) -> tuple[AESGCM, ObjectInfo]:
        metadata = dict(info.metadata)
        salt, owner = metadata.pop(SALT, None), metadata.pop(KEY_ID, "")
        if salt is None:
            raise RemoteRefused(f"{info.key} is not encrypted, and this remote should hold nothing else")
        if owner != self._id:
            raise RemoteRefused(
                f"{info.key} was encrypted with key {owner}, and {self._id} is here; give the right key file"
            )
        plain = replace(info, size=plain_size(info.size), metadata=metadata, sha256=b"")
        try:
            return self._cipher(bytes.fromhex(salt)), plain
        except ValueError:
            raise RemoteDamaged(f"{info.key}: the salt in its metadata is not one") from None

    def get(self, key: str, start: int = 0, stop: int | None = None) -> RemoteBody:
        first = start // CHUNK_BYTES
        end = None if stop is None else -(-stop // CHUNK_BYTES) * SEALED_BYTES
        body = super().get(key, first * SEALED_BYTES, end)
        cipher, info = self._open(body.info)
        last = info.size if stop is None else min(stop, info.size)
        return RemoteBody(info, self._opened(cipher, info, body.pieces, start, last))

    def _opened(
        self, cipher: AESGCM, info: ObjectInfo, pieces: Iterator[bytes], start: int, stop: int
    ) -> Iterator[bytes]:
        number = start // CHUNK_BYTES
        held = bytearray()
        final = (info.size - 1) // CHUNK_BYTES

        def opened(sealed: bytes) -> bytes:
            # The last part of an upload that has the length of the others could not know that it was the last.
            ends = [number == final] + ([False] if number == final and info.size % PART_BYTES == 0 else [])
            for end in ends:
                try:
                    plain = cipher.decrypt(number.to_bytes(12, "big"), sealed, _bound(info.key, end=end))
                    break
                except InvalidTag:
                    continue
            else:
                raise RemoteDamaged(f"{info.key}: chunk {number} is not what was encrypted")
            at = number * CHUNK_BYTES
            return plain[max(start - at, 0) : stop - at]

        for piece in pieces:
            held += piece
            while len(held) >= SEALED_BYTES:
                yield opened(bytes(held[:SEALED_BYTES]))
                del held[:SEALED_BYTES]
                number += 1
        if held:
            yield opened(bytes(held))

    def head(self, key: str) -> ObjectInfo:
        return self._open(super().head(key))[1]

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        for info in super().list(prefix):
            yield replace(info, size=plain_size(info.size))

    # The salt is part of the upload's id, so that an upload can go on after a restart.

    def create_upload(self, key: str, metadata: Mapping[str, str], *, storage_class: str = "") -> str:
        salt = os.urandom(32)
        return f"{salt.hex()}.{super().create_upload(key, self._metadata(metadata, salt), storage_class=storage_class)}"

    @staticmethod
    def _inner(upload_id: str) -> tuple[bytes, str]:
        salt, _, inner = upload_id.partition(".")
        return bytes.fromhex(salt), inner

    def upload_part(self, key: str, upload_id: str, number: int, data: bytes | memoryview) -> None:
        """A part shorter than PART_BYTES is the last; one that is just as long may be, and seals its end as one that is not."""
        salt, inner = self._inner(upload_id)
        first = (number - 1) * (PART_BYTES // CHUNK_BYTES)
        sealed = self._seal(self._cipher(salt), key, data, first, last=len(data) < PART_BYTES)
        super().upload_part(key, inner, number, sealed)

    def list_parts(self, key: str, upload_id: str) -> dict[int, int]:
        return {number: plain_size(size) for number, size in super().list_parts(key, self._inner(upload_id)[1]).items()}

    def complete_upload(self, key: str, upload_id: str, count: int) -> str:
        return super().complete_upload(key, self._inner(upload_id)[1], count)

    def abort_upload(self, key: str, upload_id: str) -> None:
        super().abort_upload(key, self._inner(upload_id)[1])


def _bound(key: str, *, end: bool) -> bytes:
    return key.encode() + (b"\0end" if end else b"\0more")
