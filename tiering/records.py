"""Decisions and moves that can be read later: the newest of each file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stratum.schema import key_u64, key_u64_u64, pack_json, prefix_range, split_u64_u64, unpack_json

if TYPE_CHECKING:
    from stratum.transaction import InodeReader, MetadataTransaction

KEPT_MAX = 10


def add(tx: MetadataTransaction, inode: int, event: dict[str, Any]) -> None:
    """Note an event of a file; the oldest beyond KEPT_MAX goes."""
    keys = [key for key, _ in tx.scan(*prefix_range(key_u64(b"j", inode)))]
    for key in keys[: max(len(keys) - KEPT_MAX + 1, 0)]:
        tx.delete(key)
    moment_ns = tx.now_ns
    while keys and split_u64_u64(keys[-1])[1] >= moment_ns:
        moment_ns = split_u64_u64(keys[-1])[1] + 1
    tx.put(key_u64_u64(b"j", inode, moment_ns), pack_json(event))


def of(reader: InodeReader, inode: int) -> list[dict[str, Any]]:
    """The events of a file, newest first; each has `time_ns`."""
    rows = [
        {"time_ns": split_u64_u64(key)[1], **unpack_json(raw)}
        for key, raw in reader.scan(*prefix_range(key_u64(b"j", inode)))
    ]
    return rows[::-1]
