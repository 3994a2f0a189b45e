"""One HTTP connection: uvicorn's protocol on llhttp, with the limits and the framing rules they do not have.

A client may take HEAD_S_MAX for a request's head and make it HEAD_BYTES_MAX long; what it then sends is the application's
to time (`incoming`), and a connection that waits for a request is uvicorn's to close.

Answers go out in the order of the requests, refusals of unreadable ones included, and nothing is read behind one of those.
A body whose end llhttp did not see never counts as complete.
"""

from __future__ import annotations

import asyncio
import fcntl
import functools
import ipaddress
import secrets
import struct
import termios
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import unquote

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from stratum import metrics
from stratum.log import get_logger
from stratum.s3 import framing
from stratum.s3.errors import S3Error
from stratum.s3.origin import is_trusted
from stratum.s3.xml import error as error_body

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

HEAD_S_MAX = 30.0
HEAD_BYTES_MAX = 64 * 1024
HEAD_FIELDS_MAX = 512
CONNECTIONS_MAX = 2048
ADDRESS_CONNECTIONS_MAX = 1024
PIPELINED_MAX = 32
"""Requests of a connection that wait for the one before them. One segment may hold ten thousand, each of kilobytes here."""
BUSY_RETRY_S = 1
REFUSED_MAX = 128
"""How many connections too many of one address are told so. Further ones are dropped: each takes a place that others may want."""
LINGER_S_MAX = 5.0
_SENDING = frozenset(("PUT", "POST"))
_FRUITLESS_BYTES_MAX = 2 * HEAD_BYTES_MAX
"""What may come without a field, a piece of a body or an end coming out of it: llhttp's binding gathers a field in memory."""
_BETWEEN, _HEAD, _BODY, _BROKEN = range(4)
_HEADERS = [(b"content-type", b"application/xml"), (b"server", b"Stratum"), (b"connection", b"close")]
log = get_logger("s3")


class StopParsing(ValueError):
    """Raised in a callback of llhttp to end it."""


def _refusal(error: S3Error) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Headers and body for a request that is refused before the application sees it."""
    request_id = secrets.token_hex(8)
    log.info("refused", request_id=request_id, code=error.code, why=error.message)
    body = error_body(error.code, error.message, "", request_id, error.extra)
    identity, length = (b"x-amz-request-id", request_id.encode()), (b"content-length", str(len(body)).encode())
    return [*_HEADERS, identity, length], body


async def _refuse(
    error: S3Error, _scope: object, _receive: object, send: Callable[[dict[str, Any]], Awaitable[None]]
) -> None:
    """An application that answers with an error."""
    headers, body = _refusal(error)
    if error.code == "SlowDown":
        headers.append((b"retry-after", str(BUSY_RETRY_S).encode()))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


_BUSY = functools.partial(
    _refuse, S3Error("SlowDown", "Reduce your request rate: too many connections are open. Try again in a moment.")
)
_TOO_MANY_PIPELINED = S3Error(
    "SlowDown", f"Reduce your request rate: more than {PIPELINED_MAX} requests of this connection wait for an answer."
)
_NOT_HTTP = "this is not an HTTP/1.1 request"

UNSENT = "stratum.unsent_bytes"
"""Key of the scope: a function that says how much of what was sent the client has not taken yet."""


class _Cycle(RequestResponseCycle):
    """A request and its answer. When its body is `broken` the application hears that no more comes, and may still answer."""

    broken = False

    async def receive(self) -> Any:
        if self.broken:
            return {"type": "http.disconnect"}
        return await super().receive()

    def body_breaks(self) -> None:
        self.broken = True
        self.keep_alive = False
        self.message_event.set()

    def client_goes(self) -> None:
        self.disconnected = True
        self.message_event.set()


class _Lingering:
    """The transport of a request with a body: after an answer that ends the connection the rest of it is still taken."""

    def __init__(self, connection: Connection) -> None:
        transport = connection.transport
        self.write, self.is_closing, self.close = transport.write, transport.is_closing, connection.linger


def address_of(client: tuple[str, int] | None) -> str:
    """What counts as one client: an address, and of IPv6 the /64 that one subscriber has."""
    host = client[0] if client else ""
    if ":" not in host:
        return host
    address = ipaddress.IPv6Address(host.partition("%")[0])
    return str(address.ipv4_mapped or ipaddress.IPv6Network((address, 64), strict=False))


class Connection(HttpToolsProtocol):
    """uvicorn calls what it inherits from asyncio, httptools the `on_` methods."""

    connections_max = CONNECTIONS_MAX
    """Of one process. The worker lowers it to what its descriptors allow."""
    address_connections_max = ADDRESS_CONNECTIONS_MAX
    """Of those, from one client address, or from one /64 of IPv6; 0: as many as there are. `s3.connections_per_address_max`."""
    trusted_proxies: tuple[str, ...] = ()
    """Addresses that many clients come through."""
    _of_address: ClassVar[dict[str, int]] = {}

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._stage = _BETWEEN
        self._head_bytes = 0
        self._head_fields = 0
        self._watched: list[tuple[bytes, bytes]] = []
        self._progress = 0
        self._fruitless_bytes = 0
        self._error: S3Error | None = None
        self.cycle: _Cycle = None  # type: ignore[assignment]  # uvicorn's, until there is one
        self._running: _Cycle | None = None
        self._address = ""
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

    # -- the connection -----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn narrows it too
        super().connection_made(transport)
        metrics.S3_CONNECTIONS.add()
        if not (self.trusted_proxies and self.client and is_trusted(self.client[0], self.trusted_proxies)):
            self._address = address_of(self.client)
        count = self._of_address[self._address] = self._of_address.get(self._address, 0) + 1
        if self._is_crowded(REFUSED_MAX):
            log.info("connection_dropped", client=self._address, connections=count)
            transport.abort()  # no answer is worth a descriptor here
            return
        self._arm()

    def _is_crowded(self, beyond: int = 0) -> bool:
        """Whether the client's address has over `beyond` more connections than it may have."""
        most = self.address_connections_max
        return bool(self._address) and most > 0 and self._of_address.get(self._address, 0) > most + beyond

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        metrics.S3_CONNECTIONS.add(amount=-1)
        left = self._of_address.pop(self._address, 1) - 1
        if left:
            self._of_address[self._address] = left
        if self._running is not None and not self._running.response_complete:
            self._running.client_goes()  # uvicorn tells the last request only, which may still be queued
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._stage == _BROKEN:
            return
        progress = self._progress
        try:
            self._feed(data)
        except httptools.HttpParserError as error:
            cause = error.__context__
            if isinstance(error, httptools.HttpParserCallbackError) and not isinstance(cause, StopParsing):
                log.error("head_failed", error=repr(cause))
            self._break()
            return
        if self._progress != progress:
            self._fruitless_bytes = 0
        else:
            self._fruitless_bytes += len(data)
            if self._fruitless_bytes > _FRUITLESS_BYTES_MAX:
                self._head_bytes += self._fruitless_bytes
                self._break()
                return
        cycle = self.cycle
        if (cycle is None or cycle.response_complete) and self._deadline is None and not self.transport.is_closing():
            # Nothing is being answered, and what came is no whole head: the rest of one, or of a body that nobody wants.
            self._arm()

    def _feed(self, data: bytes) -> None:
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = self._without_upgrade() + data[upgrade.args[0] :]
            else:
                return

    def _without_upgrade(self) -> bytes:
        """The head that llhttp just read, without the field that made it end there. A new parser reads on behind it.

        Nothing is upgraded to here, and then the request is served as if it had not asked (RFC 9110 7.8).
        """
        lines = [b"%s: %s\r\n" % field for field in self.headers if field[0] != b"upgrade"]
        head = b"%s %s HTTP/%s\r\n%s\r\n" % (
            self.parser.get_method(), self.url, self.parser.get_http_version().encode(), b"".join(lines),
        )  # fmt: skip
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return head

    def _break(self) -> None:
        """What came cannot be read. The request it belongs to is answered, after those before it, and then all ends."""
        stage, self._stage = self._stage, _BROKEN
        self._disarm()
        if stage == _BODY:
            self.cycle.body_breaks()
            if self.cycle.response_complete:
                self.transport.close()
            return
        error = self._error
        if error is None and self._head_bytes > HEAD_BYTES_MAX:
            error = S3Error(
                "RequestHeaderSectionTooLarge",
                f"Your request header section exceeds the maximum allowed size: {HEAD_BYTES_MAX} bytes in {HEAD_FIELDS_MAX} fields.",
            )
        refuse = functools.partial(_refuse, error or S3Error("BadRequest", _NOT_HTTP))
        self._enqueue({"type": "http", "method": "GET", **(self.scope or {})}, refuse, waits=False, keep_alive=False)

    def linger(self) -> None:
        """Say that nothing more comes, and throw away for a while what the client still sends.

        A socket that is closed with bytes unread is reset: a client in the middle of its upload would hear that, and not why
        it was refused.
        """
        cycle, transport = self.cycle, self.transport
        if self._stage != _BODY or not cycle.response_complete or not transport.can_write_eof():
            transport.close()
            return
        self._stage = _BROKEN
        transport.write_eof()
        self._disarm()
        self._deadline = self.loop.call_later(LINGER_S_MAX, self.timeout_keep_alive_handler)

    # -- requests, one after the other --------------------------------------------------------------------------------

    def _enqueue(self, scope: Any, application: Any, *, waits: bool, keep_alive: bool, lingers: bool = False) -> None:
        before = self.cycle
        transport: Any = _Lingering(self) if lingers else self.transport
        self.cycle = cycle = _Cycle(
            scope=scope, transport=transport, flow=self.flow, logger=self.logger, access_logger=self.access_logger,
            access_log=False, default_headers=self.server_state.default_headers, message_event=asyncio.Event(),
            expect_100_continue=waits, keep_alive=keep_alive, on_response=self.on_response_complete,
        )  # fmt: skip
        if before is None or before.response_complete:
            self._start_asgi_task(cycle, application)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((cycle, application))

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._stage = _HEAD
        self._progress += 1
        self._head_bytes = self._head_fields = 0
        self._watched = []
        if self._deadline is None:
            self._arm()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_fields += 1
        self._count(len(name) + len(value))
        if self._stage != _HEAD:
            return  # a trailer: none means anything here, and none may pass for a header (RFC 9110 6.5.1)
        name = name.lower()
        field = (name, value.strip(b" \t"))
        if name in framing.WATCHED:
            self._watched.append(field)
        self.headers.append(field)

    def _count(self, size: int) -> None:
        self._progress += 1
        self._head_bytes += size
        if self._head_bytes > HEAD_BYTES_MAX or self._head_fields > HEAD_FIELDS_MAX:
            self._head_bytes = HEAD_BYTES_MAX + 1
            raise StopParsing

    def on_headers_complete(self) -> None:
        parser, scope = self.parser, self.scope
        method = parser.get_method().decode("ascii")
        if parser.should_upgrade() and method != "CONNECT":
            return  # it comes once more, from `_without_upgrade`
        scope["method"] = method
        version = parser.get_http_version()
        try:
            if len(self.pipeline) >= PIPELINED_MAX:
                raise _TOO_MANY_PIPELINED
            waits = framing.check_fields(version, self._watched)
            path, query, authority = framing.split_target(method, self.url)
        except S3Error as error:
            self._error = error
            raise StopParsing from error
        if authority:
            self.headers[:] = [(b"host", authority), *(field for field in self.headers if field[0] != b"host")]
        self._disarm()
        self._stage = _BODY
        scope["http_version"] = version
        text = path.decode("ascii")
        scope["path"] = unquote(text) if "%" in text else text
        scope["raw_path"], scope["query_string"] = path, query
        scope[UNSENT] = self._unsent_bytes  # type: ignore[literal-required]  # ours
        busy = len(self.connections) > self.connections_max or self._is_crowded()
        self._enqueue(
            scope, _BUSY if busy else self.app,
            waits=waits, keep_alive=version != "1.0" and parser.should_keep_alive(),
            lingers=method in _SENDING and not busy,
        )  # fmt: skip

    def on_body(self, body: bytes) -> None:
        self._progress += 1
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._stage != _BODY:
            return  # the parser gave up behind the head of an Upgrade: its body is still to come
        self._stage = _BETWEEN
        self._progress += 1
        if not self.parser.should_keep_alive():
            self.cycle.keep_alive = False  # llhttp reads nothing more, also where a trailer made it think so
        super().on_message_complete()
