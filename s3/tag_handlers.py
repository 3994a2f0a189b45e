"""Get, Put and Delete of the tags of objects and buckets.

Tags are for whoever owns the bucket or the object: a canned ACL that lets everybody read the bytes says nothing about them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stratum import buckets, objects, tags
from stratum.s3 import access
from stratum.s3.answer import Answer, empty, xml
from stratum.s3.body import read_document
from stratum.s3.bucket_handlers import require_owner
from stratum.s3.context import version_id
from stratum.s3.errors import S3Error
from stratum.s3.object_read import look_up
from stratum.s3.xml import document, element, only, parse

if TYPE_CHECKING:
    from stratum.objects import ObjectState
    from stratum.s3.context import Context
    from stratum.transaction import InodeReader, MetadataTransaction


def _sent(context: Context, count_max: int) -> dict[str, str]:
    """The tags of a Tagging document. Raises `S3Error` MalformedXML or `InvalidTag`."""
    root = parse(read_document(context), "Tagging")
    only(root, ("TagSet",))
    found = root.find("TagSet")
    if found is None:
        raise S3Error("MalformedXML", "Tagging has a TagSet")
    pairs = []
    for tag in found:
        if tag.tag != "Tag":
            raise S3Error("MalformedXML", f"TagSet has an unknown element {tag.tag!r}")
        only(tag, ("Key", "Value"))
        key, value = tag.find("Key"), tag.find("Value")
        if key is None or value is None:
            raise S3Error("MalformedXML", "a Tag has a Key and a Value")
        pairs.append((key.text or "", value.text or ""))
    return tags.collect(pairs, count_max)


def _document(found: dict[str, str]) -> bytes:
    items = "".join(
        f"<Tag>{element('Key', key)}{element('Value', value)}</Tag>" for key, value in sorted(found.items())
    )
    return document("Tagging", f"<TagSet>{items}</TagSet>")


# -- objects ----------------------------------------------------------------------------------------------------------


def _object(context: Context, reader: InodeReader) -> ObjectState:
    bucket, state = look_up(context, reader)
    if not access.may_use_tags(bucket, state.metadata, context.identity):
        raise S3Error("AccessDenied")
    version_id(context)
    return state


def get_object_tagging(context: Context) -> Answer:
    with context.volume.snapshot() as reader:
        return xml(_document(_object(context, reader).metadata.tags))


def _change(context: Context, found: dict[str, str], *, frees: bool = False) -> None:
    def commit(tx: MetadataTransaction) -> None:
        _object(context, tx)
        objects.set_tags(tx, context.bucket(tx), context.key, found)

    context.volume.mutate(commit, frees=frees)


def put_object_tagging(context: Context) -> Answer:
    _change(context, _sent(context, tags.OBJECT_TAGS_MAX))
    return empty(200)


def delete_object_tagging(context: Context) -> Answer:
    _change(context, {}, frees=True)
    return empty(204)


# -- buckets ----------------------------------------------------------------------------------------------------------


def get_bucket_tagging(context: Context) -> Answer:
    with context.volume.snapshot() as reader:
        bucket = context.bucket(reader)
    require_owner(context, bucket)
    if not bucket.tags:
        raise S3Error("NoSuchTagSet")
    return xml(_document(bucket.tags))


def _change_bucket(context: Context, found: dict[str, str], *, frees: bool = False) -> None:
    def commit(tx: MetadataTransaction) -> None:
        bucket = context.bucket(tx)
        require_owner(context, bucket)
        buckets.check_writable(bucket)
        buckets.change(tx, context.request.bucket, tags=found)

    context.volume.mutate(commit, frees=frees)


def put_bucket_tagging(context: Context) -> Answer:
    _change_bucket(context, _sent(context, tags.BUCKET_TAGS_MAX))
    return empty(204)


def delete_bucket_tagging(context: Context) -> Answer:
    _change_bucket(context, {}, frees=True)
    return empty(204)
