"""The table from the engine's errors to S3's codes, and the S3 errors that only HTTP knows.

Codes and statuses: Amazon S3 API reference, "Error responses". What S3 has no code for is chosen as noted.
"""

from __future__ import annotations

from stratum import errors as engine

STATUS = {
    "AccessDenied": 403, "AuthorizationHeaderMalformed": 400, "AuthorizationQueryParametersError": 400, "BadDigest": 400, "BadRequest": 400,
    "BucketAlreadyExists": 409, "BucketAlreadyOwnedByYou": 409, "BucketNotEmpty": 409, "EntityTooLarge": 400, "EntityTooSmall": 400,
    "ExpectationFailed": 417, "HTTPVersionNotSupported": 505, "RequestURITooLong": 414,
    "IllegalVersionConfigurationException": 400, "IncompleteBody": 400, "InsufficientStorage": 507, "InternalError": 500, "InvalidAccessKeyId": 403,
    "InvalidArgument": 400, "InvalidBucketName": 400, "InvalidChunkSizeError": 403, "InvalidDigest": 400, "InvalidLocationConstraint": 400, "InvalidObjectState": 403, "InvalidPart": 400,
    "InvalidPartNumber": 416, "InvalidPartOrder": 400, "InvalidRange": 416, "InvalidRequest": 400, "InvalidURI": 400, "InvalidStorageClass": 400, "InvalidTag": 400, "KeyTooLongError": 400,
    "MalformedACLError": 400, "MalformedTrailerError": 400, "MalformedXML": 400, "MaxMessageLengthExceeded": 400, "MetadataTooLarge": 400,
    "MethodNotAllowed": 405, "MissingContentLength": 411, "NoSuchBucket": 404, "NoSuchKey": 404, "NoSuchLifecycleConfiguration": 404, "NoSuchTagSet": 404, "NoSuchUpload": 404, "NoSuchVersion": 404,
    "NotImplemented": 501, "NotModified": 304, "PreconditionFailed": 412, "QuotaExceeded": 403, "RequestHeaderSectionTooLarge": 400, "RestoreAlreadyInProgress": 409, "RequestTimeTooSkewed": 403, "RequestTimeout": 400,
    "ServiceUnavailable": 503, "SignatureDoesNotMatch": 403, "SlowDown": 503, "UserKeyMustBeSpecified": 400, "XAmzContentChecksumMismatch": 400,
    "XAmzContentSHA256Mismatch": 400,
}  # fmt: skip


class S3Error(engine.StratumError):
    """A request that S3 refuses with this code. `extra` becomes elements of the XML body."""

    def __init__(self, code: str, message: str, **extra: str) -> None:
        super().__init__(message)
        self.code = code
        self.status = STATUS[code]
        self.extra = extra


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


def code_of(error: engine.StratumError) -> str:
    if isinstance(error, S3Error):
        return error.code
    return TABLE[type(error)]


def not_implemented(what: str) -> S3Error:
    return S3Error("NotImplemented", f"{what} is not implemented by this server")
