"""Who may make a call: asked before the call's document is read and before it is said what exists.

A gate takes the context and a snapshot, returns if the caller may go on and raises `S3Error` AccessDenied otherwise. It
lets a caller pass who may list the bucket and names a key that is not there; to everybody else that is AccessDenied, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stratum import multipart, objects
from stratum.errors import NoSuchKey, NoSuchUpload
from stratum.s3 import access
from stratum.s3.errors import S3Error

if TYPE_CHECKING:
    from collections.abc import Callable

    from stratum.s3.context import Context
    from stratum.schema import BucketRow
    from stratum.transaction import InodeReader

    Gate = Callable[[Context, InodeReader], None]


def anybody(_context: Context, _reader: InodeReader) -> None:
    """For calls that say nothing, or that show callers what is theirs."""


def signed(context: Context, _reader: InodeReader) -> None:
    context.require_user()


def bucket(what: str) -> Gate:
    def gate(context: Context, reader: InodeReader) -> None:
        access.check_bucket(context.bucket(reader), context.identity, what)

    return gate


def owner(context: Context, reader: InodeReader) -> None:
    access.require_owner(context.bucket(reader), context.identity)


def _state(context: Context, reader: InodeReader) -> tuple[BucketRow, objects.ObjectState | None]:
    found = context.bucket(reader)
    try:
        return found, objects.head(reader, found, context.key)
    except NoSuchKey:
        access.check_bucket(found, context.identity, access.READ)
        return found, None


def of_object(what: str) -> Gate:
    def gate(context: Context, reader: InodeReader) -> None:
        row, state = _state(context, reader)
        if state is not None:
            access.check_object(row, state.metadata, context.identity, what)

    return gate


def tags(context: Context, reader: InodeReader) -> None:
    row, state = _state(context, reader)
    if state is not None and not access.may_use_tags(row, state.metadata, context.identity):
        raise S3Error("AccessDenied")


def parts(context: Context, reader: InodeReader) -> None:
    """ListParts is for the bucket's owner and who began the upload; the right to read a bucket does not include it."""
    row, identity = context.bucket(reader), context.identity
    if access.is_owner(row, identity):
        return
    access.check_bucket(row, identity, access.WRITE)
    try:
        upload = multipart.get(reader, row, context.key, context.query.get("uploadId", ""))
    except NoSuchUpload:
        return
    if not identity.anonymous and upload.owner != identity.user_id:
        raise S3Error("AccessDenied")
