"""The table from the engine's errors to exit codes.

0 done; 1 the answer is "no" (fsck: damage left); 2 usage, or fsck: damage repaired; 3 could not run; 4 not found; 5 exists;
6 refused; 7 no space; 70 a disk failed.
"""

from __future__ import annotations

from stratum import errors as engine

USAGE, COULD_NOT_RUN, NOT_FOUND, EXISTS, REFUSED, NO_SPACE, FAILED = 2, 3, 4, 5, 6, 7, 70

TABLE: dict[type[engine.StratumError], int] = {
    engine.StratumError: COULD_NOT_RUN,
    engine.NotFound: NOT_FOUND,
    engine.Gone: NOT_FOUND,
    engine.NoSuchBucket: NOT_FOUND,
    engine.NoSuchKey: NOT_FOUND,
    engine.NoSuchUpload: NOT_FOUND,
    engine.NoSuchUser: NOT_FOUND,
    engine.NoSuchAccessKey: NOT_FOUND,
    engine.NoSuchAttribute: NOT_FOUND,
    engine.Exists: EXISTS,
    engine.BucketExists: EXISTS,
    engine.NotADirectory: REFUSED,
    engine.IsADirectory: REFUSED,
    engine.DirectoryNotEmpty: REFUSED,
    engine.BucketNotEmpty: REFUSED,
    engine.NameTooLong: REFUSED,
    engine.KeyTooLong: REFUSED,
    engine.InvalidName: REFUSED,
    engine.InvalidBucketName: REFUSED,
    engine.InvalidArgument: REFUSED,
    engine.InvalidRequest: REFUSED,
    engine.InvalidTag: REFUSED,
    engine.InvalidPart: REFUSED,
    engine.InvalidPartOrder: REFUSED,
    engine.EntityTooSmall: REFUSED,
    engine.ChecksumMismatch: REFUSED,
    engine.InvalidRange: REFUSED,
    engine.PreconditionFailed: REFUSED,
    engine.NotModified: REFUSED,
    engine.NotPermitted: REFUSED,
    engine.CrossDevice: REFUSED,
    engine.AccessRefused: REFUSED,
    engine.ReadOnlyBucket: REFUSED,
    engine.NoSpace: NO_SPACE,
    engine.QuotaExceeded: NO_SPACE,
    engine.TooManyLinks: REFUSED,
    engine.DataDamaged: FAILED,
    engine.StorageFailed: FAILED,
    engine.StoreDamaged: COULD_NOT_RUN,
    engine.TierUnavailable: COULD_NOT_RUN,
    engine.NeedsRestore: REFUSED,
    engine.ForeignRemote: REFUSED,
    engine.SessionDead: COULD_NOT_RUN,
    engine.Busy: COULD_NOT_RUN,
    engine.UnfinishedMount: COULD_NOT_RUN,
    engine.ConfigInvalid: COULD_NOT_RUN,
    engine.VolumeInvalid: COULD_NOT_RUN,
    engine.BackupDamaged: FAILED,
    engine.AuditUnavailable: COULD_NOT_RUN,
    engine.TooManyRequests: COULD_NOT_RUN,
    engine.NotImplementedYet: REFUSED,
    engine.TryAgain: COULD_NOT_RUN,
    engine.StillFilling: COULD_NOT_RUN,
}
