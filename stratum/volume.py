"""An open volume: the one object through which a process reads and changes it.

Invariants
* One `Volume` a process. It owns the session, the committer and the data files of that process.
* `mutate` returns only when the change is on the disk and every live mount has forgotten what it replaced.
* After a disk failure nothing is committed any more; `failed` says why and the process must end.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, Self, TypeVar

from stratum import audit, private
from stratum import config as configuration
from stratum.acknowledge import Acknowledger
from stratum.cold import ColdStore
from stratum.committer import Committer, Mutation
from stratum.copies import Noted
from stratum.damage import Damages
from stratum.errors import StorageFailed, StratumError, VolumeInvalid
from stratum.evidence import Recorder
from stratum.kv.lmdb_access import LmdbCopy, lineage_of
from stratum.kv.lmdb_store import LmdbStore
from stratum.log import get_logger
from stratum.relief import Relief
from stratum.schema import (
    FORMAT_VERSION,
    ROOT_INODE,
    UPGRADING,
    Inode,
    Kind,
    key_u64,
    pack_json,
    pack_u64,
    prefix_range,
    unpack_json,
    unpack_u64,
)
from stratum.segments import SegmentStore, fsync_folder
from stratum.sessions import SLOTS, Inherited, Session
from stratum.transaction import InodeReader, MetadataTransaction
from stratum.turn import waiting
from stratum.warm import WarmStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from stratum.config import Config
    from stratum.kv.contract import Snapshot as KvSnapshot
    from stratum.kv.contract import Store

T = TypeVar("T")
log = get_logger("volume")

RESERVE_BYTES = 32 * 1024 * 1024
"""Kept in `meta/reserve` and given up when a delete cannot grow the store on a full disk."""
SPACE_CHECK_S = 0.2
SPACE_WAIT_S_MAX = 0.05


def create(root: Path, changed: dict[str, Any], *, create_folders: bool = False) -> None:
    """Make an empty volume in an empty or missing folder. `create_folders`: those for data elsewhere, too.

    Raises `VolumeInvalid`, or `InvalidArgument` for a folder that is not there.
    """
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise VolumeInvalid(f"{root} is not empty; choose an empty or a new directory")
    text = configuration.render(changed)
    config = configuration.parse(text, configuration.CONFIG_NAME)
    for hot in hot_folders(root, config):
        if root not in hot.parents:
            private.require_folder(hot, "data", create=create_folders)
        if hot.exists() and any(name.name != "lost+found" for name in hot.iterdir()):
            raise VolumeInvalid(f"the data folder {hot} is not empty; choose an empty or a new directory")
    for folder in (root, *hot_folders(root, config)):
        private.make_folder(folder)
    meta = root / "meta"
    for folder in (meta, meta / "sessions"):
        private.make_folder(folder)
    private.write(meta / "slots", bytes(SLOTS * 32))
    # Losing this key in a power cut would lose every secret: it is synced like data.
    private.write(meta / private.SEAL_KEY, os.urandom(private.SEAL_KEY_BYTES))
    store = _open_store(root, config, create=True)
    with store.transact() as tx:
        tx.put(b"Cformat", pack_u64(FORMAT_VERSION))
        tx.put(b"ginstance", pack_json({"id": uuid.uuid4().hex}))
        now = time.time_ns()
        inode = Inode(ROOT_INODE, Kind.DIRECTORY, mode=0o755, uid=0, gid=0, now_ns=now, bucket=0)
        inode.nlink = 2
        inode.flags |= Inode.EXPLICIT
        tx.put(key_u64(b"I", ROOT_INODE), inode.pack())
    store.close()
    _fill_reserve(meta)
    # The configuration comes last: a folder without it is not a volume.
    private.write(root / configuration.CONFIG_NAME, text.encode())
    for folder in (meta, root, root.parent):
        fsync_folder(folder)


def hot_folders(root: Path, config: Config) -> list[Path]:
    return [root / hot for hot in config.volume_hot]


def _open_store(root: Path, config: Config, *, create: bool = False) -> LmdbStore:
    return LmdbStore(
        str(root / "meta"), map_bytes=config.metadata_map_bytes, readers_max=config.metadata_readers_max, create=create
    )


def _fill_reserve(meta: Path) -> None:
    fd = os.open(meta / "reserve", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, RESERVE_BYTES)
    except OSError:
        os.ftruncate(fd, 0)
    finally:
        os.close(fd)


ROWS_REMEMBERED_MAX = 4096
ROW_BYTES_REMEMBERED_MAX = 512


class Snapshot:
    """A read transaction whose small rows are remembered for as long as nothing was committed anywhere.

    Every call into LMDB lets go of the interpreter, which under load costs more than the call: the rows that each request
    needs again (key, user, bucket, directories) are taken from the memory of the same transaction id instead.
    """

    __slots__ = ("_entered", "_reader", "_volume")

    def __init__(self, volume: Volume) -> None:
        self._volume = volume

    def __enter__(self) -> InodeReader:
        self._entered = self._volume.store.snapshot()
        kv = self._entered.__enter__()
        identity, rows = self._volume.remembered
        if identity != kv.id:
            rows = {}
            self._volume.remembered = (kv.id, rows)
        self._reader = RememberingReader(kv, rows)
        return self._reader

    def __exit__(self, *error: object) -> None:
        self._reader.end()
        self._entered.__exit__(*error)  # type: ignore[arg-type]  # what the interpreter passed on


class RememberingReader(InodeReader):
    def __init__(self, kv: KvSnapshot, rows: dict[bytes, bytes | None]) -> None:
        super().__init__(kv)
        self._ask = kv.get
        self._rows = rows
        self.get = self._get

    def end(self) -> None:
        """Let go of the transaction: LMDB gives its reader slot back with the object, and a cycle would keep that alive."""
        self.get = self._ask

    def _get(self, key: bytes, /) -> bytes | None:
        rows = self._rows
        if key in rows:
            return rows[key]
        found = self._ask(key)
        if (found is None or len(found) <= ROW_BYTES_REMEMBERED_MAX) and len(rows) < ROWS_REMEMBERED_MAX:
            rows[key] = found
        return found


class Volume:
    """`Volume(root, role)` opens; use it as a context manager or call `close`."""

    def __init__(self, root: Path, role: str, inherited: Inherited | None = None) -> None:
        self.root = root.resolve()
        self.config = configuration.load(self.root)
        self.meta = self.root / "meta"
        if not (self.meta / "data.mdb").exists():
            raise VolumeInvalid(
                f"{self.root} has a {configuration.CONFIG_NAME} but no metadata store; restore meta/ from a backup"
            )
        if lineage_of(self.meta / "data.mdb") is None:
            # Opening it would begin a journal, of which an older program that may still want the volume knows nothing.
            with closing(LmdbCopy(str(self.meta), shared=True)) as before:
                self._check_format(before)
        self.store: Store = _open_store(self.root, self.config)
        self._check_format(self.store)
        with self.store.snapshot() as snapshot:
            instance = snapshot.get(b"ginstance")
        self.instance = str(unpack_json(instance)["id"]) if instance is not None else self._name_instance()
        """Names the volume to disks and remotes."""
        try:
            self.session = Session(self.meta, self.store, role, inherited)
        except BaseException:
            self.store.close()  # LMDB allows one a process, and the caller may try once more
            raise
        self._check_format(self.store)  # an upgrade may have begun before it could see our session
        self.new_id = self.session.new_id
        self.segments = SegmentStore(
            hot_folders(self.root, self.config), self.session.id, self.new_id, on_failure=self._fail
        )
        self.relief = Relief(self, self.segments.folders)
        self.segments.relief = self.relief
        self.warm = WarmStore(self)
        self.cold = ColdStore(self)
        self.noted = Noted()
        self.damages = Damages(self)
        self.before_close: list[Callable[[], None]] = []
        """Called when the volume closes: threads that read it end there."""
        self.evidence = Recorder(self)
        self.explain: Callable[[int], dict[str, Any]] | None = None
        """Why a file is where it is; set by who knows the policy."""
        self._acknowledger = Acknowledger(self)
        self._space_checked_s = 0.0
        self._space_ok = True
        self._space_asking = threading.Lock()
        self.remembered: tuple[int, dict[bytes, bytes | None]] = (-1, {})
        self._lock = threading.Lock()
        self.audit = audit.open_log(self.root, self.config, self._anchor_audit)
        """Who did what; None unless it is switched on."""
        self.committer = Committer(
            self.store, self.session.id, self.new_id,
            announce=self._acknowledger.announce, acknowledge=self._acknowledger.submit,
            may_grow=self._may_grow, release_reserve=self._release_reserve,
        )  # fmt: skip

    def _anchor_audit(self, head: audit.Head) -> None:
        """Remember what the log has come to, unless another process has brought it further."""

        def put(tx: MetadataTransaction) -> None:
            raw = tx.get(b"gaudit")
            if raw is None or unpack_json(raw)["records"] < head.records:
                tx.put(b"gaudit", pack_json({"records": head.records, "hash": head.hash}))

        try:
            self.mutate(put, frees=True)
        except StratumError as error:
            log.warning("audit_not_anchored", error=error.message)

    def _check_format(self, store: Store | LmdbCopy) -> None:
        """Raises `VolumeInvalid`; the store is closed then."""
        with store.snapshot() as snapshot:
            version = unpack_u64(snapshot.get(b"Cformat") or bytes(8))[0]
        if version == FORMAT_VERSION:
            return
        store.close()
        if version & UPGRADING:
            raise VolumeInvalid(f"an upgrade of {self.root} was interrupted; `stratum upgrade` goes on with it")
        if version > FORMAT_VERSION:
            raise VolumeInvalid(
                f"{self.root} has format {version}, which is newer than {FORMAT_VERSION}; use the version that made it"
            )
        raise VolumeInvalid(
            f"{self.root} has format {version}, and this program works on {FORMAT_VERSION}; "
            f"`stratum upgrade {self.root} --backup DIR` brings it there"
        )

    def _name_instance(self) -> str:
        """A volume from before the tiers gets its name when it is first opened."""
        with self.store.transact() as tx:
            raw = tx.get(b"ginstance")
            if raw is None:
                raw = pack_json({"id": uuid.uuid4().hex})
                tx.put(b"ginstance", raw)
            return str(unpack_json(raw)["id"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for end in self.before_close:
            end()
        self.evidence.stop()
        if self.audit is not None:
            self.audit.close()
        self.committer.stop()
        self._acknowledger.stop()
        self.segments.close()
        self.warm.close()
        self.cold.close()
        # Nothing of this process can be committed any more: what it left uncommitted goes, then its row.
        self.session.close(self._remove_session_row)
        self.store.close()

    def _remove_session_row(self) -> None:
        """Leave nothing for others to recover, unless something is left that only recovery can end."""
        from stratum.housekeeping import remove_uncommitted

        session = self.session.id
        try:
            remove_uncommitted(self, session)
            with self.store.transact() as tx:
                left = (next(tx.scan(*prefix_range(key_u64(table, session))), None) for table in (b"O", b"Q"))
                if not any(left):
                    tx.delete(key_u64(b"Z", session))
                tx.delete(key_u64(b"T", session))
        except (StratumError, OSError) as error:
            log.warning("session_not_closed", session=session, error=str(error))

    # -- reading ------------------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """One committed state: `with volume.snapshot() as reader`. Copy out and leave."""
        return Snapshot(self)

    def reading(self) -> Any:
        """Guard for reads that outlive a snapshot: enter it before the snapshot, leave after the last byte."""
        return self.session.reading()

    # -- changing -----------------------------------------------------------------------------------------------------

    def mutate(self, function: Callable[[MetadataTransaction], T], *, frees: bool = False) -> T:
        """Run `function` in a durable transaction. `frees`: it may pass the space limits.

        Raises what the function raised, `NoSpace`, `StorageFailed` or `SessionDead`; nothing was changed then.
        """
        mutation = Mutation(function, frees=frees)
        self.committer.submit(mutation)
        with waiting():
            return mutation.wait()

    def mutate_later(
        self, function: Callable[[MetadataTransaction], T], done: Callable[[Mutation[T]], None], *, frees: bool = False
    ) -> None:
        """The same without waiting; `done` runs in another thread."""
        self.committer.submit_and_pause(Mutation(function, frees=frees, done=done))

    # -- failure and space ----------------------------------------------------------------------------------------------

    def _fail(self, error: BaseException) -> None:
        if self.committer.failed is None:
            self.committer.failed = error if isinstance(error, StratumError) else StorageFailed(str(error))
            log.error("storage_failed", error=str(error))

    @property
    def failed(self) -> StratumError | None:
        return self.committer.failed

    def free_bytes(self) -> int:
        """The least free space of the disks below the volume."""
        folders = [self.meta, *self.segments.folders]
        return min(stat.f_bavail * stat.f_frsize for stat in map(os.statvfs, folders))

    def _may_grow(self) -> bool:
        """The answer of at most SPACE_CHECK_S ago, or the last one there was if a disk does not answer."""
        if time.monotonic() - self._space_checked_s > SPACE_CHECK_S and self._space_asking.acquire(blocking=False):
            asking = threading.Thread(target=self._ask_for_space, name="space", daemon=True)
            asking.start()
            asking.join(SPACE_WAIT_S_MAX)
        return self._space_ok

    def _ask_for_space(self) -> None:
        """statvfs(2) of a disk that hangs never returns: in a thread of its own, one at a time."""
        try:
            self._space_ok = self._enough_free() and self.store.used_bytes() < self.config.metadata_map_bytes * 9 // 10
            self._space_checked_s = time.monotonic()
        except OSError as error:
            self._fail(StorageFailed(f"a disk cannot say what it has left ({error}); look at it, then restart"))
        finally:
            self._space_asking.release()

    def _enough_free(self) -> bool:
        """Where data can leave the hot tier the reserve of its disks is 2 % at most: there is time to make room."""
        wanted = self.config.volume_free_bytes_min
        if not self.relief.possible():
            return self.free_bytes() >= wanted
        for folder in (self.meta, *self.segments.folders):
            stat = os.statvfs(folder)
            if stat.f_bavail * stat.f_frsize < min(wanted, stat.f_blocks * stat.f_frsize // 50) and not (
                folder != self.meta and self.relief.divert()
            ):
                return False
        return True

    def has_space(self) -> bool:
        """Whether ordinary writes are accepted now; checked at most every SPACE_CHECK_S."""
        return self._may_grow()

    @contextmanager
    def meta_descriptor(self) -> Iterator[int]:
        fd = os.open(self.meta, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)

    def _release_reserve(self) -> bool:
        """Give the reserved blocks to a delete that could not grow the store; False when they are spent."""
        try:
            fd = os.open(self.meta / "reserve", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            if os.fstat(fd).st_size == 0:
                return False
            os.ftruncate(fd, 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        log.warning("reserve_released", why="a delete needed metadata pages on a full disk")
        return True

    def refill_reserve(self) -> None:
        reserve = self.meta / "reserve"
        if (
            not reserve.exists() or reserve.stat().st_size == 0
        ) and self.free_bytes() > self.config.volume_free_bytes_min + 2 * RESERVE_BYTES:
            _fill_reserve(self.meta)
