"""The one error tree of the engine.

A class exists here only if some caller treats it differently from its neighbours. Three tables translate the
tree and nothing else does: `fuse/errors.py` (errno), `s3/errors.py` (S3 code) and `stratum/cli/exit_codes.py`;
`tests/test_error_tables.py` demands a row in each table for every class below.
"""

from __future__ import annotations


class StratumError(Exception):
    """Root of the tree. `message` says what happened, to which thing, and what to do next."""

    def __init__(self, message: str, **facts: object) -> None:
        super().__init__(message)
        self.message = message
        self.facts = facts


class NotFound(StratumError):
    """The named thing is not there: the caller's name is wrong or somebody removed it."""


class Gone(NotFound):
    """An inode that was there lost its last name: whoever holds its number must look the name up again."""


class NoSuchBucket(NotFound):
    def __init__(self, bucket: str) -> None:
        super().__init__(f"bucket {bucket!r} does not exist; `stratum bucket list` shows those that do", bucket=bucket)


class NoSuchKey(NotFound):
    def __init__(self, key: bytes) -> None:
        super().__init__(f"key {key.decode('utf-8', 'replace')!r} does not exist", key=key)


class NoSuchUpload(NotFound):
    def __init__(self, upload_id: str) -> None:
        super().__init__(
            f"multipart upload {upload_id!r} does not exist: it was completed, aborted or never made",
            upload_id=upload_id,
        )


class NoSuchUser(NotFound):
    def __init__(self, name: str) -> None:
        super().__init__(f"user {name!r} does not exist; `stratum user list` shows those that do", name=name)


class NoSuchAccessKey(NotFound):
    def __init__(self, access_key: str) -> None:
        super().__init__(
            f"access key {access_key!r} does not exist; `stratum key list` shows those that do", access_key=access_key
        )


class NoSuchAttribute(NotFound):
    """The extended attribute is not set."""


class Exists(StratumError):
    """The name is taken and the operation does not replace."""


class BucketExists(Exists):
    """The bucket name is taken. `owner` tells the face whether it is the caller's own."""

    def __init__(self, bucket: str, owner: str) -> None:
        super().__init__(f"bucket {bucket!r} exists already", bucket=bucket, owner=owner)
        self.owner = owner


class NotADirectory(StratumError):
    """A path component is a file."""


class IsADirectory(StratumError):
    """The operation wants a file and the name is a directory."""


class DirectoryNotEmpty(StratumError):
    """The directory still has entries."""


class BucketNotEmpty(DirectoryNotEmpty):
    """The bucket still has keys, or special files that S3 does not show; the message names some."""


class NameTooLong(StratumError):
    """A mount name over 255 bytes."""


class KeyTooLong(NameTooLong):
    def __init__(self, key_bytes: int) -> None:
        super().__init__(f"the key has {key_bytes} bytes; 1024 is the most", key_bytes=key_bytes)


class InvalidName(StratumError):
    """A name no face may use: NUL, invalid UTF-8, a reserved alias form."""


class InvalidBucketName(InvalidName):
    def __init__(self, bucket: str) -> None:
        super().__init__(
            f"{bucket!r} is not a bucket name: 3 to 63 of a-z, 0-9, '-' and '.', letters or digits at the ends, not an IP address",
            bucket=bucket,
        )


class InvalidArgument(StratumError):
    """A value outside what the operation takes."""


class InvalidRequest(InvalidArgument):
    """Values that are well-formed each and do not fit each other."""


class InvalidTag(InvalidArgument):
    """A tag that S3 does not allow, one too many, or one key twice."""


class InvalidPart(InvalidArgument):
    """CompleteMultipartUpload names a part that was not uploaded, or with another ETag."""


class InvalidPartOrder(InvalidArgument):
    """CompleteMultipartUpload lists parts that do not ascend."""


class EntityTooSmall(InvalidArgument):
    """A part that is not the last has less than 5 MiB."""


class ChecksumMismatch(InvalidArgument):
    """The checksum a client sent for the whole is not that of its parts."""


class InvalidRange(InvalidArgument):
    """A byte range outside the object."""


class PreconditionFailed(StratumError):
    """The state the caller demanded is not the state there is; nothing was changed."""

    def __init__(self, condition: str) -> None:
        super().__init__(f"the precondition {condition} does not hold; nothing was changed", condition=condition)
        self.condition = condition


class NotModified(StratumError):
    """A conditional read found what the caller already has. `etag` and `mtime_ns` describe it."""

    def __init__(self, etag: str, mtime_ns: int) -> None:
        super().__init__("not modified", etag=etag)
        self.etag = etag
        self.mtime_ns = mtime_ns


class NotPermitted(StratumError):
    """The operation is not allowed on this thing, whoever asks."""


class CrossDevice(StratumError):
    """Rename or link across buckets: copy and delete instead."""


class AccessRefused(StratumError):
    """The caller's user may not do this by the file's permissions."""


class ReadOnlyBucket(StratumError):
    """The bucket is a snapshot: nothing in it changes. Clone it to get a writable one."""


class NoSpace(StratumError):
    """The disks are full down to the reserve. Deletes still work; free space, then try again."""


class QuotaExceeded(StratumError):
    """A quota of the bucket or of its owner would be passed."""


class TooManyLinks(StratumError):
    """A link count would overflow."""


class DataDamaged(StratumError):
    """Stored bytes do not match their checksum and there is no other copy. Nothing wrong was returned."""

    def __init__(self, what: str, where: str, *, pack: int = 0, good_bytes: int = 0) -> None:
        """`pack`: all of that one is lost behind its first `good_bytes`; 0: it is about these bytes alone."""
        super().__init__(
            f"{what} in {where} does not match its checksum and has no other copy; `stratum health damaged` lists the objects it belongs to",
            what=what,
            where=where,
        )
        self.pack = pack
        self.good_bytes = good_bytes


class StorageFailed(StratumError):
    """A disk refused to sync. Nothing more is written; restart after looking at the disk."""


class StoreDamaged(StorageFailed):
    """The metadata store does not fit together, in a way that no crash leaves it. Starting again never helps."""


class TierUnavailable(StratumError):
    """A tier cannot take or give bytes now: disks are missing, a remote does not answer. Nothing was lost; try again later."""


class NeedsRestore(StratumError):
    """The bytes lie in an archive that must be asked for them first: RestoreObject, then wait."""


class ForeignRemote(StratumError):
    """The bucket or prefix belongs to another volume, or to this one's successor. Nothing was written."""


class SessionDead(StratumError):
    """Another process declared this one dead and cleaned up after it; this process must end."""


class Busy(StratumError):
    """Somebody else holds what the operation needs; the message says who."""


class UnfinishedMount(StratumError):
    """A mount could not be made or removed."""


class ConfigInvalid(StratumError):
    """`stratum.toml` has an error; the message names key and nearest known one."""


class VolumeInvalid(StratumError):
    """The directory is not a volume, or one of another format version."""


class BackupDamaged(StratumError):
    """A backup that does not read back as it was written. Nothing was put in place."""


class AuditUnavailable(StratumError):
    """The audit log cannot be written, and nothing is to happen that is not in it."""


class TooManyRequests(StratumError):
    """More than a limit allows; it is worth trying again after `retry_s` seconds."""

    def __init__(self, message: str, *, retry_s: int) -> None:
        super().__init__(message)
        self.retry_s = retry_s


class NotImplementedYet(StratumError):
    """A feature this version does not have. Never a silent success."""


class TryAgain(StratumError):
    """What was prepared outside the transaction no longer fits what is there; the caller prepares again. Internal."""


class StillFilling(StratumError):
    """A directory of a young clone has not got yet what is asked for; whoever may wait fills it and asks again (filling.py)."""

    def __init__(self, directory: int, entry: bytes = b"") -> None:
        super().__init__(
            f"directory {directory:#x} belongs to a clone that is still being filled; try again", directory=directory
        )
        self.directory = directory
        self.entry = entry
        """The one that is asked for; empty: all of them, in their order."""
