"""The cold tier: packs as objects of remotes.

An object is the pack, a description of it (zlib-compressed JSON, see stratum/manifest.py), and a footer that says where that
begins; so a bucket alone is enough to find out what it holds.

Invariants
* Below a prefix lies one marker that names the volume it belongs to and an epoch. Nothing is written without having read it
  within MARKER_S: another volume's prefix, or one that a rebuilt volume has taken over, is refused.
* Object names are random and never used twice.
* Secrets are read from their files when a remote is opened and are nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
import time
import uuid
import zlib
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stratum import remote_trouble
from stratum.blocks import CHECKSUM_BYTES, checksum
from stratum.cold_backends.contract import (
    PART_BYTES,
    Backend,
    RemoteArchived,
    RemoteConflict,
    RemoteDamaged,
    RemoteError,
    RemoteGone,
    RemoteNotFound,
    RemoteRefused,
)
from stratum.cold_backends.directory import DirectoryBackend
from stratum.cold_backends.encrypt import Encrypting
from stratum.cold_backends.limit import Limited
from stratum.cold_backends.measured import Measured
from stratum.cold_backends.retry import Retrying
from stratum.errors import (
    DataDamaged,
    ForeignRemote,
    InvalidArgument,
    NeedsRestore,
    NotFound,
    StratumError,
    TierUnavailable,
)
from stratum.log import get_logger
from stratum.recall import RecallCache
from stratum.schema import prefix_range
from stratum.tier_rows import ColdRow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stratum.deadlines import Deadline
    from stratum.tier_rows import PackRow
    from stratum.transaction import InodeReader
    from stratum.volume import Volume

log = get_logger("cold")
MARKER = remote_trouble.MARKER
MARKER_S = 5.0
MULTIPART_BYTES_MIN = 2 * PART_BYTES
KEY_BYTES = 32
OBJECT_BYTES_MIN = 128 * 1024
_FOOTER = struct.Struct(">8sQQ16s")
_MAGIC = b"STRPACK1"


def rows(reader: InodeReader) -> dict[str, ColdRow]:
    return {key[1:].decode(): ColdRow.decode(raw) for key, raw in reader.scan(*prefix_range(b"n"))}


def get_row(reader: InodeReader, name: str) -> ColdRow:
    raw = reader.get(b"n" + name.encode())
    if raw is None:
        raise NotFound(f"there is no remote {name!r}; `stratum cold list` shows them", name=name)
    return ColdRow.decode(raw)


def active(reader: InodeReader) -> str | None:
    """The remote that new packs go to: the one added last that is not being drained."""
    found = [(row.added_s, name) for name, row in rows(reader).items() if row.state == "active"]
    return max(found)[1] if found else None


def _secret_file(path: Path, what: str) -> str:
    """Raises `InvalidArgument` if others may read it."""
    try:
        stat = path.stat()
        if stat.st_mode & 0o077:
            raise InvalidArgument(f"{path} holds {what} and others may read it; chmod 600 it")
        return path.read_text().strip()
    except OSError as error:
        raise InvalidArgument(f"{what}: {path}: {error.strerror}") from error


def read_credentials(path: Path) -> tuple[str, str]:
    """(access key, secret key) of a JSON object, or of `name = value` lines as the AWS tools write them."""
    text = _secret_file(path, "the remote's credentials")
    try:
        found = {name.lower(): str(value) for name, value in json.loads(text).items()}
    except (ValueError, AttributeError):
        pairs = [line.partition("=") for line in text.splitlines() if "=" in line and not line.lstrip().startswith("#")]
        found = {name.strip().lower(): value.strip() for name, _, value in pairs}
    access = next((found[name] for name in ("access_key", "aws_access_key_id", "accesskey") if found.get(name)), None)
    secret = next(
        (found[name] for name in ("secret_key", "aws_secret_access_key", "secretkey") if found.get(name)), None
    )
    if access is None or secret is None:
        raise InvalidArgument(f"{path} has no access_key and secret_key; write them as JSON or as name = value lines")
    return access, secret


def read_key(path: Path) -> bytes:
    """A 32-byte key from a file of 64 hexadecimal digits."""
    text = _secret_file(path, "the encryption key")
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise InvalidArgument(
            f"{path} is not {2 * KEY_BYTES} hexadecimal digits; `openssl rand -hex {KEY_BYTES}` makes a key"
        )
    return key


class PackCut(RemoteDamaged):
    """The object of a pack has fewer bytes than were sent."""

    def __init__(self, row: PackRow, size: int) -> None:
        super().__init__(f"{row.key} has {size} bytes, and {row.length} and more were sent")
        self.size = size


@dataclass(slots=True)
class Remote:
    """An open remote. `plain` holds the marker, `sealed` (the same without encryption) everything else."""

    plain: Backend
    sealed: Backend
    retrying: Retrying
    raw: Backend


def open_remote(
    name: str, row: ColdRow, *, request_s_max: float, bytes_per_s: float = 0.0, requests_per_s: float = 0.0
) -> Remote:
    """Raises `InvalidArgument` for credentials or a key that cannot be had."""
    raw: Backend
    if row.kind == "directory":
        raw = DirectoryBackend(Path(row.endpoint) / row.prefix)
    else:
        from stratum.cold_backends.s3 import S3Backend  # boto3 takes half a second to import

        raw = S3Backend(
            row.endpoint, row.bucket, row.prefix, region=row.region, credentials=_credentials(name, row),
            checksums=row.can.get("checksums", False), connect_s_max=min(5.0, request_s_max), read_s_max=request_s_max,
        )  # fmt: skip
    retrying = Retrying(Limited(Measured(raw), bytes_per_s=bytes_per_s, requests_per_s=requests_per_s))
    sealed: Backend = Encrypting(retrying, read_key(Path(row.encryption_key))) if row.encryption_key else retrying
    return Remote(retrying, sealed, retrying, raw)


def _credentials(name: str, row: ColdRow) -> tuple[str, str] | None:
    """From the file that was named, else a systemd credential, else None: the usual AWS chain."""
    if row.credentials:
        return read_credentials(Path(row.credentials))
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if folder:
        for path in (Path(folder) / f"cold_{name}", Path(folder) / f"stratum-cold-{name}"):
            if path.exists():
                return read_credentials(path)
    return None


# -- the marker -----------------------------------------------------------------------------------------------------------


def read_marker(remote: Remote) -> dict[str, Any] | None:
    """Who the prefix belongs to; None if nobody. Raises `RemoteError` or `ForeignRemote`."""
    try:
        text = b"".join(remote.plain.get(MARKER).pieces)
    except RemoteNotFound:
        return None
    try:
        found: dict[str, Any] = json.loads(text)
        return {"instance": str(found["instance"]), "epoch": int(found["epoch"])}
    except (ValueError, KeyError, TypeError):
        what = f"{MARKER} in the bucket is not one of a volume; choose another bucket or prefix"
        raise ForeignRemote(what, trouble=remote_trouble.Trouble.FOREIGN) from None


def write_marker(remote: Remote, instance: str, epoch: int, *, new: bool) -> None:
    """Raises `ForeignRemote` if it was to be new and somebody was faster."""
    text = json.dumps({"instance": instance, "epoch": epoch}).encode()
    try:
        remote.plain.put(MARKER, text, {}, if_absent=new)
    except RemoteConflict:
        raise ForeignRemote("another volume took the bucket at this moment; choose another bucket or prefix") from None


def footer(data_bytes: int, manifest: bytes) -> bytes:
    return _FOOTER.pack(_MAGIC, data_bytes, len(manifest), checksum(manifest))


def read_manifest(backend: Backend, key: str, size: int) -> tuple[dict[str, Any], int]:
    """(what an object says it holds, where that begins). Raises `RemoteDamaged` or `RemoteError`."""
    tail_bytes = min(size, 256 * 1024)
    tail = b"".join(backend.get(key, size - tail_bytes, size).pieces)
    if len(tail) < _FOOTER.size:
        raise RemoteDamaged(f"{key} is too short for a pack")
    magic, data_bytes, manifest_bytes, digest = _FOOTER.unpack_from(tail, len(tail) - _FOOTER.size)
    if magic != _MAGIC or data_bytes + manifest_bytes + _FOOTER.size != size:
        raise RemoteDamaged(f"{key} does not end like a pack")
    if manifest_bytes + _FOOTER.size > len(tail):
        packed = b"".join(backend.get(key, data_bytes, data_bytes + manifest_bytes).pieces)
    else:
        packed = tail[len(tail) - _FOOTER.size - manifest_bytes : len(tail) - _FOOTER.size]
    if checksum(packed) != digest:
        raise RemoteDamaged(f"{key}: its description does not match its checksum")
    found: dict[str, Any] = json.loads(zlib.decompress(packed))
    return found, int(data_bytes)


assert CHECKSUM_BYTES == 16


class ColdStore:
    """The remotes of a volume as one process sees them."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._lock = threading.Lock()
        self._remotes: dict[str, tuple[bytes, Remote]] = {}
        self._markers_s: dict[str, float] = {}
        self._cache: RecallCache | None = None
        self.recalled_bytes = 0

    # -- remotes ------------------------------------------------------------------------------------------------------

    def remote(self, name: str) -> tuple[ColdRow, Remote]:
        """Raises `NotFound` or `InvalidArgument`."""
        with self._volume.snapshot() as reader:
            row = get_row(reader, name)
        return row, self._remote(name, row)

    def prepare(self) -> None:
        """Make in a thread what the first read of cold bytes would wait for: boto3's client takes 0.25 s. Asks no remote."""
        with self._volume.snapshot() as reader:
            found = rows(reader)

        def work() -> None:
            for name, row in found.items():
                with suppress(StratumError):  # whoever needs it hears of it
                    self._remote(name, row)

        if found:
            threading.Thread(target=work, name="remotes", daemon=True).start()

    def _remote(self, name: str, row: ColdRow) -> Remote:
        raw = row.encode()
        with self._lock:
            held = self._remotes.get(name)
            if held is not None and held[0] == raw:
                return held[1]
        config = self._volume.config
        made = open_remote(
            name, row, request_s_max=config.cold_request_s_max, bytes_per_s=config.cold_bytes_per_s_max,
            requests_per_s=config.cold_requests_per_s_max,
        )  # fmt: skip
        with self._lock:
            self._remotes[name] = (raw, made)
        return made

    def available(self) -> str | None:
        """The remote for new packs, if there is one and it is not known to be failing."""
        with self._volume.snapshot() as reader:
            name = active(reader)
        if name is None:
            return None
        try:
            _, remote = self.remote(name)
        except (InvalidArgument, NotFound) as error:
            log.warning("remote_unusable", remote=name, error=error.message)
            return None
        return None if remote.retrying.breaker.is_open else name

    def check_marker(self, name: str, *, anew: bool = False) -> None:
        """Raises `ForeignRemote` if the prefix is not this volume's at its epoch, `TierUnavailable` if the remote cannot be asked. Both have
        the `Trouble` among their facts. What was seen within MARKER_S is believed, unless it is to be asked `anew`.
        """
        if not anew and time.monotonic() - self._markers_s.get(name, -MARKER_S) < MARKER_S:
            return
        row, remote = self.remote(name)
        self.compare_marker(name, row, remote)
        self._markers_s[name] = time.monotonic()

    def compare_marker(self, name: str, row: ColdRow, remote: Remote) -> None:
        """The same of a remote as somebody has opened it."""
        try:
            found = read_marker(remote)
        except RemoteError as error:
            raise remote_trouble.of_error(name, row, error) from error
        wrong = remote_trouble.of_marker(name, row, self._volume.instance, found)
        if wrong is not None:
            raise wrong

    # -- writing ------------------------------------------------------------------------------------------------------

    def new_key(self) -> str:
        name = uuid.uuid4().hex
        return f"v1/{self._volume.instance}/{name[:2]}/{name}"

    def write(
        self, row: PackRow, data: bytes | memoryview, manifest: dict[str, Any], began: Callable[[str], None]
    ) -> None:
        """Send a pack. `began(upload id)` is called before the first part of a long one, and may make it durable; a row with
        an upload id goes on with that upload.

        Raises `TierUnavailable` or `ForeignRemote`.
        """
        config, remote = self.remote(row.remote)
        packed = zlib.compress(json.dumps(manifest, separators=(",", ":")).encode())
        # A store bills and handles a small object like one of 128 KiB, so it may as well be one.
        padding = bytes(max(OBJECT_BYTES_MIN - len(data) - len(packed) - _FOOTER.size, 0))
        whole = b"".join((data, padding, packed, footer(len(data) + len(padding), packed)))
        metadata = {"stratum-pack": "1", "stratum-bytes": str(len(data)), "stratum-sha256": row.digest}
        try:
            self.check_marker(row.remote)
            if len(whole) < MULTIPART_BYTES_MIN:
                row.version = remote.sealed.put(
                    row.key, whole, metadata, storage_class=config.storage_class,
                    sha256=hashlib.sha256(whole).digest() if config.can.get("checksums") else b"",
                )  # fmt: skip
            else:
                row.version = self._upload(remote.sealed, row, config, whole, metadata, began)
        except RemoteError as error:
            raise TierUnavailable(f"remote {row.remote!r}: {error.message}") from error

    @staticmethod
    def _upload(
        backend: Backend,
        row: PackRow,
        config: ColdRow,
        whole: bytes,
        metadata: dict[str, str],
        began: Callable[[str], None],
    ) -> str:
        there: dict[int, int] = {}
        if row.upload_id:
            try:
                there = backend.list_parts(row.key, row.upload_id)
            except RemoteNotFound:
                row.upload_id = ""  # it expired: begin again
        if not row.upload_id:
            row.upload_id = backend.create_upload(row.key, metadata, storage_class=config.storage_class)
            began(row.upload_id)
        count = -(-len(whole) // PART_BYTES)
        for number in range(1, count + 1):
            part = whole[(number - 1) * PART_BYTES : number * PART_BYTES]
            if there.get(number) != len(part):
                backend.upload_part(row.key, row.upload_id, number, part)
        return backend.complete_upload(row.key, row.upload_id, count)

    def verify(self, row: PackRow) -> None:
        """Whether the remote holds the pack that was sent: by its own checksum if it is known to compare, else by reading it.

        Raises `RemoteDamaged` if not, `TierUnavailable` if it cannot be known.
        """
        config, remote = self.remote(row.remote)
        try:
            info = remote.sealed.head(row.key)
            if config.can.get("checksums") and info.size < MULTIPART_BYTES_MIN and info.size >= row.length:
                return  # it compared the bytes with the SHA-256 that came with them
            digest = hashlib.sha256()
            for piece in remote.sealed.get(row.key, 0, row.length).pieces:
                digest.update(piece)
        except RemoteDamaged:
            raise
        except RemoteError as error:
            raise TierUnavailable(f"remote {row.remote!r}: {error.message}") from error
        if digest.hexdigest() != row.digest:
            raise RemoteDamaged(f"{row.key} in remote {row.remote!r} is not what was sent")

    def delete(self, row: PackRow) -> None:
        """Remove a pack, or what an unfinished upload left. Raises `TierUnavailable` or `ForeignRemote`."""
        _, remote = self.remote(row.remote)
        try:
            self.check_marker(row.remote)
            if row.upload_id:
                remote.sealed.abort_upload(row.key, row.upload_id)
            remote.sealed.delete(row.key, row.version)
        except RemoteError as error:
            raise TierUnavailable(f"remote {row.remote!r}: {error.message}") from error

    # -- reading ------------------------------------------------------------------------------------------------------

    @property
    def cache(self) -> RecallCache:
        with self._lock:
            if self._cache is None:
                self._cache = RecallCache(self._volume.root / "recall", self._volume.config.cold_cache_bytes_max)
            return self._cache

    def read(
        self,
        number: int,
        row: PackRow,
        start: int,
        least_stop: int,
        stop: int,
        wanted_stop: int,
        deadline: Deadline,
        patience_s: float,
    ) -> bytes:
        """Bytes of a pack from `start` to at least `least_stop`, and on to `stop` as far as they have arrived; unverified.

        The reader is likely to go on to `wanted_stop`, and waits for as much of that as `RecallCache.read` says.

        Raises `TierUnavailable`, `NeedsRestore`, or `DataDamaged` if the remote has lost it.
        """
        try:
            return self.cache.read(
                number,
                row.length,
                start,
                least_stop,
                stop,
                wanted_stop,
                partial(self._fetch, row),
                deadline,
                patience_s,
            )
        except RemoteArchived as error:
            raise NeedsRestore(
                f"the bytes lie in an archive class of remote {row.remote!r}; ask with RestoreObject, wait, then read again"
            ) from error
        except RemoteGone as error:
            raise remote_trouble.of_error(row.remote, self.remote(row.remote)[0], error) from error
        except RemoteNotFound as error:
            self.check_marker(row.remote, anew=True)  # else all of it is gone, or it is another place
            raise DataDamaged(
                f"pack {number:016x} (its object is gone)", f"remote {row.remote!r}, {row.key}", pack=number
            ) from error
        except PackCut as error:
            raise DataDamaged(
                f"pack {number:016x} ({error.message})", f"remote {row.remote!r}", pack=number, good_bytes=error.size
            ) from error
        except RemoteDamaged as error:
            raise DataDamaged(f"pack {number:016x} ({error.message})", f"remote {row.remote!r}") from error
        except RemoteRefused as error:
            raise TierUnavailable(f"remote {row.remote!r}: {error.message}") from error
        except RemoteError as error:
            raise TierUnavailable(
                f"remote {row.remote!r} does not answer ({error.message}); try again later"
            ) from error

    def ask(self, number: int, row: PackRow, start: int, stop: int) -> None:
        """Have bytes of a pack come that somebody is likely to read soon; whoever does will see what became of it."""
        self.cache.ask(number, row.length, start, stop, partial(self._fetch, row))

    def _fetch(self, row: PackRow, first: int, last: int) -> Iterator[bytes]:
        _, remote = self.remote(row.remote)
        body = remote.sealed.get(row.key, first, last)
        if body.info.size < last:
            raise PackCut(row, body.info.size)
        for piece in body.pieces:
            self.recalled_bytes += len(piece)
            yield piece

    def close(self) -> None:
        with self._lock:
            for _, remote in self._remotes.values():
                remote.plain.close()
            self._remotes.clear()
