"""What RFC 9112 asks of a request's head beyond its grammar, which llhttp checks. Pure.

Whoever stands before this server must read the same requests out of a connection as it does: what can be read in two ways
is refused, and the connection closed.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

from stratum.s3.errors import S3Error

if TYPE_CHECKING:
    from collections.abc import Iterable

WATCHED = frozenset((b"host", b"expect", b"transfer-encoding"))
"""Names of the fields that `check_fields` wants to see."""
TARGET_BYTES_MAX = 16 * 1024
_VERSIONS = frozenset(("1.1", "1.0"))
_HOST = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+,;=%-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?")
_SCHEMES = (b"http://", b"https://")


@lru_cache(maxsize=256)
def _is_host(value: bytes) -> bool:
    return _HOST.fullmatch(value) is not None


def check_fields(version: str, watched: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether the client waits for 100 Continue; `watched` has lower-case names and values without surrounding space.

    Raises `S3Error` for a head that must be refused: sections 2.3, 3.2, 6.1 and 6.3; RFC 9110 10.1.1.
    """
    if version not in _VERSIONS:
        raise S3Error("HTTPVersionNotSupported", "the request is neither HTTP/1.1 nor HTTP/1.0")
    hosts, waits, codings = 0, False, b""
    for name, value in watched:
        if name == b"host":
            hosts += 1
            if not _is_host(value):
                raise S3Error("BadRequest", "the Host header is not a host name or address")
        elif name == b"transfer-encoding":
            codings = codings + b"," + value if codings else value
        elif version != "1.0" and value.lower() == b"100-continue":
            waits = True  # S3 ignores other expectations, which RFC 9110 10.1.1 leaves to the server
    if hosts != 1 and (hosts or version != "1.0"):
        raise S3Error("BadRequest", f"the request needs exactly one Host header; it has {hosts}")
    if codings:
        _check_codings(version, codings)
    return waits


def _check_codings(version: str, codings: bytes) -> None:
    if version == "1.0":
        raise S3Error("BadRequest", "HTTP/1.0 has no Transfer-Encoding")
    names = [name.strip(b" \t").lower() for name in codings.split(b",")]
    if names[-1] != b"chunked":
        raise S3Error("BadRequest", "the last Transfer-Encoding of a request is chunked: nothing else shows its end")
    if len(names) > 1:
        raise S3Error(
            "NotImplemented",
            "A header you provided implies functionality that is not implemented: the only Transfer-Encoding is chunked",
        )


def split_target(method: str, target: bytes) -> tuple[bytes, bytes, bytes]:
    """(path, query, authority) of a request target, the authority empty unless it stands there. Raises `S3Error`."""
    if len(target) > TARGET_BYTES_MAX:
        raise S3Error("RequestURITooLong", f"the request target is longer than {TARGET_BYTES_MAX} bytes")
    if target.startswith(b"/"):
        path, _, query = target.partition(b"?")
        return path, query, b""
    if method == "CONNECT":
        raise S3Error("MethodNotAllowed", "The specified method is not allowed against this resource.", Method=method)
    if target == b"*" and method == "OPTIONS":
        return b"/", b"", b""
    scheme = next((scheme for scheme in _SCHEMES if target[: len(scheme)].lower() == scheme), None)
    if scheme is not None:
        rest, _, query = target[len(scheme) :].partition(b"?")
        authority, _, path = rest.partition(b"/")
        if _is_host(authority):
            return b"/" + path, query, authority
    raise S3Error("BadRequest", "the request target is neither a path nor an http URL")
