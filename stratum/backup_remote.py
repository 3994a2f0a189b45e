"""Backups of the metadata in a remote of the cold tier: beside the packs, below `_backup/`, for whoever has the bucket alone.

Invariants
* A backup is sent when it is whole and verified here, and was sent when it has been read back from there.
* It holds the keys of the volume's users, so a remote that is not encrypted gets one only if that was said.
* What is fetched gets its name when it is whole and verified.
"""

from __future__ import annotations

import hashlib
import os
import time
from typing import TYPE_CHECKING

from stratum import backup, cold
from stratum.clocks import STAMP, by_stamp
from stratum.cold_backends.contract import RemoteDamaged, RemoteError
from stratum.cold_files import upload
from stratum.errors import InvalidArgument, NotFound, TierUnavailable
from stratum.segments import fsync_folder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from stratum.backup import Backup
    from stratum.cold import Remote
    from stratum.cold_backends.contract import Backend
    from stratum.tier_rows import ColdRow
    from stratum.volume import Volume

    Watch = Callable[[int, int], None]

FOLDER = "_backup/"


def check(volume: Volume, name: str, *, plain: bool) -> None:
    """Raises `InvalidArgument` if a backup may not go there, `NotFound`, `TierUnavailable` or `ForeignRemote`."""
    row, _ = volume.cold.remote(name)
    if not row.encryption_key and not plain:
        raise InvalidArgument(
            f"remote {name!r} is not encrypted, and a backup holds the keys of all users; add one with --encryption-key, or say --unencrypted"
        )
    try:
        volume.cold.check_marker(name)
    except RemoteError as error:
        raise TierUnavailable(f"remote {name!r}: {error.message}") from error


def send(volume: Volume, made: Backup, name: str, *, keep: int, watch: Watch) -> str:
    """Send a backup to the remote `name` and leave the newest `keep` of this volume there (0: all); its key.

    `watch(done, total)` counts bytes, those sent and then those read back. Raises `TierUnavailable` or what `check` raises, which comes first.
    """
    _, remote = volume.cold.remote(name)
    folder = f"v1/{volume.instance}/{FOLDER}"
    key = folder + time.strftime(STAMP, time.gmtime(made.made_s)) + backup.SUFFIX
    try:
        volume.cold.check_marker(name)
        with made.path.open("rb") as file:
            metadata = {"stratum-backup": "1"}
            digest = upload(remote.sealed, key, file, made.size, metadata, lambda done: watch(done, 2 * made.size))
        if _download(remote.sealed, key, None, lambda done, _: watch(made.size + done, 2 * made.size)) != digest:
            raise RemoteDamaged(f"{key} is not what was sent")
        if keep:
            for old in _keys(remote, folder)[:-keep]:
                remote.sealed.delete(old)
    except RemoteError as error:
        raise TierUnavailable(f"remote {name!r}: {error.message}; the backup here is whole: {made.path}") from error
    return key


def _keys(remote: Remote, folder: str) -> list[str]:
    return by_stamp(info.key for info in remote.sealed.list(folder))


def _download(backend: Backend, key: str, target: int | None, watch: Watch) -> str:
    """Into a descriptor, if there is one; the SHA-256 of what came."""
    digest = hashlib.sha256()
    body = backend.get(key)
    done = 0
    for piece in body.pieces:
        digest.update(piece)
        view = memoryview(piece)
        while target is not None and view:
            view = view[os.write(target, view) :]
        done += len(piece)
        watch(done, body.info.size)
    return digest.hexdigest()


def fetch(row: ColdRow, target: Path, watch: Watch) -> Backup:
    """Bring the newest backup of a bucket to a new file, or into a folder, and verify it.

    Raises `InvalidArgument`, `NotFound`, `TierUnavailable`, `BackupDamaged`.
    """
    remote = cold.open_remote("fetch", row, request_s_max=60.0)
    try:
        marker = cold.read_marker(remote)
        keys = _keys(remote, f"v1/{marker['instance']}/{FOLDER}") if marker else []
        if marker is None or not keys:
            raise NotFound(
                "there is no backup in the bucket below this prefix; `stratum meta backup --to-cold` sends one"
            )
        name = f"stratum-{marker['instance'][:12]}-{keys[-1].rpartition('/')[2]}"
        path = target / name if target.is_dir() else target
        if path.exists():
            raise InvalidArgument(f"{path} exists; name a new file or a folder")
        partial = path.with_name(path.name + ".partial")
        try:
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise InvalidArgument(f"{partial} cannot be written: {error.strerror}") from error
        try:
            try:
                _download(remote.sealed, keys[-1], descriptor, watch)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            told = backup.verify(partial)
            partial.rename(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)
    except RemoteError as error:
        raise TierUnavailable(f"the bucket cannot be read: {error.message}") from error
    finally:
        remote.plain.close()
    told.path = path
    return told
