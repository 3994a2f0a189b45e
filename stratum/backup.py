"""Backups of the metadata. `drill.py` proves one.

A backup is one file that only its owner may read, a gzip-compressed tar:

    manifest.json     {format, made_s, stratum, instance, transaction, rows, members: {name: {bytes, sha256}}}
    stratum.toml      the configuration
    seal.key          what the access keys are sealed with: so a backup is as secret as the volume
    data.mdb          a compacted copy of one committed state of the metadata store

The bytes of the tiers are not in it. Data files are only appended to, so what a backup refers to is intact or was freed since; which,
the checksums tell.

Invariants
* A backup gets its name when it is whole, was read back and lies on the disk.
* `restore` puts nothing in place that it has not verified, keeps the metadata that was there, and never works on an open volume.
* A restored volume gives out no number that the volume gave out after the backup: what was written since can never be taken
  for something new.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import os
import shutil
import tarfile
import tempfile
import time
import zlib
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from stratum import __version__, config, private, roles, sessions
from stratum.clocks import STAMP, by_stamp
from stratum.descriptors import is_owned
from stratum.errors import BackupDamaged, Busy, InvalidArgument, NotFound, StratumError, VolumeInvalid
from stratum.kv.lmdb_access import LmdbCopy
from stratum.kv.lmdb_store import LmdbStore
from stratum.log import get_logger
from stratum.schema import (
    FORMAT_VERSION,
    key_u64_u64,
    pack_json,
    pack_u64,
    prefix_range,
    split_u64_u64,
    unpack_json,
    unpack_u64,
)
from stratum.segments import fsync_folder
from stratum.sessions import SLOTS
from stratum.volume import Volume, hot_folders

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Watch = Callable[[int, int], None]

log = get_logger("backup")
FORMAT = 1
MANIFEST = "manifest.json"
MEMBERS = ("stratum.toml", "seal.key", "data.mdb")
SUFFIX = ".tar.gz"
COPY_BYTES = 1 << 20
GZIP_LEVEL = 1
"""200,000 small files, a store of 77 MB: 14.4 MB in 1.06 s; level 6: 13.7 MB in 1.62 s, copying and verifying included."""


@dataclass(slots=True)
class Backup:
    """`made_s` is the time of the state in it, `transaction` one that is in it. (The copy counts its own anew.)"""

    path: Path
    instance: str
    made_s: float
    rows: int
    transaction: int
    size: int
    members: dict[str, dict[str, Any]] = field(default_factory=dict)


# -- making one ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class Source:
    """What a backup is made of: an open volume, or one of another format that only its store can be opened of."""

    root: Path
    store: LmdbStore | LmdbCopy
    settings: config.Config
    instance: str


class _Watched:
    """Counts the bytes that a backup reads, for whoever waits: `watch(done, total)`."""

    def __init__(self, watch: Watch, total: int) -> None:
        self._watch = watch
        self._total = total
        self._done = 0

    def count(self, size: int) -> None:
        self._done += size
        self._watch(self._done, self._total)

    def reading(self, file: BinaryIO) -> _Reading:
        return _Reading(file, self)


class _Reading:
    """What tarfile reads a member from."""

    def __init__(self, file: BinaryIO, watched: _Watched) -> None:
        self._file = file
        self._watched = watched

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._watched.count(len(data))
        return data


def _unwatched(_done: int, _total: int) -> None:
    pass


def prepare_target(target: Path, *, create: bool) -> None:
    """Where a backup may be written: a folder, or a new file in one whose name says that it is a backup. Raises `InvalidArgument`."""
    if not target.name.endswith(SUFFIX):
        private.require_folder(target, "a backup's folder", create=create)
    else:
        private.require_folder(target.absolute().parent, "a backup's folder", create=create)


def make(volume: Volume, target: Path, *, keep: int = 0, watch: Watch = _unwatched) -> Backup:
    """Write a backup to a new file, or into a folder under a name of its own; there the newest `keep` of this volume stay.

    `watch(done, total)` is called with bytes: those written, then those read back.

    Raises `InvalidArgument` for a target that cannot be, `BackupDamaged` if what was written does not read back.
    """
    if keep and not target.is_dir():
        raise InvalidArgument(f"--keep wants a folder, and {target} is none")
    roles.refuse_backup(volume, target)
    made = save(Source(volume.root, cast("LmdbStore", volume.store), volume.config, volume.instance), target, watch)
    volume.mutate(
        lambda tx: tx.put(b"gbackup", pack_json({"at_s": round(made.made_s, 3), "path": str(made.path.absolute())})),
        frees=True,
    )
    if keep:
        for old in of_instance(target, volume.instance)[:-keep]:
            log.info("backup_removed", path=str(old))
            old.unlink()
    return made


def save(source: Source, target: Path, watch: Watch = _unwatched) -> Backup:
    """The same without noting it in the volume."""
    if target.is_dir():
        stamp = time.strftime(STAMP, time.gmtime())
        path = target / f"stratum-{source.instance[:12]}-{stamp}{SUFFIX}"
    else:
        path = target
    if path.exists():
        raise InvalidArgument(f"{path} exists; a backup never replaces another one")
    if not path.parent.is_dir():
        raise InvalidArgument(f"{path.parent} is no folder; make it first")
    if source.root.resolve() / "meta" in path.resolve().parents:
        raise InvalidArgument(f"{path} lies in the metadata that it is to save; choose another disk")
    partial = path.with_name(path.name + ".partial")
    try:
        with tempfile.TemporaryDirectory(prefix=".stratum-backup-", dir=path.parent) as scratch:
            made, watched = _write(source, Path(scratch), partial, watch)
        _read_back(partial, watched)
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)
    made.path = path
    return made


def _write(source: Source, scratch: Path, partial: Path, watch: Watch) -> tuple[Backup, _Watched]:
    made_s = time.time()
    (scratch / "stratum.toml").write_bytes((source.root / config.CONFIG_NAME).read_bytes())
    private.write(scratch / "seal.key", private.seal_key(source.root / "meta"))
    with source.store.snapshot() as snapshot:
        transaction = snapshot.id
    source.store.copy_to(str(scratch))
    rows = _walk(scratch)
    members = {name: _digest(scratch / name) for name in MEMBERS}
    watched = _Watched(watch, 2 * sum(member["bytes"] for member in members.values()))
    made = Backup(partial, source.instance, made_s, rows, transaction, 0, members)
    manifest = json.dumps(
        {"format": FORMAT, "made_s": made_s, "stratum": __version__, "instance": source.instance, "transaction": transaction, "rows": rows, "members": members}
    ).encode()  # fmt: skip
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as raw:  # noqa: PTH123  a descriptor: the mode counts from the first byte on
        with (
            gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=GZIP_LEVEL) as packed,
            tarfile.open(fileobj=packed, mode="w|") as archive,
        ):
            _add(archive, MANIFEST, io.BytesIO(manifest), len(manifest))
            for name in MEMBERS:
                with (scratch / name).open("rb") as file:
                    _add(archive, name, watched.reading(file), members[name]["bytes"])
        raw.flush()
        os.fsync(raw.fileno())
        made.size = raw.tell()
    return made, watched


def _add(archive: tarfile.TarFile, name: str, file: Any, size: int) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = size, 0o600, int(time.time())
    archive.addfile(entry, file)


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _walk(folder: Path) -> int:
    """How many rows a copied store has, after every page of it was read. Raises `BackupDamaged`."""
    try:
        with closing(LmdbCopy(str(folder))) as store, store.snapshot() as snapshot:
            if not 1 <= (version := unpack_u64(snapshot.get(b"Cformat") or bytes(8))[0]) <= FORMAT_VERSION:
                raise BackupDamaged(f"it has format {version}, and this program knows 1 to {FORMAT_VERSION}")
            return sum(1 for _ in snapshot.scan(b"\0", b"\xff"))
    except StratumError as error:
        raise BackupDamaged(f"the copy of the metadata does not read back: {error.message}") from error


@contextmanager
def opened_store(folder: Path, settings: config.Config) -> Iterator[LmdbStore]:
    """A store that no `Volume` is opened on: a copy, or one of another format."""
    store = LmdbStore(str(folder), map_bytes=settings.metadata_map_bytes, readers_max=settings.metadata_readers_max)
    with closing(store):
        yield store


def of_instance(folder: Path, instance: str) -> list[Path]:
    """The backups of a volume in a folder, the oldest first."""
    return by_stamp(folder.glob(f"stratum-{instance[:12]}-????????-??????{SUFFIX}"))


# -- reading one --------------------------------------------------------------------------------------------------------


def verify(path: Path, watch: Watch = _unwatched) -> Backup:
    """Read a whole backup and compare it with its manifest. Raises `BackupDamaged` or `NotFound`."""
    return _read_back(path, watch)


def _read_back(path: Path, watch: Watch | _Watched, folder: Path | None = None) -> Backup:
    """Into `folder`, if there is one."""
    with _opened(path) as (archive, told):
        total = sum(member["bytes"] for member in told.members.values())
        watched = watch if isinstance(watch, _Watched) else _Watched(watch, total)
        for name in MEMBERS:
            _copy_member(archive, name, told, folder / name if folder else None, watched)
        return told


@contextmanager
def _opened(path: Path) -> Iterator[tuple[tarfile.TarFile, Backup]]:
    try:
        with gzip.open(path) as unpacked, tarfile.open(fileobj=unpacked, mode="r|") as archive:
            first = archive.next()
            file = archive.extractfile(first) if first is not None and first.name == MANIFEST else None
            if file is None:
                raise BackupDamaged(f"{path} does not begin with {MANIFEST}: it is no backup of a volume")
            told = json.loads(file.read())
            if told["format"] != FORMAT:
                raise BackupDamaged(f"{path} has format {told['format']}; this program reads {FORMAT}")
            yield (
                archive,
                Backup(path, told["instance"], told["made_s"], told["rows"], told["transaction"], path.stat().st_size, told["members"]),
            )  # fmt: skip
            while unpacked.read(COPY_BYTES):  # the checksum of the whole stands behind its end
                pass
    except FileNotFoundError as error:
        raise NotFound(f"{path} does not exist; name a backup that `stratum meta backup` made") from error
    except (tarfile.TarError, zlib.error, EOFError, OSError, ValueError, KeyError, TypeError) as error:
        raise BackupDamaged(f"{path} is no backup, or is cut off or damaged ({error}); use another one") from error


def _copy_member(archive: tarfile.TarFile, name: str, told: Backup, target: Path | None, watched: _Watched) -> None:
    """The next member, which must be `name`. A name in the file never becomes a path."""
    entry = archive.next()
    file = archive.extractfile(entry) if entry is not None and entry.name == name else None
    if file is None:
        raise BackupDamaged(f"{told.path} lacks {name}; use another one")
    digest, size = hashlib.sha256(), 0
    fd = os.open(target or "/dev/null", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as out:  # noqa: PTH123  a descriptor: the mode counts from the first byte on
        while piece := file.read(COPY_BYTES):
            digest.update(piece)
            size += len(piece)
            watched.count(len(piece))
            out.write(piece)
        out.flush()
        if target is not None:
            os.fsync(fd)
    if {"bytes": size, "sha256": digest.hexdigest()} != told.members[name]:
        raise BackupDamaged(f"{told.path}: {name} does not match its checksum; use another one")


# -- putting one back ---------------------------------------------------------------------------------------------------


def restore(path: Path, root: Path, *, adopt: bool = False, watch: Watch = _unwatched) -> tuple[Backup, Path | None]:
    """Make the backup the metadata of the volume at `root`: (backup, where the metadata that was there lies now).

    A missing or empty folder becomes the volume, with the configuration of the backup; the configuration of an existing one
    stays. A new folder takes over data folders that hold something only if told to `adopt` them: two volumes on the same data would
    remove each other's. Raises `BackupDamaged`, `Busy` if a process has the volume open, `VolumeInvalid` if there is something else.
    """
    root = root.absolute()
    new = not root.exists() or not any(root.iterdir())
    if not new and not (root / config.CONFIG_NAME).exists():
        raise VolumeInvalid(f"{root} is neither a volume nor empty; nothing was changed")
    meta = root / "meta"
    refuse_if_open(meta)
    private.make_folder(root)
    staging = root / "meta.restoring"
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(mode=0o700)
    try:
        told = _read_back(path, watch, staging)
        text = ((staging if new else root) / config.CONFIG_NAME).read_text()
        settings = config.parse(text, config.CONFIG_NAME)
        if new and not adopt:
            _refuse_data(root, settings)
        _prepare(staging, settings, _newest_session(root, settings), told.transaction)
    except BaseException:
        shutil.rmtree(staging)
        raise
    (staging / config.CONFIG_NAME).unlink()
    replaced = _put_in_place(root, staging)
    if new:
        for folder in hot_folders(root, settings):
            private.make_folder(folder)
        # The configuration comes last: a folder without it is not a volume.
        private.write(root / config.CONFIG_NAME, text.encode())
        fsync_folder(root)
    return told, replaced


def _refuse_data(root: Path, settings: config.Config) -> None:
    for folder in hot_folders(root, settings):
        if folder.is_dir() and any(folder.iterdir()):
            raise InvalidArgument(
                f"the data folder {folder} of the backup holds data; if the volume it belongs to is gone for good, say --adopt-data"
            )


def _put_in_place(root: Path, staging: Path) -> Path | None:
    meta, replaced = root / "meta", None
    if meta.exists():
        stamp = time.strftime("meta.replaced-%Y%m%d-%H%M%S", time.gmtime())
        names = (root / (f"{stamp}-{number}" if number else stamp) for number in itertools.count())
        replaced = next(name for name in names if not name.exists())
        meta.rename(replaced)
        try:
            refuse_if_open(replaced)  # who opened it meanwhile keeps it
        except Busy:
            replaced.rename(meta)
            shutil.rmtree(staging)
            raise
    staging.rename(meta)
    fsync_folder(root)
    return replaced


def refuse_if_open(meta: Path) -> None:
    """Raises `Busy` while a process holds the lock of its session."""
    for file in (meta / "sessions").glob("*"):
        fd = os.open(file, os.O_RDWR | os.O_CLOEXEC)
        try:
            if is_owned(fd):
                raise Busy(f"a process has {meta.parent} open; stop it first")
        finally:
            os.close(fd)


def _newest_session(root: Path, settings: config.Config) -> int:
    """The newest session that left a trace in what is there now."""
    found = [0]
    for folder in hot_folders(root, settings):
        if folder.is_dir():
            found += [int(entry.name, 16) for entry in folder.iterdir() if sessions.is_folder(entry.name)]
    if (root / "meta" / "data.mdb").exists():
        try:
            with opened_store(root / "meta", settings) as store, store.snapshot() as snapshot:
                found.append(unpack_u64(snapshot.get(b"Csession") or bytes(8))[0])
        except StratumError as error:  # it may be what has to be replaced
            log.warning("metadata_unreadable", error=error.message)
    return max(found)


def _prepare(meta: Path, settings: config.Config, newest: int, transaction: int) -> None:
    """Make an extracted store a `meta` folder that nobody has open. It counts its transactions anew, from 1."""
    private.make_folder(meta / "sessions")
    private.write(meta / "slots", bytes(SLOTS * 32))
    _walk(meta)
    with opened_store(meta, settings) as store, store.transact() as tx:
        known = unpack_u64(tx.get(b"Csession") or bytes(8))[0]
        tx.put(b"Csession", pack_u64(max(known, newest) + sessions.SKIPPED))
        before = unpack_json(tx.get(b"gtimeline") or b"{}").get("restored_ns", 0)
        tx.put(b"gtimeline", pack_json({"restored_ns": time.time_ns(), "before": before, "transaction": transaction}))
        # Nobody reads a state from before these were freed; under their old numbers they would wait until the count is there again.
        for key, raw in list(tx.scan(*prefix_range(b"F"))):
            tx.delete(key)
            tx.put(key_u64_u64(b"F", 0, split_u64_u64(key)[1]), raw)
        # The mounts of then: recovery would detach whatever stands on their mountpoints now.
        for table in (b"T", b"L"):
            for key, _ in list(tx.scan(*prefix_range(table))):
                tx.delete(key)
    for name in ("data.mdb", "seal.key"):
        (meta / name).chmod(0o600)
    fsync_folder(meta)
