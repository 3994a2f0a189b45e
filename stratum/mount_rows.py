"""The rows of live mounts (table T of stratum/schema.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stratum.schema import key_u64, pack_json, unpack_json

if TYPE_CHECKING:
    from stratum.transaction import InodeReader, MetadataTransaction


def mount_rows(reader: InodeReader) -> dict[int, dict[str, Any]]:
    """The rows of live mounts (table T), by session."""
    return {int.from_bytes(key[1:], "big"): unpack_json(raw) for key, raw in reader.scan_prefix(b"T")}


def tell_mount_row(tx: MetadataTransaction, session: int, **told: Any) -> None:
    """Say more in the row of a mount, if it still has one."""
    key = key_u64(b"T", session)
    raw = tx.get(key)
    if raw is not None:
        tx.put(key, pack_json({**unpack_json(raw), **told}))
