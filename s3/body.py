"""The request body: framing, length, signatures and checksums, all verified before anything is committed. No I/O.

`feed` turns what came over the wire into payload; `verify` must return before the caller commits.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from typing import TYPE_CHECKING

from stratum import checksums
from stratum.s3 import numerals, signatures
from stratum.s3.chunked import ChunkedDecoder, ChunkSigner
from stratum.s3.errors import S3Error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stratum.s3.auth import Identity
    from stratum.s3.context import Context
    from stratum.s3.request import S3Request

DOCUMENT_BYTES_MAX = 2 * 1024 * 1024
_CHECKSUM_HEADERS = {f"x-amz-checksum-{name.lower()}": name for name in checksums.ALGORITHMS}
_STREAMING = (signatures.STREAMING_SIGNED, signatures.STREAMING_SIGNED_TRAILER, signatures.STREAMING_UNSIGNED_TRAILER)


class Body:
    """One request's payload. `size` is its length when the headers say it.

    `of_object`: the checksum headers are about an object, not about this body.
    """

    def __init__(self, request: S3Request, identity: Identity, *, of_object: bool = False) -> None:
        self._payload = identity.payload
        self._wire_length = _length(request.header("content-length"), "Content-Length")
        self._decoder: ChunkedDecoder | None = None
        self.size: int | None = self._wire_length
        self.checksum_algorithm, self.checksum_value, trailer = (
            ("", "", "") if of_object else _announced_checksum(request)
        )
        self._trailer = trailer
        self._content_md5 = _content_md5(request)
        if self._payload in _STREAMING:
            self._begin_chunks(request, identity)
        elif trailer:
            raise S3Error("InvalidRequest", "x-amz-trailer needs a streaming x-amz-content-sha256")
        elif self._wire_length is None and request.header("transfer-encoding") is None:
            raise S3Error("MissingContentLength", "the request needs a Content-Length or chunks")
        self._sha256 = (
            hashlib.sha256() if self._payload != signatures.UNSIGNED and self._payload not in _STREAMING else None
        )
        self._md5 = hashlib.md5()
        self._checksums = (
            {self.checksum_algorithm: checksums.new(self.checksum_algorithm)} if self.checksum_algorithm else {}
        )
        self._count = 0

    def _begin_chunks(self, request: S3Request, identity: Identity) -> None:
        decoded = _length(request.header("x-amz-decoded-content-length"), "x-amz-decoded-content-length")
        if decoded is None:
            raise S3Error("MissingContentLength", "a streaming body needs x-amz-decoded-content-length")
        self.size = decoded
        signed = self._payload != signatures.STREAMING_UNSIGNED_TRAILER
        signer = ChunkSigner(identity.key, identity.stamp, identity.scope, identity.signature) if signed else None
        expected = [self._trailer] if self._trailer else []
        if self._payload == signatures.STREAMING_SIGNED and expected:
            raise S3Error("InvalidRequest", "x-amz-trailer needs a x-amz-content-sha256 that ends in -TRAILER")
        self._decoder = ChunkedDecoder(
            decoded_bytes=decoded,
            signer=signer,
            signed_trailer=self._payload == signatures.STREAMING_SIGNED_TRAILER,
            trailers_expected=expected,
        )

    def feed(self, data: bytes) -> Sequence[bytes | memoryview]:
        """Payload in order. Raises `S3Error`."""
        pieces = self._decoder.feed(data) if self._decoder is not None else (data,)
        for piece in pieces:
            self._count += len(piece)
            self._md5.update(piece)
            if self._sha256 is not None:
                self._sha256.update(piece)
            for hasher in self._checksums.values():
                hasher.update(piece)
        return pieces

    def verify(self) -> tuple[bytes, dict[str, str]]:
        """The body ended: (MD5, checksums to store). Raises `S3Error` if the payload is not what the headers said."""
        if self._decoder is not None:
            self._decoder.finish()
        if self.size is not None and self._count != self.size:
            raise S3Error("IncompleteBody", f"the body has {self._count} bytes, {self.size} were announced")
        md5 = self._md5.digest()
        if self._content_md5 is not None and self._content_md5 != md5:
            raise S3Error("BadDigest", "the Content-MD5 is not that of the body; send it again")
        if self._sha256 is not None and not hmac.compare_digest(self._sha256.hexdigest(), self._payload):
            raise S3Error("XAmzContentSHA256Mismatch", "x-amz-content-sha256 is not the hash of the body")
        found = {name: checksums.encode(hasher.digest()) for name, hasher in self._checksums.items()}
        wanted = self.checksum_value
        if self._trailer and self._decoder is not None:
            wanted = self._decoder.trailers.get(self._trailer, "")
            if not checksums.is_well_formed(self.checksum_algorithm, wanted):
                raise S3Error("BadDigest", f"Value for {self._trailer} trailing header is invalid.")
        if wanted and wanted != found[self.checksum_algorithm]:
            raise S3Error(
                "BadDigest", f"The {self.checksum_algorithm} you specified did not match the calculated checksum."
            )
        return md5, found

    def add_checksum(self, algorithm: str) -> None:
        """Compute one more than the client sent, because it is to be stored."""
        if algorithm not in self._checksums:
            self._checksums[algorithm] = checksums.new(algorithm)


def read_document(context: Context, bytes_max: int = DOCUMENT_BYTES_MAX, *, of_object: bool = False) -> bytes:
    """The whole of a small body, which the server has read already, verified. `of_object`: see `Body`."""
    if len(context.document) > bytes_max:
        raise S3Error("MaxMessageLengthExceeded", f"the body is longer than {bytes_max} bytes")
    body = Body(context.request, context.identity, of_object=of_object)
    data = b"".join(body.feed(context.document))
    body.verify()
    return data


def _length(text: str | None, name: str) -> int | None:
    if text is None:
        return None
    length = numerals.whole(text)
    if length is None:
        raise S3Error("InvalidArgument", f"{name} is not a length")
    return length


def _content_md5(request: S3Request) -> bytes | None:
    text = request.header("content-md5")
    if text is None:
        return None
    try:
        digest = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise S3Error("InvalidDigest", "the Content-MD5 is not base64") from error
    if len(digest) != 16:
        raise S3Error("InvalidDigest", "the Content-MD5 is not 16 bytes in base64")
    return digest


def _announced_checksum(request: S3Request) -> tuple[str, str, str]:
    """(algorithm, value or "", trailer name or "")."""
    sent = [(name, value) for name in _CHECKSUM_HEADERS if (value := request.header(name)) is not None]
    trailer = (request.header("x-amz-trailer") or "").strip().lower()
    named = request.header("x-amz-sdk-checksum-algorithm") or request.header("x-amz-checksum-algorithm")
    declared = (named or "").upper()
    if len(sent) + bool(trailer) > 1:
        raise S3Error(
            "InvalidRequest", "Expecting a single x-amz-checksum- header. Multiple checksum Types are not allowed."
        )
    if trailer and trailer not in _CHECKSUM_HEADERS:
        raise S3Error("InvalidRequest", f"the trailer {trailer!r} is not a known checksum")
    if declared and declared not in checksums.ALGORITHMS:
        raise S3Error(
            "InvalidRequest", f"checksum algorithm {declared!r} is not one of {', '.join(checksums.ALGORITHMS)}"
        )
    algorithm = _CHECKSUM_HEADERS[trailer] if trailer else _CHECKSUM_HEADERS[sent[0][0]] if sent else ""
    if algorithm and declared and declared != algorithm:
        raise S3Error("InvalidRequest", "x-amz-sdk-checksum-algorithm names another algorithm than the checksum sent")
    value = sent[0][1] if sent else ""
    if sent and not checksums.is_well_formed(algorithm, value):
        raise S3Error("BadDigest", f"Value for {sent[0][0]} header is invalid.")
    return algorithm or declared, value, trailer
