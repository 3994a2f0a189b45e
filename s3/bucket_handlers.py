"""CreateBucket, HeadBucket, DeleteBucket, GetBucketLocation, and the canned ACLs of buckets and objects."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from stratum import buckets, objects
from stratum.errors import BucketExists
from stratum.s3 import access
from stratum.s3.access import BUCKET_ACLS
from stratum.s3.answer import Answer, empty, xml
from stratum.s3.body import read_document
from stratum.s3.context import Context, canned_acl, check_key, owner_element, version_id
from stratum.s3.errors import S3Error, not_implemented
from stratum.s3.xml import document, element, parse, text

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

    from stratum.schema import BucketRow
    from stratum.transaction import InodeReader, MetadataTransaction

ALL_USERS = "http://acs.amazonaws.com/groups/global/AllUsers"
SIGNED_USERS = "http://acs.amazonaws.com/groups/global/AuthenticatedUsers"
_XSI = 'xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"'
_REGION = re.compile(r"EU|[a-z]{2}-[a-z-]{4,24}-[0-9]")
_GRANTS = {
    "private": (),
    "public-read": ((ALL_USERS, "READ"),),
    "public-read-write": ((ALL_USERS, "READ"), (ALL_USERS, "WRITE")),
    "authenticated-read": ((SIGNED_USERS, "READ"),),
}


def create_bucket(context: Context) -> Answer:
    owner = context.require_user()
    name = context.request.bucket
    buckets.check_name(name)
    acl = canned_acl(context, for_object=False)
    region = ""
    if context.request.has_body:
        body = read_document(context)
        if body:
            region = _location(context, parse(body, "CreateBucketConfiguration"))

    def commit(tx: MetadataTransaction) -> None:
        try:
            buckets.create(tx, name, owner, acl=acl, region=region)
        except BucketExists as error:
            if error.owner != owner:
                raise
            if buckets.get(tx, name).acl != acl:
                raise S3Error(
                    "BucketAlreadyExists", f"the bucket {name!r} is yours already, with another ACL; use PutBucketAcl"
                ) from None

    context.volume.mutate(commit)
    return empty(200, {"Location": f"/{name}"})


def _location(context: Context, root: Element) -> str:
    for child in root:
        if child.tag != "LocationConstraint":
            raise not_implemented(f"{child.tag} of CreateBucketConfiguration")
    region = text(root, "LocationConstraint") or ""
    if region not in {"", context.config.s3_region, "us-east-1"}:
        here = context.config.s3_region
        if not _REGION.fullmatch(region):
            raise S3Error(
                "InvalidLocationConstraint", f"'{region}' is no region; expecting '{here}'", LocationConstraint=region
            )
        raise S3Error(
            "IllegalLocationConstraintException",
            f"The {region} location constraint is incompatible for the region specific endpoint this request was sent"
            f" to; expecting '{here}'",
            LocationConstraint=region,
        )
    return region


def head_bucket(context: Context) -> Answer:
    with context.snapshot() as reader:
        bucket = context.bucket(reader)
    access.check_bucket(bucket, context.identity, access.READ)
    return empty(200, {"x-amz-bucket-region": context.config.s3_region, "Content-Type": "application/xml"})


def delete_bucket(context: Context) -> Answer:
    def commit(tx: MetadataTransaction) -> None:
        require_owner(context, context.bucket(tx))
        buckets.remove(tx, context.request.bucket)

    context.volume.mutate(commit, frees=True)
    return empty(204)


def require_owner(context: Context, bucket: BucketRow) -> None:
    access.require_owner(bucket, context.identity)


def get_location(context: Context) -> Answer:
    with context.snapshot() as reader:
        bucket = context.bucket(reader)
    access.check_bucket(bucket, context.identity, access.READ)
    region = bucket.region or ("" if context.config.s3_region == "us-east-1" else context.config.s3_region)
    return xml(document("LocationConstraint", region))


def get_versioning(context: Context) -> Answer:
    """Versioning was never switched on: S3 says so with an empty document."""
    with context.snapshot() as reader:
        access.check_bucket(context.bucket(reader), context.identity, access.READ)
    return xml(document("VersioningConfiguration"))


# -- ACLs -------------------------------------------------------------------------------------------------------------


def _acl_document(context: Context, reader: InodeReader, owner: str, bucket_owner: str, acl: str) -> bytes:
    def user(user_id: str) -> str:
        return owner_element(context, reader, user_id, tag="Grantee").replace(
            "<Grantee>", f'<Grantee {_XSI} xsi:type="CanonicalUser">'
        )

    # In the order the field's servers use: groups first, the owner last.
    grants = [
        f'<Grantee {_XSI} xsi:type="Group">{element("URI", uri)}</Grantee>{element("Permission", what)}'
        for uri, what in _GRANTS.get(acl, ())
    ]
    if acl in {"bucket-owner-read", "bucket-owner-full-control"} and bucket_owner != owner:
        grants.append(
            user(bucket_owner) + element("Permission", "READ" if acl == "bucket-owner-read" else "FULL_CONTROL")
        )
    grants.append(user(owner) + element("Permission", "FULL_CONTROL"))
    items = "".join(f"<Grant>{grant}</Grant>" for grant in grants)
    return document(
        "AccessControlPolicy", owner_element(context, reader, owner), f"<AccessControlList>{items}</AccessControlList>"
    )


def get_bucket_acl(context: Context) -> Answer:
    with context.snapshot() as reader:
        bucket = context.bucket(reader)
        access.check_bucket(bucket, context.identity, access.READ_ACL)
        return xml(_acl_document(context, reader, bucket.owner, bucket.owner, bucket.acl))


def get_object_acl(context: Context) -> Answer:
    with context.snapshot() as reader:
        bucket = context.bucket(reader)
        check_key(context.key)
        version_id(context)
        state = objects.head(reader, bucket, context.key)
        access.check_object(bucket, state.metadata, context.identity, access.READ_ACL)
        return xml(
            _acl_document(
                context, reader, state.metadata.owner or bucket.owner, bucket.owner, state.metadata.acl or "private"
            )
        )


def _wanted_acl(context: Context, owner: str, *, for_object: bool) -> str:
    """From x-amz-acl, or from a body whose grants are those of a canned ACL."""
    body = read_document(context) if context.request.has_body else b""
    header = context.header("x-amz-acl")
    if header is not None:
        if body:
            raise S3Error("InvalidRequest", "x-amz-acl and a body exclude each other")
        return canned_acl(context, for_object=for_object)
    if not body:
        raise S3Error("MalformedACLError", "an ACL comes as x-amz-acl or as a body")
    root = parse(body, "AccessControlPolicy")
    found: set[tuple[str, str]] = set()
    owner_keeps_all = False
    for grant in root.iterfind("AccessControlList/Grant"):
        permission, grantee = text(grant, "Permission"), grant.find("Grantee")
        if grantee is None or permission not in {"READ", "WRITE", "READ_ACP", "WRITE_ACP", "FULL_CONTROL"}:
            raise S3Error("MalformedACLError", "a Grant needs a Grantee and a Permission")
        uri, user_id = text(grantee, "URI"), text(grantee, "ID")
        if user_id == owner and permission == "FULL_CONTROL":
            owner_keeps_all = True
            continue
        found.add((uri or f"user {user_id}", permission))
    for acl in BUCKET_ACLS if owner_keeps_all else ():
        if found == set(_GRANTS[acl]):
            return acl
    raise not_implemented("an ACL whose grants are not those of a canned ACL")


def put_bucket_acl(context: Context) -> Answer:
    with context.snapshot() as reader:
        bucket = context.bucket(reader)
    access.check_bucket(bucket, context.identity, access.WRITE_ACL)
    acl = _wanted_acl(context, bucket.owner, for_object=False)
    context.volume.mutate(lambda tx: buckets.change(tx, context.request.bucket, acl=acl))
    return empty(200)


def put_object_acl(context: Context) -> Answer:
    with context.snapshot() as reader:
        bucket = context.bucket(reader)
        check_key(context.key)
        version_id(context)
        state = objects.head(reader, bucket, context.key)
    access.check_object(bucket, state.metadata, context.identity, access.WRITE_ACL)
    acl = _wanted_acl(context, state.metadata.owner or bucket.owner, for_object=True)
    context.volume.mutate(
        lambda tx: objects.set_acl(tx, context.bucket(tx), context.key, "" if acl == "private" else acl)
    )
    return empty(200)
