"""Who may do what: canned ACLs, ownership, and the operator's `--anonymous` switch. Mode bits of the mount play no part."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stratum.s3.errors import S3Error

if TYPE_CHECKING:
    from stratum.s3.auth import Identity
    from stratum.schema import BucketRow, ObjectMetadata

READ, WRITE, READ_ACL, WRITE_ACL = "read", "write", "read-acp", "write-acp"
BUCKET_ACLS = ("private", "public-read", "public-read-write", "authenticated-read")
OBJECT_ACLS = (*BUCKET_ACLS, "bucket-owner-read", "bucket-owner-full-control", "aws-exec-read")
_ALL = frozenset((READ,))
_GRANTS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    # canned ACL -> (what everybody may, what every signed user may)
    "": (frozenset(), frozenset()),
    "private": (frozenset(), frozenset()),
    "public-read": (_ALL, _ALL),
    "public-read-write": (frozenset((READ, WRITE)), frozenset((READ, WRITE))),
    "authenticated-read": (frozenset(), _ALL),
    "bucket-owner-read": (frozenset(), frozenset()),
    "bucket-owner-full-control": (frozenset(), frozenset()),
    "aws-exec-read": (frozenset(), frozenset()),
}


def _granted(acl: str, identity: Identity, what: str) -> bool:
    everybody, signed = _GRANTS[acl]
    return what in (everybody if identity.anonymous else signed)


def _by_switch(bucket: BucketRow, what: str) -> bool:
    return bucket.anonymous == "read-write" or (bucket.anonymous == "read" and what == READ)


def is_owner(bucket: BucketRow, identity: Identity) -> bool:
    """Administrators own every bucket."""
    return identity.admin or (identity.user is not None and identity.user_id == bucket.owner)


def require_owner(bucket: BucketRow, identity: Identity) -> None:
    if not is_owner(bucket, identity):
        raise S3Error("AccessDenied")


def may_use_bucket(bucket: BucketRow, identity: Identity, what: str) -> bool:
    """READ lists, WRITE puts and deletes objects."""
    if is_owner(bucket, identity):
        return True
    if what in {READ, WRITE} and _by_switch(bucket, what):
        return True
    return _granted(bucket.acl, identity, what)


def may_use_object(bucket: BucketRow, metadata: ObjectMetadata, identity: Identity, what: str) -> bool:
    owner = metadata.owner or bucket.owner
    if identity.admin or (identity.user is not None and identity.user_id == owner):
        return True
    if what == READ and _by_switch(bucket, READ):
        return True
    if (
        identity.user is not None
        and identity.user_id == bucket.owner
        and metadata.acl in {"bucket-owner-read", "bucket-owner-full-control"}
    ):
        return metadata.acl == "bucket-owner-full-control" or what in {READ, READ_ACL}
    return _granted(metadata.acl, identity, what)


def may_use_tags(bucket: BucketRow, metadata: ObjectMetadata, identity: Identity) -> bool:
    """Canned ACLs and switches grant nothing here, as on S3."""
    if identity.admin:
        return True
    return identity.user is not None and identity.user_id in {bucket.owner, metadata.owner or bucket.owner}


def check_bucket(bucket: BucketRow, identity: Identity, what: str) -> None:
    if not may_use_bucket(bucket, identity, what):
        raise S3Error("AccessDenied")


def check_object(bucket: BucketRow, metadata: ObjectMetadata, identity: Identity, what: str) -> None:
    if not may_use_object(bucket, metadata, identity, what):
        raise S3Error("AccessDenied")
