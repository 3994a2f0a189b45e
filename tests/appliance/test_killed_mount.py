"""kill -9 of the mount's daemon while the kernel holds a lock that the daemon waits for: everybody goes on, and the mount comes back."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from botocore.exceptions import BotoCoreError, ClientError

from stratum import health
from tests.support import Server, longer, need_fuse, new_seed

if TYPE_CHECKING:
    from collections.abc import Iterator

BACK_S_MAX = 40.0
"""It takes two seconds; a busy machine takes longer to start Python. A mount that the kernel holds up never comes back."""

# Of its own process: who waits in the kernel for a daemon that cannot end cannot be ended either.
RENAMES = """
import os, sys, time
folder, name = sys.argv[1], sys.argv[2]
while True:
    try:
        with open(f"{folder}/{name}", "w") as file:
            file.write(name)
        for _ in range(50):
            os.rename(f"{folder}/{name}", f"{folder}/{name}.new")
            os.rename(f"{folder}/{name}.new", f"{folder}/{name}")
    except OSError:
        time.sleep(0.02)
"""


def state_of(pid: int) -> str:
    """As the kernel has it of a process and its threads, one letter each; empty if it is gone."""
    states = ""
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            states += (task / "stat").read_text().rpartition(")")[2].split()[0]
    return states


def mount_pid(server: Server) -> int:
    return next((int(row["pid"]) for row in server.processes() if row["role"] == "mount"), 0)


def answers(folder: Path) -> bool:
    try:
        return health.probe(folder.is_dir, 1.0)
    except (OSError, TimeoutError):
        return False


@contextlib.contextmanager
def renaming(folder: Path, count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    started = [subprocess.Popen([sys.executable, "-c", RENAMES, str(folder), f"r{number}"]) for number in range(count)]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait(10)


def putting(server: Server, ending: threading.Event) -> list[threading.Thread]:
    def run(number: int) -> None:
        client = server.client(retries={"max_attempts": 0}, connect_timeout=5, read_timeout=20)
        dice = random.Random(number)
        while not ending.is_set():
            with contextlib.suppress(ClientError, BotoCoreError):
                client.put_object(Bucket="killed", Key=f"d/r{dice.randrange(4)}", Body=b"from S3")
                client.delete_object(Bucket="killed", Key=f"d/r{dice.randrange(4)}.new")

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(3)]
    for thread in threads:
        thread.start()
    return threads


@pytest.mark.longer
@pytest.mark.timeout(900)
def test_a_killed_daemon_never_holds_the_kernel_up(tmp_path: Path) -> None:
    need_fuse()
    dice = random.Random(new_seed())
    server = Server(tmp_path, mount=True).start()
    assert server.mount is not None
    ending = threading.Event()
    try:
        server.client().create_bucket(Bucket="killed")
        folder = server.mount / "killed" / "d"
        folder.mkdir()
        with renaming(folder, 4) as renamers:
            threads = putting(server, ending)
            for _ in range(longer(6, 50)):
                time.sleep(dice.uniform(0.2, 0.6))
                killed = mount_pid(server)
                assert killed
                os.kill(killed, signal.SIGKILL)
                deadline = time.monotonic() + BACK_S_MAX
                while not answers(folder) or mount_pid(server) in {0, killed}:
                    assert time.monotonic() < deadline, (
                        f"not back; the daemon {state_of(killed)}, clients {[state_of(p.pid) for p in renamers]}\n"
                        + server.log.read_text()[-3000:]
                    )
                assert state_of(killed) == ""
            ending.set()
            for thread in threads:
                thread.join(30)
                assert not thread.is_alive()
    finally:
        ending.set()
        assert server.stop() == 0
    assert "connection_not_aborted" not in server.log.read_text()
