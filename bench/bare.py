"""The yardstick: a Granian + Werkzeug application that answers every request from memory and checks nothing."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from werkzeug.wrappers import Request, Response

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

BODY = b"x" * 4096


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    request = Request(environ)
    if request.method == "PUT":
        while environ["wsgi.input"].read(1 << 20):
            pass
    headers = {"ETag": '"' + "0" * 32 + '"', "Last-Modified": "Mon, 23 Nov 2026 12:00:00 GMT"}
    return Response(BODY, headers=headers)(environ, start_response)


def main() -> None:
    from granian import Granian
    from granian.constants import HTTPModes, Interfaces

    Granian(
        "bench.bare:application", address="127.0.0.1", port=int(sys.argv[1]), interface=Interfaces.WSGI, workers=2, blocking_threads=8,
        http=HTTPModes.http1, websockets=False, log_enabled=False,
    ).serve()  # fmt: skip


if __name__ == "__main__":
    main()
