"""POSIX access control lists: how they are stored, inherited and kept in step with the mode bits.

A list is kept as the kernel passes it, as an extended attribute: a little-endian version (2), then entries of tag, permissions
and id (linux/posix_acl_xattr.h; the rules are those of acl(5) and of POSIX 1003.1e draft 17). The kernel enforces the lists of a
mount; what is ours is that the mode shows the list (its group bits are the mask), and that new files inherit.

Invariants
* An inode with `Inode.ACCESS_LIST` has an access list that says more than its mode; the flag and the row change together.
* Owner, mask (or owning group) and others of an access list are the bits of the mode.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from stratum.errors import InvalidArgument, NoSuchAttribute, NotPermitted
from stratum.schema import Inode, Kind, key_u64

if TYPE_CHECKING:
    from collections.abc import Collection

    from stratum.transaction import InodeReader, MetadataTransaction

ACCESS = b"system.posix_acl_access"
DEFAULT = b"system.posix_acl_default"
FLAGS = {ACCESS: Inode.ACCESS_LIST, DEFAULT: Inode.DEFAULT_ACCESS_LIST}
_VERSION = struct.Struct("<I")
_ENTRY = struct.Struct("<HHI")
_VERSION_NUMBER = 2
OWNER, USER, OWNING_GROUP, GROUP, MASK, OTHERS = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
READ, WRITE, EXECUTE = 4, 2, 1


class Entry(NamedTuple):
    tag: int
    permissions: int
    number: int


def is_one(name: bytes) -> bool:
    return name in FLAGS


def unpack(raw: bytes) -> list[Entry]:
    """The entries. Raises `InvalidArgument` unless they are a valid list: each class once, in order, a mask where one is needed."""
    if len(raw) < _VERSION.size or _VERSION.unpack_from(raw)[0] != _VERSION_NUMBER:
        raise InvalidArgument("this is not an access control list of version 2")
    if (len(raw) - _VERSION.size) % _ENTRY.size:
        raise InvalidArgument("the access control list is cut off")
    entries = [Entry(*fields) for fields in _ENTRY.iter_unpack(raw[_VERSION.size :])]
    tags = [entry.tag for entry in entries]
    single = [tag for tag in tags if tag not in {USER, GROUP}]
    named = len(single) != len(tags)
    allowed = [[OWNER, OWNING_GROUP, MASK, OTHERS]] + ([] if named else [[OWNER, OWNING_GROUP, OTHERS]])
    if single not in allowed or tags != sorted(tags) or any(entry.permissions > 7 for entry in entries):
        raise InvalidArgument("the access control list has a class twice, none of one it needs, or unknown permissions")
    return entries


def pack(entries: list[Entry]) -> bytes:
    return _VERSION.pack(_VERSION_NUMBER) + b"".join(_ENTRY.pack(*entry) for entry in entries)


def _shift(tag: int, *, has_mask: bool) -> int | None:
    """Where in the mode bits the entries of a class stand; None for those that the mode does not show."""
    return {OWNER: 6, MASK: 3, OTHERS: 0, OWNING_GROUP: None if has_mask else 3}.get(tag)


def _bits(entries: list[Entry]) -> int:
    has_mask = any(entry.tag == MASK for entry in entries)
    shifts = [(entry, _shift(entry.tag, has_mask=has_mask)) for entry in entries]
    return sum(entry.permissions << shift for entry, shift in shifts if shift is not None)


def _with_bits(entries: list[Entry], bits: int) -> list[Entry]:
    has_mask = any(entry.tag == MASK for entry in entries)
    changed = []
    for entry in entries:
        shift = _shift(entry.tag, has_mask=has_mask)
        changed.append(entry if shift is None else Entry(entry.tag, bits >> shift & 7, entry.number))
    return changed


def get(reader: InodeReader, inode: Inode, name: bytes) -> bytes:
    """Raises `NoSuchAttribute`."""
    raw = reader.get(key_u64(b"Y", inode.number) + name) if inode.flags & FLAGS[name] else None
    if raw is None:
        raise NoSuchAttribute(f"{name.decode()} is not set")
    return raw


def _store(tx: MetadataTransaction, inode: Inode, name: bytes, entries: list[Entry] | None) -> None:
    if entries is None or (name == ACCESS and len(entries) == 3):  # the mode says it all
        if inode.flags & FLAGS[name]:
            tx.delete(key_u64(b"Y", inode.number) + name)
        inode.flags &= ~FLAGS[name]
    else:
        tx.put(key_u64(b"Y", inode.number) + name, pack(entries))
        inode.flags |= FLAGS[name]


def set_list(
    tx: MetadataTransaction, number: int, name: bytes, raw: bytes | None, *, keeps_set_gid: bool = True
) -> None:
    """Set or (None) remove a list; an access list becomes the mode's bits too. Not to remove one that is not there is no error.

    Raises `InvalidArgument`, or `NotPermitted` for what has no lists.
    """
    inode = tx.inode(number)
    if inode.kind == Kind.SYMLINK or (name == DEFAULT and inode.kind != Kind.DIRECTORY):
        raise NotPermitted(
            f"inode {number} has no {name.decode()}: symlinks have none, and default ones are of directories"
        )
    entries = unpack(raw) if raw is not None else None
    if entries is not None and name == ACCESS:
        inode.mode = inode.mode & ~0o777 | _bits(entries)
        if not keeps_set_gid:
            inode.mode &= ~0o2000
    _store(tx, inode, name, entries)
    inode.ctime_ns = tx.now_ns
    tx.dirty(inode)
    tx.changed(0, b"", number)


def follow_mode(tx: MetadataTransaction, inode: Inode) -> None:
    """After chmod: the list says what the mode says."""
    if inode.flags & Inode.ACCESS_LIST:
        entries = unpack(get(tx, inode, ACCESS))
        _store(tx, inode, ACCESS, _with_bits(entries, inode.mode & 0o777))


def inherit(tx: MetadataTransaction, directory: Inode, inode: Inode, mode: int) -> None:
    """Give a new inode what the default list of its directory says, within the `mode` its maker asked for; the umask is left out."""
    if not directory.flags & Inode.DEFAULT_ACCESS_LIST or inode.kind == Kind.SYMLINK:
        return
    raw = get(tx, directory, DEFAULT)
    entries = unpack(raw)
    bits = _bits(entries) & mode
    inode.mode = mode & 0o7000 | inode.mode & 0o7000 | bits
    _store(tx, inode, ACCESS, _with_bits(entries, bits))
    if inode.kind == Kind.DIRECTORY:
        _store(tx, inode, DEFAULT, entries)


def carry(tx: MetadataTransaction, source: Inode, target: Inode) -> None:
    """A new inode that takes the mode of another takes its access list too: the mode alone would let the group in."""
    if source.flags & Inode.ACCESS_LIST:
        _store(tx, target, ACCESS, unpack(get(tx, source, ACCESS)))


def permits(reader: InodeReader, inode: Inode, uid: int, gids: Collection[int], wanted: int) -> bool:
    """Whether a process with these ids may READ, WRITE or EXECUTE (a sum), by acl(5), "ACCESS CHECK ALGORITHM"."""
    if uid == 0:
        return True
    if uid == inode.uid:
        return inode.mode >> 6 & wanted == wanted
    if not inode.flags & Inode.ACCESS_LIST:
        return (inode.mode >> 3 if inode.gid in gids else inode.mode) & wanted == wanted
    entries = unpack(get(reader, inode, ACCESS))
    mask = next(entry.permissions for entry in entries if entry.tag == MASK)
    for entry in entries:
        if entry.tag == USER and entry.number == uid:
            return entry.permissions & mask & wanted == wanted
    groups = [
        entry
        for entry in entries
        if (entry.tag == OWNING_GROUP and inode.gid in gids) or (entry.tag == GROUP and entry.number in gids)
    ]
    if groups:
        return any(entry.permissions & mask & wanted == wanted for entry in groups)
    return entries[-1].permissions & wanted == wanted
