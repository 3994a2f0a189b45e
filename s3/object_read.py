"""GetObject, HeadObject and GetObjectAttributes."""

from __future__ import annotations

import mimetypes
import re
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from stratum import content, objects, storage_classes
from stratum.deadlines import Deadline
from stratum.errors import NoSuchKey, NotModified
from stratum.multipart import PART_NUMBER_MAX
from stratum.preconditions import check_read
from stratum.s3 import access, numerals, ranges, tier_handlers
from stratum.s3.answer import Answer, Stream, xml
from stratum.s3.context import (
    Context,
    check_key,
    checksum_headers,
    conditions,
    http_date,
    object_headers,
    version_id,
)
from stratum.s3.errors import S3Error
from stratum.s3.xml import document, element
from stratum.schema import Inode

if TYPE_CHECKING:
    from stratum.objects import ObjectState
    from stratum.schema import BucketRow
    from stratum.transaction import InodeReader

# Control characters, and what is beyond the one byte that a character of a header has.
_NOT_A_HEADER = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f]|[^\x00-\xff]")
DEFAULT_TYPE = "binary/octet-stream"
_OF_304 = frozenset(("cache-control", "content-location", "etag", "expires", "last-modified", "vary"))
_OVERRIDES = {
    "response-content-type": "Content-Type", "response-content-language": "Content-Language", "response-expires": "Expires",
    "response-cache-control": "Cache-Control", "response-content-disposition": "Content-Disposition", "response-content-encoding": "Content-Encoding",
}  # fmt: skip


def look_up(context: Context, reader: InodeReader) -> tuple[BucketRow, ObjectState]:
    """The object of the request, before it is known who may have it; its caller asks that, then for the version.

    That there is none is told to who may list.
    """
    bucket = context.bucket(reader)
    check_key(context.key)
    try:
        return bucket, objects.head(reader, bucket, context.key)
    except NoSuchKey:
        if not access.may_use_bucket(bucket, context.identity, access.READ):
            raise S3Error("AccessDenied") from None
        version_id(context)
        raise


def find(context: Context, reader: InodeReader, *, check_conditions: bool = True) -> tuple[BucketRow, ObjectState]:
    """The object, after authorisation and then preconditions: nobody learns from a 304 what a 403 would hide."""
    bucket, state = look_up(context, reader)
    access.check_object(bucket, state.metadata, context.identity, access.READ)
    if context.request.raw_query:
        version_id(context)
    if check_conditions:
        wanted = conditions(context)
        if wanted:
            check_read(wanted, state.inode)
    return bucket, state


def content_type_of(context: Context, state: ObjectState) -> str:
    if state.metadata.content_type:
        return state.metadata.content_type
    if not state.metadata.owner:  # made through the mount
        guessed, _ = mimetypes.guess_type(context.key.decode("utf-8", "replace"), strict=False)
        return guessed or DEFAULT_TYPE
    return DEFAULT_TYPE


def _extent(context: Context, state: ObjectState) -> tuple[int, int, int]:
    """(start, stop, status) of what the request wants."""
    header, part = context.header("range"), context.query.get("partNumber")
    size = state.size
    if part is not None:
        if header is not None:
            raise S3Error("InvalidRequest", "partNumber and Range exclude each other")
        sizes = state.metadata.part_sizes or [size]
        number = _part_number(context, len(sizes))
        start = sum(sizes[: number - 1])
        stop = start + sizes[number - 1]
        # A range of no bytes has no Content-Range (RFC 9110 section 14.4): a part of none is the whole of an empty object.
        return start, stop, 206 if stop > start else 200
    if header is not None and _if_range_holds(context, state):
        found = ranges.parse(header, size)
        if found is not None:
            return *found, 206
    return 0, size, 200


def _part_number(context: Context, count: int) -> int:
    """The part that a read asks for, of `count`. Raises `S3Error` InvalidArgument or InvalidPart."""
    text = context.query.get("partNumber", "")
    number = numerals.whole(text, PART_NUMBER_MAX)
    if not number:
        raise S3Error(
            "InvalidArgument",
            f"Part number must be an integer between 1 and {PART_NUMBER_MAX}, inclusive",
            ArgumentName="partNumber",
            ArgumentValue=text[:32],
        )
    if number > count:
        raise S3Error("InvalidPart", ActualPartCount=str(count), PartNumberRequested=text)
    return number


def _if_range_holds(context: Context, state: ObjectState) -> bool:
    wanted = context.header("if-range")
    return wanted is None or wanted.strip('"') == state.etag or wanted == http_date(state.inode.mtime_ns)


def _answer(
    context: Context, state: ObjectState, start: int, stop: int, status: int, more: list[tuple[str, str]]
) -> Answer:
    headers = object_headers(state.inode, state.metadata, state.etag, content_type_of(context, state))
    headers += more
    headers.append(("Content-Length", str(stop - start)))
    if status == 206:
        headers.append(("Content-Range", f"bytes {start}-{stop - 1}/{state.size}"))
    if context.header("x-amz-checksum-mode") == "ENABLED":
        headers += _checksums(context, state, whole=start == 0 and stop == state.size)
    if context.request.raw_query:
        if "partNumber" in context.query and state.metadata.part_sizes:
            headers.append(("x-amz-mp-parts-count", str(len(state.metadata.part_sizes))))
        _override(context, headers)
    return Answer(status, headers)


def _checksums(context: Context, state: ObjectState, *, whole: bool) -> list[tuple[str, str]]:
    """Of the object, or of the part that is asked for by its number; a range has none."""
    metadata = state.metadata
    if "partNumber" in context.query and metadata.part_checksums:
        algorithm = next(iter(metadata.checksums))
        value = metadata.part_checksums[context.request.integer("partNumber", -1, 1) - 1]
        return [(f"x-amz-checksum-{algorithm.lower()}", value), ("x-amz-checksum-type", metadata.checksum_type)]
    return list(checksum_headers(metadata).items()) if whole else []


def _override(context: Context, headers: list[tuple[str, str]]) -> None:
    for name, target in _OVERRIDES.items():
        value = context.query.get(name)
        if value is None:
            continue
        if context.identity.anonymous:
            raise S3Error("InvalidRequest", "response- overrides need a signed request")
        if _NOT_A_HEADER.search(value):
            raise S3Error("InvalidArgument", "Header value cannot be represented using ISO-8859-1.", ArgumentName=name)
        headers[:] = [(known, old) for known, old in headers if known.lower() != target.lower()]
        headers.append((target, value))


def _unchanged(context: Context, state: ObjectState) -> Answer | None:
    """304 if the client has the object already, with those headers of the 200 that RFC 9110 section 15.4.5 names."""
    wanted = conditions(context)
    if not wanted:
        return None
    try:
        check_read(wanted, state.inode)
    except NotModified:
        headers = object_headers(state.inode, state.metadata, state.etag, "")
        if context.request.raw_query:
            _override(context, headers)
        return Answer(304, [(name, value) for name, value in headers if name.lower() in _OF_304])
    return None


def head_object(context: Context) -> Answer:
    with context.snapshot() as reader:
        bucket, state = find(context, reader, check_conditions=False)
        if (unchanged := _unchanged(context, state)) is not None:
            return unchanged
        more = tier_handlers.headers(context, reader, bucket, state)
    return _answer(context, state, *_extent(context, state), more)


def get_object(context: Context) -> Answer:
    """One committed state from the first byte to the last, whatever anybody writes meanwhile."""
    volume = context.volume
    with context.snapshot() as reader:
        bucket, state = find(context, reader, check_conditions=False)
        if (unchanged := _unchanged(context, state)) is not None:
            return unchanged
        if state.inode.flags & Inode.INLINE or state.size == 0:
            start, stop, status = _extent(context, state)
            plan = objects.plan(reader, state, start, stop)
            more = tier_handlers.headers(context, reader, bucket, state)
            answer = _answer(context, state, start, stop, status, more)
            pieces = content.read_planned(volume, plan, start, stop)
            if stop - start <= content.READ_BYTES:
                answer.body = b"".join(pieces)
            else:
                answer.body = Stream(pieces, ExitStack())
            return answer
    with ExitStack() as stack:
        stack.enter_context(volume.reading())
        with volume.snapshot() as reader:
            bucket, state = find(context, reader, check_conditions=False)
            if (unchanged := _unchanged(context, state)) is not None:
                return unchanged
            start, stop, status = _extent(context, state)
            plan = objects.plan(reader, state, start, stop)
            more = tier_handlers.headers(context, reader, bucket, state)
        answer = _answer(context, state, start, stop, status, more)
        deadline = Deadline(volume.config.cold_recall_s_max, context.began_s)
        # A read that fails is no sign of use: else whoever tries again and again would bring the object back.
        began = partial(volume.evidence.read, state.inode.number, stop - start, begins=start == 0)
        pieces = content.read_planned(volume, plan, start, stop, deadline=deadline)
        answer.body = Stream(pieces, stack.pop_all(), began, deadline)
    return answer


_ATTRIBUTES = ("ETag", "Checksum", "ObjectParts", "StorageClass", "ObjectSize")


def get_object_attributes(context: Context) -> Answer:
    wanted = [name.strip() for name in (context.header("x-amz-object-attributes") or "").split(",") if name.strip()]
    unknown = [name for name in wanted if name not in _ATTRIBUTES]
    if not wanted or unknown:
        raise S3Error(
            "InvalidArgument",
            f"Invalid attribute name specified. x-amz-object-attributes lists some of {', '.join(_ATTRIBUTES)}",
            ArgumentName="x-amz-object-attributes",
        )
    with context.snapshot() as reader:
        _, state = find(context, reader)
        storage_class = storage_classes.of(reader, state.inode, state.metadata)
    metadata = state.metadata
    parts: list[str] = []
    if "ETag" in wanted:
        parts.append(element("ETag", state.etag))
    if "Checksum" in wanted and metadata.checksums:
        # S3 leaves the count of parts out here, and here only: TotalPartsCount has it.
        sums = "".join(
            element(f"Checksum{name}", value.partition("-")[0]) for name, value in metadata.checksums.items()
        )
        parts.append(f"<Checksum>{sums}{element('ChecksumType', metadata.checksum_type or 'FULL_OBJECT')}</Checksum>")
    if "ObjectParts" in wanted and metadata.part_sizes:
        parts.append(_parts(context, state))
    if "StorageClass" in wanted:
        parts.append(element("StorageClass", storage_class))
    if "ObjectSize" in wanted:
        parts.append(element("ObjectSize", state.size))
    return xml(
        document("GetObjectAttributesResponse", *parts), headers={"Last-Modified": http_date(state.inode.mtime_ns)}
    )


def _parts(context: Context, state: ObjectState) -> str:
    metadata = state.metadata
    count_max = _header_number(context, "x-amz-max-parts", 1000)
    after = _header_number(context, "x-amz-part-number-marker", 0)
    total = len(metadata.part_sizes)
    shown = range(after + 1, min(total, after + min(count_max, 1000)) + 1)
    algorithm = next(iter(metadata.checksums), "")
    items = ""
    for number in shown:
        value = metadata.part_checksums[number - 1] if metadata.part_checksums else None
        items += (
            f"<Part>{element(f'Checksum{algorithm}', value)}{element('PartNumber', number)}"
            f"{element('Size', metadata.part_sizes[number - 1])}</Part>"
        )
    last = shown[-1] if shown else after
    return (
        f"<ObjectParts>{element('IsTruncated', last < total)}{element('MaxParts', count_max)}{element('NextPartNumberMarker', last)}"
        f"{element('PartNumberMarker', after)}{element('PartsCount', total)}{items}</ObjectParts>"
    )


def _header_number(context: Context, name: str, default: int) -> int:
    text = context.header(name)
    if text is None:
        return default
    if not numerals.are_digits(text):
        raise S3Error("InvalidArgument", f"{name} is not a number", ArgumentName=name, ArgumentValue=text[:32])
    return numerals.clamped(text)
