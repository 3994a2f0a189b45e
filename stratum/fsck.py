"""`fsck`: does every row agree with every other, and every stored byte with its checksum.

`check` reads the metadata in one snapshot (memory grows with the number of inodes), then every stored byte. Without
`repair` it may run beside a served volume. With it, it wants the volume alone, because a repair believes counts it made
before. What cannot be repaired without inventing bytes is reported and left.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stratum import (
    buckets,
    content,
    filling,
    frozen,
    fsck_names,
    fsck_repairs,
    fsck_secrets,
    fsck_tiers,
    fsck_usage,
    housekeeping,
    longkeys,
    names,
    packs,
    stored_extents,
    tree,
)
from stratum.errors import Busy, DataDamaged, NotFound, StratumError
from stratum.log import get_logger
from stratum.multipart import scan_all_parts
from stratum.schema import (
    ELSEWHERE_SEGMENT,
    ROOT_INODE,
    STORED_SEGMENT,
    BucketRow,
    Dentry,
    ExtentRow,
    Inode,
    Kind,
    SegmentRow,
    Slice,
    key_u64,
    prefix_range,
    split_u64_u64,
    unpack_json,
    unpack_u64,
)  # fmt: skip
from stratum.segments import SegmentStore

if TYPE_CHECKING:
    from stratum.fsck_repairs import Repair
    from stratum.transaction import InodeReader, MetadataTransaction
    from stratum.volume import Volume

log = get_logger("fsck")
LOST_AND_FOUND = b"lost+found/"


@dataclass(slots=True)
class Finding:
    """`kind` is stable for programs; `thing` names what is affected, `what` says what is wrong."""

    kind: str
    thing: str
    what: str
    repaired: bool = False


Seen = Callable[[int, int], None]


class _Checker:
    def __init__(self, volume: Volume, reader: InodeReader) -> None:
        self.volume = volume
        self.findings: list[tuple[Finding, Repair | None]] = []
        self.inodes = {
            unpack_u64(key[1:])[0]: Inode.unpack(unpack_u64(key[1:])[0], raw)
            for key, raw in reader.scan(*prefix_range(b"I"))
        }
        self.buckets = dict(buckets.scan(reader))
        self.parents: dict[int, tuple[int, bytes]] = {}
        self.links: Counter[int] = Counter()
        self.entries: Counter[int] = Counter()
        self.subdirectories: Counter[int] = Counter()
        self.live_files: Counter[int] = Counter()
        self.objects: Counter[int] = Counter()
        self.misnamed: set[int] = set()
        self.named: set[int] = set()
        self.held_trees: set[int] = set()
        self.unfilled = {number for number, _ in frozen.scan_waiting(reader, 1 << 62)}
        """Directories of clones that could not be filled: they do not hold yet what they count."""

    def found(self, kind: str, thing: str, what: str, repair: Repair | None = None) -> None:
        self.findings.append((Finding(kind, thing, what), repair))
        fsck_tiers.tell(self.volume, kind, thing, what)

    # -- names --------------------------------------------------------------------------------------------------------

    def check_tree(self, reader: InodeReader) -> None:
        reached: set[int] = set()
        self.held_trees = {split_u64_u64(key)[1] for key, _ in reader.scan(*prefix_range(b"Q"))} & self.inodes.keys()
        pending = [ROOT_INODE, *(number for number in self.held_trees if self.inodes[number].kind == Kind.DIRECTORY)]
        while pending:
            directory = pending.pop()
            if directory in reached:
                continue
            reached.add(directory)
            for entry, dentry in tree.scan_dentries(reader, directory):
                inode = self.inodes.get(dentry.inode)
                thing = f"entry {entry!r} of directory {directory:#x}"
                if inode is None or inode.kind != dentry.kind:
                    self.found(
                        "dangling-entry",
                        thing,
                        f"names inode {dentry.inode:#x}, which is missing or of another kind",
                        fsck_repairs.remove_dentry(directory, entry),
                    )
                    continue
                self.links[dentry.inode] += 1
                self.entries[directory] += 1
                if dentry.kind == Kind.DIRECTORY:
                    self.subdirectories[directory] += 1
                    self.parents[dentry.inode] = (directory, entry)
                    pending.append(dentry.inode)
                    continue
                self._check_name(inode, directory, entry)
                if dentry.kind == Kind.FILE:
                    self.live_files[directory] += 1
                    self.objects[inode.bucket] += 1
            owned = self.inodes[directory].object_inode
            if owned:
                if owned in self.inodes:
                    self.links[owned] += 1
                    self._check_name(self.inodes[owned], directory, b"")
                    self.objects[self.inodes[directory].bucket] += 1
                else:
                    self.found(
                        "dangling-object",
                        f"directory {directory:#x}",
                        f"its own object {owned:#x} is missing",
                        self._clear_object(directory),
                    )
        self._check_buckets(reader)
        self._check_stray_entries(reader)
        self._check_directories(reached)
        self._check_links(reader, reached)
        self._check_names(reader, reached)

    def _check_name(self, inode: Inode, directory: int, entry: bytes) -> None:
        """Of one with several names, `_check_names` looks at the rows."""
        if not inode.flags & Inode.SEVERAL_NAMES and (inode.parent, inode.entry) != (directory, entry):
            self.misnamed.add(inode.number)

    def _clear_object(self, directory: int) -> Repair:
        def clear(tx: MetadataTransaction) -> None:
            inode = tx.inode(directory)
            inode.rdev = 0
            tx.dirty(inode)

        return clear

    def _check_buckets(self, reader: InodeReader) -> None:
        for name, row in self.buckets.items():
            dentry = tree.bucket_directory(reader, name)
            if dentry is not None and dentry.inode == row.inode:
                continue
            if row.inode in self.inodes and dentry is None:
                self.found(
                    "bucket-without-entry",
                    name,
                    "its directory has no name",
                    fsck_repairs.put_dentry(name, row),
                )
            else:
                self.found(
                    "bucket-without-directory",
                    name,
                    f"its directory {row.inode:#x} is missing",
                    fsck_repairs.delete_bucket(name),
                )
        for entry, dentry in tree.scan_dentries(reader, ROOT_INODE):
            name = os.fsdecode(entry[:-1])
            if name not in self.buckets and dentry.inode in self.inodes:
                owner = min(
                    (row["created_ns"], row["user_id"])
                    for row in (unpack_json(raw) for _, raw in reader.scan(*prefix_range(b"R")))
                )[1]
                row = BucketRow(dentry.inode, owner, self.inodes[dentry.inode].ctime_ns)
                self.found(
                    "directory-without-bucket",
                    name,
                    "the root names a directory that is no bucket",
                    fsck_repairs.put_bucket(name, row),
                )

    def _check_stray_entries(self, reader: InodeReader) -> None:
        """Entries of a directory that is gone. Also notes what any entry names, reachable or not."""
        nodes = set(self.inodes)
        rows = list(reader.scan(*prefix_range(b"D")))
        nodes.update(unpack_u64(raw)[0] for key, raw in rows if longkeys.is_continuation(key))
        for key, raw in rows:
            if unpack_u64(key[1:9])[0] not in nodes:
                self.found("stray-entry", f"entry {key[9:]!r}", "its directory is gone", fsck_repairs.delete_row(key))
            elif not longkeys.is_continuation(key):
                self.named.add(Dentry.unpack(raw).inode)

    def _check_directories(self, reached: set[int]) -> None:
        live_directories: Counter[int] = Counter()
        depth_first = sorted(reached, key=self._depth, reverse=True)
        for number in depth_first:
            inode = self.inodes[number]
            live = self.live_files[number] + live_directories[number]
            counted = (self.entries[number], live, 2 + self.subdirectories[number])
            if number in self.unfilled:
                counted = (inode.entries, inode.live, inode.nlink)
            if (inode.entries, inode.live, inode.nlink) != counted:
                self.found(
                    "directory-counts", f"directory {number:#x}", f"has {inode.entries} entries, {inode.live} live, {inode.nlink} links; counted {counted}",
                    fsck_repairs.set_counts(number, counted),
                )  # fmt: skip
            inode.entries, inode.live, inode.nlink = counted
            parent = self.parents.get(number)
            if parent is not None:
                if inode.is_live:
                    live_directories[parent[0]] += 1
                if (inode.parent, inode.entry) != parent:
                    self.found(
                        "directory-parent", f"directory {number:#x}", f"says it is {inode.entry!r} in {inode.parent:#x}, it is {parent[1]!r} in {parent[0]:#x}",
                        fsck_repairs.set_parent(number, *parent),
                    )  # fmt: skip

    def _depth(self, number: int) -> int:
        depth = 0
        while number in self.parents:
            number = self.parents[number][0]
            depth += 1
        return depth

    def _check_names(self, reader: InodeReader, reached: set[int]) -> None:
        wrong = self.misnamed | fsck_names.wrong_rows(reader, self.inodes, self.links)
        for number, known in fsck_names.names_of(reader, self.inodes, reached, wrong).items():
            self.found(
                "wrong-names",
                f"inode {number:#x}",
                "does not say under which names it is found",
                fsck_repairs.set_names(number, known),
            )

    def _check_links(self, reader: InodeReader, reached: set[int]) -> None:
        parts = {part.inode for _, _, part in scan_all_parts(reader)}
        held: Counter[int] = Counter(split_u64_u64(key)[1] for key, _ in reader.scan(*prefix_range(b"O")))
        for number, inode in self.inodes.items():
            if number in reached or number in parts or number in self.held_trees:
                continue
            links = self.links[number]
            if inode.kind != Kind.DIRECTORY and links and inode.nlink != links and not self.unfilled:
                self.found(
                    "link-count",
                    f"inode {number:#x}",
                    f"has {inode.nlink} links, counted {links}",
                    fsck_repairs.set_links(number, links),
                )
            elif not links and inode.nlink:
                if number in self.named:
                    continue  # its directory is unreachable too, and brings it back
                self.found("unreachable-inode", f"inode {number:#x}", "has links and no name", self._adopt(number))
            elif not links and not held[number]:
                self.found(
                    "unheld-orphan", f"inode {number:#x}", "has no name and nobody uses it", fsck_repairs.free(number)
                )
        for number in parts - self.inodes.keys():
            self.found(
                "dangling-part",
                f"inode {number:#x}",
                "a part names it and it is missing",
                fsck_repairs.drop_part(number),
            )
        uploads = {
            row["number"]
            for name in self.buckets.values()
            for _, raw in longkeys.scan(reader, b"U", name.inode)
            for row in (unpack_json(raw),)
        }
        for upload, part_number, part in scan_all_parts(reader):
            if upload not in uploads and part.inode in self.inodes:
                self.found(
                    "stray-part",
                    f"part {part_number} of upload {upload:#x}",
                    "its upload is gone",
                    fsck_repairs.drop_part(part.inode, free=True),
                )

    def _adopt(self, number: int) -> Repair:
        """Give an inode without a name one in `lost+found/` of its bucket; free it if there is no such bucket."""
        row = next((row for row in self.buckets.values() if row.inode == self.inodes[number].bucket), None)

        def repair(tx: MetadataTransaction) -> None:
            inode = tx.inode(number)
            if row is None:
                content.free_inode(tx, inode)
                return
            parent = tree.ensure_directories(tx, row, [LOST_AND_FOUND])
            name = f"{number:016x}".encode()
            if inode.kind == Kind.DIRECTORY:
                name += b"/"
            else:
                inode.nlink = 1
                names.set_all(tx, inode, ())
            tx.dirty(inode)
            tree.attach(tx, parent, name, Dentry(number, inode.kind))

        return repair

    # -- content ------------------------------------------------------------------------------------------------------

    def check_extents(self, reader: InodeReader) -> None:
        extents = {unpack_u64(key[1:])[0]: ExtentRow.unpack(raw)[0] for key, raw in reader.scan(*prefix_range(b"X"))}
        waiting = {unpack_u64(key[1:])[0] for key, _ in reader.scan(*prefix_range(b"W"))}
        references: Counter[int] = Counter()
        owned: set[tuple[int, int]] = set()
        used: dict[int, int] = {}
        ends: dict[int, int] = defaultdict(int)
        for key, raw in reader.scan(*prefix_range(b"S")):
            number, offset = split_u64_u64(key)
            piece = Slice.unpack(offset, raw)
            references[piece.extent] += 1
            if number in self.inodes and piece.extent in extents:
                owned.add((piece.extent, number))
                used[number] = self.inodes[number].mtime_ns
            thing = f"inode {number:#x} at {offset}"
            row = extents.get(piece.extent)
            if number not in self.inodes and number not in waiting:
                self.found(
                    "stray-slice",
                    thing,
                    "its inode is gone",
                    fsck_repairs.drop_slice(key, piece.extent, known=row is not None),
                )
            elif row is None:
                self.found("missing-extent", thing, f"extent {piece.extent:#x} is gone; the file cannot be read there")
            elif piece.extent_offset + piece.length > row.length:
                self.found(
                    "short-extent",
                    thing,
                    f"extent {piece.extent:#x} ends before the slice does; the file cannot be read there",
                )
            elif offset < ends[number]:
                self.found(
                    "overlapping-slices",
                    thing,
                    "two slices claim the same bytes; the later one wins",
                    fsck_repairs.recut(number, piece),
                )
            ends[number] = max(ends[number], piece.end)
        freed = {split_u64_u64(key)[1] for key, _ in reader.scan(*prefix_range(b"F"))}
        counts: dict[int, list[int]] = defaultdict(lambda: [0, 0])
        stored = stored_extents.numbers(reader)
        for number in stored - {number for number, row in extents.items() if row.segment == STORED_SEGMENT}:
            self.found(
                "stray-row",
                f"bytes of extent {number:#x}",
                "its extent is elsewhere",
                fsck_repairs.delete_row(key_u64(b"E", number)),
            )
        for number, row in extents.items():
            if row.segment not in {STORED_SEGMENT, ELSEWHERE_SEGMENT}:
                counts[row.segment][0] += 1
                counts[row.segment][1] += row.length
            if row.references != references[number]:
                self.found(
                    "extent-references",
                    f"extent {number:#x}",
                    f"has {row.references} references, counted {references[number]}",
                    fsck_repairs.set_references(number, references[number]),
                )
            elif row.references == 0 and number not in freed:
                self.found(
                    "unfreed-extent",
                    f"extent {number:#x}",
                    "has no references and is not being freed",
                    fsck_repairs.set_references(number, 0),
                )
        for number in freed - extents.keys():
            self.found(
                "stray-free", f"extent {number:#x}", "is to be freed and is gone", fsck_repairs.drop_free(number)
            )
        for segment, _, length in packs.left_behind(reader, 1 << 62):
            counts[segment][0] += 1
            counts[segment][1] += length
        self._check_segments(reader, counts)
        fsck_tiers.check_copies(reader, extents, self.found)
        fsck_tiers.check_owners(reader, owned, used, self.found)

    def _check_segments(self, reader: InodeReader, counts: dict[int, list[int]]) -> None:
        rows = {unpack_u64(key[1:])[0]: SegmentRow.unpack(raw) for key, raw in reader.scan(*prefix_range(b"G"))}
        for number in rows.keys() | counts.keys():
            row = rows.get(number)
            wanted = tuple(counts[number]) if number in counts else (0, 0)
            if row is None or (row.extents, row.live_bytes) != wanted:
                what = (
                    "has no row"
                    if row is None
                    else f"counts {row.extents} extents, {row.live_bytes} bytes; there are {wanted}"
                )
                self.found(
                    "segment-counts",
                    f"segment {number:#x}",
                    what,
                    fsck_repairs.put_row(key_u64(b"G", number), SegmentRow(row.path if row else 0, *wanted).pack()),
                )

    def check_rows(self, reader: InodeReader) -> None:
        """Rows that hang on an inode that is gone, and content that should be there."""
        for table, name in ((b"M", "metadata"), (b"N", "content"), (b"Y", "attribute")):
            for key, _ in reader.scan(*prefix_range(table)):
                number = unpack_u64(key[1:9])[0]
                if number not in self.inodes:
                    self.found(
                        "stray-row",
                        f"{name} of inode {number:#x}",
                        "its inode is gone",
                        fsck_repairs.delete_row(key),
                    )
        sizes: Counter[int] = Counter()
        for number, inode in self.inodes.items():
            if inode.kind == Kind.FILE:
                sizes[inode.bucket] += inode.size
            if inode.flags & Inode.INLINE:
                try:
                    content.get_inline(reader, number)
                except DataDamaged as error:
                    self.found("damaged-content", f"inode {number:#x}", error.message)
        for name, row in self.buckets.items():
            wanted = (self.objects[row.inode], sizes[row.inode])
            if buckets.usage(reader, row) != wanted:
                self.found(
                    "bucket-usage", name, f"says {buckets.usage(reader, row)} objects and bytes, counted {wanted}",
                    fsck_repairs.set_usage(row.inode, *wanted),
                )  # fmt: skip
        fsck_usage.check(reader, self.inodes, self.buckets, self.found)

    def check_data(self, reader: InodeReader, seen: Seen | None) -> None:
        """Read every byte, through descriptors of its own: one that was open before would hide that a file is gone."""
        segments = SegmentStore(self.volume.segments.folders, 0, self.volume.new_id, on_failure=lambda _: None)
        try:
            self._read_extents(reader, segments, seen)
            fsck_tiers.check_shards(self.volume, reader, self.found)
        finally:
            segments.close()

    def _read_extents(self, reader: InodeReader, segments: SegmentStore, seen: Seen | None) -> None:
        total = sum(SegmentRow.unpack(raw).live_bytes for _, raw in reader.scan(*prefix_range(b"G"))) if seen else 0
        done = 0
        for key, raw in reader.scan(*prefix_range(b"X")):
            number = unpack_u64(key[1:])[0]
            row, _ = ExtentRow.unpack(raw)
            if not row.references or row.segment == ELSEWHERE_SEGMENT:
                continue
            row, checksums = reader.extent(number)
            try:
                if row.segment == STORED_SEGMENT:
                    stored_extents.get(reader, number)
                    continue
                for at in range(0, row.length, content.READ_BYTES):
                    segments.read(
                        number,
                        row.segment,
                        row.offset,
                        row.length,
                        checksums,
                        at,
                        min(at + content.READ_BYTES, row.length),
                    )
                done += row.length
                if seen is not None:
                    seen(done, total)
            except DataDamaged as error:
                if self._has_left(number, row):
                    continue
                tiers = [tier.name.lower() for tier in packs.copies(reader, number)]
                what = f"its hot bytes are damaged or gone, and a copy is in the {tiers[0]} tier; `stratum scrub start VOLUME --wait` makes it whole" if tiers else error.message  # fmt: skip
                self.found("damaged-extent", f"extent {number:#x}", what)

    def _has_left(self, number: int, row: ExtentRow) -> bool:
        """Whether an extent lies elsewhere since this check began: beside a served volume data moves."""
        with self.volume.snapshot() as now:
            raw = now.get(key_u64(b"X", number))
        return raw is None or ExtentRow.unpack(raw)[0].generation != row.generation


def check(volume: Volume, *, repair: bool = False, data: bool = True, seen: Seen | None = None) -> list[Finding]:
    """Everything that is wrong; without `data` no stored byte is read. `seen(bytes so far, of how many)` is told while they are. Raises `Busy` if a repair is asked for while others have the volume open."""
    if repair:
        others = [
            str(row["role"])
            for session, row in volume.session.rows().items()
            if session != volume.session.id and not volume.session.is_dead(session)
        ]
        if others:
            raise Busy(f"--repair wants the volume alone, but {', '.join(others)} has it open; stop it first")
        housekeeping.recover(volume)
    done: list[Finding] = []
    try:
        filling.fill_all(volume)
    except StratumError as error:
        done.append(Finding("unfilled-clone", "a clone", f"cannot be filled with what it shows: {error.message}"))
    tried: set[tuple[str, str]] = set()
    while True:
        found = _examine(volume, data=data, seen=seen)
        repairable = (
            [
                (finding, function)
                for finding, function in found
                if function is not None and (finding.kind, finding.thing) not in tried
            ]
            if repair
            else []
        )
        if not repairable:
            return done + [finding for finding, _ in found]
        # One kind at a time, in the order they are found: a missing name explains much that is counted after it.
        kind = repairable[0][0].kind
        for finding, function in repairable:
            if finding.kind == kind:
                tried.add((finding.kind, finding.thing))
                try:
                    volume.mutate(function, frees=True)
                    finding.repaired = True
                except NotFound as error:
                    log.warning("not_repaired", thing=finding.thing, error=error.message)
                done.append(finding)


def _examine(volume: Volume, *, data: bool, seen: Seen | None) -> list[tuple[Finding, Repair | None]]:
    with volume.reading(), volume.snapshot() as reader:
        reader.see_rows_only()
        checker = _Checker(volume, reader)
        checker.check_tree(reader)
        checker.check_extents(reader)
        checker.check_rows(reader)
        fsck_secrets.check(volume, reader, checker.found)
        if data:
            checker.check_data(reader, seen)
    return checker.findings
