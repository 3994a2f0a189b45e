"""Buckets: directories of the root with a settings row."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from stratum import inventory, quotas, tree
from stratum.errors import (
    BucketExists,
    BucketNotEmpty,
    InvalidArgument,
    InvalidBucketName,
    NoSuchBucket,
    ReadOnlyBucket,
)
from stratum.schema import ROOT_INODE, BucketRow, Dentry, Kind, unpack_json

if TYPE_CHECKING:
    from stratum.transaction import InodeReader, MetadataTransaction

_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_FORBIDDEN_PREFIXES = ("xn--", "sthree-", "amzn-s3-demo-")
_FORBIDDEN_SUFFIXES = ("-s3alias", "--ol-s3", ".mrap", "--x-s3", "--table-s3")
ANONYMOUS = ("none", "read", "read-write")
CANNED_ACLS = ("private", "public-read", "public-read-write", "authenticated-read")
_memo: dict[bytes, BucketRow] = {}
_FIELDS = {field.name for field in fields(BucketRow)}


def check_name(name: str) -> None:
    """AWS's naming rules (S3 user guide, "Bucket naming rules"). Raises `InvalidBucketName`."""
    if not 3 <= len(name) <= 63 or not _NAME.fullmatch(name) or ".." in name or ".-" in name or "-." in name:
        raise InvalidBucketName(name)
    if name.startswith(_FORBIDDEN_PREFIXES) or name.endswith(_FORBIDDEN_SUFFIXES):
        raise InvalidBucketName(name)
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return
    raise InvalidBucketName(name)


def get(reader: InodeReader, name: str) -> BucketRow:
    """Raises `NoSuchBucket`."""
    raw = reader.get(b"B" + name.encode()) if 0 < len(name) <= 255 else None
    if raw is None:
        raise NoSuchBucket(name)
    row = _memo.get(raw)
    if row is None:
        if len(_memo) > 1024:
            _memo.clear()
        row = _memo[raw] = BucketRow(**{key: value for key, value in unpack_json(raw).items() if key in _FIELDS})
    return row


def check_writable(row: BucketRow) -> None:
    """Raises `ReadOnlyBucket`."""
    if row.snapshot_of:
        raise ReadOnlyBucket(f"this bucket is a snapshot of {row.snapshot_of!r} and does not change; clone it instead")


def check_free(reader: InodeReader, name: str) -> None:
    """Raises `InvalidBucketName` or `BucketExists`."""
    check_name(name)
    raw = reader.get(b"B" + name.encode())
    if raw is not None:
        raise BucketExists(name, unpack_json(raw)["owner"])


def scan(reader: InodeReader, start: str = "") -> list[tuple[str, BucketRow]]:
    return [(key[1:].decode(), BucketRow(**unpack_json(raw))) for key, raw in reader.scan(b"B" + start.encode(), b"C")]


def create(
    tx: MetadataTransaction,
    name: str,
    owner: str,
    *,
    acl: str = "private",
    region: str = "",
    mode: int = 0o755,
    uid: int = 0,
    gid: int = 0,
) -> BucketRow:
    """Raises `InvalidBucketName` or `BucketExists`."""
    check_free(tx, name)
    root = tx.inode(ROOT_INODE)
    directory = tree.new_directory(tx, root, mode=mode, uid=uid, gid=gid, explicit=True)
    directory.bucket = directory.number
    row = BucketRow(directory.number, owner, tx.now_ns, acl=acl, region=region)
    inventory.put(tx, name, row)
    tree.attach(tx, root, tree.path_of_root(name), Dentry(directory.number, Kind.DIRECTORY))
    return row


def change(tx: MetadataTransaction, name: str, **settings: Any) -> BucketRow:
    """Set fields of the row. Raises `NoSuchBucket` or `InvalidArgument`."""
    if settings.get("anonymous", "none") not in ANONYMOUS:
        raise InvalidArgument(f"anonymous = {settings['anonymous']!r} is not one of {', '.join(ANONYMOUS)}")
    for key in ("file_mode", "dir_mode"):
        if not 0 <= settings.get(key, 0) <= 0o7777:
            raise InvalidArgument(f"{key} = {settings[key]:o} is not a mode between 0 and 7777")
    row = replace(get(tx, name), **settings)
    inventory.put(tx, name, row)
    return row


def remove(tx: MetadataTransaction, name: str, *, also_explicit: bool = True) -> None:
    """Remove a bucket that S3 shows as empty; directories that only mkdir made go with it, open uploads too.

    Raises `NoSuchBucket`, or `BucketNotEmpty` naming the special files that hold it.
    """
    from stratum import multipart

    row = get(tx, name)
    check_writable(row)
    directory = tx.inode(row.inode)
    empty: list[tuple[int, bytes, Dentry]] = []
    if directory.entries:
        if not also_explicit:
            raise BucketNotEmpty(f"bucket {name!r} still has entries", bucket=name)
        _collect_empty(tx, name, row.inode, empty, b"")
    for key, upload_id, _ in multipart.scan_uploads(tx, row, limit=1 << 30):
        multipart.abort_in(tx, row, key, upload_id)
    for parent, entry, dentry in reversed(empty):
        tree.detach(tx, tx.inode(parent), entry, dentry)
        tree.drop_directory(tx, tx.inode(dentry.inode))
    root = tx.inode(ROOT_INODE)
    tree.detach(tx, root, tree.path_of_root(name), Dentry(row.inode, Kind.DIRECTORY))
    tree.drop_directory(tx, tx.inode(row.inode))
    inventory.delete(tx, name)
    tx.forget_usage(row.inode)
    if quotas.of_bucket(tx, row.inode) is not None:
        quotas.set_bucket(tx, row.inode, None)


_EMPTY_DIRECTORIES_MAX = 100_000


def _collect_empty(
    tx: MetadataTransaction, name: str, directory: int, empty: list[tuple[int, bytes, Dentry]], path: bytes
) -> None:
    special: list[str] = []
    for entry, dentry in tree.scan_dentries(tx, directory):
        full = path + entry
        if dentry.kind == Kind.FILE or (dentry.kind == Kind.DIRECTORY and tx.inode(dentry.inode).object_inode):
            raise BucketNotEmpty(
                f"bucket {name!r} still has keys, {full.decode('utf-8', 'replace')!r} for one; delete them first",
                bucket=name,
            )
        if dentry.kind != Kind.DIRECTORY:
            special.append(full.decode("utf-8", "replace"))
            if len(special) == 5:
                break
        else:
            empty.append((directory, entry, dentry))
            if len(empty) > _EMPTY_DIRECTORIES_MAX:
                raise BucketNotEmpty(
                    f"bucket {name!r} has over {_EMPTY_DIRECTORIES_MAX} empty directories; remove them through the mount first"
                )
            _collect_empty(tx, name, dentry.inode, empty, full)
    if special:
        raise BucketNotEmpty(
            f"bucket {name!r} has special files that S3 does not show: {', '.join(special)}; remove them through the mount",
            bucket=name,
            special=special,
        )


def usage(reader: InodeReader, row: BucketRow) -> tuple[int, int]:
    """(objects, bytes)."""
    return reader.usage_of(row.inode)
