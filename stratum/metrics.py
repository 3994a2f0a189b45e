"""Every metric there is: its name with its unit, its help, and the values of its labels.

Counters and histograms are counted where things happen (`counting`); the gauges at the end are read from the volume when
somebody scrapes (`admin.gather`). Names follow Prometheus: base units, `_total` for counters.
"""

from __future__ import annotations

from stratum.counting import Counter, Gauge, Histogram, Metric

S3_OPERATIONS = (
    "ListBuckets", "ListObjects", "ListObjectsV2", "ListObjectVersions", "GetBucketLocation", "GetBucketVersioning",
    "PutBucketVersioning", "GetBucketAcl", "PutBucketAcl", "CreateBucket", "HeadBucket", "DeleteBucket",
    "GetBucketLifecycleConfiguration", "PutBucketLifecycleConfiguration", "DeleteBucketLifecycle", "ListMultipartUploads",
    "DeleteObjects", "GetObject", "HeadObject", "PutObject", "CopyObject", "DeleteObject", "GetObjectAcl", "PutObjectAcl",
    "GetObjectAttributes", "RestoreObject", "CreateMultipartUpload", "UploadPart", "UploadPartCopy", "CompleteMultipartUpload",
    "AbortMultipartUpload", "GetObjectTagging", "PutObjectTagging", "DeleteObjectTagging", "GetBucketTagging",
    "PutBucketTagging", "DeleteBucketTagging", "ListParts", "Explain", "Refused",
)  # fmt: skip
"""S3's calls that are counted apart; "Refused" is what ended before it was one."""
_S3 = (*S3_OPERATIONS, "Other")
FUSE_OPERATIONS = (
    "lookup", "getattr", "setattr", "readlink", "mknod", "mkdir", "unlink", "rmdir", "symlink", "rename", "link", "open", "create", "read",
    "write", "flush", "release", "fsync", "opendir", "readdir", "releasedir", "fsyncdir", "statfs", "setxattr", "getxattr", "listxattr",
    "removexattr", "access", "other",
)  # fmt: skip
_REQUEST_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_DISK_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.5)
_REMOTE_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0)
TIERS = ("hot", "warm", "cold")

S3_REQUESTS = Counter(
    "stratum_s3_requests_total", "S3 requests, counted before the answer's last byte is sent",
    {"operation": _S3, "status": ("2xx", "3xx", "4xx", "5xx")},
)  # fmt: skip
S3_SECONDS = Histogram(
    "stratum_s3_request_seconds",
    "from the request's head until its answer begins",
    {"operation": _S3},
    bounds=_REQUEST_S,
)
S3_IN_FLIGHT = Gauge("stratum_s3_requests_in_flight", "S3 requests that are being answered")
S3_RECEIVED = Counter("stratum_s3_received_bytes_total", "bytes of request bodies")
S3_SENT = Counter("stratum_s3_sent_bytes_total", "bytes of answers' bodies")
S3_LIMITED = Counter(
    "stratum_s3_limited_total", "requests refused by a limit", {"kind": ("buckets", "users", "anonymous")}
)
S3_CONNECTIONS = Gauge("stratum_s3_connections", "open connections to the S3 endpoint")

FUSE_REQUESTS = Counter(
    "stratum_fuse_requests_total", "requests of the kernel to the mounts", {"operation": FUSE_OPERATIONS, "result": ("ok", "error", "fault")}
)  # fmt: skip
FUSE_SECONDS = Histogram(
    "stratum_fuse_request_seconds", "how long the kernel waited", {"operation": FUSE_OPERATIONS}, bounds=_REQUEST_S
)
FUSE_READ = Counter("stratum_fuse_read_bytes_total", "bytes read through mounts, but for what the kernel has cached")
FUSE_WRITTEN = Counter("stratum_fuse_written_bytes_total", "bytes written through mounts")

MUTATIONS = Counter("stratum_mutations_total", "changes of metadata that were committed")
COMMIT_SECONDS = Histogram(
    "stratum_commit_seconds", "one commit of the metadata store, its fsync included", bounds=_DISK_S
)
SYNC_SECONDS = Histogram("stratum_data_sync_seconds", "one fdatasync of a data file", bounds=_DISK_S)
INVALIDATION_SECONDS = Histogram(
    "stratum_invalidation_seconds", "how long a commit waited for the mounts to forget what it replaced", bounds=_DISK_S
)
FENCES = Counter("stratum_mounts_fenced_total", "mounts that did not answer and were ended")

MOVES = Counter("stratum_moves_total", "files moved between tiers", {"to": TIERS, "result": ("moved", "failed")})
MOVED = Counter("stratum_moved_bytes_total", "bytes copied to a tier", {"to": TIERS})
FOUND_BY = ("read", "check", "move", "scrub", "fsck")
DAMAGE = Counter(
    "stratum_damage_found_total", "times that stored bytes were found to be damaged; healing: another copy was good",
    {"by": FOUND_BY, "result": ("healing", "unhealed")},
)  # fmt: skip
HEALED = Counter("stratum_heals_total", "attempts to repair a pack or extent", {"result": ("healed", "failed")})
COLD_REQUESTS = Counter(
    "stratum_cold_requests_total", "requests to remotes",
    {"operation": ("put", "get", "head", "delete", "list", "upload", "restore", "other"), "result": ("ok", "error")},
)  # fmt: skip
COLD_SECONDS = Histogram("stratum_cold_request_seconds", "until a remote answered", bounds=_REMOTE_S)
COLD_SENT = Counter("stratum_cold_sent_bytes_total", "bytes sent to remotes")
COLD_RECEIVED = Counter("stratum_cold_received_bytes_total", "bytes received from remotes")
COLD_BREAKERS = Gauge(
    "stratum_cold_breakers_open", "remotes that a process leaves alone for a while, because they failed"
)
ALERTS = Counter("stratum_alerts_total", "alerts", {"sink": ("webhook", "email"), "result": ("sent", "failed")})
RESTARTS = Counter("stratum_process_restarts_total", "processes that ended by themselves and were started again")

AUDIT_RECORDS = Counter("stratum_audit_records_total", "records of the audit log that were written")
AUDIT_DROPPED = Counter("stratum_audit_dropped_total", "what wanted a record and got none")
AUDIT_FAILING = Gauge("stratum_audit_failing", "processes that cannot write the audit log")

COUNTED: tuple[Metric, ...] = (
    S3_REQUESTS, S3_SECONDS, S3_IN_FLIGHT, S3_RECEIVED, S3_SENT, S3_LIMITED, S3_CONNECTIONS, FUSE_REQUESTS, FUSE_SECONDS, FUSE_READ, FUSE_WRITTEN, MUTATIONS,
    COMMIT_SECONDS, SYNC_SECONDS, INVALIDATION_SECONDS, FENCES, MOVES, MOVED, DAMAGE, HEALED, COLD_REQUESTS, COLD_SECONDS, COLD_SENT, COLD_RECEIVED,
    COLD_BREAKERS, ALERTS, RESTARTS, AUDIT_RECORDS, AUDIT_DROPPED, AUDIT_FAILING,
)  # fmt: skip

GATHERED = {
    "stratum_build_info": "1; the version is a label",
    "stratum_buckets": "buckets",
    "stratum_objects": "objects that S3 shows",
    "stratum_logical_bytes": "bytes of all objects",
    "stratum_bucket_bytes": "bytes of a bucket: the 100 largest, and (other)",
    "stratum_bucket_objects": "objects of a bucket: those of stratum_bucket_bytes",
    "stratum_disk_total_bytes": "size of the file system below a folder for data",
    "stratum_disk_free_bytes": "what ordinary users may still use of it",
    "stratum_disk_free_inodes": "inodes it has left",
    "stratum_disk_up": "1 if a disk of the warm tier is there, 0 if it is missing",
    "stratum_metadata_bytes": "used by the metadata store",
    "stratum_tier_bytes": "bytes that lie in a tier; copies count in each",
    "stratum_packs": "packs of the warm and cold tiers, by state",
    "stratum_repair_queue": "packs that wait to be repaired",
    "stratum_move_queue": "moves somebody asked for",
    "stratum_reclaim_queue": "extents nothing refers to, whose bytes will be given back",
    "stratum_clone_queue": "directories of clones that wait for what they show; those below them are not counted yet",
    "stratum_changes_unread": "changes that a mount has not dropped from its cache yet",
    "stratum_pressure_level": "0 ok, 1 low, 2 high, 3 emergency",
    "stratum_scrub_running": "1 while a pass is under way",
    "stratum_scrub_checked_bytes": "of the pass under way, or of the last one",
    "stratum_damaged": "extents and packs that are damaged and have no good copy",
    "stratum_scrub_damaged": "damage the pass found",
    "stratum_scrub_unhealed": "of it, what could not be healed",
    "stratum_scrub_finished_timestamp_seconds": "when the last pass ended",
    "stratum_backup_timestamp_seconds": "when the metadata was last backed up",
    "stratum_health": "1 for each health code that is raised",
    "stratum_processes": "processes that count, by role",
    "stratum_process_silent_seconds": "the longest time since a beat, by role",
    "stratum_process_memory_bytes": "memory of a role's processes, shared pages divided among their users",
    "stratum_process_open_descriptors": "open descriptors of a role's processes",
}
"""Gauges of the volume: name and help."""
