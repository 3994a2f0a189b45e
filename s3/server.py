"""The S3 endpoint: one process that listens and keeps N workers alive, each with the volume open.

The workers share the listening socket, so a worker that dies takes no waiting connection with it.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from typing import TYPE_CHECKING

from stratum.config import load, parse_listen
from stratum.errors import ConfigInvalid
from stratum.housekeeping import Housekeeper
from stratum.processes import KeptProcess, end_all
from stratum.volume import Volume

if TYPE_CHECKING:
    from pathlib import Path

GRACE_S = 15.0
LOOK_S = 0.1
BACKLOG = 1024
_KEPT_VARIABLES = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TZ",
    "TMPDIR",
    "PYTHONPATH",
    "VIRTUAL_ENV",
    "LD_LIBRARY_PATH",
    "CREDENTIALS_DIRECTORY",
)


def _environment() -> dict[str, str]:
    """What a worker does not know it cannot give away. It reads from remotes, so it knows how to open them."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT_VARIABLES or name.startswith(("STRATUM_", "COVERAGE_", "AWS_"))
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


def serve(root: Path) -> None:
    """Serve until SIGTERM or SIGINT."""
    config = load(root)
    listener = _listen(config.s3_listen)
    ending = threading.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: ending.set())
    with Volume(root, "s3-master") as volume:
        housekeeper = Housekeeper(volume)
        descriptor = listener.fileno()
        words = ["-m", "stratum.s3.worker", str(root), str(descriptor)]
        workers = [
            KeptProcess("s3-worker", words, descriptors=[descriptor], environment=_environment())
            for _ in range(config.s3_workers)
        ]
        try:
            while True:
                for worker in workers:
                    worker.keep_alive()
                if ending.wait(LOOK_S):
                    break
        finally:
            end_all(workers, GRACE_S)
            listener.close()
            housekeeper.stop()
