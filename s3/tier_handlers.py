"""Lifecycle configurations, RestoreObject, and what answers say about where an object is."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import TYPE_CHECKING
from urllib.parse import quote

from stratum import buckets, evidence, lifecycle, objects, storage_classes
from stratum.errors import NoSuchKey
from stratum.iso_dates import LAST_S
from stratum.s3 import access, lifecycle_xml, numerals
from stratum.s3.answer import Answer, empty, xml
from stratum.s3.body import read_document
from stratum.s3.bucket_handlers import require_owner
from stratum.s3.context import Context, check_key, http_date, version_id
from stratum.s3.errors import S3Error, method_not_allowed, not_implemented
from stratum.s3.xml import only, parse, text
from stratum.schema import Kind, key_u64
from stratum.tier_rows import TIER_OF_CLASS, RestoreRow, Tier
from stratum.tiering.explain import explain

if TYPE_CHECKING:
    from stratum.lifecycle import Rule
    from stratum.schema import BucketRow
    from stratum.transaction import InodeReader, MetadataTransaction

RESTORE_DAYS_MAX = 36500
_MINIMUM = "x-amz-transition-default-minimum-object-size"


def _own(context: Context, reader: InodeReader) -> BucketRow:
    bucket = context.bucket(reader)
    require_owner(context, bucket)
    return bucket


def put_lifecycle(context: Context) -> Answer:
    with context.volume.snapshot() as reader:
        _own(context, reader)
        classes = [name for name in TIER_OF_CLASS if storage_classes.is_known(context.volume, reader, name)]
    rules = lifecycle_xml.parse_rules(
        parse(read_document(context), "LifecycleConfiguration"), set(classes) - {"STANDARD"}
    )
    minimum = context.header(_MINIMUM) or ""
    if minimum not in {"", *lifecycle.TRANSITION_MINIMA}:
        raise S3Error("InvalidRequest", f"Value for {_MINIMUM} header is invalid.")
    rules = [replace(rule, transition_minimum=minimum) for rule in rules]

    def commit(tx: MetadataTransaction) -> None:
        bucket = _own(context, tx)
        buckets.check_writable(bucket)
        lifecycle.put(tx, bucket.inode, rules)

    context.volume.mutate(commit)
    return empty(200, _minimum_of(rules))


def _minimum_of(rules: list[Rule]) -> dict[str, str]:
    """What the client that set the rules said of small objects; the same in all of them."""
    return {_MINIMUM: rules[0].transition_minimum} if rules[0].transition_minimum else {}


def get_lifecycle(context: Context) -> Answer:
    with context.volume.snapshot() as reader:
        rules = lifecycle.get(reader, _own(context, reader).inode)
    if not rules:
        raise S3Error("NoSuchLifecycleConfiguration")
    return xml(lifecycle_xml.rules_document(rules), headers=_minimum_of(rules))


def delete_lifecycle(context: Context) -> Answer:
    context.volume.mutate(lambda tx: lifecycle.remove(tx, _own(context, tx).inode), frees=True)
    return empty(204)


def _days(context: Context) -> int:
    """0 stands for "for good"."""
    if not context.request.has_body:
        return 0
    root = parse(read_document(context), "RestoreRequest")
    only(root, ("Days", "GlacierJobParameters", "Tier", "Description", "Type", "SelectParameters", "OutputLocation"))
    for name in ("Type", "SelectParameters", "OutputLocation"):
        if root.find(name) is not None:
            raise not_implemented(f"{name} of RestoreRequest")
    said = text(root, "Days")
    if said is None:
        return 0
    days = numerals.whole(said, RESTORE_DAYS_MAX)
    if not days:
        raise S3Error("InvalidArgument", f"Days is a whole number from 1 to {RESTORE_DAYS_MAX}", ArgumentName="Days")
    return days


def restore_object(context: Context) -> Answer:
    """202 for a new restore, 200 for another term of one that is there, 409 while one is on its way."""
    check_key(context.key)
    version_id(context)
    days = _days(context)

    def commit(tx: MetadataTransaction) -> int:
        bucket = context.bucket(tx)
        access.check_bucket(bucket, context.identity, access.WRITE)
        state = objects.head(tx, bucket, context.key)
        number, now_s = state.inode.number, int(time.time())
        raw = tx.get(key_u64(b"t", number))
        if raw is not None:
            row = RestoreRow.decode(raw)
            if row.state == "ongoing":
                raise S3Error("RestoreAlreadyInProgress")
            day_s = context.config.lifecycle_debug_day_s or lifecycle.DAY_S
            row.days, row.expires_s = days, int(now_s + days * day_s) if days else 0
            tx.put(key_u64(b"t", number), row.encode())
            return 200
        use = evidence.get(tx, number) if state.inode.kind == Kind.FILE else None
        if use is None or use.tier != Tier.COLD:
            raise S3Error(
                "InvalidObjectState", "only an object of the cold tier can be restored", StorageClass="STANDARD"
            )
        tx.put(key_u64(b"t", number), RestoreRow("ongoing", days, now_s).encode())
        return 202

    return empty(context.volume.mutate(commit))


def headers(
    context: Context, reader: InodeReader, bucket: BucketRow, state: objects.ObjectState
) -> list[tuple[str, str]]:
    """What GET and HEAD say beside an object's own headers: class, restore, expiration."""
    found: list[tuple[str, str]] = []
    inode = state.inode
    if inode.kind == Kind.FILE and not inode.flags & inode.INLINE:
        storage_class = storage_classes.of(reader, inode, state.metadata)
        if storage_class != storage_classes.STANDARD:
            found.append(("x-amz-storage-class", storage_class))
            raw = reader.get(key_u64(b"t", inode.number))
            if raw is not None:
                row = RestoreRow.decode(raw)
                until = f', expiry-date="{http_date(row.expires_s * 1_000_000_000)}"' if row.expires_s else ""
                found.append(
                    ("x-amz-restore", f'ongoing-request="{"true" if row.state == "ongoing" else "false"}"{until}')
                )
    if state.metadata.tags and access.may_use_tags(bucket, state.metadata, context.identity):
        found.append(("x-amz-tagging-count", str(len(state.metadata.tags))))
    rules = lifecycle.get(reader, bucket.inode)
    return found + expiration(rules, context.key, inode.mtime_ns, state.size, state.metadata.tags)


def expiration(rules: list[Rule], key: bytes, mtime_ns: int, size: int, tags: dict[str, str]) -> list[tuple[str, str]]:
    """When a lifecycle rule will remove an object; in real days, also where a test made them short."""
    if not rules:
        return []
    when = lifecycle.expires(rules, key, size, tags, mtime_ns / 1e9, 0.0)
    if when is None:
        return []
    return [
        (
            "x-amz-expiration",
            f'expiry-date="{http_date(min(int(when[0]), LAST_S) * 1_000_000_000)}", rule-id="{quote(when[1])}"',
        )
    ]


def internal(context: Context) -> Answer:
    """`GET /_stratum/v1/explain/BUCKET/KEY` for who may read the key."""
    context.require_user()
    path = context.key.split(b"/", 3)
    if context.request.method != "GET" or path[:2] != [b"v1", b"explain"] or len(path) != 4 or not path[3]:
        raise method_not_allowed(context.request.method, "OBJECT", ("GET",))
    bucket_name, key = path[2].decode("utf-8", "replace"), path[3]
    check_key(key)
    with context.volume.snapshot() as reader:
        bucket = buckets.get(reader, bucket_name)
        try:
            state = objects.head(reader, bucket, key)
        except NoSuchKey:
            access.check_bucket(bucket, context.identity, access.READ)
            raise
        access.check_object(bucket, state.metadata, context.identity, access.READ)
    document = explain(context.volume, bucket_name, key)
    return Answer(
        200, [("Content-Type", "application/json")], json.dumps(document, ensure_ascii=False).encode("utf-8", "replace")
    )
