"""A remote in a directory: for tests, and for archives on a disk that is carried away.

`KEY` is a file below `objects/`, its metadata a JSON file of the same name below `metadata/`, written before it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from stratum.cold_backends.contract import (
    PIECE_BYTES,
    ObjectInfo,
    RemoteBody,
    RemoteConflict,
    RemoteDamaged,
    RemoteError,
    RemoteGone,
    RemoteNotFound,
    RemoteRefused,
)
from stratum.segments import fsync_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


def _failed(error: OSError, what: str) -> RemoteError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return RemoteNotFound(f"{what} is not there")
    return RemoteError(f"{what}: {error}; look at the directory's disk")


class DirectoryBackend:
    """The folder must exist: an archive that is not plugged in is an error, not an empty archive."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def _path(self, table: str, key: str) -> Path:
        parts = key.split("/")
        if not key or any(part in {"", ".", ".."} or "\0" in part for part in parts):
            raise RemoteRefused(f"{key!r} is not a key of ours")
        if not self._root.is_dir():
            raise RemoteGone(f"the archive {self._root} is not there; mount or plug in its disk")
        return self._root / table / key

    def _write(self, path: Path, data: bytes | memoryview) -> None:
        missing = [folder for folder in path.parents if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        for folder in missing:
            fsync_folder(folder.parent)
        temporary = path.with_name(f".{uuid.uuid4().hex}.new")
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
            fsync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)

    def put(
        self, key: str, data: bytes | memoryview, metadata: Mapping[str, str], *, storage_class: str = "", sha256: bytes = b"",
        if_absent: bool = False,
    ) -> str:  # fmt: skip
        if storage_class:
            raise RemoteRefused(f"a directory has no storage class {storage_class!r}; leave it out")
        path = self._path("objects", key)
        found = hashlib.sha256(data).digest()
        if sha256 and found != sha256:
            raise RemoteDamaged(f"{key}: the bytes do not have the checksum that came with them")
        if if_absent and path.exists():
            raise RemoteConflict(f"{key} is there already")
        try:
            row = {"metadata": dict(metadata), "sha256": found.hex()}
            self._write(self._path("metadata", key), json.dumps(row).encode())
            self._write(path, data)
        except OSError as error:
            raise _failed(error, key) from error
        return ""

    def get(self, key: str, start: int = 0, stop: int | None = None) -> RemoteBody:
        info = self.head(key)
        last = info.size if stop is None else min(stop, info.size)
        return RemoteBody(info, self._pieces(key, start, last))

    def _pieces(self, key: str, start: int, stop: int) -> Iterator[bytes]:
        try:
            with self._path("objects", key).open("rb") as file:
                file.seek(start)
                while start < stop:
                    piece = file.read(min(PIECE_BYTES, stop - start))
                    if not piece:
                        raise RemoteError(f"{key} ends {stop - start} bytes early")
                    start += len(piece)
                    yield piece
        except OSError as error:
            raise _failed(error, key) from error

    def head(self, key: str) -> ObjectInfo:
        try:
            stat = self._path("objects", key).stat()
            raw = self._path("metadata", key).read_bytes()
        except OSError as error:
            raise _failed(error, key) from error
        try:
            row = json.loads(raw)
            digest, metadata = (
                bytes.fromhex(row["sha256"]),
                {str(name): str(row["metadata"][name]) for name in row["metadata"]},
            )
        except (ValueError, KeyError, TypeError):
            raise RemoteDamaged(f"{key}: its metadata file cannot be read") from None
        return ObjectInfo(
            key, stat.st_size, stat.st_mtime, etag=f"{stat.st_ino}-{stat.st_mtime_ns}", sha256=digest, metadata=metadata
        )

    def delete(self, key: str, version: str = "") -> None:  # noqa: ARG002  a directory keeps no versions
        try:
            for table in ("objects", "metadata"):
                path = self._path(table, key)
                path.unlink(missing_ok=True)
                if path.parent.exists():
                    fsync_folder(path.parent)
        except NotADirectoryError:
            return
        except OSError as error:
            raise _failed(error, key) from error

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        self._path("objects", "x")
        base = self._root / "objects"
        found = []
        for folder, _, names in os.walk(base):
            for name in names:
                path = Path(folder, name)
                key = path.relative_to(base).as_posix()
                if key.startswith(prefix) and not name.startswith("."):
                    found.append((key, path))
        for key, path in sorted(found):
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            yield ObjectInfo(key, stat.st_size, stat.st_mtime)

    # -- uploads ------------------------------------------------------------------------------------------------------

    def _upload(self, key: str, upload_id: str) -> Path:
        folder = self._path("uploads", upload_id)
        try:
            row = json.loads((folder / "upload.json").read_bytes())
        except OSError as error:
            raise _failed(error, f"upload {upload_id} of {key}") from error
        if row["key"] != key:
            raise RemoteNotFound(f"upload {upload_id} is of another key")
        return folder

    def create_upload(self, key: str, metadata: Mapping[str, str], *, storage_class: str = "") -> str:
        if storage_class:
            raise RemoteRefused(f"a directory has no storage class {storage_class!r}; leave it out")
        upload_id = uuid.uuid4().hex
        row = {"key": key, "metadata": dict(metadata), "began_s": time.time()}
        try:
            self._write(self._path("uploads", f"{upload_id}/upload.json"), json.dumps(row).encode())
        except OSError as error:
            raise _failed(error, key) from error
        return upload_id

    def upload_part(self, key: str, upload_id: str, number: int, data: bytes | memoryview) -> None:
        folder = self._upload(key, upload_id)
        try:
            self._write(folder / f"{number:05d}.part", data)
        except OSError as error:
            raise _failed(error, key) from error

    def list_parts(self, key: str, upload_id: str) -> dict[int, int]:
        folder = self._upload(key, upload_id)
        return {int(path.stem): path.stat().st_size for path in sorted(folder.glob("*.part"))}

    def complete_upload(self, key: str, upload_id: str, count: int) -> str:
        folder = self._upload(key, upload_id)
        try:
            row = json.loads((folder / "upload.json").read_bytes())
            data = b"".join((folder / f"{number:05d}.part").read_bytes() for number in range(1, count + 1))
        except OSError as error:
            raise _failed(error, f"a part of upload {upload_id}") from error
        version = self.put(key, data, row["metadata"])
        shutil.rmtree(folder)
        return version

    def abort_upload(self, key: str, upload_id: str) -> None:
        try:
            shutil.rmtree(self._upload(key, upload_id))
        except RemoteNotFound:
            return
        except OSError as error:
            raise _failed(error, key) from error

    def list_uploads(self, prefix: str) -> Iterator[tuple[str, str, float]]:
        self._path("uploads", "x")
        for path in sorted((self._root / "uploads").glob("*/upload.json")):
            row = json.loads(path.read_bytes())
            if row["key"].startswith(prefix):
                yield row["key"], path.parent.name, row["began_s"]

    def restore(self, key: str, days: int) -> None:  # noqa: ARG002  it is readable already
        self.head(key)

    def close(self) -> None:
        return
