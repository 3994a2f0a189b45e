"""Multipart uploads. A part is an inode without a name; Complete moves the parts' slices to one new inode."""

from __future__ import annotations

import hashlib
import itertools
import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from stratum import buckets, checksums, content, evidence, longkeys, tree
from stratum.errors import (
    ChecksumMismatch,
    EntityTooSmall,
    InvalidArgument,
    InvalidPart,
    InvalidPartOrder,
    InvalidRequest,
    NoSuchUpload,
)
from stratum.objects import find_for_write, metadata_of, place, set_metadata
from stratum.preconditions import NO_CONDITIONS, Conditions
from stratum.schema import (
    Inode,
    Kind,
    ObjectMetadata,
    PartRow,
    Slice,
    UploadRow,
    key_u64_u64,
    pack_json,
    split_u64_u64,
    unpack_json,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stratum.content import NewContent
    from stratum.schema import BucketRow
    from stratum.transaction import InodeReader, MetadataTransaction

PART_NUMBER_MAX = 10_000
PART_BYTES_MIN = 5 * 1024 * 1024
_UPLOAD_ID_BYTES = 32  # hex characters


def _string(key: bytes, upload_id: str) -> bytes:
    return key + b"\0" + upload_id.encode()


def create(
    tx: MetadataTransaction,
    bucket: str,
    key: bytes,
    *,
    owner: str,
    acl: str,
    metadata: ObjectMetadata,
    algorithm: str,
    checksum_type: str,
) -> UploadRow:
    """Raises `NoSuchBucket` or `ReadOnlyBucket`."""
    row = buckets.get(tx, bucket)
    buckets.check_writable(row)
    number = tx.new_id()
    # The uploads of a key are listed by id, and by the time of their initiation: the id begins with it.
    upload_id = f"{tx.now_ns:016x}{number & 0xFFFFFFFF:08x}{secrets.token_hex(4)}"
    upload = UploadRow(
        number,
        upload_id,
        tx.now_ns,
        owner,
        acl,
        unpack_json(metadata.pack()),
        algorithm,
        checksum_type,
    )
    longkeys.put(tx, b"U", row.inode, _string(key, upload.upload_id), upload.pack(), tx.new_id)
    return upload


def get(reader: InodeReader, bucket: BucketRow, key: bytes, upload_id: str) -> UploadRow:
    """Raises `NoSuchUpload`, also for an id that belongs to another key."""
    raw = None
    if len(upload_id) == _UPLOAD_ID_BYTES and upload_id.isalnum() and upload_id.isascii():
        raw = longkeys.get(reader, b"U", bucket.inode, _string(key, upload_id))
    if raw is None:
        raise NoSuchUpload(upload_id)
    return UploadRow(**unpack_json(raw))


def scan_uploads(
    reader: InodeReader,
    bucket: BucketRow,
    *,
    prefix: bytes = b"",
    key_marker: bytes = b"",
    upload_id_marker: str = "",
    limit: int = 1000,
) -> list[tuple[bytes, str, UploadRow]]:
    """Uploads in order of key and id, behind the markers."""
    found: list[tuple[bytes, str, UploadRow]] = []
    for string, raw in longkeys.scan(reader, b"U", bucket.inode, key_marker, prefix):
        key, _, upload_id = string.rpartition(b"\0")
        if key_marker and (
            key < key_marker or (key == key_marker and (not upload_id_marker or upload_id.decode() <= upload_id_marker))
        ):
            continue
        found.append((key, upload_id.decode(), UploadRow(**unpack_json(raw))))
        if len(found) >= limit:
            break
    return found


def parts(reader: InodeReader, upload: UploadRow, after: int = 0) -> Iterator[tuple[int, PartRow]]:
    for key, raw in reader.scan(
        key_u64_u64(b"P", upload.number, after + 1), key_u64_u64(b"P", upload.number, PART_NUMBER_MAX + 1)
    ):
        yield split_u64_u64(key)[1], PartRow(**unpack_json(raw))


def put_part(
    tx: MetadataTransaction,
    bucket: str,
    key: bytes,
    upload_id: str,
    number: int,
    new: NewContent,
    etag: str,
    sums: dict[str, str],
) -> PartRow:
    """Store or replace a part with its checksums. Raises `NoSuchUpload`."""
    row = buckets.get(tx, bucket)
    upload = get(tx, row, key, upload_id)
    inode = _part_inode(tx, row)
    content.put_new(tx, inode, new)
    return _set_part(tx, upload, number, inode, etag, sums)


def _part_inode(tx: MetadataTransaction, bucket: BucketRow) -> Inode:
    inode = Inode(tx.new_id(), Kind.FILE, mode=0, uid=0, gid=0, now_ns=tx.now_ns, bucket=bucket.inode)
    inode.nlink = 0
    return tx.add_inode(inode)


def _set_part(
    tx: MetadataTransaction, upload: UploadRow, number: int, inode: Inode, etag: str, sums: dict[str, str]
) -> PartRow:
    part_key = key_u64_u64(b"P", upload.number, number)
    before = tx.get(part_key)
    if before is not None:
        content.free_inode(tx, tx.inode(PartRow(**unpack_json(before)).inode))
    algorithm = next((name for name in sums if name != checksums.DEFAULT), checksums.DEFAULT)
    sent = sums if upload.checksum_algorithm or algorithm != checksums.DEFAULT else {}
    part = PartRow(
        inode.number,
        inode.size,
        etag,
        tx.now_ns,
        sent.get(algorithm, ""),
        algorithm if sent else "",
        "" if upload.checksum_algorithm else sums.get(checksums.DEFAULT, ""),
    )
    tx.put(part_key, part.pack())
    return part


def copy_part(
    tx: MetadataTransaction,
    bucket: str,
    key: bytes,
    upload_id: str,
    number: int,
    source: Inode,
    start: int,
    stop: int,
    etag: str,
    sums: dict[str, str],
) -> PartRow:
    """A part that shares the source's extents. `source` was checked by the caller in this transaction."""
    row = buckets.get(tx, bucket)
    upload = get(tx, row, key, upload_id)
    inode = _part_inode(tx, row)
    content.share(tx, source, inode, start=start, stop=stop)
    return _set_part(tx, upload, number, inode, etag, sums)


def abort_in(tx: MetadataTransaction, bucket: BucketRow, key: bytes, upload_id: str) -> None:
    """Raises `NoSuchUpload`."""
    upload = get(tx, bucket, key, upload_id)
    _drop(tx, bucket, key, upload)


def _drop(tx: MetadataTransaction, bucket: BucketRow, key: bytes, upload: UploadRow) -> None:
    for number, part in list(parts(tx, upload)):
        content.free_inode(tx, tx.inode(part.inode))
        tx.delete(key_u64_u64(b"P", upload.number, number))
    longkeys.delete(tx, b"U", bucket.inode, _string(key, upload.upload_id))


@dataclass(slots=True)
class CompletePart:
    """One line of the client's list; empty fields were not sent."""

    number: int
    etag: str
    checksum: str = ""
    algorithm: str = ""


@dataclass(slots=True)
class CompleteRequest:
    """`checksum`, of `algorithm`, is the whole object's as the client knows it."""

    bucket: str
    key: bytes
    upload_id: str
    parts: list[CompletePart]
    conditions: Conditions = NO_CONDITIONS
    checksum: str = ""
    algorithm: str = ""
    checksum_type: str = ""
    size: int | None = None


def complete(tx: MetadataTransaction, request: CompleteRequest) -> tuple[Inode, ObjectMetadata]:
    """Make the object. A repeated Complete of the same upload answers the object it made.

    Raises `NoSuchUpload`, `InvalidPart`, `InvalidPartOrder`, `EntityTooSmall`, `ChecksumMismatch`, `InvalidRequest`,
    `PreconditionFailed`; nothing was changed then and the upload is still open.
    """
    bucket = buckets.get(tx, request.bucket)
    try:
        upload = get(tx, bucket, request.key, request.upload_id)
    except NoSuchUpload:
        done = tree.find_object(tx, bucket, request.key)
        if done is not None and (made := metadata_of(tx, done)).upload_id == request.upload_id:
            _check_whole(request, made.checksums)
            return done, made
        raise
    _check_agreement(upload, request)
    chosen = _choose(tx, upload, request)
    metadata = _finished_metadata(upload, chosen, request)
    find_for_write(tx, bucket, request.key, request.conditions)
    etag = hashlib.md5(b"".join(bytes.fromhex(part.etag) for part in chosen)).digest()

    def fill(inode: Inode) -> None:
        at = 0
        for part in chosen:
            source = tx.inode(part.inode)
            for piece in tx.slices(part.inode):
                tx.delete(key_u64_u64(b"S", part.inode, piece.file_offset))
                shown = Slice(at + piece.file_offset, piece.length, piece.extent, piece.extent_offset)
                tx.put_slice(inode.number, shown, moved=True)
                evidence.shared(tx, inode.number, part.inode)
            if source.flags & Inode.INLINE:
                assert len(chosen) == 1, "a part beside others is never inline"
                content.put_inline(tx, inode, content.get_inline(tx, part.inode))
            at += part.size
        content.set_size(tx, inode, at)
        inode.etag, inode.etag_parts = etag, len(chosen)
        set_metadata(tx, inode, metadata)

    inode = place(tx, bucket, request.key, fill)
    _drop(tx, bucket, request.key, upload)
    return inode, metadata


def _choose(tx: MetadataTransaction, upload: UploadRow, request: CompleteRequest) -> list[PartRow]:
    if not request.parts:
        raise InvalidArgument("a multipart upload is completed with at least one part")
    chosen: list[PartRow] = []
    previous = 0
    for wanted, following in itertools.zip_longest(request.parts, request.parts[1:]):
        if following is not None and following.number == wanted.number:
            continue  # a client that sent a part twice and lists both means the later one
        if wanted.number <= previous:
            raise InvalidPartOrder(f"part {wanted.number} does not ascend; list the parts by number")
        previous = wanted.number
        raw = tx.get(key_u64_u64(b"P", upload.number, wanted.number)) if wanted.number <= PART_NUMBER_MAX else None
        part = None if raw is None else PartRow(**unpack_json(raw))
        if part is None or part.etag != wanted.etag.strip('"'):
            raise InvalidPart(
                f"part {wanted.number} was not uploaded with this ETag; upload it again",
                upload_id=upload.upload_id,
                part_number=wanted.number,
                etag=wanted.etag.strip('"'),
            )
        if wanted.checksum and wanted.checksum != part.checksum_of(wanted.algorithm):
            raise InvalidPart(
                f"part {wanted.number} was uploaded with another checksum; upload it again",
                upload_id=upload.upload_id,
                part_number=wanted.number,
                etag=part.etag,
            )
        chosen.append(part)
    for part, wanted in zip(chosen[:-1], request.parts, strict=False):
        if part.size < PART_BYTES_MIN:
            raise EntityTooSmall(
                f"part {wanted.number} has {part.size} bytes; all but the last need {PART_BYTES_MIN}",
                size=part.size,
                size_min=PART_BYTES_MIN,
                part_number=wanted.number,
                etag=part.etag,
            )
    return chosen


def _check_agreement(upload: UploadRow, request: CompleteRequest) -> None:
    """Raises `ChecksumMismatch` or `InvalidRequest` if the request speaks of other checksums than the upload's."""
    algorithm, kind = upload.checksum_algorithm, upload.checksum_type
    if request.checksum_type and request.checksum_type != (kind or "FULL_OBJECT"):
        raise ChecksumMismatch(
            f"The upload was created using the {kind or 'FULL_OBJECT'} checksum mode."
            " The complete request must use the same checksum mode."
        )
    if request.algorithm and request.algorithm != (algorithm or checksums.DEFAULT):
        raise InvalidRequest(
            f"Checksum Type mismatch occurred, expected checksum Type: {(algorithm or checksums.DEFAULT).lower()},"
            f" actual checksum Type: {request.algorithm.lower()}"
        )
    if not algorithm:
        return
    for part in request.parts:
        if part.algorithm not in {"", algorithm}:
            raise ChecksumMismatch(
                f"The {part.algorithm.lower()} you specified for part {part.number} did not match what we received."
            )
        if kind == "COMPOSITE" and not part.checksum:
            raise InvalidRequest(
                f"The upload was created using a {algorithm.lower()} checksum. The complete request must include the"
                f" checksum for each part. It was missing for part {part.number} in the request."
            )


def _check_whole(request: CompleteRequest, sums: dict[str, str]) -> None:
    if request.checksum and not checksums.matches(request.checksum, sums.get(request.algorithm, "")):
        raise ChecksumMismatch(f"The {request.algorithm.lower()} you specified did not match the calculated checksum.")


def _finished_metadata(upload: UploadRow, chosen: list[PartRow], request: CompleteRequest) -> ObjectMetadata:
    metadata = ObjectMetadata.unpack(pack_json(upload.metadata))
    algorithm = upload.checksum_algorithm or checksums.DEFAULT
    kind = upload.checksum_type or "FULL_OBJECT"
    values = [part.checksum_of(algorithm) for part in chosen]
    sums: dict[str, str] = {}
    if all(values):
        sums[algorithm] = (
            checksums.full_object(algorithm, [(value, part.size) for value, part in zip(values, chosen, strict=True)])
            if kind == "FULL_OBJECT"
            else checksums.composite(algorithm, values)
        )
    _check_whole(request, sums)
    size = sum(part.size for part in chosen)
    if request.size is not None and request.size != size:
        raise InvalidRequest(
            f"The provided 'x-amz-mp-object-size' header value {request.size} does not match what was computed: {size}"
        )
    return replace(
        metadata, owner=upload.owner, acl=upload.acl, checksums=sums, checksum_type=kind if sums else "", upload_id=upload.upload_id,
        part_sizes=[part.size for part in chosen], part_checksums=values if sums else [],
    )  # fmt: skip


def scan_all_parts(reader: InodeReader) -> Iterator[tuple[int, int, PartRow]]:
    """(upload, number, part) of the whole volume, for fsck."""
    for key, raw in reader.scan_prefix(b"P"):
        upload, number = split_u64_u64(key)
        yield upload, number, PartRow(**unpack_json(raw))
