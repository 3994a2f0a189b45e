"""What a cold pack says of itself, so that its bucket alone brings the namespace back.

{format, instance, epoch, timeline, transaction (of which the files are told; moment_of), pack, made_ns,
extents: [{extent, offset, length, checksums (base64)}],
files: [{inode, version, bucket, names: [base64 path below the bucket], slices: [[file offset, length, extent, extent offset]],
attributes (base64 of the inode row), metadata (the M row), xattrs: {base64: base64}}],
buckets: {name: BucketRow}}
"""

from __future__ import annotations

import base64
import time
from typing import TYPE_CHECKING, Any

from stratum import buckets, names, packs
from stratum.errors import Gone
from stratum.schema import ROOT_INODE, Inode, key_u64, prefix_range, unpack_json

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stratum.schema import BucketRow
    from stratum.transaction import InodeReader

FORMAT = 1
NAMES_MAX = 1024
"""Of one file. Trees of backups made of hard links have hundreds; more come back with a snapshot only."""


Moment = tuple[int, int, int, int]
"""Epoch; whether the transaction is known; when the metadata was last restored, since it counts anew from there; the transaction, or the wall clock in
ns if it is not known. In this order manifests and snapshots were made."""
TIMELINE = "timeline"
"""The setting that a restore leaves (backup.py): {restored_ns, of the backup: before (its own restored_ns), transaction}."""


def moment_of(told: dict[str, Any]) -> Moment:
    """When what a manifest or a snapshot tells was so."""
    known = "transaction" in told
    return told["epoch"], int(known), told.get("timeline", 0), told["transaction" if known else "made_ns"]


def moment_now(reader: InodeReader, epoch: int) -> dict[str, int]:
    """For `moment_of`, of what a reader sees."""
    return {"epoch": epoch, "timeline": packs.setting(reader, TIMELINE).get("restored_ns", 0), "transaction": reader.id}


class Names:
    """Paths of inodes. What is known of directories is kept for the next one."""

    def __init__(self, reader: InodeReader) -> None:
        self._reader = reader
        self._buckets = {row.inode: name for name, row in buckets.scan(reader)}
        self._directories: dict[int, tuple[str, bytes] | None] = {}

    def directory(self, number: int) -> tuple[str, bytes] | None:
        """(bucket, path of a directory below it, ending in "/" or empty); None if it hangs nowhere."""
        chain: list[Inode] = []
        found: tuple[str, bytes] | None = None
        while number not in self._directories:
            if number in self._buckets:
                self._directories[number] = (self._buckets[number], b"")
                break
            try:
                inode = self._reader.inode(number)
            except Gone:
                break
            if not inode.parent or number == ROOT_INODE:
                break
            chain.append(inode)
            number = inode.parent
        found = self._directories.get(number)
        for inode in reversed(chain):
            found = (found[0], found[1] + inode.entry) if found is not None else None
            self._directories[inode.number] = found
        return found

    def of(self, inode: Inode) -> tuple[str, list[bytes]]:
        """(bucket, keys) of a file, at most NAMES_MAX of them; they are in one bucket."""
        bucket, keys = "", []
        for directory, entry in names.of(self._reader, inode, NAMES_MAX):
            above = self.directory(directory)
            if above is not None:
                bucket = above[0]
                keys.append(above[1] + entry)
        return bucket, keys


def encoded(value: bytes) -> str:
    return base64.b64encode(value).decode()


def file_entry(reader: InodeReader, inode: Inode, paths: Names) -> dict[str, Any] | None:
    """A file as a manifest tells it; None if it has no name."""
    bucket, keys = paths.of(inode)
    if not keys:
        return None
    entry: dict[str, Any] = {
        "inode": inode.number,
        "version": inode.version,
        "bucket": bucket,
        "names": [encoded(key) for key in keys],
        "slices": [
            [piece.file_offset, piece.length, piece.extent, piece.extent_offset]
            for piece in reader.slices(inode.number)
        ],
        "attributes": encoded(inode.pack_attributes()),
    }
    raw = reader.get(key_u64(b"M", inode.number))
    if inode.has_metadata and raw is not None:
        entry["metadata"] = unpack_json(raw)
    attributes = {
        encoded(key[9:]): encoded(value) for key, value in reader.scan(*prefix_range(key_u64(b"Y", inode.number)))
    }
    if attributes:
        entry["xattrs"] = attributes
    return entry


def describe(
    reader: InodeReader,
    instance: str,
    epoch: int,
    pack: int,
    members: list[tuple[int, int, int]],
    inodes: Iterable[int],
) -> dict[str, Any]:
    """The manifest of a pack; `members` lists (extent, offset, length), `inodes` are the files that own them."""
    paths = Names(reader)
    files: list[dict[str, Any]] = []
    bucket_names: set[str] = set()
    for number in inodes:
        if not reader.has_inode(number):
            continue
        entry = file_entry(reader, reader.inode(number), paths)
        if entry is not None:
            files.append(entry)
            bucket_names.add(entry["bucket"])
    rows: dict[str, BucketRow] = {name: buckets.get(reader, name) for name in bucket_names}
    return {
        "format": FORMAT,
        "instance": instance,
        **moment_now(reader, epoch),
        "pack": pack,
        "made_ns": time.time_ns(),
        "extents": [
            {"extent": extent, "offset": offset, "length": length, "checksums": encoded(reader.extent(extent)[1])}
            for extent, offset, length in members
        ],
        "files": files,
        "buckets": {name: unpack_json(row.pack()) for name, row in rows.items()},
    }
