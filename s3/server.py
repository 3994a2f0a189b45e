"""Granian serving the application: one master that listens, N workers that each open the volume."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import threading
from multiprocessing.util import Finalize
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stratum import log as logs
from stratum.config import load, parse_listen
from stratum.housekeeping import Housekeeper
from stratum.processes import die_with_parent
from stratum.volume import Volume

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

VOLUME_VARIABLE = "STRATUM_S3_VOLUME"
_KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH")
log = logs.get_logger("s3")


def clean_environment() -> None:
    """WSGI copies the process's environment into every request: nothing in it may look like a header, or be a secret."""
    for name in list(os.environ):
        if name not in _KEPT_VARIABLES and not name.startswith(("STRATUM_", "COVERAGE_")):
            del os.environ[name]


def application() -> Callable[..., Iterable[bytes]]:
    """The factory each worker calls once, in its own process."""
    from stratum.s3.app import Application

    die_with_parent()
    root = Path(os.environ[VOLUME_VARIABLE])
    config = load(root)
    logs.set_up(config.log_format, config.log_level)
    volume = Volume(root, "s3")
    Finalize(
        None, volume.close, exitpriority=10
    )  # a worker leaves through multiprocessing, which runs no atexit handlers
    application = Application(volume)
    tracer = threading.gettrace()
    if tracer is None:
        return application

    def traced(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Granian's threads are not Python's: hand a coverage tracer or debugger on to them."""
        sys.settrace(tracer)
        return application(environ, start_response)

    return traced


def serve(root: Path) -> None:
    """Serve until SIGTERM or SIGINT."""
    from granian import Granian
    from granian.constants import HTTPModes, Interfaces
    from granian.http import HTTP1Settings

    config = load(root)
    clean_environment()
    # LMDB and forked processes do not go together: workers start from nothing.
    multiprocessing.set_start_method("spawn", force=True)
    os.environ[VOLUME_VARIABLE] = str(root.resolve())
    logging.getLogger("_granian").setLevel(logging.WARNING)
    host, port = parse_listen(config.s3_listen, "s3.listen")
    tls = bool(config.s3_tls_certificate)
    server = Granian(
        "stratum.s3.server:application", address=host, port=port, interface=Interfaces.WSGI, factory=True, workers=config.s3_workers,
        blocking_threads=config.s3_threads, runtime_threads=1, http=HTTPModes.http1, websockets=False, log_enabled=False, respawn_failed_workers=True,
        respawn_interval=0.1, workers_kill_timeout=10, backlog=1024, http1_settings=HTTP1Settings(header_read_timeout=30_000),
        ssl_cert=root / config.s3_tls_certificate if tls else None, ssl_key=root / config.s3_tls_key if tls else None,
    )  # fmt: skip
    with Volume(root, "s3-master") as volume:
        housekeeper = Housekeeper(volume)
        try:
            server.serve()
        finally:
            housekeeper.stop()
