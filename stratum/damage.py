"""Damage that was found and is not healed: remembered until the bytes are right again, overwritten or deleted.

Reads, checks, moves, the scrub and fsck tell of it; `stratum health` names the objects. The tiering daemon looks at each row again and
again, with pauses that grow (tiering/damage_check.py): it heals what has another copy, and removes the rows of what is right or gone.

Rows: z kind, number -> JSON DamageRow. `kind` is a `Thing`; the number is of an extent, a pack or an inode.

Invariants
* One row a thing, however often it is found, and at most ROWS_MAX: a disk that dies does not fill the store.
* Whoever tells waits for nothing, and fails at nothing.
"""

from __future__ import annotations

import enum
import threading
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from stratum import metrics, packs
from stratum.errors import StratumError
from stratum.log import get_logger
from stratum.schema import key_u64, pack_json, unpack_json, unpack_u64
from stratum.tier_rows import VALID

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stratum.errors import DataDamaged
    from stratum.transaction import InodeReader, MetadataTransaction
    from stratum.volume import Volume

log = get_logger("damage")
ROWS_MAX = 1000
FULL_S = 60.0
"""How long a process tells nothing more once it saw the table full."""
TELLING_MAX = 256


class Thing(enum.StrEnum):
    """What is damaged. The value is stored."""

    EXTENT = "x"
    PACK = "p"
    """All bytes of it from `first` on, as far as nothing else has them."""
    CONTENT = "n"
    """The content of a small file, in the metadata store."""


@dataclass(slots=True)
class DamageRow:
    """Bytes [first, last) are damaged; last 0 is the end. `heals`: another copy is good, and takes their place soon."""

    what: str
    by: str
    found_s: int
    first: int = 0
    last: int = 0
    heals: bool = False
    attempts: int = 0
    tried_s: float = 0.0

    def encode(self) -> bytes:
        return pack_json(asdict(self))

    @classmethod
    def decode(cls, raw: bytes) -> DamageRow:
        return cls(**unpack_json(raw))


def row_key(thing: Thing, number: int) -> bytes:
    return key_u64(b"z" + thing.value.encode(), number)


def scan(reader: InodeReader) -> Iterator[tuple[Thing, int, DamageRow]]:
    for key, raw in reader.first_rows(b"z", b"{", ROWS_MAX):
        yield Thing(key[1:2].decode()), unpack_u64(key[2:])[0], DamageRow.decode(raw)


class Damages:
    """What a process tells."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._lock = threading.Lock()
        self._telling: set[bytes] = set()
        self._full_until_s = 0.0

    def found(
        self, thing: Thing, number: int, what: str, *, by: str, first: int = 0, last: int = 0, heals: bool = False
    ) -> None:
        """Remember damage that is not healed yet. `by`: one of `metrics.FOUND_BY`."""
        metrics.DAMAGE.add(by, "healing" if heals else "unhealed")
        key = row_key(thing, number)
        with self._lock:
            full = time.monotonic() < self._full_until_s or len(self._telling) >= TELLING_MAX
            if full or key in self._telling:
                return
            self._telling.add(key)
        row = DamageRow(what, by, int(time.time()), first, last, heals)
        try:
            with self._volume.snapshot() as reader:
                if _is_told(reader, key, row):
                    self._told(key)
                    return
            log.error("damage_found", thing=thing.name.lower(), number=f"{number:016x}", by=by, heals=heals, what=what)
            self._volume.mutate_later(self._noting(key, row), lambda _: self._told(key), frees=True)
        except StratumError as error:  # the volume ends; the next process finds it again
            log.warning("damage_not_noted", number=f"{number:016x}", error=error.message)
            self._told(key)

    def read(self, extent: int, start: int, stop: int, error: DataDamaged, *, other_places: bool) -> None:
        """A read of bytes of an extent found no good copy. `other_places`: they lie, or lay, in more than the pack that `error` is about."""
        if error.pack and not other_places:
            self.found(Thing.PACK, error.pack, error.message, by="read", first=error.good_bytes)
        else:
            self.found(Thing.EXTENT, extent, error.message, by="read", first=start, last=stop)

    def _told(self, key: bytes) -> None:
        with self._lock:
            self._telling.discard(key)

    def _noting(self, key: bytes, row: DamageRow) -> Callable[[MetadataTransaction], None]:
        def note(tx: MetadataTransaction) -> None:
            if _is_told(tx, key, row):
                return
            if tx.get(key) is None and len(tx.first_rows(b"z", b"{", ROWS_MAX)) == ROWS_MAX:
                self._full_until_s = time.monotonic() + FULL_S
                return
            tx.put(key, row.encode())

        return note


def _is_told(reader: InodeReader, key: bytes, row: DamageRow) -> bool:
    """A row that says that it heals is replaced by one that says that nothing does."""
    raw = reader.get(key)
    return raw is not None and (row.heals or not DamageRow.decode(raw).heals)


# -- what is still so ---------------------------------------------------------------------------------------------------


def lost_extents(reader: InodeReader, number: int, good_bytes: int = 0) -> Iterator[int]:
    """What a pack holds behind its first `good_bytes`, and nothing else does."""
    pack = packs.get(reader, number)
    if pack is None or pack.state != VALID:
        return
    for extent, place in packs.members(reader, number):
        if place.offset + place.length > good_bytes and reader.get(key_u64(b"X", extent)) is not None:
            row, _ = reader.extent(extent)
            if row.references and not packs.is_hot(row) and len(packs.copies(reader, extent)) == 1:
                yield extent


def of_extent(reader: InodeReader, extent: int, in_packs: list[int]) -> str:
    """What is wrong with an extent, or with the packs that it lies in; nothing is "". For `stratum explain`."""
    for key in (row_key(Thing.EXTENT, extent), *(row_key(Thing.PACK, number) for number in in_packs)):
        raw = reader.get(key)
        if raw is not None and not (row := DamageRow.decode(raw)).heals:
            return row.what
    return ""
