"""`stratum rebuild`: a new volume from the bucket of one that is lost.

With the newest metadata snapshot everything comes back as it was then, brought up to date by packs that were sent after it; without one,
what packs say of the files they hold. Files of which bytes lay only on the lost disks are left out and listed.

The new volume takes over the marker under a higher epoch: the old one, should it come back, refuses to write.

Nothing here holds a row a file in memory: what packs say lies in a file meanwhile, and rows go into the store as they come.
"""

from __future__ import annotations

import calendar
import json
import shutil
import tempfile
import time
import zlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from stratum import buckets, cold, manifest, private, sessions, volume, warm_disks
from stratum.clocks import STAMP, by_stamp
from stratum.cold_backends.contract import RemoteDamaged, RemoteError
from stratum.cold_backends.encrypt import SALT
from stratum.errors import InvalidArgument, NotFound, TierUnavailable, VolumeInvalid
from stratum.identity import Identities
from stratum.log import get_logger
from stratum.schema import FORMAT_VERSION, NAMES_FORMAT, pack_u64, unpack_json, unpack_u64
from stratum.tier_rows import VALID, PackRow, Tier
from stratum.tiering.adopt_shards import Adopted, adopt_shards
from stratum.tiering.rebuild_files import Builder
from stratum.tiering.snapshots import SEAL_KEY, TAKEN_KEY, parse
from stratum.volume import Volume

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import BinaryIO

    from stratum.cold import Remote
    from stratum.cold_backends.contract import ObjectInfo
    from stratum.manifest import Moment
    from stratum.tier_rows import ColdRow
    from stratum.transaction import MetadataTransaction

log = get_logger("rebuild")
PIECE_BYTES = 1024 * 1024


@dataclass(slots=True)
class Report:
    """What came back. `lost` names files whose bytes are nowhere, `damaged` objects that could not be read. `warm` is of disks that survived."""

    files: int = 0
    size: int = 0
    packs: int = 0
    snapshot: str = ""
    lost: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    warm: Adopted = field(default_factory=Adopted)
    access_key: str = ""
    secret_key: str = ""


@dataclass(slots=True)
class _Told:
    """A pack, and where in the spool its manifest lies."""

    row: PackRow
    moment: Moment
    at: int
    length: int


@dataclass(slots=True)
class Manifests:
    """What packs of a remote say of themselves, in a file. `session`: the newest one that their numbers tell of."""

    spool: BinaryIO
    packs: dict[int, _Told] = field(default_factory=dict)
    session: int = 0

    def add(self, row: PackRow, told: dict[str, Any]) -> None:
        packed = zlib.compress(json.dumps(told).encode(), 1)
        at = self.spool.seek(0, 2)
        self.spool.write(packed)
        self.packs[int(told["pack"])] = _Told(row, manifest.moment_of(told), at, len(packed))
        extents, inodes = (entry["extent"] for entry in told["extents"]), (entry["inode"] for entry in told["files"])
        self.session = max(self.session, int(told["pack"]) >> 32, *(number >> 32 for number in (*extents, *inodes)))

    def in_order(self) -> Iterator[tuple[int, PackRow, Moment, dict[str, Any]]]:
        """From the oldest manifest to the newest."""
        for number, told in sorted(self.packs.items(), key=lambda item: (item[1].moment, item[0])):
            self.spool.seek(told.at)
            yield number, told.row, told.moment, json.loads(zlib.decompress(self.spool.read(told.length)))


@dataclass(slots=True)
class _Found:
    """What a bucket holds of an instance."""

    instance: str
    epoch: int
    indexes: list[str]
    manifests: Manifests


@dataclass(slots=True)
class _Snapshot:
    """A whole snapshot in a file. `is_sure`: of `moment`; snapshots of older programs only tell when they had been sent, which was later."""

    file: BinaryIO
    moment: Moment
    is_sure: bool = False
    seal: bytes = b""
    session: int = 0
    format: int = 3

    def _records(self) -> Iterator[tuple[bytes, bytes]]:
        """Raises `ValueError` or `zlib.error` if it is damaged."""
        self.file.seek(0)
        return parse(iter(lambda: self.file.read(PIECE_BYTES), b""))

    def rows(self) -> Iterator[tuple[bytes, bytes]]:
        """Of the metadata store, and nothing else. Raises as `look`."""
        return (record for record in self._records() if record[0] not in {SEAL_KEY, TAKEN_KEY})

    def look(self) -> None:
        """Read all of it once. Raises `ValueError` or `zlib.error` if it is damaged."""
        for key, value in self._records():
            if key == SEAL_KEY:
                self.seal = value
            elif key == TAKEN_KEY:
                told = unpack_json(value)
                self.moment, self.is_sure = manifest.moment_of(told), True
                self.format = told.get("format", self.format)
            elif key[:1] in {b"I", b"X", b"p"}:
                self.session = max(self.session, unpack_u64(key[1:])[0] >> 32)


def rebuild(
    root: Path,
    settings: dict[str, Any],
    warm_paths: list[Path],
    name: str,
    row: ColdRow,
    *,
    create_folders: bool = False,
    watch: Callable[[int, int], None] = lambda _done, _total: None,
) -> Report:
    """Make the volume; `create_folders`: those for data that are not there, too. Raises `NotFound`, `TierUnavailable`, `ForeignRemote` or what making a volume raises; the folder is
    then removed again, and the bucket is as it was.
    """
    report = Report()
    remote = cold.open_remote(name, replace(row, can={}), request_s_max=60.0)
    try:
        with file_beside(root) as spool:
            found = _look(remote, name, spool, report, watch)
            for path in warm_paths:
                private.require_folder(path, "a disk of the warm tier", create=create_folders)
            disks = {path: warm_disks.disk_of(path, found.instance) for path in warm_paths}
            volume.create(root, settings, create_folders=create_folders)
            try:
                with file_beside(root) as file:
                    snapshot = _snapshot(remote, found, file, report)
                    fresh = replace(row, epoch=found.epoch + 1, added_s=int(time.time()))
                    _restore(root, snapshot, found, fresh, name, disks, report)
                try:
                    cold.write_marker(remote, found.instance, found.epoch + 1, new=False)
                except RemoteError as error:
                    raise TierUnavailable(f"the marker cannot be written: {error.message}") from error
            except BaseException:
                shutil.rmtree(root)
                for path, number in disks.items():
                    if number:
                        warm_disks.write_marker(path, found.instance, number)
                raise
    finally:
        remote.plain.close()
    return report


def file_beside(root: Path) -> Any:
    """Without a name, on the disk that the volume is on, or will be."""
    return tempfile.TemporaryFile(dir=next((folder for folder in (root, root.parent) if folder.is_dir()), None))


def _look(remote: Remote, name: str, spool: BinaryIO, report: Report, watch: Callable[[int, int], None]) -> _Found:
    """`watch(done, total)` counts the bytes of the objects looked at. Raises `NotFound` if there is no volume, `TierUnavailable` if the bucket cannot be read."""
    try:
        marker = cold.read_marker(remote)
        if marker is None:
            raise NotFound(f"there is no {cold.MARKER} in the bucket below this prefix: no volume lies here")
        prefix = f"v1/{marker['instance']}/"
        listed = list(remote.sealed.list(prefix))
        indexes = by_stamp(info.key for info in listed if info.key.startswith(prefix + "_index/"))
        found = _Found(marker["instance"], marker["epoch"], indexes, Manifests(spool))
        total, done = sum(info.size for info in listed), 0
        for info in listed:
            if not info.key.startswith(prefix + "_"):
                try:
                    found.manifests.add(*read_pack(remote, name, info))
                except (RemoteDamaged, ValueError) as error:
                    log.warning("pack_not_read", key=info.key, error=str(error))
                    report.damaged.append(info.key)
            done += info.size
            watch(done, total)
        if listed and remote.sealed is remote.plain and SALT in remote.plain.head(listed[0].key).metadata:
            raise InvalidArgument("what lies in the bucket is encrypted; give its key with --encryption-key")
        if report.damaged and not found.manifests.packs:
            raise TierUnavailable(
                f"none of {len(report.damaged)} objects in the bucket could be read; nothing was changed"
            )
    except RemoteError as error:
        raise TierUnavailable(f"the bucket cannot be read: {error.message}") from error
    return found


def read_pack(remote: Remote, name: str, info: ObjectInfo) -> tuple[PackRow, dict[str, Any]]:
    """A pack as its object describes it. Raises `RemoteError`, `RemoteDamaged` or `ValueError`."""
    told, _ = cold.read_manifest(remote.sealed, info.key, info.size)
    extents = told["extents"]
    length = max((row["offset"] + row["length"] for row in extents), default=0)
    digest = str(remote.sealed.head(info.key).metadata.get("stratum-sha256", ""))
    row = PackRow(
        Tier.COLD, VALID, 0, length, digest, told["made_ns"] // 1_000_000_000, remote=name, key=info.key, version=info.version
    )  # fmt: skip
    return row, told


def _snapshot(remote: Remote, found: _Found, file: BinaryIO, report: Report) -> _Snapshot | None:
    """The newest snapshot that is whole."""
    for key in reversed(found.indexes):
        try:
            sent_s = calendar.timegm(time.strptime(key.rpartition("/")[2], STAMP))
            moment = manifest.moment_of({"epoch": found.epoch, "made_ns": (sent_s + 1) * 1_000_000_000})
            snapshot = _Snapshot(file, moment)
            file.seek(0)
            file.truncate()
            file.writelines(remote.sealed.get(key).pieces)
            snapshot.look()
            if snapshot.format > FORMAT_VERSION:
                raise VolumeInvalid(
                    f"the snapshot {key} is of format {snapshot.format}, and this program knows 1 to {FORMAT_VERSION}; rebuild with the program that took it"
                )
        except (RemoteError, zlib.error, ValueError) as error:
            log.warning("snapshot_not_read", key=key, error=str(error))
            report.damaged.append(key)
            continue
        report.snapshot = key
        return snapshot
    return None


def _restore(
    root: Path, snapshot: _Snapshot | None, found: _Found, row: ColdRow, name: str, disks: dict[Path, int], report: Report
) -> None:  # fmt: skip
    """`disks` are folders of the warm tier, with the number of those that the volume had before."""
    if snapshot is not None and snapshot.seal:
        private.write(root / "meta" / private.SEAL_KEY, snapshot.seal)
    # A session of its own, so that the numbers we give out are not those of the old volume.
    newest = max(found.manifests.session, snapshot.session if snapshot is not None else 0)
    with Volume(root, "rebuild") as opened:
        opened.mutate(lambda tx: _reserve(tx, newest + sessions.SKIPPED))
    with Volume(root, "rebuild") as opened:
        builder = Builder(opened, name)
        builder.adopt(found.instance, row)
        if snapshot is not None:
            builder.load(snapshot.rows())
            if snapshot.format < NAMES_FORMAT:
                builder.tell_names()
        for number, pack, moment, told in found.manifests.in_order():
            builder.add_pack(number, pack, told)
            if snapshot is None or moment > snapshot.moment:
                builder.add_files(told)
            elif not snapshot.is_sure:
                builder.add_files(told, only_what_is_free=True)
        for path, number in disks.items():
            if number:
                opened.warm.take_up(path)
        adopt_shards(opened, report.warm)
        report.packs = len(found.manifests.packs)
        report.lost = builder.drop_lost()
        report.files, report.size = builder.settle()
        _give_access(opened, report)
        for path, number in disks.items():
            if not number:
                opened.warm.add(path, create=True)


def _reserve(tx: MetadataTransaction, session: int) -> None:
    """Sessions up to this one are taken."""
    raw = tx.get(b"Csession")
    tx.put(b"Csession", pack_u64(max(unpack_u64(raw)[0] if raw else 0, session)))


def _give_access(opened: Volume, report: Report) -> None:
    """Users of the snapshot stay; without a key that works there is a fresh administrator."""
    identities = Identities(opened)
    if not any(True for _ in identities.access_keys()):
        taken = {user.name for user in identities.users()}
        name = next(name for name in ("admin", *(f"admin-{n}" for n in range(2, 1000))) if name not in taken)
        user, report.access_key, report.secret_key = identities.add_user(name, admin=True)

        def adopt(tx: MetadataTransaction) -> None:
            known = {user.user_id for user in identities.users()}
            for bucket, found in buckets.scan(tx):
                if found.owner not in known:
                    buckets.change(tx, bucket, owner=user.user_id)

        opened.mutate(adopt)
