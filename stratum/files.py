"""What the mount does to the volume, as functions over a transaction: POSIX semantics without a kernel.

Every function checks first and writes then. Permission bits are the kernel's to enforce (default_permissions); what is
kept here is structure: kinds, links, emptiness, buckets.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stratum import access_lists, buckets, content, hints, mount_names, object_attributes, tree
from stratum.errors import (
    CrossDevice,
    DirectoryNotEmpty,
    Exists,
    InvalidArgument,
    InvalidName,
    IsADirectory,
    NameTooLong,
    NoSpace,
    NoSuchAttribute,
    NotADirectory,
    NotFound,
    NotPermitted,
)  # fmt: skip
from stratum.schema import ROOT_INODE, Dentry, Inode, Kind, key_u64, prefix_range

if TYPE_CHECKING:
    from collections.abc import Callable

    from stratum.transaction import InodeReader, MetadataTransaction

XATTR_BYTES_MAX = 64 * 1024
XATTR_NAME_BYTES_MAX = 255
XATTR_LIST_BYTES_MAX = 64 * 1024
"""The names of a file's attributes, each with a NUL behind it: listxattr(2) hands out no more, so more could not be copied."""
XATTR_NAMESPACES = (b"user.", b"trusted.", b"security.")
SYMLINK_BYTES_MAX = 4095
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4

KIND_OF_FORMAT = {
    stat.S_IFREG: Kind.FILE, stat.S_IFDIR: Kind.DIRECTORY, stat.S_IFLNK: Kind.SYMLINK, stat.S_IFIFO: Kind.FIFO, stat.S_IFSOCK: Kind.SOCKET,
    stat.S_IFCHR: Kind.CHARACTER_DEVICE, stat.S_IFBLK: Kind.BLOCK_DEVICE,
}  # fmt: skip
FORMAT_OF_KIND = {int(kind): format_bits for format_bits, kind in KIND_OF_FORMAT.items()}


@dataclass(slots=True, frozen=True)
class Caller:
    uid: int
    gid: int
    umask: int = 0


def lookup(reader: InodeReader, parent: int, name: bytes) -> Inode:
    """Raises `NotFound`."""
    if len(name) > mount_names.NAME_BYTES_MAX:
        raise NameTooLong(f"a name of {len(name)} bytes; 255 is the most")
    if name == mount_names.BODY:
        body = mount_names.body_of(reader, parent)
        if body:
            return reader.inode(body)
    found = mount_names.find(reader, parent, name)
    if found is None:
        reader.inode(parent)  # a directory that is gone is another answer than a name that is not there
        raise NotFound(f"{os.fsdecode(name)!r} does not exist")
    return reader.inode(found[1].inode)


def check_new_name(reader: InodeReader, parent: int, name: bytes) -> Inode:
    """The parent, if something may be made in it under `name`."""
    if len(name) > mount_names.NAME_BYTES_MAX:
        raise NameTooLong(f"a name of {len(name)} bytes; 255 is the most")
    if mount_names.looks_like_alias(name):
        raise InvalidName(
            f"{os.fsdecode(name)!r} begins with {mount_names.MARK.decode()!r}, which is reserved for keys that paths cannot hold; choose another name"
        )
    try:
        name.decode()
    except UnicodeDecodeError as error:
        raise InvalidName("a name on this volume is an S3 key too and must be valid UTF-8; convert it") from error
    directory = reader.inode(parent)
    if directory.kind != Kind.DIRECTORY:
        raise NotADirectory(f"inode {parent} is not a directory")
    if directory.nlink == 0:
        raise NotFound("the directory was removed")
    tree.check_writable(reader, directory)
    return directory


def _check_free(reader: InodeReader, parent: int, name: bytes) -> None:
    if mount_names.find(reader, parent, name) is not None:
        raise Exists(f"{os.fsdecode(name)!r} exists already")


def _new_inode(
    directory: Inode, kind: int, mode: int, caller: Caller, number: int, now_ns: int, rdev: int = 0
) -> Inode:
    """Who owns what is made in a directory, and with which bits, its lists left out."""
    bits = 0o777 if kind == Kind.SYMLINK else mode & 0o7777
    if not directory.flags & Inode.DEFAULT_ACCESS_LIST and kind != Kind.SYMLINK:
        bits &= ~caller.umask
    gid = caller.gid
    if directory.mode & stat.S_ISGID:
        gid = directory.gid
        if kind == Kind.DIRECTORY:
            bits |= stat.S_ISGID
    return Inode(
        number, kind, mode=bits, uid=caller.uid, gid=gid, now_ns=now_ns, bucket=directory.bucket, parent=directory.number if kind == Kind.DIRECTORY else 0,
        rdev=rdev,
    )  # fmt: skip


def make(
    tx: MetadataTransaction, parent: int, name: bytes, mode: int, caller: Caller, *, rdev: int = 0, target: bytes = b""
) -> Inode:
    """Make a file, directory, symlink (`target`) or special file. At the root only mkdir, which is CreateBucket."""
    kind = KIND_OF_FORMAT.get(stat.S_IFMT(mode))
    if kind is None:
        raise InvalidArgument(f"mode {mode:o} names no kind of file")
    directory = check_new_name(tx, parent, name)
    _check_free(tx, parent, name)
    inode = _new_inode(directory, kind, mode, caller, tx.new_id(), tx.now_ns, rdev)
    if parent == ROOT_INODE:
        if kind != Kind.DIRECTORY:
            raise NotPermitted("the root of the mount holds buckets only; make files inside one")
        owner = _bucket_owner(tx)
        row = buckets.create(tx, os.fsdecode(name), owner, mode=inode.mode, uid=inode.uid, gid=inode.gid)
        inode = tx.inode(row.inode)
        access_lists.inherit(tx, directory, inode, mode)
        return inode
    if len(target) > SYMLINK_BYTES_MAX:
        raise NameTooLong(f"a symlink target of {len(target)} bytes; {SYMLINK_BYTES_MAX} is the most")
    tx.add_inode(inode)
    if kind == Kind.DIRECTORY:
        inode.nlink = 2
        inode.flags |= Inode.EXPLICIT
    if target:
        content.put_inline(tx, inode, target)
        inode.size = len(target)
    access_lists.inherit(tx, directory, inode, mode & 0o7777)
    tree.attach(tx, directory, mount_names.entry_of_name(kind, name), Dentry(inode.number, kind))
    return inode


def prepare_file(
    reader: InodeReader, parent: int, name: bytes, mode: int, caller: Caller, number: int, now_ns: int
) -> Inode | None:
    """Everything `make` would check for a regular file, and the inode it would make; nothing is written.

    None if the inode would not be all there is to it: a directory with a default list.
    """
    directory = check_new_name(reader, parent, name)
    _check_free(reader, parent, name)
    if parent == ROOT_INODE:
        raise NotPermitted("the root of the mount holds buckets only; make files inside one")
    if directory.flags & Inode.DEFAULT_ACCESS_LIST:
        return None
    return _new_inode(directory, Kind.FILE, mode, caller, number, now_ns)


def make_prepared(tx: MetadataTransaction, parent: int, name: bytes, prepared: Inode, created_ns: int) -> Inode:
    """The directory's times become those of the creation, which the kernel may have been told already.

    Raises `Exists` if the name was taken meanwhile and `NotFound` if the directory was removed.
    """
    directory = check_new_name(tx, parent, name)
    _check_free(tx, parent, name)
    inode = Inode.unpack(prepared.number, prepared.pack())  # another one: the transaction may be run again
    tx.add_inode(inode)
    times = max(directory.mtime_ns, created_ns), max(directory.ctime_ns, created_ns)
    tree.attach(tx, directory, name, Dentry(inode.number, Kind.FILE))
    directory.mtime_ns, directory.ctime_ns = times
    return inode


def make_nameless(tx: MetadataTransaction, parent: int, mode: int, caller: Caller) -> Inode:
    """A regular file without a name, as O_TMPFILE has it: the calling mount holds it, and it goes when that lets go of it or dies."""
    directory = check_new_name(tx, parent, b"")
    if parent == ROOT_INODE:
        raise NotPermitted("the root of the mount holds buckets only; make files inside one")
    inode = _new_inode(directory, Kind.FILE, mode, caller, tx.new_id(), tx.now_ns)
    inode.nlink = 0
    tx.add_inode(inode)
    tree.hold(tx, inode, [tx.session])
    access_lists.inherit(tx, directory, inode, mode & 0o7777)
    return inode


def _bucket_owner(tx: MetadataTransaction) -> str:
    """Buckets made through the mount belong to the first administrator."""
    from stratum.schema import UserRow, unpack_json

    admins = [user for _, raw in tx.scan_prefix(b"R") if (user := UserRow(**unpack_json(raw))).admin]
    return min(admins, key=lambda user: user.created_ns).user_id if admins else ""


def link(tx: MetadataTransaction, number: int, parent: int, name: bytes, *, first: bool = False) -> Inode:
    """`first`: of a file that `make_nameless` made and the calling mount still holds; the name is then what holds it."""
    directory = check_new_name(tx, parent, name)
    _check_free(tx, parent, name)
    inode = tx.inode(number)
    if inode.kind == Kind.DIRECTORY or parent == ROOT_INODE:
        raise NotPermitted("directories have one name, and the root holds buckets only")
    if inode.bucket != directory.bucket:
        raise CrossDevice("a hard link stays in its bucket; copy the file instead")
    if inode.nlink == 0 and not (first and tree.let_go(tx, tx.session, inode)):
        raise NotFound("the file was removed")
    tree.add_link(tx, inode)
    tree.attach(tx, directory, name, Dentry(number, inode.kind))
    return inode


def _kept(tx: MetadataTransaction, directory: Inode) -> None:
    """A directory that the mount emptied stays."""
    if not directory.entries and not directory.explicit:
        tree.change_liveness(tx, directory, tree.set_explicit)


def unlink(tx: MetadataTransaction, parent: int, name: bytes, still_used: Callable[[int], bool]) -> int:
    """The inode that lost the name."""
    if name == mount_names.BODY and mount_names.body_of(tx, parent):
        raise NotPermitted("this is the object of the directory itself; delete its key through S3")
    found = mount_names.find(tx, parent, name)
    if found is None:
        raise NotFound(f"{os.fsdecode(name)!r} does not exist")
    entry, dentry = found
    if dentry.kind == Kind.DIRECTORY:
        raise IsADirectory(f"{os.fsdecode(name)!r} is a directory; use rmdir")
    directory = tx.inode(parent)
    tree.check_writable(tx, directory)
    tree.detach(tx, directory, entry, dentry)
    tree.drop_link(tx, tx.inode(dentry.inode), still_used)
    _kept(tx, directory)
    return dentry.inode


def rmdir(tx: MetadataTransaction, parent: int, name: bytes, still_used: Callable[[int], bool]) -> int:
    found = mount_names.find(tx, parent, name)
    if found is None:
        raise NotFound(f"{os.fsdecode(name)!r} does not exist")
    entry, dentry = found
    if dentry.kind != Kind.DIRECTORY:
        raise NotADirectory(f"{os.fsdecode(name)!r} is not a directory")
    inode = tx.inode(dentry.inode)
    tree.check_writable(tx, inode)
    if inode.entries or mount_names.body_of(tx, dentry.inode):
        raise DirectoryNotEmpty(f"{os.fsdecode(name)!r} is not empty")
    if parent == ROOT_INODE:
        buckets.remove(tx, os.fsdecode(name), also_explicit=False)
        return dentry.inode
    _remove_directory(tx, parent, entry, inode, still_used)
    _kept(tx, tx.inode(parent))
    return dentry.inode


def _remove_directory(
    tx: MetadataTransaction, parent: int, entry: bytes, inode: Inode, still_used: Callable[[int], bool]
) -> None:
    """Remove an empty directory, its empty own object included."""
    owned = inode.object_inode
    if owned:
        tree.own_object(tx, inode, 0)
        tree.drop_link(tx, tx.inode(owned))
    tree.detach(tx, tx.inode(parent), entry, Dentry(inode.number, Kind.DIRECTORY))
    tree.drop_directory(tx, inode, still_used)


def rename(
    tx: MetadataTransaction,
    old_parent: int,
    old_name: bytes,
    new_parent: int,
    new_name: bytes,
    flags: int,
    still_used: Callable[[int], bool],
    caller: Caller | None = None,
) -> None:
    """Move a name, with NOREPLACE, EXCHANGE and WHITEOUT as the system call has them. O(1), also for directories.

    WHITEOUT leaves a character device 0:0 of the `caller` under the old name, by which overlayfs knows that it is gone.
    """
    found = mount_names.find(tx, old_parent, old_name)
    if found is None:
        raise NotFound(f"{os.fsdecode(old_name)!r} does not exist")
    entry, dentry = found
    target = mount_names.find(tx, new_parent, new_name)
    if target is None or not mount_names.looks_like_alias(new_name):
        check_new_name(tx, new_parent, new_name)
    if ROOT_INODE in {old_parent, new_parent}:
        raise NotPermitted(
            "buckets cannot be renamed, and the root holds nothing else; make a bucket and move the content"
        )
    source = tx.inode(dentry.inode)
    tree.check_writable(tx, source)
    tree.check_writable(tx, tx.inode(new_parent))  # a new name was checked with its parent, an alias was not
    _check_same_bucket(tx, source, new_parent)
    if dentry.kind == Kind.DIRECTORY:
        _check_not_below(tx, dentry.inode, new_parent)
    if flags & RENAME_EXCHANGE:
        if target is None:
            raise NotFound(f"{os.fsdecode(new_name)!r} does not exist")
        _exchange(tx, old_parent, found, new_parent, target, old_name, new_name)
        return
    if target is not None:
        if flags & RENAME_NOREPLACE:
            raise Exists(f"{os.fsdecode(new_name)!r} exists already")
        if target[1].inode == dentry.inode:
            return
        _check_replaceable(tx, dentry, target[1], new_name)
    if flags & RENAME_WHITEOUT:
        check_new_name(tx, old_parent, old_name)
        if dentry.kind == Kind.DIRECTORY and tree.get_dentry(tx, old_parent, old_name) is not None:
            raise Exists(f"a key beside the directory has the name {os.fsdecode(old_name)!r}")
    tree.detach(tx, tx.inode(old_parent), entry, dentry)
    if target is not None:
        victim = tx.inode(target[1].inode)
        if target[1].kind == Kind.DIRECTORY:
            _remove_directory(tx, new_parent, target[0], victim, still_used)
        else:
            tree.detach(tx, tx.inode(new_parent), target[0], target[1])
            tree.drop_link(tx, victim, still_used)
    new_entry = (
        target[0]
        if target is not None and (target[1].kind == Kind.DIRECTORY) == (dentry.kind == Kind.DIRECTORY)
        else mount_names.entry_of_name(dentry.kind, new_name)
    )
    _arrive(tx, source, new_parent, new_entry, dentry)
    if flags & RENAME_WHITEOUT:
        _leave_whiteout(tx, tx.inode(old_parent), old_name, caller or Caller(0, 0))
    _kept(tx, tx.inode(old_parent))


def _leave_whiteout(tx: MetadataTransaction, directory: Inode, name: bytes, caller: Caller) -> None:
    inode = tx.add_inode(_new_inode(directory, Kind.CHARACTER_DEVICE, 0, caller, tx.new_id(), tx.now_ns))
    tree.attach(tx, directory, name, Dentry(inode.number, inode.kind))


def _arrive(tx: MetadataTransaction, source: Inode, new_parent: int, new_entry: bytes, dentry: Dentry) -> None:
    parent = tx.inode(new_parent)
    if dentry.kind != Kind.DIRECTORY and source.bucket != parent.bucket:
        if source.kind == Kind.FILE:
            tx.usage(source.bucket, 0, -source.size)
            tx.usage(parent.bucket, 0, source.size)
        tx.move_inode(source, parent.bucket)
    source.ctime_ns = tx.now_ns
    tx.dirty(source)
    tree.attach(tx, parent, new_entry, dentry)


def _check_same_bucket(tx: MetadataTransaction, source: Inode, new_parent: int) -> None:
    if source.bucket == tx.inode(new_parent).bucket:
        return
    if source.kind == Kind.DIRECTORY or source.nlink > 1:
        raise CrossDevice("directories and hard-linked files stay in their bucket; copy and delete instead")


def _check_not_below(tx: MetadataTransaction, directory: int, new_parent: int) -> None:
    at = new_parent
    while at:
        if at == directory:
            raise InvalidArgument("a directory cannot be moved below itself")
        at = tx.inode(at).parent


def _check_replaceable(tx: MetadataTransaction, source: Dentry, target: Dentry, name: bytes) -> None:
    if target.kind == Kind.DIRECTORY:
        if source.kind != Kind.DIRECTORY:
            raise IsADirectory(f"{os.fsdecode(name)!r} is a directory")
        if tx.inode(target.inode).entries or mount_names.body_of(tx, target.inode):
            raise DirectoryNotEmpty(f"{os.fsdecode(name)!r} is not empty")
    elif source.kind == Kind.DIRECTORY:
        raise NotADirectory(f"{os.fsdecode(name)!r} is not a directory")


def _exchange(
    tx: MetadataTransaction,
    old_parent: int,
    first: tuple[bytes, Dentry],
    new_parent: int,
    second: tuple[bytes, Dentry],
    old_name: bytes,
    new_name: bytes,
) -> None:
    other = tx.inode(second[1].inode)
    _check_same_bucket(tx, other, old_parent)
    if second[1].kind == Kind.DIRECTORY:
        _check_not_below(tx, other.number, old_parent)
    if first[1].inode == second[1].inode:
        return
    tree.detach(tx, tx.inode(old_parent), *first)
    tree.detach(tx, tx.inode(new_parent), *second)
    _arrive(tx, tx.inode(first[1].inode), new_parent, mount_names.entry_of_name(first[1].kind, new_name), first[1])
    _arrive(tx, other, old_parent, mount_names.entry_of_name(second[1].kind, old_name), second[1])


@dataclass(slots=True, frozen=True)
class Attributes:
    """What setattr changes; None leaves a value as it is."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    ctime_ns: int | None = None


def set_attributes(tx: MetadataTransaction, number: int, wanted: Attributes) -> Inode:
    inode = tx.inode(number)
    tree.check_writable(tx, inode)
    apply_attributes(inode, wanted, tx.now_ns)
    if wanted.mode is not None:
        access_lists.follow_mode(tx, inode)
    tx.dirty(inode)
    tx.changed(0, b"", number)
    return inode


def apply_attributes(inode: Inode, wanted: Attributes, now_ns: int) -> None:
    if wanted.mode is not None:
        inode.mode = wanted.mode & 0o7777
    if wanted.uid is not None:
        inode.uid = wanted.uid
    if wanted.gid is not None:
        inode.gid = wanted.gid
    if wanted.atime_ns is not None:
        inode.atime_ns = wanted.atime_ns
    if wanted.mtime_ns is not None:
        inode.mtime_ns = wanted.mtime_ns
    inode.ctime_ns = now_ns


def read_symlink(reader: InodeReader, number: int) -> bytes:
    inode = reader.inode(number)
    if inode.kind != Kind.SYMLINK:
        raise InvalidArgument(f"inode {number} is not a symlink")
    return content.get_inline(reader, number)


# -- extended attributes ----------------------------------------------------------------------------------------------


def get_attribute(reader: InodeReader, number: int, name: bytes) -> bytes:
    if object_attributes.is_one(name):
        return object_attributes.get(reader, number, name)
    if access_lists.is_one(name):
        return access_lists.get(reader, reader.inode(number), name)
    value = reader.get(key_u64(b"Y", number) + name) if len(name) <= XATTR_NAME_BYTES_MAX else None
    if value is None:
        raise NoSuchAttribute(f"attribute {os.fsdecode(name)!r} is not set")
    return value


def is_attribute_name(name: bytes) -> bool:
    """Whether local file systems take attributes of that name; another one could not be copied off."""
    return name.startswith(XATTR_NAMESPACES) or access_lists.is_one(name)


def list_attributes(reader: InodeReader, number: int) -> list[bytes]:
    rows = reader.scan(*prefix_range(key_u64(b"Y", number)))
    plain = [name for key, _ in rows if is_attribute_name(name := key[9:])]  # older versions took any name
    return plain + object_attributes.names(reader, reader.inode(number))


def set_attribute(
    tx: MetadataTransaction, number: int, name: bytes, value: bytes, *, keeps_set_gid: bool = True
) -> None:
    """`keeps_set_gid`: whether the caller is root or in the file's group; only a new access list asks for it."""
    if not 0 < len(name) <= XATTR_NAME_BYTES_MAX or len(value) > XATTR_BYTES_MAX:
        raise InvalidArgument(
            f"an attribute has a name of 1 to {XATTR_NAME_BYTES_MAX} bytes and at most {XATTR_BYTES_MAX} bytes of value"
        )
    tree.check_writable(tx, tx.inode(number))
    _check_list(tx, number, name)
    if object_attributes.is_one(name):
        object_attributes.set_value(tx, number, name, value)
        return
    if access_lists.is_one(name):
        access_lists.set_list(tx, number, name, value, keeps_set_gid=keeps_set_gid)
        return
    inode = tx.inode(number)
    if name in hints.ATTRIBUTES:
        hints.check(name.removeprefix(b"user.").replace(b".", b"-").decode(), value.decode("latin-1"))
        hints.changed(tx, inode)
    tx.put(key_u64(b"Y", number) + name, value)
    inode.ctime_ns = tx.now_ns
    tx.dirty(inode)
    tx.changed(0, b"", number)


def _check_list(tx: MetadataTransaction, number: int, name: bytes) -> None:
    names = list_attributes(tx, number)
    if name not in names and sum(map(len, names)) + len(names) + len(name) + 1 > XATTR_LIST_BYTES_MAX:
        raise NoSpace(f"the names of a file's attributes have at most {XATTR_LIST_BYTES_MAX} bytes; remove some")


def remove_attribute(tx: MetadataTransaction, number: int, name: bytes) -> None:
    tree.check_writable(tx, tx.inode(number))
    if object_attributes.is_one(name):
        object_attributes.remove(tx, number, name)
        return
    if access_lists.is_one(name):
        access_lists.set_list(tx, number, name, None)
        return
    get_attribute(tx, number, name)
    inode = tx.inode(number)
    if name in hints.ATTRIBUTES:
        hints.changed(tx, inode)
    tx.delete(key_u64(b"Y", number) + name)
    inode.ctime_ns = tx.now_ns
    tx.dirty(inode)
    tx.changed(0, b"", number)
