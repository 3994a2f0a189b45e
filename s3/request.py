"""An HTTP request as S3 reads it: bucket, key, sub-resource, headers.

Werkzeug's request without I/O, with S3's own view of path and headers: the path as bytes, because a key is bytes, and
header values as Latin-1, one character a byte, so that what was sent is what is signed, stored and sent back.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

from werkzeug.datastructures import Headers
from werkzeug.sansio.request import Request

from stratum.s3 import numerals, signatures
from stratum.s3.errors import S3Error

if TYPE_CHECKING:
    from stratum.config import Config

_HEADERS_BYTES_MAX = 16 * 1024
_PARAMETERS_MAX = 512
_SINGLE = frozenset((
    "authorization", "content-length", "content-md5", "content-type", "date", "host", "if-modified-since", "if-range", "if-unmodified-since", "range",
    "x-amz-content-sha256", "x-amz-copy-source", "x-amz-copy-source-range", "x-amz-date", "x-amz-decoded-content-length",
))  # fmt: skip
"""Fields that are no lists: joined with a comma two of them would be a value that nobody sent."""


class S3Request(Request):
    """`bucket` is "" for the service; `key` is None when the request names no object. Built from an ASGI scope."""

    def __init__(self, scope: dict[str, Any], config: Config, request_id: str) -> None:
        raw: bytes = scope["raw_path"] or b"/"
        query: bytes = scope["query_string"]
        super().__init__(
            scope["method"],
            scope["scheme"],
            None,
            "",
            scope["path"],
            query,
            _NO_HEADERS,
            (scope.get("client") or ("",))[0],
        )
        del self.headers  # made on demand, below
        self.config = config
        self.request_id = request_id
        self.raw_path = unquote_to_bytes(raw) if b"%" in raw else raw
        self.raw_query = query.decode("latin-1")
        self.fields: dict[str, str] = {}
        """Lower-case header names to values; one that came several times is joined with commas."""
        fields = self.fields
        size = 0
        for name_raw, value_raw in scope["headers"]:
            name, value = name_raw.decode("latin-1"), value_raw.decode("latin-1")
            size += len(name) + len(value)
            if size > _HEADERS_BYTES_MAX:
                raise S3Error("RequestHeaderSectionTooLarge", "Your request header section exceeds 16 KiB.")
            if name not in fields:
                fields[name] = value
            elif name in _SINGLE:
                raise S3Error("InvalidRequest", f"The header {name} stands twice in the request.")
            else:
                fields[name] = f"{fields[name]},{value}"
        bucket_of_host = self._bucket_of_host() if config.s3_domain else ""
        self.virtual_host = bool(bucket_of_host)
        """Whether the bucket stands in the Host, and the path holds nothing but the key."""
        self.bucket, self.key = (bucket_of_host, self.raw_path[1:] or None) if bucket_of_host else self._split()

    def _split(self) -> tuple[str, bytes | None]:
        bucket, slash, key = self.raw_path[1:].partition(b"/")
        if slash and not bucket:
            raise S3Error("InvalidBucketName", "The specified bucket is not valid: the path begins with two slashes.")
        try:
            name = bucket.decode()
        except UnicodeDecodeError as error:
            raise S3Error("InvalidBucketName", "the bucket name is not UTF-8") from error
        return name, (key or None) if slash else None

    def _bucket_of_host(self) -> str:
        domain = self.config.s3_domain
        host = self.fields.get("host", "").lower()
        if ":" in host and not host.endswith("]"):
            host = host.rpartition(":")[0]
        return host[: -len(domain) - 1] if host.endswith("." + domain.lower()) else ""

    @cached_property
    def headers(self) -> Headers:  # type: ignore[override]  # Werkzeug's is an attribute
        return Headers(list(self.fields.items()))

    @cached_property
    def pairs(self) -> list[tuple[bytes, bytes]]:
        if self.raw_query.count("&") >= _PARAMETERS_MAX:
            raise S3Error("InvalidURI", f"the query has more than {_PARAMETERS_MAX} parameters")
        return signatures.split_query(self.raw_query) if self.raw_query else []

    @cached_property
    def query(self) -> dict[str, str]:
        """The first value of each parameter. Raises `S3Error` if it is not UTF-8."""
        found: dict[str, str] = {}
        try:
            for name, value in self.pairs:
                found.setdefault(name.decode(), value.decode())
        except UnicodeDecodeError as error:
            raise S3Error("InvalidArgument", "a query parameter is not UTF-8") from error
        return found

    def header(self, name: str) -> str | None:
        """By lower-case name."""
        return self.fields.get(name)

    @property
    def resource(self) -> str:
        return self.raw_path.decode("utf-8", "replace")

    @property
    def length(self) -> int:
        """Content-Length; -1 when there is none."""
        length = numerals.whole(self.fields.get("content-length", ""))
        return -1 if length is None else length

    @property
    def has_body(self) -> bool:
        return self.fields.get("content-length", "0") != "0" or "transfer-encoding" in self.fields

    def integer(self, name: str, default: int, low: int, high: int | None = None) -> int:
        """A query parameter as a number, clamped to `high`. Raises `S3Error` InvalidArgument."""
        text = self.query.get(name)
        if text is None or (text == "" and default >= 0):
            return default
        number = numerals.whole(text)
        if number is None or number < low:
            raise S3Error(
                "InvalidArgument",
                f"{name} = {text!r} is not a whole number from {low} on",
                ArgumentName=name,
                ArgumentValue=text,
            )
        return number if high is None else min(number, high)


_NO_HEADERS = Headers()
