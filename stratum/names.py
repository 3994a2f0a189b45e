"""The names of a file, told by its inode: from the file to its paths without reading a directory. Directories have one name, told the same way.

Invariants (of inodes that are no directories)
* Without a name, `parent` is 0 and `entry` empty. With one, they are it. With several, they are one of them, the flag SEVERAL_NAMES is set, and each has a
  row of table i.
* The object whose key is a directory's own has the name (directory, b"").

Before format 4 only `parent` was there; `index_page` tells the rest.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

from stratum import longkeys
from stratum.schema import (
    INODE_STRUCT,
    Dentry,
    Inode,
    Kind,
    key_u64,
    pack_u64,
    prefix_range,
    unpack_u64,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from stratum.kv.contract import Snapshot, Transaction

Name = tuple[int, bytes]
"""A directory and an entry in it."""


def _row(inode: Inode, name: Name) -> tuple[bytes, bytes]:
    value = pack_u64(name[0]) + name[1]
    return key_u64(b"i", inode.number) + blake2b(value, digest_size=16).digest(), value


def _name(value: bytes) -> Name:
    return unpack_u64(value[:8])[0], value[8:]


def _rows_of(number: int) -> tuple[bytes, bytes]:
    return prefix_range(key_u64(b"i", number))


def add(tx: Transaction, inode: Inode, directory: int, entry: bytes) -> None:
    """Changes the inode, which the caller writes."""
    name = (directory, entry)
    before = (inode.parent, inode.entry)
    if inode.parent and before != name:
        if not inode.flags & Inode.SEVERAL_NAMES:
            tx.put(*_row(inode, before))
            inode.flags |= Inode.SEVERAL_NAMES
        tx.put(*_row(inode, name))
    inode.parent, inode.entry = name


def remove(tx: Transaction, inode: Inode, directory: int, entry: bytes) -> None:
    """Changes the inode, which the caller writes. Of a name that it has not, nothing."""
    name = (directory, entry)
    if not inode.flags & Inode.SEVERAL_NAMES:
        if (inode.parent, inode.entry) == name:
            inode.parent, inode.entry = 0, b""
        return
    tx.delete(_row(inode, name)[0])
    left = tx.first_rows(*_rows_of(inode.number), 2)
    if (inode.parent, inode.entry) == name or len(left) < 2:
        inode.parent, inode.entry = _name(left[0][1]) if left else (0, b"")
    if len(left) < 2:
        inode.flags &= ~Inode.SEVERAL_NAMES
        for key, _ in left:
            tx.delete(key)


def set_all(tx: Transaction, inode: Inode, names: Iterable[Name]) -> None:
    """Whatever it said before. Changes the inode, which the caller writes."""
    for key, _ in list(tx.scan(*_rows_of(inode.number))):
        tx.delete(key)
    inode.flags &= ~Inode.SEVERAL_NAMES
    inode.parent, inode.entry = 0, b""
    for name in names:
        add(tx, inode, *name)


def of(reader: Snapshot, inode: Inode, limit: int) -> list[Name]:
    """At most `limit` of the names an inode says it has, the newest first if it is known."""
    if not inode.parent:
        return []
    newest = (inode.parent, inode.entry)
    if not inode.flags & Inode.SEVERAL_NAMES:
        return [newest]
    rows = reader.first_rows(*_rows_of(inode.number), limit)
    return [newest, *(name for _, raw in rows if (name := _name(raw)) != newest)][:limit]


def scan(reader: Snapshot) -> Iterator[tuple[int, Name]]:
    """All rows of table i: (inode, name)."""
    for key, raw in reader.scan(*prefix_range(b"i")):
        yield unpack_u64(key[1:9])[0], _name(raw)


# -- before format 4 ------------------------------------------------------------------------------------------------------


def index_page(tx: Transaction, cursor: bytes, limit: int) -> bytes | None:
    """Tell inodes the names that about `limit` entries from `cursor` on give them; where to go on, None at the end.

    Each row is to be gone through once. Raises nothing for what `fsck` would find.
    """
    rows = tx.first_rows(cursor or b"D", b"E", limit)
    for key, raw in rows:
        (directory,) = unpack_u64(key[1 : longkeys.HEAD_BYTES])
        entry = key[longkeys.HEAD_BYTES :]
        if tx.get(key_u64(b"I", directory)) is None:
            continue  # the rest of a long name; it is told where it begins
        if longkeys.is_continuation(key):
            piece = entry[:-1]
            for long, value in list(longkeys.scan(tx, b"D", directory, piece + b"\0", piece)):
                _tell(tx, directory, long, Dentry.unpack(value))
        else:
            _tell(tx, directory, entry, Dentry.unpack(raw))
    return rows[-1][0] + b"\0" if len(rows) == limit else None


def _tell(tx: Transaction, directory: int, entry: bytes, dentry: Dentry) -> None:
    raw = tx.get(key_u64(b"I", dentry.inode))
    if raw is None:
        return
    inode = Inode.unpack(dentry.inode, raw)
    if inode.kind != Kind.DIRECTORY:
        _add_first(tx, inode, raw, directory, entry)
        return
    inode.parent, inode.entry = directory, entry
    tx.put(key_u64(b"I", inode.number), inode.pack())
    own = tx.get(key_u64(b"I", inode.object_inode)) if inode.object_inode else None
    if own is not None:
        _add_first(tx, Inode.unpack(inode.object_inode, own), own, inode.number, b"")


def _add_first(tx: Transaction, inode: Inode, raw: bytes, directory: int, entry: bytes) -> None:
    """`raw` says whether any name has been told: what `parent` said before may have been a name that is gone."""
    if len(raw) == INODE_STRUCT.size and not inode.flags & Inode.SEVERAL_NAMES and not _is_own(tx, inode):
        inode.parent = 0
    add(tx, inode, directory, entry)
    tx.put(key_u64(b"I", inode.number), inode.pack())


def _is_own(tx: Transaction, inode: Inode) -> bool:
    raw = tx.get(key_u64(b"I", inode.parent)) if inode.parent else None
    return raw is not None and Inode.unpack(inode.parent, raw).object_inode == inode.number
