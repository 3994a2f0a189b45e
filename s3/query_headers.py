"""The `x-amz-*` headers that a client moved into the query, as SDKs do when they presign a URL.

Amazon S3 takes such a parameter for the header of that name. It may do so only for what the signature covers: all of the
query in Version 4; in Version 2 what joins the canonical headers, where botocore has Content-Type and Content-MD5 too.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

from stratum import checksums
from stratum.s3.errors import S3Error

if TYPE_CHECKING:
    from stratum.s3.request import S3Request

_SIGNATURE = frozenset((
    "x-amz-algorithm", "x-amz-credential", "x-amz-date", "x-amz-expires", "x-amz-signedheaders", "x-amz-signature",
))  # fmt: skip
"""Parameters that make up a signature of Version 4, and no header."""
VERSION_2 = frozenset((b"content-type", b"content-md5"))
_NAME = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]+")
_CONTROLS = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_CHECKSUMS = {f"x-amz-checksum-{name.lower()}": name for name in checksums.ALGORITHMS}


@lru_cache
def _of_nothing(algorithm: str) -> str:
    return checksums.encode(checksums.new(algorithm).digest())


def collect(request: S3Request, more: frozenset[bytes] = frozenset()) -> dict[str, str]:
    """Header names to values, both as a header would have them; `more` names what counts beside `x-amz-*`.

    Raises `S3Error` InvalidArgument for what no header can be, and for a parameter that comes with two values.
    """
    found: dict[str, str] = {}
    for name_raw, value_raw in request.pairs:
        lower = name_raw.lower()
        if lower[:6] != b"x-amz-" and lower not in more:
            continue
        name, value = lower.decode("latin-1"), value_raw.decode("latin-1").strip(" \t")
        if name in _SIGNATURE:
            continue
        if not _NAME.fullmatch(name) or _CONTROLS.search(value):
            raise S3Error("InvalidArgument", f"the query parameter {name!r} or its value cannot be a header")
        if found.setdefault(name, value) != value:
            raise _different(name)
    return found


def _different(name: str) -> S3Error:
    return S3Error(
        "InvalidArgument", f"{name} was sent more than once, with different values; send it once", ArgumentName=name
    )


def merge(request: S3Request, found: dict[str, str]) -> None:
    """Make them headers of the request. Raises `S3Error` InvalidArgument where a header says something else."""
    fields = request.fields
    for name, value in found.items():
        if fields.setdefault(name, value) != value:
            raise _different(name)


def forget_checksums_of_nothing(request: S3Request, found: dict[str, str]) -> None:
    """A presigner that has no body yet signs the checksum of an empty one: it names the algorithm and says no more."""
    for name, value in found.items():
        algorithm = _CHECKSUMS.get(name)
        if algorithm and value == _of_nothing(algorithm):
            del request.fields[name]
            request.fields.setdefault("x-amz-sdk-checksum-algorithm", algorithm)


def take(request: S3Request) -> None:
    """Of a request whose signature covers the query, once it holds, or of one that has none."""
    if request.raw_query:
        found = collect(request)
        if found:
            merge(request, found)
            forget_checksums_of_nothing(request, found)
