"""What Amazon S3 says for each of its codes: what clients match, translate and show.

Every message begins with one of these: with that of `WORDING`, and in brackets what this server has to add, or with one that
S3 has for a case of its own. Source: Amazon S3 API reference, "Error responses", and the service's answers.
"""

from __future__ import annotations

_XML = "The XML you provided was not well-formed or did not validate against our published schema"

WORDING = {
    "AccessDenied": "Access Denied",
    "AccessForbidden": "CORSResponse: CORS is not enabled for this bucket.",
    "AuthorizationHeaderMalformed": "The authorization header is malformed",
    "AuthorizationQueryParametersError": "The authorization query parameters that you provided are not valid.",
    "BadDigest": "The Content-MD5 or checksum value that you specified did not match what the server received.",
    "BadRequest": "Bad Request",
    "BucketAlreadyExists": (
        "The requested bucket name is not available. The bucket namespace is shared by all users of the"
        " system. Please select a different name and try again."
    ),
    "BucketAlreadyOwnedByYou": "Your previous request to create the named bucket succeeded and you already own it.",
    "BucketNotEmpty": "The bucket you tried to delete is not empty",
    "EntityTooLarge": "Your proposed upload exceeds the maximum allowed size",
    "EntityTooSmall": "Your proposed upload is smaller than the minimum allowed size",
    "HTTPVersionNotSupported": "The HTTP version specified is not supported.",
    "IllegalLocationConstraintException": "The unspecified location constraint is incompatible",
    "IllegalVersionConfigurationException": "The versioning configuration specified in the request is invalid.",
    "IncompleteBody": "You did not provide the number of bytes specified by the Content-Length HTTP header",
    "InsufficientStorage": "There is not enough free space to carry out the request.",
    "InternalError": "We encountered an internal error. Please try again.",
    "InvalidAccessKeyId": "The AWS Access Key Id you provided does not exist in our records.",
    "InvalidArgument": "Invalid Argument",
    "InvalidBucketName": "The specified bucket is not valid.",
    "InvalidChunkSizeError": "Only the last chunk is allowed to have a size less than 8192 bytes",
    "InvalidDigest": "The Content-MD5 you specified was invalid.",
    "InvalidLocationConstraint": "The specified location-constraint is not valid",
    "InvalidObjectState": "The operation is not valid for the current state of the object.",
    "InvalidPart": (
        "One or more of the specified parts could not be found. The part may not have been uploaded, or"
        " the specified entity tag may not match the part's entity tag."
    ),
    "InvalidPartNumber": "The requested partnumber is not satisfiable",
    "InvalidPartOrder": "The list of parts was not in ascending order. Parts must be ordered by part number.",
    "InvalidRange": "The requested range is not satisfiable",
    "InvalidRequest": "Invalid Request",
    "InvalidStorageClass": "The storage class you specified is not valid",
    "InvalidTag": "The tag provided was not a valid tag.",
    "InvalidURI": "Couldn't parse the specified URI.",
    "KeyTooLongError": "Your key is too long",
    "MalformedACLError": _XML,
    "MalformedTrailerError": (
        "The request contained trailing data that was not well-formed or did not conform to our published schema."
    ),
    "MalformedXML": _XML,
    "MaxMessageLengthExceeded": "Your request was too large.",
    "MetadataConfigurationNotFound": "The metadata configuration was not found",
    "MetadataTooLarge": "Your metadata headers exceed the maximum allowed metadata size",
    "MethodNotAllowed": "The specified method is not allowed against this resource.",
    "MissingContentLength": "You must provide the Content-Length HTTP header.",
    "NoSuchBucket": "The specified bucket does not exist",
    "NoSuchBucketPolicy": "The bucket policy does not exist",
    "NoSuchCORSConfiguration": "The CORS configuration does not exist",
    "NoSuchConfiguration": "The specified configuration does not exist.",
    "NoSuchObjectLockConfiguration": "The specified object does not have a ObjectLock configuration",
    "NoSuchPublicAccessBlockConfiguration": "The public access block configuration was not found",
    "NoSuchWebsiteConfiguration": "The specified bucket does not have a website configuration",
    "ObjectLockConfigurationNotFoundError": "Object Lock configuration does not exist for this bucket",
    "OwnershipControlsNotFoundError": "The bucket ownership controls were not found",
    "ReplicationConfigurationNotFoundError": "The replication configuration was not found",
    "ServerSideEncryptionConfigurationNotFoundError": "The server side encryption configuration was not found",
    "NoSuchKey": "The specified key does not exist.",
    "NoSuchLifecycleConfiguration": "The lifecycle configuration does not exist",
    "NoSuchTagSet": "The TagSet does not exist",
    "NoSuchUpload": (
        "The specified upload does not exist. The upload ID may be invalid, or the upload may have been"
        " aborted or completed."
    ),
    "NoSuchVersion": "The specified version does not exist.",
    "NotImplemented": "A header you provided implies functionality that is not implemented",
    "NotModified": "Not Modified",
    "PreconditionFailed": "At least one of the pre-conditions you specified did not hold",
    "QuotaExceeded": "The quota of the bucket or of its owner is exceeded.",
    "RequestHeaderSectionTooLarge": "Your request header section exceeds the maximum allowed size",
    "RequestURITooLong": "The request URI is too long.",
    "InvalidToken": "The provided token is malformed or otherwise not valid.",
    "RequestTimeTooSkewed": "The difference between the request time and the current time is too large.",
    "RequestTimeout": (
        "Your socket connection to the server was not read from or written to within the timeout"
        " period. Idle connections will be closed."
    ),
    "RestoreAlreadyInProgress": "Object restore is already in progress",
    "ServiceUnavailable": "Service is unable to handle request.",
    "SignatureDoesNotMatch": (
        "The request signature we calculated does not match the signature you provided. Check your key"
        " and signing method."
    ),
    "SlowDown": "Please reduce your request rate.",
    "UserKeyMustBeSpecified": (
        "The bucket POST must contain the specified field name. If it is specified, check the order of the fields."
    ),
    "XAmzContentChecksumMismatch": "The provided 'x-amz-checksum' header does not match what was computed.",
    "XAmzContentSHA256Mismatch": "The provided 'x-amz-content-sha256' header does not match what was computed.",
}
SPECIAL: dict[str, tuple[str, ...]] = {
    "AccessDenied": ("There were headers present in the request which were not signed", "There were query parameters"),
    "InvalidBucketName": ("The specified bucket is not valid",),
    "RequestHeaderSectionTooLarge": ("Your request header section exceeds",),
    "SlowDown": ("Reduce your request rate",),
    "AuthorizationQueryParametersError": ("Error parsing the X-Amz-Credential parameter",),
    "BadDigest": (
        "Value for x-amz-",
        "The Content-MD5 you specified did not match what we received.",
        "The upload was created using the",
        "The ",
    ),
    "BadRequest": ("Insufficient information.",),
    "IllegalLocationConstraintException": ("The ",),
    "IncompleteBody": ("The request body terminated unexpectedly",),
    "InvalidArgument": (
        "Part number must be an integer between 1 and",
        "Argument ",
        "Invalid Encoding Method specified in Request",
        "Invalid attribute name specified.",
        "The continuation token provided is incorrect",
        "The x-amz-copy-source-range value must be of the form",
        "Header value cannot be represented using ISO-8859-1.",
        "Conflicting query string parameters:",
        "Invalid List Type",
        "Metadata cannot be specified in this context.",
        "The header ",
        "This operation does not accept ",
    ),
    "InvalidRange": ("Range specified is not valid for source object",),
    "InvalidRequest": (
        "Checksum Type mismatch occurred",
        "Checksum algorithm provided is unsupported.",
        "Expecting a single x-amz-checksum- header.",
        "Missing required header for this request",
        "The COMPOSITE checksum type cannot be used",
        "The FULL_OBJECT checksum type cannot be used",
        "Bucket is missing Object Lock Configuration",
        "The algorithm type you specified in x-amz-checksum- header is invalid.",
        "The encryption parameters are not applicable to this object.",
        "The authorization mechanism you have provided is not supported.",
        "The provided 'x-amz-mp-object-size' header value",
        "The upload was created using a",
        "The x-amz-checksum-type header can only be used",
        "This copy request is illegal",
        "Value for x-amz-",
    ),
}
"""How the messages of special cases begin."""


def worded(code: str, detail: str = "") -> str:
    """S3's sentence for the code, with what there is to add in brackets."""
    wording = WORDING.get(code, code)
    if not detail:
        return wording
    if detail.startswith((wording, *SPECIAL.get(code, ()))):
        return detail
    return f"{wording} ({detail})"
