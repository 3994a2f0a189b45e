"""How long a request may wait for a remote: one deadline, made where the request enters and handed down.

A deadline that is made further down is begun anew by whoever tries again above: a read would wait several times as long as it may.
"""

from __future__ import annotations

import time


class Deadline:
    """Thread-safe. It has passed after so many seconds, or once nobody waits any more."""

    __slots__ = ("_given_up", "_seconds", "_until_s")

    def __init__(self, seconds: float, began_s: float | None = None) -> None:
        """From `began_s` (monotonic) on, else from now."""
        self._seconds = seconds
        self._until_s = (time.monotonic() if began_s is None else began_s) + seconds
        self._given_up = False

    @property
    def passed(self) -> bool:
        return self._given_up or time.monotonic() > self._until_s

    @property
    def left_s(self) -> float:
        """The seconds that are left, none of them once it has passed."""
        return 0.0 if self._given_up else max(0.0, self._until_s - time.monotonic())

    def renew(self) -> None:
        """Bytes have been handed on: the wait for the next ones is a new one. For streams of any length."""
        self._until_s = time.monotonic() + self._seconds

    def give_up(self) -> None:
        """The caller has gone: threads that still wait on its behalf end."""
        self._given_up = True
