"""The loop that takes the kernel's requests, without a kernel."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from stratum.fuse import commits, session
from stratum.fuse.commits import Commits
from stratum.fuse.open_files import FileLock
from stratum.fuse.session import TURN, Session

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator


class Kernel:
    """Requests in a list, and a pipe that is readable while there are any."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        self.requests: list[Callable[[], Coroutine[Any, Any, None]]] = []
        self.session = Session()
        self.ended = False
        monkeypatch.setattr(
            session, "_negotiate", SimpleNamespace(begin=lambda: self.reader, step=self.step, spin=self.spin)
        )

    def ask(self, *requests: Callable[[], Coroutine[Any, Any, None]]) -> None:
        for request in requests:
            self.requests.append(request)
            os.write(self.writer, b"x")

    def end(self) -> None:
        self.ended = True
        os.write(self.writer, b"x")

    def step(self) -> int:
        if self.requests:
            os.read(self.reader, 1)
            self.session._taken = self.requests.pop(0)()
            return 1
        return -1 if self.ended else 0

    def spin(self, _: int) -> bool:
        return bool(self.requests)

    async def serve(self, scenario: Callable[[], Awaitable[None]], *, tasks_max: int = 50) -> None:
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.session._run, nursery, 1, tasks_max)
                await scenario()
                self.end()


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    made = Kernel(monkeypatch)
    yield made
    os.close(made.reader)
    os.close(made.writer)


def test_what_waits_holds_up_nothing(kernel: Kernel) -> None:
    told: list[Any] = []

    async def scenario() -> None:
        gates = [trio.Event() for _ in range(3)]

        def waiting(number: int) -> Callable[[], Coroutine[Any, Any, None]]:
            async def handler() -> None:
                task = trio.lowlevel.current_task()
                told.append(f"begins {number}")
                await gates[number].wait()
                await trio.lowlevel.checkpoint()
                assert trio.lowlevel.current_task() is task
                told.append(f"ends {number}")

            return handler

        async def quick() -> None:
            told.append("quick")

        kernel.ask(waiting(0), quick, waiting(1), waiting(2), quick)
        await trio.testing.wait_all_tasks_blocked()
        assert told == ["begins 0", "quick", "begins 1", "begins 2", "quick"]
        for number in (2, 0, 1):
            gates[number].set()
            await trio.testing.wait_all_tasks_blocked()
        assert told[5:] == ["ends 2", "ends 0", "ends 1"]
        kernel.ask(quick)
        await trio.testing.wait_all_tasks_blocked()
        assert told[8:] == ["quick"]

    trio.run(kernel.serve, scenario)


def test_no_more_handlers_wait_than_may(kernel: Kernel) -> None:
    inside = most = done = 0

    async def scenario() -> None:
        finished = trio.Event()

        async def handler() -> None:
            nonlocal inside, most, done
            inside += 1
            most = max(most, inside)
            await trio.sleep(0.01)
            inside -= 1
            done += 1
            if done == 40:
                finished.set()

        kernel.ask(*[handler] * 40)
        await finished.wait()

    async def run() -> None:
        await kernel.serve(scenario, tasks_max=3)

    trio.run(run)
    assert (most, done) == (3, 40)


def test_others_get_their_turn(kernel: Kernel) -> None:
    turns = 0
    answered = 0

    async def scenario() -> None:
        nonlocal turns

        async def handler() -> None:
            nonlocal answered
            answered += 1

        kernel.ask(*[handler] * (TURN * 20))
        while answered < TURN * 20:
            turns += 1
            await trio.lowlevel.checkpoint()

    trio.run(kernel.serve, scenario)
    assert turns >= 20


def test_an_error_that_nobody_caught_ends_the_session(kernel: Kernel) -> None:
    async def handler() -> None:
        await trio.lowlevel.checkpoint()
        raise ZeroDivisionError

    async def scenario() -> None:
        kernel.ask(handler)
        await trio.sleep(5)

    with pytest.raises(ExceptionGroup) as caught:
        trio.run(kernel.serve, scenario)
    assert caught.group_contains(ZeroDivisionError, depth=None)


@pytest.mark.parametrize("when", ["at once", "while it stands", "later"])
def test_a_commit_is_waited_for_until_it_ends(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    kept: list[Any] = []
    mutation = SimpleNamespace(outcome=lambda: "result")

    def mutate_later(_function: Any, done: Any, *, frees: bool) -> None:
        if when == "at once":
            done(mutation)
        else:
            kept.append(done)

    def wait(descriptor: int, microseconds: int) -> None:
        assert microseconds > 0
        if when == "while it stands":
            kept[0](mutation)
            assert os.eventfd_read(descriptor) == 1
            os.eventfd_write(descriptor, 1)

    monkeypatch.setattr(commits, "_negotiate", SimpleNamespace(wait=wait))
    volume: Any = SimpleNamespace(mutate_later=mutate_later)

    async def run() -> None:
        waits = Commits(volume)
        for alone in (True, False, True):
            kept.clear()
            waits.session = None if not alone else SimpleNamespace(is_alone=True)  # type: ignore[assignment]
            async with trio.open_nursery() as nursery:
                found: list[str] = []

                async def ask(found: list[str] = found) -> None:
                    found.append(await waits.run(lambda _: "", frees=False))

                nursery.start_soon(ask)
                await trio.testing.wait_all_tasks_blocked()
                if not found:
                    assert when == "later" or not alone
                    kept[0](mutation)
            assert found == ["result"]

    trio.run(run)


def test_a_lock_is_held_by_one_and_given_on() -> None:
    order: list[int] = []

    async def run() -> None:
        lock = FileLock()

        async def hold(number: int) -> None:
            async with lock:
                order.append(number)
                await trio.lowlevel.checkpoint()
                order.append(number)

        with trio.fail_after(5):
            async with lock:
                async with trio.open_nursery() as nursery:
                    with trio.CancelScope() as scope:
                        scope.cancel()
                        await hold(9)
                    for number in range(3):
                        nursery.start_soon(hold, number)
                    await trio.testing.wait_all_tasks_blocked()
                    assert order == []
                    await lock.__aexit__()
            async with lock:
                pass

    trio.run(run)
    assert sorted(order[::2]) == [0, 1, 2]
    assert order[::2] == order[1::2], "nobody was in between"
