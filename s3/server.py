"""The S3 endpoint: one process that listens and keeps N workers alive, each with the volume open.

The workers share the listening socket, so a worker that dies takes no waiting connection with it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

from stratum.config import load, parse_listen
from stratum.errors import ConfigInvalid
from stratum.housekeeping import Housekeeper
from stratum.log import get_logger
from stratum.volume import Volume

if TYPE_CHECKING:
    from pathlib import Path

GRACE_S = 15.0
RESTART_PAUSE_S = 0.1
RESTART_PAUSE_S_MAX = 10.0
YOUNG_S = 10.0
BACKLOG = 1024
_KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH")
log = get_logger("s3")


def _environment() -> dict[str, str]:
    """What a worker does not know it cannot give away."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT_VARIABLES or name.startswith(("STRATUM_", "COVERAGE_"))
    }


def _listen(address: str) -> socket.socket:
    host, port = parse_listen(address, "s3.listen")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigInvalid(
            f"cannot listen on s3.listen = {address!r}: {error.strerror}; end what uses it or change it"
        ) from error
    listener.setblocking(False)
    return listener


class _Worker:
    """One place for a worker: started again when it ends, later each time while it keeps ending young."""

    def __init__(self, root: Path, listener: socket.socket) -> None:
        self._root = root
        self._listener = listener
        self._pause_s = RESTART_PAUSE_S
        self._not_before_s = 0.0
        self.start()

    def start(self) -> None:
        descriptor = self._listener.fileno()
        self._started_s = time.monotonic()
        self.process: subprocess.Popen[bytes] | None = subprocess.Popen(
            [sys.executable, "-m", "stratum.s3.worker", str(self._root), str(descriptor)],
            pass_fds=(descriptor,),
            stdin=subprocess.DEVNULL,
            env=_environment(),
        )

    def keep_alive(self) -> None:
        now = time.monotonic()
        if self.process is not None and self.process.poll() is not None:
            log.warning("worker_ended", pid=self.process.pid, code=self.process.returncode)
            young = now - self._started_s < YOUNG_S
            self._pause_s = min(self._pause_s * 2, RESTART_PAUSE_S_MAX) if young else RESTART_PAUSE_S
            self.process, self._not_before_s = None, now + self._pause_s
        if self.process is None and now >= self._not_before_s:
            self.start()


def serve(root: Path) -> None:
    """Serve until SIGTERM or SIGINT."""
    config = load(root)
    listener = _listen(config.s3_listen)
    ending = threading.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: ending.set())
    with Volume(root, "s3-master") as volume:
        housekeeper = Housekeeper(volume)
        workers = [_Worker(root, listener) for _ in range(config.s3_workers)]
        try:
            while not ending.wait(RESTART_PAUSE_S):
                for worker in workers:
                    worker.keep_alive()
        finally:
            _end([worker.process for worker in workers if worker.process is not None])
            listener.close()
            housekeeper.stop()


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + GRACE_S
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            log.error("worker_killed", pid=process.pid)
            process.kill()
            process.wait()
