"""Inodes and allocated bytes of volumes whose rows did not count them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from stratum import buckets, files, fsck, inode_counts, objects
from stratum.schema import Inode, Kind, key_u64, pack_json, prefix_range, unpack_json
from stratum.write_buffer import WriteBuffer
from tests.support import BUCKET, delete, put

if TYPE_CHECKING:
    from stratum.volume import Volume

DATA = os.urandom(200_000)


def forget_counts(volume: Volume) -> None:
    """As a version left it that did not count."""
    with volume.snapshot() as reader, volume.store.transact() as tx:
        for key, raw in reader.scan(*prefix_range(b"H")):
            row = unpack_json(raw)
            tx.put(key, pack_json({"objects": row["objects"], "bytes": row["bytes"]}))
        for key, raw in reader.scan(*prefix_range(b"I")):
            inode = Inode.unpack(int.from_bytes(key[1:], "big"), raw)
            if inode.kind == Kind.FILE:
                inode.entries = 0
                tx.put(key, inode.pack())


def _used(volume: Volume) -> tuple[int, int]:
    """(told, counted)."""
    with volume.snapshot() as reader:
        bucket = buckets.get(reader, BUCKET).inode
        return inode_counts.used(reader, bucket), inode_counts.count(reader)[bucket]


def test_what_was_there_before_is_counted_once(opened: Volume) -> None:
    for number in range(5):
        put(opened, f"dir/{number}", b"x")
    forget_counts(opened)
    put(opened, "more/a", b"x")
    delete(opened, "dir/1")
    inode_counts.complete(opened)
    told, counted = _used(opened)
    assert told == counted
    put(opened, "more/b", b"x")
    delete(opened, "more/a")
    told, counted = _used(opened)
    assert told == counted
    assert fsck.check(opened) == []


def test_the_volume_has_what_its_buckets_have(opened: Volume) -> None:
    with opened.snapshot() as reader:
        assert inode_counts.used(reader) == inode_counts.count(reader).total()
    opened.mutate(lambda tx: buckets.create(tx, "another", buckets.get(tx, BUCKET).owner))
    put(opened, "f", b"x")
    with opened.snapshot() as reader:
        source, target = buckets.get(reader, BUCKET).inode, buckets.get(reader, "another").inode
    opened.mutate(lambda tx: files.rename(tx, source, b"f", target, b"g", 0, lambda _: False))
    with opened.snapshot() as reader:
        assert inode_counts.used(reader) == inode_counts.count(reader).total()
        assert inode_counts.used(reader, target) == inode_counts.count(reader)[target] == 2
    assert fsck.check(opened) == []


def test_a_file_that_was_not_counted_is_with_its_next_change(opened: Volume) -> None:
    for key, data in (("large", DATA), ("small", b"x" * 100)):
        inode = put(opened, key, data)
        forget_counts(opened)
        with opened.snapshot() as reader:
            inode = reader.inode(inode.number)
            assert inode.allocated is None
        buffer = WriteBuffer(opened, inode)
        buffer.write(1 << 30, b"y", 1)
        buffer.commit()
        with opened.snapshot() as reader:
            assert reader.inode(inode.number).allocated == len(data) + 1
    assert fsck.check(opened) == []


def test_what_two_files_share_is_allocated_in_both(opened: Volume) -> None:
    put(opened, "a", DATA)
    put(opened, "b", b"")
    with opened.snapshot() as reader:
        a, b = (objects.head(reader, buckets.get(reader, BUCKET), key).inode for key in (b"a", b"b"))
    from stratum import clones

    opened.mutate(lambda tx: clones.replace_content(tx, a.number, b.number))
    with opened.snapshot() as reader:
        assert reader.inode(b.number).allocated == reader.inode(a.number).allocated == len(DATA)
        assert reader.get(key_u64(b"I", a.number)) is not None
    assert fsck.check(opened) == []
