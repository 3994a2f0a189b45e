"""What systemd asks of a service: readiness, a status text, and a watchdog that is fed (sd_notify(3), sd_watchdog_enabled(3)).

`stratum serve` asks its parts the same, by a socket of its own: what a part says of itself is true of that part, and not of whatever
else answers at its address.

Without $NOTIFY_SOCKET every call does nothing. Datagrams are sent whole or not at all; a manager that does not listen is no
reason to fail.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
from typing import TYPE_CHECKING

from stratum.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterator

log = get_logger("notify")


def send(**fields: str | int) -> bool:
    """`send(READY=1, STATUS="serving")`; whether there was somebody to tell."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    text = "\n".join(f"{name}={value}" for name, value in fields.items())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.sendto(text.encode(), "\0" + address[1:] if address[0] == "@" else address)
        except OSError as error:
            log.debug("not_notified", error=str(error))
            return False
    return True


def watchdog_s() -> float:
    """How long the manager waits between two signs of life; 0 if it does not wait for any from this process."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    try:
        return max(0, int(os.environ.get("WATCHDOG_USEC", "0"))) / 1e6
    except ValueError:
        return 0.0


def expected() -> bool:
    return bool(os.environ.get("NOTIFY_SOCKET"))


class Watchdog:
    """Feeds the manager at a third of its patience, from the loop that calls `feed`. `clock` is monotonic."""

    def __init__(self, now_s: float) -> None:
        self._interval_s = watchdog_s() / 3
        self._due_s = now_s

    def feed(self, now_s: float, *, healthy: bool = True) -> None:
        """Not `healthy`: the manager is left to wait, and restarts the service when its patience ends."""
        if self._interval_s and healthy and now_s >= self._due_s:
            self._due_s = now_s + self._interval_s
            send(WATCHDOG=1)


class Receiver:
    """The manager's side, for the parts of a service, which are not the ones to speak for all of it."""

    _CREDENTIALS = struct.Struct("3i")
    _MESSAGE_BYTES_MAX = 8192
    _HEARD_AT_ONCE = 64

    def __init__(self) -> None:
        name = f"stratum-{os.getpid()}-{secrets.token_hex(8)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind("\0" + name)
        hidden = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
        self.environment = {key: value for key, value in os.environ.items() if key not in hidden}
        self.environment["NOTIFY_SOCKET"] = "@" + name
        """Of the parts."""

    def heard(self) -> Iterator[tuple[int, dict[str, str]]]:
        """What was said since, with the number of the process that the kernel says it comes from."""
        for _ in range(self._HEARD_AT_ONCE):
            try:
                raw, extra, _, _ = self._socket.recvmsg(
                    self._MESSAGE_BYTES_MAX, socket.CMSG_SPACE(self._CREDENTIALS.size), socket.MSG_DONTWAIT
                )
            except BlockingIOError:
                return
            for level, kind, data in extra:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                    lines = raw.decode(errors="replace").splitlines()
                    fields = {name: value for name, _, value in (line.partition("=") for line in lines)}
                    yield self._CREDENTIALS.unpack(data)[0], fields

    def close(self) -> None:
        self._socket.close()
