"""PutObject, CopyObject, DeleteObject and DeleteObjects."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from stratum import buckets, checksums, content, lifecycle, objects, tree
from stratum.content import INLINE_BYTES_MAX, NewContent
from stratum.errors import NoSuchKey, StratumError, TryAgain
from stratum.preconditions import NO_CONDITIONS, Conditions
from stratum.s3 import access, dates, numerals, tier_handlers
from stratum.s3.answer import Answer, empty, xml
from stratum.s3.body import Body, read_document
from stratum.s3.context import (
    Context,
    canned_acl,
    check_key,
    checksum_headers,
    conditions,
    copy_source,
    expect_owner,
    iso_date,
    object_metadata,
    storage_class,
    tagging,
    version_id,
    )  # fmt: skip
from stratum.s3.errors import S3Error, code_of, message_of
from stratum.s3.xml import document, element, only, parse, text
from stratum.turn import waiting

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from xml.etree.ElementTree import Element

    from stratum.lifecycle import Rule
    from stratum.schema import BucketRow, Inode, ObjectMetadata
    from stratum.transaction import InodeReader, MetadataTransaction

DELETE_KEYS_MAX = 1000
DELETE_BYTES_MAX = 8 * 1024 * 1024
"""So many keys of 1,024 bytes, each byte of them a character reference."""
UPLOAD_BYTES_MAX = 5 << 30
"""Of one PutObject or UploadPart, as on S3; a longer object is uploaded in parts."""
_DELETE_BATCH = 100


_BLOCK_BYTES = 1024 * 1024
_BLOCK_BYTES_CROWDED = 128 * 1024
_UPLOADS_CROWDED = 16
_FRAMING_BYTES_MAX = 64 * 1024


def receive(
    context: Context,
    body: Body,
    commit: Callable[[NewContent, bytes, dict[str, str]], Awaitable[Answer]],
    *,
    inline: bool = True,
) -> Awaitable[Answer]:
    """Take a body to where it will live, verify it, then `commit(content, md5, checksums)`; give it back on failure."""
    size = body.size
    limit = min(context.config.s3_object_bytes_max, UPLOAD_BYTES_MAX)
    if size is not None and size > limit:
        raise S3Error(
            "EntityTooLarge",
            f"the object has {size} bytes; {limit} is the most",
            MaxSizeAllowed=str(limit),
            ProposedSize=str(size),
        )
    if size is not None and size <= INLINE_BYTES_MAX and (inline or size == 0):
        return _receive_inline(context, body, commit)
    return _receive_extents(context, body, commit)


async def _receive_inline(
    context: Context, body: Body, commit: Callable[[NewContent, bytes, dict[str, str]], Awaitable[Answer]]
) -> Answer:
    data = b"".join(body.feed(await context.incoming.all(INLINE_BYTES_MAX + _FRAMING_BYTES_MAX)))
    md5, sums = body.verify()
    return await commit(NewContent(len(data), inline=data), md5, sums)


async def _receive_extents(
    context: Context, body: Body, commit: Callable[[NewContent, bytes, dict[str, str]], Awaitable[Answer]]
) -> Answer:
    """One block is hashed and written in a thread while the next one arrives."""
    waits, limit = context.waits, min(context.config.s3_object_bytes_max, UPLOAD_BYTES_MAX)
    writer = context.volume.segments.writer(body.size)

    def take(block: bytes) -> None:
        for piece in body.feed(block):
            writer.write(piece)
            if writer.size > limit:
                raise S3Error("EntityTooLarge", f"the object is larger than {limit} bytes", MaxSizeAllowed=str(limit))

    def finish(block: bytes) -> tuple[NewContent, bytes, dict[str, str]]:
        take(block)
        md5, sums = body.verify()
        return NewContent(writer.size, extents=writer.finish()), md5, sums

    waits.uploads += 1
    taking: asyncio.Future[None] | None = None
    try:
        last = b""
        async for block in context.incoming.blocks(
            _BLOCK_BYTES if waits.uploads < _UPLOADS_CROWDED else _BLOCK_BYTES_CROWDED
        ):
            if last:
                if taking is not None:
                    await taking
                taking = waits.in_thread(take, last)
            last = block
        if taking is not None:
            await taking
        new, md5, sums = await waits.in_thread(finish, last)
        writer.committing()
        answer = await commit(new, md5, sums)
        writer.keep()
    except BaseException as error:
        if taking is not None and not taking.done():
            await asyncio.wait([taking])  # nobody may write while the bytes are given back
        await waits.in_thread(writer.__exit__, type(error), error, error.__traceback__)
        raise
    else:
        writer.close()
        return answer
    finally:
        waits.uploads -= 1


def _writable(context: Context) -> BucketRow:
    with context.snapshot() as reader:
        bucket = context.bucket(reader)
    access.check_bucket(bucket, context.identity, access.WRITE)
    buckets.check_writable(bucket)
    return bucket


def put_object(context: Context) -> Awaitable[Answer]:
    bucket = _writable(context)
    check_key(context.key)
    with context.snapshot() as reader:
        rules = lifecycle.get(reader, bucket.inode)
    acl = canned_acl(context, for_object=True)
    owner = context.identity.user_id or bucket.owner
    metadata = object_metadata(context, owner, acl)
    wanted = conditions(context)
    body = Body(context.request, context.identity)
    if not body.checksum_algorithm:
        body.add_checksum(checksums.DEFAULT)

    async def commit(new: NewContent, md5: bytes, sums: dict[str, str]) -> Answer:
        metadata.checksums.update(sums)
        request = objects.PutRequest(context.request.bucket, context.key, md5, metadata, conditions=wanted)
        inode = await context.waits.mutate(lambda tx: objects.put(tx, request, new))
        answer = empty(200, {"ETag": f'"{inode.etag_text}"', **checksum_headers(metadata)})
        answer.headers += tier_handlers.expiration(rules, context.key, inode.mtime_ns, new.size, metadata.tags)
        return answer

    return receive(context, body, commit)


# -- copy -------------------------------------------------------------------------------------------------------------


def checksum_algorithm(context: Context) -> str:
    algorithm = (context.header("x-amz-checksum-algorithm") or "").upper()
    if algorithm and algorithm not in checksums.ALGORITHMS:
        raise S3Error(
            "InvalidRequest",
            "Checksum algorithm provided is unsupported. Please try again with any of the valid types:"
            f" [{', '.join(checksums.ALGORITHMS)}]",
        )
    return algorithm


def find_source(context: Context, bucket_name: str, key: bytes, reader: InodeReader) -> objects.ObjectState:
    """The copy source, after the same authorisation as a GET of it."""
    bucket = expect_owner(buckets.get(reader, bucket_name), context.header("x-amz-source-expected-bucket-owner"))
    try:
        state = objects.head(reader, bucket, key)
    except NoSuchKey:
        access.check_bucket(bucket, context.identity, access.READ)
        raise
    access.check_object(bucket, state.metadata, context.identity, access.READ)
    return state


def hash_source(context: Context, state: objects.ObjectState, algorithm: str, start: int, stop: int) -> str:
    """The checksum of bytes of a source, which must be held by the reader guard."""
    hasher = checksums.new(algorithm)
    with context.volume.snapshot() as reader:
        plan = content.plan_read(reader, state.inode, start, stop)
    with waiting():
        for piece in content.read_planned(context.volume, plan, start, stop):
            hasher.update(piece)
    return checksums.encode(hasher.digest())


def _directive(context: Context, header: str) -> str:
    found = (context.header(header) or "COPY").upper()
    if found not in {"COPY", "REPLACE"}:
        raise S3Error("InvalidArgument", f"{header} is COPY or REPLACE, not {found!r}", ArgumentName=header)
    return found


def copy_object(context: Context) -> Answer:
    check_key(context.key)
    bucket = _writable(context)
    source_bucket, source_key = copy_source(context)
    directive = _directive(context, "x-amz-metadata-directive")
    tags = tagging(context) if _directive(context, "x-amz-tagging-directive") == "REPLACE" else None
    itself = (source_bucket, source_key) == (context.request.bucket, context.key)
    if itself and directive == "COPY" and context.header("x-amz-storage-class") is None:
        raise S3Error(
            "InvalidRequest",
            "This copy request is illegal because it is trying to copy an object to itself without changing the object's"
            " metadata, storage class, website redirect location or encryption attributes.",
        )
    owner = context.identity.user_id or bucket.owner
    acl = canned_acl(context, for_object=True)
    stored_acl = "" if acl == "private" else acl
    wanted_class = storage_class(context)
    algorithm = checksum_algorithm(context)
    while True:
        with context.volume.reading():
            with context.volume.snapshot() as reader:
                state = find_source(context, source_bucket, source_key, reader)
                if tags is None and state.metadata.tags:
                    source = buckets.get(reader, source_bucket)
                    if not access.may_use_tags(source, state.metadata, context.identity):
                        raise S3Error(
                            "AccessDenied",
                            "the source has tags that are not yours to read: x-amz-tagging-directive: REPLACE leaves them",
                        )
            sums = None
            if algorithm and (algorithm not in state.metadata.checksums or state.metadata.checksum_type == "COMPOSITE"):
                sums = {algorithm: hash_source(context, state, algorithm, 0, state.size)}
        request = objects.CopyRequest(
            source_bucket, source_key, context.request.bucket, context.key,
            metadata=object_metadata(context, owner, acl) if directive == "REPLACE" else None, owner=owner, acl=stored_acl,
            storage_class=wanted_class, tags=tags,
            source_conditions=conditions(context, "x-amz-copy-source-"), conditions=conditions(context), checksums=sums,
            expected_source=(state.inode.number, state.inode.version),
        )  # fmt: skip

        def commit(
            tx: MetadataTransaction, request: objects.CopyRequest = request
        ) -> tuple[Inode, ObjectMetadata, list[Rule]]:
            inode = objects.copy(tx, request)
            return inode, objects.metadata_of(tx, inode), lifecycle.get(tx, bucket.inode)

        try:
            inode, metadata, rules = context.volume.mutate(commit)
            break
        except TryAgain:
            continue
    parts = [element(f"Checksum{name}", value) for name, value in metadata.checksums.items()]
    if parts:
        parts.append(element("ChecksumType", metadata.checksum_type or "FULL_OBJECT"))
    return xml(
        document(
            "CopyObjectResult",
            element("LastModified", iso_date(inode.mtime_ns)),
            element("ETag", f'"{inode.etag_text}"'),
            *parts,
        ),
        headers=dict(tier_handlers.expiration(rules, context.key, inode.mtime_ns, inode.size, metadata.tags)),
    )


# -- delete -----------------------------------------------------------------------------------------------------------


def delete_object(context: Context) -> Awaitable[Answer]:
    _writable(context)
    check_key(context.key)
    version_id(context)
    wanted = conditions(context)

    def commit(tx: MetadataTransaction) -> None:
        objects.delete(tx, context.bucket(tx), context.key, wanted)

    return _delete(context, commit, conditional=wanted.if_match is not None)


async def _delete(context: Context, commit: Callable[[MetadataTransaction], None], *, conditional: bool) -> Answer:
    try:
        await context.waits.mutate(commit, frees=True)
    except NoSuchKey:
        if not conditional:
            raise
        raise S3Error("NoSuchKey") from None
    return empty(204)


def delete_objects(context: Context) -> Answer:
    with context.volume.snapshot() as reader:
        access.check_bucket(context.bucket(reader), context.identity, access.WRITE)
    tree_root = parse(read_document(context, DELETE_BYTES_MAX), "Delete")
    quiet = False
    entries: list[Element] = []
    for child in tree_root:
        if child.tag == "Object":
            only(child, ("Key", "VersionId", "ETag", "LastModifiedTime", "Size"))
            entries.append(child)
        elif child.tag == "Quiet":
            quiet = (child.text or "").strip().lower() == "true"
        else:
            raise S3Error("MalformedXML", f"Delete has an unknown element {child.tag!r}")
    if not 1 <= len(entries) <= DELETE_KEYS_MAX:
        raise S3Error("MalformedXML", f"Delete lists from 1 to {DELETE_KEYS_MAX} objects")
    outcomes: list[str] = []
    for at in range(0, len(entries), _DELETE_BATCH):
        outcomes += _delete_batch(context, entries[at : at + _DELETE_BATCH], quiet=quiet)
    return xml(document("DeleteResult", *outcomes))


def _delete_batch(context: Context, entries: list[Element], *, quiet: bool) -> list[str]:
    wanted = [_entry(entry) for entry in entries]

    def commit(tx: MetadataTransaction) -> list[StratumError | None]:
        bucket = context.bucket(tx)
        results: list[StratumError | None] = []
        for key, version, condition in wanted:
            try:
                tree.check_key(key)
                if version not in {None, "null"}:
                    raise S3Error("NoSuchVersion")
                objects.delete(tx, bucket, key, condition)
                results.append(None)
            except StratumError as error:
                results.append(error)
        return results

    results = context.volume.mutate(commit, frees=True)
    lines = []
    told = context.details.setdefault("keys", [])
    for (key, version, _), error in zip(wanted, results, strict=True):
        told.append([key.decode("utf-8", "backslashreplace"), "deleted" if error is None else code_of(error)])
        named = element("Key", key.decode("utf-8", "replace")) + element("VersionId", version)
        if error is not None:
            lines.append(
                f"<Error>{named}{element('Code', code_of(error))}{element('Message', message_of(error))}</Error>"
            )
        elif not quiet:
            lines.append(f"<Deleted>{named}</Deleted>")
    return lines


def _entry(entry: Element) -> tuple[bytes, str | None, Conditions]:
    child = entry.find("Key")
    if child is None or not child.text:
        raise S3Error("MalformedXML", "an Object to delete has no Key")
    etag, when, size = text(entry, "ETag"), text(entry, "LastModifiedTime"), text(entry, "Size")
    condition = NO_CONDITIONS
    if etag or when or size:
        moment_s = dates.any_form(when) if when else None
        match_size = numerals.whole(size) if size else None
        if (when and moment_s is None) or (size and match_size is None):
            raise S3Error("MalformedXML", "an Object to delete has a malformed LastModifiedTime or Size")
        condition = Conditions(if_match=etag or None, match_size=match_size, match_last_modified_s=moment_s)
    # An empty VersionId is none.
    return child.text.encode(), text(entry, "VersionId") or None, condition
