"""The eight multipart calls."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from stratum import checksums, content, lifecycle, multipart
from stratum.content import NewContent
from stratum.errors import TryAgain
from stratum.multipart import PART_NUMBER_MAX, CompletePart, CompleteRequest
from stratum.preconditions import check_copy_source
from stratum.s3 import access, numerals, origin, ranges, tier_handlers
from stratum.s3.answer import Answer, empty, xml
from stratum.s3.body import Body, read_document
from stratum.s3.context import (
    Context,
    canned_acl,
    check_key,
    checksum_headers,
    conditions,
    copy_source,
    iso_date,
    object_metadata,
    owner_element,
    url_encoded,
    )  # fmt: skip
from stratum.s3.errors import S3Error
from stratum.s3.object_write import checksum_algorithm, find_source, hash_source, receive
from stratum.s3.xml import document, element, escape, parse, text
from stratum.schema import Inode
from stratum.turn import waiting

if TYPE_CHECKING:
    from collections.abc import Awaitable
    from xml.etree.ElementTree import Element

    from stratum.schema import BucketRow, PartRow, UploadRow
    from stratum.transaction import InodeReader, MetadataTransaction

COMPLETE_BYTES_MAX = 4 * 1024 * 1024


def _bucket(context: Context, reader: InodeReader, what: str) -> BucketRow:
    bucket = context.bucket(reader)
    access.check_bucket(bucket, context.identity, what)
    return bucket


def create_upload(context: Context) -> Answer:
    check_key(context.key)
    with context.volume.snapshot() as reader:
        bucket = _bucket(context, reader, access.WRITE)
    acl = canned_acl(context, for_object=True)
    owner = context.identity.user_id or bucket.owner
    algorithm = checksum_algorithm(context)
    kind = (context.header("x-amz-checksum-type") or "").upper()
    _check_type(kind, algorithm)
    if algorithm and not kind:
        kind = checksums.default_type(algorithm)
    metadata = object_metadata(context, owner, acl)
    stored_acl = "" if acl == "private" else acl
    upload = context.volume.mutate(
        lambda tx: multipart.create(
            tx,
            context.request.bucket,
            context.key,
            owner=owner,
            acl=stored_acl,
            metadata=metadata,
            algorithm=algorithm,
            checksum_type=kind,
        )
    )
    headers = {"x-amz-checksum-algorithm": algorithm, "x-amz-checksum-type": kind} if algorithm else {}
    key = context.key.decode()
    return xml(
        document(
            "InitiateMultipartUploadResult",
            element("Bucket", context.request.bucket),
            element("Key", key),
            element("UploadId", upload.upload_id),
        ),
        headers=headers,
    )


def _check_type(kind: str, algorithm: str) -> None:
    if kind not in {"", "COMPOSITE", "FULL_OBJECT"}:
        raise S3Error("InvalidRequest", "Value for x-amz-checksum-type header is invalid.")
    if kind and not algorithm:
        raise S3Error(
            "InvalidRequest",
            "The x-amz-checksum-type header can only be used with the x-amz-checksum-algorithm header.",
        )
    possible = checksums.FULL_OBJECT_ALGORITHMS if kind == "FULL_OBJECT" else checksums.COMPOSITE_ALGORITHMS
    if kind and algorithm not in possible:
        raise S3Error(
            "InvalidRequest",
            f"The {kind} checksum type cannot be used with the {algorithm.lower()} checksum algorithm.",
        )


def _part_number(context: Context) -> int:
    number = context.request.integer("partNumber", -1, 1)
    if not 1 <= number <= PART_NUMBER_MAX:
        raise S3Error(
            "InvalidArgument",
            f"Part number must be an integer between 1 and {PART_NUMBER_MAX}, inclusive",
            ArgumentName="partNumber",
        )
    return number


def _upload(context: Context, what: str) -> tuple[BucketRow, UploadRow]:
    with context.snapshot() as reader:
        bucket = _bucket(context, reader, what)
        return bucket, multipart.get(reader, bucket, context.key, context.query.get("uploadId", ""))


def upload_part(context: Context) -> Awaitable[Answer]:
    check_key(context.key)
    number = _part_number(context)
    _, upload = _upload(context, access.WRITE)
    body = Body(context.request, context.identity)
    wanted, sent = upload.checksum_algorithm, body.checksum_algorithm
    if wanted and sent and sent != wanted:
        raise S3Error(
            "InvalidRequest",
            f"Checksum Type mismatch occurred, expected checksum Type: {wanted.lower()},"
            f" actual checksum Type: {sent.lower()}",
        )
    body.add_checksum(wanted or checksums.DEFAULT)

    async def commit(new: NewContent, md5: bytes, sums: dict[str, str]) -> Answer:
        await context.waits.mutate(
            lambda tx: multipart.put_part(
                tx, context.request.bucket, context.key, upload.upload_id, number, new, md5.hex(), sums
            )
        )
        shown = sent or wanted or checksums.DEFAULT
        return empty(200, {"ETag": f'"{md5.hex()}"', f"x-amz-checksum-{shown.lower()}": sums[shown]})

    return receive(context, body, commit, inline=False)


def upload_part_copy(context: Context) -> Answer:
    """Shares the source's extents; only a small inline source is copied. The ETag of a shared range is derived, not an MD5."""
    check_key(context.key)
    number = _part_number(context)
    _, upload = _upload(context, access.WRITE)
    source_bucket, source_key = copy_source(context)
    wanted = conditions(context, "x-amz-copy-source-")
    while True:
        with context.volume.reading():
            with context.volume.snapshot() as reader:
                state = find_source(context, source_bucket, source_key, reader)
            if wanted:
                check_copy_source(wanted, state.inode)
            header = context.header("x-amz-copy-source-range")
            start, stop = (0, state.size) if header is None else ranges.parse_copy(header, state.size)
            algorithm = upload.checksum_algorithm
            if algorithm:
                sums = {algorithm: hash_source(context, state, algorithm, start, stop)}
            elif (start, stop) == (0, state.size) and state.metadata.checksum_type != "COMPOSITE":
                sums = {name: value for name, value in state.metadata.checksums.items() if name == checksums.DEFAULT}
            else:
                sums = {}  # nobody asked for one, and the bytes are shared without being read
            try:
                part = _copy_part(context, upload, number, state.inode, start, stop, sums)
                break
            except TryAgain:
                continue
    shown = [element(f"Checksum{name}", value) for name, value in sums.items()]
    return xml(
        document(
            "CopyPartResult",
            element("LastModified", iso_date(part.mtime_ns)),
            element("ETag", f'"{part.etag}"'),
            *shown,
        )
    )


def _copy_part(
    context: Context, upload: UploadRow, number: int, source: Inode, start: int, stop: int, sums: dict[str, str]
) -> PartRow:
    volume, request = context.volume, context.request

    def current(tx: MetadataTransaction) -> Inode:
        found = tx.inode(source.number) if tx.has_inode(source.number) else None
        if found is None or found.version != source.version:
            raise TryAgain("the copy source changed meanwhile")
        return found

    if source.flags & Inode.INLINE or source.size == 0:
        with volume.snapshot() as reader:
            plan = content.plan_read(reader, source, start, stop)
        data = b"".join(content.read_planned(volume, plan, start, stop))
        md5 = hashlib.md5(data).hexdigest()
        with waiting(), volume.segments.writer(len(data)) as writer:
            writer.write(data)
            new = NewContent(len(data), extents=writer.finish())
            writer.committing()
            part = volume.mutate(
                lambda tx: multipart.put_part(
                    tx,
                    request.bucket,
                    context.key,
                    upload.upload_id,
                    number,
                    new,
                    md5,
                    sums,
                )
            )
            writer.keep()
            return part
    if source.etag_parts == 0 and (start, stop) == (0, source.size):
        etag = source.etag.hex()
    else:
        etag = hashlib.md5(f"{source.etag_text} {start} {stop}".encode()).hexdigest()
    return volume.mutate(
        lambda tx: multipart.copy_part(
            tx,
            request.bucket,
            context.key,
            upload.upload_id,
            number,
            current(tx),
            start,
            stop,
            etag,
            sums,
        )
    )


def abort_upload(context: Context) -> Answer:
    check_key(context.key)
    upload_id = context.query.get("uploadId", "")

    def commit(tx: MetadataTransaction) -> None:
        multipart.abort_in(tx, _bucket(context, tx, access.WRITE), context.key, upload_id)

    context.volume.mutate(commit, frees=True)
    return empty(204)


def complete_upload(context: Context) -> Answer:
    check_key(context.key)
    with context.volume.snapshot() as reader:
        _bucket(context, reader, access.WRITE)
    root = parse(read_document(context, COMPLETE_BYTES_MAX, of_object=True), "CompleteMultipartUpload")
    parts = [_listed_part(child) for child in root]
    if not 1 <= len(parts) <= PART_NUMBER_MAX:
        raise S3Error("MalformedXML", f"CompleteMultipartUpload lists from 1 to {PART_NUMBER_MAX} Parts")
    algorithm, value = _whole_checksum(context)
    kind = (context.header("x-amz-checksum-type") or "").upper()
    if kind not in {"", "COMPOSITE", "FULL_OBJECT"}:
        raise S3Error("InvalidRequest", "Value for x-amz-checksum-type header is invalid.")
    said = context.header("x-amz-mp-object-size")
    size = numerals.whole(said) if said is not None else None
    if said is not None and size is None:
        raise S3Error("InvalidRequest", "Value for x-amz-mp-object-size header is invalid.")
    request = CompleteRequest(
        context.request.bucket, context.key, context.query.get("uploadId", ""), parts, conditions=conditions(context), checksum=value,
        algorithm=algorithm, checksum_type=kind, size=size,
    )  # fmt: skip
    inode, metadata = context.volume.mutate(lambda tx: multipart.complete(tx, request))
    with context.volume.snapshot() as reader:
        rules = lifecycle.get(reader, inode.bucket)
    expiration = tier_handlers.expiration(rules, context.key, inode.mtime_ns, inode.size, metadata.tags)
    sums = [element(f"Checksum{name}", value) for name, value in metadata.checksums.items()]
    if sums:
        sums.append(element("ChecksumType", metadata.checksum_type))
    location = origin.of_object(context.request, url_encoded(context.key))
    fields = [
        element("Location", location),
        element("Bucket", context.request.bucket),
        element("Key", context.key.decode()),
        element("ETag", f'"{inode.etag_text}"'),
    ]
    return xml(
        document("CompleteMultipartUploadResult", *fields, *sums),
        headers={**checksum_headers(metadata), **dict(expiration)},
    )


def _listed_part(child: Element) -> CompletePart:
    number, etag = numerals.whole(text(child, "PartNumber") or ""), text(child, "ETag")
    if child.tag != "Part" or number is None or etag is None:
        raise S3Error("MalformedXML", "CompleteMultipartUpload lists Parts with PartNumber and ETag")
    sums = [(name, value) for name in checksums.ALGORITHMS if (value := text(child, f"Checksum{name}"))]
    if len(sums) > 1:
        raise S3Error("InvalidArgument", f"part {number} is listed with more than one checksum")
    algorithm, value = sums[0] if sums else ("", "")
    return CompletePart(number, etag, value, algorithm)


def _whole_checksum(context: Context) -> tuple[str, str]:
    """(algorithm, value) of the object as the client knows it. A composite one may end in the count of its parts."""
    sent = [
        (name, value)
        for name in checksums.ALGORITHMS
        if (value := context.header(f"x-amz-checksum-{name.lower()}")) is not None
    ]
    if not sent:
        return "", ""
    if len(sent) > 1:
        raise S3Error(
            "InvalidRequest", "Expecting a single x-amz-checksum- header. Multiple checksum Types are not allowed."
        )
    name, value = sent[0]
    digest, dash, count = value.partition("-")
    if not checksums.is_well_formed(name, digest) or (dash and numerals.whole(count) is None):
        raise S3Error("BadDigest", f"Value for x-amz-checksum-{name.lower()} header is invalid.")
    return name, value


def list_parts(context: Context) -> Answer:
    check_key(context.key)
    count_max = context.request.integer("max-parts", 1000, 0, 1000)
    after = context.request.integer("part-number-marker", 0, 0)
    with context.volume.snapshot() as reader:
        bucket = (
            _bucket(context, reader, access.READ)
            if not access.may_use_bucket(context.bucket(reader), context.identity, access.WRITE)
            else context.bucket(reader)
        )
        upload = multipart.get(reader, bucket, context.key, context.query.get("uploadId", ""))
        shown: list[tuple[int, PartRow]] = []
        truncated = False
        for number, part in multipart.parts(reader, upload, after):
            if len(shown) == count_max:
                truncated = True
                break
            shown.append((number, part))
        owner = owner_element(context, reader, upload.owner)
        initiator = owner_element(context, reader, upload.owner, tag="Initiator")
    items = "".join(
        f"<Part>{element('PartNumber', number)}{element('LastModified', iso_date(part.mtime_ns))}<ETag>&quot;{part.etag}&quot;</ETag>{element('Size', part.size)}"
        f"{element(f'Checksum{part.algorithm}', part.checksum) if part.checksum else ''}</Part>"
        for number, part in shown
    )
    return xml(
        document(
            "ListPartsResult", element("Bucket", context.request.bucket), element("Key", context.key.decode()), element("UploadId", upload.upload_id),
            initiator, owner, element("StorageClass", "STANDARD"), element("PartNumberMarker", after),
            element("NextPartNumberMarker", shown[-1][0] if shown else after), element("MaxParts", count_max), element("IsTruncated", truncated),
            element("ChecksumAlgorithm", upload.checksum_algorithm or None), element("ChecksumType", upload.checksum_type or None), items,
        )
    )  # fmt: skip


def list_uploads(context: Context) -> Answer:
    query = context.query
    count_max = context.request.integer("max-uploads", 1000, 0, 1000)
    prefix, delimiter = query.get("prefix", "").encode(), query.get("delimiter", "").encode()
    key_marker, id_marker = query.get("key-marker", "").encode(), query.get("upload-id-marker", "")
    encode = url_encoded if query.get("encoding-type") == "url" else lambda value: escape(value.decode())
    if query.get("encoding-type", "url") != "url":
        raise S3Error("InvalidArgument", "Invalid Encoding Method specified in Request", ArgumentName="encoding-type")
    items: list[str] = []
    prefixes: list[bytes] = []
    truncated = False
    last: tuple[bytes, str] = (b"", "")
    with context.volume.snapshot() as reader:
        bucket = _bucket(context, reader, access.READ)
        for key, upload_id, upload in multipart.scan_uploads(
            reader, bucket, prefix=prefix, key_marker=key_marker, upload_id_marker=id_marker, limit=1 << 30
        ):
            at = key.find(delimiter, len(prefix)) if delimiter else -1
            common = key[: at + len(delimiter)] if at >= 0 else b""
            if common and (common in prefixes or key_marker.startswith(common)):
                continue
            if len(items) + len(prefixes) == count_max:
                truncated = count_max > 0
                break
            last = (common or key, "" if common else upload_id)
            if common:
                prefixes.append(common)
                continue
            items.append(
                f"<Upload><Key>{encode(key)}</Key>{element('UploadId', upload_id)}{owner_element(context, reader, upload.owner, tag='Initiator')}"
                f"{owner_element(context, reader, upload.owner)}{element('StorageClass', 'STANDARD')}{element('Initiated', iso_date(upload.initiated_ns))}"
                f"{element('ChecksumAlgorithm', upload.checksum_algorithm or None)}{element('ChecksumType', upload.checksum_type or None)}</Upload>"
            )
    following = (
        f"<NextKeyMarker>{encode(last[0])}</NextKeyMarker>{element('NextUploadIdMarker', last[1])}" if truncated else ""
    )
    return xml(
        document(
            "ListMultipartUploadsResult", element("Bucket", context.request.bucket), f"<KeyMarker>{encode(key_marker)}</KeyMarker>",
            element("UploadIdMarker", id_marker), following, f"<Prefix>{encode(prefix)}</Prefix>", f"<Delimiter>{encode(delimiter)}</Delimiter>" if delimiter else "",
            element("EncodingType", query.get("encoding-type")), element("MaxUploads", count_max), element("IsTruncated", truncated), *items,
            *(f"<CommonPrefixes><Prefix>{encode(value)}</Prefix></CommonPrefixes>" for value in prefixes),
        )
    )  # fmt: skip
