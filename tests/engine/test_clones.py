"""Clones and snapshots: whole or not at all, one committed state, no byte copied, nothing left behind."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from stratum import (
    access_lists,
    buckets,
    clones,
    content,
    files,
    filling,
    fsck,
    housekeeping,
    leaks,
    multipart,
    objects,
    tree,
)
from stratum.errors import (
    AccessRefused,
    BucketExists,
    Exists,
    InvalidArgument,
    NotADirectory,
    NotFound,
    ReadOnlyBucket,
    StratumError,
)
from stratum.files import Attributes, Caller
from stratum.schema import Inode, Kind, ObjectMetadata, key_u64, prefix_range
from tests.engine.test_reclaim import allocated
from tests.support import BUCKET, delete, get, put

if TYPE_CHECKING:
    from collections.abc import Callable

    from stratum.transaction import InodeReader, MetadataTransaction
    from stratum.volume import Volume

BIG = os.urandom(3_000_000)
ROOT = Caller(0, 0)


def number_of(opened: Volume, path: bytes) -> int:
    def look() -> int:
        with opened.snapshot() as reader:
            return clones.find(reader, path).number

    return filling.patiently(opened, look)


def fill(opened: Volume) -> None:
    put(opened, "d/small", b"small")
    put(opened, "d/e/big", BIG)
    put(opened, "d/f/", b"body of a directory")
    put(opened, "d/empty/", b"")
    put(opened, "d/" + "x" * 600 + "/y", b"deep")
    bucket = number_of(opened, BUCKET.encode())
    directory = number_of(opened, BUCKET.encode() + b"/d")

    def change(tx: MetadataTransaction) -> None:
        files.make(tx, directory, b"link", 0o120777, ROOT, target=b"small")
        files.make(tx, directory, b"pipe", 0o010644, ROOT)
        files.make(tx, directory, b"sub", 0o040700, Caller(1000, 1000))
        small = clones.find(tx, BUCKET.encode() + b"/d/small").number
        files.link(tx, small, directory, b"second")
        files.link(tx, small, bucket, b"outside")
        files.set_attribute(tx, small, b"user.color", b"blue")
        files.set_attribute(tx, small, b"user.s3.meta.kept", b"yes")
        files.set_attributes(tx, small, Attributes(mode=0o640, uid=7, mtime_ns=5))

    opened.mutate(change)


def shape_of(opened: Volume, number: int) -> dict[bytes, Any]:
    def look() -> dict[bytes, Any]:
        with opened.snapshot() as reader:
            return shape(reader, number)

    return filling.patiently(opened, look)


def shape(reader: InodeReader, number: int) -> dict[bytes, Any]:
    """All of a tree that a clone must keep."""
    found: dict[bytes, Any] = {}
    numbers: dict[int, int] = {}
    pending = [(b"", number)]
    while pending:
        path, directory = pending.pop()
        for entry, dentry in tree.scan_dentries(reader, directory):
            inode = reader.inode(dentry.inode)
            if inode.kind == Kind.DIRECTORY:
                pending.append((path + entry, inode.number))
            attributes = sorted((key[9:], raw) for key, raw in reader.scan(*prefix_range(key_u64(b"Y", inode.number))))
            size = inode.size if inode.kind != Kind.DIRECTORY else inode.live
            etag = inode.etag_text if inode.kind == Kind.FILE else ""
            own = reader.inode(inode.object_inode).size if inode.object_inode else None
            found[path + entry] = (
                inode.kind, inode.mode, inode.uid, inode.gid, inode.mtime_ns, size, etag, attributes, objects.metadata_of(reader, inode), own,
                numbers.setdefault(inode.number, len(numbers)) if inode.kind == Kind.FILE else 0,
            )  # fmt: skip
    return found


def clean(opened: Volume) -> None:
    filling.Background(opened, lambda: False).run()
    housekeeping.run_once(opened)
    assert fsck.check(opened) == []
    assert leaks.collect(opened) == []


def test_a_clone_of_a_directory_is_equal_and_its_own(opened: Volume) -> None:
    fill(opened)
    clones.clone(opened, b"bucket/d", b"bucket/copy")
    assert shape_of(opened, number_of(opened, b"bucket/copy")) == shape_of(opened, number_of(opened, b"bucket/d"))
    assert allocated(opened) < 2 * len(BIG)
    clean(opened)
    put(opened, "copy/small", b"changed")
    assert get(opened, "d/small") == b"small"
    for key in ("d/small", "d/second", "d/e/big", "d/f/"):
        delete(opened, key)
    clean(opened)
    assert get(opened, "copy/e/big") == BIG
    assert get(opened, "copy/f/") == b"body of a directory"
    assert get(opened, "copy/second") == b"small"
    assert objects_in(opened, BUCKET) == 9
    delete(opened, "copy/e/big")
    housekeeping.run_once(opened)
    assert allocated(opened) == 0
    clean(opened)


def objects_in(opened: Volume, bucket: str) -> int:
    with opened.snapshot() as reader:
        return buckets.usage(reader, buckets.get(reader, bucket))[0]


def test_a_clone_of_a_file_and_of_a_bucket(opened: Volume) -> None:
    fill(opened)
    clones.clone(opened, b"bucket/d/e/big", b"bucket/big2")
    assert get(opened, "big2") == BIG
    clones.clone(opened, b"bucket", b"other", wait=True)
    assert get(opened, "d/e/big", bucket="other") == BIG
    assert get(opened, "big2", bucket="other") == BIG
    assert objects_in(opened, "other") == objects_in(opened, BUCKET)
    clean(opened)


@pytest.mark.parametrize(
    ("source", "target", "error"),
    [
        (b"bucket/none", b"bucket/x", NotFound),
        (b"bucket/d", b"bucket/none/x", NotFound),
        (b"bucket/d", b"bucket/d/small/x", NotADirectory),
        (b"bucket/d", b"bucket/d/small", Exists),
        (b"bucket/d/small", b"bucket/d/e", Exists),
        (b"bucket/d/small", b"top", NotADirectory),
        (b"bucket/d", b"bucket", Exists),
        (b"bucket/d", b"Bad_Name", StratumError),
        (b"bucket/d", b"bucket/..", InvalidArgument),
        (b"bucket/../d", b"bucket/x", InvalidArgument),
        (b"", b"bucket/x", InvalidArgument),
    ],
)
def test_what_cannot_be_cloned_leaves_nothing(
    opened: Volume, source: bytes, target: bytes, error: type[Exception]
) -> None:
    fill(opened)
    with opened.snapshot() as reader:
        before = shape(reader, 1)
    with pytest.raises(error):
        clones.clone(opened, source, target)
    with opened.snapshot() as reader:
        assert shape(reader, 1) == before
    clean(opened)


def test_a_clone_into_itself_is_the_state_before(opened: Volume) -> None:
    fill(opened)
    before = shape_of(opened, number_of(opened, b"bucket/d"))
    clones.clone(opened, b"bucket/d", b"bucket/d/again")
    assert shape_of(opened, number_of(opened, b"bucket/d/again")) == before
    clean(opened)


def test_the_source_may_go_before_the_clone_is_filled(opened: Volume) -> None:
    """Its extents lose their last reference, and wait to be taken up again."""
    fill(opened)
    before = shape_of(opened, number_of(opened, b"bucket/d"))
    clones.clone(opened, b"bucket/d", b"bucket/copy")
    for key in ("d/e/big", "d/small", "d/f/"):
        delete(opened, key)
    put(opened, "d/second", b"other")
    housekeeping.run_once(opened)
    assert shape_of(opened, number_of(opened, b"bucket/copy")) == before
    assert get(opened, "copy/e/big") == BIG
    assert get(opened, "copy/second") == get(opened, "copy/small") == b"small"
    assert get(opened, "copy/f/") == b"body of a directory"
    clean(opened)
    delete(opened, "copy/e/big")
    housekeeping.run_once(opened)
    assert allocated(opened) == 0
    clean(opened)


def test_an_extent_taken_up_and_freed_again_waits_for_its_newer_readers(opened: Volume) -> None:
    put(opened, "big", BIG)
    with opened.snapshot() as reader:
        inode = tree.find_object(reader, buckets.get(reader, BUCKET), b"big")
        assert inode is not None
        piece = reader.slices(inode.number)[0]
    with opened.reading():
        with opened.snapshot() as reader:
            old = objects.plan(reader, objects.head(reader, buckets.get(reader, BUCKET), b"big"), 0, len(BIG))
        delete(opened, "big")
        holder = opened.new_id()

        def take(tx: MetadataTransaction) -> None:
            tx.add_inode(Inode(holder, Kind.FILE, mode=0o644, uid=0, gid=0, now_ns=0, bucket=0))
            tx.put_slice(holder, piece)
            tx.reference_extent(piece.extent, 1)

        opened.mutate(take)
    with opened.reading():  # begins between the two times the extent was freed
        with opened.snapshot() as reader:
            assert reader.extent(piece.extent)[0].references == 1
        opened.mutate(lambda tx: tx.free_slices(holder, 10))
        housekeeping.run_once(opened)
        assert b"".join(content.read_planned(opened, old, 0, piece.length)) == BIG[: piece.length]
    opened.mutate(lambda tx: tx.remove_inode(holder))
    clean(opened)
    assert allocated(opened) == 0


def test_a_snapshot_is_a_read_only_bucket(opened: Volume) -> None:
    fill(opened)
    name = clones.create_snapshot(opened, b"bucket/d", "one")
    assert name == "bucket.snap.one"
    put(opened, "d/small", b"later")
    assert get(opened, "small", bucket=name) == b"small"
    small, sub = number_of(opened, name.encode() + b"/small"), number_of(opened, name.encode() + b"/sub")
    root = number_of(opened, name.encode())
    outside = number_of(opened, b"bucket/outside")

    def no_holder(_number: int) -> bool:
        return False

    refused: list[Callable[[MetadataTransaction], object]] = [
        lambda tx: files.make(tx, root, b"new", 0o100644, ROOT),
        lambda tx: files.make(tx, sub, b"new", 0o040755, ROOT),
        lambda tx: files.link(tx, small, root, b"new"),
        lambda tx: files.unlink(tx, root, b"small", no_holder),
        lambda tx: files.rmdir(tx, root, b"sub", no_holder),
        lambda tx: files.rename(tx, root, b"small", root, b"new", 0, no_holder),
        lambda tx: files.rename(tx, root, b"second", number_of(opened, b"bucket"), b"new", 0, no_holder),
        lambda tx: files.rename(tx, number_of(opened, b"bucket"), b"outside", root, b"new", 0, no_holder),
        lambda tx: files.set_attributes(tx, small, Attributes(mode=0)),
        lambda tx: files.set_attribute(tx, small, b"user.x", b"y"),
        lambda tx: files.set_attribute(tx, small, b"user.s3.meta.x", b"y"),
        lambda tx: files.remove_attribute(tx, small, b"user.color"),
        lambda tx: clones.replace_content(tx, outside, small),
        lambda tx: objects.delete(tx, buckets.get(tx, name), b"small"),
        lambda tx: objects.set_acl(tx, buckets.get(tx, name), b"small", "public-read"),
        lambda tx: buckets.remove(tx, name),
        lambda tx: multipart.create(
            tx, name, b"mp", owner="", acl="", metadata=ObjectMetadata(), algorithm="", checksum_type=""
        ),
    ]
    for change in refused:
        with pytest.raises(ReadOnlyBucket):
            opened.mutate(change)
    with pytest.raises(ReadOnlyBucket):
        put(opened, "k", b"x", bucket=name)
    with pytest.raises(ReadOnlyBucket):
        clones.clone(opened, b"bucket/d", name.encode() + b"/x")
    clones.clone(opened, name.encode(), b"writable")
    put(opened, "small", b"x", bucket="writable")
    clean(opened)


def test_snapshots_are_listed_and_removed(opened: Volume) -> None:
    fill(opened)
    clones.create_snapshot(opened, b"bucket/d", "one")
    clones.create_snapshot(opened, b"bucket", "two")
    with pytest.raises(BucketExists):
        clones.create_snapshot(opened, b"bucket", "two")
    with pytest.raises(NotADirectory):
        clones.create_snapshot(opened, b"bucket/d/small", "three")
    with pytest.raises(InvalidArgument):
        clones.create_snapshot(opened, b"bucket", "Not A Bucket Name")
    with opened.snapshot() as reader:
        assert [name for name, _ in clones.snapshots(reader, None)] == ["bucket.snap.one", "bucket.snap.two"]
        assert [name for name, _ in clones.snapshots(reader, b"bucket/d")] == ["bucket.snap.one"]
    for key in ("d/e/big", "d/small", "d/second"):
        delete(opened, key)
    with pytest.raises(NotFound):
        clones.remove_snapshot(opened, b"bucket", "one")  # it is one of bucket/d
    clones.remove_snapshot(opened, b"bucket/d", "one")
    assert get(opened, "d/e/big", bucket="bucket.snap.two") == BIG
    clones.remove_snapshot(opened, b"bucket", "two")
    clean(opened)
    assert allocated(opened) == 0
    with opened.snapshot() as reader:
        assert clones.snapshots(reader, None) == []
        assert next(reader.scan(*prefix_range(b"Q")), None) is None


def test_who_may_not_read_a_file_may_not_clone_it(opened: Volume) -> None:
    fill(opened)
    directory = number_of(opened, b"bucket/d/sub")

    def make(tx: MetadataTransaction) -> None:
        files.make(tx, directory, b"hidden", 0o100644, ROOT)

    opened.mutate(make)
    with opened.snapshot() as reader:
        assert clones.find_readable(reader, b"bucket/d/small", 7, {7})
        assert clones.find_readable(reader, b"bucket/d/sub/hidden", 1000, {1000})
        for path, uid in ((b"bucket/d/small", 1000), (b"bucket/d/sub/hidden", 7)):
            with pytest.raises(AccessRefused):
                clones.find_readable(reader, path, uid, {uid})
        assert access_lists.permits(reader, reader.inode(directory), 0, {0}, 7)
