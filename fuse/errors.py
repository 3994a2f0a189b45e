"""The table from the engine's errors to errno."""

from __future__ import annotations

import errno

from stratum import errors as engine

TABLE: dict[type[engine.StratumError], int] = {
    engine.StratumError: errno.EIO,
    engine.NotFound: errno.ENOENT,
    engine.Gone: errno.ESTALE,  # the kernel looks the name up again and retries
    engine.NoSuchBucket: errno.ENOENT,
    engine.NoSuchKey: errno.ENOENT,
    engine.NoSuchUpload: errno.ENOENT,
    engine.NoSuchUser: errno.ENOENT,
    engine.NoSuchAccessKey: errno.ENOENT,
    engine.NoSuchAttribute: errno.ENODATA,
    engine.Exists: errno.EEXIST,
    engine.BucketExists: errno.EEXIST,
    engine.NotADirectory: errno.ENOTDIR,
    engine.IsADirectory: errno.EISDIR,
    engine.DirectoryNotEmpty: errno.ENOTEMPTY,
    engine.BucketNotEmpty: errno.ENOTEMPTY,
    engine.NameTooLong: errno.ENAMETOOLONG,
    engine.KeyTooLong: errno.ENAMETOOLONG,
    engine.InvalidName: errno.EINVAL,
    engine.InvalidBucketName: errno.EINVAL,
    engine.InvalidArgument: errno.EINVAL,
    engine.InvalidRequest: errno.EINVAL,
    engine.InvalidTag: errno.EINVAL,
    engine.InvalidPart: errno.EINVAL,
    engine.InvalidPartOrder: errno.EINVAL,
    engine.EntityTooSmall: errno.EINVAL,
    engine.ChecksumMismatch: errno.EINVAL,
    engine.InvalidRange: errno.EINVAL,
    engine.PreconditionFailed: errno.EBUSY,
    engine.NotModified: errno.EIO,
    engine.NotPermitted: errno.EPERM,
    engine.CrossDevice: errno.EXDEV,
    engine.AccessRefused: errno.EACCES,
    engine.ReadOnlyBucket: errno.EROFS,
    engine.NoSpace: errno.ENOSPC,
    engine.QuotaExceeded: errno.EDQUOT,
    engine.TooManyLinks: errno.EMLINK,
    engine.DataDamaged: errno.EIO,
    engine.StorageFailed: errno.EIO,
    engine.StoreDamaged: errno.EIO,
    engine.TierUnavailable: errno.EIO,
    engine.NeedsRestore: errno.EIO,  # not EAGAIN: buffered readers take that for "nothing yet" and copy a truncated file
    engine.ForeignRemote: errno.EIO,
    engine.SessionDead: errno.EIO,
    engine.Busy: errno.EBUSY,
    engine.UnfinishedMount: errno.EIO,
    engine.ConfigInvalid: errno.EIO,
    engine.VolumeInvalid: errno.EIO,
    engine.BackupDamaged: errno.EIO,
    engine.TooManyRequests: errno.EAGAIN,
    engine.AuditUnavailable: errno.EIO,
    engine.NotImplementedYet: errno.EOPNOTSUPP,
    engine.TryAgain: errno.EAGAIN,
    engine.StillFilling: errno.EAGAIN,
}
