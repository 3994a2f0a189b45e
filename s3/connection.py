"""One HTTP connection: uvicorn's protocol on llhttp, with the limits it does not have.

A client may take HEAD_S_MAX for a request's head and make it HEAD_BYTES_MAX long; what it then sends is the application's
to time (`incoming`), and a connection without a request is uvicorn's to close.
"""

from __future__ import annotations

import fcntl
import secrets
import struct
import termios
from typing import TYPE_CHECKING, Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from stratum import metrics
from stratum.log import get_logger
from stratum.s3.errors import STATUS
from stratum.s3.xml import error as error_body

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable

HEAD_S_MAX = 30.0
HEAD_BYTES_MAX = 64 * 1024
CONNECTIONS_MAX = 2048
BUSY_RETRY_S = 1
_HEADERS = [(b"content-type", b"application/xml"), (b"server", b"Stratum"), (b"connection", b"close")]
log = get_logger("s3")


class HeadTooLarge(ValueError):
    """llhttp turns it into a refused request."""


def _refusal(code: str, message: str) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Headers and body for who is refused before the application sees a request."""
    request_id = secrets.token_hex(8)
    log.info("refused", request_id=request_id, code=code, why=message)
    body = error_body(code, message, "", request_id, {})
    identity, length = (b"x-amz-request-id", request_id.encode()), (b"content-length", str(len(body)).encode())
    return [*_HEADERS, identity, length], body


async def _busy(_scope: object, _receive: object, send: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
    headers, body = _refusal("SlowDown", "this process has as many connections as it takes; try again in a moment")
    headers.append((b"retry-after", str(BUSY_RETRY_S).encode()))
    await send({"type": "http.response.start", "status": STATUS["SlowDown"], "headers": headers})
    await send({"type": "http.response.body", "body": body})


UNSENT = "stratum.unsent_bytes"
"""Key of the scope: a function that says how much of what was sent the client has not taken yet."""


class Connection(HttpToolsProtocol):
    """`raw_path` of the scope is the request target as it came: `httptools` would read `//a` as a host."""

    connections_max = CONNECTIONS_MAX
    """Of one process. The worker lowers it to what its descriptors allow."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._application = self.app
        self._head_bytes = 0
        self._deadline: asyncio.TimerHandle | None = None

    def _unsent_bytes(self) -> int:
        """In our buffer and in the kernel's. The kernel wakes a writer only when a third of its own is free, which may be
        megabytes: a slow client and one that reads nothing look the same from there.
        """
        if self.transport.is_closing():
            return 0
        asked = fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        in_kernel: int = struct.unpack("i", asked)[0]
        return self.transport.get_write_buffer_size() + in_kernel

    def _arm(self) -> None:
        self._disarm()
        self._deadline = self.loop.call_later(HEAD_S_MAX, self.timeout_keep_alive_handler)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn narrows it too
        super().connection_made(transport)
        metrics.S3_CONNECTIONS.add()
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        metrics.S3_CONNECTIONS.add(amount=-1)
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0
        if self._deadline is None:
            self._arm()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > HEAD_BYTES_MAX:
            raise HeadTooLarge

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002  uvicorn's own sentence says less
        """The head could not be read, or it is too long."""
        if self._head_bytes > HEAD_BYTES_MAX:
            code, message = (
                "RequestHeaderSectionTooLarge",
                f"the head of the request is longer than {HEAD_BYTES_MAX} bytes",
            )
        else:
            code, message = "BadRequest", "this is not an HTTP/1.1 request"
        headers, body = _refusal(code, message)
        head = b"".join(b"%s: %s\r\n" % header for header in headers)
        self.transport.write(b"HTTP/1.1 %d Bad Request\r\n%s\r\n%s" % (STATUS[code], head, body))
        self.transport.close()

    def on_headers_complete(self) -> None:
        self._disarm()
        self.app = self._application if len(self.connections) <= self.connections_max else _busy
        super().on_headers_complete()
        cast("dict[str, Any]", self.scope)[UNSENT] = self._unsent_bytes
        if self.url.startswith(b"/"):
            self.scope["raw_path"], _, self.scope["query_string"] = self.url.partition(b"?")
