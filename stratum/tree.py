"""The namespace: directories, entries, links. Pure functions over a reader or a transaction.

Invariants kept here
* `entries` and `live` of a directory equal what its dentries say; liveness moves to the parent only when it flips.
* A directory that is not explicit, carries no object and has no entries is removed by whoever emptied it through S3.
* An inode whose last name went is freed at once, unless a live mount may still use it: then an O row holds it.
* No path-to-inode result leaves a transaction.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from stratum import content, filling, longkeys, names
from stratum.errors import InvalidName, KeyTooLong, NotFound, ReadOnlyBucket, TooManyLinks
from stratum.schema import LINKS_MAX, ROOT_INODE, Dentry, Inode, Kind, key_u64_u64

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stratum.schema import BucketRow
    from stratum.transaction import InodeReader, MetadataTransaction

KEY_BYTES_MAX = 1024


def check_key(key: bytes) -> None:
    """Raises `KeyTooLong`, or `InvalidName` for an empty key, NUL or invalid UTF-8. Everything else is data."""
    if len(key) > KEY_BYTES_MAX:
        raise KeyTooLong(len(key))
    if not key or b"\0" in key:
        raise InvalidName("a key has at least one byte and no NUL")
    try:
        key.decode()
    except UnicodeDecodeError as error:
        raise InvalidName("a key must be valid UTF-8") from error


def split_key(key: bytes) -> tuple[list[bytes], bytes]:
    """The directory entries on the way, and the entry of the object itself: empty when the key ends in '/'."""
    parts = key.split(b"/")
    return [part + b"/" for part in parts[:-1]], parts[-1]


def get_dentry(reader: InodeReader, directory: int, entry: bytes) -> Dentry | None:
    """Raises `StillFilling`, in a reader, for one that a young clone has not got yet."""
    raw = longkeys.get(reader, b"D", directory, entry)
    if raw is None and reader.any_frozen:
        raw = filling.missing(reader, directory, entry)
    return None if raw is None else Dentry.unpack(raw)


def scan_dentries(
    reader: InodeReader, directory: int, start: bytes = b"", prefix: bytes = b""
) -> Iterator[tuple[bytes, Dentry]]:
    """Entries from `start` on in S3 order. Stop consuming before the map changes.

    Raises `StillFilling` where a young clone has no more of them yet.
    """
    for entry, raw in filling.entries(reader, directory, start, prefix):
        yield entry, Dentry.unpack(raw)


def check_writable(reader: InodeReader, inode: Inode) -> None:
    """Raises `ReadOnlyBucket` if the inode lies in a snapshot."""
    if inode.bucket and reader.inode(inode.bucket).flags & Inode.READ_ONLY:
        raise ReadOnlyBucket("this is a snapshot and does not change; `stratum clone` makes a writable copy of it")


def walk(reader: InodeReader, directory: int, entries: list[bytes]) -> int | None:
    for entry in entries:
        dentry = get_dentry(reader, directory, entry)
        if dentry is None:
            return None
        directory = dentry.inode
    return directory


def find_object(reader: InodeReader, bucket: BucketRow, key: bytes) -> Inode | None:
    """The inode that S3 serves under `key`: a regular file, a directory's own object, or an explicit empty directory."""
    entries, name = split_key(key)
    directory = walk(reader, bucket.inode, entries)
    if directory is None:
        return None
    if name:
        dentry = get_dentry(reader, directory, name)
        return reader.inode(dentry.inode) if dentry is not None and dentry.kind == Kind.FILE else None
    inode = reader.inode(directory)
    if inode.object_inode:
        return reader.inode(inode.object_inode)
    return inode if inode.explicit and not inode.live and directory != bucket.inode else None


# -- changes ----------------------------------------------------------------------------------------------------------


def change_liveness(tx: MetadataTransaction, directory: Inode, change: Callable[[Inode], None]) -> None:
    """Apply `change` to a directory and tell its parents if S3 now shows it, or no longer."""
    before = directory.is_live
    change(directory)
    tx.dirty(directory)
    # A loop: a key may have a thousand directories.
    while directory.is_live != before and directory.parent:
        delta = 1 if directory.is_live else -1
        directory = tx.inode(directory.parent)
        before = directory.is_live
        add_live(directory, delta)
        tx.dirty(directory)


def add_live(directory: Inode, delta: int) -> None:
    directory.live += delta
    assert directory.live >= 0, f"directory {directory.number:#x} has fewer than no live children"


def set_explicit(directory: Inode) -> None:
    directory.flags |= Inode.EXPLICIT


def touch(tx: MetadataTransaction, directory: Inode) -> None:
    directory.mtime_ns = directory.ctime_ns = tx.now_ns
    tx.dirty(directory)


def shows_in_s3(tx: MetadataTransaction, dentry: Dentry) -> bool:
    if dentry.kind == Kind.DIRECTORY:
        return tx.inode(dentry.inode).is_live
    return dentry.kind == Kind.FILE


def attach(tx: MetadataTransaction, parent: Inode, entry: bytes, dentry: Dentry) -> None:
    """Add an entry that is not there. The link count of the target is the caller's."""
    longkeys.put(tx, b"D", parent.number, entry, dentry.pack(), tx.new_id)
    parent.entries += 1
    _add_name(tx, parent, entry, dentry)
    if dentry.kind == Kind.DIRECTORY:
        parent.nlink += 1
    elif dentry.kind == Kind.FILE:
        tx.usage(parent.bucket, 1, 0)
    touch(tx, parent)
    if shows_in_s3(tx, dentry):
        change_liveness(tx, parent, lambda directory: add_live(directory, 1))
    log_entry(tx, parent.number, entry, dentry.inode)


def _add_name(tx: MetadataTransaction, parent: Inode, entry: bytes, dentry: Dentry) -> None:
    """Of several names of a file the newest counts: what a directory says about its files reaches them through it."""
    inode = tx.inode(dentry.inode)
    if dentry.kind == Kind.DIRECTORY:
        inode.parent, inode.entry = parent.number, entry
    else:
        names.add(tx, inode, parent.number, entry)
    tx.dirty(inode)


def _remove_name(tx: MetadataTransaction, parent: Inode, entry: bytes, dentry: Dentry) -> None:
    if dentry.kind != Kind.DIRECTORY:
        inode = tx.inode(dentry.inode)
        names.remove(tx, inode, parent.number, entry)
        tx.dirty(inode)


def own_object(
    tx: MetadataTransaction, directory: Inode, number: int, change: Callable[[Inode], None] = lambda _: None
) -> None:
    """Let the object under the directory's own key be `number`, 0 for none. `change` does more to the directory. Links are the caller's."""
    before = directory.object_inode
    if before:
        inode = tx.inode(before)
        names.remove(tx, inode, directory.number, b"")
        tx.dirty(inode)
    tx.usage(directory.bucket, (1 if number else 0) - (1 if before else 0), 0)

    def own(inode: Inode) -> None:
        inode.rdev = number
        change(inode)

    change_liveness(tx, directory, own)
    if number:
        inode = tx.inode(number)
        names.add(tx, inode, directory.number, b"")
        tx.dirty(inode)


def detach(tx: MetadataTransaction, parent: Inode, entry: bytes, dentry: Dentry) -> None:
    """Remove an entry; the target's link count is the caller's."""
    live = shows_in_s3(tx, dentry)
    longkeys.delete(tx, b"D", parent.number, entry)
    _remove_name(tx, parent, entry, dentry)
    parent.entries -= 1
    if dentry.kind == Kind.DIRECTORY:
        parent.nlink -= 1
    elif dentry.kind == Kind.FILE:
        tx.usage(parent.bucket, -1, 0)
    touch(tx, parent)
    if live:
        change_liveness(tx, parent, lambda directory: add_live(directory, -1))
    log_entry(tx, parent.number, entry, dentry.inode)


def swap(tx: MetadataTransaction, parent: Inode, entry: bytes, old: Dentry, new: Dentry) -> None:
    """Replace one file entry by another in place."""
    if old.kind != Kind.FILE:
        detach(tx, parent, entry, old)
        attach(tx, parent, entry, new)
        return
    longkeys.put(tx, b"D", parent.number, entry, new.pack(), tx.new_id)
    _remove_name(tx, parent, entry, old)
    _add_name(tx, parent, entry, new)
    touch(tx, parent)
    log_entry(tx, parent.number, entry, old.inode)


def log_entry(tx: MetadataTransaction, parent: int, entry: bytes, inode: int) -> None:
    tx.changed(parent, entry, inode)


def new_directory(tx: MetadataTransaction, parent: Inode, *, mode: int, uid: int, gid: int, explicit: bool) -> Inode:
    inode = Inode(
        tx.new_id(),
        Kind.DIRECTORY,
        mode=mode,
        uid=uid,
        gid=gid,
        now_ns=tx.now_ns,
        bucket=parent.bucket,
        parent=parent.number,
    )
    inode.nlink = 2
    if explicit:
        inode.flags |= Inode.EXPLICIT
    return tx.add_inode(inode)


def ensure_directories(tx: MetadataTransaction, bucket: BucketRow, entries: list[bytes]) -> Inode:
    """The last directory of a key's way, made with the bucket's modes where missing."""
    directory = tx.inode(bucket.inode)
    for entry in entries:
        dentry = get_dentry(tx, directory.number, entry)
        if dentry is None:
            child = new_directory(tx, directory, mode=bucket.dir_mode, uid=bucket.uid, gid=bucket.gid, explicit=False)
            attach(tx, directory, entry, Dentry(child.number, Kind.DIRECTORY))
            directory = child
        else:
            directory = tx.inode(dentry.inode)
    return directory


def remove_implicit(tx: MetadataTransaction, bucket: BucketRow, entries: list[bytes]) -> None:
    """Remove the directories of a key's way that hold nothing any more, innermost first."""
    chain = [bucket.inode]
    for entry in entries:
        dentry = get_dentry(tx, chain[-1], entry)
        if dentry is None:
            return
        chain.append(dentry.inode)
    for depth in range(len(entries), 0, -1):
        inode = tx.inode(chain[depth])
        if inode.entries or inode.is_live:
            return
        detach(tx, tx.inode(chain[depth - 1]), entries[depth - 1], Dentry(inode.number, Kind.DIRECTORY))
        drop_directory(tx, inode)


def drop_directory(tx: MetadataTransaction, inode: Inode, still_used: Callable[[int], bool] | None = None) -> None:
    inode.nlink = 0
    hold_or_free(tx, inode, still_used)


def add_link(tx: MetadataTransaction, inode: Inode) -> None:
    if inode.nlink >= LINKS_MAX:
        raise TooManyLinks(f"inode {inode.number} has {inode.nlink} links, the most there can be")
    inode.nlink += 1
    inode.ctime_ns = tx.now_ns
    tx.dirty(inode)


def drop_link(tx: MetadataTransaction, inode: Inode, still_used: Callable[[int], bool] | None = None) -> None:
    """One name less. `still_used` says whether the calling mount has the inode open."""
    inode.nlink -= 1
    inode.ctime_ns = tx.now_ns
    tx.dirty(inode)
    if inode.nlink:
        tx.changed(0, b"", inode.number)
        return
    hold_or_free(tx, inode, still_used)


def hold_or_free(tx: MetadataTransaction, inode: Inode, still_used: Callable[[int], bool] | None) -> None:
    holders = [
        mount
        for mount in tx.live_mounts()
        if mount != tx.session or (still_used is not None and still_used(inode.number))
    ]
    if not holders:
        content.free_inode(tx, inode)
        return
    inode.nlink = 0
    hold(tx, inode, holders)
    tx.changed(0, b"", inode.number, orphan=True)


def hold(tx: MetadataTransaction, inode: Inode, mounts: list[int]) -> None:
    """Keep an inode without names for mounts."""
    for mount in mounts:
        tx.put(key_u64_u64(b"O", mount, inode.number), b"")
    inode.live = len(mounts)  # of an inode without names: how many O rows hold it
    tx.dirty(inode)


def let_go(tx: MetadataTransaction, session: int, inode: Inode) -> bool:
    """A mount does not hold an inode any more; False if it did not."""
    if not tx.delete(key_u64_u64(b"O", session, inode.number)):
        return False
    inode.live -= 1
    tx.dirty(inode)
    return True


def release_orphan(tx: MetadataTransaction, session: int, number: int) -> None:
    """A mount stopped using an inode without names; the last one frees it."""
    try:
        inode = tx.inode(number)
    except NotFound:
        tx.delete(key_u64_u64(b"O", session, number))
        return
    if let_go(tx, session, inode) and inode.live <= 0 and inode.nlink == 0:
        content.free_inode(tx, inode)


def path_of_root(name: str) -> bytes:
    return os.fsencode(name) + b"/"


def bucket_directory(reader: InodeReader, name: str) -> Dentry | None:
    return get_dentry(reader, ROOT_INODE, path_of_root(name))
