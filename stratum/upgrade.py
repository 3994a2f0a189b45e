"""Bringing a volume of an older format to that of this program, in place.

Invariants
* Nothing is changed before a verified backup of it lies where the operator said, and never while a process has the volume open.
* The first change is the format's number, to one that no program opens; the last is the new one. So neither an older nor a newer
  program ever sees a volume half-way.
* A step goes through its rows in small transactions, each of which notes how far it is (row `gupgrade`): interrupted anywhere, the
  next `upgrade` goes on, without another backup.
"""

from __future__ import annotations

import uuid
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stratum import backup, config, names
from stratum.errors import Busy, InvalidArgument, VolumeInvalid
from stratum.kv.lmdb_access import LmdbCopy, lineage_of
from stratum.log import get_logger
from stratum.schema import FORMAT_VERSION, UPGRADING, pack_json, pack_u64, unpack_json, unpack_u64

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from stratum.kv.lmdb_access import LmdbTransaction
    from stratum.kv.lmdb_store import LmdbStore

log = get_logger("upgrade")
ROWS_AT_ONCE = 1000


@dataclass(slots=True)
class Upgraded:
    """`backup` is None if the volume was of the newest format already, or if an interrupted upgrade was gone on with."""

    before: int
    after: int
    backup: Path | None


def _from_1(tx: LmdbTransaction, cursor: bytes) -> bytes | None:
    """Buckets say whether reads of them are audited, and the volume has a name."""
    if tx.get(b"ginstance") is None:
        tx.put(b"ginstance", pack_json({"id": uuid.uuid4().hex}))
    rows = tx.first_rows(cursor or b"B", b"C", ROWS_AT_ONCE)
    for key, raw in rows:
        tx.put(key, pack_json({"audit_reads": False, **unpack_json(raw)}))
    return rows[-1][0] + b"\0" if len(rows) == ROWS_AT_ONCE else None


def _from_2(_tx: LmdbTransaction, _cursor: bytes) -> bytes | None:
    """The store has a journal before it, which opening it has begun. No row changes."""
    return None


def _from_3(tx: LmdbTransaction, cursor: bytes) -> bytes | None:
    """Inodes tell their names."""
    return names.index_page(tx, cursor, ROWS_AT_ONCE)


def _from_4(_tx: LmdbTransaction, _cursor: bytes) -> bytes | None:
    """Clones may be filled after they were made. No row changes."""
    return None


STEPS: dict[int, Callable[[LmdbTransaction, bytes], bytes | None]] = {1: _from_1, 2: _from_2, 3: _from_3, 4: _from_4}
"""By the format they begin with. A step is called with where the last call ended, and returns where it ended, or None at the end."""


def upgrade(root: Path, backup_target: Path | None) -> Upgraded:
    """Raises `VolumeInvalid` for a newer volume, `Busy` for an open one, and what making a backup raises."""
    settings = config.load(root)
    meta = root / "meta"
    if not (meta / "data.mdb").exists():
        raise VolumeInvalid(f"{root} has no metadata store; `stratum meta restore` brings it back")
    backup.refuse_if_open(meta)
    # Only read until there is a backup: an older program could still want the volume, and it knows no journal.
    reading = (
        closing(LmdbCopy(str(meta))) if lineage_of(meta / "data.mdb") is None else backup.opened_store(meta, settings)
    )
    with reading as before_store:
        version = _version(before_store)
        if version & ~UPGRADING > FORMAT_VERSION:
            raise VolumeInvalid(
                f"{root} has format {version}, which is newer than {FORMAT_VERSION}; use the version that made it"
            )
        if version == FORMAT_VERSION:
            return Upgraded(version, version, None)
        made = None
        before = version
        if version & UPGRADING:
            before = (version & ~UPGRADING) - 1
        else:
            if version not in STEPS:
                raise VolumeInvalid(f"{root} has format {version}, which no program has ever written")
            if backup_target is None:
                raise InvalidArgument("an upgrade begins with a backup; say where it is to lie, with --backup DIR")
            made = backup.save(backup.Source(root, before_store, settings, _instance(before_store)), backup_target).path
    with backup.opened_store(meta, settings) as store:
        if made is not None:
            _put_format(store, UPGRADING | version + 1)
            try:
                backup.refuse_if_open(meta)  # who opened it meanwhile keeps it
            except Busy:
                _put_format(store, version)
                raise
        after = _go_on(store)
    log.info("upgraded", volume=str(root), before=before, after=after)
    return Upgraded(before, after, made)


def _version(store: LmdbCopy | LmdbStore) -> int:
    with store.snapshot() as snapshot:
        return int(unpack_u64(snapshot.get(b"Cformat") or bytes(8))[0])


def _instance(store: LmdbCopy | LmdbStore) -> str:
    with store.snapshot() as snapshot:
        raw = snapshot.get(b"ginstance")
    return str(unpack_json(raw)["id"]) if raw is not None else "unnamed"


def _put_format(store: LmdbStore, version: int) -> None:
    with store.transact() as tx:
        tx.put(b"Cformat", pack_u64(version))


def _go_on(store: LmdbStore) -> int:
    """Carry out what is left of the steps; the format at the end."""
    while True:
        version = _version(store) & ~UPGRADING
        step = STEPS[version - 1]
        while True:
            with store.transact() as tx:
                raw = tx.get(b"gupgrade")
                cursor = bytes.fromhex(unpack_json(raw)["cursor"]) if raw is not None else b""
                following = step(tx, cursor)
                if following is not None:
                    tx.put(b"gupgrade", pack_json({"cursor": following.hex()}))
                    continue
                tx.delete(b"gupgrade")
                done = version == FORMAT_VERSION
                tx.put(b"Cformat", pack_u64(version if done else UPGRADING | version + 1))
            break
        if done:
            return version
