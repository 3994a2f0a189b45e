"""Files to a remote: in one piece, or in parts if they are long, never held in memory as a whole."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from stratum.cold import MULTIPART_BYTES_MIN
from stratum.cold_backends.contract import PART_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import BinaryIO

    from stratum.cold_backends.contract import Backend


def upload(
    backend: Backend,
    key: str,
    file: BinaryIO,
    size: int,
    metadata: Mapping[str, str],
    sent: Callable[[int], None] = lambda _: None,
) -> str:
    """Send the `size` bytes of `file` from where it stands; their SHA-256. `sent` is told the bytes so far. Raises `RemoteError`."""
    digest = hashlib.sha256()
    if size < MULTIPART_BYTES_MIN:
        data = file.read(size)
        digest.update(data)
        backend.put(key, data, metadata)
        sent(len(data))
        return digest.hexdigest()
    identity = backend.create_upload(key, metadata)
    try:
        count = done = 0
        while part := file.read(PART_BYTES):
            count += 1
            digest.update(part)
            backend.upload_part(key, identity, count, part)
            done += len(part)
            sent(done)
        backend.complete_upload(key, identity, count)
    except BaseException:
        backend.abort_upload(key, identity)
        raise
    return digest.hexdigest()
