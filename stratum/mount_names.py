"""How S3 entries that a path cannot hold are shown on a mount, and back. The rule stands in SEMANTICS.md.

An entry is shown under its own name unless that is impossible. Otherwise it has exactly one alias:

    .s3~file~NAME     a file whose plain name is taken by the directory NAME, is `.`, `..`, or looks like an alias
    .s3~dir~NAME      a directory named by the empty string, `.`, `..`, or something that looks like an alias
    .s3~body          inside directory d: the object whose key is `d/`, when it has bytes
    .s3~long~H~NAME   an entry over 255 bytes (also as an alias): H is 32 hex digits of its SHA-256, NAME its beginning

A name that looks like an alias but is not the one alias of an existing entry does not exist, and cannot be made.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from stratum import tree
from stratum.schema import Dentry, Kind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stratum.transaction import InodeReader

NAME_BYTES_MAX = 255
MARK = b".s3~"
FILE = MARK + b"file~"
DIRECTORY = MARK + b"dir~"
LONG = MARK + b"long~"
BODY = MARK + b"body"
_LONG_HEAD_BYTES = 180
_UNSHOWABLE = frozenset((b"", b".", b".."))


def looks_like_alias(name: bytes) -> bool:
    return name.startswith(MARK)


def is_plain(name: bytes) -> bool:
    """Whether a directory of this name is shown as it is; a file also needs that no directory shares its name."""
    return name not in _UNSHOWABLE and len(name) <= NAME_BYTES_MAX and not name.startswith(MARK)


def entry_of_name(kind: int, name: bytes) -> bytes:
    return name + b"/" if kind == Kind.DIRECTORY else name


def _long(entry: bytes) -> bytes:
    head = entry[:_LONG_HEAD_BYTES].rstrip(b"/").decode("utf-8", "ignore").encode()
    return LONG + hashlib.sha256(entry).hexdigest()[:32].encode() + b"~" + head


def alias(entry: bytes) -> bytes:
    """The alias of an entry, whether or not it needs one."""
    name = (DIRECTORY + entry[:-1]) if entry.endswith(b"/") else FILE + entry
    return name if len(name) <= NAME_BYTES_MAX else _long(entry)


def shown_name(reader: InodeReader, parent: int, entry: bytes) -> bytes:
    """The one name of an existing entry."""
    if entry.endswith(b"/"):
        return entry[:-1] if is_plain(entry[:-1]) else alias(entry)
    if is_plain(entry) and tree.get_dentry(reader, parent, entry + b"/") is None:
        return entry
    return alias(entry)


def name_to_forget(entry: bytes) -> bytes:
    """The name under which a kernel may have kept something that a change of `entry` affects: aliases are not kept."""
    if not entry:
        return BODY
    plain = entry.removesuffix(b"/")
    return plain if is_plain(plain) else alias(entry)


def find(reader: InodeReader, parent: int, name: bytes) -> tuple[bytes, Dentry] | None:
    """The entry shown as `name`, or None. `.s3~body` is not an entry; see `body_of`."""
    if not looks_like_alias(name):
        for entry in (name + b"/", name):
            dentry = tree.get_dentry(reader, parent, entry)
            if dentry is not None:
                return entry, dentry
        return None
    for entry in _candidates(reader, parent, name):
        dentry = tree.get_dentry(reader, parent, entry)
        if dentry is not None and shown_name(reader, parent, entry) == name:
            return entry, dentry
    return None


def _candidates(reader: InodeReader, parent: int, name: bytes) -> Iterator[bytes]:
    if name.startswith(FILE):
        yield name[len(FILE) :]
    elif name.startswith(DIRECTORY):
        yield name[len(DIRECTORY) :] + b"/"
    elif name.startswith(LONG):
        digest, _, head = name[len(LONG) :].partition(b"~")
        for entry, _ in tree.scan_dentries(reader, parent, prefix=head):
            if hashlib.sha256(entry).hexdigest()[:32].encode() == digest:
                yield entry
                return


def body_of(reader: InodeReader, directory: int) -> int:
    """The inode of the object whose key is the directory's own, if it has bytes; else 0."""
    inode = reader.inode(directory)
    if not inode.object_inode or reader.inode(inode.object_inode).size == 0:
        return 0
    return inode.object_inode
