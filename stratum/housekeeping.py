"""What runs beside the faces: recovery behind dead sessions, reclaim, the change log's end, reader slots.

One process does it at a time (flock on `meta/housekeeping.lock`). Every step is small, idempotent and may be interrupted
anywhere; nothing here ever touches what a live session has not committed.
"""

from __future__ import annotations

import fcntl
import os
import threading
from typing import TYPE_CHECKING

from stratum import clones, filling, inode_counts, packs, tree
from stratum.compaction import Compactor
from stratum.errors import StratumError
from stratum.fencing import fence, fence_ending
from stratum.log import get_logger
from stratum.schema import (
    ELSEWHERE_SEGMENT,
    STORED_SEGMENT,
    SegmentRow,
    key_u64,
    key_u64_u64,
    prefix_range,
    split_u64_u64,
    unpack_json,
    unpack_u64,
)
from stratum.stored_extents import Mover

if TYPE_CHECKING:
    from pathlib import Path

    from stratum.transaction import MetadataTransaction
    from stratum.volume import Volume

log = get_logger("housekeeping")

INTERVAL_S = 1.0
SWEEP_ROUNDS = 300
BATCH_EXTENTS = 128
LOOKED_AT_ONCE = 4096


class Housekeeper:
    """A thread that works while it holds the lock; several may wait for it."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._wake = threading.Event()
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="housekeeper", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._ending = True
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        fd = os.open(self._volume.meta / "housekeeping.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        rounds = 0
        mover, compactor = Mover(self._volume), Compactor(self._volume)
        clones = filling.Background(self._volume, lambda: self._ending)
        try:
            while not self._ending:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    run_once(self._volume, sweep=rounds % SWEEP_ROUNDS == 0)
                    mover.run()
                    compactor.run()
                    clones.run()
                    rounds += 1
                except BlockingIOError:
                    pass
                except StratumError as error:
                    log.warning("housekeeping_failed", error=str(error))
                except Exception:
                    log.exception("housekeeping_failed")
                self._wake.wait(INTERVAL_S)
        finally:
            os.close(fd)


def run_once(volume: Volume, *, sweep: bool = True) -> None:
    """One round of everything; `sweep` looks at every segment."""
    volume.store.check_readers()
    recovered = recover(volume)
    free_waiting_inodes(volume)
    start: bytes | None = b"F"
    while start is not None:
        start = reclaim(volume, start)
    while give_back(volume):
        pass
    if sweep or recovered:
        sweep_segments(volume)
        inode_counts.complete(volume)
    trim_change_log(volume)
    volume.refill_reserve()


def recover(volume: Volume) -> int:
    """Clean up behind every dead session; how many there were."""
    fence_ending(volume)
    dead = [session for session in volume.session.rows() if volume.session.is_dead(session)]
    for session in dead:
        recover_session(volume, session)
    return len(dead)


def recover_session(volume: Volume, session: int) -> None:
    """Declare a session dead, then remove what it left: its mount, orphans and uncommitted files."""
    log.info("session_recovered", session=session)
    with volume.snapshot() as reader:
        mount = reader.get(key_u64(b"T", session))
    if mount is not None:
        fence(volume, session, unpack_json(mount))
    # From here on nothing that the process might still do can commit: its T and Z rows are gone before anything else.
    volume.mutate(lambda tx: tx.delete(key_u64(b"Z", session)), frees=True)
    while True:
        with volume.snapshot() as reader:
            orphans = [split_u64_u64(key)[1] for key, _ in reader.scan(*prefix_range(key_u64(b"O", session)))][
                :BATCH_EXTENTS
            ]
        if not orphans:
            break
        release_orphans(volume, session, orphans)
    clones.prune_session(volume, session)
    remove_uncommitted(volume, session)
    volume.session.forget_file(session)


def release_orphans(volume: Volume, session: int, numbers: list[int]) -> None:
    def release(tx: MetadataTransaction) -> None:
        for number in numbers:
            tree.release_orphan(tx, session, number)

    volume.mutate(release, frees=True)


def remove_uncommitted(volume: Volume, session: int) -> None:
    """Unlink the segment files of a dead session that no row names, and its empty folders."""
    for folder in volume.segments.session_folders(session):
        for part in list(folder.iterdir()):
            for name in list(part.iterdir()):
                with volume.snapshot() as reader:
                    known = reader.get(key_u64(b"G", segment_of(name))) is not None
                if not known:
                    name.unlink(missing_ok=True)
            _remove_empty(part)
        _remove_empty(folder)


def segment_of(name: Path) -> int:
    return int(name.name.partition(".")[0], 16)


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return


def free_waiting_inodes(volume: Volume) -> None:
    """Go on freeing inodes with many slices, a small transaction at a time."""
    while True:
        with volume.snapshot() as reader:
            waiting = next(reader.scan(*prefix_range(b"W")), None)
        if waiting is None:
            return
        number = int.from_bytes(waiting[0][1:], "big")

        def free(tx: MetadataTransaction, number: int = number) -> None:
            if tx.free_slices(number, 256):
                tx.delete(key_u64(b"W", number))

        volume.mutate(free, frees=True)


def reclaim(volume: Volume, start: bytes = b"F") -> bytes | None:
    """Give back the bytes of freed extents that no reader can see any more, and no clone waits for; where to go on, None at the end."""
    newest = volume.store.last_id()  # before the slots are looked at: see stratum/sessions.py
    live = {session: int(str(row["slot"])) for session, row in volume.session.rows().items()}
    oldest = volume.session.oldest_read(live, newest)
    extents: dict[int, int] = {}
    keys: list[bytes] = []
    following = None
    with volume.snapshot() as reader:
        wanted = filling.Wanted(reader)
        for looked, (key, raw) in enumerate(reader.scan(start, key_u64_u64(b"F", oldest + 1, 0))):
            if len(keys) >= BATCH_EXTENTS or looked >= LOOKED_AT_ONCE:
                following = key
                break
            number = split_u64_u64(key)[1]
            if not wanted.wants(number):
                extents[number] = unpack_u64(raw)[0] if raw else 1
                keys.append(key)
        rows = {number: reader.extent(number)[0] for number in extents if reader.get(key_u64(b"X", number)) is not None}
    # A clone of an older state may have taken an extent up again; its guard kept it out of reach until that was committed.
    rows = {number: row for number, row in rows.items() if (row.references, row.generation) == (0, extents[number])}
    if not keys:
        return following
    segments: set[int] = set()
    for row in rows.values():
        if row.segment in {STORED_SEGMENT, ELSEWHERE_SEGMENT}:
            continue
        volume.segments.free(row.segment, row.offset, row.length, whole=False)
        segments.add(row.segment)

    def forget(tx: MetadataTransaction) -> None:
        for key in keys:
            tx.delete(key)
        for number in rows:
            packs.forget_extent(tx, number, volume.config.cold_delete_after_s)
            tx.remove_extent(number)

    volume.mutate(forget, frees=True)
    for segment in segments:
        remove_empty_segment(volume, segment)
    return following


def give_back(volume: Volume) -> bool:
    """Give back hot bytes of extents that have left the hot tier; True if there may be more.

    Nobody waits for readers: one that located the bytes before finds them gone, and looks where they are now.
    """
    with volume.snapshot() as reader:
        ranges = packs.left_behind(reader, BATCH_EXTENTS)
    for segment, offset, length in ranges:
        volume.segments.free(segment, offset, length, whole=False)

    def forget(tx: MetadataTransaction) -> None:
        for segment, offset, length in ranges:
            if tx.delete(key_u64_u64(b"l", segment, offset)):
                tx.uncount_in_segment(segment, length)

    if ranges:
        volume.mutate(forget, frees=True)
    for segment in {segment for segment, _, _ in ranges}:
        remove_empty_segment(volume, segment)
    return len(ranges) >= BATCH_EXTENTS


def remove_empty_segment(volume: Volume, segment: int) -> bool:
    """Remove a segment without extents, unless somebody may still commit one in it."""

    def unused() -> bool:
        with volume.snapshot() as reader:
            raw = reader.get(key_u64(b"G", segment))
        return raw is not None and SegmentRow.unpack(raw).extents == 0

    if not unused() or not volume.segments.remove_if_unused(segment, unused):
        return False
    volume.mutate(lambda tx: tx.delete(key_u64(b"G", segment)), frees=True)
    return True


def sweep_segments(volume: Volume) -> None:
    """Remove empty segments that were still being written, or half removed, when their last extent went."""
    with volume.snapshot() as reader:
        empty = [
            unpack_u64(key[1:])[0]
            for key, raw in reader.scan(*prefix_range(b"G"))
            if SegmentRow.unpack(raw).extents == 0
        ]
    for segment in empty:
        remove_empty_segment(volume, segment)


def trim_change_log(volume: Volume) -> None:
    """Drop what every live mount has applied; everything when there is none."""
    with volume.snapshot() as reader:
        mounts = {int.from_bytes(key[1:], "big"): unpack_json(raw) for key, raw in reader.scan(*prefix_range(b"T"))}
        end = reader.id
    for session, row in mounts.items():
        owner, _, applied = volume.session.read_slot(row["slot"])
        end = min(end, applied if owner == session else 0)

    def trim(tx: MetadataTransaction) -> int:
        keys = []
        for key, _ in tx.scan(b"L", key_u64_u64(b"L", end, 0)):
            keys.append(key)
            if len(keys) >= 1000:
                break
        for key in keys:
            tx.delete(key)
        return len(keys)

    with volume.snapshot() as reader:
        anything = next(reader.scan(b"L", key_u64_u64(b"L", end, 0)), None)
    while anything is not None and volume.mutate(trim, frees=True) >= 1000:
        pass
