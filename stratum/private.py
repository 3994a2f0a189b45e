"""Folders and files that only the volume's owner may use, whatever the umask; and the refusal of a key that others may read."""

from __future__ import annotations

import os
import shlex
import stat
from typing import TYPE_CHECKING

from stratum.errors import InvalidArgument, StoreDamaged, StratumError

if TYPE_CHECKING:
    from pathlib import Path

SEAL_KEY = "seal.key"
SEAL_KEY_BYTES = 32


def make_folder(path: Path) -> None:
    """A folder that is there already keeps its mode. The folders above it are made as usual."""
    if path.is_dir():
        return
    path.mkdir(parents=True, mode=0o700)
    path.chmod(0o700)


def require_folder(path: Path, role: str, *, create: bool) -> None:
    """A folder that is not there may be a disk that is not mounted: it is made only if somebody says so. Raises `InvalidArgument`."""
    if path.is_dir():
        return
    if path.exists() or path.is_symlink():
        raise InvalidArgument(f"{path} is no folder; {role} is one")
    if not create:
        raise InvalidArgument(
            f"{path} does not exist; mount the disk that {role} lies on, or say --create to make the folder on the disk above it"
        )
    make_folder(path)


def write(path: Path, data: bytes) -> None:
    """A new file or a new content, on the disk when it returns."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:  # noqa: PTH123  a descriptor: the mode counts from the first byte on
        os.fchmod(fd, 0o600)
        file.write(data)
        file.flush()
        os.fsync(fd)


def seal_key(meta: Path) -> bytes:
    """What the secrets of access keys are sealed with. Raises `StoreDamaged` or, if others may read it, `StratumError`."""
    path = meta / SEAL_KEY
    volume = shlex.quote(str(meta.parent))
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise StoreDamaged(
            f"{path} is missing: no access key can be read; `stratum meta restore {volume} BACKUP` brings it back with the metadata"
        ) from None
    with open(fd, "rb") as file:  # noqa: PTH123  a descriptor: what is asked is what is read
        mode = stat.S_IMODE(os.fstat(fd).st_mode)
        data = file.read(SEAL_KEY_BYTES + 1)
    if mode & 0o077:
        raise StratumError(
            f"{path} has mode {mode:04o}, and others must not read it: `chmod 0600 {shlex.quote(str(path))}`; "
            "if somebody may have read it, make new access keys and revoke the old ones"
        )
    if len(data) != SEAL_KEY_BYTES:
        raise StoreDamaged(
            f"{path} is damaged at byte {min(len(data), SEAL_KEY_BYTES)}: it holds {SEAL_KEY_BYTES} bytes and nothing else; "
            f"`stratum meta restore {volume} BACKUP` brings it back with the metadata"
        )
    return data
