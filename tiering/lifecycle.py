"""Carrying out lifecycle rules, and restores that RestoreObject asked for.

A bucket with rules is walked once a day; nothing else is. Every action is checked again in the transaction that does it, so an
object that changed meanwhile is left alone. Expiration depends on age alone, never on what became of a move.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from stratum import buckets, evidence, filling, hints, lifecycle, listing, multipart, objects, packs, tree
from stratum.clocks import come
from stratum.cold_backends.contract import RemoteError
from stratum.errors import NoSuchBucket, NoSuchUpload, ReadOnlyBucket, StratumError
from stratum.log import get_logger
from stratum.schema import Kind, key_u64, prefix_range, unpack_u64
from stratum.storage_classes import STANDARD
from stratum.tier_rows import TIER_OF_CLASS, MoveRow, RestoreRow, Tier
from stratum.tiering.mover import hottest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stratum.lifecycle import Rule
    from stratum.schema import BucketRow, Inode
    from stratum.tiering.mover import Mover
    from stratum.transaction import InodeReader, MetadataTransaction
    from stratum.volume import Volume

log = get_logger("lifecycle")
PAGE = 500
LOOK_S_MAX = 3600.0


Tags = dict[bytes, dict[str, str]]
"""By key, what the rules were asked about; empty if no rule wants tags."""


def _tags(reader: InodeReader, inode: Inode | None) -> dict[str, str]:
    return {} if inode is None else objects.metadata_of(reader, inode).tags


Check = Callable[["InodeReader"], "BucketRow | None"]


def _bucket_of(reader: InodeReader, name: str, row: BucketRow, rules: list[Rule]) -> BucketRow | None:
    """The bucket, if it is still the one that was looked at and has the rules it had. Raises `NoSuchBucket`."""
    found = buckets.get(reader, name)
    return found if found.inode == row.inode and lifecycle.get(reader, row.inode) == rules else None


class LifecycleRunner:
    """Part of `Tierd`. `clock` is wall time, `pressing` whether something else should be done first."""

    def __init__(
        self, volume: Volume, *, pressing: Callable[[], bool] = lambda: False, clock: Callable[[], float] = time.time
    ) -> None:
        self._volume = volume
        self._pressing = pressing
        self._clock = clock
        self._pass: Iterator[None] | None = None
        """One that made room for something else, and goes on."""
        self._day_s = volume.config.lifecycle_debug_day_s
        self._every_s = min(self._day_s / 4, 1.0) if self._day_s else LOOK_S_MAX
        self._next_s = 0.0

    def run(self) -> bool:
        """A pass over the buckets with rules, if one is due or has begun; whether there is more of it."""
        if self._pass is None:
            now_s = self._clock()
            if not come(self._next_s, now_s, self._every_s):
                return False
            self._next_s = now_s + self._every_s
            self._pass = self._everything(now_s)
        try:
            for _ in self._pass:
                if self._pressing():
                    return True
        except BaseException:
            self._pass = None
            raise
        self._pass = None
        return False

    def _everything(self, now_s: float) -> Iterator[None]:
        """Stops after each page of a bucket."""
        with self._volume.snapshot() as reader:
            found = [(name, row, lifecycle.get(reader, row.inode)) for name, row in buckets.scan(reader)]
        for name, row, rules in found:
            if any(rule.enabled for rule in rules) and not row.snapshot_of:
                try:
                    yield from self._walk(name, row, rules, now_s)
                    self._abort(name, row, [rule for rule in rules if rule.enabled], now_s)
                except (NoSuchBucket, ReadOnlyBucket):
                    continue

    def _look(
        self, row: BucketRow, check: Callable[[InodeReader], BucketRow | None], after: bytes, *, with_tags: bool
    ) -> tuple[listing.Page, dict[bytes, dict[str, str]]] | None:
        """A page of a bucket and its tags; None if the rules are others meanwhile."""
        with self._volume.snapshot() as reader:
            if check(reader) is None:
                return None
            page = listing.list_page(reader, row, after=after, limit=PAGE)
            if not with_tags:
                return page, {}
            return page, {key: _tags(reader, tree.find_object(reader, row, key)) for key, _, _, _ in page.objects}

    def _walk(self, name: str, row: BucketRow, every_rule: list[Rule], now_s: float) -> Iterator[None]:
        """Ends early if the rules are others meanwhile: it may have made room for hours."""
        after = b""
        rules = [rule for rule in every_rule if rule.enabled]
        check = partial(_bucket_of, name=name, row=row, rules=every_rule)
        while True:
            look = partial(self._look, row=row, check=check, after=after, with_tags=lifecycle.wants_tags(rules))
            looked = filling.patiently(self._volume, look)
            if looked is None:
                return
            page, tags = looked
            expired, moved = [], []
            for key, size, mtime_ns, etag in page.objects:
                found = tags.get(key, {})
                when = lifecycle.expires(rules, key, size, found, mtime_ns / 1e9, self._day_s)
                if when is not None and when[0] <= now_s:
                    expired.append((key, etag, when[1]))
                    continue
                wanted = lifecycle.transition(rules, key, size, found, mtime_ns / 1e9, now_s, self._day_s)
                if wanted is not None:
                    moved.append((key, etag, *wanted))
            if expired:
                self._volume.mutate(partial(self._expire, name=name, check=check, batch=expired, tags=tags), frees=True)
            if moved:
                self._volume.mutate(partial(self._transition, check=check, batch=moved, tags=tags), frees=True)
            if not page.truncated:
                return
            yield
            after = page.last

    @staticmethod
    def _expire(
        tx: MetadataTransaction, name: str, check: Check, batch: list[tuple[bytes, str, str]], tags: Tags
    ) -> None:
        bucket = check(tx)
        if bucket is None:
            return
        for key, etag, rule in batch:
            inode = tree.find_object(tx, bucket, key)
            if inode is None or (key in tags and _tags(tx, inode) != tags[key]):
                continue
            if objects.ObjectState(inode, objects.NO_METADATA).etag == etag:
                objects.delete(tx, bucket, key)
                log.info("expired", bucket=name, key=key.decode("utf-8", "replace"), rule=rule)

    @staticmethod
    def _transition(
        tx: MetadataTransaction, check: Check, batch: list[tuple[bytes, str, str, str]], tags: Tags
    ) -> None:
        bucket = check(tx)
        if bucket is None:
            return
        for key, etag, storage_class, rule in batch:
            inode = tree.find_object(tx, bucket, key)
            if inode is None or inode.kind != Kind.FILE or inode.etag_text != etag or not inode.size:
                continue
            inode = tx.inode(inode.number)
            metadata = objects.metadata_of(tx, inode)
            if key in tags and metadata.tags != tags[key]:
                continue
            if TIER_OF_CLASS[storage_class] <= TIER_OF_CLASS.get(metadata.storage_class or STANDARD, Tier.HOT):
                continue  # it is there, or colder, already
            objects.set_metadata(tx, inode, replace(metadata, storage_class=storage_class))
            hints.ask(tx, inode.number, MoveRow(TIER_OF_CLASS[storage_class], f"lifecycle rule {rule!r}", tx.now_ns))

    @staticmethod
    def _abort_one(tx: MetadataTransaction, name: str, key: bytes, upload_id: str) -> None:
        multipart.abort_in(tx, buckets.get(tx, name), key, upload_id)

    def _abort(self, name: str, row: BucketRow, rules: list[Rule], now_s: float) -> None:
        """Uploads nobody completed."""
        with self._volume.snapshot() as reader:
            uploads = multipart.scan_uploads(reader, row, limit=1 << 30)
        for key, upload_id, upload in uploads:
            for rule in rules:
                if rule.abort_days is None or not key.startswith(rule.filter.prefix.encode()):
                    continue
                when = lifecycle.When(days=rule.abort_days)
                if lifecycle.due_s(when, upload.initiated_ns / 1e9, self._day_s) <= now_s:
                    try:
                        self._volume.mutate(
                            partial(self._abort_one, name=name, key=key, upload_id=upload_id), frees=True
                        )
                    except NoSuchUpload:
                        pass
                    log.info("upload_expired", bucket=name, key=key.decode("utf-8", "replace"), rule=rule.identity)
                    break


class Restorer:
    """Part of `Tierd`: makes and ends the temporary copies that RestoreObject asked for."""

    def __init__(self, volume: Volume, mover: Mover, *, clock: Callable[[], float] = time.time) -> None:
        self._volume = volume
        self._mover = mover
        self._clock = clock
        self._day_s = volume.config.lifecycle_debug_day_s or lifecycle.DAY_S

    def run(self) -> bool:
        """Raises `Preempted`."""
        with self._volume.snapshot() as reader:
            rows = [(unpack_u64(key[1:])[0], RestoreRow.decode(raw)) for key, raw in reader.scan(*prefix_range(b"t"))]
        for number, row in self._mover.in_turn(rows):
            if row.state == "ongoing":
                self._bring(number, row)
            elif row.expires_s and row.expires_s <= self._clock():
                self._end(number)
        return False

    def _bring(self, number: int, row: RestoreRow) -> None:
        with self._volume.snapshot() as reader:
            extents = list(dict.fromkeys(piece.extent for piece in reader.slices(number)))
            needed = {
                place.pack for extent in extents if (place := packs.copies(reader, extent).get(Tier.COLD)) is not None
            }
            found = [pack for pack_number in needed if (pack := packs.get(reader, pack_number)) is not None]
        for pack in found:
            _, remote = self._volume.cold.remote(pack.remote)
            try:
                info = remote.sealed.head(pack.key)
                if info.storage_class in {"GLACIER", "DEEP_ARCHIVE"} and info.restore != "ready":
                    if info.restore != "ongoing":
                        remote.sealed.restore(pack.key, max(row.days, 1))
                    return
            except RemoteError as error:
                log.warning("restore_waits", inode=number, error=error.message)
                return
        try:
            self._mover.promote(extents)
        except StratumError as error:
            log.warning("restore_waits", inode=number, error=error.message)
            return
        expires_s = int(self._clock() + row.days * self._day_s) if row.days else 0

        def ready(tx: MetadataTransaction) -> None:
            if tx.get(key_u64(b"t", number)) is not None:
                evidence.set_tier(tx, number, Tier.HOT)
                if row.days:
                    tx.put(key_u64(b"t", number), RestoreRow("ready", row.days, row.asked_s, expires_s).encode())
                else:  # for good: it is an ordinary object again
                    tx.delete(key_u64(b"t", number))
                    inode = tx.inode(number)
                    objects.set_metadata(tx, inode, replace(objects.metadata_of(tx, inode), storage_class=""))

        self._volume.mutate(ready, frees=True)

    def _end(self, number: int) -> None:
        """The copy's time is over; the one in the remote has stayed."""
        with self._volume.snapshot() as reader:
            extents = list(dict.fromkeys(piece.extent for piece in reader.slices(number)))
        self._mover.free_above(extents, Tier.COLD)

        def end(tx: MetadataTransaction) -> None:
            tx.delete(key_u64(b"t", number))
            if tx.has_inode(number):
                evidence.set_tier(tx, number, hottest(tx, extents))

        self._volume.mutate(end, frees=True)
