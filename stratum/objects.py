"""Objects as S3 sees them: put, read, copy, delete, list. Everything here is one transaction or one snapshot."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from stratum import access_lists, buckets, content, hints, tree
from stratum.errors import InvalidArgument, NoSuchKey, TryAgain
from stratum.preconditions import NO_CONDITIONS, Conditions, check_copy_source, check_read, check_write
from stratum.schema import Dentry, Inode, Kind, ObjectMetadata, key_u64

if TYPE_CHECKING:
    from collections.abc import Callable

    from stratum.content import NewContent, ReadPlan
    from stratum.schema import BucketRow
    from stratum.transaction import InodeReader, MetadataTransaction
    from stratum.volume import Volume

DIRECTORY_METADATA = ObjectMetadata(content_type="application/x-directory")
NO_METADATA = ObjectMetadata()
_MEMO_MAX = 2048
_memo: dict[bytes, ObjectMetadata] = {}
"""Decoded metadata by its row: many objects have the same, and a row cannot go stale."""


@dataclass(slots=True)
class ObjectState:
    """One committed state of an object."""

    inode: Inode
    metadata: ObjectMetadata

    @property
    def size(self) -> int:
        return self.inode.size if self.inode.kind == Kind.FILE else 0

    @property
    def etag(self) -> str:
        return content.EMPTY_MD5.hex() if self.inode.kind == Kind.DIRECTORY else self.inode.etag_text


def metadata_of(reader: InodeReader, inode: Inode) -> ObjectMetadata:
    if inode.kind == Kind.DIRECTORY:
        return DIRECTORY_METADATA
    if not inode.flags & Inode.HAS_METADATA:
        return NO_METADATA
    raw = reader.get(key_u64(b"M", inode.number))
    if raw is None:
        return NO_METADATA
    found = _memo.get(raw)
    if found is None:
        if len(_memo) >= _MEMO_MAX:
            _memo.clear()
        found = _memo[raw] = ObjectMetadata.unpack(raw)
    return found


def set_metadata(tx: MetadataTransaction, inode: Inode, metadata: ObjectMetadata) -> None:
    hints.metadata_set(tx, inode, metadata)
    if metadata == NO_METADATA:
        if inode.flags & Inode.HAS_METADATA:
            tx.delete(key_u64(b"M", inode.number))
        inode.flags &= ~Inode.HAS_METADATA
    else:
        tx.put(key_u64(b"M", inode.number), metadata.pack())
        inode.flags |= Inode.HAS_METADATA
    tx.dirty(inode)


def head(reader: InodeReader, bucket: BucketRow, key: bytes, conditions: Conditions = NO_CONDITIONS) -> ObjectState:
    """Raises `NoSuchKey`, `PreconditionFailed` or `NotModified`."""
    inode = tree.find_object(reader, bucket, key)
    if inode is None:
        raise NoSuchKey(key)
    if conditions is not NO_CONDITIONS:
        check_read(conditions, inode)
    return ObjectState(inode, metadata_of(reader, inode))


def plan(reader: InodeReader, state: ObjectState, start: int, stop: int) -> ReadPlan:
    return content.plan_read(reader, state.inode, start, stop)


@dataclass(slots=True)
class PutRequest:
    """What makes an object. `etag_parts` is 0 for a whole-body MD5, N after N parts."""

    bucket: str
    key: bytes
    etag: bytes
    metadata: ObjectMetadata
    etag_parts: int = 0
    conditions: Conditions = NO_CONDITIONS


def find_for_write(tx: MetadataTransaction, bucket: BucketRow, key: bytes, conditions: Conditions) -> Inode | None:
    """The object there is now, with the write's preconditions checked against it."""
    buckets.check_writable(bucket)
    existing = tree.find_object(tx, bucket, key)
    if conditions is not NO_CONDITIONS:
        check_write(conditions, existing, key)
    return existing


def place(tx: MetadataTransaction, bucket: BucketRow, key: bytes, fill: Callable[[Inode], None]) -> Inode:
    """Put a new inode under `key`; the one before loses this name. `fill` gives it content, ETag and metadata.

    A PUT over an existing file keeps owner, mode and access list. An object always gets a new inode: open handles keep the old bytes,
    and the kernel cannot mix old pages with a new size.
    """
    entries, name = tree.split_key(key)
    parent = tree.ensure_directories(tx, bucket, entries)
    inode = Inode(
        tx.new_id(),
        Kind.FILE,
        mode=bucket.file_mode,
        uid=bucket.uid,
        gid=bucket.gid,
        now_ns=tx.now_ns,
        bucket=bucket.inode,
    )
    if not name:
        _place_own_object(tx, parent, inode, fill)
        return inode
    old = tree.get_dentry(tx, parent.number, name)
    if old is not None and old.kind == Kind.FILE:
        before = tx.inode(old.inode)
        inode.mode, inode.uid, inode.gid = before.mode, before.uid, before.gid
        access_lists.carry(tx, before, inode)
    tx.add_inode(inode)
    fill(inode)
    dentry = Dentry(inode.number, Kind.FILE)
    if old is None:
        tree.attach(tx, parent, name, dentry)
    else:
        tree.swap(tx, parent, name, old, dentry)
        tree.drop_link(tx, tx.inode(old.inode))
    return inode


def _place_own_object(tx: MetadataTransaction, directory: Inode, inode: Inode, fill: Callable[[Inode], None]) -> None:
    tx.add_inode(inode)
    fill(inode)
    old = directory.object_inode
    tree.own_object(tx, directory, inode.number)
    tree.touch(tx, directory)
    tree.log_entry(tx, directory.number, b"", directory.number)
    if old:
        tree.drop_link(tx, tx.inode(old))


def put(tx: MetadataTransaction, request: PutRequest, new: NewContent) -> Inode:
    """Raises `NoSuchBucket` or `PreconditionFailed`; then nothing was changed."""
    bucket = buckets.get(tx, request.bucket)
    find_for_write(tx, bucket, request.key, request.conditions)

    def fill(inode: Inode) -> None:
        content.put_new(tx, inode, new)
        inode.etag, inode.etag_parts = request.etag, request.etag_parts
        set_metadata(tx, inode, request.metadata)

    return place(tx, bucket, request.key, fill)


@dataclass(slots=True)
class CopyRequest:
    """`metadata` and `tags` None keep the source's. `owner` and `acl` are always the copier's."""

    source_bucket: str
    source_key: bytes
    bucket: str
    key: bytes
    metadata: ObjectMetadata | None
    owner: str
    acl: str
    storage_class: str = ""
    source_conditions: Conditions = NO_CONDITIONS
    conditions: Conditions = NO_CONDITIONS
    checksums: dict[str, str] | None = None
    tags: dict[str, str] | None = None
    expected_source: tuple[int, int] | None = None


def copy(tx: MetadataTransaction, request: CopyRequest) -> Inode:
    """A metadata edit: the new object shares the source's extents. Keeps the ETag, as the bytes are the same."""
    source_bucket = buckets.get(tx, request.source_bucket)
    source = tree.find_object(tx, source_bucket, request.source_key)
    if source is None:
        raise NoSuchKey(request.source_key)
    if request.source_conditions is not NO_CONDITIONS:
        check_copy_source(request.source_conditions, source)
    if request.expected_source is not None and request.expected_source != (source.number, source.version):
        raise TryAgain("the copy source changed meanwhile")
    bucket = buckets.get(tx, request.bucket)
    find_for_write(tx, bucket, request.key, request.conditions)
    before = metadata_of(tx, source)
    metadata = before if request.metadata is None else request.metadata
    metadata = replace(
        metadata, owner=request.owner, acl=request.acl, storage_class=request.storage_class,
        tags=before.tags if request.tags is None else request.tags,
        checksums=before.checksums if request.checksums is None else request.checksums,
        checksum_type=before.checksum_type if request.checksums is None else "FULL_OBJECT",
        part_sizes=before.part_sizes, part_checksums=before.part_checksums if request.checksums is None else [],
    )  # fmt: skip

    def fill(inode: Inode) -> None:
        if source.kind == Kind.FILE:
            content.share(tx, source, inode)
            hints.bring_back(tx, inode, request.storage_class)
        if source.kind == Kind.DIRECTORY:
            inode.etag, inode.etag_parts = content.EMPTY_MD5, 0
        else:
            content.copy_etag(source, inode)
        set_metadata(tx, inode, metadata)

    return place(tx, bucket, request.key, fill)


def delete(tx: MetadataTransaction, bucket: BucketRow, key: bytes, conditions: Conditions = NO_CONDITIONS) -> bool:
    """Remove a key; False if it was not there. Directories nobody made explicitly go when they are empty."""
    buckets.check_writable(bucket)
    existing = tree.find_object(tx, bucket, key)
    if conditions is not NO_CONDITIONS:
        check_write(conditions, existing, key)
    if existing is None:
        return False
    entries, name = tree.split_key(key)
    directory_number = tree.walk(tx, bucket.inode, entries)
    assert directory_number is not None
    directory = tx.inode(directory_number)
    if name:
        tree.detach(tx, directory, name, Dentry(existing.number, Kind.FILE))
        tree.drop_link(tx, tx.inode(existing.number))
    else:

        def clear(inode: Inode) -> None:
            inode.flags &= ~Inode.EXPLICIT

        owned = directory.object_inode
        tree.own_object(tx, directory, 0, clear)
        tree.log_entry(tx, directory.number, b"", directory.number)
        if owned:
            tree.drop_link(tx, tx.inode(owned))
    tree.remove_implicit(tx, bucket, entries)
    return True


def set_acl(tx: MetadataTransaction, bucket: BucketRow, key: bytes, acl: str) -> None:
    buckets.check_writable(bucket)
    inode = tree.find_object(tx, bucket, key)
    if inode is None:
        raise NoSuchKey(key)
    if inode.kind == Kind.FILE:
        inode = tx.inode(inode.number)
        set_metadata(tx, inode, replace(metadata_of(tx, inode), acl=acl))


def set_tags(tx: MetadataTransaction, bucket: BucketRow, key: bytes, tags: dict[str, str]) -> None:
    """Neither ETag nor time of change tell of it. Raises `NoSuchKey`, or `InvalidArgument` for a key that is a directory only."""
    buckets.check_writable(bucket)
    inode = tree.find_object(tx, bucket, key)
    if inode is None:
        raise NoSuchKey(key)
    if inode.kind != Kind.FILE:
        if tags:
            raise InvalidArgument(
                "a directory that nobody put as an object keeps no tags; put an object under its key first"
            )
        return
    inode = tx.inode(inode.number)
    set_metadata(tx, inode, replace(metadata_of(tx, inode), tags=tags))
    tx.changed(0, b"", inode.number)


def read_all(volume: Volume, bucket: str, key: bytes) -> bytes:
    """The whole of a small object; for tools and tests."""
    with volume.reading():
        with volume.snapshot() as reader:
            state = head(reader, buckets.get(reader, bucket), key)
            planned = plan(reader, state, 0, state.size)
        return b"".join(content.read_planned(volume, planned, 0, state.size))
