"""The eight multipart calls."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from stratum import checksums, content, lifecycle, multipart
from stratum.content import NewContent
from stratum.errors import TryAgain
from stratum.multipart import PART_NUMBER_MAX, CompletePart, CompleteRequest
from stratum.preconditions import check_copy_source
from stratum.s3 import access, ranges, tier_handlers
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
    refuse_unbuilt,
    url_encoded,
    )  # fmt: skip
from stratum.s3.errors import S3Error
from stratum.s3.object_write import checksum_algorithm, find_source, hash_source, receive
from stratum.s3.xml import document, element, escape, parse, text
from stratum.schema import Inode
from stratum.turn import waiting

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from stratum.schema import BucketRow, PartRow, UploadRow
    from stratum.transaction import InodeReader, MetadataTransaction

COMPLETE_BYTES_MAX = 4 * 1024 * 1024


def _bucket(context: Context, reader: InodeReader, what: str) -> BucketRow:
    bucket = context.bucket(reader)
    access.check_bucket(bucket, context.identity, what)
    return bucket


def create_upload(context: Context) -> Answer:
    refuse_unbuilt(context.request)
    check_key(context.key)
    with context.volume.snapshot() as reader:
        bucket = _bucket(context, reader, access.WRITE)
    acl = canned_acl(context, for_object=True)
    owner = context.identity.user_id or bucket.owner
    algorithm = checksum_algorithm(context)
    kind = (context.header("x-amz-checksum-type") or "").upper()
    if kind not in {"", "COMPOSITE", "FULL_OBJECT"} or (kind and not algorithm):
        raise S3Error(
            "InvalidRequest", "x-amz-checksum-type is COMPOSITE or FULL_OBJECT and goes with x-amz-checksum-algorithm"
        )
    if kind == "FULL_OBJECT" and algorithm not in checksums.FULL_OBJECT_ALGORITHMS:
        raise S3Error("InvalidRequest", f"FULL_OBJECT is not possible with {algorithm}")
    if kind == "COMPOSITE" and algorithm == "CRC64NVME":
        raise S3Error("InvalidRequest", "COMPOSITE is not possible with CRC64NVME")
    if algorithm and not kind:
        kind = "FULL_OBJECT" if algorithm == "CRC64NVME" else "COMPOSITE"
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


def _part_number(context: Context) -> int:
    number = context.request.integer("partNumber", -1, 1)
    if not 1 <= number <= PART_NUMBER_MAX:
        raise S3Error(
            "InvalidArgument", f"partNumber is a whole number from 1 to {PART_NUMBER_MAX}", ArgumentName="partNumber"
        )
    return number


def _upload(context: Context, what: str) -> tuple[BucketRow, UploadRow]:
    with context.snapshot() as reader:
        bucket = _bucket(context, reader, what)
        return bucket, multipart.get(reader, bucket, context.key, context.query.get("uploadId", ""))


def upload_part(context: Context) -> Awaitable[Answer]:
    refuse_unbuilt(context.request)
    check_key(context.key)
    number = _part_number(context)
    _, upload = _upload(context, access.WRITE)
    body = Body(context.request, context.identity)
    if upload.checksum_algorithm:
        if body.checksum_algorithm and body.checksum_algorithm != upload.checksum_algorithm:
            raise S3Error(
                "InvalidRequest",
                f"the upload was created with {upload.checksum_algorithm}, the part has {body.checksum_algorithm}",
            )
        body.add_default_checksum(upload.checksum_algorithm)

    async def commit(new: NewContent, md5: bytes, sums: dict[str, str]) -> Answer:
        algorithm, value = next(iter(sums.items()), ("", ""))
        await context.waits.mutate(
            lambda tx: multipart.put_part(
                tx, context.request.bucket, context.key, upload.upload_id, number, new, md5.hex(), value, algorithm
            )
        )
        return empty(200, {"ETag": f'"{md5.hex()}"', **{f"x-amz-checksum-{k.lower()}": v for k, v in sums.items()}})

    return receive(context, body, commit, inline=False)


def upload_part_copy(context: Context) -> Answer:
    """Shares the source's extents; only a small inline source is copied. The ETag of a shared range is derived, not an MD5."""
    refuse_unbuilt(context.request)
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
            checksum = (
                hash_source(context, state, upload.checksum_algorithm, start, stop) if upload.checksum_algorithm else ""
            )
            try:
                part = _copy_part(context, upload, number, state.inode, start, stop, checksum)
                break
            except TryAgain:
                continue
    sums = element(f"Checksum{upload.checksum_algorithm}", part.checksum) if part.checksum else ""
    return xml(
        document(
            "CopyPartResult", element("LastModified", iso_date(part.mtime_ns)), element("ETag", f'"{part.etag}"'), sums
        )
    )


def _copy_part(
    context: Context, upload: UploadRow, number: int, source: Inode, start: int, stop: int, checksum: str
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
                    checksum,
                    upload.checksum_algorithm,
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
            checksum,
            upload.checksum_algorithm,
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
    root = parse(read_document(context, COMPLETE_BYTES_MAX), "CompleteMultipartUpload")
    parts = []
    for child in root:
        number, etag = text(child, "PartNumber"), text(child, "ETag")
        if child.tag != "Part" or number is None or etag is None or not number.isdigit():
            raise S3Error("MalformedXML", "CompleteMultipartUpload lists Parts with PartNumber and ETag")
        value = next(
            (
                text(child, f"Checksum{name}") or ""
                for name in checksums.ALGORITHMS
                if child.find(f"Checksum{name}") is not None
            ),
            "",
        )
        parts.append(CompletePart(int(number), etag, value))
    if not 1 <= len(parts) <= PART_NUMBER_MAX:
        raise S3Error("MalformedXML", f"CompleteMultipartUpload lists from 1 to {PART_NUMBER_MAX} Parts")
    sent = ""
    for name in checksums.ALGORITHMS:
        header = context.header(f"x-amz-checksum-{name.lower()}")
        if header:
            sent = header
            if not checksums.is_well_formed(name, header.partition("-")[0]):
                raise S3Error("InvalidRequest", f"the value of x-amz-checksum-{name.lower()} is not a base64 checksum")
    size = context.header("x-amz-mp-object-size")
    if size is not None and not size.isdigit():
        raise S3Error("InvalidArgument", "x-amz-mp-object-size is not a number")
    request = CompleteRequest(
        context.request.bucket, context.key, context.query.get("uploadId", ""), parts, conditions=conditions(context), checksum=sent,
        checksum_type=(context.header("x-amz-checksum-type") or "").upper(), size=int(size) if size is not None else None,
    )  # fmt: skip
    inode, metadata = context.volume.mutate(lambda tx: multipart.complete(tx, request))
    with context.volume.snapshot() as reader:
        rules = lifecycle.get(reader, inode.bucket)
    expiration = tier_handlers.expiration(rules, context.key, inode.mtime_ns, inode.size, metadata.tags)
    sums = [element(f"Checksum{name}", value) for name, value in metadata.checksums.items()]
    if sums:
        sums.append(element("ChecksumType", metadata.checksum_type))
    location = f"{context.config.endpoint}/{context.request.bucket}/{url_encoded(context.key)}"
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
        raise S3Error("InvalidArgument", "encoding-type is url", ArgumentName="encoding-type")
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
