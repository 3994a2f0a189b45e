"""Ordered strings of up to a few KiB under keys of at most 511 bytes.

A row of string s under (table, node) has the key `table node s` while s has at most PIECE_BYTES bytes. A longer string
is stored under a *continuation*: the row `table node piece NUL`, where piece is the first PIECE_BYTES bytes, holds
the number of another node, and the rest of the string lives there by the same rule. Continuation nodes belong to the
key space alone: they are no inodes and no directory shows them.

Why this keeps the order: everything that begins with piece, except piece itself, is longer than PIECE_BYTES and so lies
below the one continuation row, which sorts directly behind the row of piece itself; no string can come between
because the next byte would have to be smaller than NUL. Continuation rows are known by their length alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stratum.kv.contract import prefix_end
from stratum.schema import pack_u64, unpack_u64

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stratum.kv.contract import Snapshot, Transaction

PIECE_BYTES = 400
HEAD_BYTES = 9  # table letter and node
_CONTINUATION_BYTES = HEAD_BYTES + PIECE_BYTES + 1


def _continuation(table: bytes, node: int, string: bytes) -> bytes:
    return table + pack_u64(node) + string[:PIECE_BYTES] + b"\0"


def get(snapshot: Snapshot, table: bytes, node: int, string: bytes) -> bytes | None:
    while len(string) > PIECE_BYTES:
        below = snapshot.get(_continuation(table, node, string))
        if below is None:
            return None
        (node,) = unpack_u64(below)
        string = string[PIECE_BYTES:]
    return snapshot.get(table + pack_u64(node) + string)


def put(tx: Transaction, table: bytes, node: int, string: bytes, value: bytes, new_node: Callable[[], int]) -> None:
    while len(string) > PIECE_BYTES:
        key = _continuation(table, node, string)
        below = tx.get(key)
        if below is None:
            below = pack_u64(new_node())
            tx.put(key, below)
        (node,) = unpack_u64(below)
        string = string[PIECE_BYTES:]
    tx.put(table + pack_u64(node) + string, value)


def delete(tx: Transaction, table: bytes, node: int, string: bytes) -> bool:
    """Remove a string and the continuations it leaves empty."""
    if len(string) <= PIECE_BYTES:
        return tx.delete(table + pack_u64(node) + string)
    key = _continuation(table, node, string)
    raw = tx.get(key)
    if raw is None:
        return False
    (below,) = unpack_u64(raw)
    deleted = delete(tx, table, below, string[PIECE_BYTES:])
    if deleted and next(tx.scan(table + pack_u64(below), prefix_end(table + pack_u64(below))), None) is None:
        tx.delete(key)
    return deleted


def scan(
    snapshot: Snapshot, table: bytes, node: int, start: bytes = b"", prefix: bytes = b""
) -> Iterator[tuple[bytes, bytes]]:
    """(string, value) with string >= start and the prefix, in byte order. Stop consuming before you change the map."""
    head = table + pack_u64(node)
    stop = prefix_end(head + prefix[:PIECE_BYTES]) if prefix else prefix_end(head)
    first = head + max(start, prefix)[:PIECE_BYTES]
    length = len(prefix)
    for key, value in snapshot.scan(first, stop):
        if len(key) != _CONTINUATION_BYTES:
            string = key[HEAD_BYTES:]
            if (not length or string.startswith(prefix)) and string >= start:
                yield string, value
            continue
        piece = key[HEAD_BYTES:-1]
        (below,) = unpack_u64(value)
        below_start = start[PIECE_BYTES:] if start[:PIECE_BYTES] == piece else b""
        if piece < start[:PIECE_BYTES]:
            continue
        for rest, rest_value in scan(snapshot, table, below, below_start, prefix[PIECE_BYTES:]):
            yield piece + rest, rest_value


def page(
    snapshot: Snapshot, table: bytes, node: int, start: bytes, prefix: bytes, limit: int
) -> list[tuple[bytes, bytes]] | None:
    """The first `limit` (string, value) of `scan`, fast; None if long strings are among them: then `scan` it is."""
    if len(start) > PIECE_BYTES or len(prefix) > PIECE_BYTES:
        return None
    head = table + pack_u64(node)
    rows = snapshot.first_rows(head + max(start, prefix), prefix_end(head + prefix), limit)
    found = [(key[HEAD_BYTES:], value) for key, value in rows if len(key) != _CONTINUATION_BYTES]
    return found if len(found) == len(rows) else None


def is_continuation(key: bytes) -> bool:
    return len(key) == _CONTINUATION_BYTES
