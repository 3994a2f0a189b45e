"""fsck finds every kind of damage it knows, and repairs what can be repaired: one thing broken at a time."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from stratum import buckets, clones, files, fsck, longkeys, multipart, tree
from stratum.content import NewContent
from stratum.errors import DataDamaged
from stratum.schema import (
    Dentry,
    ExtentRow,
    Inode,
    Kind,
    ObjectMetadata,
    SegmentRow,
    Slice,
    key_u64,
    key_u64_u64,
    pack_json,
    prefix_range,
    unpack_json,
)
from tests.support import BUCKET, get, put

if TYPE_CHECKING:
    from collections.abc import Callable

    from stratum.kv.contract import Transaction
    from stratum.transaction import InodeReader
    from stratum.volume import Volume

DATA = os.urandom(200_000)


@pytest.fixture
def filled(opened: Volume) -> Volume:
    put(opened, "dir/small", b"small")
    put(opened, "dir/large", DATA)
    put(opened, "top", b"top")
    put(opened, "own/", b"own")
    linked = put(opened, "linked", b"linked")
    opened.mutate(lambda tx: files.link(tx, linked.number, clones.find(tx, b"bucket/dir").number, b"again"))
    upload = opened.mutate(
        lambda tx: multipart.create(
            tx, BUCKET, b"mp", owner="", acl="", metadata=ObjectMetadata(), algorithm="", checksum_type=""
        )
    )
    with opened.segments.writer(70_000) as writer:
        writer.write(DATA[:70_000])
        new = NewContent(70_000, extents=writer.finish())
        writer.committing()
        opened.mutate(lambda tx: multipart.put_part(tx, BUCKET, b"mp", upload.upload_id, 1, new, "0" * 32, {}))
        writer.keep()
    assert fsck.check(opened) == []
    return opened


def find(reader: InodeReader, key: bytes) -> Inode:
    inode = tree.find_object(reader, buckets.get(reader, BUCKET), key)
    assert inode is not None
    return inode


def extent_of(reader: InodeReader, key: bytes) -> tuple[int, ExtentRow, bytes]:
    number = reader.slices(find(reader, key).number)[0].extent
    return number, *reader.extent(number)


def directory(reader: InodeReader) -> Inode:
    number = tree.walk(reader, buckets.get(reader, BUCKET).inode, [b"dir/"])
    assert number is not None
    return reader.inode(number)


def edit_inode(tx: Transaction, inode: Inode, **values: int | bytes) -> None:
    for name, value in values.items():
        setattr(inode, name, value)
    tx.put(key_u64(b"I", inode.number), inode.pack())


def dangling_entry(tx: Transaction, reader: InodeReader) -> None:
    longkeys.put(tx, b"D", directory(reader).number, b"ghost", Dentry(1 << 50, Kind.FILE).pack(), lambda: 0)


def dangling_object(tx: Transaction, reader: InodeReader) -> None:
    edit_inode(tx, directory(reader), rdev=1 << 50)


def directory_counts(tx: Transaction, reader: InodeReader) -> None:
    edit_inode(tx, directory(reader), entries=17)


def directory_live(tx: Transaction, reader: InodeReader) -> None:
    edit_inode(tx, directory(reader), live=0)


def directory_parent(tx: Transaction, reader: InodeReader) -> None:
    edit_inode(tx, directory(reader), parent=1)


def directory_name(tx: Transaction, reader: InodeReader) -> None:
    edit_inode(tx, directory(reader), entry=b"other/")


def wrong_name(tx: Transaction, reader: InodeReader) -> None:
    edit_inode(tx, find(reader, b"top"), entry=b"other")


def missing_name(tx: Transaction, reader: InodeReader) -> None:
    key, _ = next(iter(reader.scan(*prefix_range(b"i"))))
    tx.delete(key)


def one_name_of_several(tx: Transaction, reader: InodeReader) -> None:
    edit_inode(tx, find(reader, b"linked"), flags=0)


def stray_name(tx: Transaction, reader: InodeReader) -> None:
    tx.put(key_u64(b"i", find(reader, b"top").number) + b"x" * 16, key_u64(b"", 1) + b"never")


def stray_name_of_nothing(tx: Transaction, reader: InodeReader) -> None:
    tx.put(key_u64(b"i", 1 << 50) + b"x" * 16, key_u64(b"", 1) + b"bucket/")


def wrong_name_of_own_object(tx: Transaction, reader: InodeReader) -> None:
    edit_inode(tx, find(reader, b"own/"), parent=1)


def link_count(tx: Transaction, reader: InodeReader) -> None:
    edit_inode(tx, find(reader, b"top"), nlink=5)


def unreachable_inode(tx: Transaction, reader: InodeReader) -> None:
    longkeys.delete(tx, b"D", directory(reader).number, b"large")


def unheld_orphan(tx: Transaction, reader: InodeReader) -> None:
    inode = Inode(1 << 51, Kind.FILE, mode=0, uid=0, gid=0, now_ns=0, bucket=buckets.get(reader, BUCKET).inode)
    edit_inode(tx, inode, nlink=0)


def bucket_without_entry(tx: Transaction, reader: InodeReader) -> None:
    longkeys.delete(tx, b"D", 1, b"bucket/")


def directory_without_bucket(tx: Transaction, reader: InodeReader) -> None:
    tx.delete(b"Bbucket")


def stray_slice(tx: Transaction, reader: InodeReader) -> None:
    tx.put(key_u64_u64(b"S", 1 << 50, 0), Slice(0, 10, extent_of(reader, b"dir/large")[0], 0).pack())


def extent_references(tx: Transaction, reader: InodeReader) -> None:
    number, row, checksums = extent_of(reader, b"dir/large")
    row.references = 3
    tx.put(key_u64(b"X", number), row.pack(checksums))


def unfreed_extent(tx: Transaction, reader: InodeReader) -> None:
    _, row, checksums = extent_of(reader, b"dir/large")
    row.references = 0
    tx.put(key_u64(b"X", 1 << 50), row.pack(checksums))


def stray_free(tx: Transaction, reader: InodeReader) -> None:
    tx.put(key_u64_u64(b"F", 1, 1 << 50), b"")


def segment_counts(tx: Transaction, reader: InodeReader) -> None:
    key, raw = next(iter(reader.scan(*prefix_range(b"G"))))
    tx.put(key, SegmentRow(SegmentRow.unpack(raw).path, 99, 99).pack())


def stray_metadata(tx: Transaction, reader: InodeReader) -> None:
    tx.put(key_u64(b"M", 1 << 50), b"{}")


def stray_content(tx: Transaction, reader: InodeReader) -> None:
    tx.put(key_u64(b"N", 1 << 50), b"x" * 20)


def stray_attribute(tx: Transaction, reader: InodeReader) -> None:
    tx.put(key_u64(b"Y", 1 << 50) + b"user.x", b"")


def bucket_usage(tx: Transaction, reader: InodeReader) -> None:
    tx.put(key_u64(b"H", buckets.get(reader, BUCKET).inode), b'{"objects":99,"bytes":1}')


def allocated_count(tx: Transaction, reader: InodeReader) -> None:
    inode = find(reader, b"dir/large")
    inode.allocated = 7
    tx.put(key_u64(b"I", inode.number), inode.pack())


def inode_count(tx: Transaction, reader: InodeReader) -> None:
    key = key_u64(b"H", buckets.get(reader, BUCKET).inode)
    tx.put(key, pack_json({**unpack_json(reader.get(key) or b""), "inodes": 99}))


def dangling_part(tx: Transaction, reader: InodeReader) -> None:
    key, raw = next(iter(reader.scan(*prefix_range(b"P"))))
    tx.put(key[:-1] + b"\x09", raw.replace(b'"inode":', b'"inode":9'))


def stray_part(tx: Transaction, reader: InodeReader) -> None:
    for string, _ in longkeys.scan(reader, b"U", buckets.get(reader, BUCKET).inode):
        longkeys.delete(tx, b"U", buckets.get(reader, BUCKET).inode, string)


def overlapping_slices(tx: Transaction, reader: InodeReader) -> None:
    number, row, checksums = extent_of(reader, b"dir/large")
    row.references += 1
    tx.put(key_u64(b"X", number), row.pack(checksums))
    tx.put(
        key_u64_u64(b"S", find(reader, b"dir/large").number, 1000), Slice(1000, len(DATA) - 1000, number, 1000).pack()
    )


REPAIRABLE = [
    dangling_entry, dangling_object, directory_counts, directory_live, directory_parent, directory_name, wrong_name, missing_name, one_name_of_several, stray_name,
    stray_name_of_nothing, wrong_name_of_own_object, link_count, unreachable_inode, unheld_orphan, bucket_without_entry,
    directory_without_bucket, stray_slice, extent_references, unfreed_extent, stray_free, segment_counts, stray_metadata, stray_content, stray_attribute,
    bucket_usage, allocated_count, inode_count, dangling_part, stray_part, overlapping_slices,
]  # fmt: skip


def break_it(volume: Volume, damage: Callable[[Transaction, InodeReader], None]) -> None:
    with volume.snapshot() as reader, volume.store.transact() as tx:
        damage(tx, reader)


@pytest.mark.parametrize("damage", REPAIRABLE, ids=lambda damage: damage.__name__)
def test_it_is_found_and_repaired(filled: Volume, damage: Callable[[Transaction, InodeReader], None]) -> None:
    break_it(filled, damage)
    found = fsck.check(filled)
    assert found
    assert not any(finding.repaired for finding in found)
    repaired = fsck.check(filled, repair=True)
    assert repaired
    assert all(finding.repaired for finding in repaired), repaired
    assert fsck.check(filled) == []
    assert get(filled, "top") == b"top"
    if damage is unreachable_inode:
        with filled.snapshot() as reader:
            found_again = [key for key, _ in tree.scan_dentries(reader, buckets.get(reader, BUCKET).inode)]
        assert b"lost+found/" in found_again
    else:
        assert get(filled, "dir/large") == DATA


def missing_extent(volume: Volume) -> None:
    with volume.snapshot() as reader, volume.store.transact() as tx:
        number, row, _ = extent_of(reader, b"dir/large")
        tx.delete(key_u64(b"X", number))
        raw = reader.get(key_u64(b"G", row.segment))
        assert raw is not None
        segment = SegmentRow.unpack(raw)
        tx.put(
            key_u64(b"G", row.segment),
            SegmentRow(segment.path, segment.extents - 1, segment.live_bytes - row.length).pack(),
        )


def damaged_extent(volume: Volume) -> None:
    with volume.snapshot() as reader:
        _, row, _ = extent_of(reader, b"dir/large")
    with volume.segments.find(row.segment).open("r+b") as file:
        file.seek(row.offset + 150_000)
        byte = file.read(1)
        file.seek(row.offset + 150_000)
        file.write(bytes((byte[0] ^ 1,)))


def missing_file(volume: Volume) -> None:
    with volume.snapshot() as reader:
        _, row, _ = extent_of(reader, b"dir/large")
    volume.segments.find(row.segment).unlink()


def damaged_content(volume: Volume) -> None:
    with volume.snapshot() as reader, volume.store.transact() as tx:
        key = key_u64(b"N", find(reader, b"dir/small").number)
        raw = reader.get(key)
        assert raw is not None
        tx.put(key, raw[:-1] + bytes((raw[-1] ^ 1,)))


@pytest.mark.parametrize(
    "damage", [missing_extent, damaged_extent, missing_file, damaged_content], ids=lambda damage: damage.__name__
)
def test_lost_bytes_are_reported_and_never_invented(filled: Volume, damage: Callable[[Volume], None]) -> None:
    damage(filled)
    findings = fsck.check(filled, repair=True)
    assert findings
    assert not any(finding.repaired for finding in findings)
    broken = "dir/small" if damage is damaged_content else "dir/large"
    with pytest.raises((DataDamaged, Exception)):
        get(filled, broken)
    assert get(filled, "top") == b"top"


def test_a_repair_wants_the_volume_alone(filled: Volume) -> None:
    # A second session stands for another process.
    import subprocess
    import sys

    from stratum.errors import Busy
    from stratum.volume import Volume as Opened

    other = subprocess.Popen(
        [sys.executable, "-c", "import sys\nfrom pathlib import Path\nfrom stratum.volume import Volume\nv=Volume(Path(sys.argv[1]),'other')\nprint('up',flush=True)\nsys.stdin.read()\nv.close()", str(filled.root)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert other.stdout is not None
    assert other.stdout.readline() == "up\n"
    with pytest.raises(Busy, match="other"):
        fsck.check(filled, repair=True)
    other.communicate()
    assert fsck.check(filled, repair=True) == []
    assert isinstance(filled, Opened)
