"""Listening sockets."""

from __future__ import annotations

import socket

from stratum.config import parse_listen
from stratum.errors import ConfigInvalid

BACKLOG = 1024


def listen(address: str, key: str) -> socket.socket:
    """A listener at HOST:PORT, the value of a setting. Raises `ConfigInvalid`."""
    host, port = parse_listen(address, key)
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigInvalid(
            f"cannot listen on {key} = {address!r}: {error.strerror}; end what uses it or change it"
        ) from error
    listener.setblocking(False)
    return listener
