"""The warm tier: packs as k+m shards on as many disks.

Invariants
* A shard file is complete and durable under its name, or not there: it is written under another name and renamed.
* `read` returns what the disks say, unverified, because the caller has the extents' own checksums; `recover` believes only
  shards whose head and blocks match.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import itertools
import json
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from stratum import erasure, packs
from stratum.blocks import BLOCK_BYTES, block_checksums
from stratum.courtesy import AT_FULL_SPEED
from stratum.descriptors import Descriptors, read_cached
from stratum.erasure import ShardHead, ShardInvalid
from stratum.errors import DataDamaged, InvalidArgument, TierUnavailable
from stratum.log import get_logger
from stratum.schema import key_u64
from stratum.segments import fsync_folder
from stratum.tier_rows import DiskRow
from stratum.warm_disks import MARKER, disks, prepare_folder, set_disk, shard_name, write_marker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from stratum.courtesy import Courtesy
    from stratum.tier_rows import PackRow
    from stratum.transaction import InodeReader, MetadataTransaction
    from stratum.volume import Volume

log = get_logger("warm")
COLUMN_BYTES = 1024 * 1024
"""Of each shard at a time when a pack is checked or rebuilt."""
FREE_BYTES_MIN = 64 * 1024 * 1024
_COUNTER = itertools.count()
_SYNC_RANGE = 1 | 2 | 4  # SYNC_FILE_RANGE_WAIT_BEFORE, _WRITE and _WAIT_AFTER
_libc = ctypes.CDLL(None, use_errno=True)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


def _write_through(fd: int, view: memoryview) -> None:
    """Write at the end of a file and start the disk on it; what is durable is for fsync(2) to say."""
    start = os.lseek(fd, 0, os.SEEK_CUR)
    size = len(view)
    while view:
        view = view[os.write(fd, view) :]
    _libc.sync_file_range(fd, start, size, _SYNC_RANGE)


def code_of(text: str) -> tuple[int, int] | None:
    """The configured code; None without a warm tier."""
    return erasure.parse_code(text) if text else None


class WarmStore:
    """The disks of the warm tier as one process sees them."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._shards = Descriptors(256)
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._folders: set[Path] = set()
        self.reconstructed = 0
        """Reads that needed shards they should not have needed."""

    # -- disks --------------------------------------------------------------------------------------------------------

    def is_present(self, number: int, row: DiskRow) -> bool:
        """Whether the disk is there and is the right one."""
        try:
            marker = json.loads((Path(row.path) / MARKER).read_bytes())
        except (OSError, ValueError):
            return False
        return bool(marker == {"volume": self._volume.instance, "disk": number})

    def present(self) -> dict[int, DiskRow]:
        with self._volume.snapshot() as reader:
            rows = disks(reader)
        return {number: row for number, row in rows.items() if row.state != "replaced" and self.is_present(number, row)}

    def add(self, path: Path, *, create: bool = False) -> int:
        """Raises `InvalidArgument` or `OSError`."""
        with self._volume.snapshot() as reader:
            taken = [row.path for row in disks(reader).values() if row.state != "replaced"]
        if str(path) in taken:
            raise InvalidArgument(f"{path} is a disk of the warm tier already")
        from stratum import roles  # which imports what imports the volume

        roles.refuse_folder(self._volume, "the disk", path)
        number = self._volume.new_id()
        prepare_folder(path, self._volume.instance, number, create=create)
        self._volume.mutate(lambda tx: set_disk(tx, number, DiskRow(str(path), int(time.time()))))
        return number

    def take_up(self, path: Path) -> int:
        """Use a disk that this volume had before its metadata was lost. It gets another number, so that whoever still has the old metadata finds
        it gone and does not write there. What lies on it is not looked at. Raises `OSError`.
        """
        number = self._volume.new_id()
        self._volume.mutate(lambda tx: set_disk(tx, number, DiskRow(str(path), int(time.time()))))
        write_marker(path, self._volume.instance, number)
        return number

    def room(self) -> int:
        """Bytes of packs that still fit; 0 without a usable warm tier."""
        code = code_of(self._volume.config.volume_ec)
        if code is None:
            return 0
        k, m = code
        free = sorted((self._free(row) for row in self.present().values() if row.state == "active"), reverse=True)
        # As many shards as there must be; those of the fullest disk in use decide.
        if len(free) < k:
            return 0
        return max(free[: k + m][-1] if len(free) >= k + m else free[-1], 0) * k

    @staticmethod
    def _free(row: DiskRow) -> int:
        stat = os.statvfs(row.path)
        return stat.f_bavail * stat.f_frsize - FREE_BYTES_MIN

    def _choose(self, number: int, k: int, m: int) -> list[int]:
        """A disk for each shard, 0 where there is none. Raises `TierUnavailable` with fewer than k."""
        rows = {disk: row for disk, row in self.present().items() if row.state == "active"}
        free = {disk: self._free(row) for disk, row in rows.items()}
        usable = sorted((disk for disk in rows if free[disk] > 0), key=lambda disk: -free[disk])[: k + m]
        if len(usable) < k:
            raise TierUnavailable(
                f"the warm tier has {len(usable)} usable disks and a pack needs {k}; see `stratum disk list`, add or free some"
            )
        usable.sort()
        turn = number % len(usable)
        chosen = usable[turn:] + usable[:turn]
        return chosen + [0] * (k + m - len(chosen))

    def shard_path(self, disk: int, number: int, index: int, reader: InodeReader | None = None) -> Path:
        """Raises `FileNotFoundError` for a disk that is no more."""
        key = key_u64(b"d", disk)
        if reader is not None:
            raw = reader.get(key)
        else:
            with self._volume.snapshot() as found:
                raw = found.get(key)
        if raw is None:
            raise FileNotFoundError(f"disk {disk:#x} has no row")
        return Path(DiskRow.decode(raw).path) / shard_name(number, index)

    # -- writing ------------------------------------------------------------------------------------------------------

    def plan(self, number: int, row: PackRow) -> None:
        """Decide where the shards of a pack will lie. Raises `TierUnavailable`."""
        code = code_of(self._volume.config.volume_ec)
        if code is None:
            raise TierUnavailable("the volume has no warm tier; `stratum init --warm DIR --ec K+M` makes one")
        row.k, row.m = code
        row.shard_bytes = erasure.shard_bytes(row.length, row.k)
        row.disks = self._choose(number, row.k, row.m)

    def write(
        self,
        number: int,
        row: PackRow,
        data: bytes | memoryview,
        members: list[tuple[int, int, int]],
        courtesy: Courtesy = AT_FULL_SPEED,
    ) -> None:
        """Write the shards of a planned pack, durably. Up to m may fail: their disks become 0 in `row`.

        Raises `TierUnavailable`.
        """
        columns = erasure.split(data, row.k)
        parity: list[list[bytes]] = [[] for _ in range(row.m)]
        for at in range(0, row.shard_bytes, COLUMN_BYTES):
            with courtesy.piece():
                made = erasure.parity([memoryview(column)[at : at + COLUMN_BYTES] for column in columns], row.m)
            for pieces, piece in zip(parity, made, strict=True):
                pieces.append(piece)
        columns += [b"".join(pieces) for pieces in parity]

        def write_one(index: int) -> OSError | None:
            if not row.disks[index]:
                return None
            head = ShardHead(
                row.k,
                row.m,
                index,
                number,
                len(data),
                row.shard_bytes,
                block_checksums(columns[index]),
                tuple(members),
            )
            row.head_bytes = head.data_offset
            try:
                path = self.shard_path(row.disks[index], number, index)
                self._write_file(path, [head.encode(), columns[index]], courtesy)
            except OSError as error:
                return error
            return None

        errors = [
            (index, error) for index, error in enumerate(self._parallel(write_one, range(row.k + row.m))) if error
        ]
        row.disks = list(row.disks)
        for index, error in errors:
            log.warning("shard_not_written", pack=f"{number:016x}", index=index, error=str(error))
            row.disks[index] = 0
        written = sum(1 for disk in row.disks if disk)
        if written < row.k:
            raise TierUnavailable(
                f"only {written} of {row.k + row.m} shards could be written: {errors[0][1]}; look at the disks"
            )

    def _parallel(self, function: Callable[[int], OSError | None], indexes: Iterable[int]) -> list[OSError | None]:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(8, thread_name_prefix="warm")
        return list(self._pool.map(function, indexes))

    @staticmethod
    def _make_folder(folder: Path) -> None:
        """Below a disk that is there: what stands at its path without its marker is the disk above it. Raises `OSError`."""
        disk = folder.parent.parent.parent
        if not (disk / MARKER).exists():
            raise FileNotFoundError(errno.ENOENT, "the disk is not mounted", str(disk / MARKER))
        for made in (folder.parent.parent, folder.parent, folder):
            made.mkdir(exist_ok=True, mode=0o700)
            fsync_folder(made.parent)

    def _write_file(self, path: Path, pieces: list[bytes | memoryview], courtesy: Courtesy = AT_FULL_SPEED) -> None:
        folder = path.parent
        if folder not in self._folders:
            if not folder.exists():
                self._make_folder(folder)
            self._folders.add(folder)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.{next(_COUNTER)}.new")
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                for piece in pieces:
                    view = memoryview(piece)
                    while view:
                        length = courtesy.window_bytes
                        with courtesy.piece():
                            _write_through(fd, view[:length])
                        view = view[length:]
                with courtesy.piece():
                    os.fsync(fd)
            finally:
                os.close(fd)
            temporary.rename(path)
            fsync_folder(folder)
        except BaseException:
            self._folders.discard(folder)
            temporary.unlink(missing_ok=True)
            raise

    # -- reading ------------------------------------------------------------------------------------------------------

    def read(self, number: int, row: PackRow, start: int, stop: int, *, may_wait: bool = True) -> bytes:
        """Bytes [start, stop) of a pack as its data shards have them, short if one is; unverified.

        Raises `OSError` if a shard cannot be read, and `WouldWait`.
        """
        pieces = []
        while start < stop:
            index, inside = divmod(start, row.shard_bytes)
            count = min(stop - start, row.shard_bytes - inside)
            pieces.append(self._read_shard(number, row, index, row.head_bytes + inside, count, may_wait=may_wait))
            start += count
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _read_shard(
        self, number: int, row: PackRow, index: int, offset: int, count: int, *, may_wait: bool = True
    ) -> bytes:
        disk = row.disks[index]
        if not disk:
            raise FileNotFoundError(f"shard {index} was not written")
        with self._shards.use(
            (number, index, disk), lambda: self.shard_path(disk, number, index), may_wait=may_wait
        ) as fd:
            return os.pread(fd, count, offset) if may_wait else read_cached(fd, count, offset)

    def _head(self, number: int, row: PackRow, index: int) -> ShardHead:
        """Raises `OSError` or `ShardInvalid`."""
        raw = self._read_shard(number, row, index, 0, max(row.head_bytes, erasure.PAGE_BYTES))
        head = erasure.parse_head(raw)
        head.expect(number, index, row.k, row.m)
        return head

    def forget_descriptors(self, number: int, row: PackRow) -> None:
        """The next read opens the shards anew."""
        for index, disk in enumerate(row.disks):
            self._shards.drop((number, index, disk))

    def good_heads(self, number: int, row: PackRow) -> tuple[dict[int, ShardHead], dict[int, str]]:
        """(heads of shards that look right, what is wrong with the others) by index."""
        good: dict[int, ShardHead] = {}
        bad: dict[int, str] = {}
        for index in range(row.k + row.m):
            try:
                good[index] = self._head(number, row, index)
            except (OSError, ShardInvalid) as error:
                bad[index] = str(error)
        return good, bad

    def columns(
        self,
        number: int,
        row: PackRow,
        heads: dict[int, ShardHead],
        start: int,
        stop: int,
        wanted: int,
        bad: dict[int, str],
    ) -> dict[int, bytes]:
        """Verified bytes [start, stop), in whole blocks, of up to `wanted` shards; what fails moves from `heads` to `bad`."""
        found: dict[int, bytes] = {}
        for index in sorted(heads):
            if len(found) >= wanted:
                break
            try:
                column = self._read_shard(number, row, index, row.head_bytes + start, stop - start)
            except OSError as error:
                bad[index] = str(error)
                del heads[index]
                continue
            if len(column) == stop - start and heads[index].verify(column, start):
                found[index] = column
            else:
                bad[index] = "its bytes do not match their checksums"
                del heads[index]
        return found

    def recover(self, number: int, row: PackRow, start: int, stop: int, what: str) -> tuple[bytes, dict[int, str]]:
        """Bytes [start, stop) from any k good shards, and what is wrong with which others.

        Raises `DataDamaged` naming `what` and the paths if fewer than k are good.
        """
        self.forget_descriptors(number, row)
        self.reconstructed += 1
        heads, bad = self.good_heads(number, row)
        if len(heads) < row.k:
            raise DataDamaged(
                f"{what} (pack {number:016x}: {len(heads)} good shards, {row.k} are needed)",
                self.describe(number, row, bad),
                pack=number,
            )
        pieces = []
        while start < stop:
            index, inside = divmod(start, row.shard_bytes)
            count = min(stop - start, row.shard_bytes - inside)
            first = inside // BLOCK_BYTES * BLOCK_BYTES
            last = min(-(-(inside + count) // BLOCK_BYTES) * BLOCK_BYTES, row.shard_bytes)
            column = self._column(number, row, index, first, last, heads, bad, what)
            pieces.append(column[inside - first : inside - first + count])
            start += count
        return b"".join(pieces), bad

    def _column(
        self, number: int, row: PackRow, index: int, first: int, last: int, heads: dict[int, ShardHead], bad: dict[int, str], what: str
    ) -> bytes:  # fmt: skip
        if index in heads:
            own = self.columns(number, row, {index: heads[index]}, first, last, 1, bad)
            if own:
                return own[index]
            heads.pop(index, None)
        found = self.columns(number, row, heads, first, last, row.k, bad)
        if len(found) < row.k:
            raise DataDamaged(
                f"{what} (pack {number:016x}: {len(found)} good shards, {row.k} are needed)",
                self.describe(number, row, bad),
            )
        return erasure.reconstruct(dict(found), row.k, row.m, [index])[0]

    def describe(self, number: int, row: PackRow, bad: dict[int, str]) -> str:
        """Which paths are wrong, and how."""
        parts = []
        for index, why in sorted(bad.items()):
            try:
                where = str(self.shard_path(row.disks[index], number, index))
            except FileNotFoundError:
                where = f"shard {index}"
            parts.append(f"{where}: {why}")
        return "; ".join(parts)

    def verify(self, number: int, row: PackRow, courtesy: Courtesy = AT_FULL_SPEED) -> None:
        """Decode the pack from a random choice of k shards and compare its digest. Raises `DataDamaged` or `OSError`."""
        heads, bad = self.good_heads(number, row)
        for index in random.sample(sorted(heads), max(len(heads) - row.k, 0)):
            del heads[index]
        digest = hashlib.sha256()
        left = row.length
        for index in range(row.k):
            for at in range(0, row.shard_bytes, COLUMN_BYTES):
                stop = min(at + COLUMN_BYTES, row.shard_bytes)
                with courtesy.piece():
                    column = self._column(number, row, index, at, stop, heads, bad, f"the new pack {number:016x}")
                    digest.update(column[:left])
                left -= min(len(column), left)
                if not left:
                    break
        if digest.hexdigest() != row.digest:
            raise DataDamaged(f"the new pack {number:016x}", self.describe(number, row, bad))

    # -- healing ------------------------------------------------------------------------------------------------------

    def examine(self, number: int, row: PackRow) -> dict[int, str]:
        """Read every byte of every shard; what is wrong by index."""
        self.forget_descriptors(number, row)
        heads, bad = self.good_heads(number, row)
        for at in range(0, row.shard_bytes, COLUMN_BYTES):
            self.columns(number, row, heads, at, min(at + COLUMN_BYTES, row.shard_bytes), row.k + row.m, bad)
        return bad

    def rebuild(self, number: int, row: PackRow, targets: dict[int, int]) -> None:
        """Write shards `index -> disk` anew from the good ones; the caller then commits where they lie.

        Raises `DataDamaged` with fewer than k good shards, and `OSError` if a target cannot be written.
        """
        self.forget_descriptors(number, row)
        heads, bad = self.good_heads(number, row)
        sources = {
            index: head for index, head in heads.items() if index not in targets or row.disks[index] != targets[index]
        }
        columns: dict[int, list[bytes]] = {index: [] for index in targets}
        members = next((head.members for head in heads.values()), ())
        for at in range(0, row.shard_bytes, COLUMN_BYTES):
            stop = min(at + COLUMN_BYTES, row.shard_bytes)
            found = self.columns(number, row, sources, at, stop, row.k, bad)
            if len(found) < row.k:
                raise DataDamaged(
                    f"pack {number:016x} ({len(found)} good shards, {row.k} are needed)",
                    self.describe(number, row, bad),
                )
            made = erasure.reconstruct(dict(found), row.k, row.m, list(targets))
            for index, piece in zip(targets, made, strict=True):
                columns[index].append(piece)
        for index, disk in targets.items():
            data = b"".join(columns.pop(index))
            head = ShardHead(row.k, row.m, index, number, row.length, row.shard_bytes, block_checksums(data), members)
            assert head.data_offset == row.head_bytes, "the head of a rebuilt shard is as long as the others"
            self._write_file(self.shard_path(disk, number, index), [head.encode(), data])
            self._shards.drop((number, index, disk))

    def delete(self, number: int, row: PackRow) -> None:
        """Remove what there is of a pack on the disks that are there. Raises `OSError` if a disk refuses."""
        self.forget_descriptors(number, row)
        for index, disk in enumerate(row.disks):
            if disk:
                try:
                    path = self.shard_path(disk, number, index)
                except FileNotFoundError:
                    continue
                path.unlink(missing_ok=True)
                for unfinished in path.parent.glob(f"{path.name}.*.new"):
                    unfinished.unlink(missing_ok=True)

    def close(self) -> None:
        self._shards.close()
        with self._lock:
            if self._pool is not None:
                self._pool.shutdown()
                self._pool = None


def note_damage(tx: MetadataTransaction, number: int, why: str) -> None:
    """Queue a pack for repair, if it is not queued."""
    if tx.get(key_u64(b"h", number)) is None:
        packs.want_repair(tx, number, why)
