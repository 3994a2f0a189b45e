"""The wish of a signal that a process end. Nothing a handler does here takes a lock.

`threading.Event.set` is not for handlers: they run in the main thread, perhaps while its `wait` holds the event's own lock,
and then wait for that thread for ever. A busy machine makes it likely, as the signal is taken when the wait comes back.
"""

from __future__ import annotations

import os
import select
import signal
from contextlib import suppress


class Ending:
    """Set once, by SIGTERM or SIGINT, and never cleared. Any thread may wait for it."""

    def __init__(self) -> None:
        self._is_set = False
        self._woken, self._wakes = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    @classmethod
    def by_signals(cls) -> Ending:
        """One that SIGTERM and SIGINT set from now on. For the main thread."""
        ending = cls()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, ending.set)
        return ending

    def set(self, *_: object) -> None:
        self._is_set = True
        with suppress(BlockingIOError):
            os.write(self._wakes, b"x")

    def is_set(self) -> bool:
        return self._is_set

    def wait(self, seconds: float) -> bool:
        """Whether it is set, at once if it is and after so many seconds at the latest."""
        if not self._is_set:
            poll = select.poll()
            poll.register(self._woken, select.POLLIN)
            poll.poll(seconds * 1000)
        return self._is_set
