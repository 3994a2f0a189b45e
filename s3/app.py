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
from stratum.s3 import (
    audited,
    bucket_handlers,
    list_handlers,
    multipart_handlers,
    object_read,
    object_write,
    tag_handlers,
    tier_handlers,
)
from stratum.s3.answer import Answer, Stream, empty
from stratum.s3.auth import authenticate
from stratum.s3.connection import UNSENT
from stratum.s3.context import Context, http_date
from stratum.s3.errors import STATUS, S3Error, code_of, extra_of, message_of, method_not_allowed, not_implemented
from stratum.s3.incoming import Incoming
from stratum.s3.request import S3Request
from stratum.s3.waits import Waits
from stratum.s3.xml import error as error_body

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from stratum.audit import AuditLog
    from stratum.volume import Volume

    Handler = Callable[[Context], Answer | Awaitable[Answer]]
    Receive = Callable[[], Awaitable[dict[str, Any]]]
    Send = Callable[[dict[str, Any]], Awaitable[None]]

log = get_logger("s3")

# A sub-resource that S3 knows and this table does not is 501; a parameter that S3 does not know is ignored, as S3 does.
_UNBUILT = frozenset((
    "accelerate", "analytics", "cors", "encryption", "intelligent-tiering", "inventory", "legal-hold", "logging", "metadataTable",
    "metadataConfiguration", "metrics", "notification", "object-lock", "ownershipControls", "policy", "policyStatus", "publicAccessBlock",
    "renameObject", "replication", "requestPayment", "retention", "select", "session", "torrent", "website", "append",
))  # fmt: skip
_BUCKET: dict[tuple[str, str], Handler] = {
    ("GET", ""): list_handlers.list_objects,
    ("GET", "location"): bucket_handlers.get_location,
    ("GET", "versions"): list_handlers.list_versions,
    ("GET", "versioning"): bucket_handlers.get_versioning,
    ("PUT", "versioning"): bucket_handlers.put_versioning,
    ("GET", "uploads"): multipart_handlers.list_uploads,
    ("GET", "acl"): bucket_handlers.get_bucket_acl,
    ("PUT", ""): bucket_handlers.create_bucket,
    ("PUT", "acl"): bucket_handlers.put_bucket_acl,
    ("GET", "lifecycle"): tier_handlers.get_lifecycle,
    ("PUT", "lifecycle"): tier_handlers.put_lifecycle,
    ("DELETE", "lifecycle"): tier_handlers.delete_lifecycle,
    ("GET", "tagging"): tag_handlers.get_bucket_tagging,
    ("PUT", "tagging"): tag_handlers.put_bucket_tagging,
    ("DELETE", "tagging"): tag_handlers.delete_bucket_tagging,
    ("HEAD", ""): bucket_handlers.head_bucket,
    ("DELETE", ""): bucket_handlers.delete_bucket,
    ("POST", "delete"): object_write.delete_objects,
}
_OBJECT: dict[tuple[str, str], Handler] = {
    ("GET", ""): object_read.get_object,
    ("GET", "acl"): bucket_handlers.get_object_acl,
    ("GET", "attributes"): object_read.get_object_attributes,
    ("GET", "tagging"): tag_handlers.get_object_tagging,
    ("GET", "uploadId"): multipart_handlers.list_parts,
    ("HEAD", ""): object_read.head_object,
    ("PUT", ""): object_write.put_object,
    ("PUT", "acl"): bucket_handlers.put_object_acl,
    ("PUT", "tagging"): tag_handlers.put_object_tagging,
    ("PUT", "uploadId"): multipart_handlers.upload_part,
    ("POST", "restore"): tier_handlers.restore_object,
    ("POST", "uploads"): multipart_handlers.create_upload,
    ("POST", "uploadId"): multipart_handlers.complete_upload,
    ("DELETE", ""): object_write.delete_object,
    ("DELETE", "tagging"): tag_handlers.delete_object_tagging,
    ("DELETE", "uploadId"): multipart_handlers.abort_upload,
}
_SUBRESOURCES = frozenset(name for table in (_BUCKET, _OBJECT) for _, name in table if name) | _UNBUILT
_IN_LOOP = frozenset((
    "get_object", "head_object", "list_objects", "list_objects_v2", "list_versions", "list_buckets", "head_bucket",
    "put_object", "upload_part", "delete_object",
))  # fmt: skip
"""Called in the loop's thread: they compute, and return an awaitable for what is left where that waits."""
_WIRE_BYTES_MAX = multipart_handlers.COMPLETE_BYTES_MAX + 65536
"""The longest document, CompleteMultipartUpload's, with room for aws-chunked framing."""
INTERNAL_BUCKET = "_stratum"
"""No bucket can have this name: what is ours alone stands below it."""
LIVE_PATH = f"/{INTERNAL_BUCKET}/v1/live"
_METHODS = frozenset(("GET", "HEAD", "PUT", "POST", "DELETE"))


def route(request: S3Request) -> tuple[Handler, str]:
    """The handler and its name. Raises `S3Error` NotImplemented or MethodNotAllowed."""
    method = request.method
    if method == "OPTIONS":
        raise S3Error(
            "BadRequest",
            "insufficient information: a preflight needs Origin and Access-Control-Request-Method, and this server has no CORS rules",
        )
    if method not in _METHODS:
        raise method_not_allowed(method, "SERVICE", tuple(sorted(_METHODS)))
    query = request.query if request.raw_query else {}
    found = [name for name in query if name in _SUBRESOURCES]
    unbuilt = [name for name in found if name in _UNBUILT]
    if unbuilt:
        raise not_implemented(f"the sub-resource {unbuilt[0]}")
    if not request.bucket:
        if method == "GET" and not found:
            return list_handlers.list_buckets, "list_buckets"
        raise method_not_allowed(method, "SERVICE", ("GET",))
    if request.bucket == INTERNAL_BUCKET and request.key is not None:
        return tier_handlers.internal, "internal"
    table = _BUCKET if request.key is None else _OBJECT
    name = found[0] if found else ""
    if request.key is None and method == "GET" and query.get("list-type"):
        if query["list-type"] != "2":
            raise S3Error("InvalidArgument", "list-type is 2", ArgumentName="list-type")
        return list_handlers.list_objects_v2, "list_objects_v2"
    handler = table.get((method, name))
    if (
        request.key is not None
        and method == "PUT"
        and "x-amz-copy-source" in request.fields
        and name in {"", "uploadId"}
    ):
        handler = multipart_handlers.upload_part_copy if name else object_write.copy_object
    if handler is None:
        if not name and method == "POST":
            raise not_implemented("POST of a form")
        allowed = tuple(sorted(verb for verb, what in table if what == name))
        raise method_not_allowed(method, name.upper() or ("BUCKET" if request.key is None else "OBJECT"), allowed)
    return handler, handler.__name__


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
        operation = metrics.S3_OPERATIONS.get(exchange.operation, "Other")
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
        handler, exchange.operation = route(request)
        with volume.snapshot() as reader:
            identity = authenticate(request, self._identities, reader)
            if request.raw_query:
                handler, exchange.operation = route(request)  # again: the query may hold headers
            exchange.user = identity.user.name if identity.user else "-"
            user_id = None if identity.anonymous else identity.user_id
            exchange.incoming.pace = self._limiter.admit(reader, user_id, request.bucket)
            if volume.audit is not None and audited.is_wanted(reader, request):
                exchange.audited = True
                volume.audit.check()
            context = Context(
                volume, self._identities, config, request, identity, waits, exchange.incoming, details=exchange.details
            )
            if exchange.operation in _IN_LOOP:
                context.reader = reader
                try:
                    found = handler(context)
                except StillFilling:
                    found = None  # once more, where it may wait
                context.reader = None
            else:
                found = None
        attempt = 0
        while True:
            try:
                if found is None:
                    if request.has_body and exchange.operation not in _IN_LOOP and not context.document:
                        context.document = await exchange.incoming.all(_WIRE_BYTES_MAX)
                    found = await waits.computed(handler, context, then=_begin)
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
