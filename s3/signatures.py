"""Signature Version 4 and 2 as pure functions: strings in, strings out.

Source: AWS General Reference, "Signature Version 4 signing process"; Amazon S3 user guide, "Signing and authenticating
REST requests" (Version 2). Paths are bytes already decoded once; they are encoded canonically again, as S3 does.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from functools import lru_cache
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote_to_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

ALGORITHM = "AWS4-HMAC-SHA256"
EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
UNSIGNED = "UNSIGNED-PAYLOAD"
STREAMING_SIGNED = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"
STREAMING_SIGNED_TRAILER = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER"
STREAMING_UNSIGNED_TRAILER = "STREAMING-UNSIGNED-PAYLOAD-TRAILER"
_SAFE_PATH = "/-_.~"
_SAFE_QUERY = "-_.~"


def encode_path(path: bytes) -> str:
    return quote(path, safe=_SAFE_PATH)


def split_query(query: str) -> list[tuple[bytes, bytes]]:
    """Decoded (name, value) pairs of a raw query string; "+" is a space."""
    pairs = []
    for part in query.split("&"):
        if part:
            name, _, value = part.replace("+", "%20").partition("=")
            pairs.append((unquote_to_bytes(name), unquote_to_bytes(value)))
    return pairs


def canonical_query(pairs: Iterable[tuple[bytes, bytes]]) -> str:
    encoded = sorted((quote(name, safe=_SAFE_QUERY), quote(value, safe=_SAFE_QUERY)) for name, value in pairs)
    return "&".join(f"{name}={value}" for name, value in encoded)


def canonical_value(value: str) -> str:
    """A header's value (its bytes as Latin-1) without needless blanks. Of bytes beyond ASCII none is one: 0xa0 ends an à."""
    if value.isascii():
        return " ".join(value.split())
    return b" ".join(value.encode("latin-1").split()).decode("latin-1")


def canonical_request(
    method: str, path: bytes, query: str, header: Callable[[str], str | None], signed: list[str], payload_hash: str
) -> str:
    """`header` finds a value by lower-case name; `query` is canonical already."""
    lines = "".join([f"{name}:{canonical_value(header(name) or '')}\n" for name in signed])
    return f"{method}\n{encode_path(path)}\n{query}\n{lines}\n{';'.join(signed)}\n{payload_hash}"


@lru_cache(maxsize=1024)
def signing_key(secret: str, date: str, region: str, service: str) -> bytes:
    """Cached: a day's key serves every request of that day."""
    key = hmac.digest(b"AWS4" + secret.encode(), date.encode(), "sha256")
    for part in (region, service, "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    return key


def string_to_sign(stamp: str, scope: str, request: bytes) -> str:
    return f"{ALGORITHM}\n{stamp}\n{scope}\n{hashlib.sha256(request).hexdigest()}"


def request_signatures(key: bytes, stamp: str, scope: str, request: str) -> Iterator[str]:
    """The signatures a client may have made for a canonical request whose header values are bytes as Latin-1.

    Beyond ASCII clients differ: most sign the bytes they send, botocore sends Latin-1 and signs its UTF-8.
    """
    yield signature(key, string_to_sign(stamp, scope, request.encode("latin-1")))
    if not request.isascii():
        yield signature(key, string_to_sign(stamp, scope, request.encode()))


def signature(key: bytes, text: str) -> str:
    return hmac.digest(key, text.encode(), "sha256").hex()


def chunk_string_to_sign(stamp: str, scope: str, previous: str, chunk_sha256: str) -> str:
    return f"{ALGORITHM}-PAYLOAD\n{stamp}\n{scope}\n{previous}\n{EMPTY_SHA256}\n{chunk_sha256}"


def trailer_string_to_sign(stamp: str, scope: str, previous: str, trailer_sha256: str) -> str:
    return f"{ALGORITHM}-TRAILER\n{stamp}\n{scope}\n{previous}\n{trailer_sha256}"


V2_SUBRESOURCES = frozenset((
    "accelerate", "acl", "analytics", "cors", "delete", "encryption", "inventory", "lifecycle", "location", "logging", "metrics", "notification",
    "partNumber", "policy", "policyStatus", "publicAccessBlock", "replication", "requestPayment", "response-cache-control",
    "response-content-disposition", "response-content-encoding", "response-content-language", "response-content-type", "response-expires", "restore",
    "tagging", "torrent", "uploadId", "uploads", "versionId", "versioning", "versions", "website", "object-lock", "legal-hold", "retention",
))  # fmt: skip


def v2_string_to_sign(
    method: str, resource: str, pairs: Iterable[tuple[bytes, bytes]], headers: Mapping[str, str], date: str
) -> str:
    """What version 2 signs, its bytes as Latin-1.

    `resource` is the encoded path, with the bucket even in virtual-host style. `date` is empty when x-amz-date is sent.
    """
    amz = "".join(f"{name}:{headers[name].strip(' ')}\n" for name in sorted(headers) if name.startswith("x-amz-"))
    wanted = sorted(
        (name.decode("latin-1"), value.decode("latin-1"))
        for name, value in pairs
        if name.decode("latin-1") in V2_SUBRESOURCES
    )
    query = "&".join(f"{name}={value}" if value else name for name, value in wanted)
    full = f"{resource}?{query}" if query else resource
    return f"{method}\n{headers.get('content-md5', '')}\n{headers.get('content-type', '')}\n{date}\n{amz}{full}"


def v2_signatures(secret: str, text: str) -> Iterator[str]:
    """As `request_signatures`."""
    for signed in [text.encode("latin-1")] if text.isascii() else [text.encode("latin-1"), text.encode()]:
        yield base64.b64encode(hmac.digest(secret.encode(), signed, "sha1")).decode()
