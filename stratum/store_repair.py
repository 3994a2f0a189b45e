"""What `fsck --repair` does for a metadata store that does not open: it keeps all that is whole, and says what is lost.

What was there is copied aside first. Which part is kept, `stratum/kv/condition.py` decides; what is kept is a state that once was committed.
Numbers that lost commits may have given out are skipped, as after a restored backup.
"""

from __future__ import annotations

import itertools
import os
import shutil
import struct
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stratum import config, sessions
from stratum.errors import Busy, NoSpace, StoreDamaged, VolumeInvalid
from stratum.kv import condition
from stratum.kv.condition import Keep
from stratum.kv.contract import RESERVED
from stratum.kv.journal import Journal, Marks, rows_of
from stratum.kv.lmdb_access import lineage_of
from stratum.kv.lmdb_store import LmdbStore
from stratum.schema import pack_json, pack_u64, unpack_json, unpack_u64
from stratum.segments import fsync_folder

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from stratum.kv.condition import Condition

FILES = ("data.mdb", "journal", "checkpoint")
ROWS_NAMED_MAX = 20
"""Of one transaction that is lost."""
TRANSACTIONS_NAMED_MAX = 100
_TABLES = {
    b"A": "an access key", b"B": "a bucket", b"G": "a data file", b"I": "the attributes of inode", b"M": "the S3 metadata of inode",
    b"N": "the content of inode", b"P": "an uploaded part", b"R": "a user", b"S": "the bytes of inode", b"U": "a multipart upload",
    b"X": "extent", b"Y": "an extended attribute of inode", b"Z": "session", b"p": "pack",
}  # fmt: skip


@dataclass(slots=True)
class Repaired:
    """`lost`: sentences, one for each transaction that was committed and is not in what was kept."""

    fault: str
    kept: Keep
    certain: bool
    aside: Path
    lost: list[str] = field(default_factory=list)

    @property
    def what(self) -> str:
        if self.certain and not self.lost:
            return f"kept {self.kept.value}: no commit is lost"
        if self.kept is Keep.STORE:
            return f"kept {self.kept.value}: whether commits are missing, nothing can prove; see what fsck finds, or restore a backup"
        return f"kept {self.kept.value}: {len(self.lost)} transactions are lost"


@contextmanager
def _files(meta: Path) -> Iterator[tuple[Marks, Journal]]:
    """Both, inside the gate. Raises `Busy` if a process has the store open."""
    with closing(Journal(meta / "journal")) as journal, closing(Marks(meta / "checkpoint")) as marks, marks.gate():
        if not journal.take():
            raise Busy(f"a process has {meta.parent} open; stop it first")
        yield marks, journal


def examine(root: Path) -> Condition | None:
    """None for a store that opens as it is, or that a process has open. Raises `VolumeInvalid` if there is none, `ConfigInvalid` if it is no volume."""
    config.load(root)
    meta = root / "meta"
    store = meta / "data.mdb"
    if not store.exists():
        raise VolumeInvalid(f"{root} has no metadata store; restore meta/ from a backup")
    if lineage_of(store) is None and not condition.has_damaged_name(store):
        return None
    try:
        with _files(meta) as (marks, journal):
            found = condition.examine(meta, marks, journal)
    except Busy:
        return None
    return found if found.fault else None


def repair(root: Path) -> Repaired | None:
    """None if nothing was to be done. Raises `StoreDamaged` if nothing can be kept, `NoSpace` if what is there cannot be copied aside."""
    found = examine(root)
    if found is None:
        return None
    meta = found.folder
    standing = condition.read_standing(meta)
    with _files(meta) as (marks, journal):
        undisturbed = marks.same_boot and not marks.failed
        keep, certain = condition.best(found, standing, undisturbed=undisturbed)
        if keep is None:
            raise StoreDamaged(
                f"{found.file} of {meta} is damaged at byte {found.at}: {found.fault}, and the store does not read as it stands; "
                f"`stratum meta restore` brings back a backup"
            )
        lost = [] if certain or keep is Keep.STORE else list(_lost(found, journal))
        aside = _copy_aside(meta)
    fault = f"{found.file} at byte {found.at}: {found.fault}"
    settings = config.load(root)
    with closing(
        LmdbStore(
            str(meta), map_bytes=settings.metadata_map_bytes, readers_max=settings.metadata_readers_max, keep=keep
        )
    ) as store:
        if not certain:
            _skip_numbers(root, settings, store)
    return Repaired(fault, keep, certain, aside, lost)


def _copy_aside(meta: Path) -> Path:
    stamp = time.strftime("damaged-%Y%m%d-%H%M%S", time.gmtime())
    names = (meta / (f"{stamp}-{number}" if number else stamp) for number in itertools.count())
    aside = next(name for name in names if not name.exists())
    needed = sum((meta / name).stat().st_size for name in FILES)
    disk = os.statvfs(meta)
    free = disk.f_bavail * disk.f_frsize
    if free < needed:
        raise NoSpace(f"{needed} bytes are needed to keep a copy of what is damaged in {aside}, and {free} are free")
    aside.mkdir(mode=0o700)
    for name in FILES:
        shutil.copyfile(meta / name, aside / name)
        (aside / name).chmod(0o600)
        with (aside / name).open("rb") as file:
            os.fsync(file.fileno())
    for folder in (aside, meta):
        fsync_folder(folder)
    return aside


def _skip_numbers(root: Path, settings: config.Config, store: LmdbStore) -> None:
    """Sessions of lost commits may have given out numbers, and left data files under them."""
    newest = [int(file.name) for file in (root / "meta" / "sessions").iterdir() if file.name.isdecimal()]
    for folder in settings.volume_hot:
        if (root / folder).is_dir():
            newest += [int(entry.name, 16) for entry in (root / folder).iterdir() if sessions.is_folder(entry.name)]
    with store.transact() as tx:
        known = unpack_u64(tx.get(b"Csession") or bytes(8))[0]
        tx.put(b"Csession", pack_u64(max(known, *newest) + sessions.SKIPPED))
        before: dict[str, Any] = unpack_json(tx.get(b"gtimeline") or b"{}")
        now = {"restored_ns": time.time_ns(), "before": before.get("restored_ns", 0), "transaction": tx.id}
        tx.put(b"gtimeline", pack_json(now))


# -- what is lost -------------------------------------------------------------------------------------------------------


def _lost(found: Condition, journal: Journal) -> Iterator[str]:
    assert found.mark is not None, "without a mark no record is known"
    later = {number: body for number, _, body in journal.whole_from(found.mark, found.end, found.newest)}
    damaged = journal.body_as_it_reads(found.end)
    last = max([found.newest + 1, *later])
    if found.stored - found.newest <= TRANSACTIONS_NAMED_MAX * 100:  # else the number itself is damaged
        last = max(last, found.stored)
    for number in range(found.newest + 1, last + 1):
        if number in later:
            yield f"transaction {number}: {_named(_keys(later[number]))}"
        elif number == found.newest + 1:
            keys = _keys(damaged)
            yield f"transaction {number}, whose record is damaged; it reads as: {_named(keys) if keys else 'nothing'}"
        else:
            yield f"transaction {number}: its record is damaged"


def _keys(body: bytes) -> list[bytes]:
    found: list[bytes] = []
    try:
        found.extend(key for key, _ in rows_of(body) if key)
    except struct.error:
        pass
    return found


def _named(keys: Iterable[bytes]) -> str:
    names = list(dict.fromkeys(name for key in keys if (name := name_of(key))))
    more = f" and {len(names) - ROWS_NAMED_MAX} more" if len(names) > ROWS_NAMED_MAX else ""
    return (", ".join(names[:ROWS_NAMED_MAX]) or "bookkeeping") + more


def name_of(key: bytes) -> str:
    """What a row is about, for a person; empty for bookkeeping."""
    table, rest = key[:1], key[1:]
    if key >= RESERVED:
        return ""
    if table == b"D" and len(rest) > 8:
        return f"the name {rest[8:].decode('utf-8', 'backslashreplace')!r} in directory {unpack_u64(rest[:8])[0]:#x}"
    if table in _TABLES:
        if table in b"ABRU":
            return f"{_TABLES[table]} {rest.decode('utf-8', 'backslashreplace')!r}"
        return f"{_TABLES[table]} {unpack_u64(rest[:8])[0]:#x}" if len(rest) >= 8 else ""
    return ""
