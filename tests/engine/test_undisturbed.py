"""A loop is held still while another thread computes, and neither ever waits for the other for long."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING

from stratum.undisturbed import STAND_S_MAX, Undisturbed

if TYPE_CHECKING:
    from collections.abc import Callable


class Loop:
    """The least of an event loop."""

    def __init__(self) -> None:
        self.calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.turns = 0
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        while (call := self.calls.get()) is not None:
            call()
            self.turns += 1

    def stop(self) -> None:
        self.calls.put(None)
        self.thread.join()


def test_the_loop_stands_while_the_block_runs() -> None:
    loop = Loop()
    with Undisturbed(loop.calls.put):
        loop.calls.put(lambda: None)
        assert loop.turns == 0
    loop.stop()
    assert loop.turns == 2


def test_a_busy_loop_is_not_waited_for_and_does_not_stand_afterwards() -> None:
    loop = Loop()
    release = threading.Event()
    loop.calls.put(release.wait)  # type: ignore[arg-type]  # what it returns does not matter
    with Undisturbed(loop.calls.put):
        pass
    release.set()
    loop.stop()
    assert loop.turns == 2


def test_a_loop_goes_on_when_the_block_takes_long() -> None:
    loop = Loop()
    gone_on = threading.Event()
    with Undisturbed(loop.calls.put):
        loop.calls.put(gone_on.set)
        assert gone_on.wait(STAND_S_MAX * 500)
    loop.stop()


def test_a_loop_that_has_ended_disturbs_nobody() -> None:
    def call_soon(_: Callable[[], None]) -> None:
        raise RuntimeError("the loop is closed")

    with Undisturbed(call_soon):
        pass


def test_many_holds_in_a_row() -> None:
    loop = Loop()
    undisturbed = Undisturbed(loop.calls.put)
    for _ in range(2000):
        with undisturbed:
            pass
    loop.stop()
    assert loop.turns == 2000
