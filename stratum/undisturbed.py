"""Holding an event loop still while another thread of its process computes."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

HOLD_S_MAX = 0.005
STAND_S_MAX = 0.02


class _Hold:
    """One pause of the loop, asked for by another thread."""

    __slots__ = ("_abandoned", "_arrived", "_holding", "_lock", "_resume")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arrived = threading.Lock()
        self._resume = threading.Lock()
        self._arrived.acquire()
        self._resume.acquire()
        self._abandoned = False
        self._holding = False

    def stand(self) -> None:
        """In the loop's thread: sleep until `leave`, or until that takes too long (a Complete of ten thousand parts)."""
        with self._lock:
            if self._abandoned:
                return
            self._holding = True
        self._arrived.release()
        self._resume.acquire(timeout=STAND_S_MAX)

    def wait(self) -> None:
        if not self._arrived.acquire(timeout=HOLD_S_MAX):
            with self._lock:
                self._abandoned = not self._holding

    def leave(self) -> None:
        self._resume.release()


class Undisturbed:
    """Keeps an event loop still while another thread computes.

    LMDB lets go of the interpreter in each call. While the committer ran 12 calls a PUT and the loop's thread wanted to
    compute too, each call was a switch: 20 a PUT, over half of the CPU time in the kernel. Held still, the loop loses only
    time in which the committer would have had the interpreter anyway. A loop that is busy for longer than HOLD_S_MAX is
    not waited for.
    """

    def __init__(self, call_soon: Callable[[Callable[[], None]], object]) -> None:
        """`call_soon` runs something in the loop's thread; it may raise RuntimeError when there is no loop any more."""
        self._call_soon = call_soon
        self._hold: _Hold | None = None

    def __enter__(self) -> None:
        hold = _Hold()
        try:
            self._call_soon(hold.stand)
        except RuntimeError:
            return  # the loop has ended: nobody disturbs
        hold.wait()
        self._hold = hold

    def __exit__(self, *_: object) -> None:
        if self._hold is not None:
            self._hold.leave()
            self._hold = None
