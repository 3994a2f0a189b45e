"""Which S3 requests the audit log has, and what it says of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stratum import buckets
from stratum.errors import StratumError

if TYPE_CHECKING:
    from stratum.audit import AuditLog
    from stratum.s3.request import S3Request
    from stratum.transaction import InodeReader

_REFUSED = frozenset((401, 403))
_NOBODY = frozenset(("", "-"))


def is_wanted(reader: InodeReader, request: S3Request) -> bool:
    """Whether a request is recorded however it ends: whatever may change something, and reads of buckets that say so."""
    if request.method not in {"GET", "HEAD"}:
        return True
    if not request.bucket:
        return False
    try:
        return buckets.get(reader, request.bucket).audit_reads
    except StratumError:
        return False


def gets_record(log: AuditLog, scope: dict[str, Any], user: str, status: int, *, wanted: bool) -> bool:
    """What `is_wanted`, and whoever tried what is not theirs, reads included; of strangers some, and the rest as a count."""
    if status not in _REFUSED:
        return wanted
    client = scope.get("client")
    return user not in _NOBODY or not log.is_only_counted(client[0] if client else "-")


def event(
    scope: dict[str, Any], request: S3Request | None, operation: str, user: str, status: int, request_id: str, details: dict[str, Any]
) -> dict[str, Any]:  # fmt: skip
    client = scope.get("client")
    found: dict[str, Any] = {
        "face": "s3", "who": user or "-", "from": f"{client[0]}:{client[1]}" if client else "-", "operation": operation or "Refused",
        "status": status, "request_id": request_id,
    }  # fmt: skip
    if request is None:
        return {**found, "path": str(scope["path"])}
    if request.bucket:
        found["bucket"] = request.bucket
    if request.key is not None:
        found["key"] = request.key.decode("utf-8", "backslashreplace")
    source = request.fields.get("x-amz-copy-source")
    if source:
        found["source"] = source
    return {**found, **details}
