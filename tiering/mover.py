"""The mover: brings extents to a tier and frees what they leave, never losing, doubling or blocking them.

A copy goes through six steps, with a boundary between them where it may be interrupted and is resumed or undone:
  planned    what goes into the pack is known; nothing is written
  intended   the pack's row is COPYING, with its place and an intent: what is written from here on can be found
  copied     the bytes are where the row says, durably
  verified   they were read back, or the remote vouched for them, and have the digest of what was read
  published  in one transaction the pack is VALID and each extent whose place did not change meanwhile has its copy row
  freed      in another one the extent gives up its hotter bytes, if a good copy is there
Copy and free are separate: what was copied ahead frees its hot bytes by the last step alone.

Between two packs, or two extents that come back, the mover makes room for what is more pressing: it raises `Preempted`, and whoever called it
is called again later. What has its copy by then is not copied again.

Invariants
* One mover a volume: it holds the flock of `meta/tiering.lock`.
* Nothing is freed unless, in the same transaction, another good copy is there (packs.free_hot, packs.release).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from stratum import cold, content, copies, courtesy, evidence, manifest, metrics, packs
from stratum.blocks import checksum
from stratum.boundaries import boundary
from stratum.cold_backends.contract import RemoteDamaged
from stratum.cold_backends.limit import Bucket
from stratum.errors import Busy, DataDamaged, Gone, StratumError, TierUnavailable
from stratum.log import get_logger
from stratum.read_ahead import ReadAhead
from stratum.schema import ELSEWHERE_SEGMENT, Inode, Kind, Slice, key_u64
from stratum.tier_rows import COPYING, AccessRow, PackRow, Tier
from stratum.tiering import records

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from stratum.tier_rows import CopyRow
    from stratum.transaction import InodeReader, MetadataTransaction
    from stratum.volume import Volume

T = TypeVar("T")
log = get_logger("mover")
PACK_BYTES = 64 * 1024 * 1024
FILES_AT_ONCE = 512
BATCH_BYTES = 256 * 1024 * 1024
"""Files that are moved together, unless one alone is larger: none of them frees anything before all are copied."""
FREED_AT_ONCE = 256
ALONE_BYTES_MIN = 128 * 1024
"""Less than this is not sent to a remote by itself: it would cost more to keep as an object than it is worth."""


class Preempted(Exception):
    """Something else comes first. No error: only the loop of the daemon catches it, and the work is begun again where it was."""


@contextmanager
def exclusive(volume: Volume) -> Iterator[None]:
    """Be the mover. Raises `Busy` if another process is."""
    fd = os.open(volume.meta / "tiering.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy("another process moves this volume's data; it takes up what is asked for") from None
        yield
    finally:
        os.close(fd)


@dataclass(slots=True)
class Outcome:
    """What became of moving files. `failed` maps an inode to why."""

    moved_files: int = 0
    copied_bytes: int = 0
    freed_bytes: int = 0
    failed: dict[int, str] = field(default_factory=dict)


@dataclass(slots=True)
class Member:
    """An extent that goes into a pack."""

    extent: int
    generation: int
    length: int


Stays = Callable[["InodeReader", int], bool]
Holds = Callable[["InodeReader", int], bool]


def _holds(leaving: set[int], stays: Stays | None) -> Holds | None:
    """An extent is as hot as the hottest of its owners: whether one that is not leaving keeps it."""
    if stays is None:
        return None

    def holds(reader: InodeReader, extent: int) -> bool:
        return any(
            owner not in leaving
            and reader.has_inode(owner)
            and stays(reader, owner)
            and any(piece.extent == extent for piece in reader.slices(owner))
            for owner in packs.owners(reader, extent)
        )

    return holds


class Mover:
    """Moves extents and files. Not thread-safe; the caller holds `exclusive`."""

    def __init__(self, volume: Volume, *, pressing: Callable[[], bool] = lambda: False) -> None:
        """`pressing`: whether something else should be done first. Asked often; each time is a sign of life."""
        self.volume = volume
        self.pressing = pressing
        self.courtesy = courtesy.of_volume(volume)
        self._pace = Bucket(volume.config.tiering_moved_bytes_per_s_max, clock=time.monotonic, pause=time.sleep)
        self.moved_bytes: Counter[str] = Counter()

    def make_room(self) -> None:
        """Raises `Preempted`. Called when something has been done since the caller was called, so that all work goes on."""
        if self.pressing():
            raise Preempted

    def in_turn(self, items: Iterable[T]) -> Iterator[T]:
        """Each of them, making room between two. Raises `Preempted`."""
        for at, item in enumerate(items):
            if at:
                self.make_room()
            yield item

    # -- copies -------------------------------------------------------------------------------------------------------

    def copy(
        self, extents: Iterable[int], tier: Tier, *, again: bool = False, remote: str = "", alone: bool = False
    ) -> int:
        """Give each extent a verified copy in a tier; those that have one are left, unless they are to be written `again`.

        What is too little to be sent alone is left too, unless `alone`. How many bytes were copied. Raises `TierUnavailable`,
        `ForeignRemote`, `DataDamaged` or `Preempted`.
        """
        copied = 0
        waiting: list[Member] = []
        size = 0
        for member in self._missing(extents, tier, again=again):
            if waiting and size + member.length > PACK_BYTES:
                copied += self._write_pack(waiting, tier, remote)
                self.make_room()
                waiting, size = [], 0
            waiting.append(member)
            size += member.length
        if waiting and (tier != Tier.COLD or alone or size >= ALONE_BYTES_MIN):
            copied += self._write_pack(waiting, tier, remote)
        return copied

    def _missing(self, extents: Iterable[int], tier: Tier, *, again: bool) -> Iterator[Member]:
        for number in dict.fromkeys(extents):
            with self.volume.snapshot() as reader:
                if reader.get(key_u64(b"X", number)) is None:
                    continue
                row, _ = reader.extent(number)
                if not row.references or (not again and reader.get(packs.copy_key(number, tier)) is not None):
                    continue
                member = Member(number, row.generation, row.length)
            yield member

    def _write_pack(self, members: list[Member], tier: Tier, remote: str = "") -> int:
        """One pack through all its steps. How many bytes it holds."""
        volume = self.volume
        number = volume.new_id()
        intent: list[list[int]] = []
        pieces: list[bytes] = []
        at = 0
        for member in members:
            intent.append([member.extent, member.generation, at, member.length])
            pieces.append(self.read(member))
            at += member.length
        data = b"".join(pieces)
        with self.courtesy.piece():
            digest = hashlib.sha256(data).hexdigest()
        row = PackRow(
            tier,
            COPYING,
            volume.session.id,
            len(data),
            digest,
            int(time.time()),
            intent=intent,
        )
        if tier == Tier.WARM:
            volume.warm.plan(number, row)
        else:
            row.remote = remote or volume.cold.available() or ""
            if not row.remote:
                raise TierUnavailable(no_remote(volume))
            volume.cold.check_marker(row.remote)  # before there is a row: each try would leave one to be removed
            row.key = volume.cold.new_key()
        boundary("mover.planned")
        volume.mutate(lambda tx: packs.put(tx, number, row), frees=True)
        boundary("mover.intended")
        self.finish_pack(number, row, data)
        return len(data)

    def read(self, member: Member, goes_to: Callable[[CopyRow, int], int] = copies.to_its_end) -> bytes:
        """All of an extent, verified. `goes_to`: how far in a pack its reader goes on."""
        pieces = []
        at = 0
        while at < member.length:
            stop = min(at + content.READ_BYTES, member.length)
            with self.courtesy.piece():
                piece = content.read_extent(self.volume, member.extent, at, stop, goes_to=goes_to)
            pieces.append(piece)
            at += len(piece)
        self._pace.take(member.length)
        return b"".join(pieces)

    def finish_pack(self, number: int, row: PackRow, data: bytes) -> None:
        """From intended to published. On failure the pack is condemned, and what was there before stays as it was."""
        volume = self.volume
        try:
            self._send(number, row, data)
            boundary("mover.copied")
            if row.tier == Tier.WARM:
                volume.warm.verify(number, row, self.courtesy)
            else:
                volume.cold.verify(row)
            boundary("mover.verified")
        except (StratumError, OSError) as error:
            if isinstance(error, RemoteDamaged | DataDamaged):  # the bytes are where they were: they are sent again
                metrics.DAMAGE.add("move", "healing")
            volume.mutate(lambda tx: packs.condemn(tx, number, row, 0.0), frees=True)
            if isinstance(error, RemoteDamaged | OSError):
                raise TierUnavailable(f"a new pack did not arrive as it was sent: {error}") from error
            raise
        row.verified_s = int(time.time())
        missing = [index for index, disk in enumerate(row.disks) if not disk]

        def publish(tx: MetadataTransaction) -> None:
            if packs.publish(tx, number, row, self._grace_s(row.tier)) and missing:
                packs.want_repair(tx, number, f"written without shards {missing}")

        volume.mutate(publish, frees=True)
        self.moved_bytes[Tier(row.tier).name.lower()] += row.length
        metrics.MOVED.add(Tier(row.tier).name.lower(), amount=row.length)
        boundary("mover.published")

    def _send(self, number: int, row: PackRow, data: bytes) -> None:
        volume = self.volume
        members = [(extent, offset, length) for extent, _, offset, length in row.intent]
        if row.tier == Tier.WARM:
            volume.warm.write(number, row, data, members, self.courtesy)
            return
        with volume.snapshot() as reader:
            owners = sorted({owner for extent, _, _ in members for owner in packs.owners(reader, extent)})
            epoch = volume.cold.remote(row.remote)[0].epoch
            alive = [member for member in members if reader.get(key_u64(b"X", member[0])) is not None]
            told = manifest.describe(reader, volume.instance, epoch, number, alive, owners)
            for listed in told["extents"]:
                if not listed["checksums"]:  # its bytes lie in the store, with one checksum for all
                    at = listed["offset"]
                    listed["checksums"] = manifest.encoded(checksum(bytes(data[at : at + listed["length"]])))

        def began(upload_id: str) -> None:
            row.upload_id = upload_id
            volume.mutate(lambda tx: packs.put(tx, number, row), frees=True)
            boundary("mover.upload_began")

        volume.cold.write(row, data, told, began)

    def _grace_s(self, tier: int) -> float:
        return self.volume.config.cold_delete_after_s if tier == Tier.COLD else 0.0

    # -- frees --------------------------------------------------------------------------------------------------------

    def free_above(self, extents: list[int], tier: Tier, holds: Holds | None = None) -> int:
        """Give up what extents have in tiers hotter than `tier`, where they have a good copy in it. Bytes freed.

        `holds` says of an extent whether another file needs it where it is: an extent is as hot as its hottest owner.
        """
        freed = 0
        for at in range(0, len(extents), FREED_AT_ONCE):
            batch = extents[at : at + FREED_AT_ONCE]

            def free(tx: MetadataTransaction, batch: list[int] = batch) -> int:
                total = 0
                for number in batch:
                    if not tx.has_extent(number) or tx.get(packs.copy_key(number, tier)) is None:
                        continue
                    if holds is not None and tx.extent(number)[0].references > 1 and holds(tx, number):
                        continue
                    if tier == Tier.COLD:
                        packs.release(tx, number, Tier.WARM, tx.extent(number)[0].generation, 0.0)
                    total += packs.free_hot(tx, number, tx.extent(number)[0].generation)
                return total

            freed += self.volume.mutate(free, frees=True)
        boundary("mover.freed")
        return freed

    # -- the way back -------------------------------------------------------------------------------------------------

    def promote(self, extents: Iterable[int]) -> int:
        """Bring extents to the hot tier; their copies elsewhere stay, so that the way out is free. Bytes brought.

        Raises `NoSpace`, `StorageFailed`, `TierUnavailable`, `NeedsRestore`, `DataDamaged` or `Preempted`; what came before stays.
        """
        brought = 0
        numbers = list(dict.fromkeys(extents))
        ahead, places = _in_order(self.volume, numbers)
        for number in numbers:
            if brought:
                self.make_room()
            with self.volume.snapshot() as reader:
                if reader.get(key_u64(b"X", number)) is None:
                    continue
                row, checksums = reader.extent(number)
            if row.segment != ELSEWHERE_SEGMENT or not row.references:
                continue
            data = self.read(Member(number, row.generation, row.length), partial(ahead.goes_to, places[number]))
            if self.write_hot(number, row.generation, data, checksums):
                brought += len(data)
            boundary("promote.placed")
        self.moved_bytes["hot"] += brought
        metrics.MOVED.add("hot", amount=brought)
        return brought

    def write_hot(self, number: int, generation: int, data: bytes, checksums: bytes) -> bool:
        """Give an extent hot bytes, in place of those it may have; False if it was freed or moved meanwhile.

        `data` is verified. Raises `NoSpace` or `StorageFailed`.
        """

        def place(tx: MetadataTransaction) -> bool:
            if not tx.has_extent(number):
                return False
            row, _ = tx.extent(number)
            if row.generation != generation or not row.references:
                return False
            if packs.is_hot(row):
                packs.leave_behind(tx, row)
            tx.relocate_extent(number, prepared.segment, prepared.offset)
            tx.count_in_segment(prepared)
            return True

        with self.volume.segments.writer(len(data), hot_only=True) as writer:
            with self.courtesy.piece():
                writer.write(data)
                prepared = writer.finish()[0]
            assert prepared.checksums == checksums, "verified bytes have the extent's checksums"
            boundary("promote.written")
            writer.committing()
            placed = self.volume.mutate(place)
            if placed:
                writer.keep()
            else:
                writer.reopen()
        return placed

    # -- files --------------------------------------------------------------------------------------------------------

    def move(
        self,
        inodes: Iterable[int],
        tier: Tier,
        *,
        cause: str,
        inputs: dict[int, dict[str, Any]] | None = None,
        alone: bool = False,
        stays: Stays | None = None,
    ) -> Outcome:
        """Bring whole files to a tier and free what they leave. Files that cannot go are in `failed`, and stay as they were.

        `stays` says of another file that shares extents with these whether they must stay where they are for its sake.
        Raises `TierUnavailable`, `ForeignRemote` or `NoSpace` if nothing more can go there now, and `Preempted`.
        """
        outcome = Outcome()
        for batch in self.in_turn(self.batches(inodes)):
            extents = {number: found for number in batch if (found := self._extents(number, tier, outcome)) is not None}
            everything = [extent for found in extents.values() for extent in found]
            if tier == Tier.HOT:
                outcome.copied_bytes += self.promote(everything)
            else:
                try:
                    outcome.copied_bytes += self.copy(everything, tier, alone=alone)
                except DataDamaged:
                    self._copy_singly(extents, tier, outcome, alone=alone)
                leaving = [extent for found in extents.values() for extent in found]
                outcome.freed_bytes += self.free_above(leaving, tier, _holds(set(batch), stays))
            self._settle(extents, tier, cause, inputs or {}, outcome)
        return outcome

    def batches(self, inodes: Iterable[int]) -> Iterator[list[int]]:
        """Files that are moved together."""
        batch: list[int] = []
        size = 0
        with self.volume.snapshot() as reader:
            lengths = {number: reader.inode(number).size if reader.has_inode(number) else 0 for number in inodes}
        for number, length in lengths.items():
            if batch and (len(batch) == FILES_AT_ONCE or size + length > BATCH_BYTES):
                yield batch
                batch, size = [], 0
            batch.append(number)
            size += length
        if batch:
            yield batch

    def _copy_singly(self, extents: dict[int, list[int]], tier: Tier, outcome: Outcome, *, alone: bool) -> None:
        """One damaged file must not hold up the others."""
        for number, found in list(extents.items()):
            try:
                outcome.copied_bytes += self.copy(found, tier, alone=alone)
            except DataDamaged as error:
                outcome.failed[number] = error.message
                del extents[number]

    def _extents(self, number: int, tier: Tier, outcome: Outcome) -> list[int] | None:
        """The extents of a file; a small one that lies in the metadata store gets one if it is to leave the hot tier."""
        for _ in range(3):
            try:
                with self.volume.snapshot() as reader:
                    inode = reader.inode(number)
                    slices = reader.slices(number)
            except Gone:
                outcome.failed[number] = "the file is gone"
                return None
            if inode.kind != Kind.FILE:
                outcome.failed[number] = "it is not a file"
                return None
            if not inode.flags & Inode.INLINE or tier == Tier.HOT:
                return list(dict.fromkeys(piece.extent for piece in slices))
            self.volume.mutate(partial(_take_out, number=number, version=inode.version), frees=True)
        outcome.failed[number] = "the file changes too fast"
        return None

    def _settle(
        self, extents: dict[int, list[int]], tier: Tier, cause: str, inputs: dict[int, dict[str, Any]], outcome: Outcome
    ) -> None:
        """Note where the files are now."""

        def settle(tx: MetadataTransaction) -> tuple[int, dict[int, str]]:
            moved, failed = 0, {}
            for number, found in extents.items():
                if not tx.has_inode(number):
                    continue
                before = evidence.get(tx, number)
                now = hottest(tx, found)
                evidence.set_tier(tx, number, now)
                good = all(_is_in(tx, extent, tier) for extent in found)
                if not good:
                    failed[number] = (
                        "not all of it could go: some of it changed, is too small to be sent alone, or is shared with a file that stays"
                    )
                moved += good
                if before is None or before.tier != now or not good:
                    event = {
                        "event": "moved" if good else "not moved",
                        "from": Tier(before.tier).name.lower() if before else "",
                        "to": tier.name.lower(),
                        "cause": cause,
                        "inputs": inputs.get(number, {}),
                    }
                    if not good:
                        event["error"] = failed[number]
                    records.add(tx, number, event)
            return moved, failed

        moved, failed = self.volume.mutate(settle, frees=True)
        outcome.moved_files += moved
        outcome.failed.update(failed)
        metrics.MOVES.add(tier.name.lower(), "moved", amount=moved)
        metrics.MOVES.add(tier.name.lower(), "failed", amount=len(failed))


def no_remote(volume: Volume) -> str:
    """Why nothing can go to the cold tier."""
    with volume.snapshot() as reader:
        name = cold.active(reader)
        known = packs.setting(reader, "remotes").get(name or "", {})
    if name is None:
        return "the cold tier has no remote; `stratum cold add` adds one"
    return str(
        known.get("what")
        or f"no remote of the cold tier answers ({name!r} is left alone for a while); see `stratum cold check`"
    )


def hottest(reader: InodeReader, extents: list[int]) -> Tier:
    """The hottest tier that extents have bytes in."""
    found = Tier.COLD
    for number in extents:
        row, _ = reader.extent(number)
        found = min(found, packs.tier_of(reader, number, row))
    return found if extents else Tier.HOT


def _in_order(volume: Volume, extents: list[int]) -> tuple[ReadAhead, dict[int, int]]:
    """Reading ahead through extents as if they were a file, and where each begins in it."""
    slices: list[Slice] = []
    at = 0
    with volume.snapshot() as reader:
        for number in extents:
            known = reader.get(key_u64(b"X", number)) is not None
            length = reader.extent(number)[0].length if known else 0
            slices.append(Slice(at, length, number, 0))
            at += length
    return ReadAhead(volume, slices, at), {piece.extent: piece.file_offset for piece in slices}


def _is_in(reader: InodeReader, extent: int, tier: Tier) -> bool:
    row, _ = reader.extent(extent)
    return packs.tier_of(reader, extent, row) == tier


def _take_out(tx: MetadataTransaction, number: int, version: int) -> None:
    """The content of an inline file becomes an extent whose bytes still lie in the metadata store. The file does not change."""
    try:
        inode = tx.inode(number)
    except Gone:
        return
    if not inode.flags & Inode.INLINE or inode.version != version:
        return
    data = content.get_inline(tx, number)
    content.drop_inline(tx, inode)
    tx.dirty(inode)
    extent = tx.new_id()
    tx.add_stored_extent(extent, len(data))
    tx.put(key_u64(b"E", extent), checksum(data) + data)
    tx.put_slice(number, Slice(0, len(data), extent, 0), moved=True)
    if evidence.get(tx, number) is None:
        used_s = max(inode.mtime_ns, 0) // 1_000_000_000
        evidence.put(tx, number, AccessRow(Tier.HOT, used_s, used_s, last_write_s=used_s), None)
