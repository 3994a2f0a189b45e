"""A loop that stands still is ended by its parent, with or without systemd, and another one takes its place."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

import pytest

from stratum import counting, processes
from stratum.processes import KeptProcess
from tests.support import need_fuse, serving

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support import Server

BEATS = """
import sys, time
from pathlib import Path
from stratum import counting
counting.attach(Path(sys.argv[1]), "child")
while True:
    counting.beat()
    time.sleep(0.05)
"""


def wait_for(what: Callable[[], bool], kept: KeptProcess | None = None, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        if kept is not None:
            kept.keep_alive()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_child_that_stands_still_is_ended_and_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "SILENT_S_MAX", 3.0)
    monkeypatch.setattr(processes, "LOOK_AT_BEATS_S", 0.2)
    folder = tmp_path / "metrics"
    kept = KeptProcess("child", ["-c", BEATS, str(folder)], beats_in=folder)
    quiet = KeptProcess("child", ["-c", "import time; time.sleep(600)"], beats_in=folder)
    try:
        kept.keep_alive()
        quiet.keep_alive()
        wait_for(lambda: counting.silent_s(folder, kept.process.pid if kept.process else 0) is not None, kept)
        assert kept.process is not None
        first = kept.process.pid
        began = time.monotonic()
        wait_for(lambda: time.monotonic() - began > 4.0, kept)
        assert kept.process is not None
        assert kept.process.pid == first, "one that beats is left alone"
        os.kill(first, signal.SIGSTOP)
        wait_for(lambda: kept.process is not None and kept.process.pid != first, kept)
        assert quiet.process is not None
        before = quiet.process.pid
        quiet.keep_alive()
        assert quiet.process is not None
        assert quiet.process.pid == before, "one that does not count (yet) is not taken for silent"
    finally:
        kept.kill()
        quiet.kill()


def test_one_that_says_when_it_is_ready_is_not_ended_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "SILENT_S_MAX", 0.5)
    monkeypatch.setattr(processes, "LOOK_AT_BEATS_S", 0.05)
    folder = tmp_path / "metrics"
    code = BEATS.replace("while True:", "while False:") + "time.sleep(600)"
    kept = KeptProcess("child", ["-c", code, str(folder)], beats_in=folder, says_ready=True)
    try:
        kept.keep_alive()
        assert kept.process is not None
        first = kept.process.pid
        wait_for(lambda: (counting.silent_s(folder, first) or 0.0) > 1.0, kept)
        assert kept.process.pid == first
        kept.is_ready()
        wait_for(lambda: kept.process is not None and kept.process.pid != first, kept)
    finally:
        kept.kill()


def pids(server: Server, role: str) -> set[int]:
    return {int(row["pid"]) for row in server.processes() if row["role"] == role}


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_worker_and_a_mount_that_stand_still_are_replaced(tmp_path: Path) -> None:
    need_fuse()
    with serving(tmp_path, mount=True, allow_errors=True) as server:
        for role in ("s3", "mount"):
            before = pids(server, role)
            stopped = min(before)
            os.kill(stopped, signal.SIGSTOP)
            wait_for(
                lambda role=role, stopped=stopped, before=before: (  # type: ignore[misc]  # bound now
                    stopped not in (now := pids(server, role)) and len(now) == len(before)
                ),
                seconds=180,
            )
        server.client().create_bucket(Bucket="back")
        wait_for(lambda: os.path.isdir((server.mount or tmp_path) / "back"))
