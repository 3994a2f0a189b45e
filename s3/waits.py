"""What a request waits for without holding up the event loop: a commit, or something in a thread.

The loop's thread computes; whatever may block goes through here. Commits come back in batches: the first outcome of a batch
wakes the loop, the others are there when it looks.
"""

from __future__ import annotations

import asyncio
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from stratum.turn import turn
from stratum.undisturbed import Undisturbed

if TYPE_CHECKING:
    from collections.abc import Callable

    from stratum.committer import Mutation
    from stratum.transaction import MetadataTransaction
    from stratum.volume import Volume

T = TypeVar("T")


class Waits:
    """One an event loop; made inside it."""

    def __init__(self, volume: Volume, threads: int) -> None:
        self._volume = volume
        self._loop = asyncio.get_running_loop()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="s3")
        self._recalls = ThreadPoolExecutor(volume.config.cold_recalls, thread_name_prefix="recall")
        self._outcomes: deque[tuple[asyncio.Future[Any], Mutation[Any]]] = deque()
        self._woken = False
        self.uploads = 0
        volume.committer.undisturbed = Undisturbed(self._loop.call_soon_threadsafe)

    async def mutate(self, function: Callable[[MetadataTransaction], T], *, frees: bool = False) -> T:
        """Like `Volume.mutate`, awaiting instead of blocking."""
        future: asyncio.Future[T] = self._loop.create_future()

        def done(mutation: Mutation[T]) -> None:
            self._outcomes.append((future, mutation))
            if not self._woken:
                self._woken = True
                self._loop.call_soon_threadsafe(self._deliver)

        self._volume.mutate_later(function, done, frees=frees)
        return await future

    def _deliver(self) -> None:
        self._woken = False  # before looking: an outcome that comes now wakes the loop again
        while self._outcomes:
            future, mutation = self._outcomes.popleft()
            if future.done():  # its request was cancelled
                continue
            if mutation.error is not None:
                future.set_exception(mutation.error)
            else:
                future.set_result(mutation.result)

    def in_thread(self, function: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
        """Start `function` in a thread that may block; await the result."""
        return self._loop.run_in_executor(self._pool, function, *arguments)

    def recalling(self, function: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
        """The same where it waits for a remote, which may take long."""
        return self._loop.run_in_executor(self._recalls, function, *arguments)

    def computed(self, function: Callable[..., T], *arguments: Any, then: Callable[[T], None]) -> asyncio.Future[T]:
        """The same in turns with the other computing threads; `waiting()` inside lets them go on. `then` gets the result, in no turn."""

        def in_turn() -> T:
            with turn:
                found = function(*arguments)
            then(found)
            return found

        return self.in_thread(in_turn)
