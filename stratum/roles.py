"""No place plays two roles: a volume is not its own cold tier, and no two remotes are one place.

Paths are compared by places.py. What lies behind an address nobody can tell from the address, so a remote is asked: a marker with a random name
is put there, and must not appear in this volume, through whichever face, name or proxy it comes, nor in another of its remotes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from stratum import buckets, cold, objects, places
from stratum.cold_backends.contract import RemoteError
from stratum.content import get_inline
from stratum.errors import ConfigInvalid, InvalidArgument, StratumError
from stratum.manifest import Names
from stratum.places import BYTES, Role
from stratum.schema import Inode, key_u64, unpack_u64

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stratum.cold import Remote
    from stratum.tier_rows import ColdRow
    from stratum.transaction import InodeReader
    from stratum.volume import Volume

HOLDERS = BYTES | {Role.MOUNT}
"""What a folder that is to hold bytes of the volume must have nothing in common with."""
PORTS = {"http": 80, "https": 443}


def refuse_folder(volume: Volume, what: str, path: Path) -> None:
    """Raises `InvalidArgument` if a folder for bytes lies in, is or holds one that has a role already, or lies in a mount of this volume."""
    places.refuse_overlap(what, path, places.of(volume), HOLDERS)
    _refuse_mount(volume, what, path)


def refuse_backup(volume: Volume, path: Path) -> None:
    """Raises `InvalidArgument` if a backup would go into what it is a backup of."""
    found = places.overlapping(path, places.of(volume))
    if found is not None and found[0] != "holds":
        raise InvalidArgument(
            f"the backup {path} {found[0]} {found[1]}: it would be lost with what it is to bring back; choose a folder elsewhere"
        )
    _refuse_mount(volume, "the backup", path)


def _refuse_mount(volume: Volume, what: str, path: Path) -> None:
    mount = places.stratum_mount_of(path)
    if mount is not None and places.is_mount_of(mount, volume.root):
        raise InvalidArgument(
            f"{what} {path} lies in a mount of this volume, {mount.path}; choose another folder for {what}"
        )


# -- remotes ------------------------------------------------------------------------------------------------------------


def _address(row: ColdRow) -> tuple[str, str]:
    """(service, bucket) in one writing."""
    if row.kind == "directory":
        return "directory", str(Path(row.endpoint).resolve())
    found = urlsplit(row.endpoint)
    scheme, host = found.scheme.lower() or "https", (found.hostname or "").rstrip(".")
    return (
        f"{scheme}://{host}:{found.port or PORTS.get(scheme, 0)}{found.path.rstrip('/')}" if host else "aws"
    ), row.bucket


def same_place(row: ColdRow, other: ColdRow) -> bool:
    """Whether two remotes are one prefix, or one lies below the other's, by their addresses."""
    if _address(row) != _address(other):
        return False
    return row.prefix.startswith(other.prefix) or other.prefix.startswith(row.prefix)


def refuse_remote(volume: Volume, row: ColdRow) -> None:
    """What can be known of a new remote before it is asked. Raises `InvalidArgument`."""
    if row.kind == "directory":
        refuse_folder(volume, "the remote's directory", Path(row.endpoint) / row.prefix)
    with volume.snapshot() as reader:
        known = cold.rows(reader)
    for name, other in known.items():
        if same_place(row, other):
            raise InvalidArgument(
                f"the remote {name!r} is this place already, or holds it, or lies in it; choose another bucket or prefix"
            )


class Marked:
    """Whether what a new remote was given appears where it must not. Made before the first byte is sent there."""

    def __init__(self, volume: Volume, row: ColdRow, trial: Remote) -> None:
        self._volume = volume
        self._row = row
        self._trial = trial
        with volume.snapshot() as reader:
            self._newest = {session: _newest(reader, session) for session in volume.session.rows()}

    def check(self, key: str) -> None:
        """`key` was put into the remote; its last part is random. Raises `InvalidArgument` if this volume, or another of its remotes, has it now."""
        text = key.rpartition("/")[2].encode()
        with self._volume.snapshot() as reader:
            names = Names(reader)
            for inode in self._new(reader):
                if _holds(reader, inode, text):
                    bucket, keys = names.of(inode)
                    where = f"bucket {bucket!r}" if keys else "this volume"
                    raise InvalidArgument(
                        f"the remote is this volume itself: what was put there has appeared in {where}; its cold tier must be another place"
                    )
            known = cold.rows(reader)
        for name, other in known.items():
            if any(_is_there(self._volume, name, candidate) for candidate in self._seen_from(other, key)):
                raise InvalidArgument(
                    f"the remote {name!r} is the same place by another address; choose another bucket or prefix"
                )
            inside = other.prefix != self._row.prefix and other.prefix.startswith(self._row.prefix)
            if inside and self._is_claimed(other.prefix[len(self._row.prefix) :]):
                raise InvalidArgument(f"the remote {name!r} lies in this place; choose another bucket or prefix")

    def _new(self, reader: InodeReader) -> Iterator[Inode]:
        """Inodes that were not there when the trial began, whoever made them."""
        for session in self._volume.session.rows():
            start = self._newest.get(session, session << 32) + 1
            for key, raw in reader.scan(key_u64(b"I", start), key_u64(b"I", (session + 1) << 32)):
                number = unpack_u64(key[1:])[0]
                yield Inode.unpack(number, raw)

    def _seen_from(self, other: ColdRow, key: str) -> set[str]:
        """What the key would be to another remote that is the same place, or holds it."""
        found = {key}
        if self._row.prefix.startswith(other.prefix):
            found.add(self._row.prefix[len(other.prefix) :] + key)
        return found

    def _is_claimed(self, below: str) -> bool:
        try:
            found = json.loads(b"".join(self._trial.plain.get(below + cold.MARKER).pieces))
            return bool(found["instance"] == self._volume.instance)
        except (RemoteError, ValueError, KeyError, TypeError):
            return False


def _newest(reader: InodeReader, session: int) -> int:
    row = reader.last_before(key_u64(b"I", session << 32), key_u64(b"I", (session + 1) << 32))
    return unpack_u64(row[0][1:])[0] if row is not None else session << 32


def _holds(reader: InodeReader, inode: Inode, text: bytes) -> bool:
    """By its name, its metadata or its bytes."""
    rows = (reader.get(key_u64(b"M", inode.number)), reader.get(key_u64(b"N", inode.number)))
    return text in inode.entry or any(row is not None and text in row for row in rows)


def _is_there(volume: Volume, name: str, key: str) -> bool:
    """A remote that does not answer says nothing."""
    try:
        volume.cold.remote(name)[1].plain.head(key)
    except StratumError:
        return False
    return True


# -- what is configured already -----------------------------------------------------------------------------------------


def problems(volume: Volume) -> list[str]:
    """What plays two roles by what the configuration and the store say. Asks no remote."""
    found = places.conflicts(places.of(volume))
    with volume.snapshot() as reader:
        known = list(cold.rows(reader).items())
        found += [
            f"the remote {name!r} is this volume itself: its marker lies in bucket {bucket!r}"
            for name, row in known
            for bucket in _buckets_with_marker(volume, reader, row)
        ]
    found += [
        f"the remotes {name!r} and {other!r} are one place, or one lies in the other"
        for at, (name, row) in enumerate(known)
        for other, second in known[at + 1 :]
        if row.kind == "s3" and same_place(row, second)
    ]
    return found


def refuse(volume: Volume) -> None:
    """Raises `ConfigInvalid`."""
    found = problems(volume)
    if found:
        raise ConfigInvalid(f"no place may play two roles: {'; '.join(found)}; give one of them another place")


def _buckets_with_marker(volume: Volume, reader: InodeReader, row: ColdRow) -> Iterator[str]:
    key = (row.prefix + cold.MARKER).encode()
    for name, bucket in buckets.scan(reader):
        try:
            inode = objects.head(reader, bucket, key).inode
            told = json.loads(get_inline(reader, inode.number)) if inode.flags & Inode.INLINE else {}
        except (StratumError, ValueError):
            continue
        if isinstance(told, dict) and told.get("instance") == volume.instance:
            yield name
