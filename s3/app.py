"""The WSGI application: authenticate once, dispatch, turn errors into S3's XML, log one line a request."""

from __future__ import annotations

import itertools
import os
import secrets
import threading
import time
from typing import TYPE_CHECKING, Any

from stratum.errors import NotModified, StratumError
from stratum.identity import Identities
from stratum.log import get_logger
from stratum.s3 import bucket_handlers, list_handlers, multipart_handlers, object_read, object_write
from stratum.s3.answer import Answer, empty
from stratum.s3.auth import authenticate
from stratum.s3.context import Context, http_date
from stratum.s3.errors import STATUS, S3Error, code_of, not_implemented
from stratum.s3.request import S3Request
from stratum.s3.xml import error as error_body
from stratum.turn import turn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from stratum.volume import Volume

    Handler = Callable[[Context], Answer]

log = get_logger("s3")

# A sub-resource that S3 knows and this table does not is 501; a parameter that S3 does not know is ignored, as S3 does.
_UNBUILT = frozenset((
    "accelerate", "analytics", "cors", "encryption", "intelligent-tiering", "inventory", "legal-hold", "lifecycle", "logging", "metadataTable",
    "metadataConfiguration", "metrics", "notification", "object-lock", "ownershipControls", "policy", "policyStatus", "publicAccessBlock",
    "renameObject", "replication", "requestPayment", "restore", "retention", "select", "session", "tagging", "torrent", "website", "append",
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
    ("HEAD", ""): bucket_handlers.head_bucket,
    ("DELETE", ""): bucket_handlers.delete_bucket,
    ("POST", "delete"): object_write.delete_objects,
}
_OBJECT: dict[tuple[str, str], Handler] = {
    ("GET", ""): object_read.get_object,
    ("GET", "acl"): bucket_handlers.get_object_acl,
    ("GET", "attributes"): object_read.get_object_attributes,
    ("GET", "uploadId"): multipart_handlers.list_parts,
    ("HEAD", ""): object_read.head_object,
    ("PUT", ""): object_write.put_object,
    ("PUT", "acl"): bucket_handlers.put_object_acl,
    ("PUT", "uploadId"): multipart_handlers.upload_part,
    ("POST", "uploads"): multipart_handlers.create_upload,
    ("POST", "uploadId"): multipart_handlers.complete_upload,
    ("DELETE", ""): object_write.delete_object,
    ("DELETE", "uploadId"): multipart_handlers.abort_upload,
}
_SUBRESOURCES = frozenset(name for table in (_BUCKET, _OBJECT) for _, name in table if name) | _UNBUILT
_COMPUTING = frozenset(
    ("get_object", "head_object", "list_objects", "list_objects_v2", "list_versions", "list_buckets", "head_bucket")
)
"""Operations that wait for nothing but a page of the store; get_object lets go of the turn where it reads a disk."""
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
        raise S3Error("MethodNotAllowed", f"the method {method} is not allowed here", Method=method)
    query = request.query if request.raw_query else {}
    found = [name for name in query if name in _SUBRESOURCES]
    unbuilt = [name for name in found if name in _UNBUILT]
    if unbuilt:
        raise not_implemented(f"the sub-resource {unbuilt[0]}")
    if not request.bucket:
        if method == "GET" and not found:
            return list_handlers.list_buckets, "list_buckets"
        raise S3Error("MethodNotAllowed", "the service itself can only be listed", Method=method)
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
        and "HTTP_X_AMZ_COPY_SOURCE" in request.environ
        and name in {"", "uploadId"}
    ):
        handler = multipart_handlers.upload_part_copy if name else object_write.copy_object
    if handler is None:
        if not name and method == "POST":
            raise not_implemented("POST of a form")
        raise S3Error(
            "MethodNotAllowed",
            f"{method} is not allowed for this resource",
            Method=method,
            ResourceType=name or "OBJECT",
        )
    return handler, handler.__name__


class Application:
    """One a process. Plain WSGI: any server can host it."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._identities = Identities(volume)
        self._prefix = secrets.token_hex(4)
        self._numbers = itertools.count(1)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        started = time.perf_counter()
        request_id = f"{self._prefix}{next(self._numbers):08x}"
        operation, user = "", ""
        request: S3Request | None = None
        try:
            with turn:
                request = S3Request(environ, self._volume.config, request_id)
                handler, operation = route(request)
                with self._volume.snapshot() as reader:
                    identity = authenticate(request, self._identities, reader)
                    user = identity.user.name if identity.user else "-"
                    context = Context(self._volume, self._identities, self._volume.config, request, identity)
                    response = None
                    if operation in _COMPUTING:
                        context.reader = reader
                        response = handler(context)
                if response is None:
                    response = handler(context)
        except NotModified as error:
            response = empty(304, {"ETag": f'"{error.etag}"', "Last-Modified": http_date(error.mtime_ns)})
        except StratumError as error:
            response = self._refusal(environ, request, request_id, error)
        except Exception as error:
            log.exception("request_failed", request_id=request_id, operation=operation)
            response = self._refusal(
                environ,
                request,
                request_id,
                StratumError(f"internal error {type(error).__name__}; the log has request {request_id}"),
            )
        response.headers += (("x-amz-request-id", request_id), ("Server", "Stratum"))
        log.info(
            "request", request_id=request_id, method=environ["REQUEST_METHOD"], path=environ["PATH_INFO"].encode("latin-1").decode("utf-8", "replace"),
            operation=operation, status=response.status, user=user, ms=round((time.perf_counter() - started) * 1000, 2),
        )  # fmt: skip
        self._end_if_failed()
        return response.send(start_response, head=environ["REQUEST_METHOD"] == "HEAD")

    def _refusal(
        self, environ: dict[str, Any], request: S3Request | None, request_id: str, error: StratumError
    ) -> Answer:
        code = code_of(error)
        extra = dict(error.extra) if isinstance(error, S3Error) else {}
        status = STATUS[code]
        if code == "InternalError":
            log.error("internal_error", request_id=request_id, error=error.message)
        resource = request.resource if request is not None else environ.get("PATH_INFO", "")
        body = error_body(code, error.message, resource, request_id, extra)
        headers = [("Content-Type", "application/xml")]
        if code == "InvalidRange" and "ActualObjectSize" in extra:
            headers.append(("Content-Range", f"bytes */{extra['ActualObjectSize']}"))
        drain(environ)
        return Answer(status, headers, b"" if status == 304 else body)

    def _end_if_failed(self) -> None:
        """A disk refused to sync: nothing this process still believes can be trusted. Its supervisor starts another."""
        if self._volume.failed is not None:
            threading.Timer(0.5, os._exit, (70,)).start()


_DRAIN_BYTES_MAX = 8 * 1024 * 1024


def drain(environ: dict[str, Any]) -> None:
    """Read a little of a refused body, so that the client sees the answer instead of a reset. Not behind Expect."""
    length = environ.get("CONTENT_LENGTH") or ""
    if environ.get("HTTP_EXPECT") or not length.isdigit() or int(length) > _DRAIN_BYTES_MAX:
        return
    try:
        while environ["wsgi.input"].read(65536):
            pass
    except OSError:
        return
