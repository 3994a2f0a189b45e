"""What systemd asks of a service: readiness, a status text, and a watchdog that is fed (sd_notify(3), sd_watchdog_enabled(3)).

Without $NOTIFY_SOCKET every call does nothing. Datagrams are sent whole or not at all; a manager that does not listen is no
reason to fail.
"""

from __future__ import annotations

import os
import socket

from stratum.log import get_logger

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


def without_notifications() -> dict[str, str]:
    """The environment for a child, which is not the one to speak for the service."""
    hidden = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
    return {name: value for name, value in os.environ.items() if name not in hidden}
