"""Lifecycle rules of a bucket: what they say, and whether they speak about an object. Pure, but for reading their row.

Times follow S3: an action of N days is due at the first midnight UTC after N days; with a short day (tests) exactly after N of
them. Of several transitions that are due the coldest wins; expiration wins over transitions.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from stratum import iso_dates
from stratum.schema import key_u64, pack_json, unpack_json
from stratum.tier_rows import TIER_OF_CLASS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stratum.transaction import InodeReader, MetadataTransaction

DAY_S = 86400.0
RULES_MAX = 1000
TRANSITION_BYTES_MIN = 128 * 1024
TRANSITION_MINIMA = ("all_storage_classes_128K", "varies_by_storage_class")
"""S3's names for what is too small to be moved where a rule names no size: in every class, or in those of no archive."""
_ARCHIVES = frozenset(("GLACIER", "DEEP_ARCHIVE"))


@dataclass(slots=True, frozen=True)
class Filter:
    """All that is set must hold. `style` is the element it came in: "Prefix", "Filter" or "And"."""

    prefix: str = ""
    tags: tuple[tuple[str, str], ...] = ()
    size_greater: int | None = None
    size_less: int | None = None
    style: str = "Filter"


@dataclass(slots=True, frozen=True)
class When:
    """After so many days, or from a date on (seconds since 1970)."""

    days: int | None = None
    date_s: int | None = None


@dataclass(slots=True, frozen=True)
class Transition:
    when: When
    storage_class: str
    newer_versions: int | None = None


@dataclass(slots=True, frozen=True)
class Rule:
    """`noncurrent` and what hangs on versions is kept for when there are versions."""

    identity: str
    enabled: bool
    filter: Filter = field(default_factory=Filter)
    transitions: tuple[Transition, ...] = ()
    expiration: When | None = None
    expired_delete_marker: bool = False
    noncurrent_transitions: tuple[Transition, ...] = ()
    noncurrent_expiration: Transition | None = None
    abort_days: int | None = None
    transition_minimum: str = ""
    """One of `TRANSITION_MINIMA`; "" moves objects of any size."""


def _when(row: dict[str, Any] | None) -> When | None:
    return None if row is None else When(**row)


def _transition(row: dict[str, Any]) -> Transition:
    return Transition(When(**row["when"]), row["storage_class"], row["newer_versions"])


def pack(rules: list[Rule]) -> bytes:
    return pack_json({"rules": [asdict(rule) for rule in rules]})


def unpack(raw: bytes) -> list[Rule]:
    found = []
    for row in unpack_json(raw)["rules"]:
        limits = row["filter"]
        newer = row["noncurrent_expiration"]
        found.append(
            Rule(
                row["identity"], row["enabled"],
                Filter(limits["prefix"], tuple(map(tuple, limits["tags"])), limits["size_greater"], limits["size_less"], limits["style"]),
                tuple(map(_transition, row["transitions"])), _when(row["expiration"]), row["expired_delete_marker"],
                tuple(map(_transition, row["noncurrent_transitions"])), _transition(newer) if newer else None, row["abort_days"],
                row.get("transition_minimum", ""),
            )
        )  # fmt: skip
    return found


def get(reader: InodeReader, bucket: int) -> list[Rule]:
    """The rules of the bucket with this inode; none without a configuration."""
    raw = reader.get(key_u64(b"s", bucket))
    return [] if raw is None else unpack(raw)


def put(tx: MetadataTransaction, bucket: int, rules: list[Rule]) -> None:
    tx.put(key_u64(b"s", bucket), pack(rules))


def remove(tx: MetadataTransaction, bucket: int) -> None:
    tx.delete(key_u64(b"s", bucket))


def matches(rule: Rule, key: bytes, size: int, tags: Mapping[str, str]) -> bool:
    """Whether an enabled rule is about an object."""
    limits = rule.filter
    return (
        rule.enabled
        and key.startswith(limits.prefix.encode())
        and all(tags.get(name) == value for name, value in limits.tags)
        and (limits.size_greater is None or size > limits.size_greater)
        and (limits.size_less is None or size < limits.size_less)
    )


def due_s(when: When, since_s: float, day_s: float) -> float:
    """When an action is due for something that is since `since_s`."""
    if when.date_s is not None:
        return float(when.date_s)
    assert when.days is not None, "either days or a date"
    moment_s = since_s + when.days * (day_s or DAY_S)
    return moment_s if day_s else -(-moment_s // DAY_S) * DAY_S


def _is_large_enough(rule: Rule, storage_class: str, size: int) -> bool:
    limits = rule.filter
    if not rule.transition_minimum or limits.size_greater is not None or limits.size_less is not None:
        return True
    archived = rule.transition_minimum == "varies_by_storage_class" and storage_class in _ARCHIVES
    return archived or size >= TRANSITION_BYTES_MIN


def wants_tags(rules: list[Rule]) -> bool:
    """Whether an object's tags must be known to say what the rules want of it."""
    return any(rule.filter.tags for rule in rules)


def expires(
    rules: list[Rule], key: bytes, size: int, tags: Mapping[str, str], mtime_s: float, day_s: float
) -> tuple[float, str] | None:
    """(when the object expires, by which rule): the earliest."""
    found = [
        (due_s(rule.expiration, mtime_s, day_s), rule.identity)
        for rule in rules
        if rule.expiration is not None and matches(rule, key, size, tags)
    ]
    return min(found) if found else None


def transition(
    rules: list[Rule], key: bytes, size: int, tags: Mapping[str, str], mtime_s: float, now_s: float, day_s: float
) -> tuple[str, str] | None:
    """(storage class that the object should have by now, by which rule): the coldest, then the latest."""
    found = [
        (TIER_OF_CLASS[move.storage_class], due_s(move.when, mtime_s, day_s), move.storage_class, rule.identity)
        for rule in rules
        if matches(rule, key, size, tags)
        for move in rule.transitions
        if due_s(move.when, mtime_s, day_s) <= now_s and _is_large_enough(rule, move.storage_class, size)
    ]
    if not found:
        return None
    _, _, storage_class, identity = max(found)
    return storage_class, identity


def parse_date(text: str) -> int | None:
    """Midnight UTC of an ISO date, in seconds; None for anything else."""
    seconds = iso_dates.seconds(text)
    return int(seconds) if seconds is not None and seconds % 86400 == 0 else None


def date_text(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(seconds))
