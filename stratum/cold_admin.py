"""Adding, probing, checking and removing remotes of the cold tier."""

from __future__ import annotations

import hashlib
import re
import time
import uuid
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from stratum import cold, copies, damage, packs, remote_trouble, roles
from stratum.cold_backends.contract import PART_BYTES, RemoteError, RemoteNotFound, RemoteRefused
from stratum.damage import Thing
from stratum.errors import Busy, DataDamaged, Exists, ForeignRemote, InvalidArgument, TierUnavailable
from stratum.tier_rows import VALID, ColdRow, Tier

if TYPE_CHECKING:
    from collections.abc import Callable

    from stratum.cold_backends.contract import Backend
    from stratum.tier_rows import PackRow
    from stratum.transaction import InodeReader, MetadataTransaction
    from stratum.volume import Volume

SWEPT_SHOWN = 100
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
ARCHIVES = frozenset(("GLACIER", "DEEP_ARCHIVE"))
"""Classes whose objects must be restored before they can be read."""


def normal_prefix(prefix: str) -> str:
    """Ends in "/" unless it is empty. Raises `InvalidArgument`."""
    if not re.fullmatch(r"[A-Za-z0-9._/-]*", prefix) or any(part in {".", ".."} for part in prefix.split("/")):
        raise InvalidArgument(f"the prefix {prefix!r} has other characters than letters, digits, '.', '_', '-' and '/'")
    stripped = prefix.strip("/")
    return stripped + "/" if stripped else ""


def probe(backend: Backend, plain: Backend, *, stored: Callable[[str], None] = lambda _: None) -> dict[str, bool]:
    """What a remote really does, by trying. Raises `RemoteError` if it cannot even store, range, list and delete.

    `plain` is the same without encryption, which compares checksums itself and would hide that the remote does not. `stored` is told the random
    key of the first object while it is there, and may raise what it likes. Nothing stays there, whatever happens.
    """
    key = f"probe/{uuid.uuid4().hex}"
    data = bytes(range(256)) * 512
    try:
        backend.put(key, data, {"stratum-probe": "1"})
        stored(key)
        if (
            b"".join(backend.get(key).pieces) != data
            or b"".join(backend.get(key, 1000, 70000).pieces) != data[1000:70000]
        ):
            raise RemoteRefused(
                "the remote does not give back what was put, or not by ranges; it cannot be a cold tier"
            )
        found = {"ranges": True, "metadata": backend.head(key).metadata.get("stratum-probe") == "1"}
        if key not in {info.key for info in backend.list("probe/")}:
            raise RemoteRefused("the remote does not list what was put; it cannot be a cold tier")
        found["checksums"] = _refuses(plain, key + ".sum", data, sha256=hashlib.sha256(b"other").digest())
        found["conditional_puts"] = _refuses(backend, key, data, if_absent=True)
        found["multipart"] = _multipart(backend, key + ".parts")
    finally:
        backend.delete(key)
    try:
        backend.head(key)
    except RemoteNotFound:
        return found
    raise RemoteRefused("the remote says that it deleted and did not; it cannot be a cold tier")


def _refuses(backend: Backend, key: str, data: bytes, **more: Any) -> bool:
    """Whether a put that must not succeed does not."""
    try:
        backend.put(key, data, {}, **more)
    except RemoteRefused:
        return True
    finally:
        if "sha256" in more:
            backend.delete(key)
    return False


def _multipart(backend: Backend, key: str) -> bool:
    upload_id = ""
    try:
        upload_id = backend.create_upload(key, {})
        backend.upload_part(key, upload_id, 1, bytes(PART_BYTES))
        backend.upload_part(key, upload_id, 2, b"end")
        good = backend.list_parts(key, upload_id) == {1: PART_BYTES, 2: 3}
        backend.complete_upload(key, upload_id, 2)
        good = good and backend.head(key).size == PART_BYTES + 3
    except RemoteError as error:
        if upload_id:
            backend.abort_upload(key, upload_id)
        if not isinstance(error, RemoteRefused):
            raise
        return False
    finally:
        backend.delete(key)
    return good


def add(volume: Volume, name: str, row: ColdRow, *, create_bucket: bool = False) -> ColdRow:
    """Probe a remote, claim its prefix for this volume and make it the place for new packs.

    Raises `Exists`, `InvalidArgument`, `ForeignRemote` or `TierUnavailable`; nothing is kept then.
    """
    if not _NAME.fullmatch(name):
        raise InvalidArgument(f"{name!r} is not a name: lower-case letters, digits and '-'")
    with volume.snapshot() as reader:
        if name in cold.rows(reader):
            raise Exists(f"there is a remote {name!r} already; `stratum cold list` shows it")
    roles.refuse_remote(volume, row)
    trial = cold.open_remote(
        name, replace(row, can={"checksums": True}), request_s_max=volume.config.cold_request_s_max
    )
    try:
        if create_bucket:
            make = getattr(trial.raw, "create_bucket", None)
            if make is None:
                raise InvalidArgument("a directory is not a bucket; make it, then leave --create-bucket out")
            make(row.region)
        marker = cold.read_marker(trial)
        if marker is not None and marker["instance"] != volume.instance:
            raise ForeignRemote(
                f"the bucket and prefix belong to volume {marker['instance']}; choose another prefix, or `stratum rebuild` that volume from it"
            )
        row.can = probe(trial.sealed, trial.plain, stored=roles.Marked(volume, row, trial).check)
        row.can["encrypted"] = bool(row.encryption_key)
        row.epoch = marker["epoch"] if marker is not None else 1
        if marker is None:
            cold.write_marker(trial, volume.instance, row.epoch, new=row.can["conditional_puts"])
    except RemoteError as error:
        raise TierUnavailable(f"the remote cannot be used: {error.message}") from error
    finally:
        trial.plain.close()
    row.added_s = int(time.time())
    volume.mutate(lambda tx: tx.put(b"n" + name.encode(), row.encode()))
    return row


def held(reader: InodeReader, name: str) -> tuple[int, int]:
    """(packs, wanted bytes) in a remote."""
    found = [row for _, row in packs.scan(reader) if row.tier == Tier.COLD and row.remote == name]
    return len(found), sum(row.live_bytes for row in found)


def describe(reader: InodeReader) -> list[dict[str, Any]]:
    """Every remote, without secrets: they are not in the rows."""
    found = []
    for name, row in cold.rows(reader).items():
        count, size = held(reader, name)
        found.append({"name": name, **asdict(row), "packs": count, "bytes": size})
    return found


def check(
    volume: Volume, name: str, *, read: bool = False, seen: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Ask a remote for its marker and every pack; with `read` for every byte. `seen(bytes so far, of how many)` is told meanwhile."""
    document: dict[str, Any] = {
        "name": name, "reachable": False, "trouble": "", "packs": 0, "missing": [], "damaged": [], "error": "",
    }  # fmt: skip
    try:
        volume.cold.check_marker(name, anew=True)
        document["reachable"] = True
        _, remote = volume.cold.remote(name)
        with volume.snapshot() as reader:
            rows = [
                (number, row)
                for number, row in packs.scan(reader)
                if row.tier == Tier.COLD and row.remote == name and row.state == VALID
            ]
        total, done = sum(row.length for _, row in rows), 0
        for number, row in rows:
            if seen is not None:
                seen(done, total)
            done += row.length
            document["packs"] += 1
            _check_pack(volume, remote.sealed, number, row, document, read=read)
        volume.cold.check_marker(name, anew=True)
    except (RemoteError, ForeignRemote, InvalidArgument, TierUnavailable) as error:
        document["error"] = error.message
        document["trouble"] = remote_trouble.of(error) or ""
    return document


def restore_marker(volume: Volume, name: str) -> None:
    """Put back the marker of a remote that has lost it. Raises `Exists` if there is one, whosever it is, `TierUnavailable` or `ForeignRemote`."""
    row, remote = volume.cold.remote(name)
    try:
        if cold.read_marker(remote) is not None:
            raise Exists(f"remote {name!r} has a marker; `stratum cold check {name}` says whose it is")
        prefix = f"v1/{volume.instance}/"
        if held_by(volume, name) and next(iter(remote.sealed.list(prefix)), None) is None:
            raise ForeignRemote(
                f"remote {name!r}: {remote_trouble.place(row)} holds no object of this volume: it is another place, or was emptied; no marker was written"
            )
        cold.write_marker(remote, volume.instance, row.epoch, new=row.can.get("conditional_puts", False))
    except RemoteError as error:
        raise remote_trouble.of_error(name, row, error) from error


def held_by(volume: Volume, name: str) -> int:
    with volume.snapshot() as reader:
        return held(reader, name)[0]


def _check_pack(
    volume: Volume, backend: Backend, number: int, row: PackRow, document: dict[str, Any], *, read: bool
) -> None:
    """Raises `RemoteError` if it cannot be known."""
    try:
        size = backend.head(row.key).size
    except RemoteNotFound:
        volume.cold.check_marker(row.remote, anew=True)  # else more than this object is gone
        document["missing"].append(row.key)
        _tell(volume, number, row, f"its object in remote {row.remote!r} is gone", 0)
        return
    if size < row.length:
        document["damaged"].append(row.key)
        _tell(
            volume, number, row, f"its object in remote {row.remote!r} has {size} bytes of {row.length} and more", size
        )
    elif read and not _is_as_sent(backend, row):
        document["damaged"].append(row.key)
        volume.cold.cache.drop(number)
        _read_extents(volume, number)


def _is_as_sent(backend: Backend, row: PackRow) -> bool:
    digest = hashlib.sha256()
    try:
        for piece in backend.get(row.key, 0, row.length).pieces:
            digest.update(piece)
    except RemoteRefused:
        return False
    return digest.hexdigest() == row.digest


def _tell(volume: Volume, number: int, row: PackRow, what: str, good_bytes: int) -> None:
    """Remember what is lost with a pack, unless something else has it; that is sent again by the scrub."""
    with volume.snapshot() as reader:
        lost = next(damage.lost_extents(reader, number, good_bytes), None)
    if lost is not None:
        volume.damages.found(
            Thing.PACK, number, f"pack {number:016x} ({row.key}): {what}", by="check", first=good_bytes
        )


def _read_extents(volume: Volume, number: int) -> None:
    """Some of a pack's bytes are wrong: reading them one by one tells whose they are."""
    with volume.snapshot() as reader:
        lost = list(damage.lost_extents(reader, number))
        rows = {extent: (*reader.extent(extent), copies.locate(reader, extent)) for extent in lost}
    for extent, (row, checksums, located) in rows.items():
        try:
            copies.read_whole(volume, extent, row, checksums, located)
        except DataDamaged as error:
            volume.damages.found(Thing.EXTENT, extent, error.message, by="check")
        except TierUnavailable:
            continue


def sweep(volume: Volume, name: str, *, age_s_min: float, apply: bool) -> dict[str, Any]:
    """Find what lies in a remote below this volume's prefix and no row knows, older than `age_s_min`, and remove it if `apply`.

    The remote is listed before the rows are read: a pack's row is there before its first byte. Raises `NotFound`, `TierUnavailable`,
    `ForeignRemote`.
    """
    _, remote = volume.cold.remote(name)
    prefix = f"v1/{volume.instance}/"
    before_s = time.time() - age_s_min
    try:
        volume.cold.check_marker(name)
        listed = [info for info in remote.sealed.list(prefix) if not info.key.startswith(prefix + "_")]
        uploads = list(remote.sealed.list_uploads(prefix))
        with volume.snapshot() as reader:
            known = {row.key for _, row in packs.scan(reader) if row.tier == Tier.COLD and row.remote == name}
        objects = [info for info in listed if info.key not in known and info.modified_s < before_s]
        unfinished = [(key, upload) for key, upload, began_s in uploads if key not in known and began_s < before_s]
        if apply:
            for info in objects:
                remote.sealed.delete(info.key, info.version)
            for key, upload in unfinished:
                remote.sealed.abort_upload(key, upload)
    except RemoteError as error:
        raise TierUnavailable(f"remote {name!r}: {error.message}") from error
    return {
        "name": name, "objects": len(objects), "bytes": sum(info.size for info in objects), "uploads": len(unfinished),
        "keys": [info.key for info in objects[:SWEPT_SHOWN]], "removed": apply,
    }  # fmt: skip


def set_state(volume: Volume, name: str, state: str) -> None:
    """Raises `NotFound`."""

    def change(tx: MetadataTransaction) -> None:
        row = cold.get_row(tx, name)
        row.state = state
        tx.put(b"n" + name.encode(), row.encode())

    volume.mutate(change, frees=True)


def remove(volume: Volume, name: str) -> None:
    """Forget a remote that holds nothing. Raises `NotFound`, or `Busy` while it holds packs."""

    def forget(tx: MetadataTransaction) -> None:
        cold.get_row(tx, name)
        count, size = held(tx, name)
        if count:
            raise Busy(
                f"remote {name!r} still holds {count} packs ({size} wanted bytes); `stratum cold drain` empties it"
            )
        tx.delete(b"n" + name.encode())

    volume.mutate(forget, frees=True)
