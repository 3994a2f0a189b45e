"""What lies on a disk of the warm tier and nothing refers to: after metadata was restored or rebuilt, or on a disk that was away."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from stratum import packs, warm_disks
from stratum.errors import TierUnavailable
from stratum.tier_rows import VALID, Tier

if TYPE_CHECKING:
    from pathlib import Path

    from stratum.tier_rows import PackRow
    from stratum.volume import Volume

SWEPT_SHOWN = 1000


def sweep(volume: Volume, path: Path, *, age_s_min: float, apply: bool) -> dict[str, Any]:
    """Find shards that no row knows, older than `age_s_min`, and remove them if `apply`.

    The disk is listed before the rows are read: a pack's row is there before its first byte. A shard that is being brought to another disk is younger
    than any sensible `age_s_min`. Raises `InvalidArgument`, or `TierUnavailable` for a disk that is not there.
    """
    with volume.snapshot() as reader:
        disk = warm_disks.find_disk(reader, path)
        row = warm_disks.disks(reader)[disk]
    if not volume.warm.is_present(disk, row):
        raise TierUnavailable(f"{path} is not there, or not the disk it was; `stratum disk list` says more")
    before_s = time.time() - age_s_min
    listed = [(name, name.stat()) for name in (path / "packs").rglob("*") if name.is_file()]
    with volume.snapshot() as reader:
        known = {number: row for number, row in packs.scan(reader) if row.tier == Tier.WARM}
    found = [
        (name, stat.st_size) for name, stat in listed if stat.st_mtime < before_s and not _is_wanted(name, disk, known)
    ]
    if apply:
        for name, _ in found:
            name.unlink(missing_ok=True)
    return {
        "path": str(path), "shards": len(found), "bytes": sum(size for _, size in found),
        "names": [str(name.relative_to(path)) for name, _ in found[:SWEPT_SHOWN]], "removed": apply,
    }  # fmt: skip


def _is_wanted(name: Path, disk: int, known: dict[int, PackRow]) -> bool:
    parsed = warm_disks.parse_shard_name(name.name)
    if parsed is None:
        return True  # somebody else's
    number, index, is_whole = parsed
    row = known.get(number)
    if row is None or not is_whole:
        return row is not None and row.state != VALID  # half a shard is of a pack that is being written or removed
    return row.state != VALID or (index < len(row.disks) and row.disks[index] in {disk, 0})
