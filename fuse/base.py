"""What all handlers of the mount stand on: awaiting the engine, translating errors and attributes, files without a row yet.

Any unexpected exception is EIO and a log line: one that escaped would end the mount.
"""

from __future__ import annotations

import errno
import functools
import inspect
import itertools
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

import pyfuse3
import trio

from stratum import files, filling, metrics, mount_names, quotas, tree
from stratum.errors import Exists, NotFound, QuotaExceeded, StillFilling, StratumError, TryAgain
from stratum.files import Caller
from stratum.fuse.audited import Auditor
from stratum.fuse.commits import Commits
from stratum.fuse.errors import TABLE
from stratum.fuse.open_files import OpenFiles
from stratum.log import get_logger
from stratum.schema import Inode, Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from contextlib import AbstractContextManager

    from stratum.fuse.locks import Locks
    from stratum.fuse.open_files import FileState
    from stratum.transaction import MetadataTransaction
    from stratum.volume import Volume

P = ParamSpec("P")
T = TypeVar("T")
log = get_logger("mount")

CACHE_S = 3600.0
"""How long the kernel may keep names and attributes: explicit invalidation, not this, keeps them right."""
COMMIT_AFTER_S = 1.0
ORPHAN_S_MIN = 1.0
"""How long an inode without a name is kept for an open(2) that looked it up before it lost the name. The kernel retries a
stale open once only; under constant replacement that is not enough."""
RELEASED_AT_ONCE = 256
FLUSHED_AT_ONCE = 64
"""What one transaction takes at most before the loop gives a sign of life again, and others have their turn."""
DISK_READERS_MAX = 32
"""Threads that wait for disks; of their own, so that a disk that hangs holds up no commit."""
BLOCK_BYTES = 512

INODE_PARAMETERS = frozenset(
    ("inode", "parent_inode", "new_parent_inode", "parent_inode_old", "parent_inode_new")
)  # fmt: skip


def handler(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Translate what a handler raises, and the kernel's number of the mount's root, which is always 1."""
    operation = function.__name__
    parameters = list(inspect.signature(function).parameters)
    places = [place for place, name in enumerate(inspect.signature(function).parameters) if name in INODE_PARAMETERS]

    @functools.wraps(function)
    async def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        began = time.perf_counter()
        result = "ok"
        mount = cast("Base", args[0])
        root = mount.root
        if root != pyfuse3.ROOT_INODE:
            numbers = list(args)
            for place in places:
                if numbers[place] == pyfuse3.ROOT_INODE:
                    numbers[place] = root
            args = cast("Any", tuple(numbers))
        try:
            if mount.auditor is None:
                try:
                    return await function(*args, **kwargs)
                except StillFilling as error:
                    return await _filled(mount, functools.partial(function, *args, **kwargs), error)
            work = _filled(mount, functools.partial(function, *args, **kwargs))
            return await _audited(mount.auditor, operation, dict(zip(parameters, args, strict=False)), work)
        except pyfuse3.FUSEError:
            result = "error"
            raise
        except StratumError as error:
            code = TABLE[type(error)]
            result = "fault" if code == errno.EIO else "error"
            if code == errno.EIO:
                log.error("operation_failed", operation=function.__name__, error=error.message)
            raise pyfuse3.FUSEError(code) from None
        except Exception:
            result = "fault"
            log.exception("operation_failed", operation=function.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from None
        finally:
            metrics.FUSE_REQUESTS.add(operation, result)
            metrics.FUSE_SECONDS.observe(time.perf_counter() - began, operation)

    return wrapped


async def _filled(mount: Base, work: Callable[[], Coroutine[Any, Any, T]], wanted: StillFilling | None = None) -> T:
    """What a handler does, once it finds what a young clone has not got yet."""
    attempt = 0
    while True:
        try:
            if wanted is not None:
                await mount.provide(wanted, attempt)
                attempt += 1
            return await work()
        except StillFilling as error:
            wanted = error


async def _audited(auditor: Auditor, operation: str, told: dict[str, Any], work: Coroutine[Any, Any, T]) -> T:
    """Do the work, and put it on record before the kernel hears of it. Raises what it raised, or `AuditUnavailable`."""
    wanted = auditor.wants(operation, told)
    try:
        if wanted:
            auditor.check()
            event = auditor.event(operation, told)
    except BaseException:
        work.close()
        raise
    try:
        done = await work
    except (StratumError, pyfuse3.FUSEError) as error:
        if wanted:
            code = error.errno if isinstance(error, pyfuse3.FUSEError) else TABLE[type(error)]
            await auditor.record({**event, "status": errno.errorcode.get(code, str(code))})
        raise
    entry = done[1] if isinstance(done, tuple) else done
    if isinstance(entry, pyfuse3.EntryAttributes):
        auditor.learn(operation, told, entry.st_ino)
    if operation == "rename":
        auditor.names.moved(told["parent_inode_old"], told["name_old"], told["parent_inode_new"], told["name_new"])
    if wanted:
        await auditor.record(event)
    return done


class Base(pyfuse3.Operations):
    """State of one mount and the ways to the engine."""

    supports_dot_lookup = True
    enable_writeback_cache = False
    enable_acl = True

    def __init__(
        self, volume: Volume, *, root: int = pyfuse3.ROOT_INODE, shared: bool = False, bucket: str = ""
    ) -> None:
        """`root` is the inode that is mounted: 1 for all buckets, or the directory of `bucket`.

        `shared`: another writable mount may show the same tree. Then no name is cached, and none is made before its commit:
        nobody can be asked to forget a name whose directory the kernel has locked for somebody who waits for us.
        """
        super().__init__()
        self._volume = volume
        self.root = root
        self.shared = shared
        self.names_cached = not shared
        """Whether the kernel may still have names."""
        self.renamed_to: set[tuple[int, bytes]] | None = None
        """While names are being dropped (`sharing.py`): where some have gone meanwhile."""
        self.forgetting = trio.Lock()
        """Held while names are being dropped, and while the mount is passed on to another program."""
        self._entry_cache_s = 0.0 if shared else CACHE_S
        self.commits = Commits(volume)
        self.open_files = OpenFiles()
        self.auditor = Auditor(volume, root, bucket) if volume.audit is not None else None
        self.orphans: dict[int, float] = {}
        self.locks: Locks | None = None
        """Those that other mounts see; without, the kernel keeps them for this mount alone."""
        self._disk_readers = trio.CapacityLimiter(DISK_READERS_MAX)
        self._recalls = trio.CapacityLimiter(volume.config.cold_recalls)

    async def commit(self, function: Callable[[MetadataTransaction], T], *, frees: bool = False) -> T:
        """Await a durable mutation. Not cancelled half-way: the caller must know what happened."""
        return await self.commits.run(function, frees=frees)

    def interruptible(self, *, by_any_signal: bool = False) -> AbstractContextManager[None]:
        """See `Session.interruptible`."""
        session = self.commits.session
        return nullcontext() if session is None else session.interruptible(by_any_signal=by_any_signal)

    async def provide(self, wanted: StillFilling, attempt: int) -> None:
        """Fill in what a young clone has not got yet."""
        work = functools.partial(filling.provide, self._volume, wanted, attempt)
        with self.interruptible():
            await trio.to_thread.run_sync(work, abandon_on_cancel=True)

    def stop_caching_names(self) -> None:
        """From now on this mount answers as one of several; what the kernel knows already is for `sharing.py` to drop."""
        self.shared = True
        self.renamed_to = set()
        self._entry_cache_s = 0.0

    def kernel_number(self, number: int) -> int:
        return pyfuse3.ROOT_INODE if number == self.root else number

    def _check_inside(self, inode: Inode) -> None:
        """A mount of one bucket shows nothing of another, however it is asked (a file handle, a path to clone)."""
        if self.root not in (pyfuse3.ROOT_INODE, inode.bucket):
            raise NotFound("this lies outside of what is mounted here")

    def _attributes(self, inode: Inode, *, cache_s: float = 0.0) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = self.kernel_number(inode.number)
        entry.generation = 0
        entry.entry_timeout = cache_s
        entry.attr_timeout = CACHE_S
        entry.st_mode = files.FORMAT_OF_KIND[inode.kind] | inode.mode
        entry.st_nlink = inode.nlink
        entry.st_uid = inode.uid
        entry.st_gid = inode.gid
        entry.st_rdev = 0 if inode.kind == Kind.DIRECTORY else inode.rdev
        entry.st_blksize = 4096
        size, mtime_ns = inode.size, inode.mtime_ns
        allocated = size
        if inode.kind == Kind.DIRECTORY:
            size = allocated = 4096
        elif inode.kind == Kind.FILE:
            counted = inode.allocated
            if counted is not None:
                allocated = counted
            state = self.open_files.state(inode.number)
            if state is not None and state.buffer is not None and state.buffer.dirty:
                size, mtime_ns = state.buffer.size, state.buffer.mtime_ns
                allocated = min(size, allocated + state.buffer.written_bytes)
        entry.st_size = size
        entry.st_blocks = -(-allocated // BLOCK_BYTES)
        entry.st_atime_ns = inode.atime_ns
        entry.st_mtime_ns = mtime_ns
        entry.st_ctime_ns = max(inode.ctime_ns, mtime_ns) if mtime_ns != inode.mtime_ns else inode.ctime_ns
        return entry

    def _entry(self, inode: Inode, name: bytes) -> pyfuse3.EntryAttributes:
        """Attributes that count as a lookup. An alias is not cached: its plain name may become free unseen."""
        self.open_files.looked_up(inode.number)
        return self._attributes(inode, cache_s=0.0 if mount_names.looks_like_alias(name) else self._entry_cache_s)

    def _fresh(self, number: int) -> Inode:
        state = self.open_files.state(number)
        if state is not None and state.pending is not None:
            return state.pending.inode
        with self._volume.snapshot() as reader:
            return reader.inode(number)

    def _check_quota(self, bucket: int, *, size: int = 0, objects: int = 0) -> None:
        """Refuse at once what the commit would refuse later, what is not committed yet counted in. Raises `QuotaExceeded`."""
        with self._volume.snapshot() as reader:
            if not quotas.any_set(reader):
                return
            objects_left, bytes_left = quotas.room(reader, bucket)
            for state in self.open_files.files.values():
                pending = state.pending
                if not state.uncommitted or (pending is None and not reader.has_inode(state.number)):
                    continue
                inode = pending.inode if pending is not None else reader.inode(state.number)
                if inode.bucket == bucket:
                    objects_left -= pending is not None
                    if state.buffer is not None and state.dirty:
                        bytes_left -= max(0, state.buffer.size - inode.size)
        if (size and size > bytes_left) or (objects and objects > objects_left):
            raise QuotaExceeded("a quota of the bucket or of its owner would be passed")

    def _entry_now(self, number: int, name: bytes) -> pyfuse3.EntryAttributes:
        return self._entry(self._fresh(number), name)

    def _caller(self, ctx: pyfuse3.RequestContext) -> Caller:
        return Caller(ctx.uid, ctx.gid, ctx.umask)

    @staticmethod
    def _groups(ctx: pyfuse3.RequestContext) -> set[int]:
        """Slow: it reads /proc. The kernel checks permissions; this is for what it leaves to us."""
        return {ctx.gid, *pyfuse3.get_sup_groups(ctx.pid)}

    def _keeps_set_gid(self, number: int, ctx: pyfuse3.RequestContext) -> bool:
        """Only root and members of a file's group may give it set-group-id (chmod(2))."""
        inode = self._fresh(number)
        return ctx.uid == 0 or inode.gid in self._groups(ctx)

    async def _settle(self, state: FileState) -> None:
        async with state.lock:
            await self._settle_locked(state)

    async def _settle_locked(
        self, state: FileState, also: Callable[[MetadataTransaction], object] | None = None
    ) -> None:
        """Commit a pending file, and with it `also`. Raises `NotFound` if its directory was removed meanwhile.

        If S3 put another object under its name, that is as if it had replaced the file: no error.
        """
        pending = state.pending
        if pending is None or pending.lost:
            return

        def change(tx: MetadataTransaction) -> None:
            files.make_prepared(tx, pending.parent, pending.name, pending.inode, pending.created_ns)
            if also is not None:
                also(tx)

        try:
            await self.commit(change)
        except Exists:
            self.open_files.lose(state)
        except NotFound:
            self.open_files.lose(state)
            raise
        else:
            self.open_files.committed(state)

    async def _settle_number(self, number: int) -> None:
        state = self.open_files.state(number)
        if state is not None and state.pending is not None:
            await self._settle(state)

    async def _settle_children(self, directory: int) -> None:
        if self.open_files.pending:
            for state in self.open_files.children(directory):
                await self._settle(state)

    async def _settle_name(self, parent: int, name: bytes) -> None:
        """Before a name is changed: what is pending under it, and in the directory it names."""
        if not self.open_files.pending:
            return
        state = self.open_files.pending.get((parent, name))
        if state is not None:
            await self._settle(state)
            return
        with self._volume.snapshot() as reader:
            found = mount_names.find(reader, parent, name)
        if found is not None and found[1].kind == Kind.DIRECTORY:
            await self._settle_children(found[1].inode)

    async def _flush(self, state: FileState) -> None:
        """Make what was written durable and visible to S3."""
        if not state.uncommitted:
            return
        async with state.lock:
            await self._flush_locked(state)

    async def _flush_locked(self, state: FileState) -> None:
        buffer = state.buffer
        if state.pending is not None:
            if buffer is None or not buffer.dirty:
                await self._settle_locked(state)
                return
            function = buffer.mutation(state.pending.inode)
            await self._settle_locked(state, function)
            if function is not None:
                if state.pending is None:
                    buffer.forget()
                return
            if state.pending is not None:
                return  # lost: its bytes stay with whoever has it open
        if buffer is None or not buffer.dirty:
            return
        function = buffer.mutation()
        if function is None:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(buffer.commit)
            return
        try:
            await self.commit(function)
        except TryAgain:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(buffer.commit)
        except NotFound:
            pass  # the file lost its last name and its holders: nobody can ask for these bytes
        buffer.forget()

    def add_orphan(self, number: int) -> None:
        self.orphans.setdefault(number, trio.current_time())

    async def release_orphans(self) -> bool:
        """Let go of some inodes without names that nobody here has open; True if there may be more.

        The longest without a name come first. One that is open goes to the end, so that nobody looks at it each time.
        """
        now = trio.current_time()
        old = itertools.takewhile(lambda item: now - item[1] >= ORPHAN_S_MIN, self.orphans.items())
        looked = [number for number, _ in itertools.islice(old, RELEASED_AT_ONCE)]
        numbers = []
        for number in looked:
            if self.open_files.is_open(number):
                del self.orphans[number]
                self.orphans[number] = now
            else:
                numbers.append(number)
        if not numbers:
            return len(looked) == RELEASED_AT_ONCE
        session = self._volume.session.id

        def release(tx: MetadataTransaction) -> None:
            for number in numbers:
                tree.release_orphan(tx, session, number)

        await self.commit(release, frees=True)
        for number in numbers:
            self.orphans.pop(number, None)
        return len(looked) == RELEASED_AT_ONCE
