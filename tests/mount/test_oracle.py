"""The mount against the local filesystem as the oracle: the same calls by the same users, the same answers and errors.

Hypothesis makes the sequences and shrinks what differs.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
import struct
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.support import longer

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLES = longer(60, 1500)
_libc = ctypes.CDLL(None, use_errno=True)
AT_FDCWD = -100
USERS = [(0, 0), (1001, 1001), (1002, 1002), (1002, 1001)]
NAMES = ["a", "b", "d", "d/a", "d/b", "d/e", "d/e/a", "l", "missing/a", "a/b", "d/..", "d/e/../a"]


class Step(NamedTuple):
    """One call: who, with which umask, what, on what."""

    user: tuple[int, int]
    umask: int
    call: str
    path: str
    other: str
    number: int
    access_list: bytes


def access_list(named: list[tuple[int, int, int]], owner: int, group: int, others: int, mask: int) -> bytes:
    unique = {(tag, number): (tag, bits, number) for tag, bits, number in named}
    entries = [(1, owner, 0xFFFFFFFF), (4, group, 0xFFFFFFFF), (32, others, 0xFFFFFFFF), *unique.values()]
    if named:
        entries.append((16, mask, 0xFFFFFFFF))
    entries.sort(key=lambda entry: (entry[0], entry[2]))
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


bits = st.integers(0, 7)
access_lists = st.builds(
    access_list,
    st.lists(st.tuples(st.sampled_from([2, 8]), bits, st.sampled_from([1001, 1002])), max_size=3),
    bits, bits, bits, bits,
)  # fmt: skip
CALLS = [
    "mkdir", "mkdir", "create", "create", "create-new", "rmdir", "unlink", "rename", "rename", "rename-new", "exchange", "link", "symlink", "chmod", "chmod",
    "chown", "truncate", "times", "list", "read", "write", "append", "stat", "set", "get", "remove", "fifo", "set-access", "set-default", "drop-access",
    "drop-default", "set-create", "set-replace", "names", "whiteout", "nameless", "copy", "punch",
]  # fmt: skip
steps = st.builds(
    Step,
    st.sampled_from(USERS),
    st.sampled_from([0, 0o22, 0o77]),
    st.sampled_from(CALLS),
    st.sampled_from(NAMES),
    st.sampled_from(NAMES),
    st.one_of(st.integers(0, 0o7777), st.sampled_from([0o777, 0o755, 0o2775, 0o1777, 0o4755, 0o640])),
    access_lists,
)


@contextmanager
def acting(step: Step) -> Iterator[None]:
    """As that user, for the file system only and in this thread only."""
    umask = os.umask(step.umask)
    _libc.setfsgid(step.user[1])
    _libc.setfsuid(step.user[0])
    try:
        yield
    finally:
        _libc.setfsuid(0)
        _libc.setfsgid(0)
        os.umask(umask)


def rename(old: Path, new: Path, flags: int) -> None:
    if _libc.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags):
        raise OSError(ctypes.get_errno(), "renameat2")


def put(path: Path, flags: int, mode: int, data: bytes) -> None:
    descriptor = os.open(path, flags, mode)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def make_nameless(folder: Path, path: Path, mode: int) -> None:
    descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR, mode)
    try:
        os.write(descriptor, b"n" * (mode % 60))
        if _libc.linkat(AT_FDCWD, b"/proc/self/fd/%d" % descriptor, AT_FDCWD, os.fsencode(path), 0x400):
            raise OSError(ctypes.get_errno(), "linkat")
    finally:
        os.close(descriptor)


def copy(path: Path, other: Path, length: int) -> int:
    source = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        target = os.open(other, os.O_RDWR | os.O_NONBLOCK)
        try:
            return os.copy_file_range(source, target, length, 3, 7)
        finally:
            os.close(target)
    finally:
        os.close(source)


def punch(path: Path, offset: int) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        if _libc.fallocate(descriptor, 3, ctypes.c_int64(offset), ctypes.c_int64(17)):
            raise OSError(ctypes.get_errno(), "fallocate")
    finally:
        os.close(descriptor)


def facts(path: Path) -> tuple[Any, ...]:
    found = path.lstat()
    size = found.st_size if not stat.S_ISDIR(found.st_mode) else 0
    mode = found.st_mode
    if stat.S_ISREG(mode) and not mode & stat.S_IXGRP:
        # When somebody outside the group writes, a local file system drops set-group-id even without the group's execute bit;
        # fuse_setattr of the kernel drops it only with the bit, and tells the file system nothing.
        mode &= ~stat.S_ISGID
    return mode, found.st_nlink, found.st_uid, found.st_gid, size


def call(step: Step) -> Any:
    path, other, number = Path(step.path), Path(step.other), step.number
    match step.call:
        case "mkdir":
            return path.mkdir(number & 0o1777)
        case "create":
            return put(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK, number, b"x" * (number % 50))
        case "create-new":
            return put(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, number, b"y")
        case "rmdir":
            return path.rmdir()
        case "unlink":
            return path.unlink()
        case "rename":
            return rename(path, other, 0)
        case "rename-new":
            return rename(path, other, 1)
        case "exchange":
            return rename(path, other, 2)
        case "whiteout":
            return rename(path, other, 4)
        case "nameless":
            return make_nameless(path.parent, path, number)
        case "copy":
            return copy(path, other, number % 3000)
        case "punch":
            return punch(path, number % 40)
        case "link":
            return os.link(path, other, follow_symlinks=False)
        case "symlink":
            return path.symlink_to(step.other)
        case "chmod":
            return path.chmod(number)
        case "chown":
            # Nothing to change is EPERM elsewhere if there are set-id bits to drop; the FUSE kernel asks nobody.
            number = number % 16 or 1
            return os.chown(path, [-1, 0, 1001, 1002][number % 4], [-1, 0, 1001, 1002][number // 4 % 4])
        case "truncate":
            return os.truncate(path, number)
        case "times":
            return os.utime(path, ns=(number, number * 1_000_000_007 - (1 << 40)))
        case "list":
            return sorted(os.listdir(path))
        case "read":
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            try:
                return os.read(descriptor, 1 << 20)
            finally:
                os.close(descriptor)
        case "write":
            return put(path, os.O_WRONLY | os.O_NONBLOCK, 0, b"w" * (number % 300))
        case "append":
            return put(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK, 0, b"z" * (number % 30))
        case "stat":
            return facts(path)
        case "set" | "set-create" | "set-replace":
            flags = {"set": 0, "set-create": os.XATTR_CREATE, "set-replace": os.XATTR_REPLACE}[step.call]
            return os.setxattr(path, "user.one", bytes(number % 100), flags)
        case "get":
            return os.getxattr(path, "user.one")
        case "remove":
            return os.removexattr(path, "user.one")
        case "names":
            return sorted(os.listxattr(path))
        case "fifo":
            return os.mkfifo(path, number & 0o1777)
        case "set-access":
            return os.setxattr(path, "system.posix_acl_access", step.access_list)
        case "set-default":
            return os.setxattr(path, "system.posix_acl_default", step.access_list)
        case "drop-access":
            return os.removexattr(path, "system.posix_acl_access")
        case "drop-default":
            return os.removexattr(path, "system.posix_acl_default")
    raise AssertionError(step.call)


def outcome(root: Path, step: Step) -> str:
    os.chdir(root)  # the way there is closed to everybody but root
    with acting(step):
        try:
            return repr(call(step))
        except OSError as error:
            return errno.errorcode[error.errno or 0]


def lists_of(path: Path) -> list[bytes]:
    found = []
    for name in ("system.posix_acl_access", "system.posix_acl_default"):
        try:
            found.append(os.getxattr(path, name, follow_symlinks=False))
        except OSError:
            found.append(b"")
    return found


def content(path: Path, mode: int) -> Any:
    if stat.S_ISREG(mode):
        return path.read_bytes()
    return path.readlink() if stat.S_ISLNK(mode) else None


def tree(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for folder, directories, files in os.walk(root):
        for name in [*directories, *files]:
            path = Path(folder) / name
            known = facts(path)
            lists = [] if stat.S_ISLNK(known[0]) else lists_of(path)
            found[str(path.relative_to(root))] = (known, content(path, known[0]), lists)
    return found


@pytest.mark.longer
def test_the_mount_answers_as_the_local_filesystem(home: Path, tmp_path: Path) -> None:
    @settings(
        max_examples=EXAMPLES, deadline=None, print_blob=True, database=None, suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )  # fmt: skip
    @given(st.lists(steps, min_size=25, max_size=60))
    def compare(sequence: list[Step]) -> None:
        name = uuid.uuid4().hex
        ours, oracle = home / name, tmp_path / name
        for root in (ours, oracle):
            root.mkdir()
            root.chmod(0o777)
            (root / "d").mkdir()
            (root / "d").chmod(0o777)
        try:
            for number, step in enumerate(sequence):
                expected, found = outcome(oracle, step), outcome(ours, step)
                assert found == expected, f"step {number}, {step}: {found} instead of {expected}"
            assert tree(ours) == tree(oracle)
        finally:
            shutil.rmtree(ours)
            shutil.rmtree(oracle)

    before = Path.cwd()
    try:
        compare()
    finally:
        os.chdir(before)
