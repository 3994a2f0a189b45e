"""What systemd would hear and see: readiness, the watchdog, the end; against a socket of our own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from stratum import notify
from tests.support import Server, need_fuse

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Manager:
    """The service manager's end of the protocol."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + path[1:] if path.startswith("@") else path)
        self.heard: list[str] = []

    def hear(self, seconds: float) -> list[str]:
        """The lines that come within so many seconds."""
        deadline = time.monotonic() + seconds
        heard: list[str] = []
        while (left := deadline - time.monotonic()) > 0:
            self.socket.settimeout(left)
            try:
                heard += self.socket.recv(4096).decode().splitlines()
            except TimeoutError:
                break
        self.heard += heard
        return heard

    def wait_for(self, line: str, seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while line not in self.heard:
            assert time.monotonic() < deadline, f"no {line}: {self.heard}"
            self.hear(0.1)

    def start(self, *words: str, watchdog_s: float) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "NOTIFY_SOCKET": self.path, "WATCHDOG_USEC": str(int(watchdog_s * 1e6))}
        return subprocess.Popen(
            [sys.executable, "-m", "stratum.cli.main", *words],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(str(tmp_path / "notify"))
    yield made
    made.socket.close()


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    assert process.wait(30) == 0


def test_nobody_listens() -> None:
    assert not notify.send(READY=1)
    assert notify.watchdog_s() == 0


def test_an_abstract_socket_serves_too(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"@stratum-test-{os.getpid()}"
    made = Manager(name)
    monkeypatch.setenv("NOTIFY_SOCKET", name)
    assert notify.send(READY=1, STATUS="here")
    assert made.hear(0.2) == ["READY=1", "STATUS=here"]
    made.socket.close()
    monkeypatch.setenv("WATCHDOG_USEC", "3000000")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert notify.watchdog_s() == 0, "the watchdog waits for another process"


def test_the_endpoint_is_ready_when_it_answers_and_fed_by_its_workers(tmp_path: Path, manager: Manager) -> None:
    server = Server(tmp_path)
    process = manager.start("s3", str(server.root), watchdog_s=1.5)
    manager.wait_for("READY=1")
    assert server.raw("GET", "/")[0] == 200
    manager.wait_for("WATCHDOG=1")
    workers = [row["pid"] for row in server.processes() if row["role"] == "s3"]
    os.kill(workers[0], signal.SIGSTOP)
    manager.hear(2.0)
    assert "WATCHDOG=1" not in manager.hear(1.5), "a worker that stands still must not look alive"
    os.kill(workers[0], signal.SIGCONT)
    manager.heard.clear()
    manager.wait_for("WATCHDOG=1")
    end(process)
    manager.wait_for("STOPPING=1")
    assert sum(line == "READY=1" for line in manager.heard) == 0, "children do not speak for the service"


@pytest.mark.parametrize("role", ["tierd", "admin", "serve"])
def test_every_service_says_when_it_is_ready_and_that_it_lives(tmp_path: Path, manager: Manager, role: str) -> None:
    server = Server(tmp_path)
    process = manager.start(role, str(server.root), watchdog_s=1.5)
    manager.wait_for("READY=1")
    manager.wait_for("WATCHDOG=1")
    assert any(line.startswith("STATUS=") for line in manager.heard)
    assert manager.heard.count("READY=1") == 1
    end(process)


def test_the_mount_is_ready_when_it_answers(tmp_path: Path, manager: Manager) -> None:
    need_fuse()
    server = Server(tmp_path, mount=True)
    assert server.mount
    process = manager.start("mount", str(server.root), watchdog_s=1.5)
    try:
        manager.wait_for("READY=1")
        assert os.path.ismount(server.mount)
        manager.wait_for("WATCHDOG=1")
    finally:
        end(process)
    manager.wait_for("STOPPING=1")
    assert not os.path.ismount(server.mount)
