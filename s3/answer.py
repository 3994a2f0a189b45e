"""An HTTP answer: status, headers, body.

Werkzeug's Response validates and copies every header twice; at 12 headers that was 35 of 170 us of a small GET. Names are
ours and values are checked where they enter the volume, so nothing is lost by passing them on as they are; what a request
can put into a header directly (response- overrides) is checked in object_read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stratum.descriptors import WouldRecall

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import ExitStack

    from stratum.content import PlannedRead
    from stratum.deadlines import Deadline


class Stream:
    """A body too long for memory. `guard` keeps its extents from being reclaimed until it is sent or dropped.

    `begin` and `read` block; they run in threads, one at a time. `read` returns nothing at the end.
    """

    def __init__(
        self,
        pieces: PlannedRead,
        guard: ExitStack,
        began: Callable[[], None] | None = None,
        deadline: Deadline | None = None,
    ) -> None:
        """`began` is called when the first piece is there. `deadline` is the one of `pieces`: each piece after the first is waited for anew."""
        self._began = began
        self._pieces = pieces
        self._guard = guard
        self._deadline = deadline
        self.first: bytes | memoryview = b""
        self.begun = False
        pieces.may_recall = False

    @property
    def recalls(self) -> bool:
        """Whether remotes may be waited for: a thread that does is lost to everybody else meanwhile."""
        return self._pieces.may_recall

    @recalls.setter
    def recalls(self, value: bool) -> None:
        self._pieces.may_recall = value

    def begin(self) -> bytes | memoryview:
        """Read the first piece. Raises what `PlannedRead` does; but for `WouldRecall` the stream is closed then."""
        try:
            self.first = self.read()
        except WouldRecall:
            raise
        except BaseException:
            self.close()
            raise
        self.begun = True
        if self._began is not None:
            self._began()
        return self.first

    def read(self) -> bytes | memoryview:
        if self.begun and self._deadline is not None:
            self._deadline.renew()
        return next(self._pieces, b"")

    def give_up(self) -> None:
        """Nobody wants the rest: a read that waits for a remote ends."""
        if self._deadline is not None:
            self._deadline.give_up()

    def close(self) -> None:
        self.give_up()
        self._guard.close()

    def __del__(self) -> None:
        self.close()


class Answer:
    """`headers` is a list of (name, value); Content-Length is added for bodies of bytes unless it is there."""

    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int, headers: list[tuple[str, str]], body: bytes | Stream = b"") -> None:
        self.status = status
        self.headers = headers
        self.body = body


def xml(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    return Answer(status, [("Content-Type", "application/xml"), *(headers or {}).items()], body)


def empty(status: int = 204, headers: dict[str, str] | None = None) -> Answer:
    return Answer(status, list((headers or {}).items()))
