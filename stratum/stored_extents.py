"""Extents whose bytes still lie in the metadata store, and how they get to a data file later.

A small fsync of a large file would be two flushes: its data, then the commit. Instead its bytes travel in the commit, as an E
row under an extent of segment STORED_SEGMENT. The housekeeper moves what stays: bytes that are overwritten soon, as a database
does, never reach a data file.

Invariants
* An extent of STORED_SEGMENT has an E row, and no other extent has one.
* A move changes the place of the same extent: readers that located it before read the row of their own snapshot.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from stratum.blocks import checksum, verified
from stratum.schema import STORED_SEGMENT, key_u64, prefix_range, unpack_u64

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stratum.segments import ExtentWriter
    from stratum.transaction import InodeReader, MetadataTransaction
    from stratum.volume import Volume

STORED_BYTES_MAX = 16 * 1024
"""Of one commit of one file. Larger ones pay for their own flush: 16 KiB cost 30 us in the store, a flush 150 to 300 us."""
JOINED_BYTES_MAX = 4096
"""Small appends grow the extent before them up to this, so that a log of short lines is not one slice a line."""
AGE_S_MIN = 5.0
MOVED_AT_ONCE = 256


def get(reader: InodeReader, number: int) -> bytes:
    """The bytes of a stored extent, verified."""
    return verified(reader.get(key_u64(b"E", number)), f"extent {number:#x}")


def put(tx: MetadataTransaction, inode: int, at: int, data: bytes) -> tuple[int, int, int]:
    """Make an extent of `data` for file offset `at`: (extent, file offset, length), joined with a short one before it."""
    before = tx.slices(inode, at - 1, at) if at else []
    if before:
        piece = before[0]
        row, _ = tx.extent(piece.extent)
        if (
            row.segment == STORED_SEGMENT and row.references == 1 and (piece.extent_offset, piece.length) == (0, row.length)
            and piece.end <= at + len(data) and at + len(data) - piece.file_offset <= JOINED_BYTES_MAX
        ):  # fmt: skip
            data = get(tx, piece.extent)[: at - piece.file_offset] + data
            at = piece.file_offset
    number = tx.new_id()
    tx.add_stored_extent(number, len(data))
    tx.put(key_u64(b"E", number), checksum(data) + data)
    return number, at, len(data)


def numbers(reader: InodeReader) -> set[int]:
    return {unpack_u64(key[1:])[0] for key, _ in reader.scan(*prefix_range(b"E"))}


def move(volume: Volume, extents: Iterable[int]) -> int:
    """Move extents to a data file: one flush and one commit for all of them. How many went.

    Raises `NoSpace` or `StorageFailed`; nothing has changed then.
    """
    with volume.snapshot() as reader:
        found = []
        for number in extents:
            raw = reader.get(key_u64(b"X", number))
            if raw is not None:
                row, _ = reader.extent(number)
                if row.segment == STORED_SEGMENT and row.references:
                    found.append((number, get(reader, number)))
    if not found:
        return 0
    with ExitStack() as stack:
        writers: dict[int, ExtentWriter] = {}
        for number, data in found:
            writer = writers[number] = stack.enter_context(volume.segments.writer(len(data), hot_only=True))
            writer.write(data)
            writer.seal()
        volume.segments.sync_writers(list(writers.values()))

        def place(tx: MetadataTransaction) -> list[int]:
            return [number for number, writer in writers.items() if tx.place_extent(number, writer.extents[0])]

        for writer in writers.values():
            writer.committing()
        placed = volume.mutate(place, frees=True)
        for number, writer in writers.items():
            if number in placed:
                writer.keep()
            else:
                writer.reopen()  # freed meanwhile: the copy goes
    return len(placed)


class Mover:
    """Moves what has stayed in the store for AGE_S_MIN."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._looked_s = 0.0
        self._before: set[int] = set()

    def run(self) -> None:
        if time.monotonic() - self._looked_s < AGE_S_MIN:
            return
        with self._volume.snapshot() as reader:
            present = numbers(reader)
        old = sorted(present & self._before)
        for at in range(0, len(old), MOVED_AT_ONCE):
            move(self._volume, old[at : at + MOVED_AT_ONCE])
        self._before = present - set(old)
        self._looked_s = time.monotonic()
