"""A backend that passes everything on: decorators override what they change."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from stratum.cold_backends.contract import Backend, ObjectInfo, RemoteBody


class Decorator:
    """See `contract.Backend`."""

    def __init__(self, inner: Backend) -> None:
        self.inner = inner

    def put(
        self, key: str, data: bytes | memoryview, metadata: Mapping[str, str], *, storage_class: str = "", sha256: bytes = b"",
        if_absent: bool = False,
    ) -> str:  # fmt: skip
        return self.inner.put(key, data, metadata, storage_class=storage_class, sha256=sha256, if_absent=if_absent)

    def get(self, key: str, start: int = 0, stop: int | None = None) -> RemoteBody:
        return self.inner.get(key, start, stop)

    def head(self, key: str) -> ObjectInfo:
        return self.inner.head(key)

    def delete(self, key: str, version: str = "") -> None:
        self.inner.delete(key, version)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return self.inner.list(prefix)

    def create_upload(self, key: str, metadata: Mapping[str, str], *, storage_class: str = "") -> str:
        return self.inner.create_upload(key, metadata, storage_class=storage_class)

    def upload_part(self, key: str, upload_id: str, number: int, data: bytes | memoryview) -> None:
        self.inner.upload_part(key, upload_id, number, data)

    def list_parts(self, key: str, upload_id: str) -> dict[int, int]:
        return self.inner.list_parts(key, upload_id)

    def complete_upload(self, key: str, upload_id: str, count: int) -> str:
        return self.inner.complete_upload(key, upload_id, count)

    def abort_upload(self, key: str, upload_id: str) -> None:
        self.inner.abort_upload(key, upload_id)

    def list_uploads(self, prefix: str) -> Iterator[tuple[str, str, float]]:
        return self.inner.list_uploads(prefix)

    def restore(self, key: str, days: int) -> None:
        self.inner.restore(key, days)

    def close(self) -> None:
        self.inner.close()
