"""The power goes at a seeded moment: the volume opens, nothing acknowledged is missing, nothing is mixed."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from stratum import volume
from tests.appliance.power_cut_verify import Damage
from tests.support import make_volume, need_fuse, new_seed

ROOT = Path(__file__).resolve().parents[2]


def cut_once(folder: Path, seed: int, *flags: str) -> int:
    """Run the load on a forgetful disk, cut the power, and check what is left; how many acknowledged states were checked."""
    folder.mkdir()
    dice = random.Random(seed)
    mountpoint, after = folder / "disk", folder / "after"
    mountpoint.mkdir()
    disk = subprocess.Popen(
        [sys.executable, "-m", "tests.appliance.forgetful", str(mountpoint)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert disk.stdin is not None
    assert disk.stdout is not None
    possible: dict[str, set[int]] = {}
    load = None
    try:
        assert disk.stdout.readline() == "mounted\n"
        before = volume.RESERVE_BYTES
        volume.RESERVE_BYTES = 65536
        try:
            make_volume(mountpoint / "volume")
        finally:
            volume.RESERVE_BYTES = before
        load = subprocess.Popen(
            [sys.executable, "-m", "tests.appliance.power_cut_load", str(mountpoint / "volume"), str(seed), *flags],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert load.stdout is not None
        for _ in range(dice.randrange(40, 250)):
            word, key, number = load.stdout.readline().split()
            possible[key] = {int(number)} if word == "ack" else possible.get(key, {-1}) | {int(number)}
        disk.stdin.write(f"cut {seed} {after}\n")
        disk.stdin.flush()
        # What was begun but not read before the cut may be there as well.
        assert disk.stdout.readline() == "cut\n"
        load.kill()
        for line in load.stdout:
            if len(words := line.split()) == 3:
                possible[words[1]] = possible.get(words[1], {-1}) | {int(words[2])}
    finally:
        if load is not None:
            load.kill()
            load.communicate()
        disk.stdin.close()
        disk.wait(30)
        disk.stdout.close()
    return verify(after / "volume", possible, seed)


def verify(root: Path, possible: dict[str, set[int]], seed: int) -> int:
    """How many keys were checked. Raises `Damage`."""
    words = [sys.executable, "-m", "tests.appliance.power_cut_verify", str(root), str(seed)]
    known = json.dumps({key: sorted(versions) for key, versions in possible.items()})
    done = subprocess.run(words, cwd=ROOT, input=known, capture_output=True, text=True)
    if done.returncode:
        raise Damage(f"seed {seed}: {done.returncode}: {done.stderr[-2000:]}")
    return int(done.stdout)


def cuts(tmp_path: Path, count: int) -> None:
    need_fuse()
    first = new_seed()
    checked = 0
    for seed in range(first, first + count):
        print(f"seed {seed}")
        checked += cut_once(tmp_path / str(seed), seed)
    assert checked > count


def test_power_cut(tmp_path: Path) -> None:
    cuts(tmp_path, 2)


@pytest.mark.soak
@pytest.mark.timeout(5400)
def test_many_power_cuts(tmp_path: Path) -> None:
    cuts(tmp_path, 150)


@pytest.mark.parametrize("flag", ["no-data-sync", "no-journal-sync", "no-checkpoint-sync", "no-pin"])
def test_it_bites(tmp_path: Path, flag: str) -> None:
    """With one guard taken away the same test must find damage."""
    need_fuse()
    for seed in range(12):
        try:
            cut_once(tmp_path / str(seed), seed, flag)
        except Damage:
            return
    pytest.fail("twelve cuts without syncing lost nothing: the test proves nothing")
