"""ListObjects (v1, v2), ListObjectVersions and ListBuckets."""

from __future__ import annotations

import base64
import binascii
import re
from typing import TYPE_CHECKING

from stratum import buckets, listing
from stratum.s3 import access
from stratum.s3.answer import Answer, xml
from stratum.s3.context import Context, iso_date, owner_element, url_encoded
from stratum.s3.errors import S3Error
from stratum.s3.xml import document, element, escape

if TYPE_CHECKING:
    from collections.abc import Callable

    from stratum.listing import Page
    from stratum.schema import BucketRow
    from stratum.transaction import InodeReader

_PLAIN = re.compile(rb"[^&<>\"\x00-\x1f\x7f]*")
_URL_SAFE = re.compile(rb"[A-Za-z0-9/_.~*()!'-]*")
_seconds: dict[int, str] = {}


def _second(second: int) -> str:
    """The ISO date of a second up to its fraction; many objects have the same."""
    if len(_seconds) > 8192:
        _seconds.clear()
    found = _seconds[second] = iso_date(second * 1_000_000_000)[:-4]
    return found


def _escaped(value: bytes) -> str:
    return value.decode() if _PLAIN.fullmatch(value) else escape(value.decode())


def _encoder(context: Context) -> Callable[[bytes], str]:
    kind = context.query.get("encoding-type")
    if kind is None:
        return _escaped
    if kind != "url":
        raise S3Error(
            "InvalidArgument",
            "Invalid Encoding Method specified in Request",
            ArgumentName="encoding-type",
            ArgumentValue=kind,
        )
    return url_encoded


_MILLISECONDS = [f'{number:03d}Z</LastModified><ETag>"' for number in range(1000)]


def _contents(page: Page, encode: Callable[[bytes], str], owner: str, tag: str = "Contents") -> str:
    """The hot loop of listing: one format a key, and one check for the whole page whether anything needs escaping."""
    objects, classes = page.objects, page.classes
    needs_nothing = _PLAIN if encode is _escaped else _URL_SAFE
    if needs_nothing.fullmatch(b"".join([row[0] for row in objects])):
        encode = bytes.decode
    head = f"<{tag}><Key>"
    version = "<VersionId>null</VersionId><IsLatest>true</IsLatest>" if tag == "Version" else ""
    middle = f"</Key>{version}<LastModified>"
    before, after = f"</Size>{owner}<StorageClass>", f"</StorageClass></{tag}>"
    tail = f"{before}STANDARD{after}"
    seconds, milliseconds = _seconds, _MILLISECONDS
    lines: list[str] = []
    add = lines.append
    for key, size, mtime_ns, etag in objects:
        second, rest = divmod(mtime_ns, 1_000_000_000)
        moment = seconds.get(second) or _second(second)
        add(
            f'{head}{encode(key)}{middle}{moment}{milliseconds[rest // 1_000_000]}{etag}"</ETag><Size>{size}{tail if key not in classes else before + classes[key] + after}'
        )
    return "".join(lines)


def _prefixes(page: Page, encode: Callable[[bytes], str]) -> str:
    return "".join(f"<CommonPrefixes><Prefix>{encode(prefix)}</Prefix></CommonPrefixes>" for prefix in page.prefixes)


def _bucket(context: Context, reader: InodeReader) -> BucketRow:
    bucket = context.bucket(reader)
    access.check_bucket(bucket, context.identity, access.READ)
    return bucket


def _bytes(context: Context, name: str) -> bytes:
    return context.query.get(name, "").encode()


def list_objects(context: Context) -> Answer:
    count_max = context.request.integer("max-keys", 1000, 0, 1000)
    prefix, delimiter, marker = _bytes(context, "prefix"), _bytes(context, "delimiter"), _bytes(context, "marker")
    encode = _encoder(context)
    with context.snapshot() as reader:
        bucket = _bucket(context, reader)
        page = listing.list_page(reader, bucket, prefix=prefix, delimiter=delimiter, after=marker, limit=count_max)
        owner = owner_element(context, reader, bucket.owner)
    following = f"<NextMarker>{encode(page.last)}</NextMarker>" if page.truncated else ""
    return xml(
        document(
            "ListBucketResult", element("Name", context.request.bucket), f"<Prefix>{encode(prefix)}</Prefix><Marker>{encode(marker)}</Marker>", following,
            f"<Delimiter>{encode(delimiter)}</Delimiter>" if delimiter else "", element("EncodingType", context.query.get("encoding-type")),
            element("MaxKeys", count_max), element("IsTruncated", page.truncated), _contents(page, encode, owner), _prefixes(page, encode),
        )
    )  # fmt: skip


def encode_token(key: bytes) -> str:
    return base64.urlsafe_b64encode(b"1" + key).decode()


def decode_token(token: str) -> bytes:
    """Raises `S3Error` for anything `encode_token` did not make."""
    try:
        raw = base64.b64decode(token, altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise S3Error(
            "InvalidArgument", "The continuation token provided is incorrect", ArgumentName="continuation-token"
        ) from error
    if not raw.startswith(b"1"):
        raise S3Error(
            "InvalidArgument", "The continuation token provided is incorrect", ArgumentName="continuation-token"
        )
    return raw[1:]


def list_objects_v2(context: Context) -> Answer:
    query = context.query
    count_max = context.request.integer("max-keys", 1000, 0, 1000)
    prefix, delimiter, start_after = (
        _bytes(context, "prefix"),
        _bytes(context, "delimiter"),
        _bytes(context, "start-after"),
    )
    token = query.get("continuation-token")
    after = decode_token(token) if token else start_after
    encode = _encoder(context)
    with context.snapshot() as reader:
        bucket = _bucket(context, reader)
        page = listing.list_page(reader, bucket, prefix=prefix, delimiter=delimiter, after=after, limit=count_max)
        # Without a DisplayName, which Amazon S3 no longer sends; version 1 of the call keeps it for what was written against it.
        owner = f"<Owner>{element('ID', bucket.owner)}</Owner>" if query.get("fetch-owner") == "true" else ""
    return xml(
        document(
            "ListBucketResult", element("Name", context.request.bucket), f"<Prefix>{encode(prefix)}</Prefix>",
            f"<StartAfter>{encode(start_after)}</StartAfter>" if "start-after" in query else "", element("ContinuationToken", token),
            element("NextContinuationToken", encode_token(page.last) if page.truncated else None),
            element("KeyCount", len(page.objects) + len(page.prefixes)), element("MaxKeys", count_max),
            f"<Delimiter>{encode(delimiter)}</Delimiter>" if delimiter else "", element("EncodingType", query.get("encoding-type")),
            element("IsTruncated", page.truncated), _contents(page, encode, owner), _prefixes(page, encode),
        )
    )  # fmt: skip


def list_versions(context: Context) -> Answer:
    """Every object has one version, the null one."""
    count_max = context.request.integer("max-keys", 1000, 0, 1000)
    prefix, delimiter, marker = _bytes(context, "prefix"), _bytes(context, "delimiter"), _bytes(context, "key-marker")
    encode = _encoder(context)
    with context.snapshot() as reader:
        bucket = _bucket(context, reader)
        page = listing.list_page(reader, bucket, prefix=prefix, delimiter=delimiter, after=marker, limit=count_max)
        owner = owner_element(context, reader, bucket.owner)
    versions = _contents(page, encode, owner, "Version")
    following = (
        f"<NextKeyMarker>{encode(page.last)}</NextKeyMarker><NextVersionIdMarker>null</NextVersionIdMarker>"
        if page.truncated
        else ""
    )
    return xml(
        document(
            "ListVersionsResult", element("Name", context.request.bucket), f"<Prefix>{encode(prefix)}</Prefix><KeyMarker>{encode(marker)}</KeyMarker>",
            element("VersionIdMarker", context.query.get("version-id-marker", "")), following, f"<Delimiter>{encode(delimiter)}</Delimiter>" if delimiter else "",
            element("EncodingType", context.query.get("encoding-type")), element("MaxKeys", count_max), element("IsTruncated", page.truncated),
            versions, _prefixes(page, encode),
        )
    )  # fmt: skip


def list_buckets(context: Context) -> Answer:
    """The caller's own buckets; all of them for an administrator; none for an anonymous caller."""
    query = context.query
    count_max = context.request.integer("max-buckets", 10_000, 1, 10_000)
    prefix, region = query.get("prefix", ""), query.get("bucket-region")
    token = query.get("continuation-token")
    after = decode_token(token).decode("utf-8", "replace") if token else ""
    identity = context.identity
    with context.snapshot() as reader:
        rows = [] if identity.anonymous else buckets.scan(reader, after)
        owner = (
            owner_element(context, reader, identity.user_id)
            if not identity.anonymous
            else "<Owner><ID>anonymous</ID></Owner>"
        )
    mine = [
        (name, row)
        for name, row in rows
        if name > after
        and name.startswith(prefix)
        and (identity.admin or row.owner == identity.user_id)
        and region in {None, row.region or context.config.s3_region}
    ]
    shown = mine[:count_max]
    items = "".join(
        f"<Bucket>{element('Name', name)}{element('CreationDate', iso_date(row.created_ns))}</Bucket>"
        for name, row in shown
    )
    following = element("ContinuationToken", encode_token(shown[-1][0].encode())) if len(mine) > len(shown) else ""
    return xml(
        document(
            "ListAllMyBucketsResult",
            owner,
            f"<Buckets>{items}</Buckets>",
            element("Prefix", prefix) if prefix else "",
            following,
        )
    )
