"""One thread at a time computes; the others sleep on this lock instead of fighting for the interpreter's.

LMDB releases the interpreter lock around every get and put. With eight request threads each release hands the interpreter
to another thread, and a request of 75 us with ten gets pays for ten thread switches: one worker served 2,486 GET/s of
4 KiB. With this lock held during the computing part of a request nobody wants the interpreter meanwhile, and the releases
cost nothing. Measured in one run, see docs/decisions/0004-turns.md.

Rules: hold it only while computing; wrap every wait (body, commit, disk) of code that may hold it in `waiting()`, which does
nothing for a thread that does not hold it.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class Turn:
    """A lock that knows its holder."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder = 0

    def __enter__(self) -> None:
        self._lock.acquire()
        self._holder = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        self._holder = 0
        self._lock.release()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Let others compute while this thread waits for something."""
        if self._holder != threading.get_ident():
            yield
            return
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()


turn = Turn()
waiting = turn.waiting
