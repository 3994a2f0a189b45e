"""Open files: reading, writing, and when what was written becomes durable."""

from __future__ import annotations

import errno
import os
import time
from functools import partial
from typing import TYPE_CHECKING, cast

import pyfuse3
import trio

from stratum import content, evidence, metrics, tree
from stratum.deadlines import Deadline
from stratum.descriptors import WouldRecall, WouldWait
from stratum.errors import NeedsRestore, StratumError
from stratum.fuse import _negotiate
from stratum.fuse.base import COMMIT_AFTER_S, FLUSHED_AT_ONCE, Base, handler
from stratum.log import get_logger
from stratum.read_ahead import Follower
from stratum.tier_rows import Tier
from stratum.write_buffer import SPILL_BYTES, truncate_now

if TYPE_CHECKING:
    from collections.abc import Callable

    from stratum.content import ReadPlan
    from stratum.fuse.open_files import FileHandle, FileState


log = get_logger("mount")
RESTORE_LOOK_S = 1.0
REFUSED_S = 0.5
"""How long after a read has waited in vain others of the same file wait for no remote."""


class FileOperations(Base):
    """Handlers on handles."""

    def _check_writable(self, number: int) -> None:
        """Before bytes are taken into a buffer that a snapshot would never let go."""
        with self._volume.snapshot() as reader:
            tree.check_writable(reader, self._fresh(number))

    async def _truncate(self, number: int, size: int, *, open_handle: bool) -> None:
        self._check_writable(number)
        state = self.open_files.state(number)
        if state is None:
            shrinks = size <= self._fresh(number).size
            await self.commit(lambda tx: truncate_now(tx, number, size).number, frees=shrinks)
            return
        async with state.lock:
            self._truncate_buffer(state, size)
        if not open_handle:
            await self._flush(state)

    def _truncate_buffer(self, state: FileState, size: int) -> None:
        """Under the file's lock."""
        self._check_growth(state, size)
        buffer = self.open_files.buffer(self._volume, state, self._fresh(state.number))
        self._mark_dirty(state)
        buffer.truncate(size, time.time_ns())

    def _check_growth(self, state: FileState, stop: int) -> None:
        """Raises `QuotaExceeded` if a file may not reach to `stop`."""
        if state.buffer is not None and state.dirty and stop <= state.buffer.size:
            return
        inode = self._fresh(state.number)
        before = state.buffer.size if state.buffer is not None and state.dirty else inode.size
        if stop > before:
            self._check_quota(inode.bucket, size=stop - before)

    def _mark_dirty(self, state: FileState) -> None:
        if not state.dirty:
            state.dirty_since = trio.current_time()
            assert state.buffer is not None
            state.buffer.size = self._fresh(state.number).size

    @handler
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        self._fresh(inode)
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        if writable:
            self._check_writable(inode)
        handle = self.open_files.open(inode, writable=writable, truncated=bool(flags & os.O_TRUNC))
        if flags & os.O_TRUNC:
            try:
                await self._truncate(inode, 0, open_handle=True)
            except BaseException:
                await self._close(handle)
                raise
        # A page that is being read is locked, and invalidation waits for it: a remote must not hold that up. And the kernel asks for whole
        # pages and what is behind them, of which the remote may be needed for a part that nobody wants.
        cold = not flags & os.O_TRUNC and self._is_cold(inode)
        return pyfuse3.FileInfo(fh=handle, keep_cache=not cold, direct_io=cold)

    def _is_cold(self, number: int) -> bool:
        """Whether some of a file's bytes may lie in the cold tier alone."""
        if self._fresh(number).partly_cold:
            return True
        with self._volume.snapshot() as reader:
            row = evidence.get(reader, number)
        return row is not None and row.tier == Tier.COLD

    @handler
    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Any contiguous buffer serves; the binding's types say bytes. Only bytes in memory are read in the loop."""
        handle = self.open_files.handles[fh]
        state = handle.state
        if handle.follower is not None:
            handle.follower.comes(off, off + size)
        metrics.FUSE_READ.add(amount=size)
        deadline: Deadline | None = None
        while True:
            with self._volume.reading():
                with self._volume.snapshot() as reader:
                    inode = state.pending.inode if state.pending is not None else reader.inode(state.number)
                    start, stop = off, max(off, min(off + size, inode.size))
                    if state.buffer is not None and state.dirty:
                        start, stop = state.buffer.not_covered(start, stop)
                    plan = content.plan_read(reader, inode, start, stop)
                try:
                    pieces = list(content.read_planned(self._volume, plan, start, stop, may_wait=False))
                    break
                except WouldWait:
                    deadline = deadline or self._deadline(state)
                    pieces = await self._read_waiting(handle, plan, start, stop, deadline)
            if self._fresh(state.number).version == inode.version and (start == off or state.dirty):
                break  # else what was written meanwhile may have left the buffer for the store
        if not handle.has_read:
            handle.has_read = True
            self._volume.evidence.read(state.number, size)
        buffer = state.buffer
        if buffer is None or not buffer.dirty:
            return cast("bytes", pieces[0]) if len(pieces) == 1 else b"".join(pieces)
        stop = max(off, min(off + size, buffer.size))
        base = bytearray(b"".join([bytes(start - off), *pieces])[: stop - off].ljust(stop - off, b"\0"))
        buffer.overlay(off, base)
        return cast("bytes", base)

    async def _read_waiting(
        self, handle: FileHandle, plan: ReadPlan, start: int, stop: int, deadline: Deadline
    ) -> list[bytes | memoryview]:
        """In a thread for disks; what a remote must send is waited for in others, so that it holds up nothing else.

        A thread that is given up at a signal goes on for a moment, and nobody takes what it finds.
        """

        def read(*, may_recall: bool) -> list[bytes | memoryview]:
            ahead = None
            if may_recall:
                if handle.follower is None:
                    handle.follower = Follower(self._volume)
                    handle.follower.comes(start, stop)
                ahead = handle.follower.ahead(plan.inode, start, stop)
            found = content.read_planned(
                self._volume, plan, start, stop, may_recall=may_recall, ahead=ahead, deadline=deadline
            )
            return list(found)

        async def in_thread(limiter: trio.CapacityLimiter, *, may_recall: bool) -> list[bytes | memoryview]:
            work = partial(read, may_recall=may_recall)
            return await trio.to_thread.run_sync(work, limiter=limiter, abandon_on_cancel=True)

        try:
            with self.interruptible():
                try:
                    return await in_thread(self._disk_readers, may_recall=False)
                except WouldRecall:
                    pass
                while True:
                    try:
                        return await in_thread(self._recalls, may_recall=True)
                    except NeedsRestore as error:
                        if deadline.passed:
                            log.warning("read_needs_restore", inode=plan.inode.number, error=error.message)
                            raise
                    await trio.sleep(min(RESTORE_LOOK_S, deadline.left_s + 0.001))
        except StratumError:
            if deadline.passed:
                handle.state.refused_at = trio.current_time()
            raise
        except BaseException:
            deadline.give_up()
            raise

    def _deadline(self, state: FileState) -> Deadline:
        """How long a read may wait for a remote.

        What the kernel cannot read into its cache for a whole range it asks for again at once, page by page; those reads have waited already.
        """
        waited = trio.current_time() - state.refused_at < REFUSED_S
        return Deadline(0.0 if waited else self._volume.config.cold_recall_s_max)

    @handler
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        state = self.open_files.handles[fh].state
        async with state.lock:
            if not self._volume.has_space():
                raise pyfuse3.FUSEError(errno.ENOSPC)
            buffer = state.buffer
            self._check_growth(state, off + len(buf))
            if buffer is None or not buffer.dirty:
                buffer = self.open_files.buffer(self._volume, state, self._fresh(state.number))
                self._mark_dirty(state)
            buffer.write(off, buf, time.time_ns())
            metrics.FUSE_WRITTEN.add(amount=len(buf))
            if buffer.memory_bytes >= SPILL_BYTES or (
                buffer.memory_bytes > 65536
                and self.open_files.dirty_bytes() > self._volume.config.mount_dirty_bytes_max
            ):
                await trio.to_thread.run_sync(buffer.spill)
        return len(buf)

    @handler
    async def flush(self, fh: int) -> None:
        """Of a close(2), which gives up what its process has locked, after others can see what it wrote."""
        owner = _negotiate.owner_of_flush()
        state = self.open_files.handles[fh].state
        try:
            await self._flush(state)
        finally:
            if self.locks is not None:
                self.locks.closed(state.number, owner)

    @handler
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._flush(self.open_files.handles[fh].state)

    @handler
    async def release(self, fh: int) -> None:
        try:
            await self._close(fh)
        finally:
            if self.locks is not None:
                self.locks.released(fh)

    async def _close(self, fh: int) -> None:
        state = self.open_files.close(fh).state
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

    async def flush_old(self, sign: Callable[[], None] = lambda: None, *, everything: bool = False) -> None:
        """Commit what has waited long enough (a mapping's stores arrive after the last flush).

        Many files share a transaction. `sign` is called after every so many: the work may take a while, and goes on.
        """
        now = trio.current_time()
        old = [
            state
            for state in self.open_files.files.values()
            if state.uncommitted and (everything or now - state.dirty_since >= COMMIT_AFTER_S)
        ]
        for at in range(0, len(old), FLUSHED_AT_ONCE):
            if at:
                sign()
            async with trio.open_nursery() as nursery:
                for state in old[at : at + FLUSHED_AT_ONCE]:
                    nursery.start_soon(self._flush_one, state)

    async def _flush_one(self, state: FileState) -> None:
        try:
            await self._flush(state)
            state.failure = ""
        except StratumError as error:
            if state.failure != error.message:
                log.error("write_back_failed", inode=state.number, error=error.message)
            state.failure = error.message
        if state.handles == 0:
            self.open_files.drop(state)
