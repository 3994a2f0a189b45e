"""The request headers and query parameters that S3 knows: none of them is ignored, whatever the call.

Source: Amazon S3 API reference. What is not here S3 does not know either, and a server ignores it, as S3 does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stratum import checksums

if TYPE_CHECKING:
    from collections.abc import Mapping

CONDITIONS = frozenset(("if-match", "if-none-match", "if-modified-since", "if-unmodified-since"))
WITHOUT_VALIDATORS = CONDITIONS - {"if-match"}
"""Conditions that hold of a resource with neither entity tag nor date (RFC 9110, 13.1): honoured where there is none."""
CHECKSUMS = frozenset(f"x-amz-checksum-{name.lower()}" for name in checksums.ALGORITHMS)
BODY = CHECKSUMS | {"x-amz-sdk-checksum-algorithm", "x-amz-trailer"}
"""What `Body` verifies a payload with."""
COPY_SOURCE = frozenset((
    "x-amz-copy-source", "x-amz-source-expected-bucket-owner", *(f"x-amz-copy-source-{name}" for name in CONDITIONS),
))  # fmt: skip
ATTRIBUTES = frozenset(("x-amz-acl", "x-amz-storage-class", "x-amz-tagging"))
"""What a new object is given, beside x-amz-meta-*."""
BYPASS = frozenset(("x-amz-bypass-governance-retention",))
"""Nothing is under retention, so there is nothing to pass by."""

_UNBUILT_FAMILIES = (
    "x-amz-server-side-encryption", "x-amz-copy-source-server-side-encryption", "x-amz-object-lock-", "x-amz-bucket-object-lock-",
    "x-amz-grant-", "x-amz-rename-source", "x-amz-fwd-", "x-amz-if-match-", "x-amz-object-if-",
)  # fmt: skip
_FAMILIES = (*_UNBUILT_FAMILIES, "x-amz-meta-", "x-amz-checksum-", "x-amz-copy-source-")
_UNBUILT = CONDITIONS | frozenset((
    "content-range", "x-amz-bucket-namespace", "x-amz-create-session-mode", "x-amz-mfa", "x-amz-object-annotation-directive",
    "x-amz-object-ownership", "x-amz-optional-object-attributes", "x-amz-website-redirect-location", "x-amz-write-offset-bytes",
))  # fmt: skip
KNOWN = _UNBUILT | BODY | COPY_SOURCE | ATTRIBUTES | BYPASS | frozenset((
    "x-amz-checksum-algorithm", "x-amz-checksum-mode", "x-amz-checksum-type", "x-amz-client-token",
    "x-amz-confirm-remove-self-bucket-access", "x-amz-expected-bucket-owner", "x-amz-max-parts", "x-amz-metadata-directive",
    "x-amz-mp-object-size", "x-amz-object-attributes", "x-amz-part-number-marker", "x-amz-request-payer", "x-amz-request-route",
    "x-amz-request-token", "x-amz-skip-destination-validation", "x-amz-tagging-directive",
    "x-amz-transition-default-minimum-object-size",
))  # fmt: skip
ASKS_FOR_NOTHING: Mapping[str, frozenset[str]] = {
    "x-amz-bucket-namespace": frozenset(("global",)),
    "x-amz-bucket-object-lock-enabled": frozenset(("false", "False", "FALSE")),
    "x-amz-checksum-type": frozenset(("FULL_OBJECT",)),  # of what is whole
    "x-amz-object-annotation-directive": frozenset(("COPY", "EXCLUDE")),  # no object has any
    "x-amz-object-lock-legal-hold": frozenset(("OFF",)),
    "x-amz-object-ownership": frozenset(("ObjectWriter",)),  # the writer owns an object
    "x-amz-server-side-encryption-bucket-key-enabled": frozenset(("false", "False", "FALSE")),
}
"""Values that say what is so without them."""

OVERRIDES = frozenset((
    "response-cache-control", "response-content-disposition", "response-content-encoding", "response-content-language",
    "response-content-type", "response-expires",
))  # fmt: skip
LISTING = frozenset(("prefix", "delimiter", "encoding-type", "max-keys"))
PARAMETERS = OVERRIDES | LISTING | frozenset((
    "annotation-prefix", "annotationName", "bucket-region", "continuation-token", "fetch-owner", "key-marker", "list-type", "marker",
    "max-annotation-results", "max-buckets", "max-directory-buckets", "max-parts", "max-uploads", "part-number-marker", "partNumber",
    "select-type", "start-after", "upload-id-marker", "uploadId", "version-id-marker", "versionId",
))  # fmt: skip
"""Without sub-resources, which are the routes', and without `id`, which clients also use for purposes of their own."""


def is_known(name: str) -> bool:
    return name in KNOWN or name.startswith(_FAMILIES)


def is_unbuilt(name: str) -> bool:
    """Whether a call that does not honour it would do something else than asked for, rather than be asked in the wrong place."""
    return name in _UNBUILT or name.startswith(_UNBUILT_FAMILIES)
