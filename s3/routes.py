"""One table of S3's calls: what carries each out, who may make it, and the parameters and headers it honours.

A parameter or header that S3 knows and a call does not is refused, never ignored: what it asked for would not be done. One
that S3 does not know is ignored, as S3 does. A call without a handler is S3's and not built: 501.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stratum.s3 import (
    access,
    bucket_handlers,
    gates,
    list_handlers,
    multipart_handlers,
    object_read,
    object_write,
    tag_handlers,
    tier_handlers,
    unconfigured,
)
from stratum.s3.errors import S3Error, method_not_allowed, not_implemented
from stratum.s3.headers import (
    ASKS_FOR_NOTHING,
    ATTRIBUTES,
    BODY,
    BYPASS,
    CHECKSUMS,
    CONDITIONS,
    COPY_SOURCE,
    LISTING,
    OVERRIDES,
    PARAMETERS,
    WITHOUT_VALIDATORS,
    is_known,
    is_unbuilt,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from stratum.s3.answer import Answer
    from stratum.s3.context import Context
    from stratum.s3.gates import Gate
    from stratum.s3.request import S3Request

    Handler = Callable[[Context], Answer | Awaitable[Answer]]

INTERNAL_BUCKET = "_stratum"
"""No bucket can have this name: what is ours alone stands below it."""
SERVICE, BUCKET, OBJECT = "service", "bucket", "object"
METHODS = ("GET", "HEAD", "PUT", "POST", "DELETE")
_SAFE = frozenset(("GET", "HEAD"))
_EVERYWHERE = frozenset(("x-amz-request-payer",))
_PLAIN = frozenset((
    "accept", "accept-encoding", "amz-sdk-invocation-id", "amz-sdk-request", "authorization", "cache-control", "connection",
    "content-encoding", "content-length", "content-md5", "content-type", "date", "expect", "host", "if-range", "range",
    "transfer-encoding", "user-agent", "x-amz-content-sha256", "x-amz-date", "x-amz-decoded-content-length", "x-amz-user-agent",
))  # fmt: skip
"""Headers of nearly every request that this table has nothing to say about."""


@dataclass(slots=True, frozen=True, kw_only=True)
class Route:
    """A call. `in_loop`: it is called in the loop's thread and asks who may make it itself, before anything else."""

    operation: str
    gate: Gate
    handler: Handler | None = None
    parameters: frozenset[str] = frozenset()
    headers: frozenset[str] = frozenset()
    metadata: bool = False
    in_loop: bool = False
    common: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "common", self.headers | _PLAIN)

    def refusal(self, request: S3Request) -> S3Error | None:
        """Why the call cannot be made as the request asks for it."""
        if self.handler is None:
            return not_implemented(self.operation)
        if not request.fields.keys() <= self.common:
            for name, value in request.fields.items():
                if name not in self.common and is_known(name):
                    error = self._refused_header(request, name, value)
                    if error is not None:
                        return error
        if request.raw_query:
            for name in request.query:
                if name in PARAMETERS and name not in self.parameters:
                    return S3Error(
                        "InvalidArgument",
                        f"This operation does not accept the query parameter {name}. The request was taken for {self.operation}.",
                        ArgumentName=name,
                        ArgumentValue=request.query[name],
                    )
        return None

    def _refused_header(self, request: S3Request, name: str, value: str) -> S3Error | None:
        if value in ASKS_FOR_NOTHING.get(name, ()):
            return None
        if name.startswith("x-amz-meta-"):
            if self.metadata:
                return None
            return S3Error("InvalidArgument", "Metadata cannot be specified in this context.", ArgumentName=name)
        if name.startswith("x-amz-checksum-"):
            if name in BODY or is_known_checksum_header(name):
                return S3Error("InvalidRequest", f"{self.operation} does not accept the header {name}.")
            return S3Error(
                "InvalidRequest", "The algorithm type you specified in x-amz-checksum- header is invalid.", Header=name
            )
        if request.method in _SAFE and name.startswith("x-amz-server-side-encryption"):
            return S3Error(
                "InvalidRequest", "The encryption parameters are not applicable to this object.", Header=name
            )
        if is_unbuilt(name):
            return S3Error("NotImplemented", Header=name)
        return S3Error(
            "InvalidArgument",
            f"The header {name} cannot be specified in this context. The request was taken for {self.operation}.",
            ArgumentName=name,
            ArgumentValue=value,
        )


def is_known_checksum_header(name: str) -> bool:
    return name in {"x-amz-checksum-algorithm", "x-amz-checksum-mode", "x-amz-checksum-type"}


TABLE: dict[tuple[str, str, str], Route] = {}
"""By method, kind of resource and sub-resource."""
_LIST, _READ = gates.bucket(access.READ), gates.of_object(access.READ)
_WRITE = gates.bucket(access.WRITE)
_VERSION = frozenset(("versionId",))


def _add(
    method: str,
    resource: str,
    sub: str,
    operation: str,
    handler: Handler | None,
    gate: Gate,
    *,
    headers: Iterable[str] = (),
    parameters: Iterable[str] = (),
    metadata: bool = False,
    in_loop: bool = False,
    document: bool = False,
) -> None:
    """`document`: the call takes one, which is verified as every body is."""
    honoured = _EVERYWHERE.union(headers)
    if operation not in {"ListBuckets", "CreateBucket", "Explain"}:
        honoured |= {"x-amz-expected-bucket-owner"}
    if document:
        honoured |= BODY
    if method in _SAFE:
        honoured |= {*WITHOUT_VALIDATORS, "content-range"}
    elif method == "DELETE":
        honoured |= {"content-range"}
    TABLE[method, resource, sub] = Route(
        operation=operation, gate=gate, handler=handler, headers=honoured, parameters=frozenset({sub, *parameters}), metadata=metadata,
        in_loop=in_loop,
    )  # fmt: skip


def _service() -> None:
    _add(
        "GET", SERVICE, "", "ListBuckets", list_handlers.list_buckets, gates.anybody, in_loop=True,
        parameters=("max-buckets", "continuation-token", "prefix", "bucket-region"),
    )  # fmt: skip


def _buckets() -> None:
    _add(
        "GET",
        BUCKET,
        "",
        "ListObjects",
        list_handlers.list_objects,
        _LIST,
        in_loop=True,
        parameters={*LISTING, "marker", "list-type"},
    )
    _add(
        "GET", BUCKET, "list-type", "ListObjectsV2", list_handlers.list_objects_v2, _LIST, in_loop=True,
        parameters={*LISTING, "continuation-token", "fetch-owner", "start-after"},
    )  # fmt: skip
    _add(
        "GET", BUCKET, "versions", "ListObjectVersions", list_handlers.list_versions, _LIST, in_loop=True,
        parameters={*LISTING, "key-marker", "version-id-marker"},
    )  # fmt: skip
    _add(
        "GET", BUCKET, "uploads", "ListMultipartUploads", multipart_handlers.list_uploads, _LIST,
        parameters=("delimiter", "encoding-type", "key-marker", "max-uploads", "prefix", "upload-id-marker"),
    )  # fmt: skip
    _add("HEAD", BUCKET, "", "HeadBucket", bucket_handlers.head_bucket, _LIST, in_loop=True)
    _add(
        "PUT", BUCKET, "", "CreateBucket", bucket_handlers.create_bucket, gates.signed, headers=("x-amz-acl",),
        document=True,
    )  # fmt: skip
    _add("DELETE", BUCKET, "", "DeleteBucket", bucket_handlers.delete_bucket, gates.owner)
    _add(
        "POST", BUCKET, "delete", "DeleteObjects", object_write.delete_objects, _WRITE, headers=BYPASS,
        document=True,
    )  # fmt: skip
    _add("GET", BUCKET, "location", "GetBucketLocation", bucket_handlers.get_location, _LIST)
    _add("GET", BUCKET, "versioning", "GetBucketVersioning", bucket_handlers.get_versioning, _LIST)
    _add("PUT", BUCKET, "versioning", "PutBucketVersioning", None, gates.owner)
    _add("GET", BUCKET, "acl", "GetBucketAcl", bucket_handlers.get_bucket_acl, gates.bucket(access.READ_ACL))
    _add(
        "PUT", BUCKET, "acl", "PutBucketAcl", bucket_handlers.put_bucket_acl, gates.bucket(access.WRITE_ACL), headers=("x-amz-acl",),
        document=True,
    )  # fmt: skip
    _add("GET", BUCKET, "lifecycle", "GetBucketLifecycleConfiguration", tier_handlers.get_lifecycle, gates.owner)
    _add(
        "PUT", BUCKET, "lifecycle", "PutBucketLifecycleConfiguration", tier_handlers.put_lifecycle, gates.owner, document=True,
        headers=("x-amz-transition-default-minimum-object-size",),
    )  # fmt: skip
    _add("DELETE", BUCKET, "lifecycle", "DeleteBucketLifecycle", tier_handlers.delete_lifecycle, gates.owner)
    _add("GET", BUCKET, "tagging", "GetBucketTagging", tag_handlers.get_bucket_tagging, gates.owner)
    _add("PUT", BUCKET, "tagging", "PutBucketTagging", tag_handlers.put_bucket_tagging, gates.owner, document=True)
    _add("DELETE", BUCKET, "tagging", "DeleteBucketTagging", tag_handlers.delete_bucket_tagging, gates.owner)


_CONFIGURATIONS = {
    "policy": "BucketPolicy", "policyStatus": "BucketPolicyStatus", "cors": "BucketCors", "encryption": "BucketEncryption",
    "object-lock": "ObjectLockConfiguration", "publicAccessBlock": "PublicAccessBlock", "replication": "BucketReplication",
    "website": "BucketWebsite", "ownershipControls": "BucketOwnershipControls", "metadataTable": "BucketMetadataTableConfiguration",
    "metadataConfiguration": "BucketMetadataConfiguration", "logging": "BucketLogging", "notification": "BucketNotificationConfiguration",
    "accelerate": "BucketAccelerateConfiguration", "requestPayment": "BucketRequestPayment", "abac": "BucketAbac",
    "analytics": "BucketAnalyticsConfiguration", "inventory": "BucketInventoryConfiguration", "metrics": "BucketMetricsConfiguration",
    "intelligent-tiering": "BucketIntelligentTieringConfiguration",
}  # fmt: skip


def _configurations() -> None:
    """What a bucket never has here: reading says so, writing is not built."""
    for name, what in _CONFIGURATIONS.items():
        listed = name in unconfigured.LISTED
        more = ("id", "continuation-token") if listed else ()
        _add("GET", BUCKET, name, f"Get{what}", unconfigured.reader_of(name), gates.owner, parameters=more)
        _add("PUT", BUCKET, name, f"Put{what}", None, gates.owner, parameters=more)
        remove = unconfigured.no_such_configuration if listed else unconfigured.removed
        _add("DELETE", BUCKET, name, f"Delete{what}", remove, gates.owner, parameters=more)
    for name in ("policyStatus", "object-lock", "logging", "notification", "accelerate", "requestPayment", "abac"):
        del TABLE["DELETE", BUCKET, name]
    del TABLE["PUT", BUCKET, "policyStatus"]
    for name in ("metadataTable", "metadataConfiguration"):
        TABLE["POST", BUCKET, name] = TABLE.pop(("PUT", BUCKET, name))
    for name in ("metadataInventoryTable", "metadataJournalTable", "metadataAnnotationTable"):
        _add("PUT", BUCKET, name, "UpdateBucketMetadataTableConfiguration", None, gates.owner)
    _add("GET", BUCKET, "session", "CreateSession", None, _LIST)


def _objects() -> None:
    reading = CONDITIONS | {"x-amz-checksum-mode"}
    for method, operation, handler in (
        ("GET", "GetObject", object_read.get_object),
        ("HEAD", "HeadObject", object_read.head_object),
    ):
        _add(
            method, OBJECT, "", operation, handler, _READ, headers=reading, in_loop=True,
            parameters={*OVERRIDES, "versionId", "partNumber"},
        )  # fmt: skip
    _add(
        "GET", OBJECT, "attributes", "GetObjectAttributes", object_read.get_object_attributes, _READ, parameters=_VERSION,
        headers={*CONDITIONS, "x-amz-object-attributes", "x-amz-max-parts", "x-amz-part-number-marker"},
    )  # fmt: skip
    _add(
        "PUT", OBJECT, "", "PutObject", object_write.put_object, _WRITE, metadata=True, in_loop=True,
        headers={*ATTRIBUTES, *BODY, "x-amz-checksum-algorithm", "if-match", "if-none-match", "if-unmodified-since"},
    )  # fmt: skip
    _add(
        "PUT", OBJECT, _COPY, "CopyObject", object_write.copy_object, _WRITE, metadata=True,
        headers={
            *ATTRIBUTES, *COPY_SOURCE, "x-amz-checksum-algorithm", "x-amz-metadata-directive", "x-amz-tagging-directive", "if-match",
            "if-none-match", "if-unmodified-since",
        },
    )  # fmt: skip
    _add(
        "DELETE", OBJECT, "", "DeleteObject", object_write.delete_object, _WRITE, parameters=_VERSION, in_loop=True,
        headers={*BYPASS, "if-match", "if-unmodified-since", "x-amz-if-match-size", "x-amz-if-match-last-modified-time"},
    )  # fmt: skip
    _add(
        "GET",
        OBJECT,
        "acl",
        "GetObjectAcl",
        bucket_handlers.get_object_acl,
        gates.of_object(access.READ_ACL),
        parameters=_VERSION,
    )
    _add(
        "PUT", OBJECT, "acl", "PutObjectAcl", bucket_handlers.put_object_acl, gates.of_object(access.WRITE_ACL), parameters=_VERSION,
        headers=("x-amz-acl",), document=True,
    )  # fmt: skip
    _add("GET", OBJECT, "tagging", "GetObjectTagging", tag_handlers.get_object_tagging, gates.tags, parameters=_VERSION)
    _add(
        "PUT", OBJECT, "tagging", "PutObjectTagging", tag_handlers.put_object_tagging, gates.tags, parameters=_VERSION,
        document=True,
    )  # fmt: skip
    _add(
        "DELETE",
        OBJECT,
        "tagging",
        "DeleteObjectTagging",
        tag_handlers.delete_object_tagging,
        gates.tags,
        parameters=_VERSION,
    )
    _add(
        "POST", OBJECT, "restore", "RestoreObject", tier_handlers.restore_object, _WRITE, parameters=_VERSION,
        document=True,
    )  # fmt: skip
    for name in ("retention", "legal-hold"):
        what = "ObjectRetention" if name == "retention" else "ObjectLegalHold"
        _add("GET", OBJECT, name, f"Get{what}", unconfigured.no_object_lock, _READ, parameters=_VERSION)
        _add("PUT", OBJECT, name, f"Put{what}", None, _WRITE)
    for method, name, operation in (
        ("GET", "torrent", "GetObjectTorrent"),
        ("GET", "annotation", "GetObjectAnnotation"),
        ("PUT", "annotation", "PutObjectAnnotation"),
        ("DELETE", "annotation", "DeleteObjectAnnotation"),
        ("POST", "select", "SelectObjectContent"),
        ("PUT", "renameObject", "RenameObject"),
        ("PUT", "encryption", "UpdateObjectEncryption"),
        ("POST", "append", "AppendObject"),
    ):
        _add(method, OBJECT, name, operation, None, _LIST if method == "GET" else _WRITE)


def _uploads() -> None:
    part = ("partNumber",)
    _add(
        "POST", OBJECT, "uploads", "CreateMultipartUpload", multipart_handlers.create_upload, _WRITE, metadata=True,
        headers={*ATTRIBUTES, "x-amz-checksum-algorithm", "x-amz-checksum-type"},
    )  # fmt: skip
    _add(
        "PUT", OBJECT, "uploadId", "UploadPart", multipart_handlers.upload_part, _WRITE, parameters=part, in_loop=True,
        headers={*BODY, "x-amz-checksum-algorithm"},
    )  # fmt: skip
    _add(
        "PUT", OBJECT, _COPY_PART, "UploadPartCopy", multipart_handlers.upload_part_copy, _WRITE, parameters={*part, "uploadId"},
        headers={*COPY_SOURCE, "x-amz-copy-source-range"},
    )  # fmt: skip
    _add(
        "POST", OBJECT, "uploadId", "CompleteMultipartUpload", multipart_handlers.complete_upload, _WRITE,
        headers={*CHECKSUMS, "x-amz-checksum-type", "x-amz-mp-object-size", "if-match", "if-none-match", "if-unmodified-since"},
    )  # fmt: skip
    _add("DELETE", OBJECT, "uploadId", "AbortMultipartUpload", multipart_handlers.abort_upload, _WRITE)
    _add(
        "GET", OBJECT, "uploadId", "ListParts", multipart_handlers.list_parts, gates.parts,
        parameters=("max-parts", "part-number-marker"),
    )  # fmt: skip


_COPY, _COPY_PART = " copy", " copy part"
"""No query can name them: they are told from PutObject and UploadPart by x-amz-copy-source."""
_service()
_buckets()
_configurations()
_objects()
_uploads()
_EXPLAIN = Route(operation="Explain", gate=gates.signed, handler=tier_handlers.internal, headers=_EVERYWHERE)
SUBRESOURCES = frozenset(sub for _, _, sub in TABLE if sub and not sub.startswith(" ")) - {"list-type"}


def find(request: S3Request) -> Route | S3Error:
    """The call that a request makes, or why it makes none."""
    method = request.method
    if method == "OPTIONS":
        return _preflight(request)
    if not request.bucket:
        resource = SERVICE
    elif request.key is None:
        resource = BUCKET
    elif request.bucket == INTERNAL_BUCKET:
        return _EXPLAIN
    else:
        resource = OBJECT
    sub = ""
    if request.raw_query:
        found = [name for name in request.query if name in SUBRESOURCES]
        if len(found) > 1:
            return S3Error(
                "InvalidArgument",
                f"Conflicting query string parameters: {', '.join(sorted(found))}",
                ResourceType=found[0],
            )
        sub = found[0] if found else ""
        if not sub and method == "GET" and resource == BUCKET and request.query.get("list-type"):
            if request.query["list-type"] != "2":
                return S3Error("InvalidArgument", "Invalid List Type: it is 2", ArgumentName="list-type")
            sub = "list-type"
    if resource == OBJECT and method == "PUT" and "x-amz-copy-source" in request.fields:
        sub = {"": _COPY, "uploadId": _COPY_PART}.get(sub, sub)
    route = TABLE.get((method, resource, sub))
    return route if route is not None else _not_allowed(request, resource, sub)


def allowed(resource: str, sub: str) -> tuple[str, ...]:
    """The methods of a resource."""
    return tuple(method for method in METHODS if (method, resource, sub) in TABLE)


def _not_allowed(request: S3Request, resource: str, sub: str) -> S3Error:
    if request.method == "POST" and resource == BUCKET and not sub:
        if (request.header("content-type") or "").lower().startswith("multipart/form-data"):
            return not_implemented("POST of a form")
        return S3Error(
            "PreconditionFailed",
            Condition="Bucket POST must be of the enclosure-type multipart/form-data",
        )
    return method_not_allowed(request.method, (sub or resource).strip().upper(), allowed(resource, sub))


def _preflight(request: S3Request) -> S3Error:
    for name, field_name in (("Origin", "origin"), ("Access-Control-Request-Method", "access-control-request-method")):
        if not request.header(field_name):
            return S3Error("BadRequest", f"Insufficient information. {name} request header needed.")
    return S3Error("AccessForbidden")
