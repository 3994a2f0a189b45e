"""The S3 endpoint: one process that listens and keeps N workers alive, each with the volume open.

The workers share the listening socket, so a worker that dies takes no waiting connection with it.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from stratum import counting, notify
from stratum.config import load
from stratum.ending import Ending
from stratum.errors import StratumError
from stratum.housekeeping import Housekeeper
from stratum.preflight import check_certificate
from stratum.processes import CannotRun, KeptProcess, end_all
from stratum.sockets import listen
from stratum.status import endpoint_answers
from stratum.volume import Volume

if TYPE_CHECKING:
    from pathlib import Path

GRACE_S = 15.0
LOOK_S = 0.1
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


def _all_go_round(volume: Volume, workers: list[KeptProcess]) -> bool:
    """Whether no worker's loop has stopped: the watchdog is fed by those who answer requests, not by a timer beside them."""
    patience_s = notify.watchdog_s()
    if not patience_s:
        return True
    ours = {worker.process.pid for worker in workers if worker.process is not None}
    living = counting.read_all(volume.meta / counting.FOLDER)[1]
    return all(process.silent_s < patience_s for process in living if process.pid in ours)


def serve(root: Path) -> None:
    """Serve until SIGTERM or SIGINT. Raises `StratumError` if it cannot run."""
    config = load(root)
    if config.s3_tls_certificate:
        check_certificate(root / config.s3_tls_certificate, root / config.s3_tls_key, "s3")
    listener = listen(config.s3_listen, "s3.listen")
    ending = Ending.by_signals()
    with Volume(root, "s3-master") as volume:
        counting.attach(volume.meta / counting.FOLDER, "s3-master")
        housekeeper = Housekeeper(volume)
        watchdog = notify.Watchdog(time.monotonic())
        ready = False
        descriptor = listener.fileno()
        words = ["-m", "stratum.s3.worker", str(root), str(descriptor)]
        workers = [
            KeptProcess(
                "s3-worker",
                words,
                descriptors=[descriptor],
                environment=_environment(),
                beats_in=volume.meta / counting.FOLDER,
            )
            for _ in range(config.s3_workers)
        ]
        try:
            while True:
                for worker in workers:
                    try:
                        worker.keep_alive()
                    except CannotRun as error:
                        raise StratumError(f"a worker cannot run: {error}; its log says why") from None
                counting.beat()
                if not ready and notify.expected():
                    ready = endpoint_answers(config)
                    if ready:
                        notify.send(READY=1, STATUS=f"serving {config.endpoint}")
                watchdog.feed(time.monotonic(), healthy=_all_go_round(volume, workers))
                if ending.wait(LOOK_S):
                    break
        finally:
            notify.send(STOPPING=1)
            end_all(workers, GRACE_S)
            listener.close()
            housekeeper.stop()
