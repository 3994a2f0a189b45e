"""Counts what is asked of a remote, how long it takes, and how many bytes go either way."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from stratum import metrics
from stratum.cold_backends.contract import RemoteArchived, RemoteBody, RemoteConflict, RemoteNotFound
from stratum.cold_backends.decorator import Decorator

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from stratum.cold_backends.contract import ObjectInfo


@contextmanager
def _measured(operation: str) -> Iterator[None]:
    """What a remote answers in good health is no error of it."""
    began = time.perf_counter()
    result = "error"
    try:
        yield
        result = "ok"
    except (RemoteNotFound, RemoteConflict, RemoteArchived):
        result = "ok"
        raise
    finally:
        metrics.COLD_REQUESTS.add(operation, result)
        metrics.COLD_SECONDS.observe(time.perf_counter() - began)


class Measured(Decorator):
    """Next to the remote, so that every attempt counts."""

    def put(
        self, key: str, data: bytes | memoryview, metadata: Mapping[str, str], *, storage_class: str = "", sha256: bytes = b"",
        if_absent: bool = False,
    ) -> str:  # fmt: skip
        metrics.COLD_SENT.add(amount=len(data))
        with _measured("put"):
            return super().put(key, data, metadata, storage_class=storage_class, sha256=sha256, if_absent=if_absent)

    def get(self, key: str, start: int = 0, stop: int | None = None) -> RemoteBody:
        with _measured("get"):
            body = super().get(key, start, stop)
        return RemoteBody(body.info, self._counted(body.pieces))

    @staticmethod
    def _counted(pieces: Iterator[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            metrics.COLD_RECEIVED.add(amount=len(piece))
            yield piece

    def head(self, key: str) -> ObjectInfo:
        with _measured("head"):
            return super().head(key)

    def delete(self, key: str, version: str = "") -> None:
        with _measured("delete"):
            super().delete(key, version)

    def create_upload(self, key: str, metadata: Mapping[str, str], *, storage_class: str = "") -> str:
        with _measured("upload"):
            return super().create_upload(key, metadata, storage_class=storage_class)

    def upload_part(self, key: str, upload_id: str, number: int, data: bytes | memoryview) -> None:
        metrics.COLD_SENT.add(amount=len(data))
        with _measured("upload"):
            super().upload_part(key, upload_id, number, data)

    def complete_upload(self, key: str, upload_id: str, count: int) -> str:
        with _measured("upload"):
            return super().complete_upload(key, upload_id, count)

    def restore(self, key: str, days: int) -> None:
        with _measured("restore"):
            super().restore(key, days)
