"""The daily snapshot of the metadata in each remote: with it a rebuild brings back everything, without it what packs tell.

    v1/INSTANCE/_index/DATE-TIME         zlib stream of rows: key length (2 bytes), value length (4 bytes), key, value

Rows of processes and of unfinished work stay out. So do access keys, unless the remote is encrypted: their secrets are sealed
with a key that must not lie beside them in the open.
"""

from __future__ import annotations

import struct
import time
import zlib
from functools import partial
from typing import TYPE_CHECKING, Any

from stratum import cold, packs
from stratum.clocks import come
from stratum.cold_backends.contract import RemoteError
from stratum.errors import StratumError, TierUnavailable
from stratum.log import get_logger
from stratum.schema import pack_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stratum.transaction import MetadataTransaction
    from stratum.volume import Volume

log = get_logger("snapshots")
PERIOD_S = 86400.0
RETRY_S = 600.0
KEPT = 7
_ROW = struct.Struct(">HI")
TABLES = b"BDGHIKMNPRSUWXYabcdjnopqst"
"""What a snapshot holds. Not here: sessions and what hangs on them, change logs, queues, and A, which is added if it is safe."""
SEAL_KEY = b"\0seal.key"


def rows(volume: Volume, *, with_secrets: bool) -> Iterator[bytes]:
    """The stream before compression. Stored extents (E) come along: their bytes are nowhere else."""
    with volume.snapshot() as reader:
        for letter in sorted(TABLES + b"E" + (b"A" if with_secrets else b"")):
            table = bytes((letter,))
            for key, value in reader.scan(table, bytes((letter + 1,))):
                yield _ROW.pack(len(key), len(value)) + key + value
    if with_secrets:
        secret = (volume.meta / "seal.key").read_bytes()
        yield _ROW.pack(len(SEAL_KEY), len(secret)) + SEAL_KEY + secret


def parse(stream: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The rows of a stream. Raises `ValueError` if it is cut off."""
    at = 0
    while at < len(stream):
        if at + _ROW.size > len(stream):
            raise ValueError("the snapshot is cut off")
        key_bytes, value_bytes = _ROW.unpack_from(stream, at)
        at += _ROW.size
        if at + key_bytes + value_bytes > len(stream):
            raise ValueError("the snapshot is cut off")
        yield stream[at : at + key_bytes], stream[at + key_bytes : at + key_bytes + value_bytes]
        at += key_bytes + value_bytes


def take(volume: Volume, name: str) -> str:
    """Send a snapshot to a remote; its key. Raises `TierUnavailable` or `ForeignRemote`."""
    row, remote = volume.cold.remote(name)
    compressor = zlib.compressobj(6)
    pieces = [compressor.compress(piece) for piece in rows(volume, with_secrets=bool(row.encryption_key))]
    pieces.append(compressor.flush())
    key = f"v1/{volume.instance}/_index/{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    try:
        volume.cold.check_marker(name)
        remote.sealed.put(key, b"".join(pieces), {"stratum-index": "1"})
        old = sorted(info.key for info in remote.sealed.list(f"v1/{volume.instance}/_index/"))
        for gone in old[:-KEPT]:
            remote.sealed.delete(gone)
    except RemoteError as error:
        raise TierUnavailable(f"remote {name!r}: {error.message}") from error
    return key


class IndexSnapshots:
    """Takes one a day for each remote."""

    def __init__(self, volume: Volume, *, clock: Callable[[], float] = time.time) -> None:
        self._volume = volume
        self._clock = clock
        self._not_before_s = 0.0

    def run(self) -> bool:
        now_s = self._clock()
        if not come(self._not_before_s, now_s, RETRY_S):
            return False
        with self._volume.snapshot() as reader:
            taken = packs.setting(reader, "index_snapshots")
            due = [
                name for name in cold.rows(reader) if come(float(str(taken.get(name, 0))) + PERIOD_S, now_s, PERIOD_S)
            ]
        for name in due:
            try:
                key = take(self._volume, name)
            except StratumError as error:
                log.warning("index_snapshot_failed", remote=name, error=error.message)
                self._not_before_s = now_s + RETRY_S
                continue
            log.info("index_snapshot_taken", remote=name, key=key)
            taken = {**taken, name: int(now_s)}
            self._volume.mutate(partial(_note_taken, taken=taken), frees=True)
        if not due:
            self._not_before_s = now_s + 60.0
        return False


def _note_taken(tx: MetadataTransaction, taken: dict[str, Any]) -> None:
    tx.put(b"gindex_snapshots", pack_json(taken))
