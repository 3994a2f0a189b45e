"""How files are used: the evidence that tiering decides by.

A read is a GET that begins at the first byte, an open of the mount that reads, or a GET of a later range when nothing was read
for EPISODE_S: a client that fetches an object in eight parts at once has read it once. HEAD, LIST, stat, readdir, scrub and our own moves are none. Writes are
recorded in the transaction that commits them, so that every file with extents has a row; reads are collected in each process
and written together.

Invariants
* A file with slices has an `a` row and one `b` row, at the key that the `a` row names.
* Memory is bounded: at most FILES_MAX files wait in a process; beyond that they are written at once.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stratum import packs
from stratum.errors import StratumError
from stratum.log import get_logger
from stratum.schema import key_u64, prefix_range
from stratum.tier_rows import AccessRow, MoveRow, Tier

if TYPE_CHECKING:
    from collections.abc import Callable

    from stratum.config import Config
    from stratum.transaction import InodeReader, MetadataTransaction
    from stratum.volume import Volume

log = get_logger("evidence")
FLUSH_S = 1.0
FILES_MAX = 65536
BATCH_FILES = 256
MOMENTS_MAX = 64
"""Of one file between two writes: beyond that more reads say nothing new."""
EPISODE_S = 60
DAY_S = 86400.0
HALF_LIFE_FAST_S = DAY_S
HALF_LIFE_SLOW_S = 7 * DAY_S


def get(reader: InodeReader, inode: int) -> AccessRow | None:
    raw = reader.get(key_u64(b"a", inode))
    return None if raw is None else AccessRow.unpack(raw)


def put(tx: MetadataTransaction, inode: int, row: AccessRow, before: AccessRow | None) -> None:
    if before is None or before.key(inode) != row.key(inode):
        if before is not None:
            tx.delete(before.key(inode))
        tx.put(row.key(inode), b"")
    tx.put(key_u64(b"a", inode), row.pack())


def wrote(tx: MetadataTransaction, inode: int) -> None:
    """New bytes, which are hot. At most one change a second and file."""
    before = get(tx, inode)
    now_s = tx.now_ns // 1_000_000_000
    if before is None:
        put(tx, inode, AccessRow(Tier.HOT, now_s, now_s, last_write_s=now_s), None)
    elif before.last_write_s != now_s or before.tier != Tier.HOT:
        row = AccessRow.unpack(before.pack())
        row.tier, row.last_write_s, row.last_access_s = Tier.HOT, now_s, max(now_s, before.last_access_s)
        put(tx, inode, row, before)
        if before.tier == Tier.COLD:
            mark_partly_cold(tx, inode)


def mark_partly_cold(tx: MetadataTransaction, number: int) -> None:
    """Look where all bytes of a file are that is not cold as a whole. Until the next look, it may be marked in vain."""
    inode = tx.inode(number)
    is_partly_cold = any(_is_cold(tx, piece.extent) for piece in tx.slices(number))
    if inode.partly_cold != is_partly_cold:
        inode.partly_cold = is_partly_cold
        tx.dirty(inode)


def _is_cold(tx: MetadataTransaction, extent: int) -> bool:
    if not tx.has_extent(extent) or packs.is_hot(tx.extent(extent)[0]):
        return False
    return list(packs.copies(tx, extent)) == [Tier.COLD]


def shared(
    tx: MetadataTransaction, target: int, source: int, tier_if_gone: Callable[[], Tier] = lambda: Tier.HOT
) -> None:
    """`target` shows bytes of `source` now, wherever they lie; of a source that is gone the caller says in which tier."""
    before, origin = get(tx, target), get(tx, source)
    now_s = tx.now_ns // 1_000_000_000
    tier = Tier(origin.tier) if origin is not None else tier_if_gone()
    if before is None:
        put(tx, target, AccessRow(tier, now_s, now_s, last_write_s=now_s), None)
    else:
        row = AccessRow.unpack(before.pack())
        row.tier, row.last_write_s, row.last_access_s = min(before.tier, tier), now_s, max(now_s, before.last_access_s)
        put(tx, target, row, before)
    if tier == Tier.COLD or (tx.has_inode(source) and tx.inode(source).partly_cold):
        inode = tx.inode(target)
        inode.partly_cold = True
        tx.dirty(inode)


def set_tier(tx: MetadataTransaction, inode: int, tier: Tier) -> None:
    """The file's hottest bytes lie in `tier` now."""
    before = get(tx, inode)
    if before is not None and before.tier != tier:
        row = AccessRow.unpack(before.pack())
        row.tier, row.moved_s = tier, tx.now_ns // 1_000_000_000
        put(tx, inode, row, before)
    if tx.has_inode(inode):
        mark_partly_cold(tx, inode)


def forget(tx: MetadataTransaction, inode: int) -> None:
    """The file is gone."""
    row = get(tx, inode)
    if row is not None:
        tx.delete(row.key(inode))
        for table in (b"a", b"m", b"t"):
            tx.delete(key_u64(table, inode))
        for key, _ in list(tx.scan(*prefix_range(key_u64(b"j", inode)))):
            tx.delete(key)


def add_reads(row: AccessRow, collected: Collected) -> None:
    """Reads that were collected, oldest first."""
    counted = []
    for moment_s, begins in collected.moments:
        if not begins and moment_s - row.last_read_s < EPISODE_S:
            row.last_access_s = max(row.last_access_s, moment_s)
            continue
        counted.append(moment_s)
        past_s = max(moment_s - row.last_read_s, 0)
        row.average_fast = row.average_fast * 0.5 ** (past_s / HALF_LIFE_FAST_S) + 1
        row.average_slow = row.average_slow * 0.5 ** (past_s / HALF_LIFE_SLOW_S) + 1
        row.last_read_s = max(moment_s, row.last_read_s)
    row.reads += len(counted)
    row.read_bytes += collected.size
    row.last_access_s = max(row.last_access_s, row.last_read_s)
    row.recent_reads = (*row.recent_reads, *counted)[-len(row.recent_reads) :]


@dataclass(slots=True)
class Collected:
    """Reads of one file: (second, whether it begins one) of the first of them, and bytes of all."""

    moments: list[tuple[int, bool]] = field(default_factory=list)
    size: int = 0


def reads_since(row: AccessRow, moment_s: float) -> int:
    """How many of the remembered reads came after `moment_s`."""
    return sum(1 for read_s in row.recent_reads if read_s >= moment_s and read_s)


def _ask_to_return(tx: MetadataTransaction, inode: int, row: AccessRow, config: Config) -> None:
    """A file that is read often and is not hot is looked at: the policy decides."""
    if row.tier == Tier.HOT or tx.get(key_u64(b"m", inode)) is not None:
        return
    since_s = max(row.last_access_s - config.tiering_promote_window_s, row.moved_s)
    if reads_since(row, since_s) >= min(config.tiering_promote_reads, len(row.recent_reads)):
        tx.put(key_u64(b"m", inode), MoveRow(0, "repeated reads", tx.now_ns).encode())


class Recorder:
    """Reads of this process on their way to the store."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._reads: dict[int, Collected] = {}
        self._thread: threading.Thread | None = None
        self._ending = False

    def read(self, inode: int, size: int, *, begins: bool = True) -> None:
        """O(1), and waits for nothing."""
        now_s = int(time.time())
        with self._lock:
            collected = self._reads.get(inode)
            if collected is None:
                collected = self._reads[inode] = Collected()
            collected.size += size
            if len(collected.moments) < MOMENTS_MAX:
                collected.moments.append((now_s, begins))
            if len(self._reads) >= FILES_MAX:
                self._wake.set()
            if self._thread is None and not self._ending:
                self._thread = threading.Thread(target=self._run, name="evidence", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while not self._ending:
            self._wake.wait(FLUSH_S)
            self._wake.clear()
            try:
                self.flush()
            except StratumError as error:
                log.warning("evidence_lost", error=error.message)

    def flush(self) -> None:
        """Write what was collected. Raises what a mutation raises; what was collected is lost then."""
        with self._lock:
            reads, self._reads = self._reads, {}
        items = list(reads.items())
        for at in range(0, len(items), BATCH_FILES):
            batch = items[at : at + BATCH_FILES]

            def apply(tx: MetadataTransaction, batch: list[tuple[int, Collected]] = batch) -> None:
                for inode, collected in batch:
                    before = get(tx, inode)
                    if before is not None:  # inline files have none: they stay where they are
                        row = AccessRow.unpack(before.pack())
                        add_reads(row, collected)
                        put(tx, inode, row, before)
                        _ask_to_return(tx, inode, row, self._volume.config)

            self._volume.mutate(apply, frees=True)

    def stop(self) -> None:
        self._ending = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        try:
            self.flush()
        except StratumError as error:
            log.warning("evidence_lost", error=error.message)
