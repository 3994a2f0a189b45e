"""Whether what lies on the disk of a metadata store fits together, and if not, which of it can be kept.

After a crash the store goes back to its checkpoint and the journal is applied again; a torn record at the journal's end is what
a crash leaves. What cannot come from a crash is damage: bytes that were whole and are not any more. A damaged store is never
mended on opening it; `stratum fsck --repair` asks here what to keep (`best`), and says what is lost.

Two things can be kept: the checkpoint with the records up to the first damaged one, a state that once was committed whatever
else happened; or the store as it stands, which holds every commit if the machine has not stopped since.
"""

from __future__ import annotations

import enum
import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stratum.errors import StoreDamaged
from stratum.kv.lmdb_access import LINEAGE, LINEAGE_AT, PAGE_BYTES

if TYPE_CHECKING:
    from pathlib import Path

    from stratum.kv.journal import Journal, Mark, Marks

TRANSACTION_AT = 144
"""Of a meta page: page header 16, magic to map size 24, two tables 96, last page 8 (LMDB 0.9, `struct MDB_meta`)."""
HEAD_USED_BYTES = 152
FLIPPED_BYTES_MAX = 8
"""Two names or heads that differ in no more are one and the same, of which one was damaged."""
READ_S_MAX = 600.0


class Keep(enum.Enum):
    RECORDS = "the checkpoint and the records that follow it"
    STORE = "the store as it stands"


@dataclass(slots=True, frozen=True)
class Condition:
    """`stored` is the newest transaction that the store knows of, `newest` the last one of the whole records behind the mark, which end
    at byte `end` of the journal; `later` are whole records behind that place, as (transaction, byte).
    """

    folder: Path
    mark: Mark | None
    stored: int
    newest: int
    end: int
    later: tuple[tuple[int, int], ...]
    file: str = ""
    at: int = 0
    fault: str = ""
    """What is damaged: a file, a byte of it, and a sentence; empty if nothing is."""

    @property
    def error(self) -> StoreDamaged:
        volume = shlex.quote(str(self.folder.parent))
        return StoreDamaged(
            f"the metadata store of {self.folder.parent} is damaged: {self.file} at byte {self.at}: {self.fault}; "
            f"`stratum fsck {volume} --repair` keeps all that is whole and lists what is lost, "
            f"`stratum meta restore {volume} BACKUP` brings back a backup",
            file=self.file,
            at=self.at,
        )


@dataclass(slots=True, frozen=True)
class Standing:
    """What the store says when it is read as it stands, every page of it: the newest transaction, and where it thinks that its journal ends."""

    transaction: int
    rows: int
    epoch: int
    end: int
    records: int
    agrees: bool
    """With the whole records behind the damaged one."""


def read_standing(folder: Path) -> Standing | None:
    """None if it cannot be read. In a process of its own: LMDB does not survive every damaged page."""
    words = [sys.executable, "-P", "-m", "stratum.kv.as_it_stands", str(folder)]
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=READ_S_MAX, check=False)
        return Standing(**json.loads(done.stdout)) if done.returncode == 0 else None
    except (OSError, ValueError, TypeError, subprocess.TimeoutExpired):
        return None


def differing(first: bytes, second: bytes) -> int:
    return sum(a != b for a, b in zip(first, second, strict=True))


def _meta_pages(store: Path) -> list[bytes]:
    with store.open("rb") as file:
        return [os.pread(file.fileno(), HEAD_USED_BYTES, number * PAGE_BYTES) for number in (0, 1)]


def _name_in(store: Path) -> tuple[bytes, bytes]:
    """What stands where the lineage of a store's file does: what it begins with, and the name."""
    with store.open("rb") as file:
        raw = os.pread(file.fileno(), 32, LINEAGE_AT)
    return raw[:16], raw[16:]


def has_damaged_name(store: Path) -> bool:
    """Whether something that is no lineage stands in its place: a file that never had one has zeros there."""
    if not store.exists():
        return False
    magic, name = _name_in(store)
    return magic != LINEAGE and any(magic + name)


def examine(folder: Path, marks: Marks, journal: Journal) -> Condition:
    """Called by who is alone, inside the gate, for a store that has a lineage or had one."""
    store = folder / "data.mdb"
    mark = marks.newest()
    stored = max(int.from_bytes(page[TRANSACTION_AT:], "little") for page in _meta_pages(store))
    if mark is None:
        at = (marks.torn() or [0])[0]
        return Condition(
            folder, None, stored, 0, 0, (), "checkpoint", at, "has lost its checkpoint: no mark in it holds"
        )
    newest, end = mark.transaction, 0
    for transaction, following, _ in journal.records(mark):
        newest, end = transaction, following
    later = tuple((number, at) for number, at, _ in journal.whole_from(mark, end, newest))
    file, at, fault = _fault(folder, marks, mark, stored, newest, end, later)
    return Condition(folder, mark, stored, newest, end, later, file, at, fault)


def _fault(
    folder: Path,
    marks: Marks,
    mark: Mark,
    stored: int,
    newest: int,
    end: int,
    later: tuple[tuple[int, int], ...],
) -> tuple[str, int, str]:
    magic, name = _name_in(folder / "data.mdb")
    if magic != LINEAGE or name != mark.lineage:
        if differing(name, mark.lineage) > FLIPPED_BYTES_MAX:
            return "checkpoint", 0, "has the checkpoint of another one: it names another data.mdb"
        return "data.mdb", LINEAGE_AT, "the name of the file does not hold"
    if stored < mark.transaction:
        return "data.mdb", TRANSACTION_AT, f"is older than its checkpoint: {stored}, not {mark.transaction}"
    if later:
        behind = f"transactions {later[0][0]} to {later[-1][0]}" if len(later) > 1 else f"transaction {later[0][0]}"
        return (
            "journal",
            end,
            f"the record of transaction {newest + 1} does not hold, and {len(later)} whole ones follow it ({behind})",
        )
    if stored <= newest:
        return "", 0, ""
    standing = read_standing(folder)
    if standing is not None and standing.epoch > mark.epoch:
        return "checkpoint", (marks.torn() or [0])[0], f"the mark of epoch {standing.epoch} does not hold"
    if standing is not None and (standing.epoch, standing.end) in {(mark.epoch, end), (standing.epoch, 0)}:
        return (
            "data.mdb",
            TRANSACTION_AT,
            f"has commits that its journal does not, {newest + 1} to {stored}: a program that knows no journal wrote to it",
        )
    return (
        "journal",
        end,
        f"the record of transaction {newest + 1} does not hold, and the store has transaction {stored}",
    )


def best(condition: Condition, standing: Standing | None, *, undisturbed: bool) -> tuple[Keep | None, bool]:
    """(what to keep, whether it is certain that it is all there was). None: nothing can be kept.

    `undisturbed`: the machine has not stopped since the store was last opened, and no disk has refused a flush.
    """
    mark = condition.mark
    if mark is None or not _is_of(condition, mark) or (standing is not None and standing.epoch > mark.epoch):
        return (Keep.STORE if standing is not None else None), undisturbed and standing is not None
    known = max([condition.newest, *(number for number, _ in condition.later)])
    ended = standing is None or (standing.epoch, standing.end) == (mark.epoch, condition.end)
    if not condition.later and (condition.stored <= condition.newest or (ended and standing is not None)):
        return Keep.RECORDS, True
    whole = (
        standing is not None
        and undisturbed
        and standing.agrees
        and standing.epoch == mark.epoch
        and standing.transaction == condition.stored == mark.transaction + standing.records
        and standing.transaction >= known
    )
    return (Keep.STORE, True) if whole else (Keep.RECORDS, False)


def _is_of(condition: Condition, mark: Mark) -> bool:
    """Whether the mark is of this store's file, up to a few flipped bits."""
    store = condition.folder / "data.mdb"
    _, name = _name_in(store)
    head = _meta_pages(store)[mark.transaction % 2]
    return differing(name, mark.lineage) <= FLIPPED_BYTES_MAX and (
        condition.stored >= mark.transaction or differing(head, mark.head[:HEAD_USED_BYTES]) <= FLIPPED_BYTES_MAX
    )
