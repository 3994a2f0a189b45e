"""Listing keys in S3's order: one ordered walk that skips whole directories when a delimiter allows it.

The walk holds no position but the last key, so a page is one snapshot and the next page starts anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stratum import content, longkeys
from stratum.kv.contract import prefix_end
from stratum.schema import Inode, Kind, key_u64

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stratum.schema import BucketRow
    from stratum.transaction import InodeReader


@dataclass(slots=True)
class Page:
    """`objects` and `prefixes` together are at most the limit; `last` resumes behind the last one."""

    objects: list[tuple[bytes, Inode]] = field(default_factory=list)
    prefixes: list[bytes] = field(default_factory=list)
    truncated: bool = False
    last: bytes = b""


def list_page(
    reader: InodeReader,
    bucket: BucketRow,
    *,
    prefix: bytes = b"",
    delimiter: bytes = b"",
    after: bytes = b"",
    limit: int = 1000,
) -> Page:
    """Keys > `after` with `prefix`; those that share a part up to `delimiter` after the prefix become one common prefix.

    A common prefix that is <= `after` or contains it is skipped whole, so that the last one of a page resumes behind it.
    """
    page = Page()
    if limit <= 0:
        return page
    numbers: list[tuple[bytes, int]] = []
    start = max(after, prefix)
    if delimiter and after.startswith(prefix):
        at = after.find(delimiter, len(prefix))
        if at >= 0:
            start = max(start, prefix_end(after[: at + len(delimiter)]))
    walker = _Walker(reader, bucket, prefix, delimiter == b"/")
    count = 0
    resume: bytes | None = start
    while resume is not None:
        begin, resume = resume, None
        for key, number in walker.walk(begin):
            if key <= after or key < begin:
                continue
            at = key.find(delimiter, len(prefix)) if delimiter else -1
            if count == limit:
                page.truncated = True
                break
            count += 1
            if at < 0:
                numbers.append((key, number))
                page.last = key
                continue
            page.last = key[: at + len(delimiter)]
            page.prefixes.append(page.last)
            resume = prefix_end(page.last)  # seek over everything else that has this prefix
            break
    page.objects = _load(reader, numbers)
    return page


def _load(reader: InodeReader, numbers: list[tuple[bytes, int]]) -> list[tuple[bytes, Inode]]:
    rows = reader.get_many([key_u64(b"I", number) for _, number in numbers])
    found = []
    for key, number in numbers:
        raw = rows.get(key_u64(b"I", number))
        if raw is not None:
            inode = Inode.unpack(number, raw)
            if inode.kind == Kind.DIRECTORY:
                inode.size, inode.etag, inode.etag_parts = 0, content.EMPTY_MD5, 0
            found.append((key, inode))
    return found


class _Walker:
    """Yields (key, inode number) of every live key from a start on, in order.

    With delimiter "/" a live directory behind the prefix is yielded once as `key/` and not entered: its content can only
    add to the same common prefix.
    """

    def __init__(self, reader: InodeReader, bucket: BucketRow, prefix: bytes, collapse: bool) -> None:
        self._reader = reader
        self._bucket = bucket
        self._prefix = prefix
        self._collapse = collapse

    def walk(self, start: bytes) -> Iterator[tuple[bytes, int]]:
        return self._directory(self._bucket.inode, b"", start, top=True)

    def _directory(self, number: int, path: bytes, start: bytes, *, top: bool = False) -> Iterator[tuple[bytes, int]]:
        prefix = self._prefix
        inside = prefix[len(path) :] if prefix.startswith(path) else b""
        if not top and not inside:
            inode = self._inode(number)
            if path >= start:
                if inode.object_inode:
                    yield path, inode.object_inode
                elif inode.explicit and not inode.live:
                    yield path, number
        # Only entries that can hold keys >= start: the entry that contains `start`, and what follows it.
        first = b""
        if start.startswith(path):
            rest = start[len(path) :]
            slash = rest.find(b"/")
            first = rest if slash < 0 else rest[: slash + 1]
        elif start > path:
            return
        slash = inside.find(b"/")
        wanted = inside if slash < 0 else inside[: slash + 1]
        file, directory = int(Kind.FILE), int(Kind.DIRECTORY)
        for entry, raw in longkeys.scan(self._reader.kv, b"D", number, first, wanted):
            kind = raw[8]
            if kind == file:
                if slash < 0:
                    yield path + entry, int.from_bytes(raw[:8], "big")
            elif kind == directory:
                child = int.from_bytes(raw[:8], "big")
                full = path + entry
                if self._collapse and len(full) > len(prefix):
                    if full >= start and self._inode(child).is_live:
                        yield full, child
                else:
                    yield from self._directory(child, full, start)

    def _inode(self, number: int) -> Inode:
        raw = self._reader.get(key_u64(b"I", number))
        assert raw is not None, f"directory {number:#x} has no inode"
        return Inode.unpack(number, raw)
