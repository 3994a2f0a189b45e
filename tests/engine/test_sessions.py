"""Who lives, who is dead, and that what a dead mount left is detached once."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from stratum import fencing
from stratum.fencing import fence
from stratum.mount_rows import mount_rows
from stratum.schema import key_u64, pack_json
from stratum.volume import Volume
from tests.support import make_volume

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

DIES = """
import os, sys
from pathlib import Path
from stratum.volume import Volume
opened = Volume(Path(sys.argv[1]), "mount")
print(opened.session.id, flush=True)
os._exit(1)
"""
ROW = {
    "socket": "none",
    "device": 0,
    "mountpoint": "/nowhere",
    "slot": 5,
    "read_only": False,
    "bucket": "",
    "shared": False,
}


def dead_session(root: Path) -> int:
    done = subprocess.run([sys.executable, "-c", DIES, str(root)], capture_output=True, text=True, check=False)
    return int(done.stdout)


def test_several_may_ask_at_once_whether_a_session_is_dead(tmp_path: Path) -> None:
    """None of them is taken for the owner of its lock by another one."""
    root = tmp_path / "volume"
    make_volume(root)
    dead = dead_session(root)
    with Volume(root, "a") as opened, ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(lambda: [opened.session.is_dead(dead) for _ in range(2000)]) for _ in range(4)]
        assert all(all(future.result()) for future in asked)
        living = subprocess.Popen(
            [sys.executable, "-c", DIES.replace("os._exit(1)", "input()"), str(root)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert living.stdout
        number = int(living.stdout.readline())
        asked = [pool.submit(lambda: [opened.session.is_dead(number) for _ in range(500)]) for _ in range(4)]
        assert not any(any(future.result()) for future in asked)
        living.communicate("\n")


def test_a_mount_is_detached_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is late would otherwise detach the mount that came after it."""
    root = tmp_path / "volume"
    make_volume(root)
    dead = dead_session(root)
    detached: list[str] = []
    inside, go_on = threading.Event(), threading.Event()

    def take_away(_: Volume, row: dict[str, Any], *, cover: bool) -> None:
        assert cover, "nothing may land in the folder beneath"
        detached.append(row["mountpoint"])
        inside.set()
        assert go_on.wait(20)

    monkeypatch.setattr(fencing, "take_away", take_away)
    with Volume(root, "test") as opened, ThreadPoolExecutor(2) as pool:
        opened.mutate(lambda tx: tx.put(key_u64(b"T", dead), pack_json(ROW)))
        first = pool.submit(fence, opened, dead, ROW)
        assert inside.wait(20)
        second = pool.submit(fence, opened, dead, ROW)
        time.sleep(0.05)
        assert not second.done(), "it waits until the mount is gone"
        go_on.set()
        first.result(20)
        second.result(20)
        assert detached == ["/nowhere"]
        with opened.snapshot() as reader:
            assert mount_rows(reader) == {}


def test_who_stands_still_while_it_fences_holds_nobody_up_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "volume"
    make_volume(root)
    dead = dead_session(root)
    detached: list[str] = []
    monkeypatch.setattr(fencing, "take_away", lambda _, row, cover: detached.append(row["mountpoint"]))
    monkeypatch.setattr(fencing, "FENCING_S_MAX", 0.05)
    with Volume(root, "test") as opened:
        opened.mutate(lambda tx: tx.put(key_u64(b"T", dead), pack_json(ROW)))
        with fencing._alone(opened):  # somebody who does not end
            fence(opened, dead, ROW)
        assert detached == ["/nowhere"]
        (opened.meta / "fencing.lock").unlink()
        (opened.meta / "fencing.lock").mkdir()
        opened.mutate(lambda tx: tx.put(key_u64(b"T", dead), pack_json(ROW)))
        fence(opened, dead, ROW)
        assert detached == ["/nowhere", "/nowhere"], "no lock file can be had"
