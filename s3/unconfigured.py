"""What reading and removing a bucket's configuration answers where there is none, and there never is: AWS's own words.

Terraform, consoles and scanners read all of it and go on at these codes. Writing is not implemented, so nothing that they
set can be taken for set.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from stratum.s3.answer import Answer, empty, xml
from stratum.s3.errors import S3Error
from stratum.s3.xml import document, element

if TYPE_CHECKING:
    from collections.abc import Callable

    from stratum.s3.context import Context

MISSING = {
    "policy": "NoSuchBucketPolicy",
    "policyStatus": "NoSuchBucketPolicy",
    "cors": "NoSuchCORSConfiguration",
    "encryption": "ServerSideEncryptionConfigurationNotFoundError",
    "object-lock": "ObjectLockConfigurationNotFoundError",
    "publicAccessBlock": "NoSuchPublicAccessBlockConfiguration",
    "replication": "ReplicationConfigurationNotFoundError",
    "website": "NoSuchWebsiteConfiguration",
    "ownershipControls": "OwnershipControlsNotFoundError",
    "metadataTable": "MetadataConfigurationNotFound",
    "metadataConfiguration": "MetadataConfigurationNotFound",
}
EMPTY = {
    "logging": ("BucketLoggingStatus", ""),
    "notification": ("NotificationConfiguration", ""),
    "accelerate": ("AccelerateConfiguration", ""),
    "requestPayment": ("RequestPaymentConfiguration", element("Payer", "BucketOwner")),
    "abac": ("AbacStatus", element("Status", "Disabled")),
}
LISTED = {
    "analytics": "ListBucketAnalyticsConfigurationResult",
    "inventory": "ListInventoryConfigurationsResult",
    "metrics": "ListMetricsConfigurationsResult",
    "intelligent-tiering": "ListBucketIntelligentTieringConfigurationsOutput",
}


def _missing(name: str, _context: Context) -> Answer:
    raise S3Error(MISSING[name])


def _empty(name: str, _context: Context) -> Answer:
    root, content = EMPTY[name]
    return xml(document(root, content))


def _listed(name: str, context: Context) -> Answer:
    if "id" in context.query:
        return no_such_configuration(context)
    return xml(document(LISTED[name], element("IsTruncated", value=False)))


def no_such_configuration(_context: Context) -> Answer:
    raise S3Error("NoSuchConfiguration")


def reader_of(name: str) -> Callable[[Context], Answer]:
    """What answers `GET ?name`."""
    return partial(_missing if name in MISSING else _empty if name in EMPTY else _listed, name)


def removed(_context: Context) -> Answer:
    """Removing what is not there succeeds, as on S3."""
    return empty(204)


def no_object_lock(_context: Context) -> Answer:
    """Retention and legal hold of an object: its bucket has no Object Lock."""
    raise S3Error("InvalidRequest", "Bucket is missing Object Lock Configuration")
