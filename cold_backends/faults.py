"""Faults on purpose: a remote that fails as a plan says. For tests and drills; nothing else uses it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from stratum.cold_backends.contract import ObjectInfo, RemoteBody, RemoteError
from stratum.cold_backends.decorator import Decorator

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from stratum.cold_backends.contract import Backend

Plan = Callable[[str, str], str]
"""(operation, key) -> "" or a fault: "refuse" (before anything happens), "lose" (after it happened, the answer is lost),
"truncate" (a body ends half-way), "flip" (one bit of a body is wrong)."""


class Faulty(Decorator):
    """`calls` lists every operation and key, faulty or not."""

    def __init__(self, inner: Backend, plan: Plan) -> None:
        super().__init__(inner)
        self._plan = plan
        self.calls: list[tuple[str, str]] = []

    def _fault(self, operation: str, key: str) -> str:
        self.calls.append((operation, key))
        fault = self._plan(operation, key)
        if fault == "refuse":
            raise RemoteError(f"{operation} {key}: refused on purpose")
        return fault

    @staticmethod
    def _lose(fault: str, operation: str) -> None:
        if fault == "lose":
            raise RemoteError(f"{operation}: the answer was lost on purpose")

    def put(
        self, key: str, data: bytes | memoryview, metadata: Mapping[str, str], *, storage_class: str = "", sha256: bytes = b"",
        if_absent: bool = False,
    ) -> str:  # fmt: skip
        fault = self._fault("put", key)
        sent = _flipped(bytes(data)) if fault == "flip" else data
        found = super().put(
            key,
            sent,
            metadata,
            storage_class=storage_class,
            sha256=b"" if fault == "flip" else sha256,
            if_absent=if_absent,
        )
        self._lose(fault, "put")
        return found

    def get(self, key: str, start: int = 0, stop: int | None = None) -> RemoteBody:
        fault = self._fault("get", key)
        body = super().get(key, start, stop)
        return RemoteBody(body.info, _spoiled(body.pieces, fault))

    def head(self, key: str) -> ObjectInfo:
        self._fault("head", key)
        return super().head(key)

    def delete(self, key: str, version: str = "") -> None:
        fault = self._fault("delete", key)
        super().delete(key, version)
        self._lose(fault, "delete")

    def create_upload(self, key: str, metadata: Mapping[str, str], *, storage_class: str = "") -> str:
        self._fault("create_upload", key)
        return super().create_upload(key, metadata, storage_class=storage_class)

    def upload_part(self, key: str, upload_id: str, number: int, data: bytes | memoryview) -> None:
        fault = self._fault("upload_part", key)
        super().upload_part(key, upload_id, number, _flipped(bytes(data)) if fault == "flip" else data)
        self._lose(fault, "upload_part")

    def complete_upload(self, key: str, upload_id: str, count: int) -> str:
        fault = self._fault("complete_upload", key)
        found = super().complete_upload(key, upload_id, count)
        self._lose(fault, "complete_upload")
        return found


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes((data[middle] ^ 1,)) + data[middle + 1 :]


def _spoiled(pieces: Iterator[bytes], fault: str) -> Iterator[bytes]:
    for piece in pieces:
        if fault == "truncate":
            yield piece[: len(piece) // 2]
            raise RemoteError("the body was cut off on purpose")
        yield _flipped(piece) if fault == "flip" else piece
        fault = ""
