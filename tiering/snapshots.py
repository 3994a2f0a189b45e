"""The daily snapshot of the metadata in each remote: with it a rebuild brings back everything, without it what packs tell.

    v1/INSTANCE/_index/DATE-TIME         zlib stream of rows: key length (2 bytes), value length (4 bytes), key, value

Rows of processes and of unfinished work stay out. So do access keys, unless the remote is encrypted: their secrets are sealed
with a key that must not lie beside them in the open.
"""

from __future__ import annotations

import struct
import tempfile
import threading
import time
import zlib
from functools import partial
from typing import TYPE_CHECKING

from stratum import cold, filling, frozen, manifest, packs, private
from stratum.clocks import STAMP, by_stamp, come
from stratum.cold_backends.contract import RemoteError
from stratum.cold_files import upload
from stratum.errors import Busy, NoSpace, StratumError, TierUnavailable
from stratum.log import get_logger
from stratum.schema import FORMAT_VERSION, pack_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import BinaryIO

    from stratum.cold import Remote
    from stratum.transaction import MetadataTransaction
    from stratum.volume import Volume

log = get_logger("snapshots")
PERIOD_S = 86400.0
RETRY_S = 600.0
LOOK_S = 60.0
LEVEL = 6
ROWS_A_LOOK = 4096
KEPT = 7
_ROW = struct.Struct(">HI")
TABLES = b"BDGHIKMNPRSUWXYabcdijnopqstuv"
"""What a snapshot holds. Not here: sessions and what hangs on them, change logs, queues, and A, which is added if it is safe."""
SETTINGS = (b"glimits", b"gscrub_speed")
"""Of the settings those that somebody has made for users."""
SEAL_KEY = b"\0seal.key"
TAKEN_KEY = b"\0taken"
"""JSON {epoch, timeline, transaction, format}: what the rows are of (manifest.moment_of), and the format of the volume (schema.py; before 4 it is not told)."""


def _record(key: bytes, value: bytes) -> bytes:
    return _ROW.pack(len(key), len(value)) + key + value


def rows(volume: Volume, epoch: int, *, with_secrets: bool) -> Iterator[bytes]:
    """The stream before compression. Stored extents (E) come along: their bytes are nowhere else."""
    with volume.snapshot() as reader:
        if frozen.directories_waiting(reader):
            raise Busy("a clone was made meanwhile; the snapshot is taken again")
        yield _record(TAKEN_KEY, pack_json({**manifest.moment_now(reader, epoch), "format": FORMAT_VERSION}))
        for key in SETTINGS:
            value = reader.get(key)
            if value is not None:
                yield _record(key, value)
        for letter in sorted(TABLES + b"E" + (b"A" if with_secrets else b"")):
            table = bytes((letter,))
            for key, value in reader.scan(table, bytes((letter + 1,))):
                yield _record(key, value)
    if with_secrets:
        secret = private.seal_key(volume.meta)
        yield _record(SEAL_KEY, secret)


def parse(pieces: Iterable[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """The rows of a compressed stream that comes in pieces. Raises `ValueError` or `zlib.error` if it is cut off or none."""
    decompressor = zlib.decompressobj()
    kept, at = b"", 0
    for piece in pieces:
        kept, at = kept[at:] + decompressor.decompress(piece), 0
        while at + _ROW.size <= len(kept):
            key_bytes, value_bytes = _ROW.unpack_from(kept, at)
            value_at = at + _ROW.size + key_bytes
            if value_at + value_bytes > len(kept):
                break
            yield kept[at + _ROW.size : value_at], kept[value_at : value_at + value_bytes]
            at = value_at + value_bytes
    if at != len(kept) or not decompressor.eof:
        raise ValueError("the snapshot is cut off")


def take(volume: Volume, name: str, *, ending: Callable[[], bool] = lambda: False) -> str:
    """Send a snapshot to a remote; its key.

    It lies in a file without a name until it is whole, so the metadata's read transaction ends before the remote is asked.
    Raises `TierUnavailable`, `ForeignRemote`, `NoSpace` for that file, and `Busy` once it is `ending`.
    """
    row, remote = volume.cold.remote(name)
    filling.fill_all(volume, ending=ending)  # what a clone still waits for would not be in it
    with tempfile.TemporaryFile(dir=volume.meta) as spool:
        compressor = zlib.compressobj(LEVEL)
        try:
            for number, piece in enumerate(rows(volume, row.epoch, with_secrets=bool(row.encryption_key))):
                spool.write(compressor.compress(piece))
                if number % ROWS_A_LOOK == 0 and ending():
                    raise Busy("the snapshot was not finished; it is taken again")
            spool.write(compressor.flush())
        except OSError as error:
            raise NoSpace(f"the snapshot for remote {name!r} needs room in {volume.meta}: {error}") from error
        size = spool.tell()
        spool.seek(0)
        return _send(volume, name, remote, spool, size)


def _send(volume: Volume, name: str, remote: Remote, spool: BinaryIO, size: int) -> str:
    key = f"v1/{volume.instance}/_index/{time.strftime(STAMP, time.gmtime())}"
    try:
        volume.cold.check_marker(name)
        upload(remote.sealed, key, spool, size, {"stratum-index": "1"})
        old = by_stamp(info.key for info in remote.sealed.list(f"v1/{volume.instance}/_index/"))
        for gone in old[:-KEPT]:
            remote.sealed.delete(gone)
    except RemoteError as error:
        raise TierUnavailable(f"remote {name!r}: {error.message}") from error
    return key


class IndexSnapshots:
    """Takes one a day for each remote, in a thread: of a large volume it takes minutes, and disks fill meanwhile."""

    def __init__(self, volume: Volume, *, clock: Callable[[], float] = time.time) -> None:
        self._volume = volume
        self._clock = clock
        self._not_before_s = 0.0
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        volume.before_close.append(self.stop)

    def run(self) -> bool:
        now_s = self._clock()
        if (self._thread is not None and self._thread.is_alive()) or not come(self._not_before_s, now_s, RETRY_S):
            return False
        with self._volume.snapshot() as reader:
            taken = packs.setting(reader, "index_snapshots")
            due = [
                name for name in cold.rows(reader) if come(float(str(taken.get(name, 0))) + PERIOD_S, now_s, PERIOD_S)
            ]
        self._not_before_s = now_s + LOOK_S
        if due:
            self._thread = threading.Thread(target=self._take, args=(due, now_s), name="index-snapshots", daemon=True)
            self._thread.start()
        return False

    def settle(self) -> None:
        """Wait for the one that is being taken."""
        if self._thread is not None:
            self._thread.join()

    def stop(self) -> None:
        self._ending.set()
        self.settle()

    def _take(self, due: list[str], now_s: float) -> None:
        for name in due:
            try:
                key = take(self._volume, name, ending=self._ending.is_set)
                self._volume.mutate(partial(_note_taken, name=name, at_s=int(now_s)), frees=True)
            except StratumError as error:
                if self._ending.is_set():
                    return
                log.warning("index_snapshot_failed", remote=name, error=error.message)
                self._not_before_s = now_s + RETRY_S
                continue
            log.info("index_snapshot_taken", remote=name, key=key)


def _note_taken(tx: MetadataTransaction, name: str, at_s: int) -> None:
    tx.put(b"gindex_snapshots", pack_json({**packs.setting(tx, "index_snapshots"), name: at_s}))
