"""A request's body as the server hands it out: chunks, an end, a client that went away, a client that fell silent."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from stratum import metrics
from stratum.s3.errors import S3Error

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from stratum.limits import Pace

DRAIN_BYTES_MAX = 8 * 1024 * 1024


class Incoming:
    """`receive` is ASGI's. `idle_s_max` is how long a client may send nothing. Bytes are those of the wire."""

    def __init__(self, receive: Callable[[], Awaitable[dict[str, Any]]], idle_s_max: float) -> None:
        self._receive = receive
        self.length = -1
        """What Content-Length says; the end is known without asking for it, which saves a round trip to the server."""
        self._count = 0
        self._idle_s_max = idle_s_max
        self.ended = False
        self._given_up = False
        self.pace: Pace | None = None

    @property
    def untouched(self) -> bool:
        """Nothing of the body has been handed out."""
        return not self._count

    async def blocks(self, block_bytes: int) -> AsyncIterator[bytes]:
        """The rest of the body in pieces of at least `block_bytes`, but for the last. Nothing for an empty body.

        Raises `S3Error` IncompleteBody when the client went away, RequestTimeout when it stopped sending.
        """
        loop = asyncio.get_running_loop()
        gathered: list[bytes] = []
        size = 0
        while not self.ended:
            try:
                async with asyncio.timeout(self._idle_s_max) as deadline:
                    while not self.ended and size < block_bytes:
                        message = await self._receive()
                        if message["type"] != "http.request":
                            self._given_up = True
                            raise S3Error("IncompleteBody", "the client went away in the middle of the body")
                        chunk: bytes = message.get("body", b"")
                        gathered.append(chunk)
                        size += len(chunk)
                        self._count += len(chunk)
                        self._take_end(more=message.get("more_body", False))
                        deadline.reschedule(loop.time() + self._idle_s_max)
            except TimeoutError:
                self._given_up = True
                raise S3Error(
                    "RequestTimeout", f"nothing of the body came for {self._idle_s_max:g} seconds; send it again"
                ) from None
            if size:
                metrics.S3_RECEIVED.add(amount=size)
                if self.pace is not None:
                    await asyncio.sleep(self.pace.sent(size))
                yield gathered[0] if len(gathered) == 1 else b"".join(gathered)
            gathered, size = [], 0

    def _take_end(self, *, more: bool) -> None:
        """Whatever the server says of the end, a body is whole with the bytes that were announced, and with no others."""
        self.ended = self._count == self.length or not more
        if self.ended and self.length not in {-1, self._count}:
            self._given_up = True
            raise S3Error(
                "IncompleteBody",
                f"You did not provide the number of bytes specified by the Content-Length HTTP header: {self.length}, of which {self._count} came",
            )

    async def all(self, bytes_max: int) -> bytes:
        """The whole body. Raises `S3Error` as `blocks` does, and MaxMessageLengthExceeded."""
        data = b""
        async for block in self.blocks(bytes_max + 1):
            data = data + block if data else block
            if len(data) > bytes_max:
                raise S3Error("MaxMessageLengthExceeded", f"the body is longer than {bytes_max} bytes")
        return data

    async def drain(self) -> None:
        """Read a little of a refused body, so that the client sees the answer instead of a reset."""
        if self.ended or self._given_up or not 0 <= self.length <= DRAIN_BYTES_MAX:
            return
        try:
            async with asyncio.timeout(5.0):
                async for _ in self.blocks(65536):
                    pass
        except (S3Error, TimeoutError):
            return  # the answer is decided; what the client did not send cannot change it
