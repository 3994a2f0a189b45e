"""The pyfuse3 handlers: await the engine, translate, return. No rule of its own lives here.

Reads of metadata are answered inline from a snapshot, so no other task runs between the snapshot and the reply; a change
goes to the committer and is awaited, and whatever is answered after that is read again. Any unexpected exception is EIO and
a log line: one that escaped would end the mount.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

import pyfuse3
import trio

from stratum import access_lists, content, files, mount_names, tree
from stratum.errors import Exists, NoSpace, NotFound, StratumError, TryAgain
from stratum.files import Attributes, Caller
from stratum.fuse.errors import TABLE
from stratum.fuse.open_files import OpenFiles
from stratum.log import get_logger
from stratum.schema import Inode, Kind
from stratum.write_buffer import SPILL_BYTES, truncate_now

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from stratum.committer import Mutation
    from stratum.fuse.open_files import FileState
    from stratum.transaction import InodeReader, MetadataTransaction
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
BLOCK_BYTES = 512


def handler(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Translate what a handler raises."""

    @functools.wraps(function)
    async def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await function(*args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except StratumError as error:
            code = TABLE[type(error)]
            if code == errno.EIO:
                log.error("operation_failed", operation=function.__name__, error=error.message)
            raise pyfuse3.FUSEError(code) from None
        except Exception:
            log.exception("operation_failed", operation=function.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from None

    return wrapped


class Operations(pyfuse3.Operations):
    """One mount of all buckets."""

    supports_dot_lookup = True
    enable_writeback_cache = False
    enable_acl = True

    def __init__(self, volume: Volume) -> None:
        super().__init__()
        self._volume = volume
        self.open_files = OpenFiles()
        self.orphans: dict[int, float] = {}
        self._token: trio.lowlevel.TrioToken | None = None

    # -- bridges ------------------------------------------------------------------------------------------------------

    async def commit(self, function: Callable[[MetadataTransaction], T], *, frees: bool = False) -> T:
        """Await a durable mutation. Not cancelled half-way: the caller must know what happened."""
        token = trio.lowlevel.current_trio_token()
        finished = trio.Event()
        box: list[Mutation[T]] = []

        def done(mutation: Mutation[T]) -> None:
            box.append(mutation)
            token.run_sync_soon(finished.set)

        self._volume.mutate_later(function, done, frees=frees)
        with trio.CancelScope(shield=True):
            await finished.wait()
        return box[0].outcome()

    def _attributes(self, inode: Inode, *, cache_s: float = CACHE_S) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode.number
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
        if inode.kind == Kind.DIRECTORY:
            size = 4096
        else:
            state = self.open_files.state(inode.number)
            if state is not None and state.buffer is not None and state.buffer.dirty:
                size, mtime_ns = state.buffer.size, state.buffer.mtime_ns
        entry.st_size = size
        entry.st_blocks = -(-size // BLOCK_BYTES)
        entry.st_atime_ns = inode.atime_ns
        entry.st_mtime_ns = mtime_ns
        entry.st_ctime_ns = max(inode.ctime_ns, mtime_ns) if mtime_ns != inode.mtime_ns else inode.ctime_ns
        return entry

    def _entry(self, inode: Inode, name: bytes) -> pyfuse3.EntryAttributes:
        """Attributes that count as a lookup. An alias is not cached: its plain name may become free unseen."""
        self.open_files.looked_up(inode.number)
        return self._attributes(inode, cache_s=0.0 if mount_names.looks_like_alias(name) else CACHE_S)

    def _fresh(self, number: int) -> Inode:
        state = self.open_files.state(number)
        if state is not None and state.pending is not None:
            return state.pending.inode
        with self._volume.snapshot() as reader:
            return reader.inode(number)

    def _entry_now(self, number: int, name: bytes) -> pyfuse3.EntryAttributes:
        return self._entry(self._fresh(number), name)

    # -- names --------------------------------------------------------------------------------------------------------

    @handler
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        with self._volume.snapshot() as reader:
            state = self.open_files.pending.get((parent_inode, name))
            if state is not None:
                found = mount_names.find(reader, parent_inode, name)
                if found is None or found[1].inode == state.number:  # to come, or committed just now
                    return self._entry(self._fresh(state.number), name)
                self.open_files.lose(state)  # S3 was quicker
            if name in {b".", b".."}:
                inode = reader.inode(parent_inode)
                return self._entry(reader.inode(inode.parent or inode.number) if name == b".." else inode, name)
            return self._entry(files.lookup(reader, parent_inode, name), name)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for number, count in inode_list:
            self.open_files.forget(number, count)

    @staticmethod
    def _groups(ctx: pyfuse3.RequestContext) -> set[int]:
        """Slow: it reads /proc. The kernel checks permissions; this is for what it does not know."""
        return {ctx.gid, *pyfuse3.get_sup_groups(ctx.pid)}

    def _caller(self, ctx: pyfuse3.RequestContext) -> Caller:
        return Caller(ctx.uid, ctx.gid, ctx.umask)

    async def _make(
        self, parent: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext, *, rdev: int = 0, target: bytes = b""
    ) -> int:
        caller = self._caller(ctx)
        return await self.commit(lambda tx: files.make(tx, parent, name, mode, caller, rdev=rdev, target=target).number)

    @handler
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._entry_now(await self._make(parent_inode, name, stat.S_IFDIR | (mode & 0o7777), ctx), name)

    @handler
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._entry_now(await self._make(parent_inode, name, mode, ctx, rdev=rdev), name)

    @handler
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._entry_now(await self._make(parent_inode, name, stat.S_IFLNK | 0o777, ctx, target=target), name)

    @handler
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        """The row comes with the first flush: one commit a file instead of two, and nobody waits with the directory locked."""
        if not self._volume.has_space():
            raise pyfuse3.FUSEError(errno.ENOSPC)
        await self._settle_name(parent_inode, name)
        with self._volume.snapshot() as reader:
            inode = files.prepare_file(
                reader, parent_inode, name, mode, self._caller(ctx), self._volume.new_id(), time.time_ns()
            )
        if inode is None:
            number = await self._make(parent_inode, name, stat.S_IFREG | mode & 0o7777, ctx)
            entry = self._entry_now(number, name)
            return pyfuse3.FileInfo(fh=self.open_files.open(number, writable=True), keep_cache=True), entry
        handle = self.open_files.create(parent_inode, name, inode)
        return pyfuse3.FileInfo(fh=handle, keep_cache=True), self._entry(inode, name)

    # -- files that were created and have no row yet ----------------------------------------------------------------------

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

    # -- names, continued -------------------------------------------------------------------------------------------------

    @handler
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        with self._volume.snapshot() as reader:
            return files.read_symlink(reader, inode)

    @handler
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        await self._settle_number(inode)
        await self.commit(lambda tx: files.link(tx, inode, new_parent_inode, new_name).number)
        return self._entry_now(inode, new_name)

    @handler
    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        try:
            await self._settle_name(parent_inode, name)
        except NoSpace:
            state = self.open_files.pending.get((parent_inode, name))
            if state is None:
                raise
            self.open_files.lose(state)  # it never was on the disk: on a full one that is all there is to do
            return
        number = await self.commit(lambda tx: files.unlink(tx, parent_inode, name, self.open_files.is_used), frees=True)
        self._lost_name(number)

    @handler
    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._settle_name(parent_inode, name)
        number = await self.commit(lambda tx: files.rmdir(tx, parent_inode, name, self.open_files.is_used), frees=True)
        self._lost_name(number)

    @handler
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        if flags & ~(files.RENAME_NOREPLACE | files.RENAME_EXCHANGE):
            raise pyfuse3.FUSEError(errno.EINVAL)
        await self._settle_name(parent_inode_old, name_old)
        await self._settle_name(parent_inode_new, name_new)
        victims: list[int] = []

        def change(tx: MetadataTransaction) -> None:
            found = mount_names.find(tx, parent_inode_new, name_new)
            victims[:] = [found[1].inode] if found is not None else []
            files.rename(tx, parent_inode_old, name_old, parent_inode_new, name_new, flags, self.open_files.is_used)

        await self.commit(change, frees=True)
        for number in victims:
            self._lost_name(number)

    def _lost_name(self, number: int) -> None:
        """After an unlink: if the file is open and has no name left, the last release frees it."""
        with self._volume.snapshot() as reader:
            inode = content.require_inode(reader, number)
        if inode is None or inode.nlink:
            return
        state = self.open_files.state(number)
        if state is not None and state.handles:
            state.nameless = True
        else:
            self.add_orphan(number)

    # -- attributes -----------------------------------------------------------------------------------------------------

    @handler
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        fresh = self._fresh(inode)
        if self.open_files.pending and fresh.kind == Kind.DIRECTORY:
            newest_ns = max(
                (state.pending.created_ns for state in self.open_files.children(inode) if state.pending), default=0
            )
            fresh.mtime_ns = max(fresh.mtime_ns, newest_ns)
            fresh.ctime_ns = max(fresh.ctime_ns, newest_ns)
        return self._attributes(fresh)

    @handler
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        if fields.update_size:
            await self._truncate(inode, attr.st_size, open_handle=fh is not None)
        wanted = Attributes(
            mode=attr.st_mode & 0o7777 if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
        )
        if wanted != Attributes() and not await self._set_pending(inode, wanted):
            await self._settle_children(inode)
            state = self.open_files.state(inode)
            if state is not None and wanted.mtime_ns is not None:
                await self._flush(state)
            await self.commit(lambda tx: files.set_attributes(tx, inode, wanted).number, frees=True)
        return self._attributes(self._fresh(inode))

    async def _set_pending(self, number: int, wanted: Attributes) -> bool:
        """Change attributes of a file that has no row yet; False if it has one."""
        state = self.open_files.state(number)
        if state is None or state.pending is None:
            return False
        async with state.lock:
            if state.pending is None:
                return False
            files.apply_attributes(state.pending.inode, wanted, time.time_ns())
            if wanted.mtime_ns is not None and state.dirty:
                assert state.buffer is not None
                state.buffer.mtime_ns = wanted.mtime_ns
        return True

    async def _truncate(self, number: int, size: int, *, open_handle: bool) -> None:
        state = self.open_files.state(number)
        if state is None:
            await self.commit(lambda tx: truncate_now(tx, number, size).number, frees=True)
            return
        async with state.lock:
            buffer = self.open_files.buffer(self._volume, state, self._fresh(number))
            self._mark_dirty(state)
            buffer.truncate(size, time.time_ns())
        if not open_handle:
            await self._flush(state)

    def _mark_dirty(self, state: FileState) -> None:
        if not state.dirty:
            state.dirty_since = trio.current_time()
            assert state.buffer is not None
            state.buffer.size = self._fresh(state.number).size

    @handler
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        data = pyfuse3.StatvfsData()
        total = free = 0
        seen: set[int] = set()
        for folder in self._volume.segments.folders:
            device = folder.stat().st_dev
            if device not in seen:
                seen.add(device)
                disk = os.statvfs(folder)
                total += disk.f_blocks * disk.f_frsize
                free += max(0, disk.f_bavail * disk.f_frsize - self._volume.config.volume_free_bytes_min)
        data.f_bsize = data.f_frsize = 4096
        data.f_blocks = total // 4096
        data.f_bfree = data.f_bavail = free // 4096
        data.f_files = free // 256 + 1
        data.f_ffree = data.f_favail = free // 256
        data.f_namemax = mount_names.NAME_BYTES_MAX
        return data

    # -- extended attributes --------------------------------------------------------------------------------------------

    @handler
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        if name == b"security.capability":  # asked before every write(2); there never is one
            raise pyfuse3.FUSEError(errno.ENODATA)
        if access_lists.is_one(name) and not self._fresh(inode).flags & access_lists.FLAGS[name]:
            raise pyfuse3.FUSEError(errno.ENODATA)
        await self._settle_number(inode)
        with self._volume.snapshot() as reader:
            return files.get_attribute(reader, inode, name)

    @handler
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> list[bytes]:
        await self._settle_number(inode)
        with self._volume.snapshot() as reader:
            return files.list_attributes(reader, inode)

    @handler
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext) -> None:
        if name.startswith((b"system.", b"security.capability")) and not access_lists.is_one(name):
            raise pyfuse3.FUSEError(errno.EOPNOTSUPP)
        await self._settle_number(inode)
        keeps = name != access_lists.ACCESS or ctx.uid == 0 or self._fresh(inode).gid in self._groups(ctx)
        await self.commit(lambda tx: files.set_attribute(tx, inode, name, value, keeps_set_gid=keeps))

    @handler
    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._settle_number(inode)
        await self.commit(lambda tx: files.remove_attribute(tx, inode, name), frees=True)

    # -- files ----------------------------------------------------------------------------------------------------------

    @handler
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        self._fresh(inode)
        handle = self.open_files.open(inode, writable=flags & os.O_ACCMODE != os.O_RDONLY)
        if flags & os.O_TRUNC:
            try:
                await self._truncate(inode, 0, open_handle=True)
            except BaseException:
                await self._close(handle)
                raise
        return pyfuse3.FileInfo(fh=handle, keep_cache=True)

    @handler
    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Any contiguous buffer serves; the binding's types say bytes."""
        state = self.open_files.handles[fh].state
        buffer = state.buffer
        with self._volume.reading():
            with self._volume.snapshot() as reader:
                inode = state.pending.inode if state.pending is not None else reader.inode(state.number)
                end = buffer.size if buffer is not None and buffer.dirty else inode.size
                stop = min(off + size, end)
                if stop <= off:
                    return b""
                committed = min(stop, inode.size)
                plan = content.plan_read(reader, inode, off, committed)
            pieces = list(content.read_planned(self._volume, plan, off, committed)) if committed > off else []
        if buffer is None or not buffer.dirty:
            return cast("bytes", pieces[0]) if len(pieces) == 1 else b"".join(pieces)
        base = bytearray(b"".join(pieces).ljust(stop - off, b"\0"))
        buffer.overlay(off, base)
        return cast("bytes", base)

    @handler
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        state = self.open_files.handles[fh].state
        async with state.lock:
            if not self._volume.has_space():
                raise pyfuse3.FUSEError(errno.ENOSPC)
            buffer = state.buffer
            if buffer is None or not buffer.dirty:
                buffer = self.open_files.buffer(self._volume, state, self._fresh(state.number))
                self._mark_dirty(state)
            buffer.write(off, buf, time.time_ns())
            if buffer.memory_bytes >= SPILL_BYTES or (
                buffer.memory_bytes > 65536
                and self.open_files.dirty_bytes() > self._volume.config.mount_dirty_bytes_max
            ):
                await trio.to_thread.run_sync(buffer.spill)
        return len(buf)

    async def _flush(self, state: FileState) -> None:
        """Make what was written durable and visible to S3."""
        if not state.uncommitted:
            return
        async with state.lock:
            buffer = state.buffer
            if state.pending is not None:
                if buffer is None or not buffer.dirty:
                    await self._settle_locked(state)
                    return
                function = buffer.inline_mutation(state.pending.inode)
                await self._settle_locked(state, function)
                if function is not None:
                    if state.pending is None:
                        buffer.forget()
                    return
                if state.pending is not None:
                    return  # lost: its bytes stay with whoever has it open
            if buffer is None or not buffer.dirty:
                return
            function = buffer.inline_mutation()
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

    @handler
    async def flush(self, fh: int) -> None:
        await self._flush(self.open_files.handles[fh].state)

    @handler
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._flush(self.open_files.handles[fh].state)

    @handler
    async def release(self, fh: int) -> None:
        await self._close(fh)

    async def _close(self, fh: int) -> None:
        handle = self.open_files.handles.pop(fh)
        state = handle.state
        try:
            if state.nameless and state.handles == 1 and state.buffer is not None:
                state.buffer.forget()  # nobody can ask for these bytes any more
            await self._flush(state)
        finally:
            state.handles -= 1
            if state.handles == 0:
                if state.pending is not None and state.pending.lost and state.buffer is not None:
                    state.buffer.forget()
                self.open_files.drop(state)
                if state.nameless and state.pending is None:
                    self.add_orphan(state.number)

    async def flush_old(self, *, everything: bool = False) -> None:
        """Commit what has waited long enough (a mapping's stores arrive after the last flush)."""
        now = trio.current_time()
        for state in list(self.open_files.files.values()):
            if state.uncommitted and (everything or now - state.dirty_since >= COMMIT_AFTER_S):
                try:
                    await self._flush(state)
                except StratumError as error:
                    log.error("write_back_failed", inode=state.number, error=error.message)
                if state.handles == 0:
                    self.open_files.drop(state)

    def add_orphan(self, number: int) -> None:
        self.orphans.setdefault(number, trio.current_time())

    async def release_orphans(self) -> bool:
        """Let go of some inodes without names that nobody here has open; True if there may be more."""
        now = trio.current_time()
        old = [number for number, since in self.orphans.items() if now - since >= ORPHAN_S_MIN]
        numbers = [number for number in old if not self.open_files.is_open(number)][:256]
        if not numbers:
            return False
        session = self._volume.session.id

        def release(tx: MetadataTransaction) -> None:
            for number in numbers:
                tree.release_orphan(tx, session, number)

        await self.commit(release, frees=True)
        for number in numbers:
            self.orphans.pop(number, None)
        return True

    # -- directories ----------------------------------------------------------------------------------------------------

    @handler
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        self._fresh(inode)
        return self.open_files.open_directory(inode)

    @handler
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        directory = self.open_files.directories[fh]
        with suppress(NoSpace, NotFound):  # a full disk hides what it cannot take, but is listed
            await self._settle_children(directory.number)
        with self._volume.snapshot() as reader:
            start = self._position(reader, directory.number, directory.positions, start_id)
            cookie, last = start_id, b""
            if start_id == 0:
                body = mount_names.body_of(reader, directory.number)
                cookie = 1
                if body and not self._reply(token, mount_names.BODY, reader.inode(body), cookie):
                    return
                last = b"\0"
                directory.remember(cookie, last)
            shadows = reader.inode(directory.number).nlink > 2
            for entry, dentry in tree.scan_dentries(reader, directory.number, start):
                if entry <= start and start:
                    continue
                inode = content.require_inode(reader, dentry.inode)
                if inode is None:
                    continue
                if not shadows and dentry.kind != Kind.DIRECTORY and mount_names.is_plain(entry):
                    name = entry
                else:
                    name = mount_names.shown_name(reader, directory.number, entry)
                if not self._reply(token, name, inode, cookie + 1):
                    break
                cookie, last = cookie + 1, entry
            if last:
                directory.remember(cookie, last)

    def _reply(self, token: pyfuse3.ReaddirToken, name: bytes, inode: Inode, cookie: int) -> bool:
        attributes = self._attributes(inode, cache_s=0.0 if mount_names.looks_like_alias(name) else CACHE_S)
        if not pyfuse3.readdir_reply(token, name, attributes, cookie):
            return False
        self.open_files.looked_up(inode.number)
        return True

    def _position(self, reader: InodeReader, number: int, positions: dict[int, bytes], cookie: int) -> bytes:
        """The entry that `cookie` stands behind; counted from the nearest remembered one if it was forgotten."""
        if cookie <= 1:
            return b""
        found = positions.get(cookie)
        if found is not None:
            return found if found != b"\0" else b""
        known = max((at for at in positions if at < cookie), default=1)
        entry = positions.get(known, b"")
        entry = b"" if entry == b"\0" else entry
        for at, (name, _) in enumerate(tree.scan_dentries(reader, number, entry), known if not entry else known - 1):
            if at >= cookie - 1:
                return name
        return b"\xff"

    @handler
    async def releasedir(self, fh: int) -> None:
        self.open_files.directories.pop(fh, None)

    @handler
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Every change of a name was durable when it returned, but for files that nobody has closed or synced yet."""
        await self._settle_children(self.open_files.directories[fh].number)

    @handler
    async def access(self, inode: int, mode: int, ctx: pyfuse3.RequestContext) -> bool:
        return True  # default_permissions: the kernel checks
