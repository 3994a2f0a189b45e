"""`stratum serve`: one a volume, ready when its own parts are, and it takes away nothing that is not its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from stratum import mount_table, mounting
from stratum.cli.exit_codes import COULD_NOT_RUN
from tests.support import Server, is_alive, need_fuse, serving, stratum

if TYPE_CHECKING:
    from pathlib import Path


def mount_id(folder: Path) -> int:
    with mounting.top(folder) as now:
        assert now is not None
        return now.id


def test_a_volume_that_is_served_is_not_served_again(tmp_path: Path) -> None:
    need_fuse()
    with serving(tmp_path, mount=True) as server:
        assert server.mount is not None
        assert server.process is not None
        before = mount_id(server.mount)
        refused = stratum("serve", server.root, expect=COULD_NOT_RUN)
        assert f"served already, by process {server.process.pid}" in refused.stderr
        assert "ready" not in refused.stdout
        assert mount_id(server.mount) == before
        assert stratum("serve", server.root, "--json", expect=COULD_NOT_RUN).returncode
        assert server.raw("GET", "/")[0] == 200


def test_ready_means_its_own_parts_and_the_end_leaves_others_alone(tmp_path: Path) -> None:
    """Another server answers at the address, another mount at the mountpoint."""
    need_fuse()
    with serving(tmp_path / "first", mount=True) as first:
        assert first.mount is not None
        before = mount_id(first.mount)
        (tmp_path / "second").mkdir()
        second = Server(tmp_path / "second")
        second.configure({"mount": {"path": str(first.mount)}})
        refused = stratum("serve", second.root, expect=COULD_NOT_RUN)
        assert "mount cannot run" in refused.stderr
        assert f"{first.mount} is mounted already" in refused.stderr
        assert "ready" not in refused.stdout
        assert mount_id(first.mount) == before, "the mount of the one that runs is not touched"
        second.configure({"mount": {"path": ""}, "s3": {"listen": first.endpoint.removeprefix("http://")}})
        refused = stratum("serve", second.root, expect=COULD_NOT_RUN)
        assert "cannot listen on s3.listen" in refused.stderr
        assert "in use" in refused.stderr
        assert "ready" not in refused.stdout
        (first.mount / "goes-on").mkdir()


def test_a_part_that_was_ready_and_dies_is_started_again_whatever_others_do_meanwhile(tmp_path: Path) -> None:
    with serving(tmp_path, allow_errors=True) as server:
        pid = next(int(row["pid"]) for row in server.processes() if row["role"] == "admin")
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while True:
            now = [int(row["pid"]) for row in server.processes() if row["role"] == "admin"]
            if now and pid not in now:
                break
            assert time.monotonic() < deadline


def test_what_is_written_while_the_mount_is_away_is_refused_and_lands_nowhere(tmp_path: Path) -> None:
    need_fuse()
    with serving(tmp_path, mount=True, allow_errors=True) as server:
        assert server.mount is not None
        server.client().create_bucket(Bucket="away")
        words = [sys.executable, "-c", WRITES, str(server.mount / "away")]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as writer:
            try:
                assert writer.stdout is not None
                assert writer.stdout.readline() == "begun\n"
                for _ in range(3):
                    before = mount_id(server.mount)
                    pid = next(int(row["pid"]) for row in server.processes() if row["role"] == "mount")
                    os.kill(pid, signal.SIGKILL)
                    deadline = time.monotonic() + 40
                    while is_alive(pid) or mount_id(server.mount) == before or not os.path.isdir(server.mount / "away"):
                        assert time.monotonic() < deadline
                        time.sleep(0.02)
                writer.terminate()
                written = json.loads(writer.stdout.read())
            finally:
                writer.kill()
        keys = {name for name in os.listdir(server.mount / "away") if name.startswith("f")}
        assert set(written) <= keys, "what was written without an error is there"
        assert len(mount_table.stacked_at(str(server.mount))) == 1
        folder = server.mount
    assert mount_table.mount_at(str(folder)) is None
    assert os.listdir(folder) == [], "nothing lies in the folder beneath"
    with pytest.raises(PermissionError):
        (folder / "lost").touch()


def test_the_folder_beneath_is_released(tmp_path: Path) -> None:
    need_fuse()
    with serving(tmp_path, mount=True) as server:
        assert server.mount is not None
        refused = stratum("mount", server.root, server.mount, "--release", expect=COULD_NOT_RUN)
        assert "something is mounted" in refused.stderr
    with pytest.raises(PermissionError):
        (server.mount / "lost").touch()
    stratum("mount", server.root, server.mount, "--release")
    (server.mount / "kept").touch()
    stratum("mount", server.root, tmp_path / "none", "--release", expect=COULD_NOT_RUN)


WRITES = """
import json, os, signal, sys, time
folder, written, ending = sys.argv[1], [], []
signal.signal(signal.SIGTERM, lambda *_: ending.append(1))
print("begun", flush=True)
number = 0
while not ending:
    number += 1
    try:
        os.makedirs(folder, exist_ok=True)
        with open(f"{folder}/f{number}", "w") as file:
            file.write("x")
            file.flush()
            os.fsync(file.fileno())
        written.append(f"f{number}")
    except OSError:
        time.sleep(0.005)
print(json.dumps(written))
"""
