"""Attributes, extended attributes and the size of the file system."""

from __future__ import annotations

import errno
import json
import os
import stat
import time
from pathlib import Path

import pyfuse3
import trio

from stratum import access_lists, clones, files, inode_counts, mount_names, quotas
from stratum.files import Attributes
from stratum.fuse.base import handler
from stratum.fuse.file_operations import FileOperations
from stratum.schema import Kind

CLONE = b"user.stratum.clone"
"""Set on a file, it names the file whose content this one shall show. It cannot be read."""


WHY = b"user.stratum.why"
"""Of a file: where it lies and why, as JSON. It is not listed and cannot be set."""
TRUSTED = b"trusted."
CAPABILITY = b"security.capability"
"""`negotiate.c` answers for it that there is none."""
CAP_SYS_ADMIN = 1 << 21


def check_name(name: bytes) -> None:
    """As xattr(7) has it and the kernel's own file systems answer."""
    if name in files.XATTR_NAMESPACES:
        raise pyfuse3.FUSEError(errno.EINVAL)
    if not files.is_attribute_name(name):
        raise pyfuse3.FUSEError(errno.EOPNOTSUPP)


def is_administrator(ctx: pyfuse3.RequestContext) -> bool:
    """Whether the process has CAP_SYS_ADMIN over the machine, and not only over a user namespace of its own. Slow: it reads /proc."""
    try:
        process = Path("/proc") / str(ctx.pid)
        if (process / "ns/user").readlink() != Path("/proc/self/ns/user").readlink():
            return False
        lines = (process / "status").read_text().splitlines()
        return bool(int(next(line for line in lines if line.startswith("CapEff:")).split()[1], 16) & CAP_SYS_ADMIN)
    except (OSError, StopIteration):  # another pid namespace, or a daemon that is not root
        return ctx.uid == 0


class AttributeOperations(FileOperations):
    """Handlers on inodes."""

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
        mode = attr.st_mode & 0o7777 if fields.update_mode else None
        if mode is not None and mode & stat.S_ISGID and not self._keeps_set_gid(inode, ctx):
            mode &= ~stat.S_ISGID
        wanted = Attributes(
            mode=mode,
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

    @handler
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        with self.interruptible():
            total, free, inodes = await trio.to_thread.run_sync(
                self._statistics, limiter=self._disk_readers, abandon_on_cancel=True
            )
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_blocks = total // 4096
        data.f_bfree = data.f_bavail = free // 4096
        data.f_files = free // 256 + inodes
        data.f_ffree = data.f_favail = free // 256
        data.f_namemax = mount_names.NAME_BYTES_MAX
        return data

    def _statistics(self) -> tuple[int, int, int]:
        """Of what is mounted: bytes in all, bytes free, inodes used."""
        total, free = self._disk_space()
        with self._volume.snapshot() as reader:
            return total, free, inode_counts.used(reader, None if self.root == pyfuse3.ROOT_INODE else self.root)

    def _disk_space(self) -> tuple[int, int]:
        """(bytes in all, bytes free) of the data disks, each counted once."""
        total = free = 0
        seen: set[int] = set()
        for folder in self._volume.segments.folders:
            device = folder.stat().st_dev
            if device not in seen:
                seen.add(device)
                disk = os.statvfs(folder)
                total += disk.f_blocks * disk.f_frsize
                free += max(0, disk.f_bavail * disk.f_frsize - self._volume.config.volume_free_bytes_min)
        if self.root != pyfuse3.ROOT_INODE:
            with self._volume.snapshot() as reader:
                _, left = quotas.room(reader, self.root)
                used = reader.usage_of(self.root)[1]
            if left != quotas.UNLIMITED:
                total, free = min(total, used + left), min(free, left)
        return total, free

    @handler
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        check_name(name)
        if access_lists.is_one(name) and not self._fresh(inode).flags & access_lists.FLAGS[name]:
            raise pyfuse3.FUSEError(errno.ENODATA)
        await self._settle_number(inode)
        if name == WHY:
            return await self._why(inode)
        with self._volume.snapshot() as reader:
            return files.get_attribute(reader, inode, name)

    async def _why(self, inode: int) -> bytes:
        explain = self._volume.explain
        if explain is None or self._fresh(inode).kind != Kind.FILE:
            raise pyfuse3.FUSEError(errno.ENODATA)
        with self.interruptible():
            document = await trio.to_thread.run_sync(explain, inode, limiter=self._disk_readers, abandon_on_cancel=True)
        return json.dumps(document, ensure_ascii=False).encode("utf-8", "replace")

    @handler
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> list[bytes]:
        await self._settle_number(inode)
        with self._volume.snapshot() as reader:
            names = files.list_attributes(reader, inode)
        if any(name.startswith(TRUSTED) for name in names) and not is_administrator(ctx):
            names = [name for name in names if not name.startswith(TRUSTED)]
        return names

    @handler
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext) -> None:
        check_name(name)
        if name == CAPABILITY:
            raise pyfuse3.FUSEError(errno.EOPNOTSUPP)
        await self._settle_number(inode)
        if name == WHY:
            raise pyfuse3.FUSEError(errno.EPERM)
        if name == CLONE:
            await self._clone(inode, value, ctx)
            return
        keeps = name != access_lists.ACCESS or self._keeps_set_gid(inode, ctx)
        await self.commit(lambda tx: files.set_attribute(tx, inode, name, value, keeps_set_gid=keeps))

    @handler
    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        check_name(name)
        await self._settle_number(inode)
        await self.commit(lambda tx: files.remove_attribute(tx, inode, name), frees=True)

    @handler
    async def access(self, inode: int, mode: int, ctx: pyfuse3.RequestContext) -> bool:
        return True  # default_permissions: the kernel checks

    async def _clone(self, number: int, path: bytes, ctx: pyfuse3.RequestContext) -> None:
        """Let a file show what the one at `path` (BUCKET/...) shows; the caller must be allowed to read that."""
        groups = {ctx.gid} if ctx.uid == 0 else self._groups(ctx)
        with self._volume.snapshot() as reader:
            found = clones.find_readable(reader, path, ctx.uid, groups)
        self._check_inside(found)
        source = found.number
        for inode in (source, number):
            state = self.open_files.state(inode)
            if state is not None:
                await self._flush(state)
        await self.commit(lambda tx: clones.replace_content(tx, source, number))
