"""The aws-chunked body as an event machine without I/O: bytes in, payload out.

Source: Amazon S3 API reference, "Signature calculations: transferring payload in multiple chunks", with and without trailers.

    chunk   = hex-size [";chunk-signature=" 64HEX] CRLF data CRLF
    body    = *chunk last-chunk(size 0) trailers CRLF

`feed` returns the payload bytes a piece of input completed. Data of a signed chunk is handed out before its signature is
known to be right: nobody may commit anything before `finish` returned.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING

from stratum.s3 import signatures
from stratum.s3.errors import S3Error

if TYPE_CHECKING:
    from collections.abc import Callable

_LINE_BYTES_MAX = 8192
_TRAILERS_MAX = 16
_CHUNK_BYTES_MIN = 8192


class ChunkSigner:
    """Verifies the chain of chunk signatures that starts with the request's own."""

    def __init__(self, key: bytes, stamp: str, scope: str, seed: str) -> None:
        self._key = key
        self._stamp = stamp
        self._scope = scope
        self._previous = seed

    def check_chunk(self, claimed: str, sha256: str) -> None:
        self._check(claimed, signatures.chunk_string_to_sign(self._stamp, self._scope, self._previous, sha256))

    def check_trailer(self, claimed: str, trailer: bytes) -> None:
        self._check(
            claimed,
            signatures.trailer_string_to_sign(
                self._stamp, self._scope, self._previous, hashlib.sha256(trailer).hexdigest()
            ),
        )

    def _check(self, claimed: str, text: str) -> None:
        wanted = signatures.signature(self._key, text)
        if not hmac.compare_digest(wanted.encode(), claimed.encode()):
            raise S3Error("SignatureDoesNotMatch", "a chunk's signature does not match")
        self._previous = wanted


class ChunkedDecoder:
    """`signer` is None for unsigned chunks; `trailers_expected` are the lower-case names x-amz-trailer announced."""

    def __init__(
        self, *, decoded_bytes: int, signer: ChunkSigner | None, signed_trailer: bool, trailers_expected: list[str]
    ) -> None:
        self._decoded_bytes = decoded_bytes
        self._signer = signer
        self._signed_trailer = signed_trailer
        self._expected = trailers_expected
        self._input = b""
        self._at = 0  # everything of _input before it is consumed: no byte is moved twice
        self._state: Callable[[list[memoryview | bytes]], bool] = self._size_line
        self._remaining = 0
        self._total = 0
        self._short_chunk = False
        self._signature = ""
        self._sha256 = hashlib.sha256()
        self._trailer_lines: list[bytes] = []
        self._done = False
        self.trailers: dict[str, str] = {}

    def feed(self, data: bytes) -> list[memoryview | bytes]:
        """Payload pieces. Raises `S3Error` for anything malformed."""
        if self._done and data:
            raise S3Error("IncompleteBody", "there are bytes behind the last chunk")
        self._input = self._input[self._at :] + data if self._at < len(self._input) else data
        self._at = 0
        out: list[memoryview | bytes] = []
        while self._state(out):
            pass
        return out

    def finish(self) -> None:
        """The body ended. Raises `S3Error` if it should not have."""
        if not self._done:
            raise S3Error("IncompleteBody", "the body ended before its last chunk; send it again")
        if self._total != self._decoded_bytes:
            raise S3Error(
                "IncompleteBody",
                f"x-amz-decoded-content-length says {self._decoded_bytes} bytes, the chunks hold {self._total}",
            )
        missing = [name for name in self._expected if name not in self.trailers]
        if missing:
            raise S3Error("MalformedTrailerError", f"the announced trailer {missing[0]} is missing")

    def _line(self) -> bytes | None:
        end = self._input.find(b"\r\n", self._at)
        if end < 0:
            if len(self._input) - self._at > _LINE_BYTES_MAX + 1:  # with the CR of the longest
                raise S3Error("IncompleteBody", "a chunk header is too long")
            return None
        if end - self._at > _LINE_BYTES_MAX:
            raise S3Error("IncompleteBody", "a chunk header is too long")
        line = self._input[self._at : end]
        self._at = end + 2
        return line

    def _size_line(self, _out: list[memoryview | bytes]) -> bool:
        line = self._line()
        if line is None:
            return False
        size_text, _, extension = line.partition(b";")
        if not 1 <= len(size_text) <= 16 or not all(c in b"0123456789abcdefABCDEF" for c in size_text):
            raise S3Error("IncompleteBody", "a chunk size is not a hexadecimal number")
        size = int(size_text, 16)
        name, _, value = extension.partition(b"=")
        if self._signer is not None:
            if name.strip() != b"chunk-signature":
                raise S3Error("IncompleteBody", "a chunk has no chunk-signature")
            self._signature = value.strip().decode("latin-1")
        if self._short_chunk and size:
            raise S3Error("InvalidChunkSizeError", "")
        self._short_chunk = size < _CHUNK_BYTES_MIN
        self._total += size
        if self._total > self._decoded_bytes:
            raise S3Error("IncompleteBody", "the chunks hold more bytes than x-amz-decoded-content-length says")
        self._remaining = size
        if size:
            self._state = self._data
        else:
            self._check_chunk()
            self._state = self._trailer_line
        return True

    def _take(self, piece: memoryview | bytes, out: list[memoryview | bytes]) -> None:
        if self._signer is not None:
            self._sha256.update(piece)
        self._remaining -= len(piece)
        if len(piece):
            out.append(piece)

    def _data(self, out: list[memoryview | bytes]) -> bool:
        if self._remaining:
            piece = memoryview(self._input)[self._at : self._at + self._remaining]
            self._at += len(piece)
            self._take(piece, out)
            if self._remaining:
                return False
        if len(self._input) - self._at < 2:
            return False
        if self._input[self._at : self._at + 2] != b"\r\n":
            raise S3Error("IncompleteBody", "a chunk is longer than its size says")
        self._at += 2
        self._check_chunk()
        self._state = self._size_line
        return True

    def _check_chunk(self) -> None:
        if self._signer is not None:
            self._signer.check_chunk(self._signature, self._sha256.hexdigest())
            self._sha256 = hashlib.sha256()

    def _trailer_line(self, _out: list[memoryview | bytes]) -> bool:
        line = self._line()
        if line is None:
            return False
        if line:
            if len(self._trailer_lines) >= _TRAILERS_MAX:
                raise S3Error("MalformedTrailerError", "too many trailers")
            self._trailer_lines.append(line)
            return True
        self._finish_trailers()
        self._done = True
        if self._at < len(self._input):
            raise S3Error("IncompleteBody", "there are bytes behind the last chunk")
        return False

    def _finish_trailers(self) -> None:
        signature = ""
        signed = b""
        for line in self._trailer_lines:
            name_raw, colon, value_raw = line.partition(b":")
            name, value = name_raw.strip().decode("latin-1").lower(), value_raw.strip().decode("latin-1")
            if not colon:
                raise S3Error("MalformedTrailerError", "a trailer has no colon")
            if name == "x-amz-trailer-signature":
                signature = value
                continue
            if name not in self._expected or name in self.trailers:
                raise S3Error("MalformedTrailerError", f"the trailer {name!r} was not announced or stands twice")
            self.trailers[name] = value
            signed += f"{name}:{value}\n".encode("latin-1")
        if self._signed_trailer:
            assert self._signer is not None, "a signed trailer follows signed chunks"
            self._signer.check_trailer(signature, signed)
