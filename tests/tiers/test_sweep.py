"""What lies in a remote and nothing refers to."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from stratum import cold, cold_admin, fsck, packs, warm_disks, warm_sweep
from stratum.errors import ForeignRemote, TierUnavailable
from stratum.tier_rows import Tier
from stratum.tiering.mover import Mover
from tests.support import get, put

if TYPE_CHECKING:
    from pathlib import Path

    from stratum.volume import Volume

DATA = os.urandom(300_000)


def test_only_what_no_row_knows_is_swept(tiered: Volume) -> None:
    kept = put(tiered, "kept", DATA)
    Mover(tiered).move([kept.number], Tier.COLD, cause="test")
    lost = put(tiered, "lost", DATA)
    Mover(tiered).move([lost.number], Tier.COLD, cause="test")
    _, remote = tiered.cold.remote("archive")
    with tiered.snapshot() as reader:
        keys = {row.key: number for number, row in packs.scan(reader)}
    listed = {info.key for info in remote.sealed.list(f"v1/{tiered.instance}/")}
    assert listed == set(keys)
    stray = tiered.cold.new_key()
    remote.sealed.put(stray, b"x" * 1000, {})
    remote.sealed.put(f"v1/{tiered.instance}/_index/20260101-000000", b"index", {})
    remote.sealed.put("v1/somebody-else/ab/abcd", b"theirs", {})
    upload = remote.sealed.create_upload(tiered.cold.new_key(), {})
    young = cold_admin.sweep(tiered, "archive", age_s_min=3600, apply=True)
    assert (young["objects"], young["uploads"]) == (0, 0)
    found = cold_admin.sweep(tiered, "archive", age_s_min=-5, apply=False)
    assert (found["objects"], found["bytes"], found["uploads"], found["keys"]) == (1, 1000, 1, [stray])
    assert stray in {info.key for info in remote.sealed.list(f"v1/{tiered.instance}/")}
    swept = cold_admin.sweep(tiered, "archive", age_s_min=-5, apply=True)
    assert swept["removed"]
    left = {info.key for info in remote.sealed.list("v1/")}
    assert left == listed | {f"v1/{tiered.instance}/_index/20260101-000000", "v1/somebody-else/ab/abcd"}
    assert upload not in {number for _, number, _ in remote.sealed.list_uploads("v1/")}
    assert get(tiered, "kept") == get(tiered, "lost") == DATA
    assert fsck.check(tiered) == []


def test_another_volumes_remote_is_not_swept(tiered: Volume) -> None:
    _, remote = tiered.cold.remote("archive")
    stray = tiered.cold.new_key()
    remote.sealed.put(stray, b"x", {})
    cold.write_marker(remote, tiered.instance, 7, new=False)
    with pytest.raises(ForeignRemote):
        cold_admin.sweep(tiered, "archive", age_s_min=-5, apply=True)
    assert [info.key for info in remote.sealed.list(f"v1/{tiered.instance}/")] == [stray]


def test_shards_that_no_row_knows_are_swept(tiered: Volume, tmp_path: Path) -> None:
    kept, gone = put(tiered, "kept", DATA), put(tiered, "gone", DATA)
    for inode in (kept, gone):
        Mover(tiered).move([inode.number], Tier.WARM, cause="test")
    with tiered.snapshot() as reader:
        numbers = [number for number, row in packs.scan(reader) if row.tier == Tier.WARM]
        disks = {row.path: number for number, row in warm_disks.disks(reader).items()}
        first = packs.get(reader, numbers[0])
    assert first is not None
    folder = tmp_path / "d0"
    index = first.disks.index(disks[str(folder)])
    own = folder / warm_disks.shard_name(numbers[0], index)
    stray = folder / warm_disks.shard_name(7 << 32, 0)
    elsewhere = own.with_name(warm_disks.shard_name(numbers[0], (index + 1) % 3).rpartition("/")[2])
    half = own.with_name(own.name + ".1.2.new")
    stray.parent.mkdir(parents=True)
    foreign = [folder / "packs" / name for name in ("notes.txt", "notes.shard", "0.0.shard")]
    for name in (stray, elsewhere, half, *foreign):
        name.write_bytes(b"x" * 1000)
    assert warm_sweep.sweep(tiered, folder, age_s_min=3600, apply=True)["shards"] == 0
    assert warm_sweep.sweep(tiered, folder, age_s_min=-5, apply=False)["bytes"] == 3000
    assert warm_sweep.sweep(tiered, folder, age_s_min=-5, apply=True)["shards"] == 3
    assert own.exists()
    assert all(name.exists() for name in foreign), "they are not ours"
    assert not any(name.exists() for name in (stray, elsewhere, half))
    assert get(tiered, "kept") == get(tiered, "gone") == DATA
    assert fsck.check(tiered) == []
    (folder / warm_disks.MARKER).unlink()
    with pytest.raises(TierUnavailable, match="not there"):
        warm_sweep.sweep(tiered, folder, age_s_min=-5, apply=True)
