"""The loop that takes the kernel's requests, without a kernel."""

from __future__ import annotations

import errno
import os
import signal
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pyfuse3
import pytest
import trio
import trio.testing

from stratum.fuse import commits, session
from stratum.fuse.commits import Commits
from stratum.fuse.open_files import FileLock
from stratum.fuse.session import INTERRUPTS, TURN, Session
from stratum.fuse.signals import are_ending, end_a_wait

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator


class Kernel:
    """Requests in a list, and a pipe that is readable while there are any."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        self.requests: list[Callable[[], Coroutine[Any, Any, None]]] = []
        self.interrupts: list[int] = []
        self.number = 0
        self.session = Session()
        self.ended = False
        monkeypatch.setattr(
            session,
            "_negotiate",
            SimpleNamespace(
                begin=lambda: self.reader,
                step=self.step,
                spin=self.spin,
                request=self.request,
                interrupted=self.interrupted,
            ),
        )

    def ask(self, *requests: Callable[[], Coroutine[Any, Any, None]]) -> None:
        for request in requests:
            self.requests.append(request)
            os.write(self.writer, b"x")

    def end(self) -> None:
        self.ended = True
        os.write(self.writer, b"x")

    def interrupt(self, number: int) -> None:
        self.interrupts.append(number)
        os.write(self.writer, b"x")

    def step(self) -> int:
        if self.requests:
            os.read(self.reader, 1)
            self.session._taken = self.requests.pop(0)()
            self.number += 1
            return 1
        if self.interrupts:
            os.read(self.reader, 1)
            return INTERRUPTS
        return -1 if self.ended else 0

    def request(self) -> tuple[int, int]:
        """Numbers count from 1; the process is this one."""
        return self.number, os.getpid()

    def interrupted(self) -> int:
        return self.interrupts.pop(0)

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


@pytest.mark.parametrize("before", [False, True], ids=["at once", "after another wait"])
def test_an_interrupted_request_ends_when_it_may(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, *, before: bool
) -> None:
    """And only what was interrupted, while it waits for something that may be given up, by a signal that ends the process."""
    told: list[Any] = []
    looks: list[int] = []
    ends = [False, True]

    def end_a_wait(process: int) -> bool:
        looks.append(process)
        return ends.pop(0)

    monkeypatch.setattr(session, "end_a_wait", end_a_wait)

    async def scenario() -> None:
        gates, both = [trio.Event() for _ in range(3)], trio.Event()

        def waiting(number: int, *, by_any_signal: bool = False) -> Callable[[], Coroutine[Any, Any, None]]:
            async def handler() -> None:
                if before:
                    await trio.lowlevel.checkpoint()
                try:
                    with kernel.session.interruptible(by_any_signal=by_any_signal):
                        await gates[number].wait()
                except pyfuse3.FUSEError as error:
                    told.append((number, error.errno))
                    if len(told) == 2:
                        both.set()
                else:
                    told.append(number)

            return handler

        kernel.ask(waiting(0), waiting(1), waiting(2, by_any_signal=True))
        await trio.testing.wait_all_tasks_blocked()
        kernel.interrupt(99)  # has been answered
        kernel.interrupt(2)
        kernel.interrupt(3)
        await both.wait()
        assert sorted(told) == [(1, errno.EINTR), (2, errno.EINTR)]
        assert looks == [os.getpid()] * 2, "the kernel tells of the first signal only"
        gates[0].set()
        await trio.testing.wait_all_tasks_blocked()
        assert told[2:] == [0]
        assert not kernel.session._requests

    trio.run(kernel.serve, scenario)


@pytest.mark.parametrize("given_up", [False, True])
def test_what_may_not_be_given_up_is_waited_for(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, *, given_up: bool
) -> None:
    """A commit: its outcome must be known. What may be given up comes after it, and then it is."""
    monkeypatch.setattr(session, "end_a_wait", lambda _: True)
    told: list[str] = []

    async def scenario() -> None:
        gate, done = trio.Event(), trio.Event()

        async def handler() -> None:
            await gate.wait()
            told.append("committed")
            if given_up:
                with pytest.raises(pyfuse3.FUSEError), kernel.session.interruptible():
                    await trio.sleep_forever()
            told.append("done")
            done.set()

        kernel.ask(handler)
        await trio.testing.wait_all_tasks_blocked()
        kernel.interrupt(1)
        await trio.sleep(0.05)
        assert told == []
        gate.set()
        await done.wait()

    trio.run(kernel.serve, scenario)
    assert told == ["committed", "done"]


@pytest.mark.parametrize(
    ("pending", "caught", "ends"),
    [
        ("KILL", "", True), ("TERM", "", True), ("INT", "", True), ("QUIT", "", True), ("ALRM", "", True), ("PIPE", "", True), ("RTMIN", "", True),
        ("INT", "INT", True), ("TERM", "TERM", True), ("HUP", "HUP", True), ("ALRM", "ALRM", False), ("USR1", "USR1", False), ("RTMIN", "RTMIN", False),
        ("CHLD", "CHLD", False), ("WINCH", "", False), ("TSTP", "", False), ("STOP", "", False), ("CONT", "", False), ("", "INT", False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("where", ["SigPnd", "ShdPnd"])
def test_which_signals_end_a_wait(pending: str, caught: str, where: str, *, ends: bool) -> None:
    def mask(name: str) -> str:
        return f"{1 << signal.Signals['SIG' + name].value - 1 if name else 0:016x}"

    empty = mask("")
    told = {
        "SigPnd": empty,
        "ShdPnd": empty,
        "SigBlk": empty,
        "SigIgn": empty,
        "SigCgt": mask(caught),
        where: mask(pending),
    }
    lines = [f"{name}:\t{value}" for name, value in told.items()]
    assert are_ending("\n".join(["Name:\tcat", "SigQ:\t0/1", *lines])) is ends
    for held in ("SigBlk", "SigIgn"):
        lines = [f"{name}:\t{value}" for name, value in {**told, held: mask(pending)}.items()]
        assert are_ending("\n".join(lines)) is False


def test_a_process_that_is_gone_waits_no_more() -> None:
    assert end_a_wait(0)
    assert not end_a_wait(os.getpid())


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
