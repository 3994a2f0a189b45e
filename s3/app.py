"""The ASGI application: authenticate once, dispatch, turn errors into S3's XML, log one line a request.

The event loop's thread computes. An operation that reads only the metadata store is answered in it, from one snapshot;
PutObject, UploadPart and DeleteObject begin in it and await their body, the disk and the commit; all others run in a thread.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from stratum import filling, metrics
from stratum.descriptors import WouldRecall
from stratum.errors import NotModified, StillFilling, StratumError, TooManyRequests
from stratum.identity import Identities
from stratum.limits import Limiter
from stratum.log import get_logger
from stratum.s3 import audited, object_write, routes
from stratum.s3.answer import Answer, Stream, empty
from stratum.s3.auth import authenticate
from stratum.s3.connection import UNSENT
from stratum.s3.context import Context, http_date
from stratum.s3.errors import STATUS, S3Error, code_of, extra_of, message_of
from stratum.s3.incoming import Incoming
from stratum.s3.request import S3Request
from stratum.s3.waits import Waits
from stratum.s3.xml import error as error_body

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from stratum.audit import AuditLog
    from stratum.s3.routes import Route
    from stratum.transaction import InodeReader
    from stratum.volume import Volume

    Receive = Callable[[], Awaitable[dict[str, Any]]]
    Send = Callable[[dict[str, Any]], Awaitable[None]]

log = get_logger("s3")

_WIRE_BYTES_MAX = object_write.DELETE_BYTES_MAX + 65536
"""The longest document, DeleteObjects', with room for aws-chunked framing."""
LIVE_PATH = f"/{routes.INTERNAL_BUCKET}/v1/live"
_COUNTED = frozenset(metrics.S3_OPERATIONS)
_SEND_BYTES = 256 * 1024
RETRY_AFTER_S = 2


class ClientGone(ConnectionError):
    """The client closed the connection, or read nothing for too long."""


async def _live(send: Send) -> None:
    """Whether this process answers: asked every few seconds, so neither logged nor counted. It says nothing else."""
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"5"), (b"server", b"Stratum")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"live\n"})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] == "http.request":
        pass


def _begin(found: object) -> None:
    """Read the first piece of a body before its status is sent: damage there is an error, not a broken body.

    Where the handler ran, to save a way through the loop; one that must come from a remote is left to whoever may wait for it.
    """
    if isinstance(found, Answer) and isinstance(found.body, Stream):
        try:
            found.body.begin()
        except WouldRecall:
            found.body.recalls = True


def _route(exchange: Exchange) -> Route | S3Error:
    assert exchange.request is not None, "a request that was read"
    route = routes.find(exchange.request)
    exchange.operation = route.operation if isinstance(route, routes.Route) else ""
    return route


def _enter(route: Route, context: Context, reader: InodeReader) -> Answer | Awaitable[Answer] | None:
    """Begin a call that begins in the loop, ask of any other whether it may be made. Nothing is refused before that."""
    refusal = route.refusal(context.request)
    if refusal is None and route.in_loop and route.handler is not None:
        context.reader = reader
        try:
            return route.handler(context)
        finally:
            context.reader = None
    route.gate(context, reader)
    if refusal is not None:
        raise refusal
    return None


def _admit(route: Route, context: Context) -> None:
    with context.volume.snapshot() as reader:
        route.gate(context, reader)
    refusal = route.refusal(context.request)
    if refusal is not None:
        raise refusal


class Exchange:
    """What is known about a request so far, for its answer and its log line."""

    __slots__ = ("audited", "details", "incoming", "operation", "request", "request_id", "started", "user")

    def __init__(self, request_id: str, incoming: Incoming) -> None:
        self.request_id = request_id
        self.incoming = incoming
        self.started = time.perf_counter()
        self.request: S3Request | None = None
        self.operation = ""
        self.user = ""
        self.audited = False
        self.details: dict[str, Any] = {}


class Application:
    """One a process."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._identities = Identities(volume)
        self._identities.refuse_another_seal()
        self._prefix = secrets.token_hex(4)
        self._host_id = secrets.token_urlsafe(24)
        self._numbers = itertools.count(1)
        self._idle_s_max = volume.config.s3_idle_s_max
        self._waits: Waits | None = None
        self._limiter = Limiter(volume.meta)

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if scope["path"] == LIVE_PATH:
            await _live(send)
            return
        metrics.S3_IN_FLIGHT.add()
        try:
            await self._exchange(scope, receive, send)
        finally:
            metrics.S3_IN_FLIGHT.add(amount=-1)

    async def _exchange(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        exchange = Exchange(f"{self._prefix}{next(self._numbers):08x}", Incoming(receive, self._idle_s_max))
        volume_audit = self._volume.audit
        try:
            answer = await self._answer(exchange, scope)
            if isinstance(answer.body, Stream) and not answer.body.begun:
                await self._next_piece(answer.body, first=True)
        except NotModified as error:
            answer = empty(304, {"ETag": f'"{error.etag}"', "Last-Modified": http_date(error.mtime_ns)})
        except StratumError as error:
            answer = await self._refusal(exchange, scope, error)
        except Exception as error:
            log.exception("request_failed", request_id=exchange.request_id, operation=exchange.operation)
            answer = await self._refusal(exchange, scope, StratumError(f"internal error {type(error).__name__}"))
        if volume_audit is not None and audited.gets_record(
            volume_audit, scope, exchange.user, answer.status, wanted=exchange.audited
        ):
            answer = await self._recorded(volume_audit, exchange, scope, answer)
        answer.headers += (("x-amz-request-id", exchange.request_id), ("Server", "Stratum"))
        request = exchange.request
        if request is None or (request.has_body and not exchange.incoming.ended):
            # The rest of the body is on its way, or never comes (Expect): nothing behind it can be told from it.
            answer.headers.append(("Connection", "close"))
        seconds = time.perf_counter() - exchange.started
        operation = exchange.operation or "Refused"
        if operation not in _COUNTED:
            operation = "Other"
        metrics.S3_REQUESTS.add(operation, f"{answer.status // 100}xx")
        metrics.S3_SECONDS.observe(seconds, operation)
        log.info(
            "request", request_id=exchange.request_id, method=scope["method"], path=request.resource if request else scope["path"],
            operation=exchange.operation, status=answer.status, user=exchange.user, ms=round(seconds * 1000, 2),
        )  # fmt: skip
        if self._volume.failed is not None:
            # A disk refused to sync: nothing this process still believes can be trusted. Its supervisor starts another.
            threading.Timer(0.5, os._exit, (70,)).start()
        await self._send(answer, scope, receive, send, exchange)

    async def _recorded(
        self, volume_audit: AuditLog, exchange: Exchange, scope: dict[str, Any], answer: Answer
    ) -> Answer:
        """The answer, once the audit log has it; another one if it cannot."""
        event = audited.event(
            scope,
            exchange.request,
            exchange.operation,
            exchange.user,
            answer.status,
            exchange.request_id,
            exchange.details,
        )
        try:
            await asyncio.wrap_future(volume_audit.record(event))
        except StratumError as error:
            if isinstance(answer.body, Stream):
                answer.body.close()
            return await self._refusal(exchange, scope, error)
        return answer

    async def _next_piece(self, body: Stream, *, first: bool = False) -> bytes | memoryview:
        """In a thread for disks; bytes that must come from a remote in one of those that wait for nothing else."""
        waits = self._waits_here()
        if not body.recalls:
            try:
                return await waits.in_thread(body.begin if first else body.read)
            except WouldRecall:
                body.recalls = True
        return await waits.recalling(body.begin if first else body.read)

    def _waits_here(self) -> Waits:
        if self._waits is None:
            self._waits = Waits(self._volume, self._volume.config.s3_threads)
        return self._waits

    async def _answer(self, exchange: Exchange, scope: dict[str, Any]) -> Answer:
        volume, config = self._volume, self._volume.config
        waits = self._waits_here()
        exchange.request = request = S3Request(scope, config, exchange.request_id)
        exchange.incoming.length = request.length
        route = _route(exchange)
        if isinstance(route, S3Error) and request.method == "OPTIONS":
            raise route  # a preflight is asked by a browser, which signs it with nothing, or with the signature of the request to come
        with volume.snapshot() as reader:
            identity = authenticate(request, self._identities, reader)
            exchange.user = identity.user.name if identity.user else "-"
            user_id = None if identity.anonymous else identity.user_id
            exchange.incoming.pace = self._limiter.admit(reader, user_id, request.bucket)
            if volume.audit is not None and audited.is_wanted(reader, request):
                exchange.audited = True
                volume.audit.check()
            if request.raw_query:
                route = _route(exchange)  # again: the query may hold headers
            if not isinstance(route, routes.Route):
                raise route
            context = Context(
                volume, self._identities, config, request, identity, waits, exchange.incoming, details=exchange.details
            )
            found, admitted = None, False
            try:
                found = _enter(route, context, reader)
                admitted = True
            except StillFilling:
                pass  # once more, where it may wait
        attempt = 0
        while True:
            try:
                if not admitted:
                    await waits.in_thread(_admit, route, context)
                    admitted = True
                if found is None:
                    if request.has_body and not route.in_loop and not context.document:
                        context.document = await exchange.incoming.all(_WIRE_BYTES_MAX)
                    assert route.handler is not None, "a call that is not built is refused"
                    found = await waits.computed(route.handler, context, then=_begin)
                return found if isinstance(found, Answer) else await found
            except StillFilling as error:
                if not exchange.incoming.untouched and not context.document:
                    raise  # its body is gone; the client sends it again
                found = None
                await waits.in_thread(filling.provide, volume, error, attempt)
                attempt += 1

    async def _send(
        self, answer: Answer, scope: dict[str, Any], receive: Receive, send: Send, exchange: Exchange
    ) -> None:
        body = answer.body
        head = scope["method"] == "HEAD"
        if (
            isinstance(body, bytes)
            and answer.status not in {204, 304}
            and not any(n == "Content-Length" for n, _ in answer.headers)
        ):
            answer.headers.append(("Content-Length", str(len(body))))
        headers = [(name.encode(), value.encode("latin-1", "replace")) for name, value in answer.headers]
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        if isinstance(body, bytes):
            metrics.S3_SENT.add(amount=0 if head else len(body))
            if exchange.incoming.pace is not None and not head:
                exchange.incoming.pace.sent(len(body))
            await send({"type": "http.response.body", "body": b"" if head else body})
            return
        watcher = asyncio.create_task(_disconnected(receive))
        try:
            piece = body.first
            while piece:
                metrics.S3_SENT.add(amount=len(piece))
                if exchange.incoming.pace is not None:
                    await asyncio.sleep(exchange.incoming.pace.sent(len(piece)))
                following = asyncio.ensure_future(self._next_piece(body))
                try:
                    await self._send_piece(piece, send, watcher, scope[UNSENT])
                except BaseException:
                    body.give_up()
                    with suppress(StratumError):
                        await following
                    raise
                piece = await following
            await send({"type": "http.response.body", "body": b""})
        except ClientGone as error:
            log.info("client_gone", request_id=exchange.request_id, why=str(error))
            raise
        except StratumError as error:
            # The status is out: all that is left is to break the connection, so that nobody takes this for the whole.
            log.error("body_broken", request_id=exchange.request_id, error=error.message)
            raise
        finally:
            watcher.cancel()
            body.close()

    async def _send_piece(
        self, piece: bytes | memoryview, send: Send, watcher: asyncio.Task[None], unsent_bytes: Callable[[], int]
    ) -> None:
        """Raises `ClientGone` when nobody reads."""
        view = memoryview(piece)
        for at in range(0, len(view), _SEND_BYTES):
            message = {"type": "http.response.body", "body": view[at : at + _SEND_BYTES], "more_body": True}
            before = unsent_bytes()
            while True:
                if watcher.done():
                    raise ClientGone("the client went away")
                try:
                    # uvicorn waits for room first and writes then, so what timed out was not sent.
                    async with asyncio.timeout(self._idle_s_max):
                        await send(message)
                    break
                except TimeoutError:
                    if watcher.done():
                        continue
                    now = unsent_bytes()
                    if now >= before:
                        raise ClientGone(f"the client read nothing for {self._idle_s_max:g} seconds") from None
                    before = now

    async def _refusal(self, exchange: Exchange, scope: dict[str, Any], error: StratumError) -> Answer:
        code = code_of(error)
        status = STATUS[code]
        if code == "InternalError":
            log.error("internal_error", request_id=exchange.request_id, error=error.message)
        elif status >= 500 and not isinstance(error, S3Error):
            log.warning("refused", request_id=exchange.request_id, code=code, error=error.message)
        request = exchange.request
        bucket, key, resource = (
            (request.bucket, request.key, request.resource) if request is not None else ("", None, scope["path"])
        )
        extra = extra_of(error, bucket, key)
        body = error_body(code, message_of(error), resource, exchange.request_id, extra, self._host_id)
        headers = [("Content-Type", "application/xml"), ("x-amz-id-2", self._host_id)]
        if isinstance(error, S3Error):
            headers += error.headers
        if "Region" in extra or (bucket and key is None and scope["method"] == "HEAD" and status == 403):
            headers.append(("x-amz-bucket-region", self._volume.config.s3_region))
        if code == "InvalidRange" and "ActualObjectSize" in extra:
            headers.append(("Content-Range", f"bytes */{extra['ActualObjectSize']}"))
        if code in {"ServiceUnavailable", "SlowDown"}:
            retry_s = error.retry_s if isinstance(error, TooManyRequests) else RETRY_AFTER_S
            headers.append(("Retry-After", str(retry_s)))
        if request is not None and request.has_body and "expect" not in request.fields:
            await exchange.incoming.drain()
        return Answer(status, headers, b"" if status == 304 else body)
