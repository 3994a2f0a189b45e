"""What `fsck --repair` does to one thing it found: functions that make a change to a transaction."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from stratum import content, inventory, longkeys, names, tree
from stratum.multipart import scan_all_parts
from stratum.schema import (
    ROOT_INODE,
    Dentry,
    Kind,
    key_u64,
    key_u64_u64,
    pack_json,
    prefix_range,
    split_u64_u64,
    unpack_json,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from stratum.schema import BucketRow, Slice
    from stratum.transaction import MetadataTransaction

    Repair = Callable[[MetadataTransaction], None]


def delete_row(key: bytes) -> Repair:
    def repair(tx: MetadataTransaction) -> None:
        tx.delete(key)

    return repair


def put_row(key: bytes, value: bytes) -> Repair:
    return lambda tx: tx.put(key, value)


def put_bucket(name: str, row: BucketRow) -> Repair:
    return lambda tx: inventory.put(tx, name, row)


def delete_bucket(name: str) -> Repair:
    return lambda tx: inventory.delete(tx, name)


def put_dentry(name: str, row: BucketRow) -> Repair:
    def repair(tx: MetadataTransaction) -> None:
        longkeys.put(tx, b"D", ROOT_INODE, tree.path_of_root(name), Dentry(row.inode, Kind.DIRECTORY).pack(), tx.new_id)

    return repair


def remove_dentry(directory: int, entry: bytes) -> Repair:
    def repair(tx: MetadataTransaction) -> None:
        longkeys.delete(tx, b"D", directory, entry)

    return repair


def set_counts(number: int, counted: tuple[int, int, int]) -> Repair:
    def repair(tx: MetadataTransaction) -> None:
        inode = tx.inode(number)
        inode.entries, inode.live, inode.nlink = counted
        tx.dirty(inode)

    return repair


def set_parent(number: int, parent: int, entry: bytes) -> Repair:
    def repair(tx: MetadataTransaction) -> None:
        inode = tx.inode(number)
        inode.parent, inode.entry = parent, entry
        tx.dirty(inode)

    return repair


def set_names(number: int, known: list[names.Name]) -> Repair:
    def repair(tx: MetadataTransaction) -> None:
        if tx.has_inode(number):
            inode = tx.inode(number)
            names.set_all(tx, inode, known)
            tx.dirty(inode)
            return
        for key, _ in list(tx.scan(*prefix_range(key_u64(b"i", number)))):
            tx.delete(key)

    return repair


def set_links(number: int, links: int) -> Repair:
    def repair(tx: MetadataTransaction) -> None:
        inode = tx.inode(number)
        inode.nlink = links
        tx.dirty(inode)

    return repair


def free(number: int) -> Repair:
    return lambda tx: content.free_inode(tx, tx.inode(number))


def drop_part(number: int, *, free: bool = False) -> Repair:
    def repair(tx: MetadataTransaction) -> None:
        for upload, part_number, part in list(scan_all_parts(tx)):
            if part.inode == number:
                tx.delete(key_u64_u64(b"P", upload, part_number))
        if free:
            content.free_inode(tx, tx.inode(number))

    return repair


def drop_slice(key: bytes, extent: int, *, known: bool) -> Repair:
    def repair(tx: MetadataTransaction) -> None:
        tx.delete(key)
        if known and tx.extent(extent)[0].references > 0:
            tx.reference_extent(extent, -1)

    return repair


def recut(number: int, piece: Slice) -> Repair:
    def repair(tx: MetadataTransaction) -> None:
        before = [other for other in tx.slices(number, 0, piece.file_offset) if other.end > piece.file_offset]
        for other in before:
            tx.put_slice(number, replace(other, length=piece.file_offset - other.file_offset))

    return repair


def set_allocated(number: int, size: int) -> Repair:
    def repair(tx: MetadataTransaction) -> None:
        inode = tx.inode(number)
        inode.allocated = size
        tx.dirty(inode)

    return repair


def set_usage(bucket: int, objects: int, size: int, inodes: int | None = None) -> Repair:
    """`inodes` stay as they are if none are given."""

    def repair(tx: MetadataTransaction) -> None:
        key = key_u64(b"H", bucket)
        row = {**unpack_json(tx.get(key) or b"{}"), "objects": objects, "bytes": size}
        if inodes is not None:
            row["inodes"] = inodes
            row.pop("since", None)
        tx.put(key, pack_json(row))

    return repair


def set_references(number: int, references: int) -> Repair:
    return lambda tx: tx.set_references(number, references)


def drop_free(number: int) -> Repair:
    def repair(tx: MetadataTransaction) -> None:
        for key, _ in list(tx.scan(*prefix_range(b"F"))):
            if split_u64_u64(key)[1] == number:
                tx.delete(key)

    return repair
