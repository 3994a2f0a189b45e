"""How far a long command is: bytes, rate and what is left, on a terminal's last line, and as the status of a service.

Standard output stays what the command says. Where standard error is no terminal there is a line a minute.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Self

from stratum import notify
from stratum.cli.output import size

if TYPE_CHECKING:
    from collections.abc import Callable

SHOWN_S = 0.5
LOGGED_S = 60.0


def span(seconds: float) -> str:
    """Like 4 h 12 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Progress:
    """`with Progress("reading") as progress: ... progress.at(done, total)`. `total` 0: nobody knows."""

    def __init__(self, what: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._what = what
        self._clock = clock
        self._terminal = sys.stderr.isatty()
        self._began_s = clock()
        self._shown_s = self._began_s
        self._width = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._width:
            sys.stderr.write("\r" + " " * self._width + "\r")
            sys.stderr.flush()

    def at(self, done: int, total: int) -> None:
        now_s = self._clock()
        if now_s - self._shown_s < (SHOWN_S if self._terminal else LOGGED_S):
            return
        self._shown_s = now_s
        text = self.text(done, total, now_s - self._began_s)
        notify.send(STATUS=text)
        if self._terminal:
            sys.stderr.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def text(self, done: int, total: int, seconds: float) -> str:
        rate = done / seconds if seconds > 0 else 0.0
        known = f" of {size(total)} ({min(done * 100 // total, 100)} %)" if total else ""
        left = f", {span(max(total - done, 0) / rate)} left" if total and rate else ""
        return f"{self._what}: {size(done)}{known}, {size(rate)}/s{left}"
