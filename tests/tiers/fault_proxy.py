"""An HTTP proxy in front of a remote that fails as told: for tests of what real networks do."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

HANG_S = 30.0


class FaultProxy:
    """`plan(method, path, number)` names what happens to the number-th request: "" or

    refuse      the connection is closed at once
    hang        nothing is ever answered
    503, 403    that status instead of asking the remote
    truncate    half of the answer's body, then the end
    flip        one bit of the answer's body is wrong
    flip-put    one bit of the request's body is wrong
    lose        the remote is asked, its answer is lost
    """

    def __init__(self, target: str) -> None:
        self._target = target.removeprefix("http://")
        self.plan: Callable[[str, str, int], str] = lambda _method, _path, _number: ""
        self.requests: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                return

            def _any(self) -> None:
                proxy.serve(self)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _any  # noqa: N815  what http.server calls

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        with self._lock:
            self.requests.append((handler.command, handler.path))
            fault = self.plan(handler.command, handler.path, len(self.requests))
        body = self._body(handler)
        if fault == "refuse":
            self._drop(handler)
            return
        if fault == "hang":
            time.sleep(HANG_S)
            self._drop(handler)
            return
        if fault.isdigit():
            handler.send_response(int(fault))
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        if fault == "flip-put" and body:
            body = _flipped(body)
        connection = http.client.HTTPConnection(self._target, timeout=30)
        headers = {
            name: value
            for name, value in handler.headers.items()
            if name.lower() not in {"expect", "transfer-encoding"}
        }
        headers["Content-Length"] = str(len(body))
        connection.request(handler.command, handler.path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        if fault == "lose":
            self._drop(handler)
            return
        if fault == "flip" and data:
            data = _flipped(data)
        handler.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in {"transfer-encoding", "connection", "content-length", "server", "date"}:
                handler.send_header(name, value)
        length = answer.getheader("Content-Length") if handler.command == "HEAD" else str(len(data))
        handler.send_header("Content-Length", length or "0")
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(data[: len(data) // 2] if fault == "truncate" else data)
        if fault == "truncate":
            self._drop(handler)

    @staticmethod
    def _body(handler: BaseHTTPRequestHandler) -> bytes:
        if handler.headers.get("Expect", "").lower() == "100-continue":
            handler.send_response_only(100)
            handler.end_headers()
        return handler.rfile.read(int(handler.headers.get("Content-Length") or 0))

    @staticmethod
    def _drop(handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        try:
            handler.wfile.flush()
            handler.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes((data[middle] ^ 1,)) + data[middle + 1 :]
