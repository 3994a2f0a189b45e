"""Filling clones: their directories get what their source had when it was frozen, when somebody asks, and behind everybody's back.

A clone is made by one directory that waits (frozen.py). Whoever looks for a name in it gets that one entry first; whoever lists it, its entries in their order; a housekeeper
fills the rest. A directory that is filled in waits itself, so none of this ever copies more than a page of one directory. Transactions fill in what they look up as they go; readers raise
`StillFilling`, and `patiently` or the face they belong to fills it and asks once more.

Invariants
* What is copied hangs on its name in the same transaction, but for a file of many slices: until that has them all, a Q row of the session holds it.
* A file of several names has from the beginning all links that it will have in the clone; links out of the frozen tree are not kept.
* The extents of a file in a frozen tree have their rows and bytes (`Wanted`).
"""

from __future__ import annotations

import heapq
import time
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

from stratum import content, evidence, frozen, longkeys, names, packs
from stratum.blocks import CHECKSUM_BYTES
from stratum.errors import NoSpace, StillFilling
from stratum.log import get_logger
from stratum.schema import LINKS_MAX, Dentry, Inode, Kind, Slice, key_u64, key_u64_u64, prefix_range
from stratum.tier_rows import Tier
from stratum.transaction import InodeReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stratum.kv.contract import Snapshot
    from stratum.transaction import MetadataTransaction
    from stratum.volume import Volume

T = TypeVar("T")
log = get_logger("filling")

ENTRIES_AT_ONCE = 128
SLICES_AT_ONCE = 256
FILL_S = 10.0
"""Of the housekeeper's round: a clone of millions of files takes minutes, and dead sessions and the change log wait for the same thread."""
BACKGROUND_SHARE = 0.5
SPACE_WAIT_S = 60.0
PATIENCE = 10_000
"""How often somebody asks again: for a page at a time, so that a name between two pages is not looked for for ever."""


class FrozenReader(InodeReader):
    """The namespace as a freeze knows it, read through a snapshot or a transaction."""

    def __init__(self, kv: Snapshot, freeze: int) -> None:
        super().__init__(kv)
        self._any_frozen = False
        self._prefixes = [frozen.prefix(number) for number in _with_rows(kv, freeze)]
        self.get = self._get

    def _get(self, key: bytes, /) -> bytes | None:
        if key[0] in frozen.TABLES:
            for prefix in self._prefixes:
                raw = self.kv.get(prefix + key)
                if raw is not None:
                    return raw[1:] if raw[0] else None
        return self.kv.get(key)

    def scan(self, start: bytes, stop: bytes) -> Iterator[tuple[bytes, bytes]]:
        kept = [prefix for prefix in self._prefixes if self.kv.first_rows(prefix + start, prefix + stop, 1)]
        if not kept:
            yield from self.kv.scan(start, stop)
            return

        def rows_of(order: int, prefix: bytes) -> Iterator[tuple[bytes, int, bytes]]:
            cut = len(prefix)
            for key, raw in self.kv.scan(prefix + start, prefix + stop):
                yield key[cut:], order, raw

        def rows() -> Iterator[tuple[bytes, int, bytes]]:
            for key, raw in self.kv.scan(start, stop):
                yield key, len(kept), b"\1" + raw

        last = b""
        for key, _, raw in heapq.merge(*(rows_of(order, prefix) for order, prefix in enumerate(kept)), rows()):
            if key != last and raw[0]:
                yield key, raw[1:]
            last = key

    def first_rows(self, start: bytes, stop: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        return list(islice(self.scan(start, stop), limit))


def _with_rows(kv: Snapshot, freeze: int) -> list[int]:
    """The freezes from this one on that keep anything, and the newest, which may yet within a transaction."""
    newest, _ = frozen.active(kv)
    found = []
    while freeze < newest:
        rows = kv.first_rows(frozen.prefix(freeze), frozen.prefix(newest), 1)
        if not rows:
            break
        freeze = int.from_bytes(rows[0][0][1:9], "big")
        found.append(freeze)
        freeze += 1
    return [*found, newest]


# -- what readers and transactions find -----------------------------------------------------------------------------------


def missing(reader: InodeReader, directory: int, entry: bytes) -> bytes | None:
    """The dentry of an entry that a directory does not hold, if it is one that waits. Raises `StillFilling` if this is no transaction."""
    row = frozen.waiting(reader, directory)
    if row is None or frozen.is_taken(reader, directory, row, entry):
        return None
    source = FrozenReader(reader.kv, row.freeze)
    raw = longkeys.get(source, b"D", row.source, entry)
    if raw is None:
        return None
    if not reader.may_change:
        raise StillFilling(directory, entry)
    tx: MetadataTransaction = reader  # type: ignore[assignment]  # says may_change
    found = Filler(tx, row.freeze, source).fill(directory, entry, Dentry.unpack(raw))
    frozen.take(tx, directory, entry)
    return found.pack() if found is not None else None


def entries(
    reader: InodeReader, directory: int, start: bytes = b"", prefix: bytes = b""
) -> Iterator[tuple[bytes, bytes]]:
    """(entry, packed dentry) from `start` on, in order. Raises `StillFilling` where a directory that waits has no more."""
    row = frozen.waiting(reader, directory)
    if row is None:
        yield from longkeys.scan(reader.kv, b"D", directory, start, prefix)
        return
    if prefix.endswith(b"/"):  # there is one such entry at most
        raw_or_none = longkeys.get(reader, b"D", directory, prefix) or missing(reader, directory, prefix)
        if raw_or_none is not None and start <= prefix:
            yield prefix, raw_or_none
        return
    for entry, raw in longkeys.scan(reader.kv, b"D", directory, start, prefix):
        if entry > row.cursor:
            break
        yield entry, raw
    if not prefix or prefix > row.cursor or row.cursor.startswith(prefix):
        raise StillFilling(directory)


def patiently(volume: Volume, function: Callable[[], T]) -> T:
    """What the function returns, once what it looks at is filled in."""
    for attempt in range(PATIENCE):
        try:
            return function()
        except StillFilling as error:
            provide(volume, error, attempt)
    return function()


def page(volume: Volume, directory: int, start: bytes, limit: int) -> list[tuple[bytes, Dentry]]:
    """The first `limit` entries from `start` on."""

    def look() -> list[tuple[bytes, Dentry]]:
        with volume.snapshot() as reader:
            rows = islice(entries(reader, directory, start), limit)
            return [(entry, Dentry.unpack(raw)) for entry, raw in rows]

    return patiently(volume, look)


def provide(volume: Volume, wanted: StillFilling, attempt: int = 0) -> None:
    """Fill in what was asked for, more of a listing with each attempt. Raises what a commit may."""
    if wanted.entry:
        _run(volume, partial(_one, directory=wanted.directory, entry=wanted.entry), frees=True)
        return
    for _ in range(1 << min(attempt, 10)):
        if not _page(volume, wanted.directory, frees=True):
            return


def fill_all(
    volume: Volume,
    freeze: int = 0,
    *,
    checked: bool = False,
    ending: Callable[[], bool] = lambda: False,
    share: float = 1.0,
) -> None:
    """Fill every directory that waits, or those of one freeze. `checked`: quotas are asked. `share`: how much of the time it works.

    Raises what a commit may; what is filled then stays.
    """
    after = 0
    while not ending():
        with volume.snapshot() as reader:
            if freeze and not frozen.is_active(reader, freeze):
                return
            found = frozen.scan_waiting(reader, ENTRIES_AT_ONCE, after) if reader.any_frozen else []
        if not found:
            if not after:
                return
            after = 0
            continue
        after = found[-1][0]
        for directory, row in found:
            if freeze in {0, row.freeze}:
                more = True
                while more and not ending():
                    began_s = time.monotonic()
                    more = _page(volume, directory, frees=False, checked=checked)
                    if share < 1.0:
                        time.sleep((time.monotonic() - began_s) * (1.0 / share - 1.0))


class Background:
    """The housekeeper's part: it fills a while, and forgets what nobody waits for any more."""

    def __init__(self, volume: Volume, ending: Callable[[], bool]) -> None:
        self._volume = volume
        self._ending = ending
        self._not_before_s = 0.0

    def run(self) -> None:
        began_s = time.monotonic()
        with self._volume.snapshot() as reader:
            if not reader.any_frozen or began_s < self._not_before_s:
                return
        try:
            until_s = began_s + FILL_S
            fill_all(self._volume, ending=lambda: self._ending() or time.monotonic() > until_s, share=BACKGROUND_SHARE)
        except NoSpace as error:
            self._not_before_s = time.monotonic() + SPACE_WAIT_S
            log.warning("clones_not_filled", error=error.message)
        while not self._ending() and self._volume.mutate(frozen.collect, frees=True):
            pass


class Wanted:
    """Which extents without references the frozen trees still have."""

    def __init__(self, reader: InodeReader) -> None:
        self._reader = reader
        self._trees = (
            [_Tree(FrozenReader(reader.kv, freeze), root) for freeze, root in frozen.scan_active(reader)]
            if reader.any_frozen
            else []
        )

    def wants(self, extent: int) -> bool:
        """A file that had a slice of it, and is in a tree, may have it there yet: that is enough."""
        if not self._trees:
            return False
        owners = packs.owners(self._reader, extent)
        return any(tree.has(owner) for tree in self._trees for owner in owners)


class _Tree:
    """What lay below a directory when it was frozen."""

    def __init__(self, state: FrozenReader, root: int) -> None:
        self._state = state
        self._root = root
        self._known: dict[int, bool] = {}

    def has(self, file: int) -> bool:
        return bool(self._state.has_inode(file) and self.names_of(self._state.inode(file)))

    def names_of(self, inode: Inode) -> int:
        """How many names of a file it has."""
        return sum(self._has_directory(directory) for directory, _ in names.of(self._state, inode, LINKS_MAX))

    def _has_directory(self, directory: int) -> bool:
        way = []
        at = directory
        while at not in self._known and at != self._root and at and self._state.has_inode(at):
            way.append(at)
            at = self._state.inode(at).parent
        inside = at == self._root or self._known.get(at, False)
        for number in way:
            self._known[number] = inside
        return inside


# -- one step ---------------------------------------------------------------------------------------------------------------


class _ManySlices(Exception):
    """A file's slices are too many for one transaction."""

    def __init__(self, freeze: int, inode: Inode, bucket: int) -> None:
        super().__init__()
        self.freeze = freeze
        self.inode = inode
        self.bucket = bucket


def _page(volume: Volume, directory: int, *, frees: bool, checked: bool = False) -> bool:
    """Fill in the next entries of a directory; False once it does not wait any more."""

    def fill(tx: MetadataTransaction, prepared: dict[int, int]) -> bool:
        row = frozen.waiting(tx, directory)
        if row is None:
            return False
        source = FrozenReader(tx.kv, row.freeze)
        start = row.cursor + b"\0" if row.cursor else b""
        found = list(islice(longkeys.scan(source, b"D", row.source, start), ENTRIES_AT_ONCE))
        filler = Filler(tx, row.freeze, source, prepared, checked=checked)
        for entry, raw in found:
            if not frozen.take_in_turn(tx, directory, entry):
                filler.fill(directory, entry, Dentry.unpack(raw))
        if len(found) == ENTRIES_AT_ONCE:
            frozen.advance(tx, directory, frozen.Waiting(row.freeze, row.source, found[-1][0]))
            return True
        frozen.stop_waiting(tx, directory)
        return False

    return _run(volume, fill, frees=frees, checked=checked)


def _one(tx: MetadataTransaction, prepared: dict[int, int], directory: int, entry: bytes) -> None:
    row = frozen.waiting(tx, directory)
    if row is None or frozen.is_taken(tx, directory, row, entry):
        return
    source = FrozenReader(tx.kv, row.freeze)
    raw = longkeys.get(source, b"D", row.source, entry)
    if raw is not None:
        Filler(tx, row.freeze, source, prepared).fill(directory, entry, Dentry.unpack(raw))
        frozen.take(tx, directory, entry)


def _run(
    volume: Volume,
    step: Callable[[MetadataTransaction, dict[int, int]], T],
    *,
    frees: bool,
    checked: bool = False,
) -> T:
    """Commit a step; files of many slices are copied before it, and removed if somebody else has filled them in meanwhile."""
    prepared: dict[int, int] = {}
    try:
        with volume.reading():
            while True:
                try:
                    return volume.mutate(lambda tx: step(tx, prepared), frees=frees)
                except _ManySlices as many:
                    with volume.snapshot() as reader:
                        source = FrozenReader(reader.kv, many.freeze)
                        copied = copy_file(volume, source, many.inode, many.bucket, checked=checked)
                    prepared[many.inode.number] = copied
    finally:
        if prepared:
            _drop_unused(volume, list(prepared.values()))


def copy_file(volume: Volume, source: InodeReader, inode: Inode, bucket: int, *, checked: bool = True) -> int:
    """A copy of a file without a name, held by a Q row. The caller holds the volume's reader guard since before `source`."""
    number, session = volume.new_id(), volume.session.id

    def make(tx: MetadataTransaction) -> None:
        copy_inode(tx, source, inode, number, bucket, checked=checked)
        tx.put(key_u64_u64(b"Q", session, number), b"")

    volume.mutate(make)
    pieces: list[Slice] = []

    def share() -> None:
        volume.mutate(lambda tx: _share(tx, number, inode.number, pieces))

    for key, raw in source.scan(*prefix_range(key_u64(b"S", inode.number))):
        pieces.append(Slice.unpack(int.from_bytes(key[9:], "big"), raw))
        if len(pieces) >= SLICES_AT_ONCE:
            share()
            pieces = []
    if pieces:
        share()
    return number


def _drop_unused(volume: Volume, numbers: list[int]) -> None:
    session = volume.session.id

    def drop(tx: MetadataTransaction) -> None:
        for number in numbers:
            if tx.delete(key_u64_u64(b"Q", session, number)):
                content.free_inode(tx, tx.inode(number))

    volume.mutate(drop, frees=True)


def _share(tx: MetadataTransaction, number: int, source: int, pieces: list[Slice]) -> None:
    for piece in pieces:
        tx.put_slice(number, piece, moved=True)
        if tx.has_extent(piece.extent):  # else reading says so, as it does of the source
            tx.reference_extent(piece.extent, 1)
    evidence.shared(tx, number, source, lambda: min(_tier(tx, piece.extent) for piece in pieces))


def _tier(tx: MetadataTransaction, extent: int) -> Tier:
    if not tx.has_extent(extent) or packs.is_hot(tx.extent(extent)[0]):
        return Tier.HOT
    return min(packs.copies(tx, extent), default=Tier.COLD)


def copy_inode(
    tx: MetadataTransaction, source: InodeReader, inode: Inode, number: int, bucket: int, *, checked: bool = True
) -> Inode:
    """Everything of an inode but its names, slices, and what a directory holds. It has one link, a directory those of the source."""
    made = Inode(number, inode.kind, mode=inode.mode, uid=inode.uid, gid=inode.gid, now_ns=tx.now_ns, bucket=bucket)
    made.atime_ns, made.mtime_ns = inode.atime_ns, inode.mtime_ns
    made.flags = inode.flags & ~(Inode.READ_ONLY | Inode.SEVERAL_NAMES)
    made.size = inode.size
    if inode.kind == Kind.DIRECTORY:
        made.nlink, made.entries, made.live = inode.nlink, inode.entries, inode.live
    else:
        made.rdev = inode.rdev
    content.copy_etag(inode, made)
    tx.add_inode(made)
    for key, raw in list(source.scan(*prefix_range(key_u64(b"Y", inode.number)))):
        tx.put(key_u64(b"Y", number) + key[9:], raw)
    for flag, table in ((Inode.HAS_METADATA, b"M"), (Inode.INLINE, b"N")):
        raw_or_none = source.get(key_u64(table, inode.number)) if inode.flags & flag else None
        if raw_or_none is not None:
            tx.put(key_u64(table, number), raw_or_none)
            if flag == Inode.INLINE and inode.kind == Kind.FILE:
                made.allocated = len(raw_or_none) - CHECKSUM_BYTES
    if inode.kind == Kind.FILE:
        tx.usage(bucket, 0, inode.size, checked=checked)
    return made


def _lost(directory: int, entry: bytes) -> None:
    """`entry` is empty for the directory's own object."""
    log.error("entry_not_cloned", directory=f"{directory:#x}", entry=repr(entry), why="its inode was lost before")


class Filler:
    """Copies from one frozen state within one transaction."""

    def __init__(
        self,
        tx: MetadataTransaction,
        freeze: int,
        source: FrozenReader,
        prepared: dict[int, int] | None = None,
        *,
        checked: bool = False,
    ) -> None:
        """`prepared`: copies of files with many slices, by the file's number; None: they are copied here, too."""
        self._tx = tx
        self._freeze = freeze
        self._source = source
        self._prepared = prepared
        self._checked = checked
        self._tree = _Tree(source, frozen.root_of(tx, freeze))

    def fill(self, directory: int, entry: bytes, dentry: Dentry) -> Dentry | None:
        """Give a directory one entry of its source. Its counts have it already. None for one that named nothing in the source either."""
        tx = self._tx
        parent = tx.inode(directory)
        if not self._source.has_inode(dentry.inode):
            _lost(directory, entry)
            self._leave_out(parent, dentry)
            return None
        child = self._source.inode(dentry.inode)
        with tx.filling():
            if dentry.kind == Kind.DIRECTORY:
                made = self.copy_directory(child, tx.new_id(), parent.bucket)
                made.parent, made.entry = directory, entry
                tx.dirty(made)
            else:
                made = self._file(child, parent.bucket)
                names.add(tx, made, directory, entry)
                tx.dirty(made)
                if dentry.kind == Kind.FILE:
                    tx.usage(parent.bucket, 1, 0, checked=self._checked)
            copied = Dentry(made.number, dentry.kind)
            longkeys.put(tx, b"D", directory, entry, copied.pack(), tx.new_id)
        return copied

    def _leave_out(self, parent: Inode, dentry: Dentry) -> None:
        """Whether S3 shows the directories above for another reason, `fsck` finds out."""
        parent.entries -= 1
        parent.nlink -= dentry.kind == Kind.DIRECTORY
        parent.live -= dentry.kind == Kind.FILE
        self._tx.dirty(parent)

    def copy_directory(self, inode: Inode, number: int, bucket: int) -> Inode:
        """It waits for its entries, and has its own object already."""
        tx = self._tx
        made = copy_inode(tx, self._source, inode, number, bucket)
        if inode.object_inode and not self._source.has_inode(inode.object_inode):
            _lost(inode.number, b"")
            made.rdev = 0
            made.flags |= Inode.EXPLICIT  # it does not vanish with its last child, as it would not have before
        elif inode.object_inode:
            own = self._file(self._source.inode(inode.object_inode), bucket)
            names.add(tx, own, number, b"")
            tx.dirty(own)
            made.rdev = own.number
            tx.usage(bucket, 1, 0, checked=self._checked)
        if inode.entries:
            frozen.wait(tx, number, self._freeze, inode.number)
        return made

    def _file(self, inode: Inode, bucket: int) -> Inode:
        tx, several = self._tx, inode.nlink > 1
        if several:
            known = frozen.linked(tx, self._freeze, inode.number)
            if known and tx.has_inode(known):
                return tx.inode(known)
        made = self._copy_file(inode, bucket)
        if several:
            made.nlink = max(1, self._tree.names_of(inode))
            if made.nlink > 1:
                frozen.link(tx, self._freeze, inode.number, made.number)
        return made

    def _copy_file(self, inode: Inode, bucket: int) -> Inode:
        tx = self._tx
        if inode.kind != Kind.FILE or inode.flags & Inode.INLINE:
            return copy_inode(tx, self._source, inode, tx.new_id(), bucket, checked=self._checked)
        if self._prepared is not None and inode.number in self._prepared:
            number = self._prepared[inode.number]
            tx.delete(key_u64_u64(b"Q", tx.session, number))
            return tx.inode(number)
        limit = SLICES_AT_ONCE + 1 if self._prepared is not None else 1 << 62
        rows = self._source.first_rows(*prefix_range(key_u64(b"S", inode.number)), limit)
        if len(rows) == limit:
            raise _ManySlices(self._freeze, inode, bucket)
        made = copy_inode(tx, self._source, inode, tx.new_id(), bucket, checked=self._checked)
        if rows:
            pieces = [Slice.unpack(int.from_bytes(key[9:], "big"), raw) for key, raw in rows]
            _share(tx, made.number, inode.number, pieces)
        return made
