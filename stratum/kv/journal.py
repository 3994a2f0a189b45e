"""The journal before the metadata store, and the mark it begins at: two file formats, without LMDB.

    journal      records, each at a multiple of BLOCK_BYTES, from the beginning of the file on
    record       digest 16 | epoch 8 | transaction 8 | body bytes 8 | body: for each row key bytes 2, value bytes 4, key, value
    checkpoint   three blocks: the first word of block 0 is not 0 if somebody saw the disk fail, the 16 bytes behind it name the boot of the
                 machine in which the store was last opened; blocks 1 and 2 hold a mark each
    mark         digest 16 | epoch 8 | transaction 8 | nonce 16 | lineage 16 | head bytes 512

Value bytes DELETED say that the row goes. Numbers are little-endian. A digest is the XXH3-128 of the epoch's nonce (of nothing, for
a mark) and of all that follows it: a record that somebody else's bytes only look like would have to know the nonce.

Invariants
* A record counts if its digest holds, its epoch is the mark's, and it directly follows the record, or the mark, before it.
* Records are written one after the other, each flushed before the next begins. So bytes that are no record end the journal only if no
  whole record of the epoch lies behind them (a torn write); otherwise they are damage.
* The newer of the marks that hold counts. The other one's place is written next, so that a torn mark loses nothing.
* No block is shared by two records: writing one never rewrites a byte of another.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK_BYTES = 4096
DELETED = 0xFFFFFFFF
HEAD_BYTES = 512
"""Of LMDB's meta page: what is ever written of it lies in its first 152 bytes, one sector of any disk."""
_DIGEST_BYTES = 16
_RECORD = struct.Struct("<QQQ")
_MARK = struct.Struct(f"<QQ16s16s{HEAD_BYTES}s")
_ROW = struct.Struct("<HI")
_WORD = struct.Struct("<Q")
pack_row = _ROW.pack
_START_BYTES = _DIGEST_BYTES + _RECORD.size
"""Of a record, before its body."""
BODY_READ_BYTES_MAX = 1 << 20
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

Row = tuple[bytes, bytes | None]
"""A key and its new value; None: the row goes."""


def _digest(nonce: bytes, data: bytes | memoryview) -> bytes:
    hasher = xxhash.xxh3_128(nonce)
    hasher.update(data)
    return hasher.digest()


@dataclass(slots=True, frozen=True)
class Mark:
    """The state that the records of `epoch` are about to change: all of it is on the disk.

    `lineage` names the store file, `head` is the beginning of its meta page for `transaction`.
    """

    epoch: int
    transaction: int
    nonce: bytes
    lineage: bytes
    head: bytes

    def pack(self) -> bytes:
        body = _MARK.pack(self.epoch, self.transaction, self.nonce, self.lineage, self.head)
        return _digest(b"", body) + body

    @classmethod
    def unpack(cls, raw: bytes) -> Mark | None:
        """None if the bytes are no mark."""
        body = raw[_DIGEST_BYTES : _DIGEST_BYTES + _MARK.size]
        if len(body) < _MARK.size or raw[:_DIGEST_BYTES] != _digest(b"", body):
            return None
        return cls(*_MARK.unpack(body))


def record(mark: Mark, transaction: int, parts: list[bytes]) -> bytes:
    """The record of a transaction whose rows are `parts`, joined; its length is a multiple of BLOCK_BYTES."""
    body = b"".join(parts)
    data = _RECORD.pack(mark.epoch, transaction, len(body)) + body
    return _digest(mark.nonce, data) + data + bytes(-(_DIGEST_BYTES + len(data)) % BLOCK_BYTES)


def rows_of(body: bytes) -> Iterator[Row]:
    """Raises `struct.error` where a damaged body cannot be read on."""
    at = 0
    while at < len(body):
        key_bytes, value_bytes = _ROW.unpack_from(body, at)
        at += _ROW.size
        key = body[at : at + key_bytes]
        at += key_bytes
        if value_bytes == DELETED:
            yield key, None
        else:
            yield key, body[at : at + value_bytes]
            at += value_bytes


def _blocks(body_bytes: int) -> int:
    """How much of the file a record takes."""
    return -(-(_START_BYTES + body_bytes) // BLOCK_BYTES) * BLOCK_BYTES


def boot() -> bytes:
    """What names this boot of the machine; empty where nothing does."""
    try:
        return bytes.fromhex(BOOT_ID.read_text().strip().replace("-", ""))[:_DIGEST_BYTES]
    except (OSError, ValueError):
        return b""


class Journal:
    """The file of the records. Whoever has the store open holds a shared flock on it."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def fill(self, size: int) -> None:
        """Give the file blocks that have been written: a first write into reserved ones costs the disk's own journal a commit.

        Only for who is alone: the zeros would go over what another process writes.
        """
        missing = size - os.fstat(self._fd).st_size
        if missing > 0:
            os.pwrite(self._fd, bytes(missing), size - missing)
            os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)

    def take(self) -> bool:
        """Whether nobody else has the store open. Called inside `Marks.gate`; then `share` follows."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def share(self) -> None:
        """For as long as the file is open."""
        fcntl.flock(self._fd, fcntl.LOCK_SH)

    def write(self, data: bytes, at: int) -> None:
        """Durable when it returns. Raises `OSError`."""
        view = memoryview(data)
        while view:
            done = os.pwrite(self._fd, view, at)
            view, at = view[done:], at + done
        os.fdatasync(self._fd)

    def cancel(self, at: int) -> None:
        """Make the record at `at` none."""
        self.write(bytes(BLOCK_BYTES), at)

    def records(self, mark: Mark) -> Iterator[tuple[int, int, Iterator[Row]]]:
        """(transaction, where the next record begins, rows) of all that followed `mark`."""
        at, transaction = 0, mark.transaction
        size = os.fstat(self._fd).st_size
        while True:
            head = os.pread(self._fd, _START_BYTES, at)
            if len(head) < _START_BYTES:
                return
            epoch, number, body_bytes = _RECORD.unpack_from(head, _DIGEST_BYTES)
            if epoch != mark.epoch or number != transaction + 1 or at + _START_BYTES + body_bytes > size:
                return
            body = os.pread(self._fd, body_bytes, at + _START_BYTES)
            if head[:_DIGEST_BYTES] != _digest(mark.nonce, head[_DIGEST_BYTES:] + body):
                return
            transaction = number
            at += _blocks(body_bytes)
            yield transaction, at, rows_of(body)

    def whole_from(self, mark: Mark, at: int, after: int) -> Iterator[tuple[int, int, bytes]]:
        """(transaction, where it begins, body) of every whole record of the epoch at or behind `at`, of transactions later than `after`.

        Each begins at a multiple of BLOCK_BYTES, so they are found whatever lies between them.
        """
        data = os.pread(self._fd, max(os.fstat(self._fd).st_size - at, 0), at)
        epoch = _WORD.pack(mark.epoch)
        place = 0
        while place + _START_BYTES <= len(data):
            body_bytes = 0
            if data.startswith(epoch, place + _DIGEST_BYTES):
                _, number, body_bytes = _RECORD.unpack_from(data, place + _DIGEST_BYTES)
                end = place + _START_BYTES + body_bytes
                if (
                    number > after
                    and end <= len(data)
                    and data.startswith(_digest(mark.nonce, memoryview(data)[place + _DIGEST_BYTES : end]), place)
                ):
                    yield number, at + place, data[place + _START_BYTES : end]
                else:
                    body_bytes = 0
            place += _blocks(body_bytes)

    def body_as_it_reads(self, at: int) -> bytes:
        """Of a record that does not hold: only for telling what may have been in it."""
        head = os.pread(self._fd, _START_BYTES, at)
        if len(head) < _START_BYTES:
            return b""
        body_bytes = _RECORD.unpack_from(head, _DIGEST_BYTES)[2]
        return os.pread(self._fd, min(body_bytes, BODY_READ_BYTES_MAX), at + _START_BYTES)


def newest_mark(checkpoint: bytes | mmap.mmap) -> Mark | None:
    """Of what the file holds; None if no mark in it holds."""
    found = [
        mark for place in (1, 2) if (mark := Mark.unpack(checkpoint[place * BLOCK_BYTES : (place + 1) * BLOCK_BYTES]))
    ]
    return max(found, key=lambda mark: mark.epoch, default=None)


class Marks:
    """The file of the checkpoint. All processes see what is written to it at once, through a mapping."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with self.gate():  # who makes the file must not wipe what the next one has written already
            if os.fstat(self._fd).st_size < 3 * BLOCK_BYTES:
                os.pwrite(self._fd, bytes(3 * BLOCK_BYTES), 0)
                os.fsync(self._fd)
        self._map = mmap.mmap(self._fd, 3 * BLOCK_BYTES)

    def close(self) -> None:
        self._map.close()
        os.close(self._fd)

    @contextmanager
    def gate(self) -> Iterator[None]:
        """One process at a time: it finds out whether it is alone, and then mends what a power cut left."""
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def epoch(self) -> int:
        """The newest one written, whether or not it holds: cheap, to see that another process was here."""
        first: int = _WORD.unpack_from(self._map, BLOCK_BYTES + _DIGEST_BYTES)[0]
        second: int = _WORD.unpack_from(self._map, 2 * BLOCK_BYTES + _DIGEST_BYTES)[0]
        return max(first, second)

    def newest(self) -> Mark | None:
        return newest_mark(self._map)

    def torn(self) -> list[int]:
        """Where something is written that is no mark."""
        return [
            place * BLOCK_BYTES
            for place in (1, 2)
            if any(raw := self._map[place * BLOCK_BYTES : (place + 1) * BLOCK_BYTES]) and Mark.unpack(raw) is None
        ]

    def write(self, mark: Mark) -> None:
        """Durable when it returns. Raises `OSError`."""
        os.pwrite(self._fd, mark.pack(), (1 + mark.epoch % 2) * BLOCK_BYTES)
        os.fdatasync(self._fd)

    def sync(self) -> None:
        """What another process wrote may be visible before it is durable: it may have died in between."""
        os.fdatasync(self._fd)

    def fail(self) -> None:
        """Tell all processes that the disk failed: what it still has of the store's file is not known to anybody."""
        _WORD.pack_into(self._map, 0, 1)

    @property
    def failed(self) -> bool:
        return self._map[0] != 0

    def note_boot(self) -> None:
        """By the first one to open the store. It need not be durable: a boot that is not known proves nothing."""
        self._map[_WORD.size : _WORD.size + _DIGEST_BYTES] = boot().ljust(_DIGEST_BYTES, b"\0")

    @property
    def same_boot(self) -> bool:
        """Whether the machine has run since the store was last opened, so that no write of any process can have been lost."""
        name = boot()
        return bool(name) and self._map[_WORD.size : _WORD.size + _DIGEST_BYTES] == name

    def clear_failure(self) -> None:
        _WORD.pack_into(self._map, 0, 0)
