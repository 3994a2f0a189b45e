"""What each case of ceph/s3-tests is about, and why those that fail do.

A case belongs to the first area whose pattern its name matches; what no pattern matches is the core: objects, buckets,
names, listings, multipart uploads, copies, ranges, conditions, checksums, tags, canned ACLs, anonymous and presigned
access, and headers. The patterns are those of commit 8f0ae7b4 (2026-05-07).
"""

from __future__ import annotations

import re

CORE = "core"
AREAS: dict[str, str] = {
    "bucket logging": "logging",
    "encryption": "encrypt|sse_|enc_conflict|copy_enc|copy_part_enc",
    "object lock": "object_lock",
    "versions": "version|noncur|delete_marker|current_(object_)?if_|put_current|object_put_acl_mtime",
    "POST forms": "post_object",
    "CORS": "cors",
    "bucket policies": "policy|tags_acl_public|tags_obj_public",
    "public access block": "public_block|block_public|public_acls",
    "object ownership": "ownership|create_bucket_object_writer|create_bucket_bucket_owner",
    "lifecycle and restore": "lifecycle|restore_object|read_through",
    "grants": "acl_grant|header_acl|acl_revoke|put_bucket_acl_grant|acl_full_control|object_acl_(read|write)|copy_not_owned_object_bucket",
    "torrents": "torrent",
}
"""Area to the pattern of its cases' names, in the order in which they are tried."""
_AREAS = [(area, re.compile(pattern)) for area, pattern in AREAS.items()]

_HARNESS = (
    "The case removes or sets a header before botocore signs, which puts it back; the suite marks it fails_on_rgw."
)
REASONS: dict[str, str] = {
    "account_usage|head_bucket_usage|bucket_head_extended": "Ceph's own extension: usage counts in x-rgw headers.",
    "list(v2)?_unordered": "Ceph's own extension: the parameter allow-unordered, which S3 ignores.",
    "create_bad_contentlength_none|create_bad_authorization_(empty|none)|create_bad_date_none_aws2": _HARNESS,
    "create_bad_authorization_(incorrect|invalid)_aws2": _HARNESS,
    "object_read_unreadable": "botocore sends the key in UTF-8, so it is a key like others, which does not exist.",
    "list_prefix_unreadable": "Prefix is among what encoding-type encodes; botocore asks for it and does not decode it in version 1.",
    "set_get_unicode_metadata": "botocore sends UTF-8 and reads Latin-1; the bytes of a metadata header come back as they were sent.",
    "use_cksum_helper_sha|get_multipart_checksum_object_attributes": "GetObjectAttributes of S3 leaves the count of parts out of a composite checksum.",
    "test_delete_object_if_match$": "AWS documents no 204 for a conditional delete of a missing key; a condition on nothing is not met.",
}
"""Pattern of core cases that fail, to the reason."""
_REASONS = [(re.compile(pattern), reason) for pattern, reason in REASONS.items()]


def area_of(case: str) -> str:
    return next((area for area, pattern in _AREAS if pattern.search(case)), CORE)


def reason_of(case: str) -> str:
    """Why a core case fails, "" if nothing says so."""
    return next((reason for pattern, reason in _REASONS if pattern.search(case)), "")
