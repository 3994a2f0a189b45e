"""Reading extents from the warm and the cold tier.

Every byte is compared with the extent's own checksums, whatever the tier said of it; a copy that turns out wrong is healed
from another one later, and told to the repair queue now.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stratum import metrics, packs, warm
from stratum.blocks import BLOCK_BYTES, blocks_match
from stratum.deadlines import Deadline
from stratum.descriptors import WouldRecall, WouldWait
from stratum.errors import DataDamaged, StratumError
from stratum.log import get_logger
from stratum.tier_rows import Tier

if TYPE_CHECKING:
    from collections.abc import Callable

    from stratum.schema import ExtentRow
    from stratum.tier_rows import CopyRow, PackRow
    from stratum.transaction import InodeReader, MetadataTransaction
    from stratum.volume import Volume

log = get_logger("copies")
Located = list[tuple[Tier, "CopyRow", "PackRow"]]
_NOTED_MAX = 4096
PATIENCE_S = 0.02
"""What a reader who has begun waits for the whole of a cell: a piece costs him three changes of thread, whatever its length."""


class Noted:
    """Packs this process has reported damage of: each is reported once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._packs: set[int] = set()

    def first_time(self, number: int) -> bool:
        with self._lock:
            if number in self._packs or len(self._packs) >= _NOTED_MAX:
                return False
            self._packs.add(number)
            return True

    def forget(self, number: int) -> None:
        with self._lock:
            self._packs.discard(number)


def locate(reader: InodeReader, extent: int) -> Located:
    """The copies of an extent, hottest first."""
    found: Located = []
    for tier, place in packs.copies(reader, extent).items():
        row = packs.get(reader, place.pack)
        if row is not None:
            found.append((tier, place, row))
    return found


@dataclass(slots=True, frozen=True)
class _Wanted:
    """Whole blocks [first, last) of an extent."""

    extent: int
    checksums: bytes
    first: int
    last: int

    def matches(self, data: bytes) -> bool:
        return blocks_match(data, self.checksums, self.first)


def to_its_end(place: CopyRow, _: int) -> int:
    """Where a reader goes on to who wants one extent."""
    return place.offset + place.length


def read_whole(volume: Volume, number: int, row: ExtentRow, checksums: bytes, located: Located) -> bytes:
    """All of an extent from its copies, however long that takes. Raises what `read` does."""
    pieces: list[bytes | memoryview] = []
    at = 0
    while at < row.length:
        piece = read(
            volume, number, row, checksums, located, at, row.length, may_wait=True, may_recall=True,
            goes_to=to_its_end, deadline=Deadline(volume.config.cold_recall_s_max), patience_s=PATIENCE_S,
        )  # fmt: skip
        pieces.append(piece)
        at += len(piece)
    return b"".join(pieces)


def read(
    volume: Volume,
    number: int,
    row: ExtentRow,
    checksums: bytes,
    located: Located,
    start: int,
    stop: int,
    *,
    may_wait: bool,
    may_recall: bool,
    goes_to: Callable[[CopyRow, int], int],
    deadline: Deadline,
    patience_s: float,
) -> bytes | memoryview:
    """Bytes of an extent from `start` on: all up to `stop`, or of a cold one the first of them.

    `goes_to` says of a place and where in its pack the reader is, how far he is likely to go on; he waits `patience_s` for more than
    a block.

    Raises `DataDamaged`, `TierUnavailable` or `NeedsRestore` if no copy has them, `WouldWait` or `WouldRecall` if they may not
    be waited for.
    """
    problems: list[StratumError] = []
    first = start // BLOCK_BYTES * BLOCK_BYTES
    last = min(-(-stop // BLOCK_BYTES) * BLOCK_BYTES, row.length)
    wanted = _Wanted(number, checksums, first, last)
    for tier, place, pack in located:
        try:
            if tier == Tier.WARM:
                data = _read_warm(volume, wanted, place, pack, may_wait=may_wait)
            elif not may_recall or not may_wait:
                raise WouldRecall
            else:
                goal = goes_to(place, place.offset + start)
                data = _read_cold(volume, wanted, place, pack, goal, deadline, patience_s)
        except StratumError as error:
            problems.append(error)
            continue
        end = min(stop, first + len(data))
        return data if (start, end) == (first, last) else memoryview(data)[start - first : end - first]
    if not problems:
        raise DataDamaged(f"extent {number:016x} (it has no copy)", "any tier")
    # A copy that may come back is the better news.
    raise next((error for error in problems if not isinstance(error, DataDamaged)), problems[0])


def _read_warm(volume: Volume, wanted: _Wanted, place: CopyRow, pack: PackRow, *, may_wait: bool) -> bytes:
    start, stop = place.offset + wanted.first, place.offset + wanted.last
    why = "a shard's bytes do not match"
    try:
        data = volume.warm.read(place.pack, pack, start, stop, may_wait=may_wait)
        if len(data) == stop - start and wanted.matches(data):
            return data
    except OSError as error:
        why = str(error)
    if not may_wait:
        raise WouldWait
    data, bad = volume.warm.recover(place.pack, pack, start, stop, f"extent {wanted.extent:016x}")
    if not wanted.matches(data):
        raise DataDamaged(f"extent {wanted.extent:016x}", f"pack {place.pack:016x}, whose shards agree")
    report_damage(volume, place.pack, volume.warm.describe(place.pack, pack, bad) or why)
    return data


def report_damage(volume: Volume, pack: int, why: str) -> None:
    """Queue a pack for repair; a read does not wait for that."""
    metrics.DAMAGE.add("read", "healing")
    if volume.noted.first_time(pack):
        log.warning("read_repaired", pack=f"{pack:016x}", why=why)

        def note(tx: MetadataTransaction) -> None:
            if packs.get(tx, pack) is not None:
                warm.note_damage(tx, pack, why)

        volume.mutate_later(note, lambda _: None, frees=True)


def _read_cold(
    volume: Volume, wanted: _Wanted, place: CopyRow, pack: PackRow, goes_to: int, deadline: Deadline, patience_s: float
) -> bytes:
    """At least the first block, and what else has arrived, in whole blocks. `goes_to`: in the pack."""
    first, last = wanted.first, wanted.last
    least = min(first + BLOCK_BYTES, last)
    damaged = DataDamaged(f"extent {wanted.extent:016x}", f"remote {pack.remote!r}, {pack.key}")
    for attempt in (1, 2):
        try:
            data = volume.cold.read(
                place.pack, pack, place.offset + first, place.offset + least, place.offset + last,
                max(goes_to, place.offset + last), deadline, patience_s,
            )  # fmt: skip
        except DataDamaged as error:
            damaged = error  # perhaps on its way only
            if deadline.passed:
                break
            continue
        if len(data) < last - first:
            data = data[: max(len(data) // BLOCK_BYTES * BLOCK_BYTES, least - first)]
        if len(data) >= least - first and wanted.matches(data):
            return data
        volume.cold.cache.drop(place.pack)
        log.warning("recalled_bytes_wrong", pack=f"{place.pack:016x}", remote=pack.remote, attempt=attempt)
    raise damaged
