"""Clones and snapshots: another tree over the same extents. No byte of data is copied.

A clone shows one committed state of its source, taken when it begins, and appears as a whole or not at all.

Invariants
* Until it is finished a clone hangs on nothing but a Q row of the session that builds it; what a dead session left there is
  removed with it (`prune`). A snapshot that is being removed is held the same way.
* The source is read from one LMDB snapshot under the volume's reader guard, so an extent that loses its last reference
  meanwhile still has its bytes and its row when the clone refers to it.
* Inside a clone hard links are links again; links out of it are not kept.
"""

from __future__ import annotations

import os
import stat
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from stratum import access_lists, buckets, content, evidence, inventory, mount_names, objects, tree
from stratum.errors import AccessRefused, Exists, InvalidArgument, InvalidBucketName, NotADirectory, NotFound
from stratum.files import check_new_name
from stratum.paths import components
from stratum.schema import (
    ROOT_INODE,
    BucketRow,
    Dentry,
    Inode,
    Kind,
    Slice,
    key_u64,
    key_u64_u64,
    prefix_range,
)  # fmt: skip
from stratum.write_buffer import FOREVER, changed_content

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from stratum.transaction import InodeReader, MetadataTransaction
    from stratum.volume import Volume

    Step = Callable[[MetadataTransaction], None]

STEPS_AT_ONCE = 128
SLICES_AT_ONCE = 256
SNAPSHOT_MARK = ".snap."


@dataclass(slots=True)
class Cloned:
    """What a clone holds. `size` is that of its files, shared with the source."""

    files: int = 0
    directories: int = 0
    size: int = 0


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


class _Builder:
    """Copies rows of one snapshot into a tree without a name, in small transactions."""

    def __init__(self, volume: Volume, reader: InodeReader, bucket: int) -> None:
        """`bucket` is the inode of the bucket the clone will be in; 0: the clone's root is one."""
        self._volume = volume
        self._reader = reader
        self._bucket = bucket
        self._steps: list[Step] = []
        self._links: dict[int, int] = {}
        self.cloned = Cloned()

    def _later(self, step: Step) -> None:
        self._steps.append(step)
        if len(self._steps) >= STEPS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        steps, self._steps = self._steps, []

        def run(tx: MetadataTransaction) -> None:
            for step in steps:
                step(tx)

        self._volume.mutate(run)

    def build(self, source: Inode) -> int:
        """The number of the root of the finished tree, held by a Q row of this session."""
        root, session = self._volume.new_id(), self._volume.session.id
        self._bucket = self._bucket or root
        self._inode(source, root, lambda tx: tx.put(key_u64_u64(b"Q", session, root), b""))
        pending = [(source, root)] if source.kind == Kind.DIRECTORY else []
        while pending:
            directory, copied = pending.pop()
            for entry, dentry in tree.scan_dentries(self._reader, directory.number):
                child = self._reader.inode(dentry.inode)
                known = self._links.get(child.number)
                if known is not None:
                    self._later(self._link(copied, entry, known))
                    continue
                number = self._volume.new_id()
                if child.kind == Kind.DIRECTORY:
                    pending.append((child, number))
                elif child.nlink > 1:
                    self._links[child.number] = number
                self._inode(child, number, self._attach(copied, entry, Dentry(number, child.kind)))
            self._finish_directory(directory, copied)
        self._flush()
        return root

    @staticmethod
    def _attach(parent: int, entry: bytes, dentry: Dentry) -> Step:
        def step(tx: MetadataTransaction) -> None:
            tree.attach(tx, tx.inode(parent), entry, dentry)

        return step

    @staticmethod
    def _link(parent: int, entry: bytes, number: int) -> Step:
        def step(tx: MetadataTransaction) -> None:
            inode = tx.inode(number)
            tree.add_link(tx, inode)
            tree.attach(tx, tx.inode(parent), entry, Dentry(number, inode.kind))

        return step

    def _finish_directory(self, source: Inode, number: int) -> None:
        """Its own object, and the times that its children changed."""
        if source.object_inode:
            owned = self._volume.new_id()

            def own(tx: MetadataTransaction) -> None:
                inode = tx.inode(number)
                tree.own_object(tx, inode, owned)

            self._inode(self._reader.inode(source.object_inode), owned, own)

        def times(tx: MetadataTransaction) -> None:
            inode = tx.inode(number)
            inode.atime_ns, inode.mtime_ns = source.atime_ns, source.mtime_ns
            tx.dirty(inode)

        self._later(times)

    def _inode(self, source: Inode, number: int, hang: Step) -> None:
        """Everything of an inode. `hang` gives it its place in the same transaction, so that it can always be found."""
        reader, old = self._reader, source.number
        rows = [(key_u64(b"Y", number) + key[9:], raw) for key, raw in reader.scan(*prefix_range(key_u64(b"Y", old)))]
        for flag, table in ((Inode.HAS_METADATA, b"M"), (Inode.INLINE, b"N")):
            raw = reader.get(key_u64(table, old)) if source.flags & flag else None
            if raw is not None:
                rows.append((key_u64(table, number), raw))
        is_directory = source.kind == Kind.DIRECTORY

        def step(tx: MetadataTransaction) -> None:
            inode = Inode(
                number, source.kind, mode=source.mode, uid=source.uid, gid=source.gid, now_ns=tx.now_ns, bucket=self._bucket,
                rdev=0 if is_directory else source.rdev,
            )  # fmt: skip
            inode.atime_ns, inode.mtime_ns = source.atime_ns, source.mtime_ns
            inode.flags = source.flags & ~(Inode.READ_ONLY | Inode.SEVERAL_NAMES)
            inode.nlink = 2 if is_directory else 1
            objects.copy_etag(source, inode)
            tx.add_inode(inode)
            for key, raw in rows:
                tx.put(key, raw)
            if source.kind == Kind.FILE:
                content.set_size(tx, inode, source.size)
            else:
                inode.size = source.size
            hang(tx)

        self._later(step)
        if is_directory:
            self.cloned.directories += 1
            return
        self.cloned.files += 1
        self.cloned.size += source.size
        if source.kind == Kind.FILE and not source.flags & Inode.INLINE:
            self._slices(old, number)

    def _slices(self, old: int, number: int) -> None:
        pieces: list[Slice] = []

        def share(pieces: list[Slice]) -> Step:
            def step(tx: MetadataTransaction) -> None:
                for piece in pieces:
                    tx.put_slice(number, piece, moved=True)
                    tx.reference_extent(piece.extent, 1)
                evidence.shared(tx, number, old)

            return step

        for key, raw in self._reader.scan(*prefix_range(key_u64(b"S", old))):
            pieces.append(Slice.unpack(int.from_bytes(key[9:], "big"), raw))
            if len(pieces) >= SLICES_AT_ONCE:
                self._later(share(pieces))
                pieces = []
        if pieces:
            self._later(share(pieces))


def _clone(
    volume: Volume,
    source: bytes,
    bucket_of: Callable[[InodeReader], int],
    finish: Callable[[MetadataTransaction, Inode], None],
) -> Cloned:
    with volume.reading(), volume.snapshot() as reader:
        origin = find(reader, source)
        builder = _Builder(volume, reader, bucket_of(reader))
        session = volume.session.id
        try:
            root = builder.build(origin)

            def attach(tx: MetadataTransaction) -> None:
                finish(tx, tx.inode(root))
                tx.delete(key_u64_u64(b"Q", session, root))

            volume.mutate(attach)
        except BaseException:
            prune_session(volume, session)
            raise
    return builder.cloned


def clone(volume: Volume, source: bytes, target: bytes) -> Cloned:
    """Make `target` (BUCKET/..., or a new BUCKET for a directory) a clone of `source`. It must not exist, its parent must.

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

    return _clone(volume, source, bucket_of, finish)


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


def create_snapshot(volume: Volume, path: bytes, name: str | None) -> tuple[str, Cloned]:
    """A read-only bucket that shows what `path` (a bucket or directory) holds now; its name and content.

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

    return full, _clone(volume, path, bucket_of, finish)


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
            if not tx.has_inode(root) or _prune(tx, root, STEPS_AT_ONCE):
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
            tree.drop_link(tx, tx.inode(dentry.inode))
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
