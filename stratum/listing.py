"""Listing keys in S3's order: one ordered walk that skips whole directories when a delimiter allows it.

The walk holds no position but the last key, so a page is one snapshot and the next page starts anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stratum import content, filling, frozen, longkeys, storage_classes
from stratum.kv.contract import prefix_end
from stratum.schema import LISTED_STRUCT, Inode, etag_text, key_u64, pack_u64

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stratum.schema import BucketRow
    from stratum.transaction import InodeReader


Listed = tuple[bytes, int, int, str]
"""Key, size in bytes, mtime in ns, ETag without quotes."""


@dataclass(slots=True)
class Page:
    """`objects` and `prefixes` together are at most the limit; `last` resumes behind the last one."""

    objects: list[Listed] = field(default_factory=list)
    prefixes: list[bytes] = field(default_factory=list)
    truncated: bool = False
    last: bytes = b""
    classes: dict[bytes, str] = field(default_factory=dict)
    """Storage classes of the objects that are not STANDARD."""


Row = tuple[bytes, bytes]
"""A key and the dentry of its object; what counts are the first eight bytes, the inode's number."""
_Step = list[Row] | tuple[int, bytes]
"""A batch of rows, or a directory to enter: its inode and path."""
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
    if rows and reader.first_rows(b"b\x02", b"c", 1):
        page.classes = _classes(reader, rows)
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


def _load(reader: InodeReader, rows: list[Row]) -> list[Listed]:
    keys = [b"I" + raw[:8] for _, raw in rows]
    stored = reader.get_many(keys)
    found: list[Listed] = []
    unpack = LISTED_STRUCT.unpack_from
    for (key, _), number in zip(rows, keys, strict=True):
        raw = stored.get(number)
        if raw is None:
            continue
        kind, parts, size, mtime_ns, version, etag = unpack(raw)
        if kind != 1:  # a directory shown as its own, empty object
            size, etag, parts = 0, content.EMPTY_MD5, 0
        text = etag.hex() if parts == 0 else etag_text(int.from_bytes(number[1:], "big"), version, etag, parts)
        found.append((key, size, mtime_ns, text))
    return found


def _classes(reader: InodeReader, rows: list[Row]) -> dict[bytes, str]:
    """One row for each object, and three more for each that is not hot."""
    used = reader.get_many([b"a" + raw[:8] for _, raw in rows])
    found: dict[bytes, str] = {}
    for key, raw in rows:
        if b"a" + raw[:8] in used:
            name = storage_classes.of(reader, reader.inode(int.from_bytes(raw[:8], "big")))
            if name != storage_classes.STANDARD:
                found[key] = name
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
        # A stack of our own: a key may have a thousand directories.
        stack = [self._directory(self._bucket.inode, b"", start, top=True)]
        while stack:
            for step in stack[-1]:
                if isinstance(step, list):
                    yield step
                else:
                    stack.append(self._directory(*step, start))
                    break
            else:
                stack.pop()

    def _directory(self, number: int, path: bytes, start: bytes, *, top: bool = False) -> Iterator[_Step]:
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
        while slash < 0 and frozen.waiting(self._reader, number) is None:
            # Pages of plain files are taken whole; whatever is not that simple goes row by row.
            rows = longkeys.page(self._reader.kv, b"D", number, first, wanted, self._batch_rows)
            if rows is None:
                break
            batch = [(path + entry, raw) for entry, raw in rows if raw[8] == 1]  # 1: Kind.FILE
            if len(batch) != len(rows):
                break
            if batch:
                yield batch
            if len(rows) < self._batch_rows:
                return
            first = rows[-1][0] + b"\0"
        yield from self._rows(number, path, start, first, wanted, files=slash < 0)

    def _rows(
        self, number: int, path: bytes, start: bytes, first: bytes, wanted: bytes, *, files: bool
    ) -> Iterator[_Step]:
        prefix = self._prefix
        batch: list[Row] = []
        for entry, raw in filling.entries(self._reader, number, first, wanted):
            kind = raw[8]
            if kind == 1:
                if files:
                    batch.append((path + entry, raw))
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
                        yield [(full, raw)]
                else:
                    yield child, full
        if batch:
            yield batch

    def _inode(self, number: int) -> Inode:
        raw = self._reader.get(key_u64(b"I", number))
        assert raw is not None, f"directory {number:#x} has no inode"
        return Inode.unpack(number, raw)
