"""Mounts as the kernel makes, replaces and ends them. Needs root, and knows nothing of volumes.

Invariants
* A mount is taken away by its id and never by its path: what lies at a path may be somebody else's by then.
* A dead mount stays where it is until what replaces it is in its place: the new one is put beneath it, then the dead one goes. Who writes in
  between gets an error, and nothing lands in the folder below.
* Whoever takes a mount away ends its connection too (MNT_FORCE): a thread of a killed daemon may wait in the kernel for a lock that a client
  holds who waits for the daemon, and keeps the connection open by that.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import struct
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stratum import mount_table
from stratum.errors import UnfinishedMount
from stratum.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stratum.mount_table import Mount

log = get_logger("mounting")
READ_AHEAD_KIB = 1024
BACKGROUND_MAX = 64
PROBE_S_MAX = 5.0
TRIES = 8
"""How often a stale mount is looked for again that somebody else is replacing."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
# The numbers are the same on every machine (since Linux 5.2).
_MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT = 429, 430, 431, 432
_CLOEXEC, _SET_FLAG, _SET_STRING, _CREATE = 1, 0, 1, 6
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_FROM_EMPTY_PATH, _TO_EMPTY_PATH, _BENEATH = 0x4, 0x40, 0x200
_MNT_FORCE, _MNT_DETACH = 1, 2
_AT_EMPTY_PATH, _AT_NO_AUTOMOUNT, _AT_STATX_DONT_SYNC = 0x1000, 0x800, 0x4000
_STATX_MNT_ID, _STATX_MNT_ID_UNIQUE, _STATX_BYTES, _STATX_MNT_ID_AT = 0x1000, 0x4000, 256, 0x90
_GET_FLAGS, _SET_FLAGS, _IMMUTABLE = 0x80086601, 0x40086602, 0x10


def _called(number: int, *arguments: int | bytes | None) -> int:
    """A system call. Raises `OSError`."""
    words = [ctypes.c_long(value) if isinstance(value, int) else ctypes.c_char_p(value) for value in arguments]
    result = int(_libc.syscall(ctypes.c_long(number), *words))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


# -- which mount it is --------------------------------------------------------------------------------------------------


def id_of(descriptor: int) -> int:
    """Of the mount that a descriptor leads into: a number that is never given out again, where the kernel has those (6.8)."""
    raw = ctypes.create_string_buffer(_STATX_BYTES)
    flags = _AT_EMPTY_PATH | _AT_NO_AUTOMOUNT | _AT_STATX_DONT_SYNC  # asks no daemon
    for wanted in (_STATX_MNT_ID_UNIQUE, _STATX_MNT_ID):
        if _libc.statx(descriptor, b"", flags, wanted, raw) == 0 and struct.unpack_from("=I", raw)[0] & wanted:
            return int(struct.unpack_from("=Q", raw, _STATX_MNT_ID_AT)[0])
    return _line_id(descriptor)


def _line_id(descriptor: int) -> int:
    """The id in the kernel's table."""
    found = re.search(r"^mnt_id:\s*(\d+)", Path(f"/proc/self/fdinfo/{descriptor}").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


@dataclass(slots=True, frozen=True)
class Top:
    """What a mountpoint leads to now. `descriptor` holds it, without asking it for anything."""

    descriptor: int
    id: int
    line: Mount


@contextmanager
def top(path: str | Path) -> Iterator[Top | None]:
    """None if nothing is mounted at the path."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        yield None
        return
    try:
        number = _line_id(descriptor)
        line = next((line for line in mount_table.mounts() if line.id == number and line.path == str(path)), None)
        yield Top(descriptor, id_of(descriptor), line) if line is not None else None
    finally:
        os.close(descriptor)


def is_dead(mount: Top, seconds: float = PROBE_S_MAX) -> bool:
    """Whether its connection has ended. A daemon that does not answer in time is not dead, as far as anybody knows."""
    box: list[int] = []

    def ask(descriptor: int = os.dup(mount.descriptor)) -> None:
        try:
            os.fstatvfs(descriptor)
            box.append(0)
        except OSError as error:
            box.append(error.errno or 0)
        finally:
            os.close(descriptor)

    thread = threading.Thread(target=ask, name="probe", daemon=True)
    thread.start()
    thread.join(seconds)
    return box == [errno.ENOTCONN]


# -- making -------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Fresh:
    """A mount that is nowhere yet. `connection` is what a daemon serves it by; `tree` the mount itself."""

    connection: int
    tree: int
    id: int

    def close(self) -> None:
        """Of the connection the daemon takes care."""
        os.close(self.tree)


def make(source: str, uid: int, gid: int, *, read_only: bool) -> Fresh:
    """Raises `OSError`."""
    connection = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    context = -1
    try:
        context = _called(_FSOPEN, b"fuse", _CLOEXEC)
        for key, value in (
            ("source", source),
            ("subtype", mount_table.FUSE_TYPE.partition(".")[2]),
            ("fd", str(connection)),
            ("rootmode", "40000"),
            ("user_id", str(uid)),
            ("group_id", str(gid)),
        ):
            _called(_FSCONFIG, context, _SET_STRING, key.encode(), value.encode(), 0)
        for flag in ("allow_other", "default_permissions", *(["ro"] if read_only else [])):
            _called(_FSCONFIG, context, _SET_FLAG, flag.encode(), None, 0)
        _called(_FSCONFIG, context, _CREATE, None, None, 0)
        attributes = _ATTR_NOSUID | _ATTR_NODEV | (_ATTR_RDONLY if read_only else 0)
        tree = _called(_FSMOUNT, context, _CLOEXEC, attributes)
    except BaseException:
        os.close(connection)
        raise
    finally:
        if context >= 0:
            os.close(context)
    return Fresh(connection, tree, id_of(tree))


def put(fresh: Fresh, folder: int) -> None:
    """On a folder where nothing is mounted, given as a descriptor. Raises `OSError`."""
    _called(_MOVE_MOUNT, fresh.tree, b"", folder, b"", _FROM_EMPTY_PATH | _TO_EMPTY_PATH)


def replace(fresh: Fresh, path: str, stale: int) -> None:
    """In the place of the mount `stale` at a path, in one step. Raises `OSError`, `UnfinishedMount`."""
    for _ in range(TRIES):
        with top(path) as now:
            if now is None or now.id != stale:
                raise UnfinishedMount(f"what was mounted at {path} has been replaced meanwhile; try again")
            try:
                _called(_MOVE_MOUNT, fresh.tree, b"", now.descriptor, b"", _FROM_EMPTY_PATH | _TO_EMPTY_PATH | _BENEATH)
            except OSError as error:
                if error.errno not in {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}:
                    raise
                with top(path) as again:
                    if again is None or again.id != stale:
                        continue
                # An older kernel (6.5 has it), or a place where it does not do that: for a moment the folder is bare.
                log.info("not_replaced_in_one_step", path=path, why=str(error))
                detach(path, stale)
                folder = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    put(fresh, folder)
                finally:
                    os.close(folder)
                return
        detach(path, stale)
        return


def cover(path: str, stale: int, uid: int, gid: int) -> bool:
    """Replace a mount by a dead one that knows nothing. Whether `stale` was there. Raises `OSError`.

    The kernel goes on answering from the cache of a connection that has ended; of this one it has nothing to answer.
    """
    lid = make("stratum", uid, gid, read_only=False)
    try:
        os.close(lid.connection)
        replace(lid, path, stale)
    except UnfinishedMount:
        return False
    finally:
        lid.close()
    return True


# -- ending -------------------------------------------------------------------------------------------------------------


def detach(path: str | Path, number: int) -> bool:
    """End the mount of that id, and its connection, if it is what the path leads to. Who has files of it open gets errors. Raises `OSError`."""
    with top(path) as now:
        if now is None or now.id != number:
            return False
        if _libc.umount2(f"/proc/self/fd/{now.descriptor}".encode(), _MNT_FORCE | _MNT_DETACH) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(path))
    return True


def abort(minor: int) -> bool:
    """End the FUSE connection of that number; False if there is none. Raises `OSError`.

    Where its control file system is not mounted it is opened without being mounted anywhere.
    """
    usual = Path("/sys/fs/fuse/connections")
    number = str(minor)
    if any(line.path == str(usual) and line.file_system == "fusectl" for line in mount_table.mounts()):
        with suppress(PermissionError):
            return _abort_in(os.open(usual, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), number)
    context = _called(_FSOPEN, b"fusectl", _CLOEXEC)
    try:
        _called(_FSCONFIG, context, _CREATE, None, None, 0)
        return _abort_in(_called(_FSMOUNT, context, _CLOEXEC, 0), number)
    finally:
        os.close(context)


def _abort_in(folder: int, number: str) -> bool:
    try:
        file = os.open(f"{number}/abort", os.O_WRONLY | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        return False
    finally:
        os.close(folder)
    try:
        os.write(file, b"1")
    finally:
        os.close(file)
    return True


# -- what lies beneath --------------------------------------------------------------------------------------------------


def seal(descriptor: int, *, sealed: bool = True) -> str:
    """Let nobody make or remove anything in a folder (FS_IMMUTABLE_FL), or again everybody who may. Why it cannot be done; empty if it was."""
    raw = bytearray(8)
    try:
        fcntl.ioctl(descriptor, _GET_FLAGS, raw)
        flags = int.from_bytes(raw[:4], "little")
        wanted = flags | _IMMUTABLE if sealed else flags & ~_IMMUTABLE
        if wanted != flags:
            fcntl.ioctl(descriptor, _SET_FLAGS, wanted.to_bytes(8, "little"))
    except OSError as error:
        return error.strerror or str(error)
    return ""


def tune(minor: int) -> None:
    """What a mount cannot negotiate; failing to is only slower."""
    for path, number in (
        (f"/sys/class/bdi/0:{minor}/read_ahead_kb", READ_AHEAD_KIB),
        (f"/sys/fs/fuse/connections/{minor}/max_background", BACKGROUND_MAX),
    ):
        try:
            Path(path).write_text(str(number))
        except OSError as error:
            log.debug("not_tuned", path=path, error=str(error))
