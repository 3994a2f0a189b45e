"""An HTTP answer: status, headers, body. Plain WSGI.

Werkzeug's Response validates and copies every header twice; at 12 headers that was 35 of 170 us of a small GET. Names are
ours and values are checked where they enter the volume, so nothing is lost by passing them on as they are; what a request
can put into a header directly (response- overrides) is checked in object_read.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_STATUS = {status.value: f"{status.value} {status.phrase}" for status in HTTPStatus}


class Answer:
    """`headers` is a list of (name, value); Content-Length is added for bodies of bytes unless it is there."""

    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int, headers: list[tuple[str, str]], body: bytes | Iterable[bytes] = b"") -> None:
        self.status = status
        self.headers = headers
        self.body = body

    def send(self, start_response: Callable[..., Any], *, head: bool) -> Iterable[bytes]:
        body = self.body
        if isinstance(body, bytes):
            if self.status not in {204, 304} and not any(name == "Content-Length" for name, _ in self.headers):
                self.headers.append(("Content-Length", str(len(body))))
            body = (body,) if body and not head else ()
        start_response(_STATUS[self.status], self.headers)
        return () if head else body


def xml(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    return Answer(status, [("Content-Type", "application/xml"), *(headers or {}).items()], body)


def empty(status: int = 204, headers: dict[str, str] | None = None) -> Answer:
    return Answer(status, list((headers or {}).items()))
