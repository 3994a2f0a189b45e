"""The ASGI application of the admin listener. It reads, and changes nothing.

On a loopback address it is open to who can reach that, but not to a web page somebody visits: the Host header must name a
loopback address. Elsewhere a bearer token is asked for, or TLS has asked for a certificate already.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from stratum.config import is_loopback, parse_listen
from stratum.errors import ConfigInvalid
from stratum.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from stratum.admin.watch import Watch
    from stratum.config import Config

TOKEN_CHARACTERS_MIN = 16
TEXT = "text/plain; charset=utf-8"
log = get_logger("admin")


class Refused(Exception):
    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


def read_token(path: Path) -> str:
    """Raises `ConfigInvalid`."""
    try:
        mode = path.stat().st_mode
        token = path.read_text().strip()
    except OSError as error:
        raise ConfigInvalid(f"the token file {path} cannot be read: {error.strerror}") from error
    if mode & 0o077:
        raise ConfigInvalid(f"others may read the token file {path}; chmod 600 {path}")
    if len(token) < TOKEN_CHARACTERS_MIN:
        raise ConfigInvalid(
            f"the token in {path} is shorter than {TOKEN_CHARACTERS_MIN} characters; `openssl rand -hex 32` makes a good one"
        )
    return token


class Application:
    """`token` empty: none is asked for."""

    def __init__(self, config: Config, watch: Watch, token: str) -> None:
        self._local = is_loopback(parse_listen(config.admin_listen, "admin.listen")[0])
        self._token = token
        self._watch = watch

    async def __call__(
        self, scope: dict[str, Any], _receive: object, send: Callable[[dict[str, Any]], Awaitable[None]]
    ) -> None:
        if scope["type"] != "http":
            return
        extra: list[tuple[bytes, bytes]] = []
        try:
            status, kind, body = await self._answer(scope)
        except Refused as refused:
            status, kind, body = refused.status, TEXT, refused.message + "\n"
            if status == HTTPStatus.UNAUTHORIZED:
                extra.append((b"www-authenticate", b'Bearer realm="stratum"'))
        except Exception:
            log.exception("admin_request_failed", path=scope["path"])
            status, kind, body = HTTPStatus.INTERNAL_SERVER_ERROR, TEXT, "internal error; see the log\n"
        data = body.encode()
        headers = [
            (b"content-type", kind.encode()), (b"content-length", str(len(data)).encode()), (b"cache-control", b"no-store"),
            (b"x-content-type-options", b"nosniff"), (b"connection", b"close"), *extra,
        ]  # fmt: skip
        await send({"type": "http.response.start", "status": int(status), "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else data})

    def _admit(self, scope: dict[str, Any]) -> None:
        headers = dict(scope["headers"])
        if self._local:
            host = headers.get(b"host", b"").decode("latin-1")
            name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
            if not is_loopback(name.strip("[]")):
                raise Refused(HTTPStatus.MISDIRECTED_REQUEST, "this address answers to loopback names only")
        if self._token:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._token.encode()):
                raise Refused(HTTPStatus.UNAUTHORIZED, "a bearer token is needed: that of admin.token_file")

    async def _answer(self, scope: dict[str, Any]) -> tuple[HTTPStatus, str, str]:
        self._admit(scope)
        if scope["method"] not in {"GET", "HEAD"}:
            raise Refused(HTTPStatus.METHOD_NOT_ALLOWED, "GET and HEAD only")
        match scope["path"]:
            case "/health/live":
                return HTTPStatus.OK, TEXT, "live\n"
            case "/health/ready":
                facts = await asyncio.to_thread(self._watch.readiness)
                status = HTTPStatus.OK if facts["ready"] else HTTPStatus.SERVICE_UNAVAILABLE
                return status, "application/json", json.dumps(facts) + "\n"
            case "/health":
                return HTTPStatus.OK, "application/json", json.dumps(self._watch.report()) + "\n"
            case "/metrics":
                text = await asyncio.to_thread(self._watch.gatherer.exposition)
                return HTTPStatus.OK, "text/plain; version=0.0.4; charset=utf-8", text
        raise Refused(HTTPStatus.NOT_FOUND, "there are /health/live, /health/ready, /health and /metrics")
