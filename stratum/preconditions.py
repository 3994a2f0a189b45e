"""Conditional requests as S3 and RFC 9110 section 13 define them; pure functions over an ETag and a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stratum.errors import NoSuchKey, NotModified, PreconditionFailed

if TYPE_CHECKING:
    from stratum.schema import Inode


@dataclass(slots=True, frozen=True)
class Conditions:
    """`if_match` and `if_none_match` are header values; times are whole seconds since 1970."""

    if_match: str | None = None
    if_none_match: str | None = None
    if_modified_since_s: int | None = None
    if_unmodified_since_s: int | None = None
    match_size: int | None = None
    match_last_modified_s: int | None = None

    def __bool__(self) -> bool:
        return self != NO_CONDITIONS


NO_CONDITIONS = Conditions()


def etag_listed(header: str, etag: str) -> bool:
    """Whether `etag` stands in an If-Match or If-None-Match value. Weak tags compare by their opaque part."""
    if header.strip() == "*":
        return True
    return any(part.strip().removeprefix("W/").strip('"') == etag for part in header.split(","))


def check_read(conditions: Conditions, inode: Inode) -> None:
    """For GET and HEAD. Raises `PreconditionFailed` or `NotModified`, in the order of RFC 9110 13.2.2."""
    etag, mtime_s = inode.etag_text, inode.mtime_ns // 1_000_000_000
    if conditions.if_match is not None:
        if not etag_listed(conditions.if_match, etag):
            raise PreconditionFailed("If-Match")
    elif conditions.if_unmodified_since_s is not None and mtime_s > conditions.if_unmodified_since_s:
        raise PreconditionFailed("If-Unmodified-Since")
    if conditions.if_none_match is not None:
        if etag_listed(conditions.if_none_match, etag):
            raise NotModified(etag, inode.mtime_ns)
    elif conditions.if_modified_since_s is not None and mtime_s <= conditions.if_modified_since_s:
        raise NotModified(etag, inode.mtime_ns)


def check_copy_source(conditions: Conditions, inode: Inode) -> None:
    """For x-amz-copy-source-if-*: whatever fails is 412."""
    try:
        check_read(conditions, inode)
    except NotModified as error:
        raise PreconditionFailed("x-amz-copy-source-if-*") from error


def check_write(conditions: Conditions, inode: Inode | None, key: bytes) -> None:
    """For Put, Copy, Complete and Delete, inside the transaction that writes.

    If-Match on an absent key is `NoSuchKey`, as AWS answers.
    """
    if (
        conditions.if_none_match is not None
        and inode is not None
        and etag_listed(conditions.if_none_match, inode.etag_text)
    ):
        raise PreconditionFailed("If-None-Match")
    if conditions.if_match is not None:
        if inode is None:
            raise NoSuchKey(key)
        if not etag_listed(conditions.if_match, inode.etag_text):
            raise PreconditionFailed("If-Match")
    if inode is not None:
        if (
            conditions.if_unmodified_since_s is not None
            and inode.mtime_ns // 1_000_000_000 > conditions.if_unmodified_since_s
        ):
            raise PreconditionFailed("If-Unmodified-Since")
        if conditions.match_size is not None and inode.size != conditions.match_size:
            raise PreconditionFailed("x-amz-if-match-size")
        if (
            conditions.match_last_modified_s is not None
            and inode.mtime_ns // 1_000_000_000 != conditions.match_last_modified_s
        ):
            raise PreconditionFailed("x-amz-if-match-last-modified-time")
