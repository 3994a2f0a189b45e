"""The loop that takes the kernel's requests: pyfuse3's own, with fewer trips through trio.

pyfuse3 makes each request a lock, a registration with epoll, a turn of the scheduler and a wake-up, even if the next request is there
already and its handler waits for nothing. Here one task at a time is the *reader*: it takes requests as long as there are any, and runs each
handler itself up to the point where it waits, if it does. Then another task becomes the reader. Requests are received and
taken apart by libfuse and pyfuse3 as ever; only who calls them when is ours (docs/decisions/0011-session.md has the figures).

The kernel tells when a signal comes for a process that waits for an answer, and pyfuse3 passes that over. Handlers say what they wait for may be
given up (`Session.interruptible`); then the request is answered with EINTR. See `stratum/fuse/signals.py` for which signals do that.

Invariants
* One task at most is the reader. A handler runs in one task from beginning to end, so what it waits for can wake it.
* A handler that never waits has answered when the next request is taken: the barrier of `invalidation.py` stands on it.
* Whoever else wants the loop gets it after TURN requests at the latest, after one while a handler waits for something.
"""

from __future__ import annotations

import errno
import types
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pyfuse3
import trio

from stratum.fuse import _negotiate
from stratum.fuse.signals import end_a_wait

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator, Iterator

    Extra = Callable[[str, object, tuple[Any, ...]], Coroutine[Any, Any, None]]

TURN = 32
STAND_BY_MAX = 16
"""Tasks that are kept for the next time; others end."""
SPIN_US = 40
"""How long the reader looks for the next request before it sleeps, if no handler waits for anything: a process that asks for one thing
after the other sends it within this time, and being woken costs as much."""
INTERRUPTS = 2
"""What `step` returns for a message that a request was interrupted."""
SIGNALS_LOOK_S = 0.1
"""Between two looks at the signals of a process whose request was interrupted: the kernel tells of the first one only."""


@types.coroutine
def _go_on(coroutine: Coroutine[Any, Any, None], message: Any) -> Generator[Any, Any, None]:
    """Await a coroutine that has been started already and has yielded `message`."""
    while True:
        try:
            try:
                value = yield message
            except BaseException as error:  # noqa: BLE001  whatever trio throws in belongs to the handler
                message = coroutine.throw(error)
            else:
                message = coroutine.send(value)
        except StopIteration:
            return


class _Request:
    """One whose handler has waited, or is about to. `scope`: what it waits for now may be given up, `by_any_signal` or by one that ends the process."""

    __slots__ = ("by_any_signal", "number", "process", "scope")

    def __init__(self, number: int, process: int) -> None:
        self.number = number
        self.process = process
        self.scope: trio.CancelScope | None = None
        self.by_any_signal = False


class Session:
    """Takes the place of pyfuse3's loop: `install` before `pyfuse3.main`. One a process, as pyfuse3 has it."""

    def __init__(self, init: bytes = b"", begun: Callable[[], None] = lambda: None) -> None:
        """`init`: the kernel's first message, if another program has answered it already (`takeover.py`).

        `begun` is called when libfuse knows it, before any request is taken.
        """
        self._init = init
        self._begun = begun
        self._taken: Coroutine[Any, Any, None] | None = None
        self._stand_by: list[trio.lowlevel.Task] = []
        self._tasks = 1
        self._tasks_max = 0
        self._waiting = 0
        self._vacant = False
        self._ended = False
        self._turn = 0
        self._starting = False
        self._quiet = trio.Event()
        self._resumed: trio.Event | None = None
        """While no request is taken."""
        self._begun_request: _Request | None = None
        """Of the handler that is being run and has not waited yet, once something has asked for it."""
        self.left: Callable[[int], bool] = lambda _: False
        """Called with the number of an interrupted request; whether it was one that is answered later (`locks.py`)."""
        self._requests: dict[int, _Request] = {}
        """By number, those of handlers that wait. A large write's number is not known (0)."""
        self._request_of: dict[trio.lowlevel.Task, _Request] = {}

    def pause(self) -> None:
        """Take no request after those that are being worked on, until `resume`. From a task of the loop, so that no handler is half-way in."""
        self._resumed = trio.Event()
        trio.lowlevel.notify_closing(self._fd)

    async def quiet(self) -> None:
        """Wait until no handler waits for anything; for a loop that is paused."""
        while self._waiting:
            self._quiet = trio.Event()
            await self._quiet.wait()

    def resume(self) -> None:
        assert self._resumed is not None, "only what was paused goes on"
        self._resumed.set()
        self._resumed = None

    @property
    def is_waiting(self) -> bool:
        """Whether a handler has begun and waits for something."""
        return self._waiting > 0

    @property
    def is_alone(self) -> bool:
        """Whether a handler that has not waited for anything yet is being run, and no other one waits."""
        return self._starting and not self._waiting

    @contextmanager
    def interruptible(self, *, by_any_signal: bool = False) -> Iterator[None]:
        """For what a handler waits for inside, and gives up when a signal comes that ends the process, or any signal.

        Raises `FUSEError` EINTR then. In a task that is no handler, nothing is given up.
        """
        request = self._current_request()
        if request is None:
            yield
            return
        with trio.CancelScope() as scope:
            request.scope, request.by_any_signal = scope, by_any_signal
            try:
                yield
            finally:
                request.scope = None
        if scope.cancelled_caught:
            raise pyfuse3.FUSEError(errno.EINTR)

    def _current_request(self) -> _Request | None:
        if not self._starting:
            return self._request_of.get(trio.lowlevel.current_task())
        if self._begun_request is None:
            self._begun_request = _Request(*_negotiate.request())
        return self._begun_request

    def _interrupt(self, number: int) -> None:
        request = self._requests.get(number)
        if request is None:
            self.left(number)
        else:
            self._nursery.start_soon(self._give_up, request)

    async def _give_up(self, request: _Request) -> None:
        """End what an interrupted request waits for as soon as that may be."""
        while self._requests.get(request.number) is request:
            if request.scope is not None and (request.by_any_signal or end_a_wait(request.process)):
                request.scope.cancel()
                return
            await trio.sleep(SIGNALS_LOOK_S)
        self.left(request.number)

    def install(self, extra: Extra) -> None:
        """`extra` makes the coroutine of a request that pyfuse3 has no handler for; it is given its name, what it is answered by, and what it says.

        Raises `RuntimeError` if this pyfuse3 is not built as the one we know.
        """
        module: Any = pyfuse3
        names = [name for name in vars(module) if name.startswith("fuse_") and name.endswith("_async")]
        if not names or not hasattr(module, "_session_loop"):
            raise RuntimeError(
                f"pyfuse3 {pyfuse3.__version__} is not the one this program knows; install the pinned version"
            )
        for name in names:
            setattr(module, name, self._taker(getattr(module, name)))
        _negotiate.carry(self._taker(extra))
        module._session_loop = self._run  # noqa: SLF001  the one thing of pyfuse3 that is replaced

    def _taker(self, real: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
        """pyfuse3 hands over a handler's coroutine in a variable of its own, which only its loop can see."""

        def take(*arguments: Any) -> None:
            self._taken = real(*arguments)

        return take

    async def _run(self, nursery: trio.Nursery, _tasks_min: int, tasks_max: int) -> None:
        self._nursery = nursery
        self._tasks_max = tasks_max
        self._fd = _negotiate.begin()
        if self._init:
            _negotiate.replay(self._init)
        self._begun()
        await self._work()

    async def _work(self) -> None:
        """Be the reader until a handler waits; then wait with it, and stand by to be the reader again."""
        while True:
            coroutine = await self._receive()
            if coroutine is None:
                self._end()
                return
            self._starting = True
            try:
                message = coroutine.send(None)
            except StopIteration:
                self._begun_request = None
                continue
            finally:
                self._starting = False
            task = trio.lowlevel.current_task()
            request = self._begun_request or _Request(*_negotiate.request())
            self._begun_request = None
            self._requests[request.number] = self._request_of[task] = request
            self._waiting += 1
            self._pass_on()
            try:
                await _go_on(coroutine, message)
            finally:
                del self._request_of[task]
                self._requests.pop(request.number, None)
                self._waiting -= 1
                if not self._waiting:
                    self._quiet.set()
            if not await self._may_read():
                self._tasks -= 1
                return

    async def _receive(self) -> Coroutine[Any, Any, None] | None:
        """The next handler that is to be run; None at the end."""
        while True:
            if self._resumed is not None:
                await self._resumed.wait()
            self._turn += 1
            if self._turn > TURN or (self._waiting and self._turn > 1):
                self._turn = 0
                await trio.lowlevel.checkpoint()
            received = _negotiate.step()
            if received < 0:
                return None
            if received == INTERRUPTS:
                self._interrupt(_negotiate.interrupted())
            elif received:
                taken, self._taken = self._taken, None
                if taken is not None:
                    return taken
            elif self._waiting or not _negotiate.spin(SPIN_US):
                self._turn = 0
                try:
                    await trio.lowlevel.wait_readable(self._fd)
                except trio.ClosedResourceError:
                    continue  # woken by `pause` or by pyfuse3.terminate, which `step` knows of

    def _pass_on(self) -> None:
        if self._stand_by:
            trio.lowlevel.reschedule(self._stand_by.pop())
        elif self._tasks < self._tasks_max:
            self._tasks += 1
            self._nursery.start_soon(self._work)
        else:
            self._vacant = True

    async def _may_read(self) -> bool:
        """Whether this task is the reader now; False if it is to end."""
        if self._ended:
            return False
        if self._vacant:
            self._vacant = False
            return True
        if len(self._stand_by) >= STAND_BY_MAX:
            return False
        task = trio.lowlevel.current_task()
        self._stand_by.append(task)

        def abort(_: object) -> trio.lowlevel.Abort:
            self._stand_by.remove(task)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
        return not self._ended

    def _end(self) -> None:
        self._ended = True
        self._tasks -= 1
        while self._stand_by:
            trio.lowlevel.reschedule(self._stand_by.pop())
