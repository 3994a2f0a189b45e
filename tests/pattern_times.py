"""Match each pattern of stdin against repetitions of its own alphabet, under a limit of processor time. Ends with 1 if one is slow.

Run in a process of its own, which can be killed: a pattern that backtracks exponentially does not return.
"""

from __future__ import annotations

import json
import re
import re._constants as kinds  # type: ignore[import-not-found]  # private, and the one reader of patterns there is
import re._parser as parser  # type: ignore[import-not-found]
import signal
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

CHARACTERS = 16 * 1024
LIMIT_S = 0.25
"""A linear match of that length takes less than a millisecond, a quadratic one a second and more."""
_OF_CATEGORY = {"DIGIT": "7", "SPACE": " ", "WORD": "a", "NOT_DIGIT": "x", "NOT_SPACE": "x", "NOT_WORD": "-"}


class TooSlow(Exception):
    """Raised by the timer in the middle of a match."""


def _slow(*_: object) -> None:
    raise TooSlow


def _characters(items: Any) -> Iterator[str]:
    """What the parts of a pattern name."""
    for kind, value in items:
        if kind in {kinds.LITERAL, kinds.NOT_LITERAL}:
            yield chr(value)
        elif kind is kinds.RANGE:
            yield from (chr(value[0]), chr(value[1]))
        elif kind is kinds.CATEGORY:
            yield _OF_CATEGORY[str(value).removeprefix("CATEGORY_")]
        elif kind is kinds.IN:
            yield from _characters(value)
        elif kind is kinds.ANY:
            yield "x"
        else:
            yield from (found for inner in _inner(kind, value) for found in _characters(inner))


def _inner(kind: Any, value: Any) -> list[Any]:
    if kind is kinds.BRANCH:
        return list(value[1])
    if kind is kinds.SUBPATTERN:
        return [value[3]]
    if kind in {kinds.MAX_REPEAT, kinds.MIN_REPEAT, kinds.POSSESSIVE_REPEAT}:
        return [value[2]]
    if kind in {kinds.ASSERT, kinds.ASSERT_NOT}:
        return [value[1]]
    return [value] if kind is kinds.ATOMIC_GROUP else []


def _sample(items: Any) -> str:
    """A short text that the parts may match."""
    text = ""
    for kind, value in items:
        if kind in {kinds.MAX_REPEAT, kinds.MIN_REPEAT, kinds.POSSESSIVE_REPEAT}:
            text += _sample(value[2]) * max(1, min(int(value[0]), 20))
        elif kind in {kinds.LITERAL, kinds.IN, kinds.ANY}:
            text += next((c for c in _characters([(kind, value)])), "")
        elif kind not in {kinds.ASSERT, kinds.ASSERT_NOT, kinds.AT}:
            text += "".join(_sample(inner) for inner in _inner(kind, value)[:1])
    return text


def texts(pattern: str | bytes, flags: int) -> Iterator[str]:
    """Beginnings of what matches, then one or two characters many times, then something that does not match."""
    tree = parser.parse(pattern, flags)
    alphabet = sorted(set(_characters(tree)))[:12]
    beginnings = {_sample(tree[:at]) for at in range(len(tree) + 1)} | {""}
    units = [*alphabet, *(a + b for a in alphabet for b in alphabet if a != b)]
    for beginning in sorted(beginnings):
        for unit in units:
            for end in ("", "\0"):
                yield beginning + unit * (CHARACTERS // len(unit)) + end
                yield beginning + unit * (60 // len(unit)) + end


def main() -> int:
    signal.signal(signal.SIGVTALRM, _slow)
    slow = 0
    for name, text, is_bytes, flags, methods in json.load(sys.stdin):
        pattern = text.encode("latin-1") if is_bytes else text
        print(name, text, flush=True)  # the last one shows where a process that was killed hung
        compiled: Any = re.compile(pattern, flags)
        for subject in texts(pattern, flags):
            for method in methods:
                call = getattr(compiled, method)
                arguments = ("", subject) if method.startswith("sub") else (subject,)
                words = [word.encode("latin-1", "replace") if is_bytes else word for word in arguments]
                signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT_S)
                try:
                    call(*words)
                except TooSlow:
                    print(f"SLOW: {name}: {method} of {text!r} on {subject[:40]!r}...", flush=True)
                    slow = 1
                    break
                finally:
                    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            else:
                continue
            break
    return slow


if __name__ == "__main__":
    sys.exit(main())
