"""The pyfuse3 handlers: await the engine, translate, return. No rule of its own lives here.

Reads of metadata are answered inline from a snapshot, so no other task runs between the snapshot and the reply; a change
goes to the committer and is awaited, and whatever is answered after that is read again. Any unexpected exception is EIO and
a log line: one that escaped would end the mount.
"""

from __future__ import annotations

import errno
import stat
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import pyfuse3
import xxhash

from stratum import content, files, mount_names, tree
from stratum.errors import NoSpace, NotFound, StillFilling
from stratum.fuse.base import handler
from stratum.fuse.lock_operations import LockOperations
from stratum.schema import Inode, Kind

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from stratum.fuse.open_files import DirectoryHandle
    from stratum.transaction import InodeReader, MetadataTransaction


BODY_COOKIE = 1
SELF_COOKIE, PARENT_COOKIE = (1 << 62) + 2, (1 << 62) + 3
"""A listing is `.`, `..`, the directory's own object if it has a name here, and the entries."""


def cookie_of(entry: bytes) -> int:
    """Where a listing goes on behind an entry: the same for every handle, since the kernel keeps listings. None of the above, and never 0."""
    return (xxhash.xxh3_64_intdigest(entry) >> 2) + 2


class Operations(LockOperations):
    """One mount: the handlers on names, and what the others bring."""

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
                self._check_inside(inode)
                if name == b".." and inode.number != self.root:
                    inode = reader.inode(inode.parent or inode.number)
                return self._entry(inode, name)
            return self._entry(files.lookup(reader, parent_inode, name), name)

    def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:  # type: ignore[override]  # nothing to await, see session.py
        for number, count in inode_list:
            self.open_files.forget(number, count)
            if self.auditor is not None and not self.open_files.is_used(number):
                self.auditor.names.forget(number)

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
        self._check_quota(self._fresh(parent_inode).bucket, objects=1)
        await self._settle_name(parent_inode, name)
        inode = None
        if not self.shared:
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

    @handler
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        with self._volume.snapshot() as reader:
            return files.read_symlink(reader, inode)

    @handler
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        await self._settle_number(inode)
        state = self.open_files.state(inode)
        if state is not None and state.linkable:
            await self._link_first(state, new_parent_inode, new_name)
        else:
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
        if flags & ~(files.RENAME_NOREPLACE | files.RENAME_EXCHANGE | files.RENAME_WHITEOUT):
            raise pyfuse3.FUSEError(errno.EINVAL)
        caller = self._caller(ctx)
        await self._settle_name(parent_inode_old, name_old)
        await self._settle_name(parent_inode_new, name_new)
        victims: list[int] = []

        def change(tx: MetadataTransaction) -> None:
            found = mount_names.find(tx, parent_inode_new, name_new)
            victims[:] = [found[1].inode] if found is not None else []
            files.rename(
                tx, parent_inode_old, name_old, parent_inode_new, name_new, flags, self.open_files.is_used, caller
            )

        await self.commit(change, frees=True)
        if self.renamed_to is not None:
            self.renamed_to |= {(parent_inode_old, name_old), (parent_inode_new, name_new)}
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

    @handler
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        mtime_ns = self._fresh(inode).mtime_ns
        return self.open_files.open_directory(inode, mtime_ns, cached=not self.shared)

    @handler
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        directory = self.open_files.directories[fh]
        with suppress(NoSpace, NotFound):  # a full disk hides what it cannot take, but is listed
            await self._settle_children(directory.number)
        with self._volume.snapshot() as reader:
            start = self._position(reader, directory, start_id)
            replied = self._reply_first(reader, token, directory.number, start_id)
            if replied is None:
                return
            last = b""
            try:
                for entry in self._reply_entries(reader, token, directory.number, start):
                    last = entry
            except StillFilling:
                # A clone's directory has no more yet. What was replied stands: the kernel asks for the rest by itself.
                if not last and not replied:
                    raise
            if last:
                directory.remember(cookie_of(last), last)

    def _reply_first(self, reader: InodeReader, token: pyfuse3.ReaddirToken, number: int, start_id: int) -> int | None:
        """What comes before the entries, from `start_id` on: how much of it there was, or None if there is no more room."""
        order = (0, SELF_COOKIE, PARENT_COOKIE, BODY_COOKIE)
        after = order.index(start_id) if start_id in order else len(order)
        replied = 0
        if after < 2:
            inode = reader.inode(number)
            parent = inode if number == self.root else content.require_inode(reader, inode.parent) or inode
            for name, found, cookie in ((b".", inode, SELF_COOKIE), (b"..", parent, PARENT_COOKIE))[after:]:
                # The kernel looks up neither of them, whatever it is told, so they are not counted.
                if not pyfuse3.readdir_reply(token, name, self._attributes(found), cookie):
                    return None
                replied += 1
        body = mount_names.body_of(reader, number) if after < 3 else 0
        if body:
            if not self._reply(token, number, mount_names.BODY, reader.inode(body), BODY_COOKIE):
                return None
            replied += 1
        return replied

    def _reply_entries(
        self, reader: InodeReader, token: pyfuse3.ReaddirToken, directory: int, start: bytes
    ) -> Iterator[bytes]:
        """Those behind `start` that there is room for."""
        shadows = reader.inode(directory).nlink > 2
        for entry, dentry in tree.scan_dentries(reader, directory, start):
            if entry <= start and start:
                continue
            inode = content.require_inode(reader, dentry.inode)
            if inode is None:
                continue
            if not shadows and dentry.kind != Kind.DIRECTORY and mount_names.is_plain(entry):
                name = entry
            else:
                name = mount_names.shown_name(reader, directory, entry)
            if not self._reply(token, directory, name, inode, cookie_of(entry)):
                return
            yield entry

    def _reply(self, token: pyfuse3.ReaddirToken, directory: int, name: bytes, inode: Inode, cookie: int) -> bool:
        attributes = self._attributes(inode, cache_s=0.0 if mount_names.looks_like_alias(name) else self._entry_cache_s)
        if not pyfuse3.readdir_reply(token, name, attributes, cookie):
            return False
        self.open_files.looked_up(inode.number)
        if self.auditor is not None:
            self.auditor.names.learn(directory, name, inode.number)
        return True

    @staticmethod
    def _position(reader: InodeReader, directory: DirectoryHandle, cookie: int) -> bytes:
        """The entry that `cookie` stands behind.

        A cookie may come from the kernel's cache, which another handle has filled. If its entry has been removed since, the listing
        begins anew: to show a name twice is better than to leave one out.
        """
        if cookie in {0, BODY_COOKIE, SELF_COOKIE, PARENT_COOKIE}:
            return b""
        found = directory.positions.get(cookie)
        if found is not None:
            return found
        entries = tree.scan_dentries(reader, directory.number)
        return next((entry for entry, _ in entries if cookie_of(entry) == cookie), b"")

    @handler
    async def releasedir(self, fh: int) -> None:
        self.open_files.directories.pop(fh, None)

    @handler
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Every change of a name was durable when it returned, but for files that nobody has closed or synced yet."""
        await self._settle_children(self.open_files.directories[fh].number)
