"""An HTTP request as S3 reads it: bucket, key, sub-resource, headers."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from werkzeug.wrappers import Request

from stratum.s3 import signatures
from stratum.s3.errors import S3Error

if TYPE_CHECKING:
    from stratum.config import Config

_HEADERS_BYTES_MAX = 16 * 1024


class S3Request(Request):
    """`bucket` is "" for the service; `key` is None when the request names no object."""

    def __init__(self, environ: dict[str, Any], config: Config, request_id: str) -> None:
        super().__init__(environ)
        self.config = config
        self.request_id = request_id
        self.raw_path: bytes = environ["PATH_INFO"].encode("latin-1") or b"/"
        self.raw_query: str = environ.get("QUERY_STRING", "")
        self.host_name: str = environ.get("HTTP_HOST", "")
        self.signed_names: dict[str, str] = {}
        """Header names as they were signed: WSGI cannot tell "_" from "-"."""
        self.bucket, self.key = self._split()

    def _split(self) -> tuple[str, bytes | None]:
        path = self.raw_path[1:]
        bucket_of_host = self._bucket_of_host()
        if bucket_of_host:
            return bucket_of_host, path or None
        bucket, slash, key = path.partition(b"/")
        try:
            name = bucket.decode()
        except UnicodeDecodeError as error:
            raise S3Error("InvalidBucketName", "the bucket name is not UTF-8") from error
        return name, (key or None) if slash else None

    def _bucket_of_host(self) -> str:
        domain = self.config.s3_domain
        if not domain:
            return ""
        host = self.host_name.lower()
        if ":" in host and not host.endswith("]"):
            host = host.rpartition(":")[0]
        return host[: -len(domain) - 1] if host.endswith("." + domain.lower()) else ""

    @cached_property
    def pairs(self) -> list[tuple[bytes, bytes]]:
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
        if name in {"content-type", "content-length"}:
            value = self.environ.get(name.upper().replace("-", "_"))
            if value is not None:
                return str(value)
        value = self.environ.get("HTTP_" + name.upper().replace("-", "_"))
        return None if value is None else str(value)

    @cached_property
    def all_headers(self) -> dict[str, str]:
        """Lower-case names to values. Raises `S3Error` when they are too many bytes."""
        found = {
            key[5:].replace("_", "-").lower(): str(value)
            for key, value in self.environ.items()
            if key.startswith("HTTP_")
        }
        for name in ("content-type", "content-length"):
            value = self.environ.get(name.upper().replace("-", "_"))
            if value:
                found[name] = str(value)
        if sum(len(name) + len(value) for name, value in found.items()) > _HEADERS_BYTES_MAX:
            raise S3Error("RequestHeaderSectionTooLarge", "the request headers are larger than 16 KiB")
        return found

    @property
    def resource(self) -> str:
        return self.raw_path.decode("utf-8", "replace")

    def integer(self, name: str, default: int, low: int, high: int | None = None) -> int:
        """A query parameter as a number, clamped to `high`. Raises `S3Error` InvalidArgument."""
        text = self.query.get(name)
        if text is None or (text == "" and default >= 0):
            return default
        if not text.isascii() or not text.isdigit() or len(text) > 18 or int(text) < low:
            raise S3Error(
                "InvalidArgument",
                f"{name} = {text!r} is not a whole number from {low} on",
                ArgumentName=name,
                ArgumentValue=text,
            )
        return int(text) if high is None else min(int(text), high)
