"""`stratum rebuild`: a new volume from the bucket of one that is lost.

With the newest metadata snapshot everything comes back as it was then, brought up to date by packs made after it; without one,
what packs say of the files they hold. Files of which bytes lay only on the lost disks are left out and listed.

The new volume takes over the marker under a higher epoch: the old one, should it come back, refuses to write.
"""

from __future__ import annotations

import base64
import shutil
import time
import zlib
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from stratum import buckets, cold, evidence, inventory, objects, packs, tree, volume
from stratum.blocks import BLOCK_BYTES, CHECKSUM_BYTES
from stratum.cold_backends.contract import RemoteDamaged, RemoteError
from stratum.cold_backends.encrypt import SALT
from stratum.errors import Gone, InvalidArgument, NotFound, TierUnavailable
from stratum.identity import Identities
from stratum.log import get_logger
from stratum.manifest import Names
from stratum.schema import (
    ELSEWHERE_SEGMENT,
    STORED_SEGMENT,
    BucketRow,
    Dentry,
    ExtentRow,
    Inode,
    Kind,
    ObjectMetadata,
    Slice,
    key_u64,
    key_u64_u64,
    pack_json,
    pack_u64,
    unpack_u64,
)
from stratum.tier_rows import VALID, AccessRow, CopyRow, PackRow, Tier
from stratum.tiering.mover import hottest
from stratum.tiering.snapshots import SEAL_KEY, parse
from stratum.volume import Volume

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from stratum.cold import Remote
    from stratum.cold_backends.contract import ObjectInfo
    from stratum.tier_rows import ColdRow
    from stratum.transaction import MetadataTransaction

log = get_logger("rebuild")
ROWS_AT_ONCE = 2000
FILES_AT_ONCE = 200


@dataclass(slots=True)
class Report:
    """What came back. `lost` names files whose bytes are not all in the bucket, `damaged` objects that could not be read."""

    files: int = 0
    size: int = 0
    packs: int = 0
    snapshot: str = ""
    lost: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    access_key: str = ""
    secret_key: str = ""


@dataclass(slots=True)
class _Found:
    """What a bucket holds of an instance: pack rows with their manifests, by number."""

    instance: str
    epoch: int
    packs: dict[int, tuple[PackRow, dict[str, Any]]]
    index: str = ""


def _look(remote: Remote, name: str, report: Report, watch: Callable[[int, int], None]) -> _Found:
    """`watch(done, total)` counts the bytes of the objects looked at. Raises `NotFound` if there is no volume, `TierUnavailable` if the bucket cannot be read."""
    try:
        marker = cold.read_marker(remote)
        if marker is None:
            raise NotFound(f"there is no {cold.MARKER} in the bucket below this prefix: no volume lies here")
        prefix = f"v1/{marker['instance']}/"
        listed = list(remote.sealed.list(prefix))
        indexes = sorted(info.key for info in listed if info.key.startswith(prefix + "_index/"))
        found = _Found(marker["instance"], marker["epoch"], {}, indexes[-1] if indexes else "")
        total, done = sum(info.size for info in listed), 0
        for info in listed:
            if not info.key.startswith(prefix + "_"):
                _read_pack(remote, name, info, found, report)
            done += info.size
            watch(done, total)
        if listed and remote.sealed is remote.plain and SALT in remote.plain.head(listed[0].key).metadata:
            raise InvalidArgument("what lies in the bucket is encrypted; give its key with --encryption-key")
        if report.damaged and not found.packs:
            raise TierUnavailable(
                f"none of {len(report.damaged)} objects in the bucket could be read; nothing was changed"
            )
    except RemoteError as error:
        raise TierUnavailable(f"the bucket cannot be read: {error.message}") from error
    return found


def _read_pack(remote: Remote, name: str, info: ObjectInfo, found: _Found, report: Report) -> None:
    try:
        told, _ = cold.read_manifest(remote.sealed, info.key, info.size)
    except (RemoteDamaged, ValueError) as error:
        log.warning("pack_not_read", key=info.key, error=str(error))
        report.damaged.append(info.key)
        return
    extents = told["extents"]
    length = max((row["offset"] + row["length"] for row in extents), default=0)
    digest = str(remote.sealed.head(info.key).metadata.get("stratum-sha256", ""))
    row = PackRow(
        Tier.COLD, VALID, 0, length, digest, told["made_ns"] // 1_000_000_000, extents=len(extents),
        live_bytes=sum(entry["length"] for entry in extents), remote=name, key=info.key, version=info.version,
    )  # fmt: skip
    found.packs[int(told["pack"])] = (row, told)


def rebuild(
    root: Path,
    settings: dict[str, Any],
    warm_paths: list[Path],
    name: str,
    row: ColdRow,
    *,
    watch: Callable[[int, int], None] = lambda _done, _total: None,
) -> Report:
    """Make the volume. Raises `NotFound`, `TierUnavailable`, `ForeignRemote` or what making a volume raises; the folder is
    then removed again, and the bucket is as it was.
    """
    report = Report()
    remote = cold.open_remote(name, replace(row, can={}), request_s_max=60.0)
    found = _look(remote, name, report, watch)
    volume.create(root, settings)
    try:
        rows = _snapshot_rows(remote, found, report)
        _restore(
            root, rows, found, replace(row, epoch=found.epoch + 1, added_s=int(time.time())), name, warm_paths, report
        )
        try:
            cold.write_marker(remote, found.instance, found.epoch + 1, new=False)
        except RemoteError as error:
            raise TierUnavailable(f"the marker cannot be written: {error.message}") from error
    except BaseException:
        shutil.rmtree(root)
        raise
    finally:
        remote.plain.close()
    return report


def _snapshot_rows(remote: Remote, found: _Found, report: Report) -> dict[bytes, bytes]:
    if not found.index:
        return {}
    try:
        rows = dict(parse(remote.sealed.get(found.index).pieces))
    except (RemoteError, zlib.error, ValueError) as error:
        log.warning("snapshot_not_read", key=found.index, error=str(error))
        report.damaged.append(found.index)
        return {}
    report.snapshot = found.index
    return rows


def _restore(
    root: Path, rows: dict[bytes, bytes], found: _Found, row: ColdRow, name: str, warm_paths: list[Path], report: Report
) -> None:
    seal = rows.pop(SEAL_KEY, None)
    if seal is not None:
        (root / "meta" / "seal.key").write_bytes(seal)
    with Volume(root, "rebuild") as opened:
        builder = _Builder(opened, found, name, report)
        builder.prepare(row)
        if rows:
            builder.load(rows)
        builder.add_packs()
        builder.add_files(newer_only=bool(rows))
        builder.drop_lost()
        _give_access(opened, report)
        for path in warm_paths:
            opened.warm.add(path)


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


class _Builder:
    def __init__(self, opened: Volume, found: _Found, name: str, report: Report) -> None:
        self._volume = opened
        self._found = found
        self._name = name
        self._report = report
        self._known: dict[int, int] = {}
        self._numbers: dict[int, int] = {}

    def prepare(self, row: ColdRow) -> None:
        """The new volume is the old instance, and gives out numbers that the old one never did."""
        sessions = [number >> 32 for number in self._found.packs]
        sessions += [entry["extent"] >> 32 for _, told in self._found.packs.values() for entry in told["extents"]]
        sessions += [entry["inode"] >> 32 for _, told in self._found.packs.values() for entry in told["files"]]
        self._reserve(max(sessions, default=0))

        def prepare(tx: MetadataTransaction) -> None:
            tx.put(b"ginstance", pack_json({"id": self._found.instance}))
            tx.put(b"n" + self._name.encode(), row.encode())

        self._volume.mutate(prepare)
        self._volume.instance = self._found.instance

    def _reserve(self, session: int) -> None:
        """Numbers of sessions up to this one are taken; ours is far behind them."""
        wanted = session + 1_000_000

        def reserve(tx: MetadataTransaction) -> None:
            raw = tx.get(b"Csession")
            tx.put(b"Csession", pack_u64(max(unpack_u64(raw)[0] if raw else 0, wanted)))

        self._volume.mutate(reserve)

    # -- the snapshot -------------------------------------------------------------------------------------------------

    def load(self, rows: dict[bytes, bytes]) -> None:
        """Rows as they were, but for bytes that lay on the lost disks."""
        self._reserve(max((unpack_u64(key[1:])[0] >> 32 for key in rows if key[:1] in {b"I", b"X", b"p"}), default=0))
        skipped = {b"d", b"g", b"n", b"p", b"q", b"c", b"G", b"j"}
        items = [(key, value) for key, value in rows.items() if key[:1] not in skipped and key != b"I" + pack_u64(1)]
        items.append((b"I" + pack_u64(1), rows[b"I" + pack_u64(1)]))
        for at in range(0, len(items), ROWS_AT_ONCE):
            batch = items[at : at + ROWS_AT_ONCE]

            def load(tx: MetadataTransaction, batch: list[tuple[bytes, bytes]] = batch) -> None:
                for key, value in batch:
                    tx.put(key, _elsewhere(value) if key[:1] == b"X" else value)
                inventory.changed(tx)

            self._volume.mutate(load)
        self._known = {
            (number := unpack_u64(key[1:])[0]): Inode.unpack(number, value).version
            for key, value in rows.items()
            if key[:1] == b"I"
        }
        self._report.files = sum(1 for key, value in rows.items() if key[:1] == b"I" and value[0] == Kind.FILE)

    # -- packs --------------------------------------------------------------------------------------------------------

    def add_packs(self) -> None:
        """Every pack of the bucket and the extents it holds; an extent in two of them is taken from the newer one."""
        newest: dict[int, int] = {}
        for number, (_, told) in sorted(self._found.packs.items(), key=lambda item: item[1][1]["made_ns"]):
            for entry in told["extents"]:
                newest[entry["extent"]] = number
        self._report.packs = len(self._found.packs)
        for number, (row, told) in self._found.packs.items():
            held = [entry for entry in told["extents"] if newest[entry["extent"]] == number]

            def add(
                tx: MetadataTransaction, number: int = number, row: PackRow = row, held: list[dict[str, Any]] = held
            ) -> None:
                row.extents, row.live_bytes = len(held), sum(entry["length"] for entry in held)
                packs.put(tx, number, row)
                for entry in held:
                    extent, place = entry["extent"], CopyRow(number, entry["offset"], entry["length"])
                    tx.put(packs.copy_key(extent, Tier.COLD), place.encode())
                    tx.put(key_u64_u64(b"q", number, extent), place.encode())
                    self._add_extent(tx, entry)

            self._volume.mutate(add)

    def _add_extent(self, tx: MetadataTransaction, entry: dict[str, Any]) -> None:
        number, sums = entry["extent"], base64.b64decode(entry["checksums"])
        if not tx.has_extent(number):
            tx.put(key_u64(b"X", number), ExtentRow(entry["length"], ELSEWHERE_SEGMENT, 0, 0).pack(sums))
            if len(sums) > 256:
                tx.put(key_u64(b"K", number), sums)
            return
        row, known = tx.extent(number)
        blocks = -(-row.length // BLOCK_BYTES) * CHECKSUM_BYTES
        if row.segment == ELSEWHERE_SEGMENT and len(known) != blocks:
            tx.set_checksums(number, sums)

    # -- files --------------------------------------------------------------------------------------------------------

    def add_files(self, *, newer_only: bool) -> None:
        """Files as the newest manifest that names them tells; beside a snapshot only those it does not know."""
        latest: dict[int, dict[str, Any]] = {}
        rows: dict[str, dict[str, Any]] = {}
        for _, told in sorted((item for item in self._found.packs.values()), key=lambda item: item[1]["made_ns"]):
            for entry in told["files"]:
                before = latest.get(entry["inode"])
                if before is None or entry["version"] >= before["version"]:
                    latest[entry["inode"]] = entry
            rows.update(told["buckets"])
        wanted = [
            entry for number, entry in latest.items() if not newer_only or entry["version"] > self._known.get(number, 0)
        ]
        self._add_buckets(rows)
        for at in range(0, len(wanted), FILES_AT_ONCE):
            batch = sorted(wanted, key=lambda entry: entry["inode"])[at : at + FILES_AT_ONCE]

            def add(tx: MetadataTransaction, batch: list[dict[str, Any]] = batch) -> None:
                for entry in batch:
                    if entry["inode"] in self._known:
                        self._update_file(tx, entry)
                    else:
                        self._add_file(tx, entry)

            self._volume.mutate(add)
        self._report.files += sum(1 for entry in wanted if entry["inode"] not in self._known)

    def _add_buckets(self, rows: dict[str, dict[str, Any]]) -> None:
        def add(tx: MetadataTransaction) -> None:
            for name, told in rows.items():
                if tx.get(b"B" + name.encode()) is None:
                    made = buckets.create(tx, name, told["owner"])
                    self._numbers[told["inode"]] = made.inode
                    fresh = BucketRow(**{**told, "inode": made.inode})
                    inventory.put(tx, name, fresh)

        self._volume.mutate(add)

    def _update_file(self, tx: MetadataTransaction, entry: dict[str, Any]) -> None:
        """The content of a file that was written after the snapshot; its names are those of the snapshot."""
        inode = tx.inode(entry["inode"])
        told = Inode.unpack(entry["inode"], base64.b64decode(entry["attributes"]))
        for piece in tx.slices(inode.number):
            tx.delete(key_u64_u64(b"S", inode.number, piece.file_offset))
        tx.delete(key_u64(b"N", inode.number))
        inode.flags &= ~Inode.INLINE
        tx.usage(inode.bucket, 0, told.size - inode.size)
        inode.size, inode.version, inode.etag, inode.etag_parts = told.size, told.version, told.etag, told.etag_parts
        inode.mtime_ns, inode.ctime_ns = told.mtime_ns, told.ctime_ns
        for offset, length, extent, inside in entry["slices"]:
            tx.put_slice(inode.number, Slice(offset, length, extent, inside), moved=True)
        tx.dirty(inode)

    def _add_file(self, tx: MetadataTransaction, entry: dict[str, Any]) -> None:
        try:
            bucket = buckets.get(tx, entry["bucket"])
        except NotFound:
            return
        inode = Inode.unpack(entry["inode"], base64.b64decode(entry["attributes"]))
        inode.bucket, inode.nlink, inode.flags, inode.size = bucket.inode, 0, 0, 0
        size = Inode.unpack(entry["inode"], base64.b64decode(entry["attributes"])).size
        tx.add_inode(inode)
        for key in map(base64.b64decode, entry["names"]):
            entries, name = tree.split_key(key)
            parent = tree.ensure_directories(tx, bucket, entries)
            if not name or tree.get_dentry(tx, parent.number, name) is not None:
                if not name and not parent.object_inode:
                    tree.change_liveness(tx, parent, lambda directory: setattr(directory, "rdev", inode.number))
                    tx.usage(bucket.inode, 1, 0)
                    inode.nlink += 1
                    inode.parent = parent.number
                continue  # a file that was put there later has the name
            tree.attach(tx, parent, name, Dentry(inode.number, inode.kind))
            inode.nlink += 1
        if not inode.nlink:
            tx.remove_inode(inode.number)
            return
        for offset, length, extent, inside in entry["slices"]:
            tx.put_slice(inode.number, Slice(offset, length, extent, inside), moved=True)
            if tx.has_extent(extent):
                tx.reference_extent(extent, 1)
        tx.usage(bucket.inode, 0, size)
        inode.size = size
        if "metadata" in entry:
            objects.set_metadata(tx, inode, ObjectMetadata.unpack(pack_json(entry["metadata"])))
            tx.delete(key_u64(b"m", inode.number))
        for attribute, value in entry.get("xattrs", {}).items():
            tx.put(key_u64(b"Y", inode.number) + base64.b64decode(attribute), base64.b64decode(value))
        used_s = max(inode.mtime_ns, 0) // 1_000_000_000
        if evidence.get(tx, inode.number) is None and entry["slices"]:
            evidence.put(tx, inode.number, AccessRow(Tier.COLD, used_s, used_s, last_write_s=used_s), None)
        tx.dirty(inode)

    # -- what is not there --------------------------------------------------------------------------------------------

    def drop_lost(self) -> None:
        """Set every extent's references right, and remove files of which bytes are nowhere."""
        with self._volume.snapshot() as reader:
            copied = {unpack_u64(key[1:9])[0] for key, _ in reader.scan(b"c", b"d")}
            references: Counter[int] = Counter()
            lost: set[int] = set()
            for key, raw in reader.scan(b"S", b"T"):
                number = unpack_u64(key[1:9])[0]
                extent = Slice.unpack(0, raw).extent
                references[extent] += 1
                known = reader.get(key_u64(b"X", extent))
                stored = known is not None and ExtentRow.unpack(known)[0].segment == STORED_SEGMENT
                if known is None or not (stored or extent in copied):
                    lost.add(number)
            extents = {unpack_u64(key[1:])[0]: ExtentRow.unpack(raw)[0] for key, raw in reader.scan(b"X", b"Y")}
        wrong = {number: references[number] for number, row in extents.items() if row.references != references[number]}
        items = list(wrong.items())
        for at in range(0, len(items), ROWS_AT_ONCE):
            batch = items[at : at + ROWS_AT_ONCE]
            self._volume.mutate(partial(_set_references, batch=batch))
        for number in lost:
            self._drop_file(number)
        self._settle_tiers()

    def _drop_file(self, number: int) -> None:
        with self._volume.snapshot() as reader:
            try:
                inode = reader.inode(number)
            except Gone:
                return
            bucket, keys = Names(reader).of(inode)

        def drop(tx: MetadataTransaction) -> None:
            for piece in tx.slices(number):
                if not tx.has_extent(piece.extent):
                    tx.delete(key_u64_u64(b"S", number, piece.file_offset))
            row = buckets.get(tx, bucket)
            for key in keys:
                objects.delete(tx, row, key)

        self._report.lost += [f"{bucket}/{key.decode('utf-8', 'surrogateescape')}" for key in keys]
        self._report.files -= 1
        if keys:
            self._volume.mutate(drop)

    def _settle_tiers(self) -> None:
        """Everything that was warm or hot is cold now, or lies in the store."""
        with self._volume.snapshot() as reader:
            rows = [(unpack_u64(key[1:])[0], AccessRow.unpack(raw)) for key, raw in reader.scan(b"a", b"b")]
        for at in range(0, len(rows), FILES_AT_ONCE):
            batch = rows[at : at + FILES_AT_ONCE]

            def settle(tx: MetadataTransaction, batch: list[tuple[int, AccessRow]] = batch) -> None:
                for number, row in batch:
                    if not tx.has_inode(number):
                        evidence.forget(tx, number)
                        continue
                    tier = hottest(tx, [piece.extent for piece in tx.slices(number)])
                    if tier != row.tier:
                        fresh = AccessRow.unpack(row.pack())
                        fresh.tier = tier
                        evidence.put(tx, number, fresh, row)
                    self._report.size += tx.inode(number).size

            self._volume.mutate(settle)


def _set_references(tx: MetadataTransaction, batch: list[tuple[int, int]]) -> None:
    for number, count in batch:
        tx.set_references(number, count)


def _elsewhere(raw: bytes) -> bytes:
    """An extent's row without the hot bytes that are lost."""
    row, sums = ExtentRow.unpack(raw)
    if row.segment not in {STORED_SEGMENT, ELSEWHERE_SEGMENT}:
        row.segment, row.offset = ELSEWHERE_SEGMENT, 0
        row.generation += 1
    return row.pack(sums)
