"""One HTTP connection: uvicorn's protocol on llhttp, with the limits it does not have.

A client may take HEAD_S_MAX for a request's head and make it HEAD_BYTES_MAX long; what it then sends is the application's
to time (`incoming`), and a connection without a request is uvicorn's to close.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

if TYPE_CHECKING:
    import asyncio

HEAD_S_MAX = 30.0
HEAD_BYTES_MAX = 64 * 1024


class HeadTooLarge(ValueError):
    """llhttp turns it into a refused request."""


class Connection(HttpToolsProtocol):
    """`raw_path` of the scope is the request target as it came: `httptools` would read `//a` as a host."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._head_bytes = 0
        self._deadline: asyncio.TimerHandle | None = None

    def _arm(self) -> None:
        self._disarm()
        self._deadline = self.loop.call_later(HEAD_S_MAX, self.timeout_keep_alive_handler)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn narrows it too
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
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
            raise HeadTooLarge(f"the head of the request is longer than {HEAD_BYTES_MAX} bytes")

    def on_headers_complete(self) -> None:
        self._disarm()
        super().on_headers_complete()
        if self.url.startswith(b"/"):
            self.scope["raw_path"], _, self.scope["query_string"] = self.url.partition(b"?")
