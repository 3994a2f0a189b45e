"""One S3 worker process: `python -m stratum.s3.worker VOLUME DESCRIPTOR`, started by `server` with the listening socket."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from pathlib import Path

import uvicorn

from stratum import counting
from stratum import log as logs
from stratum.config import load
from stratum.errors import StratumError
from stratum.processes import CANNOT_RUN, die_with_parent, raise_descriptor_limit
from stratum.s3.app import Application
from stratum.s3.connection import CONNECTIONS_MAX, Connection
from stratum.volume import Volume

KEEP_ALIVE_S = 75
DRAIN_S_MAX = 10


class _Server(uvicorn.Server):
    async def on_tick(self, counter: int) -> bool:
        counting.beat()
        return await super().on_tick(counter)


def main() -> None:
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    root, listener = Path(sys.argv[1]), socket.socket(fileno=int(sys.argv[2]))
    config = load(root)
    Connection.connections_max = min(CONNECTIONS_MAX, raise_descriptor_limit() - 512)
    Connection.address_connections_max = config.s3_connections_per_address_max
    Connection.trusted_proxies = tuple(config.s3_trusted_proxies)
    logs.set_up(config.log_format, config.log_level)
    # What it would say we say ourselves: one line a request, and a line for each that breaks.
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
    with Volume(root, "s3") as volume:
        counting.attach(volume.meta / counting.FOLDER, "s3-worker")
        volume.cold.prepare()
        tls = bool(config.s3_tls_certificate)
        settings = uvicorn.Config(
            Application(volume), http=Connection, loop="uvloop", lifespan="off", ws="none", log_config=None, access_log=False,
            proxy_headers=False, server_header=False, timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=DRAIN_S_MAX,
            ssl_certfile=root / config.s3_tls_certificate if tls else None,
            ssl_keyfile=root / config.s3_tls_key if tls else None,
        )  # fmt: skip
        server = _Server(settings)

        def end(*_: object) -> None:
            server.should_exit = True

        # While it runs uvicorn catches the signal itself, and raises it again when it has shut down; the volume must be closed then.
        signal.signal(signal.SIGTERM, end)
        if not asked:
            server.run(sockets=[listener])


if __name__ == "__main__":
    try:
        main()
    except StratumError as refused:
        print(f"stratum: {refused.message}", file=sys.stderr)
        sys.exit(CANNOT_RUN)
