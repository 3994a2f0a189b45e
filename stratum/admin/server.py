"""`stratum admin`: the process of the admin listener."""

from __future__ import annotations

import logging
import signal
import ssl
import time
from typing import TYPE_CHECKING

import uvicorn

from stratum import counting, notify
from stratum.admin.alerts import Alerts, sinks_of
from stratum.admin.app import Application, read_token
from stratum.admin.watch import Watch
from stratum.config import load, parse_listen
from stratum.sockets import listen
from stratum.volume import Volume

if TYPE_CHECKING:
    from pathlib import Path

CONNECTIONS_MAX = 64


class Server(uvicorn.Server):
    """uvicorn's, which also says that it lives."""

    def __init__(self, config: uvicorn.Config, volume: Volume) -> None:
        super().__init__(config)
        self._volume = volume
        self._watchdog = notify.Watchdog(time.monotonic())
        self._told = False

    async def on_tick(self, counter: int) -> bool:
        if not self._told:
            self._told = True
            notify.send(READY=1, STATUS=f"serving {self._volume.config.admin_endpoint}")
        self._watchdog.feed(time.monotonic())
        return await super().on_tick(counter) or self._volume.failed is not None


def serve(root: Path) -> int:
    """Until SIGTERM or SIGINT; the exit code. Raises `ConfigInvalid`."""
    config = load(root)
    token = read_token(root / config.admin_token_file) if config.admin_token_file else ""
    if config.admin_client_ca:
        token = ""
    sinks = sinks_of(config, root)
    parse_listen(config.admin_listen, "admin.listen")
    listener = listen(config.admin_listen, "admin.listen")
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
    with Volume(root, "admin") as volume:
        counting.attach(volume.meta / counting.FOLDER, "admin")
        watch = Watch(volume, Alerts(volume, sinks))
        tls = bool(config.admin_tls_certificate)
        settings = uvicorn.Config(
            Application(config, watch, token), http="h11", lifespan="off", ws="none", log_config=None, access_log=False, proxy_headers=False,
            server_header=False, timeout_keep_alive=5, timeout_graceful_shutdown=3, limit_concurrency=CONNECTIONS_MAX,
            ssl_certfile=root / config.admin_tls_certificate if tls else None, ssl_keyfile=root / config.admin_tls_key if tls else None,
            ssl_ca_certs=str(root / config.admin_client_ca) if config.admin_client_ca else None,
            ssl_cert_reqs=ssl.CERT_REQUIRED if config.admin_client_ca else ssl.CERT_NONE,
        )  # fmt: skip
        server = Server(settings, volume)

        def end(*_: object) -> None:
            server.should_exit = True

        # While it runs uvicorn catches the signals itself, and raises them again when it has shut down.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, end)
        watch.start()
        try:
            server.run(sockets=[listener])
        finally:
            watch.stop()
        return 70 if volume.failed is not None else 0
