"""What a remote of the cold tier does. Every backend and every decorator passes the one suite in tests/tiers.

Invariants
* Keys are ours: ASCII letters, digits, `/`, `-`, `_` and `.`. An object is whole or not there.
* `delete` of what is not there, and `put` of the same bytes again, succeed: a lost answer is repaired by asking again.
* Any call may be made from any thread. Sizes are those of the bytes that were put, whatever a decorator makes of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from stratum.errors import StratumError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PIECE_BYTES = 256 * 1024
PART_BYTES = 16 * 1024 * 1024
"""Of a multipart upload, but for the last; S3 wants at least 5 MiB."""


class RemoteError(StratumError):
    """The remote failed or did not answer. Asking again may help."""


class RemoteNotFound(RemoteError):
    """The object or upload is not there. Asking again does not help."""


class RemoteRefused(RemoteError):
    """The remote does not let us: credentials, permissions, or it cannot do this. Asking again does not help."""


class RemoteGone(RemoteRefused):
    """The bucket itself is not there, or the directory."""


class RemoteDenied(RemoteRefused):
    """Credentials are wrong, revoked, or do not reach so far."""


class RemoteConflict(RemoteRefused):
    """The object is there already and was to be new."""


class RemoteDamaged(RemoteRefused):
    """What arrived is not what was sent: the checksum differs."""


class RemoteArchived(RemoteRefused):
    """The object must be restored before it can be read."""


@dataclass(slots=True, frozen=True)
class ObjectInfo:
    """One object. `restore` is "" for a readable one, "ongoing" or "ready" for one in an archive that was asked for."""

    key: str
    size: int
    modified_s: float = 0.0
    version: str = ""
    storage_class: str = ""
    restore: str = ""
    etag: str = ""
    """Differs when the object was replaced; "" if the remote has none."""
    sha256: bytes = b""
    """If the remote computed or checked one of the whole object."""
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class RemoteBody:
    """An object's bytes on their way, never more than were asked for. `pieces` raises `RemoteError` if they stop before the end
    that `info.size` says; closing it ends the transfer.
    """

    info: ObjectInfo
    pieces: Iterator[bytes]


class Backend(Protocol):
    """Every method raises `RemoteError` or a subclass."""

    def put(
        self,
        key: str,
        data: bytes | memoryview,
        metadata: Mapping[str, str],
        *,
        storage_class: str = "",
        sha256: bytes = b"",
        if_absent: bool = False,
    ) -> str:
        """Store an object; its version, "" without versions. `sha256` is what the remote should compare, if it can."""
        ...

    def get(self, key: str, start: int = 0, stop: int | None = None) -> RemoteBody:
        """Bytes [start, stop) of an object; `stop` beyond its end is its end, and from a `start` there on it has no bytes."""
        ...

    def head(self, key: str) -> ObjectInfo: ...

    def delete(self, key: str, version: str = "") -> None: ...

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Objects in the order of their keys; without metadata."""
        ...

    def create_upload(self, key: str, metadata: Mapping[str, str], *, storage_class: str = "") -> str: ...

    def upload_part(self, key: str, upload_id: str, number: int, data: bytes | memoryview) -> None:
        """Parts count from 1; all but the last have PART_BYTES. A part may be sent again."""
        ...

    def list_parts(self, key: str, upload_id: str) -> dict[int, int]:
        """Sizes by number. Raises `RemoteNotFound` for an upload that has ended or expired."""
        ...

    def complete_upload(self, key: str, upload_id: str, count: int) -> str:
        """Parts 1 to `count` become the object; its version."""
        ...

    def abort_upload(self, key: str, upload_id: str) -> None: ...

    def list_uploads(self, prefix: str) -> Iterator[tuple[str, str, float]]:
        """(key, upload id, when it began)."""
        ...

    def restore(self, key: str, days: int) -> None:
        """Ask for a readable copy of an archived object; again while it is on its way is no error."""
        ...

    def close(self) -> None: ...
