"""LifecycleConfiguration: XML to rules and back. A parser: pure."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element

from stratum.lifecycle import RULES_MAX, Filter, Rule, Transition, When, date_text, parse_date
from stratum.s3 import numerals
from stratum.s3.errors import S3Error
from stratum.s3.xml import document, element, text, verbatim

if TYPE_CHECKING:
    from collections.abc import Iterable

ID_CHARACTERS_MAX = 255
_COUNT_MAX = (1 << 31) - 1
_RULE = (
    "ID", "Status", "Prefix", "Filter", "Transition", "Expiration", "NoncurrentVersionTransition", "NoncurrentVersionExpiration",
    "AbortIncompleteMultipartUpload",
)  # fmt: skip


def _malformed(what: str) -> S3Error:
    return S3Error("MalformedXML", what)


def _invalid(what: str) -> S3Error:
    return S3Error("InvalidArgument", what)


def _known(parent: Element, names: Iterable[str]) -> None:
    for child in parent:
        if child.tag not in names:
            raise _malformed(f"{parent.tag} has an unknown element {child.tag!r}")


def _number(parent: Element, name: str, least: int) -> int | None:
    value = text(parent, name)
    if value is None:
        return None
    number = numerals.whole(value.removeprefix("-"))
    if number is None:
        raise _malformed(f"{name} of {parent.tag} is not a whole number")
    if value.startswith("-") or number < least:
        raise _invalid(f"{name} of {parent.tag} is at least {least}")
    if number > _COUNT_MAX and not name.startswith("ObjectSize"):
        raise _invalid(f"{name} of {parent.tag} is at most {_COUNT_MAX}")
    return number


def _when(parent: Element, days: str, least: int) -> When | None:
    """Days or a date; None if neither is there."""
    number, date = _number(parent, days, least), text(parent, "Date")
    if number is not None and date is not None:
        raise _malformed(f"{parent.tag} has days or a date, not both")
    if date is not None:
        seconds = parse_date(date)
        if seconds is None:
            raise _malformed(f"the Date of {parent.tag} is not midnight UTC of a day")
        return When(date_s=seconds)
    return None if number is None else When(days=number)


def _filter(rule: Element) -> Filter:
    prefix, found = verbatim(rule, "Prefix"), rule.find("Filter")
    if prefix is not None and found is not None:
        raise _malformed("a Rule has a Prefix or a Filter, not both")
    if prefix is not None:
        return Filter(prefix, style="Prefix")
    if found is None:
        raise _malformed("a Rule has a Filter")
    # Several conditions belong into And; where a client leaves it out, or puts one beside it, all of them hold just the same.
    both = found.find("And")
    inner = Element("Filter")
    inner.extend(child for child in found if child is not both)
    inner.extend(both if both is not None else ())
    _known(inner, ("Prefix", "Tag", "ObjectSizeGreaterThan", "ObjectSizeLessThan"))
    prefixes = sorted((child.text or "" for child in inner.findall("Prefix")), key=len) or [""]
    sizes = ("ObjectSizeGreaterThan", "ObjectSizeLessThan")
    if any(len(inner.findall(name)) > 1 for name in sizes):
        raise _malformed("a Filter has one size of a kind")
    if not all(prefixes[-1].startswith(prefix) for prefix in prefixes):
        raise _malformed("a Filter has two prefixes, and no key has both")
    tags = []
    for tag in inner.findall("Tag"):
        key, value = verbatim(tag, "Key"), verbatim(tag, "Value")
        if not key or value is None:
            raise _malformed("a Tag has a Key and a Value")
        tags.append((key, value))
    return Filter(
        prefixes[-1], tuple(tags), _number(inner, "ObjectSizeGreaterThan", 0), _number(inner, "ObjectSizeLessThan", 1),
        "And" if both is not None or len(inner) > 1 else "Filter",
    )  # fmt: skip


def _transition(found: Element, days: str) -> Transition:
    _known(found, (days, "Date", "StorageClass", "NewerNoncurrentVersions"))
    when, storage_class = _when(found, days, 0), text(found, "StorageClass")
    if when is None or not storage_class:
        raise _malformed(f"{found.tag} has {days} and a StorageClass")
    return Transition(when, storage_class, _number(found, "NewerNoncurrentVersions", 1))


def parse_rules(root: Element, known_classes: Iterable[str]) -> list[Rule]:
    """Raises `S3Error` as S3 does; `known_classes` are those a transition may name."""
    _known(root, ("Rule",))
    if not 1 <= len(root) <= RULES_MAX:
        raise _malformed(f"a configuration has from 1 to {RULES_MAX} rules")
    rules = [_rule(found, frozenset(known_classes)) for found in root]
    identities = [rule.identity for rule in rules]
    if len(set(identities)) != len(identities):
        raise _invalid("two rules have the same ID")
    return rules


def _rule(found: Element, known_classes: frozenset[str]) -> Rule:
    _known(found, _RULE)
    identity = text(found, "ID") or uuid.uuid4().hex
    if len(identity) > ID_CHARACTERS_MAX:
        raise _invalid(f"the ID of a rule has at most {ID_CHARACTERS_MAX} characters")
    status = text(found, "Status")
    if status not in {"Enabled", "Disabled"}:
        raise _malformed("the Status of a rule is Enabled or Disabled")
    limits = _filter(found)
    transitions = tuple(_transition(child, "Days") for child in found.findall("Transition"))
    noncurrent = tuple(_transition(child, "NoncurrentDays") for child in found.findall("NoncurrentVersionTransition"))
    for move in (*transitions, *noncurrent):
        if move.storage_class not in known_classes:
            raise S3Error(
                "InvalidStorageClass", f"this server has no tier for the storage class {move.storage_class!r}"
            )
    expiration, marker = _expiration(found.find("Expiration"))
    versions = found.find("NoncurrentVersionExpiration")
    noncurrent_expiration = None
    if versions is not None:
        _known(versions, ("NoncurrentDays", "NewerNoncurrentVersions"))
        days = _number(versions, "NoncurrentDays", 1)
        if days is None:
            raise _malformed("NoncurrentVersionExpiration has NoncurrentDays")
        noncurrent_expiration = Transition(When(days=days), "", _number(versions, "NewerNoncurrentVersions", 1))
    abort, abort_days = found.find("AbortIncompleteMultipartUpload"), None
    if abort is not None:
        _known(abort, ("DaysAfterInitiation",))
        abort_days = _number(abort, "DaysAfterInitiation", 1)
        if abort_days is None:
            raise _malformed("AbortIncompleteMultipartUpload has DaysAfterInitiation")
        if limits.tags or limits.size_greater is not None or limits.size_less is not None:
            raise _malformed(
                "uploads have neither tags nor sizes: AbortIncompleteMultipartUpload goes with a prefix only"
            )
    if not (transitions or noncurrent or expiration or marker or noncurrent_expiration or abort_days):
        raise _malformed("a Rule says what to do")
    return Rule(
        identity,
        status == "Enabled",
        limits,
        transitions,
        expiration,
        marker,
        noncurrent,
        noncurrent_expiration,
        abort_days,
    )


def _expiration(found: Element | None) -> tuple[When | None, bool]:
    if found is None:
        return None, False
    _known(found, ("Days", "Date", "ExpiredObjectDeleteMarker"))
    when, marker = _when(found, "Days", 1), text(found, "ExpiredObjectDeleteMarker")
    if marker is not None and (marker not in {"true", "false"} or when is not None):
        raise _malformed("ExpiredObjectDeleteMarker is true or false and stands alone")
    if when is None and marker is None:
        raise _malformed("Expiration has Days, a Date or ExpiredObjectDeleteMarker")
    return when, marker == "true"


def _when_xml(when: When, days: str) -> str:
    return element(days, when.days) if when.date_s is None else element("Date", date_text(when.date_s))


def _filter_xml(limits: Filter) -> str:
    if limits.style == "Prefix":
        return f"<Prefix>{element('x', limits.prefix)[3:-4]}</Prefix>"
    inner = element("Prefix", limits.prefix) if limits.prefix or limits.style == "And" else ""
    inner += "".join(f"<Tag>{element('Key', key)}{element('Value', value)}</Tag>" for key, value in limits.tags)
    inner += element("ObjectSizeGreaterThan", limits.size_greater) + element("ObjectSizeLessThan", limits.size_less)
    if limits.style == "And":
        inner = f"<And>{inner}</And>"
    return f"<Filter>{inner or '<Prefix></Prefix>'}</Filter>"


def _transition_xml(tag: str, move: Transition, days: str) -> str:
    newer = element("NewerNoncurrentVersions", move.newer_versions)
    storage_class = element("StorageClass", move.storage_class or None)
    return f"<{tag}>{_when_xml(move.when, days)}{newer}{storage_class}</{tag}>"


def rules_document(rules: list[Rule]) -> bytes:
    """The answer of GetBucketLifecycleConfiguration."""
    parts = []
    for rule in rules:
        inner = (
            element("ID", rule.identity)
            + _filter_xml(rule.filter)
            + element("Status", "Enabled" if rule.enabled else "Disabled")
        )
        inner += "".join(_transition_xml("Transition", move, "Days") for move in rule.transitions)
        if rule.expiration is not None:
            inner += f"<Expiration>{_when_xml(rule.expiration, 'Days')}</Expiration>"
        elif rule.expired_delete_marker:
            inner += "<Expiration><ExpiredObjectDeleteMarker>true</ExpiredObjectDeleteMarker></Expiration>"
        inner += "".join(
            _transition_xml("NoncurrentVersionTransition", move, "NoncurrentDays")
            for move in rule.noncurrent_transitions
        )
        if rule.noncurrent_expiration is not None:
            inner += _transition_xml("NoncurrentVersionExpiration", rule.noncurrent_expiration, "NoncurrentDays")
        if rule.abort_days is not None:
            inner += f"<AbortIncompleteMultipartUpload>{element('DaysAfterInitiation', rule.abort_days)}</AbortIncompleteMultipartUpload>"
        parts.append(f"<Rule>{inner}</Rule>")
    return document("LifecycleConfiguration", *parts)
