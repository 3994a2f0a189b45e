"""What every handler gets, and the pieces of requests and answers that several share."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote_to_bytes

from stratum import buckets, hints, storage_classes, tags, tree
from stratum.object_attributes import STORED_HEADERS, USER_METADATA_BYTES_MAX
from stratum.preconditions import NO_CONDITIONS, Conditions
from stratum.s3 import dates, numerals
from stratum.s3.access import BUCKET_ACLS, OBJECT_ACLS
from stratum.s3.errors import S3Error
from stratum.schema import ObjectMetadata

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from stratum.config import Config
    from stratum.identity import Identities
    from stratum.s3.auth import Identity
    from stratum.s3.incoming import Incoming
    from stratum.s3.request import S3Request
    from stratum.s3.waits import Waits
    from stratum.schema import BucketRow, Inode
    from stratum.transaction import InodeReader
    from stratum.volume import Volume


@dataclass(slots=True)
class Context:
    volume: Volume
    identities: Identities
    config: Config
    request: S3Request
    identity: Identity
    waits: Waits
    incoming: Incoming
    document: bytes = b""
    """The body as it came, of operations that take a document."""
    reader: InodeReader | None = None
    """The snapshot the request was authenticated in, while the handler may use it."""
    details: dict[str, Any] = field(default_factory=dict)
    """What the audit log is to say beside the request's head."""
    began_s: float = field(default_factory=time.monotonic)
    """When the request entered."""

    def snapshot(self) -> AbstractContextManager[InodeReader]:
        return nullcontext(self.reader) if self.reader is not None else self.volume.snapshot()

    @property
    def key(self) -> bytes:
        key = self.request.key
        assert key is not None, "an object operation without a key"
        return key

    @property
    def query(self) -> dict[str, str]:
        return self.request.query

    def header(self, name: str) -> str | None:
        return self.request.header(name)

    def bucket(self, reader: InodeReader) -> BucketRow:
        """The request's bucket, after x-amz-expected-bucket-owner. Raises `NoSuchBucket`."""
        return expect_owner(buckets.get(reader, self.request.bucket), self.header("x-amz-expected-bucket-owner"))

    def require_user(self) -> str:
        if self.identity.anonymous:
            raise S3Error("AccessDenied")
        return self.identity.user_id


def expect_owner(bucket: BucketRow, wanted: str | None) -> BucketRow:
    if wanted is not None and wanted != bucket.owner:
        raise S3Error("AccessDenied", "the bucket has another owner than expected")
    return bucket


# -- answers ----------------------------------------------------------------------------------------------------------

_http_dates: dict[int, str] = {}


def http_date(moment_ns: int) -> str:
    """RFC 9110 date; the last few thousand seconds are remembered."""
    second = moment_ns // 1_000_000_000
    found = _http_dates.get(second)
    if found is None:
        if len(_http_dates) > 4096:
            _http_dates.clear()
        found = _http_dates[second] = formatdate(second, usegmt=True)
    return found


def iso_date(moment_ns: int) -> str:
    return (
        time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment_ns // 1_000_000_000))
        + f".{moment_ns // 1_000_000 % 1000:03d}Z"
    )


def object_headers(inode: Inode, metadata: ObjectMetadata, etag: str, content_type: str) -> list[tuple[str, str]]:
    headers = [
        ("ETag", f'"{etag}"'),
        ("Last-Modified", http_date(inode.mtime_ns)),
        ("Content-Type", content_type),
        ("Accept-Ranges", "bytes"),
    ]
    if metadata.headers:
        headers += metadata.headers.items()
    if metadata.user:
        headers += [(f"x-amz-meta-{name}", value) for name, value in metadata.user.items()]
    return headers


def checksum_headers(metadata: ObjectMetadata) -> dict[str, str]:
    found = {f"x-amz-checksum-{name.lower()}": value for name, value in metadata.checksums.items()}
    if found:
        found["x-amz-checksum-type"] = metadata.checksum_type or "FULL_OBJECT"
    return found


def url_encoded(value: bytes) -> str:
    return quote(value, safe="/-_.~*()!'")


# -- requests ---------------------------------------------------------------------------------------------------------


def version_id(context: Context) -> None:
    """Only the null version exists."""
    wanted = context.query.get("versionId")
    if wanted is not None and wanted != "null":
        if not wanted:
            raise S3Error("InvalidArgument", "versionId is empty")
        raise S3Error("NoSuchVersion", VersionId=wanted)


def check_key(key: bytes) -> None:
    if b"\0" in key:
        raise S3Error("InvalidArgument", "a key has no NUL")
    tree.check_key(key)


def canned_acl(context: Context, *, for_object: bool) -> str:
    acl = context.header("x-amz-acl")
    if acl is None:
        return "private"
    if acl not in (OBJECT_ACLS if for_object else BUCKET_ACLS):
        raise S3Error("InvalidArgument", f"{acl!r} is not a canned ACL", ArgumentName="x-amz-acl", ArgumentValue=acl)
    return acl


def storage_class(context: Context) -> str:
    """The class a request asks for, "" for STANDARD. Raises `S3Error` InvalidStorageClass if there is no such tier here."""
    wanted = context.header("x-amz-storage-class") or ""
    if wanted in {"", storage_classes.STANDARD}:
        return ""
    with context.volume.snapshot() as reader:
        if not storage_classes.is_known(context.volume, reader, wanted):
            raise S3Error(
                "InvalidStorageClass",
                f"this server has no tier for the storage class {wanted!r}",
                StorageClassRequested=wanted,
            )
    return wanted


def tagging(context: Context) -> dict[str, str]:
    """The tags of x-amz-tagging. Raises `InvalidTag`."""
    sent = context.header("x-amz-tagging")
    return tags.parse_header(sent) if sent else {}


def object_metadata(context: Context, owner: str, acl: str) -> ObjectMetadata:
    """Content-Type, storage class, tags, the headers S3 stores, and user metadata of a request."""
    request = context.request
    user: dict[str, str] = {}
    size = 0
    stored: dict[str, str] = {}
    for name, value in request.fields.items():
        if name.startswith("x-amz-meta-"):
            plain = name[11:]
            if not plain or not _is_header_text(value):
                raise S3Error("InvalidArgument", f"the metadata header {name} has no name, or control characters")
            user[plain] = value
            size += len(plain) + len(value)
        elif name in STORED_HEADERS and value:
            if not _is_header_text(value):
                raise S3Error("InvalidArgument", f"the header {name} has control characters")
            stored[name] = value
    hints.check_metadata(user)
    if size > USER_METADATA_BYTES_MAX:
        raise S3Error("MetadataTooLarge", f"the user metadata has {size} bytes; {USER_METADATA_BYTES_MAX} is the most")
    if "content-encoding" in stored:
        encodings = [
            part
            for part in (item.strip() for item in stored["content-encoding"].split(","))
            if part and part != "aws-chunked"
        ]
        stored["content-encoding"] = ", ".join(encodings)
        if not encodings:
            del stored["content-encoding"]
    return ObjectMetadata(
        content_type=request.header("content-type") or "",
        headers=stored,
        user=user,
        owner=owner,
        acl="" if acl == "private" else acl,
        storage_class=storage_class(context),
        tags=tagging(context),
    )


def _is_header_text(value: str) -> bool:
    """Printable ASCII, tabs, and bytes above it, which a client that does not encode sends."""
    return all(" " <= c <= "~" or c == "\t" or c >= "\x80" for c in value)


def _date_header(context: Context, name: str) -> int | None:
    text = context.header(name)
    if text is None:
        return None
    moment_s = dates.http(text)
    if moment_s is None and name.startswith("x-amz-"):
        raise S3Error("InvalidArgument", f"The date in {name} is not valid.", ArgumentName=name)
    return moment_s  # RFC 9110 13.1: a condition with an invalid date is ignored


_CONDITIONS = ("if-match", "if-none-match", "if-modified-since", "if-unmodified-since")
_CONDITIONAL = {
    "": frozenset((*_CONDITIONS, "x-amz-if-match-size", "x-amz-if-match-last-modified-time")),
    "x-amz-copy-source-": frozenset(f"x-amz-copy-source-{name}" for name in _CONDITIONS),
}


def conditions(context: Context, prefix: str = "") -> Conditions:
    if _CONDITIONAL[prefix].isdisjoint(context.request.fields):
        return NO_CONDITIONS
    size = context.header("x-amz-if-match-size") if not prefix else None
    match_size = numerals.whole(size) if size is not None else None
    if size is not None and match_size is None:
        raise S3Error("InvalidArgument", "x-amz-if-match-size is not a number", ArgumentName="x-amz-if-match-size")
    return Conditions(
        context.header(prefix + "if-match"), context.header(prefix + "if-none-match"),
        _date_header(context, prefix + "if-modified-since"), _date_header(context, prefix + "if-unmodified-since"),
        match_size, _date_header(context, "x-amz-if-match-last-modified-time") if not prefix else None,
    )  # fmt: skip


def copy_source(context: Context) -> tuple[str, bytes]:
    """(bucket, key) of x-amz-copy-source: decoded once, then data."""
    raw = context.header("x-amz-copy-source") or ""
    path, _, query = raw.partition("?")
    if query:
        name, _, value = query.partition("=")
        if name != "versionId":
            raise S3Error("InvalidArgument", "x-amz-copy-source has an unknown query", ArgumentName="x-amz-copy-source")
        if value != "null":
            raise S3Error("NoSuchVersion", VersionId=value)
    decoded = unquote_to_bytes(path)
    decoded = decoded.removeprefix(b"/")
    bucket, slash, key = decoded.partition(b"/")
    if not slash or not bucket or not key:
        raise S3Error(
            "InvalidArgument",
            "x-amz-copy-source is not bucket/key",
            ArgumentName="x-amz-copy-source",
            ArgumentValue=raw,
        )
    check_key(key)
    try:
        return bucket.decode(), key
    except UnicodeDecodeError as error:
        raise S3Error("InvalidArgument", "the source bucket is not UTF-8") from error


def owner_element(context: Context, reader: InodeReader, user_id: str, *, tag: str = "Owner") -> str:
    from stratum.s3.xml import element

    user = context.identities.user(reader, user_id)
    return f"<{tag}>{element('ID', user_id)}{element('DisplayName', user.display_name if user else user_id)}</{tag}>"
