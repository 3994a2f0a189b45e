"""Data files. A *segment* is an append-only file on a hot path; an *extent* is an immutable run of bytes in one.

Invariants
* No byte that a committed extent covers is ever overwritten or moved inside its segment.
* Bytes are durable (fdatasync, and the folder of a new file fsynced) before an extent naming them can be committed.
* A segment is written only by the session in its number (session << 32 | counter) and lies in that session's folder, so
  whatever a dead session wrote and did not commit can be found by name.
* Every read verifies the checksum of each block it touches.

Extents up to SHARED_BYTES_MAX are packed into one segment a process, and many writers share one fdatasync (measured on ext4:
154 us shared, against 461 us for create + fdatasync + fsync of the folder). Larger ones get a file of their own.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import xxhash

from stratum import metrics
from stratum.blocks import BLOCK_BYTES, blocks_match, checksum
from stratum.descriptors import Descriptors, read_cached
from stratum.errors import DataDamaged, NoSpace, StorageFailed, StratumError
from stratum.schema import ELSEWHERE_SEGMENT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

    from stratum.relief import Relief
    from stratum.tier_rows import PackRow

EXTENT_BYTES_MAX = 64 * 1024 * 1024
SHARED_BYTES_MAX = 4 * 1024 * 1024
SEGMENT_BYTES_MAX = 64 * 1024 * 1024
DIVERTED_BYTES_MAX = 16 * 1024 * 1024
"""Of an extent that goes to the warm tier straight away: it is held in memory until it is whole."""
ALIGNMENT_BYTES = 4096  # holes are punched in whole pages
_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


@dataclass(slots=True, frozen=True)
class PreparedExtent:
    """Durable bytes that no row names yet."""

    number: int
    segment: int
    path: int
    offset: int
    length: int
    checksums: bytes
    private: bool
    copy: tuple[int, PackRow] | None = None
    """(pack, row) of an extent that was written to the warm tier: it lies in no segment."""


def punch_hole(fd: int, offset: int, length: int) -> bool:
    """Give pages back to the filesystem; False if it cannot."""
    if _libc.fallocate(fd, _PUNCH_HOLE_KEEP_SIZE, offset, length) == 0:
        return True
    error = ctypes.get_errno()
    if error in {errno.EOPNOTSUPP, errno.ENOSYS}:
        return False
    raise OSError(error, os.strerror(error))


def fsync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class _SegmentFile:
    """An open segment being appended to. `users` counts writers that have not yet committed or discarded their range.

    The descriptor carries an flock for as long as anybody may still commit bytes in this file: who can take that lock knows
    that the file will never gain another extent, and may remove it when it has none.
    """

    def __init__(self, number: int, path: int, fd: int, *, private: bool) -> None:
        self.number = number
        self.path = path
        self.fd = fd
        self.private = private
        self.end = 0
        self.users = 0
        self.retired = private
        self._sync_lock = threading.Lock()
        self._started = 0
        self._finished = 0
        self._broken = False

    def sync(self) -> None:
        """Durable for everything written before the call: run a sync, or join one that started after it."""
        needed = self._started + 1
        with self._sync_lock:
            if self._broken:
                raise OSError(errno.EIO, "an earlier sync of this file failed")
            if self._finished >= needed:
                return
            self._started += 1
            self._broken = True
            began = time.perf_counter()
            os.fdatasync(self.fd)
            metrics.SYNC_SECONDS.observe(time.perf_counter() - began)
            self._broken = False
            self._finished = self._started


class ExtentWriter:
    """Bytes on their way to one or more extents.

        with segments.writer(size) as writer:
            writer.write(data)
            extents = writer.finish()
            writer.committing()
            ...the mutation that adds them...
            writer.keep()

    Leaving the block without `keep` gives the bytes back, unless it cannot be known whether the commit happened: then
    `gc` decides. `size_hint` is the whole length if it is known; small ones share a segment.
    Raises `NoSpace` when the disk is full and `StorageFailed` when it does not sync.
    """

    def __init__(self, segments: SegmentStore, size_hint: int | None, relief: Relief | None) -> None:
        self._segments = segments
        self._relief = relief
        self._hint = size_hint
        self._files: list[_SegmentFile] = []
        self._file: _SegmentFile | None = None
        self._offset = 0
        self._room = 0
        self._length = 0
        self._sums: list[bytes] = []
        self._hasher = xxhash.xxh3_128()
        self._in_block = 0
        self._state = "open"
        self._diverted: bytearray | None = None
        self.extents: list[PreparedExtent] = []
        self.size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        unknown = self._state == "committing" and (
            not isinstance(error, StratumError) or isinstance(error, StorageFailed)
        )
        try:
            if self._state != "kept" and not unknown:
                self._discard()
        finally:
            for file in self._files:
                self._segments.release(file)
            self._files = []

    def committing(self) -> None:
        self._state = "committing"

    def keep(self) -> None:
        self._state = "kept"

    def reopen(self) -> None:
        """The commit failed and will be tried again."""
        self._state = "open"

    def close(self) -> None:
        self.__exit__(None, None, None)

    def _begin(self) -> None:
        self._length = 0
        self._sums = []
        if self._relief is not None and self._relief.divert():
            self._diverted, self._room = bytearray(), DIVERTED_BYTES_MAX
            return
        shared = self._hint is not None and self._hint <= SHARED_BYTES_MAX
        try:
            if shared and not self.extents:
                assert self._hint is not None
                self._file, self._offset = self._segments.reserve(self._hint)
                self._room = self._hint
            else:
                self._file, self._offset = self._segments.create(private=True), 0
                self._room = EXTENT_BYTES_MAX
        except OSError as error:
            raise self._segments.translate(error) from error
        self._files.append(self._file)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data)
        if self._relief is not None and self._diverted is None:
            self._relief.pause(len(view))
        while view:
            if self._file is None and self._diverted is None:
                self._begin()
            piece = view[: self._room - self._length]
            self._store(piece)
            self._add_checksums(piece)
            self._length += len(piece)
            self.size += len(piece)
            view = view[len(piece) :]
            if self._length == self._room:
                self._end_extent()

    def _store(self, piece: memoryview) -> None:
        if self._diverted is not None:
            self._diverted += piece
            return
        assert self._file is not None
        try:
            done = 0
            while done < len(piece):
                done += os.pwrite(self._file.fd, piece[done:], self._offset + self._length + done)
        except OSError as error:
            raise self._segments.translate(error) from error

    def _add_checksums(self, piece: memoryview) -> None:
        at = 0
        if self._in_block:
            at = min(BLOCK_BYTES - self._in_block, len(piece))
            self._hasher.update(piece[:at])
            self._in_block += at
            if self._in_block == BLOCK_BYTES:
                self._end_block()
        while len(piece) - at >= BLOCK_BYTES:
            self._sums.append(checksum(piece[at : at + BLOCK_BYTES]))
            at += BLOCK_BYTES
        if at < len(piece):
            self._hasher.update(piece[at:])
            self._in_block = len(piece) - at

    def _end_block(self) -> None:
        self._sums.append(self._hasher.digest())
        self._hasher.reset()
        self._in_block = 0

    def _end_extent(self) -> None:
        file = self._file
        if file is None and self._diverted is None:
            return
        if self._in_block:
            self._end_block()
        number = self._segments.new_id()
        if self._diverted is not None:
            assert self._relief is not None
            copy = self._relief.write(number, bytes(self._diverted))
            self._diverted = None
            sums = b"".join(self._sums)
            self.extents.append(PreparedExtent(number, ELSEWHERE_SEGMENT, 0, 0, self._length, sums, False, copy))
            return
        assert file is not None
        self.extents.append(
            PreparedExtent(
                number, file.number, file.path, self._offset, self._length, b"".join(self._sums), file.private
            )
        )
        self._file = None
        if file.private:
            # Nobody looks at a private file before its extent is committed, so its descriptor need not wait for that.
            self._segments.sync([file])
            self._files.remove(file)
            self._segments.release(file)

    def seal(self) -> list[PreparedExtent]:
        """End the extent; what lies in the shared segment is not durable before `SegmentStore.sync_writers`."""
        self._end_extent()
        return self.extents

    def finish(self) -> list[PreparedExtent]:
        """The durable extents, in order."""
        self._end_extent()
        self._segments.sync(self._files)
        return self.extents

    @property
    def unsynced(self) -> list[_SegmentFile]:
        return self._files

    def _discard(self) -> None:
        if self._file is not None:
            self.extents.append(
                PreparedExtent(
                    0, self._file.number, self._file.path, self._offset, max(self._length, 1), b"", self._file.private
                )
            )
            self._file = None
        self._diverted = None
        for prepared in self.extents:
            if prepared.copy is not None:
                assert self._relief is not None
                self._relief.discard(prepared.copy[0])
                continue
            self._segments.free(prepared.segment, prepared.offset, prepared.length, whole=prepared.private)
        self.extents = []


class SegmentStore:
    """The data folders of a volume as one process sees them."""

    def __init__(
        self,
        folders: list[Path],
        session: int,
        new_id: Callable[[], int],
        *,
        on_failure: Callable[[BaseException], None],
        descriptors_max: int = 256,
    ) -> None:
        self.folders = folders
        self.session = session
        self.new_id = new_id
        self._on_failure = on_failure
        self.relief: Relief | None = None
        """What to do while the disks fill; None for one that only reads."""
        self._lock = threading.Lock()
        self._shared: _SegmentFile | None = None
        self._readers = Descriptors(descriptors_max)
        self._made_folders: set[Path] = set()

    # -- names --------------------------------------------------------------------------------------------------------

    def file_name(self, segment: int, path: int) -> Path:
        counter = segment & 0xFFFFFFFF
        return self.folders[path] / f"{segment >> 32:08x}" / f"{counter >> 12:05x}" / f"{segment:016x}.segment"

    def find(self, segment: int) -> Path:
        """The file of a segment, whichever path it lies on."""
        for path in range(len(self.folders)):
            name = self.file_name(segment, path)
            if name.exists():
                return name
        return self.file_name(segment, 0)

    # -- errors -------------------------------------------------------------------------------------------------------

    def failed(self, error: OSError) -> StorageFailed:
        """A sync failed: what the kernel dropped cannot be known, so this process must end."""
        failure = StorageFailed(f"a data disk did not sync ({error}); look at the disk, then restart")
        self._on_failure(failure)
        return failure

    def translate(self, error: OSError) -> NoSpace | StorageFailed:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            return NoSpace("the data disks are full; nothing was stored; delete something, then try again")
        return StorageFailed(f"a data disk failed ({error}); look at the disk")

    # -- writing ------------------------------------------------------------------------------------------------------

    def writer(self, size_hint: int | None, *, hot_only: bool = False) -> ExtentWriter:
        """`hot_only`: what moves bytes to the hot tier neither waits for the mover nor writes elsewhere."""
        return ExtentWriter(self, size_hint, None if hot_only else self.relief)

    def _emptiest(self) -> int:
        if len(self.folders) == 1:
            return 0

        def free(path: int) -> int:
            stat = os.statvfs(self.folders[path])
            return stat.f_bavail * stat.f_frsize

        return max(range(len(self.folders)), key=free)

    def create(self, *, private: bool) -> _SegmentFile:
        """A new segment file whose name is durable, with one user."""
        number, path = self.new_id(), self._emptiest()
        name = self.file_name(number, path)
        folder = name.parent
        if folder not in self._made_folders:
            for made in (folder.parent, folder):  # never the disk itself: it may not be mounted
                made.mkdir(exist_ok=True, mode=0o700)
            fsync_folder(folder.parent.parent)
            fsync_folder(folder.parent)
            self._made_folders.add(folder)
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file = _SegmentFile(number, path, fd, private=private)
        file.users = 1
        try:
            fsync_folder(folder)
        except OSError as error:
            os.close(fd)
            raise self.failed(error) from error
        return file

    def reserve(self, length: int) -> tuple[_SegmentFile, int]:
        """A range of `length` bytes in the shared segment; the caller must `release` the file."""
        with self._lock:
            file = self._shared
            if file is not None and file.end + length > SEGMENT_BYTES_MAX:
                self._retire(file)
                file = None
            if file is None:
                file = self.create(private=False)
                file.users = 0
                self._shared = file
            offset = file.end
            file.end += -(-length // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            file.users += 1
            return file, offset

    def sync(self, files: list[_SegmentFile]) -> None:
        """Raises `StorageFailed`."""
        for file in files:
            try:
                file.sync()
            except OSError as error:
                raise self.failed(error) from error

    def sync_writers(self, writers: list[ExtentWriter]) -> None:
        """Make everything sealed writers hold durable, with one sync a file."""
        self.sync(list({file.number: file for writer in writers for file in writer.unsynced}.values()))

    def _retire(self, file: _SegmentFile) -> None:
        self._shared = None
        file.retired = True
        if file.users == 0:
            os.close(file.fd)

    def release(self, file: _SegmentFile) -> None:
        with self._lock:
            file.users -= 1
            if file.users == 0 and file.retired:
                os.close(file.fd)

    def free(self, segment: int, offset: int, length: int, *, whole: bool) -> None:
        """Give back a range, or the whole file. Idempotent: a range is never used again."""
        name = self.find(segment)
        try:
            if whole:
                name.unlink()
                return
            fd = os.open(name, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            punch_hole(fd, offset, -(-length // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)
        finally:
            os.close(fd)

    def remove_if_unused(self, segment: int, still_unused: Callable[[], bool]) -> bool:
        """Unlink a file that can gain no extent any more, if `still_unused` says it has none."""
        name = self.find(segment)
        try:
            fd = os.open(name, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return still_unused()
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        else:
            if not still_unused():
                return False
            name.unlink(missing_ok=True)  # who gives back in another process may have been quicker
            return True
        finally:
            os.close(fd)

    # -- reading ------------------------------------------------------------------------------------------------------

    def read(
        self,
        extent: int,
        segment: int,
        offset: int,
        length: int,
        checksums: bytes,
        start: int,
        stop: int,
        *,
        may_wait: bool = True,
    ) -> bytes | memoryview:
        """Bytes [start, stop) of an extent that lies at `offset` of `segment`, each block verified.

        Raises `DataDamaged`, also when the file is shorter or gone, and `WouldWait` if it may not wait for a disk but had to.
        """
        first = start // BLOCK_BYTES * BLOCK_BYTES
        last = min(-(-stop // BLOCK_BYTES) * BLOCK_BYTES, length)
        try:
            with self._readers.use(segment, lambda: self.find(segment), may_wait=may_wait) as fd:
                read = os.pread if may_wait else read_cached
                data = read(fd, last - first, offset + first)
        except FileNotFoundError as error:
            raise DataDamaged(f"extent {extent:016x} (its file is gone)", str(self.find(segment))) from error
        except OSError as error:
            raise DataDamaged(f"extent {extent:016x} ({error})", str(self.find(segment))) from error
        if len(data) != last - first or not blocks_match(data, checksums, first):
            raise DataDamaged(f"extent {extent:016x}", f"{self.find(segment)} at {offset + first}")
        return data if (start, stop) == (first, last) else memoryview(data)[start - first : stop - first]

    def close(self) -> None:
        self._readers.close()
        with self._lock:
            if self._shared is not None:
                self._retire(self._shared)

    def session_folders(self, session: int) -> list[Path]:
        return [folder / f"{session:08x}" for folder in self.folders if (folder / f"{session:08x}").is_dir()]
