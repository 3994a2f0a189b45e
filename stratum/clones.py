"""Clones and snapshots: another tree over the same extents. No byte of data is copied, and of a directory at first nothing else either.

A clone shows one committed state of its source, taken when it begins, and appears as a whole or not at all. What a directory holds is filled in
when it is asked for, and behind everybody's back (filling.py).

Invariants
* Until it has its name a clone hangs on nothing but a Q row of the session that makes it; what a dead session left there is
  removed with it (`prune`). A snapshot that is being removed is held the same way.
* A file is copied from one LMDB snapshot under the volume's reader guard, so an extent that loses its last reference
  meanwhile still has its bytes and its row when the clone refers to it.
* Inside a clone hard links are links again; links out of it are not kept.
"""

from __future__ import annotations

import os
import stat
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from stratum import access_lists, buckets, content, filling, frozen, inventory, mount_names, quotas, tree
from stratum.errors import AccessRefused, Exists, InvalidArgument, InvalidBucketName, NotADirectory, NotFound
from stratum.files import check_new_name
from stratum.paths import components
from stratum.schema import (
    ROOT_INODE,
    BucketRow,
    Dentry,
    Inode,
    Kind,
    key_u64,
    key_u64_u64,
    prefix_range,
)  # fmt: skip
from stratum.write_buffer import FOREVER, changed_content

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from stratum.transaction import InodeReader, MetadataTransaction
    from stratum.volume import Volume

ENTRIES_PRUNED_AT_ONCE = 128
SNAPSHOT_MARK = ".snap."


def find(reader: InodeReader, path: bytes, enter: Callable[[Inode], None] = lambda _: None) -> Inode:
    """The inode at `BUCKET/...` as a mount shows it; `enter` is asked before anything is looked up in a directory.

    Raises `NotFound`, `InvalidArgument`, or what `enter` does.
    """
    at = reader.inode(ROOT_INODE)
    for part in components(path):
        enter(at)
        found = mount_names.find(reader, at.number, part) if at.kind == Kind.DIRECTORY else None
        if found is None:
            raise NotFound(f"{os.fsdecode(path)!r} does not exist: there is no {os.fsdecode(part)!r}")
        at = reader.inode(found[1].inode)
    return at


def find_readable(reader: InodeReader, path: bytes, uid: int, gids: Collection[int]) -> Inode:
    """The inode at `path`, if a process with these ids may reach and read it. Raises `NotFound` or `AccessRefused`."""

    def enter(directory: Inode) -> None:
        if not access_lists.permits(reader, directory, uid, gids, access_lists.EXECUTE):
            raise AccessRefused(f"{os.fsdecode(path)!r} lies in a directory that is closed to user {uid}")

    found = find(reader, path, enter)
    if not access_lists.permits(reader, found, uid, gids, access_lists.READ):
        raise AccessRefused(f"{os.fsdecode(path)!r} is not for user {uid} to read")
    return found


def _shown(path: bytes) -> str:
    return b"/".join(components(path)).decode("utf-8", "replace")


def _clone(
    volume: Volume,
    source: bytes,
    bucket_of: Callable[[InodeReader], int],
    finish: Callable[[MetadataTransaction, Inode], None],
    *,
    wait: bool,
) -> None:
    session = volume.session.id
    try:
        with volume.reading():
            root = filling.patiently(volume, lambda: _copy_if_file(volume, source, bucket_of))
        freeze = 0
        if not root:
            root, freeze = _begin(volume, source, bucket_of)

        def attach(tx: MetadataTransaction) -> None:
            inode = tx.inode(root)
            if freeze and _is_bounded(tx, inode.bucket):
                quotas.check(tx, {inode.bucket: (1, 1)})
            finish(tx, inode)
            tx.delete(key_u64_u64(b"Q", session, root))

        volume.mutate(attach)
    except BaseException:
        prune_session(volume, session)
        raise
    if wait and freeze:
        filling.fill_all(volume, freeze)


def _is_bounded(reader: InodeReader, bucket: int) -> bool:
    return quotas.room(reader, bucket) != (quotas.UNLIMITED, quotas.UNLIMITED)


def _copy_if_file(volume: Volume, source: bytes, bucket_of: Callable[[InodeReader], int]) -> int:
    """The number of a copy without a name, held by a Q row; 0 for a directory."""
    with volume.snapshot() as reader:
        origin = find(reader, source)
        bucket = bucket_of(reader)
        return 0 if origin.kind == Kind.DIRECTORY else filling.copy_file(volume, reader, origin, bucket)


def _begin(volume: Volume, source: bytes, bucket_of: Callable[[InodeReader], int]) -> tuple[int, int]:
    """The root of a clone of a directory as it is now, without a name, held by a Q row; and what it is filled from."""
    root, session = volume.new_id(), volume.session.id

    def begin(tx: MetadataTransaction) -> tuple[int, bool, list[int]]:
        origin = find(tx, source)
        bucket = bucket_of(tx) or root
        before = frozen.filling_bucket(tx, origin.bucket)
        if before:
            return 0, False, before
        freeze = frozen.begin(tx, origin.number, bucket)
        state = filling.FrozenReader(tx.kv, freeze)
        with tx.filling():
            filling.Filler(tx, freeze, state, checked=True).copy_directory(state.inode(origin.number), root, bucket)
        frozen.end_if_unused(tx, freeze)
        tx.put(key_u64_u64(b"Q", session, root), b"")
        return freeze, _is_bounded(tx, bucket), []

    while True:
        freeze, is_bounded, before = filling.patiently(volume, lambda: volume.mutate(begin))
        for unfinished in before:
            filling.fill_all(volume, unfinished)
        if freeze:
            break
    if is_bounded:
        filling.fill_all(volume, freeze, checked=True)
    return root, freeze


def clone(volume: Volume, source: bytes, target: bytes, *, wait: bool = False) -> None:
    """Make `target` (BUCKET/..., or a new BUCKET for a directory) a clone of `source`. It must not exist, its parent must.

    However much a directory holds, this takes the same time, unless quotas are set: then it is filled before it appears. `wait`: until it is filled.
    Raises `NotFound`, `Exists`, `NotADirectory`, `ReadOnlyBucket`, `InvalidBucketName`, `InvalidArgument` or `NoSpace`.
    """
    parts = components(target)
    name = parts[-1]

    def bucket_of(reader: InodeReader) -> int:
        if len(parts) == 1:
            if find(reader, source).kind != Kind.DIRECTORY:
                raise NotADirectory(f"{os.fsdecode(source)!r} is a file, and the root holds buckets only")
            _check_free(reader, ROOT_INODE, name)
            return 0
        parent = find(reader, b"/".join(parts[:-1]))
        _check_parent(reader, parent, name)
        return parent.bucket

    def finish(tx: MetadataTransaction, root: Inode) -> None:
        if len(parts) == 1:
            _become_bucket(tx, root, os.fsdecode(name), replace(_settings(tx, source), snapshot_of=""))
            return
        parent = find(tx, b"/".join(parts[:-1]))
        _check_parent(tx, parent, name)
        if parent.bucket != root.bucket:
            raise NotFound(f"{os.fsdecode(target)!r} was replaced meanwhile; try again")
        if root.kind == Kind.DIRECTORY:
            root.flags |= Inode.EXPLICIT if not root.entries else 0
            tx.dirty(root)
        tree.attach(tx, parent, mount_names.entry_of_name(root.kind, name), Dentry(root.number, root.kind))

    _clone(volume, source, bucket_of, finish, wait=wait)


def _check_free(reader: InodeReader, parent: int, name: bytes) -> None:
    if mount_names.find(reader, parent, name) is not None:
        raise Exists(f"{os.fsdecode(name)!r} exists already; choose another name or remove it first")


def _check_parent(reader: InodeReader, parent: Inode, name: bytes) -> None:
    check_new_name(reader, parent.number, name)
    _check_free(reader, parent.number, name)


def _settings(reader: InodeReader, source: bytes) -> BucketRow:
    return buckets.get(reader, os.fsdecode(components(source)[0]))


def _become_bucket(tx: MetadataTransaction, root: Inode, name: str, settings: BucketRow) -> None:
    buckets.check_free(tx, name)
    root.flags |= Inode.EXPLICIT
    tx.dirty(root)
    row = replace(settings, inode=root.number, created_ns=tx.now_ns)
    inventory.put(tx, name, row)
    tree.attach(tx, tx.inode(ROOT_INODE), tree.path_of_root(name), Dentry(root.number, Kind.DIRECTORY))


def replace_content(tx: MetadataTransaction, source: int, target: int) -> None:
    """Let a file show what another file shows now; its owner, permissions and S3 metadata stay. Raises `InvalidArgument`.

    Like any write it takes set-user-id away, and set-group-id of a program.
    """
    origin, inode = tx.inode(source), tx.inode(target)
    if origin.kind != Kind.FILE or inode.kind != Kind.FILE:
        raise InvalidArgument(
            "only a regular file can be cloned into a regular file; `stratum clone` clones directories"
        )
    tree.check_writable(tx, inode)
    if source == target:
        return
    inode.mode &= ~stat.S_ISUID
    if inode.mode & stat.S_IXGRP:
        inode.mode &= ~stat.S_ISGID
    content.drop_inline(tx, inode)
    tx.cut_slices(target, 0, FOREVER)
    content.set_size(tx, inode, 0)
    content.share(tx, origin, inode)
    changed_content(tx, inode, tx.now_ns)


# -- snapshots ----------------------------------------------------------------------------------------------------------


def snapshot_name(path: bytes, name: str | None) -> str:
    """The bucket a snapshot becomes. Raises `InvalidBucketName`."""
    bucket = os.fsdecode(components(path)[0])
    full = f"{bucket}{SNAPSHOT_MARK}{name or time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    try:
        buckets.check_name(full)
    except InvalidBucketName:
        raise InvalidArgument(
            f"a snapshot is a bucket of its own, and {full!r} is no bucket name: at most 63 lower-case letters, digits, '-' and '.'"
        ) from None
    return full


def create_snapshot(volume: Volume, path: bytes, name: str | None, *, wait: bool = False) -> str:
    """A read-only bucket that shows what `path` (a bucket or directory) holds now; its name.

    Raises what `clone` raises.
    """
    full = snapshot_name(path, name)
    shown = _shown(path)

    def bucket_of(reader: InodeReader) -> int:
        buckets.check_free(reader, full)
        if find(reader, path).kind != Kind.DIRECTORY:
            raise NotADirectory(
                f"{shown!r} is a file; a snapshot is of a bucket or directory, and `stratum clone` clones files"
            )
        return 0

    def finish(tx: MetadataTransaction, root: Inode) -> None:
        _become_bucket(tx, root, full, replace(_settings(tx, path), snapshot_of=shown))
        root.flags |= Inode.READ_ONLY
        tx.dirty(root)

    _clone(volume, path, bucket_of, finish, wait=wait)
    return full


def snapshots(reader: InodeReader, path: bytes | None) -> list[tuple[str, BucketRow]]:
    """Those of `path`, or all: (bucket, row), oldest first."""
    shown = _shown(path) if path else None
    rows = [(name, row) for name, row in buckets.scan(reader) if row.snapshot_of]
    return sorted(
        (found for found in rows if shown is None or found[1].snapshot_of == shown),
        key=lambda found: found[1].created_ns,
    )


def remove_snapshot(volume: Volume, path: bytes, name: str) -> str:
    """Forget a snapshot, at once for everybody; its rows go in small transactions. Raises `NotFound`."""
    full, session = snapshot_name(path, name), volume.session.id
    shown = _shown(path)

    def detach(tx: MetadataTransaction) -> None:
        raw = tx.get(b"B" + full.encode())
        row = buckets.get(tx, full) if raw is not None else None
        if row is None or row.snapshot_of != shown:
            raise NotFound(f"{shown!r} has no snapshot {name!r}; `stratum snapshot list` shows what there is")
        inventory.delete(tx, full)
        tree.detach(tx, tx.inode(ROOT_INODE), tree.path_of_root(full), Dentry(row.inode, Kind.DIRECTORY))
        root = tx.inode(row.inode)
        root.parent = 0
        root.flags &= ~Inode.READ_ONLY
        tx.dirty(root)
        tx.put(key_u64_u64(b"Q", session, row.inode), b"")

    volume.mutate(detach, frees=True)
    prune_session(volume, session)
    return full


# -- removing -----------------------------------------------------------------------------------------------------------


def prune_session(volume: Volume, session: int) -> None:
    """Remove the trees that hang on a session's Q rows. May be interrupted anywhere and begun again."""
    while True:
        with volume.snapshot() as reader:
            held = next(reader.scan(*prefix_range(key_u64(b"Q", session))), None)
        if held is None:
            return
        key = held[0]
        root = int.from_bytes(key[9:], "big")

        def prune(tx: MetadataTransaction, root: int = root, key: bytes = key) -> None:
            if not tx.has_inode(root) or _prune(tx, root, ENTRIES_PRUNED_AT_ONCE):
                tx.delete(key)

        volume.mutate(prune, frees=True)


def _prune(tx: MetadataTransaction, root: int, limit: int) -> bool:
    """Remove about `limit` entries of a tree without a name, deepest first; True when all of it is gone."""
    top = tx.inode(root)
    if top.kind != Kind.DIRECTORY:
        tree.drop_link(tx, top)
        return True
    chain: list[tuple[int, bytes]] = [(root, b"")]
    left = limit
    while left > 0:
        number, name = chain[-1]
        directory = tx.inode(number)
        frozen.stop_waiting(tx, number)  # what it has not got yet it need not get
        children: list[tuple[bytes, Dentry]] = []
        for entry, dentry in tree.scan_dentries(tx, number):
            children.append((entry, dentry))
            if dentry.kind == Kind.DIRECTORY or len(children) >= left:
                break
        for entry, dentry in children:
            if dentry.kind == Kind.DIRECTORY:
                chain.append((dentry.inode, entry))
                break
            tree.detach(tx, directory, entry, dentry)
            inode = tx.inode(dentry.inode)
            if not inode.parent:
                inode.nlink = 1  # the other links would have been filled in
            tree.drop_link(tx, inode)
            left -= 1
        if children:
            continue
        owned = directory.object_inode
        if owned:
            tree.own_object(tx, directory, 0)
            tree.drop_link(tx, tx.inode(owned))
        chain.pop()
        left -= 1
        if chain:
            tree.detach(tx, tx.inode(chain[-1][0]), name, Dentry(number, Kind.DIRECTORY))
        tree.drop_directory(tx, directory)
        if not chain:
            if directory.bucket == root:
                tx.forget_usage(root)
            return True
    return False
