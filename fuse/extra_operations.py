"""The handlers that the binding has no place for: parts of files, and files without a name.

They are handlers like all others; `answering` makes of a request that `extra_operations.c` hands over what pyfuse3 makes of its own.
"""

from __future__ import annotations

import errno
import os
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pyfuse3
import trio

from stratum import file_ranges, files
from stratum.errors import StratumError
from stratum.fuse import _negotiate
from stratum.fuse.attribute_operations import AttributeOperations
from stratum.fuse.base import handler
from stratum.write_buffer import FOREVER

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from stratum.fuse.open_files import FileState
    from stratum.volume import Volume

KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16
"""Modes of fallocate(2). The others are about blocks, which a file here has not."""
PAGE_DROPPERS_MAX = 8
"""Threads that wait for the kernel to let go of pages; of their own, since those may be locked until a thread that reads a disk is done."""


@dataclass(slots=True, frozen=True)
class Context:
    """Who sent a request: what `pyfuse3.RequestContext` says, which nobody else can make."""

    uid: int
    gid: int
    pid: int
    umask: int


class ExtraOperations(AttributeOperations):
    """Handlers on parts of files, and O_TMPFILE."""

    def __init__(
        self, volume: Volume, *, root: int = pyfuse3.ROOT_INODE, shared: bool = False, bucket: str = ""
    ) -> None:
        super().__init__(volume, root=root, shared=shared, bucket=bucket)
        self._page_droppers = trio.CapacityLimiter(PAGE_DROPPERS_MAX)

    @handler
    async def fallocate(self, fh: int, mode: int, offset: int, length: int) -> None:
        """Nothing is reserved: no write goes to where other bytes lie or lay. What would not fit now is refused now."""
        if mode & ~(KEEP_SIZE | PUNCH_HOLE | ZERO_RANGE):
            raise pyfuse3.FUSEError(errno.EOPNOTSUPP)
        state = self.open_files.handles[fh].state
        self._check_writable(state.number)
        if mode & (PUNCH_HOLE | ZERO_RANGE):
            await self._make_hole(state, offset, offset + length, grows=not mode & KEEP_SIZE)
            return
        await self._check_room(state, offset, offset + length)
        if not mode & KEEP_SIZE:
            async with state.lock:
                if offset + length > self._size(state):
                    self._truncate_buffer(state, offset + length)

    def _size(self, state: FileState) -> int:
        if state.buffer is not None and state.dirty:
            return state.buffer.size
        return self._fresh(state.number).size

    async def _check_room(self, state: FileState, start: int, stop: int) -> None:
        with self._volume.snapshot() as reader:
            inode = self._fresh(state.number)
            wanted = file_ranges.hole_bytes(reader, inode, start, stop)
        _, free = await trio.to_thread.run_sync(self._disk_space, limiter=self._disk_readers)
        if wanted > free:
            raise pyfuse3.FUSEError(errno.ENOSPC)

    async def _make_hole(self, state: FileState, start: int, stop: int, *, grows: bool) -> None:
        async with self._committed(state):
            if grows:
                self._check_growth(state, stop)
            await self.commit(
                lambda tx: file_ranges.make_hole(tx, state.number, start, stop, grows=grows).number, frees=not grows
            )

    @asynccontextmanager
    async def _committed(self, *states: FileState) -> AsyncIterator[None]:
        """Hold the locks of files that have nothing uncommitted. Raises EOPNOTSUPP for one that will never have a row."""
        async with AsyncExitStack() as stack:
            for state in sorted(set(states), key=lambda state: state.number):  # in the same order for everybody
                await stack.enter_async_context(state.lock)
            for state in states:
                if state.uncommitted:
                    await self._flush_locked(state)
                if state.pending is not None:
                    raise pyfuse3.FUSEError(errno.EOPNOTSUPP)
            yield

    @handler
    async def lseek(self, fh: int, offset: int, whence: int) -> int:
        state = self.open_files.handles[fh].state
        if state.writers:
            await self._take_mapped(state)
        buffer = state.buffer
        limit, unwritten = FOREVER, []
        if buffer is not None and buffer.dirty:
            limit, unwritten = buffer.base_limit, buffer.parts()
        size = self._size(state)
        if not 0 <= offset < size:
            raise pyfuse3.FUSEError(errno.ENXIO)

        def look() -> int | None:
            parts = file_ranges.parts_with_bytes(self._volume, state.number, offset, limit=limit, unwritten=unwritten)
            if whence == os.SEEK_DATA:
                return file_ranges.next_data(parts, offset, size)
            return file_ranges.next_hole(parts, offset, size)

        found = await trio.to_thread.run_sync(look, limiter=self._disk_readers)
        if found is None:
            raise pyfuse3.FUSEError(errno.ENXIO)
        return found

    async def _take_mapped(self, state: FileState) -> None:
        """Have the kernel write what was stored to a mapping and is only there yet: whoever skips holes must not skip that."""
        number = self.kernel_number(state.number)

        def drop() -> None:
            with suppress(FileNotFoundError):
                pyfuse3.invalidate_inode(number)

        await trio.to_thread.run_sync(drop, limiter=self._page_droppers)

    @handler
    async def copy_file_range(self, fh: int, offset: int, fh_to: int, offset_to: int, length: int) -> int:
        """Of what lies in many pieces a part at a time: a commit keeps others waiting."""
        source, target = (self.open_files.handles[handle].state for handle in (fh, fh_to))
        if not self._volume.has_space():
            raise pyfuse3.FUSEError(errno.ENOSPC)
        copied = 0
        async with self._committed(source, target):
            length = min(length, max(0, self._fresh(source.number).size - offset))
            self._check_growth(target, offset_to + length)
            while copied < length:
                rest = partial(
                    file_ranges.share, source=source.number, start=offset + copied, target=target.number, at=offset_to + copied,
                    length=length - copied,
                )  # fmt: skip
                try:
                    shared = await self.commit(rest)
                except StratumError:
                    if copied:
                        break
                    raise
                if not shared:
                    break
                copied += shared
        return copied

    @handler
    async def tmpfile(
        self, parent_inode: int, mode: int, flags: int, ctx: Context
    ) -> tuple[int, pyfuse3.EntryAttributes]:
        """A handle and its file, which this session holds: it goes with the last handle, or with the session."""
        if not self._volume.has_space():
            raise pyfuse3.FUSEError(errno.ENOSPC)
        caller = files.Caller(ctx.uid, ctx.gid, ctx.umask)
        number = await self.commit(lambda tx: files.make_nameless(tx, parent_inode, mode, caller).number)
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        handle = self.open_files.create_nameless(number, writable=writable)
        return handle, self._entry_now(number, b"")

    async def _link_first(self, state: FileState, parent: int, name: bytes) -> None:
        """Give a file that was made without a name its first one, under which it appears as a whole."""
        number = state.number
        await self._flush(state)
        self.open_files.linked(number)  # first: from now on nobody may take its bytes for lost
        try:
            await self.commit(lambda tx: files.link(tx, number, parent, name, first=True).number)
        except BaseException:
            state.nameless = state.linkable = True
            if not state.handles:
                self.add_orphan(number)
            raise


async def _fallocate(
    operations: ExtraOperations, request: object, fh: int, mode: int, offset: int, length: int
) -> None:
    await operations.fallocate(fh, mode, offset, length)
    _negotiate.refuse(request, 0)


async def _lseek(operations: ExtraOperations, request: object, fh: int, offset: int, whence: int) -> None:
    _negotiate.answer_offset(request, await operations.lseek(fh, offset, whence))


async def _copy_file_range(operations: ExtraOperations, request: object, wide: bool, *arguments: int) -> None:
    _negotiate.answer_copied(request, await operations.copy_file_range(*arguments), wide)


async def _tmpfile(
    operations: ExtraOperations,
    request: object,
    directory: int,
    mode: int,
    flags: int,
    caller: tuple[int, int, int, int],
) -> None:
    handle, entry = await operations.tmpfile(directory, mode, flags, Context(*caller))
    told = (
        entry.st_ino, entry.attr_timeout, entry.st_mode, entry.st_nlink, entry.st_uid, entry.st_gid, entry.st_rdev, entry.st_size,
        entry.st_blksize, entry.st_blocks, entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns,
    )  # fmt: skip
    if not _negotiate.answer_created(request, handle, told):
        operations.open_files.forget(entry.st_ino, 1)  # the kernel gave up waiting: nobody has it
        await operations.release(handle)


ANSWERS: dict[str, Callable[..., Coroutine[Any, Any, None]]] = {
    "fallocate": _fallocate,
    "lseek": _lseek,
    "copy_file_range": _copy_file_range,
    "tmpfile": _tmpfile,
}  # fmt: skip
