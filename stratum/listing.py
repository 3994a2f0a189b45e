"""Listing keys in S3's order: one ordered walk that skips whole directories when a delimiter allows it.

The walk holds no position but the last key, so a page is one snapshot and the next page starts anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stratum import content, longkeys
from stratum.kv.contract import prefix_end
from stratum.schema import Inode, Kind, key_u64, pack_u64

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


Row = tuple[bytes, bytes]
"""A key and the inode number of its object, eight bytes big-endian."""
BATCH_ROWS = 256


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
    rows: list[Row] = []
    start = max(after, prefix)
    if delimiter and after.startswith(prefix):
        at = after.find(delimiter, len(prefix))
        if at >= 0:
            start = max(start, prefix_end(after[: at + len(delimiter)]))
    walker = _Walker(reader, bucket, prefix, collapse=delimiter == b"/", limit=limit)
    resume: bytes | None = start
    while resume is not None and not page.truncated:
        begin, resume = resume, None
        for batch in walker.walk(begin):
            resume = _take(page, rows, batch, after, prefix, delimiter, limit)
            if resume is not None or page.truncated:
                break
    page.objects = _load(reader, rows)
    return page


def _take(
    page: Page, rows: list[Row], batch: list[Row], after: bytes, prefix: bytes, delimiter: bytes, limit: int
) -> bytes | None:
    """Add a batch to the page; where to go on if a common prefix makes the rest of the batch worthless."""
    if batch and batch[0][0] <= after:
        batch = [row for row in batch if row[0] > after]
    if not delimiter:
        room = limit - len(rows) - len(page.prefixes)
        if len(batch) > room:
            page.truncated = True
            batch = batch[:room]
        rows += batch
        if batch:
            page.last = batch[-1][0]
        return None
    for row in batch:
        key = row[0]
        if len(rows) + len(page.prefixes) == limit:
            page.truncated = True
            return None
        at = key.find(delimiter, len(prefix))
        if at < 0:
            rows.append(row)
            page.last = key
            continue
        page.last = key[: at + len(delimiter)]
        page.prefixes.append(page.last)
        return prefix_end(page.last)
    return None


def _load(reader: InodeReader, rows: list[Row]) -> list[tuple[bytes, Inode]]:
    stored = reader.get_many([b"I" + number for _, number in rows])
    found = []
    for key, number in rows:
        raw = stored.get(b"I" + number)
        if raw is not None:
            inode = Inode.unpack(int.from_bytes(number, "big"), raw)
            if inode.kind == Kind.DIRECTORY:
                inode.size, inode.etag, inode.etag_parts = 0, content.EMPTY_MD5, 0
            found.append((key, inode))
    return found


class _Walker:
    """Yields batches of rows of every live key from a start on, in order.

    With delimiter "/" a live directory behind the prefix is yielded once as `key/` and not entered: its content can only
    add to the same common prefix.
    """

    def __init__(self, reader: InodeReader, bucket: BucketRow, prefix: bytes, *, collapse: bool, limit: int) -> None:
        self._reader = reader
        self._bucket = bucket
        self._prefix = prefix
        self._collapse = collapse
        self._batch_rows = min(limit + 1, BATCH_ROWS)

    def walk(self, start: bytes) -> Iterator[list[Row]]:
        return self._directory(self._bucket.inode, b"", start, top=True)

    def _directory(self, number: int, path: bytes, start: bytes, *, top: bool = False) -> Iterator[list[Row]]:
        prefix = self._prefix
        inside = prefix[len(path) :] if prefix.startswith(path) else b""
        if not top and not inside and path >= start:
            inode = self._inode(number)
            if inode.object_inode:
                yield [(path, pack_u64(inode.object_inode))]
            elif inode.explicit and not inode.live:
                yield [(path, pack_u64(number))]
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
        batch: list[Row] = []
        for entry, raw in longkeys.scan(self._reader.kv, b"D", number, first, wanted):
            kind = raw[8]
            if kind == 1:  # Kind.FILE; the enum's lookup costs as much as the rest of the line
                if slash < 0:
                    batch.append((path + entry, raw[:8]))
                    if len(batch) >= self._batch_rows:
                        yield batch
                        batch = []
            elif kind == 2:
                if batch:
                    yield batch
                    batch = []
                full = path + entry
                child = int.from_bytes(raw[:8], "big")
                if self._collapse and len(full) > len(prefix):
                    if full >= start and self._inode(child).is_live:
                        yield [(full, raw[:8])]
                else:
                    yield from self._directory(child, full, start)
        if batch:
            yield batch

    def _inode(self, number: int) -> Inode:
        raw = self._reader.get(key_u64(b"I", number))
        assert raw is not None, f"directory {number:#x} has no inode"
        return Inode.unpack(number, raw)
