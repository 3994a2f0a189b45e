"""`gc`: bytes on the data disks that no row names, left by processes that did not live to commit them."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stratum import housekeeping, packs
from stratum.schema import ExtentRow, key_u64, prefix_range
from stratum.segments import ALIGNMENT_BYTES, punch_hole

if TYPE_CHECKING:
    from pathlib import Path

    from stratum.volume import Volume


@dataclass(slots=True, frozen=True)
class Leak:
    """Bytes on a data disk that no row names; `offset` None is the whole file."""

    name: Path
    offset: int | None
    size: int


def collect(volume: Volume, *, apply: bool = False) -> list[Leak]:
    """Bytes that a process wrote and did not live to commit. Only what nobody can commit any more is counted."""
    if apply:
        housekeeping.run_once(volume)  # what is already known to be free goes first
    with volume.snapshot() as reader:
        covered: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for _, raw in reader.scan(*prefix_range(b"X")):
            extent, _ = ExtentRow.unpack(raw)
            covered[extent.segment].append((extent.offset, extent.offset + extent.length))
        for segment, offset, length in packs.left_behind(reader, 1 << 62):
            covered[segment].append((offset, offset + length))
    leaks = []
    for folder in volume.segments.folders:
        for name in sorted(folder.glob("*/*/*.segment")):
            leaks += _leaks_of(volume, name, sorted(covered[housekeeping.segment_of(name)]))
    if apply:
        for leak in leaks:
            if leak.offset is None:
                leak.name.unlink(missing_ok=True)
                continue
            fd = os.open(leak.name, os.O_RDWR | os.O_CLOEXEC)
            try:
                punch_hole(fd, leak.offset, leak.size)
            finally:
                os.close(fd)
    return leaks


def _leaks_of(volume: Volume, name: Path, covered: list[tuple[int, int]]) -> list[Leak]:
    """`covered` was read before: only a dead session's files are looked at, and those gain no extent any more."""
    number = housekeeping.segment_of(name)
    session = number >> 32
    if session in volume.session.rows() and not volume.session.is_dead(session):
        return []
    with volume.snapshot() as reader:
        known = reader.get(key_u64(b"G", number)) is not None
    if not known:
        return [Leak(name, None, name.stat().st_blocks * 512)]
    return [Leak(name, start, stop - start) for start, stop in _uncovered(name, covered)]


def _uncovered(name: Path, covered: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Allocated ranges that lie in no extent, in whole pages."""
    found = []
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        at = 0
        for start, stop in [*covered, (size, size)]:
            first = -(-at // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            last = (
                start // ALIGNMENT_BYTES * ALIGNMENT_BYTES
                if start < size
                else -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            )
            while first < last:
                try:
                    data = os.lseek(fd, first, os.SEEK_DATA)
                except OSError:
                    break
                if data >= last:
                    break
                hole = min(os.lseek(fd, data, os.SEEK_HOLE), last)
                found.append((data, -(-hole // ALIGNMENT_BYTES) * ALIGNMENT_BYTES))
                first = found[-1][1]
            at = max(at, stop)
    finally:
        os.close(fd)
    return found
