"""The table from the engine's errors to S3's codes, and the S3 errors that only HTTP knows.

Codes and statuses: Amazon S3 API reference, "Error responses". What S3 has no code for is chosen as noted.
"""

from __future__ import annotations

from stratum import errors as engine
from stratum.s3.wording import worded

STATUS = {
    "AccessDenied": 403, "AuthorizationHeaderMalformed": 400, "AuthorizationQueryParametersError": 400, "BadDigest": 400, "BadRequest": 400,
    "BucketAlreadyExists": 409, "BucketAlreadyOwnedByYou": 409, "BucketNotEmpty": 409, "EntityTooLarge": 400, "EntityTooSmall": 400,
    "HTTPVersionNotSupported": 505, "IllegalLocationConstraintException": 400, "RequestURITooLong": 414,
    "IllegalVersionConfigurationException": 400, "IncompleteBody": 400, "InsufficientStorage": 507, "InternalError": 500, "InvalidAccessKeyId": 403,
    "InvalidArgument": 400, "InvalidBucketName": 400, "InvalidChunkSizeError": 403, "InvalidDigest": 400, "InvalidLocationConstraint": 400, "InvalidObjectState": 403, "InvalidPart": 400,
    "InvalidPartNumber": 416, "InvalidPartOrder": 400, "InvalidRange": 416, "InvalidRequest": 400, "InvalidURI": 400, "InvalidStorageClass": 400, "InvalidTag": 400, "KeyTooLongError": 400,
    "MalformedACLError": 400, "MalformedTrailerError": 400, "MalformedXML": 400, "MaxMessageLengthExceeded": 400, "MetadataTooLarge": 400,
    "MethodNotAllowed": 405, "MissingContentLength": 411, "NoSuchBucket": 404, "NoSuchKey": 404, "NoSuchLifecycleConfiguration": 404, "NoSuchTagSet": 404, "NoSuchUpload": 404, "NoSuchVersion": 404,
    "NotImplemented": 501, "NotModified": 304, "PreconditionFailed": 412, "QuotaExceeded": 403, "RequestHeaderSectionTooLarge": 400, "RestoreAlreadyInProgress": 409, "RequestTimeTooSkewed": 403, "RequestTimeout": 400,
    "ServiceUnavailable": 503, "SignatureDoesNotMatch": 403, "SlowDown": 503, "UserKeyMustBeSpecified": 400, "XAmzContentChecksumMismatch": 400,
    "XAmzContentSHA256Mismatch": 400,
    "AccessForbidden": 403, "InvalidToken": 400, "MetadataConfigurationNotFound": 404, "NoSuchBucketPolicy": 404, "NoSuchCORSConfiguration": 404,
    "NoSuchConfiguration": 404, "NoSuchPublicAccessBlockConfiguration": 404, "NoSuchWebsiteConfiguration": 404,
    "ObjectLockConfigurationNotFoundError": 404, "OwnershipControlsNotFoundError": 404, "ReplicationConfigurationNotFoundError": 404, "ServerSideEncryptionConfigurationNotFoundError": 404,
}  # fmt: skip


class S3Error(engine.StratumError):
    """A request that S3 refuses with this code. `extra` becomes elements of the XML body, `headers` headers of it.

    `message` may be empty; what it says goes behind S3's own words for the code.
    """

    def __init__(self, code: str, message: str = "", **extra: str) -> None:
        super().__init__(worded(code, message))
        self.code = code
        self.status = STATUS[code]
        self.extra = extra
        self.headers: tuple[tuple[str, str], ...] = ()


TABLE: dict[type[engine.StratumError], str] = {
    engine.StratumError: "InternalError",
    engine.NotFound: "NoSuchKey",
    engine.Gone: "NoSuchKey",
    engine.NoSuchBucket: "NoSuchBucket",
    engine.NoSuchKey: "NoSuchKey",
    engine.NoSuchUpload: "NoSuchUpload",
    engine.NoSuchUser: "AccessDenied",
    engine.NoSuchAccessKey: "InvalidAccessKeyId",
    engine.NoSuchAttribute: "NoSuchKey",
    engine.Exists: "PreconditionFailed",
    engine.BucketExists: "BucketAlreadyExists",
    engine.NotADirectory: "InvalidArgument",
    engine.IsADirectory: "InvalidArgument",
    engine.DirectoryNotEmpty: "BucketNotEmpty",
    engine.BucketNotEmpty: "BucketNotEmpty",
    engine.NameTooLong: "KeyTooLongError",
    engine.KeyTooLong: "KeyTooLongError",
    engine.InvalidName: "InvalidArgument",
    engine.InvalidBucketName: "InvalidBucketName",
    engine.InvalidArgument: "InvalidArgument",
    engine.InvalidRequest: "InvalidRequest",
    engine.InvalidTag: "InvalidTag",
    engine.InvalidPart: "InvalidPart",
    engine.InvalidPartOrder: "InvalidPartOrder",
    engine.EntityTooSmall: "EntityTooSmall",
    engine.ChecksumMismatch: "BadDigest",
    engine.InvalidRange: "InvalidRange",
    engine.PreconditionFailed: "PreconditionFailed",
    engine.NotModified: "NotModified",
    engine.NotPermitted: "AccessDenied",
    engine.CrossDevice: "InvalidArgument",
    engine.AccessRefused: "AccessDenied",
    engine.ReadOnlyBucket: "AccessDenied",
    engine.NoSpace: "InsufficientStorage",
    engine.QuotaExceeded: "QuotaExceeded",
    engine.TooManyLinks: "InvalidArgument",
    engine.DataDamaged: "InternalError",
    engine.StorageFailed: "InternalError",
    engine.StoreDamaged: "InternalError",
    engine.TierUnavailable: "ServiceUnavailable",
    engine.NeedsRestore: "InvalidObjectState",
    engine.ForeignRemote: "InternalError",
    engine.SessionDead: "ServiceUnavailable",
    engine.Busy: "SlowDown",
    engine.UnfinishedMount: "InternalError",
    engine.ConfigInvalid: "InternalError",
    engine.VolumeInvalid: "InternalError",
    engine.BackupDamaged: "InternalError",
    engine.TooManyRequests: "SlowDown",
    engine.AuditUnavailable: "ServiceUnavailable",
    engine.NotImplementedYet: "NotImplemented",
    engine.TryAgain: "SlowDown",
    engine.StillFilling: "SlowDown",
}


_TELLING = frozenset((
    engine.BucketNotEmpty, engine.ChecksumMismatch, engine.EntityTooSmall, engine.InvalidArgument, engine.InvalidBucketName,
    engine.InvalidName, engine.InvalidPart, engine.InvalidPartOrder, engine.InvalidRequest, engine.InvalidTag, engine.KeyTooLong,
    engine.NotImplementedYet, engine.QuotaExceeded, engine.TooManyRequests,
))  # fmt: skip
"""The engine's errors about what the client sent. The messages of others are the operator's: they name disks and commands."""
_INSIDE = ("`", " --", "stratum ")
"""What only a message to the operator has: a command, an option."""


_FACTS = {
    "size": "ProposedSize",
    "size_min": "MinSizeAllowed",
    "upload_id": "UploadId",
    "part_number": "PartNumber",
    "etag": "ETag",
}
"""What the engine's errors know, by the element of S3's document that says it."""


def code_of(error: engine.StratumError) -> str:
    if isinstance(error, S3Error):
        return error.code
    return TABLE[type(error)]


def message_of(error: engine.StratumError) -> str:
    """What the client is told: S3's words for the code, and nothing of the server's inside."""
    if isinstance(error, S3Error):
        return error.message
    detail = error.message if type(error) in _TELLING and not any(mark in error.message for mark in _INSIDE) else ""
    if isinstance(error, engine.ReadOnlyBucket):
        detail = "the bucket is a snapshot, which does not change"
    return worded(code_of(error), detail)


def extra_of(error: engine.StratumError, bucket: str, key: bytes | None) -> dict[str, str]:
    """The elements of the error document beside code and message, as the SDKs read them."""
    found: dict[str, str] = {}
    if isinstance(error, S3Error):
        found.update(error.extra)
    elif isinstance(error, engine.PreconditionFailed):
        found["Condition"] = error.condition
    elif isinstance(error, engine.KeyTooLong):
        found |= {"Size": str(error.facts["key_bytes"]), "MaxSizeAllowed": "1024"}
    elif type(error) in _TELLING or isinstance(error, engine.NoSuchUpload):
        found |= {name: str(error.facts[fact]) for fact, name in _FACTS.items() if fact in error.facts}
    if bucket:
        found.setdefault("BucketName", bucket)
    if key is not None:
        found.setdefault("Key", key.decode("utf-8", "replace"))
    return found


def method_not_allowed(method: str, resource_type: str, allowed: tuple[str, ...]) -> S3Error:
    """405, which names the methods that the resource has (RFC 9110 section 15.5.6)."""
    error = S3Error("MethodNotAllowed", Method=method, ResourceType=resource_type)
    error.headers = (("Allow", ", ".join(allowed)),)
    return error


def not_implemented(what: str) -> S3Error:
    return S3Error("NotImplemented", f"{what} is not implemented by this server")
