"""`python -m bench.line ENDPOINT LATENCY_S`: a way to a server as a network is one; prints its own endpoint, and runs until it is ended.

A process of its own: threads beside the client that is measured would take its interpreter from it.
"""

from __future__ import annotations

import queue
import socket
import sys
import threading
import time
from contextlib import suppress

LINE_BYTES_PER_S = 125_000_000
PIECE_BYTES = 128 * 1024
UNDERWAY_PIECES_MAX = 200


class Line:
    """A way to a server that carries so many bytes a second back, whoever asks; they arrive `latency_s` later."""

    def __init__(self, endpoint: str, latency_s: float = 0.0) -> None:
        host, port = endpoint.removeprefix("http://").split(":")
        self._server = (host, int(port))
        self._latency_s = latency_s
        self._lock = threading.Lock()
        self._free_at = 0.0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            far = socket.create_connection(self._server)
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            underway: queue.Queue[tuple[float, bytes]] = queue.Queue(UNDERWAY_PIECES_MAX)
            for work, ends in (
                (self._there, (near, far)),
                (self._enter, (far, underway)),
                (self._arrive, (underway, near)),
            ):
                threading.Thread(target=work, args=ends, daemon=True).start()

    @staticmethod
    def _there(near: socket.socket, far: socket.socket) -> None:
        with suppress(OSError):
            while data := near.recv(PIECE_BYTES):
                far.sendall(data)
        with suppress(OSError):
            far.shutdown(socket.SHUT_WR)

    def _enter(self, far: socket.socket, underway: queue.Queue[tuple[float, bytes]]) -> None:
        with suppress(OSError):
            while data := far.recv(PIECE_BYTES):
                with self._lock:
                    self._free_at = max(self._free_at, time.monotonic()) + len(data) / LINE_BYTES_PER_S
                    through = self._free_at
                time.sleep(max(through - time.monotonic(), 0.0))
                underway.put((through + self._latency_s, data))
        underway.put((0.0, b""))

    @staticmethod
    def _arrive(underway: queue.Queue[tuple[float, bytes]], near: socket.socket) -> None:
        while True:
            due, data = underway.get()
            time.sleep(max(due - time.monotonic(), 0.0))
            with suppress(OSError):
                if not data:
                    near.shutdown(socket.SHUT_WR)
                    return
                near.sendall(data)


def main() -> None:
    line = Line(sys.argv[1], float(sys.argv[2]))
    print(line.endpoint, flush=True)
    line.accept()


if __name__ == "__main__":
    main()
