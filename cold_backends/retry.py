"""Retries with backoff and full jitter, and a circuit breaker in front of them.

Full jitter after M. Brooker, "Exponential Backoff And Jitter": the pause is random between 0 and base x 2^attempt, capped.
The breaker opens when at least half of the last CALLS_MIN requests failed, lets one request try after OPEN_S, and closes when
that one succeeds. A remote that answers "no" (not found, refused) works: only failures that asking again may mend count.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar

from stratum import metrics
from stratum.cold_backends.contract import RemoteBody, RemoteDamaged, RemoteError, RemoteNotFound, RemoteRefused
from stratum.cold_backends.decorator import Decorator

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from stratum.cold_backends.contract import Backend, ObjectInfo

T = TypeVar("T")
ATTEMPTS = 5
BASE_S = 0.1
PAUSE_S_MAX = 5.0
CALLS_MIN = 20
FAILED_SHARE = 0.5
OPEN_S = 10.0


def may_help(error: RemoteError) -> bool:
    return not isinstance(error, RemoteNotFound | RemoteRefused)


class Breaker:
    """Thread-safe; `clock` is monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._outcomes: deque[bool] = deque(maxlen=CALLS_MIN)
        self._open_until = 0.0
        self._is_open = False

    @property
    def is_open(self) -> bool:
        """Whether the next request is refused; when it is time to try again it is not."""
        return self._is_open and self._clock() < self._open_until

    def enter(self) -> None:
        """Raises `RemoteError` at once while the breaker is open."""
        with self._lock:
            if self._is_open:
                now = self._clock()
                if now < self._open_until:
                    raise RemoteError(
                        f"the remote failed too often and is left alone for {self._open_until - now:.0f} s more"
                    )
                self._open_until = now + OPEN_S  # this request tries; the others wait for what becomes of it

    def leave(self, *, good: bool) -> None:
        with self._lock:
            if self._is_open:
                if good:
                    self._is_open = False
                    metrics.COLD_BREAKERS.add(amount=-1)
                    self._outcomes.clear()
                return
            self._outcomes.append(good)
            failed = sum(1 for outcome in self._outcomes if not outcome)
            if len(self._outcomes) == CALLS_MIN and failed >= CALLS_MIN * FAILED_SHARE:
                self._is_open = True
                metrics.COLD_BREAKERS.add()
                self._open_until = self._clock() + OPEN_S


class Retrying(Decorator):
    """Every operation, and the rest of a body that broke off."""

    def __init__(
        self,
        inner: Backend,
        *,
        attempts: int = ATTEMPTS,
        pause: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        chance: random.Random | None = None,
    ) -> None:
        super().__init__(inner)
        self.breaker = Breaker(clock)
        self.retries = 0
        self._attempts = attempts
        self._pause = pause
        self._random = chance or random.Random()

    def _ask(self, function: Callable[..., T], *arguments: Any, **named: Any) -> T:
        for attempt in range(1, self._attempts + 1):
            self.breaker.enter()
            try:
                found = function(*arguments, **named)
            except RemoteError as error:
                good = not may_help(error)
                self.breaker.leave(good=good)
                if good or attempt == self._attempts:
                    raise
            else:
                self.breaker.leave(good=True)
                return found
            self._wait(attempt)
        raise AssertionError("the last attempt returns or raises")

    def _wait(self, attempt: int) -> None:
        self.retries += 1
        self._pause(self._random.uniform(0, min(PAUSE_S_MAX, BASE_S * 2**attempt)))

    def put(
        self, key: str, data: bytes | memoryview, metadata: Mapping[str, str], *, storage_class: str = "", sha256: bytes = b"",
        if_absent: bool = False,
    ) -> str:  # fmt: skip
        return self._ask(
            self.inner.put, key, data, metadata, storage_class=storage_class, sha256=sha256, if_absent=if_absent
        )

    def get(self, key: str, start: int = 0, stop: int | None = None) -> RemoteBody:
        body = self._ask(self.inner.get, key, start, stop)
        end = body.info.size if stop is None else min(stop, body.info.size)
        return RemoteBody(body.info, self._pieces(key, body, start, end))

    def _pieces(self, key: str, body: RemoteBody, at: int, stop: int) -> Iterator[bytes]:
        """Goes on where a body broke off, if the object is still the one that it was."""
        first, broken = body.info, 0
        while True:
            try:
                for piece in body.pieces:
                    at += len(piece)
                    yield piece
                if at >= stop:
                    return
                raise RemoteError(f"{key}: the body ends {stop - at} bytes early")
            except RemoteError as error:
                broken += 1
                if not may_help(error) or broken >= self._attempts:
                    raise
                self.breaker.leave(good=False)
            self._wait(broken)
            body = self._ask(self.inner.get, key, at, stop)
            changed = first.etag and body.info.etag and first.etag != body.info.etag
            if changed or body.info.size != first.size:
                raise RemoteDamaged(f"{key} was replaced while it was read")

    def head(self, key: str) -> ObjectInfo:
        return self._ask(self.inner.head, key)

    def delete(self, key: str, version: str = "") -> None:
        self._ask(self.inner.delete, key, version)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return iter(self._ask(lambda: list(self.inner.list(prefix))))

    def create_upload(self, key: str, metadata: Mapping[str, str], *, storage_class: str = "") -> str:
        return self._ask(self.inner.create_upload, key, metadata, storage_class=storage_class)

    def upload_part(self, key: str, upload_id: str, number: int, data: bytes | memoryview) -> None:
        self._ask(self.inner.upload_part, key, upload_id, number, data)

    def list_parts(self, key: str, upload_id: str) -> dict[int, int]:
        return self._ask(self.inner.list_parts, key, upload_id)

    def complete_upload(self, key: str, upload_id: str, count: int) -> str:
        """After a lost answer the upload is gone because it succeeded."""
        try:
            return self._ask(self.inner.complete_upload, key, upload_id, count)
        except RemoteNotFound:
            return self._ask(self.inner.head, key).version

    def abort_upload(self, key: str, upload_id: str) -> None:
        self._ask(self.inner.abort_upload, key, upload_id)

    def list_uploads(self, prefix: str) -> Iterator[tuple[str, str, float]]:
        return iter(self._ask(lambda: list(self.inner.list_uploads(prefix))))

    def restore(self, key: str, days: int) -> None:
        self._ask(self.inner.restore, key, days)
