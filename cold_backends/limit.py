"""Limits of bandwidth and requests: token buckets that hold one second's worth."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from stratum.cold_backends.contract import RemoteBody
from stratum.cold_backends.decorator import Decorator

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from stratum.cold_backends.contract import Backend, ObjectInfo


class Bucket:
    """`rate` tokens a second; 0 is no limit. Takers wait their turn; a large one is paid for by those after it."""

    def __init__(self, rate: float, *, clock: Callable[[], float], pause: Callable[[float], object]) -> None:
        self._rate = rate
        self._clock = clock
        self._pause = pause
        self._lock = threading.Lock()
        self._free_at = clock() - 1.0

    def take(self, count: float) -> None:
        if not self._rate:
            return
        with self._lock:
            now = self._clock()
            start = max(self._free_at, now - 1.0)
            self._free_at = start + count / self._rate
            wait_s = start - now
        if wait_s > 0:
            self._pause(wait_s)


class Limited(Decorator):
    """`bytes_per_s` counts both ways together."""

    def __init__(
        self,
        inner: Backend,
        *,
        bytes_per_s: float = 0.0,
        requests_per_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], object] = time.sleep,
    ) -> None:
        super().__init__(inner)
        self._bytes = Bucket(bytes_per_s, clock=clock, pause=pause)
        self._requests = Bucket(requests_per_s, clock=clock, pause=pause)

    def put(
        self, key: str, data: bytes | memoryview, metadata: Mapping[str, str], *, storage_class: str = "", sha256: bytes = b"",
        if_absent: bool = False,
    ) -> str:  # fmt: skip
        self._requests.take(1)
        self._bytes.take(len(data))
        return super().put(key, data, metadata, storage_class=storage_class, sha256=sha256, if_absent=if_absent)

    def get(self, key: str, start: int = 0, stop: int | None = None) -> RemoteBody:
        self._requests.take(1)
        body = super().get(key, start, stop)
        return RemoteBody(body.info, self._paced(body.pieces))

    def _paced(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            self._bytes.take(len(piece))
            yield piece

    def head(self, key: str) -> ObjectInfo:
        self._requests.take(1)
        return super().head(key)

    def delete(self, key: str, version: str = "") -> None:
        self._requests.take(1)
        super().delete(key, version)

    def upload_part(self, key: str, upload_id: str, number: int, data: bytes | memoryview) -> None:
        self._requests.take(1)
        self._bytes.take(len(data))
        super().upload_part(key, upload_id, number, data)
