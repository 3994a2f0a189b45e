"""Which objects damage is about: of the rows of damage.py, those that somebody still misses bytes by, with their names."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stratum import packs
from stratum.blocks import verified
from stratum.damage import ROWS_MAX, DamageRow, Thing, lost_extents, scan
from stratum.errors import DataDamaged
from stratum.manifest import Names
from stratum.schema import Inode, Kind, key_u64

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stratum.transaction import InodeReader

PATHS_MAX = 10
"""Of one thing: a pack may hold thousands of files."""


@dataclass(slots=True)
class Damage:
    """A row, and the objects that are damaged by it: `bucket/key`, at most PATHS_MAX."""

    thing: Thing
    number: int
    row: DamageRow
    paths: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        return {
            "thing": self.thing.name.lower(), "number": f"{self.number:016x}", "objects": self.paths, "what": self.row.what,
            "found_by": self.row.by, "found_s": self.row.found_s, "attempts": self.row.attempts,
        }  # fmt: skip


def unhealed(reader: InodeReader, limit: int = ROWS_MAX) -> tuple[list[Damage], int]:
    """(the first `limit` that some object is still damaged by, the oldest first; how many rows there may be more)."""
    rows = sorted((item for item in scan(reader) if not item[2].heals), key=lambda item: (item[2].found_s, item[1]))
    names = Names(reader)
    shown: list[Damage] = []
    for at, (thing, number, row) in enumerate(rows):
        if len(shown) == limit:
            return shown, len(rows) - at
        paths = objects_of(reader, names, thing, number, row)
        if paths:
            shown.append(Damage(thing, number, row, paths))
    return shown, 0


def objects_of(reader: InodeReader, names: Names, thing: Thing, number: int, row: DamageRow) -> list[str]:
    """The objects that show bytes which are damaged, at most PATHS_MAX; none: nobody can miss anything."""
    if thing == Thing.CONTENT:
        return [_path(reader, names, number)] if content_is_damaged(reader, number) else []
    if thing == Thing.EXTENT:
        found = _owners(reader, number, row.first, row.last)
    else:
        found = _owners_of_pack(reader, number, row.first)
    paths = dict.fromkeys(_path(reader, names, inode) for _, inode in zip(range(PATHS_MAX), found, strict=False))
    return list(paths)


def content_is_damaged(reader: InodeReader, number: int) -> bool:
    if not reader.has_inode(number) or not reader.inode(number).flags & Inode.INLINE:
        return False
    try:
        verified(reader.get(key_u64(b"N", number)), "")
    except DataDamaged:
        return True
    return False


def _owners(reader: InodeReader, extent: int, first: int, last: int) -> Iterator[int]:
    """Files that show any of those bytes of an extent."""
    for inode in packs.owners(reader, extent):
        if reader.has_inode(inode) and any(
            piece.extent == extent
            and piece.extent_offset + piece.length > first
            and (not last or piece.extent_offset < last)
            for piece in reader.slices(inode)
        ):
            yield inode


def _owners_of_pack(reader: InodeReader, number: int, good_bytes: int) -> Iterator[int]:
    seen: set[int] = set()
    for extent in lost_extents(reader, number, good_bytes):
        for inode in _owners(reader, extent, 0, 0):
            if inode not in seen:
                seen.add(inode)
                yield inode


def _path(reader: InodeReader, names: Names, number: int) -> str:
    inode = reader.inode(number)
    bucket, keys = names.of(inode) if inode.kind == Kind.FILE else ("", [])
    return f"{bucket}/{os.fsdecode(keys[0])}" if keys else f"inode {number:#x} (without a name)"
