"""Putting a lost volume together from rows of a snapshot and from what packs say.

A manifest is a claim: at its moment these files had these names and this content. Claims are carried out from the oldest to the newest, so the last one that
says something of a key or a file is right: what an object replaced may lie in the bucket for a week more. A snapshot is a claim about everything; what a
manifest from before it says of files is not asked for, since a file that the snapshot does not know had been deleted.

Invariants
* The references of an extent are right after each step: one for each slice. A slice whose extent no pack has gets an extent without a copy.
* A file that is claimed has its names before it gives up others, so it is never without any.
"""

from __future__ import annotations

import base64
from array import array
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from stratum import buckets, content, evidence, inventory, names, objects, packs, quotas, tree
from stratum.blocks import BLOCK_BYTES, CHECKSUM_BYTES
from stratum.errors import NotFound
from stratum.manifest import Names
from stratum.schema import (
    ELSEWHERE_SEGMENT,
    STORED_SEGMENT,
    BucketRow,
    Dentry,
    ExtentRow,
    Inode,
    Kind,
    ObjectMetadata,
    Slice,
    key_u64,
    pack_json,
    pack_u64,
    prefix_range,
    split_u64_u64,
    unpack_u64,
)
from stratum.tier_rows import AccessRow, CopyRow, PackRow, Tier
from stratum.tiering.mover import hottest
from stratum.tiering.snapshots import SETTINGS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from stratum.tier_rows import ColdRow
    from stratum.transaction import InodeReader, MetadataTransaction
    from stratum.volume import Volume

ROWS_AT_ONCE = 2000
FILES_AT_ONCE = 200
LEFT_OUT = {b"d", b"g", b"n", b"p", b"q", b"c", b"G", b"j"}
"""Tables of a snapshot that speak of what is lost, or of what packs say better."""
_ROOT = b"I" + pack_u64(1)
_LISTS = Inode.ACCESS_LIST | Inode.DEFAULT_ACCESS_LIST


class Builder:
    """Fills a fresh volume; nobody else has it open."""

    def __init__(self, opened: Volume, name: str) -> None:
        """`name` is what the remote is called."""
        self._volume = opened
        self._name = name

    def adopt(self, instance: str, row: ColdRow) -> None:
        """Be the old instance."""

        def adopt(tx: MetadataTransaction) -> None:
            tx.put(b"ginstance", pack_json({"id": instance}))
            tx.put(b"n" + self._name.encode(), row.encode())

        self._volume.mutate(adopt)
        self._volume.instance = instance

    # -- the snapshot -------------------------------------------------------------------------------------------------

    def load(self, rows: Iterable[tuple[bytes, bytes]]) -> None:
        """Rows as they were, but for bytes that lay on the lost disks. The root's comes last, when what it counts is there."""
        root: list[tuple[bytes, bytes]] = []
        found = iter(rows)
        while page := list(islice(found, ROWS_AT_ONCE)):
            root += [item for item in page if item[0] == _ROOT]
            self._load(
                [item for item in page if item[0] != _ROOT and (item[0][:1] not in LEFT_OUT or item[0] in SETTINGS)]
            )
        self._load(root)
        self._volume.mutate(quotas.recount)

    def tell_names(self) -> None:
        """Of a snapshot of before format 4."""
        cursor: bytes | None = b""
        while cursor is not None:
            cursor = self._volume.mutate(partial(names.index_page, cursor=cursor, limit=ROWS_AT_ONCE))

    def _load(self, rows: list[tuple[bytes, bytes]]) -> None:
        def load(tx: MetadataTransaction) -> None:
            for key, value in rows:
                tx.put(key, _elsewhere(value) if key[:1] == b"X" else value)
            inventory.changed(tx)

        self._volume.mutate(load)

    # -- packs --------------------------------------------------------------------------------------------------------

    def add_pack(self, number: int, row: PackRow, told: dict[str, Any], *, takes_over: bool = True) -> list[int]:
        """A pack and the extents it holds; those that another one has are taken from this, the newer one, if it `takes_over`. Which it has now."""
        grace_s = self._volume.config.cold_delete_after_s
        held = told["extents"]
        if not takes_over:
            with self._volume.snapshot() as reader:
                held = [entry for entry in held if reader.get(packs.copy_key(entry["extent"], Tier.COLD)) is None]

        def begin(tx: MetadataTransaction) -> None:
            row.extents, row.live_bytes = len(held), sum(entry["length"] for entry in held)
            packs.put(tx, number, row)
            if not held:
                packs.condemn(tx, number, row, grace_s)

        self._volume.mutate(begin)
        for at in range(0, len(held), ROWS_AT_ONCE):
            batch = held[at : at + ROWS_AT_ONCE]

            def add(tx: MetadataTransaction, batch: list[dict[str, Any]] = batch) -> None:
                for entry in batch:
                    place = CopyRow(number, entry["offset"], entry["length"])
                    packs.put_copy(tx, entry["extent"], Tier.COLD, place, grace_s)
                    _add_extent(tx, entry)

            self._volume.mutate(add)
        return [entry["extent"] for entry in held]

    # -- files --------------------------------------------------------------------------------------------------------

    def add_files(
        self, told: dict[str, Any], *, only_what_is_free: bool = False, only_whole: bool = False
    ) -> tuple[int, list[str]]:
        """Carry out what a manifest claims: (how many files, names of those that are left out).

        `only_what_is_free`: it takes no key away from another file. `only_whole`: files of which bytes are nowhere are left out.
        """
        entries = told["files"]
        left_out: list[str] = []
        self._volume.mutate(lambda tx: _add_buckets(tx, told["buckets"]))
        for at in range(0, len(entries), FILES_AT_ONCE):
            batch = entries[at : at + FILES_AT_ONCE]

            def add(tx: MetadataTransaction, batch: list[dict[str, Any]] = batch) -> list[str]:
                broken = []
                for entry in batch:
                    if only_whole and not _is_whole(tx, entry):
                        broken.append(_shown(entry["bucket"], base64.b64decode(entry["names"][0])))
                    else:
                        _claim(tx, entry, only_what_is_free=only_what_is_free)
                return broken

            left_out += self._volume.mutate(add)
        return len(entries) - len(left_out), left_out

    def free_unused(self, told: dict[str, Any]) -> None:
        """Let go of extents of a pack that no file has."""

        def free(tx: MetadataTransaction) -> None:
            for entry in told["extents"]:
                if tx.has_extent(entry["extent"]) and not tx.extent(entry["extent"])[0].references:
                    tx.set_references(entry["extent"], 0)

        self._volume.mutate(free)

    # -- what is not there --------------------------------------------------------------------------------------------

    def drop_lost(self) -> list[str]:
        """Set every extent's references right, and remove files of which bytes are nowhere; their names."""
        lost: set[int] = set()
        wrong: list[tuple[int, int]] = []
        with self._volume.snapshot() as reader:
            freed = {split_u64_u64(key)[1] for key, _ in reader.scan(*prefix_range(b"F"))}
            for extent, count, row, is_copied in _with_references(reader):
                if count and row.segment == ELSEWHERE_SEGMENT and not is_copied:
                    lost.add(extent)
                if row.references != count or (not count and extent not in freed):
                    wrong.append((extent, count))
            slices = reader.scan(*prefix_range(b"S")) if lost else ()
            files = {unpack_u64(key[1:9])[0] for key, raw in slices if Slice.unpack(0, raw).extent in lost}
        for at in range(0, len(wrong), ROWS_AT_ONCE):
            batch = wrong[at : at + ROWS_AT_ONCE]
            self._volume.mutate(partial(_set_references, batch=batch))
        ordered = sorted(files)
        return [
            name
            for at in range(0, len(ordered), ROWS_AT_ONCE)
            for name in self._drop_files(ordered[at : at + ROWS_AT_ONCE])
        ]

    def _drop_files(self, numbers: list[int]) -> list[str]:
        with self._volume.snapshot() as reader:
            names = Names(reader)
            named = [names.of(reader.inode(number)) for number in numbers if reader.has_inode(number)]

        def drop(tx: MetadataTransaction) -> None:
            for bucket, keys in named:
                for key in keys:
                    _delete(tx, buckets.get(tx, bucket), key)

        self._volume.mutate(drop)
        return [_shown(bucket, key) for bucket, keys in named for key in keys]

    def settle(self) -> tuple[int, int]:
        """Everything that was warm or hot is cold now, or lies in the store. (files, their bytes)."""
        after = b"a"
        while True:
            with self._volume.snapshot() as reader:
                rows = reader.first_rows(after + b"\0", b"b", FILES_AT_ONCE)
            if not rows:
                break
            after = rows[-1][0]
            found = [(unpack_u64(key[1:])[0], AccessRow.unpack(raw)) for key, raw in rows]
            self._volume.mutate(partial(_settle, rows=found))
        files = size = 0
        nameless = []
        with self._volume.snapshot() as reader:
            for key, raw in reader.scan(*prefix_range(b"I")):
                inode = Inode.unpack(unpack_u64(key[1:])[0], raw)
                if not inode.nlink:  # somebody had it open when the snapshot was taken
                    nameless.append(inode.number)
                elif inode.kind == Kind.FILE:
                    files += 1
                    size += inode.size
        for at in range(0, len(nameless), FILES_AT_ONCE):
            batch = nameless[at : at + FILES_AT_ONCE]
            self._volume.mutate(partial(_free, numbers=batch))
        return files, size


def _elsewhere(raw: bytes) -> bytes:
    """An extent's row without the hot bytes that are lost."""
    row, sums = ExtentRow.unpack(raw)
    if row.segment not in {STORED_SEGMENT, ELSEWHERE_SEGMENT}:
        row.segment, row.offset = ELSEWHERE_SEGMENT, 0
        row.generation += 1
    return row.pack(sums)


def _add_extent(tx: MetadataTransaction, entry: dict[str, Any]) -> None:
    number, sums = entry["extent"], base64.b64decode(entry["checksums"])
    if not tx.has_extent(number):
        tx.put(key_u64(b"X", number), ExtentRow(entry["length"], ELSEWHERE_SEGMENT, 0, 0).pack(sums))
        if len(sums) > 256:
            tx.put(key_u64(b"K", number), sums)
        return
    row, known = tx.extent(number)
    blocks = -(-row.length // BLOCK_BYTES) * CHECKSUM_BYTES
    if row.segment == ELSEWHERE_SEGMENT and len(known) != blocks:
        tx.set_checksums(number, sums)


def _add_buckets(tx: MetadataTransaction, rows: dict[str, dict[str, Any]]) -> None:
    for name, told in rows.items():
        if tx.get(b"B" + name.encode()) is None:
            made = buckets.create(tx, name, told["owner"])
            fresh = BucketRow(**{**told, "inode": made.inode})
            inventory.put(tx, name, fresh)
            if fresh.snapshot_of:
                directory = tx.inode(made.inode)
                directory.flags |= Inode.READ_ONLY
                tx.dirty(directory)


def _shown(bucket: str, key: bytes) -> str:
    return f"{bucket}/{key.decode('utf-8', 'surrogateescape')}"


def _is_whole(reader: InodeReader, entry: dict[str, Any]) -> bool:
    """Whether each extent of a file lies somewhere."""
    for _, _, extent, _ in entry["slices"]:
        raw = reader.get(key_u64(b"X", extent))
        if raw is None:
            return False
        if ExtentRow.unpack(raw)[0].segment == ELSEWHERE_SEGMENT and not packs.copies(reader, extent):
            return False
    return True


def _claim(tx: MetadataTransaction, entry: dict[str, Any], *, only_what_is_free: bool) -> None:
    """A file as a manifest has it: its content and attributes if they are newer than what is known, its names in any case."""
    try:
        bucket = buckets.get(tx, entry["bucket"])
    except NotFound:
        return
    told = Inode.unpack(entry["inode"], base64.b64decode(entry["attributes"]))
    keys = [base64.b64decode(name) for name in entry["names"]]
    is_new = not tx.has_inode(told.number)
    if only_what_is_free:
        keys = [key for key in keys if is_new and not _holder(tx, bucket, key)]
        if is_new and not keys:
            return
    if is_new:
        inode = Inode.unpack(told.number, told.pack())
        inode.bucket, inode.parent, inode.nlink, inode.flags, inode.size, inode.allocated = bucket.inode, 0, 0, 0, 0, 0
        tx.add_inode(inode)
    inode = tx.inode(told.number)
    given_up = _names_to_give_up(tx, inode, bucket, keys) if not is_new and told.nlink == len(keys) else []
    if inode.bucket != bucket.inode:
        tx.usage(inode.bucket, 0, -inode.size)
        tx.usage(bucket.inode, 0, inode.size)
        tx.move_inode(inode, bucket.inode)
    for key in keys:
        _give_name(tx, bucket, key, inode)
    for source, key in given_up:
        _delete(tx, source, key)
    if is_new or told.version > inode.version:
        _give_content(tx, inode, told, entry)


def _delete(tx: MetadataTransaction, bucket: BucketRow, key: bytes) -> None:
    """Of a snapshot, too: it cannot keep what is not there."""
    objects.delete(tx, replace(bucket, snapshot_of=""), key)


def _names_to_give_up(
    tx: MetadataTransaction, inode: Inode, bucket: BucketRow, keys: list[bytes]
) -> list[tuple[BucketRow, bytes]]:
    """Buckets and keys that a file is known by and does not have any more."""
    if inode.nlink == len(keys) and all(_holder(tx, bucket, key) == inode.number for key in keys):
        return []
    name, known = Names(tx).of(inode)
    if not known:
        return []
    source = buckets.get(tx, name)
    return [(source, key) for key in known if source.inode != bucket.inode or key not in keys]


def _holder(tx: MetadataTransaction, bucket: BucketRow, key: bytes) -> int:
    """Which file, special ones included, has a key; 0 for none."""
    entries, name = tree.split_key(key)
    directory = tree.walk(tx, bucket.inode, entries)
    if directory is None:
        return 0
    if not name:
        return tx.inode(directory).object_inode
    dentry = tree.get_dentry(tx, directory, name)
    return dentry.inode if dentry is not None else 0


def _give_name(tx: MetadataTransaction, bucket: BucketRow, key: bytes, inode: Inode) -> None:
    """Who had the key before loses it: this claim is newer."""
    entries, name = tree.split_key(key)
    parent = tree.ensure_directories(tx, bucket, entries)
    holder = _holder(tx, bucket, key)
    if holder == inode.number:
        return
    if name:
        dentry = tree.get_dentry(tx, parent.number, name)
        if dentry is not None:
            tree.detach(tx, parent, name, dentry)
        tree.attach(tx, parent, name, Dentry(inode.number, inode.kind))
    else:
        tree.own_object(tx, parent, inode.number)
    if holder:
        tree.drop_link(tx, tx.inode(holder))
    inode.nlink += 1
    tx.dirty(inode)


def _give_content(tx: MetadataTransaction, inode: Inode, told: Inode, entry: dict[str, Any]) -> None:
    tx.free_slices(inode.number, 1 << 62)
    content.drop_inline(tx, inode)
    content.set_size(tx, inode, told.size)
    for field in ("mode", "uid", "gid", "atime_ns", "mtime_ns", "ctime_ns", "version", "etag", "etag_parts"):
        setattr(inode, field, getattr(told, field))
    inode.flags = inode.flags & ~_LISTS | told.flags & _LISTS
    for offset, length, extent, inside in entry["slices"]:
        if not tx.has_extent(extent):
            tx.put(key_u64(b"X", extent), ExtentRow(inside + length, ELSEWHERE_SEGMENT, 0, 0).pack(b""))
        tx.put_slice(inode.number, Slice(offset, length, extent, inside), moved=True)
        tx.reference_extent(extent, 1)
    if "metadata" in entry or inode.has_metadata:
        objects.set_metadata(tx, inode, ObjectMetadata.unpack(pack_json(entry.get("metadata", {}))))
        tx.delete(key_u64(b"m", inode.number))
    for key, _ in list(tx.scan(*prefix_range(key_u64(b"Y", inode.number)))):
        tx.delete(key)
    for attribute, value in entry.get("xattrs", {}).items():
        tx.put(key_u64(b"Y", inode.number) + base64.b64decode(attribute), base64.b64decode(value))
    used_s = max(inode.mtime_ns, 0) // 1_000_000_000
    if evidence.get(tx, inode.number) is None and entry["slices"]:
        evidence.put(tx, inode.number, AccessRow(Tier.COLD, used_s, used_s, last_write_s=used_s), None)
    tx.dirty(inode)


def _with_references(reader: InodeReader) -> Iterator[tuple[int, int, ExtentRow, bool]]:
    """Each extent in order: (number, slices that refer to it, its row, whether a pack has a copy)."""
    used = array("Q", sorted(array("Q", (Slice.unpack(0, raw).extent for _, raw in reader.scan(*prefix_range(b"S"))))))
    copied = (unpack_u64(key[1:9])[0] for key, _ in reader.scan(*prefix_range(b"c")))
    at = 0
    next_copied = next(copied, None)
    for key, raw in reader.scan(*prefix_range(b"X")):
        number = unpack_u64(key[1:])[0]
        count = 0
        while at < len(used) and used[at] <= number:
            count += used[at] == number
            at += 1
        while next_copied is not None and next_copied < number:
            next_copied = next(copied, None)
        yield number, count, ExtentRow.unpack(raw)[0], next_copied == number


def _set_references(tx: MetadataTransaction, batch: list[tuple[int, int]]) -> None:
    for number, count in batch:
        tx.set_references(number, count)


def _free(tx: MetadataTransaction, numbers: list[int]) -> None:
    for number in numbers:
        content.free_inode(tx, tx.inode(number))


def _settle(tx: MetadataTransaction, rows: list[tuple[int, AccessRow]]) -> None:
    for number, row in rows:
        if not tx.has_inode(number):
            evidence.forget(tx, number)
            continue
        tier = hottest(tx, [piece.extent for piece in tx.slices(number)])
        if tier != row.tier:
            fresh = AccessRow.unpack(row.pack())
            fresh.tier = tier
            evidence.put(tx, number, fresh, row)
