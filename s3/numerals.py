"""Whole numbers as clients write them: ASCII digits and nothing else. Pure.

`str.isdigit` takes superscripts, `int` takes signs, blanks, underscores and digits of any script, and refuses 5,000 of them.
"""

from __future__ import annotations

WHOLE_MAX = (1 << 63) - 1
_DIGITS_MAX = 19


def are_digits(text: str) -> bool:
    """At least one, and nothing else."""
    return text.isascii() and text.isdigit()


def whole(text: str, most: int = WHOLE_MAX) -> int | None:
    """The number; None if it is none, or more than `most`."""
    if not are_digits(text) or (len(text) > _DIGITS_MAX and len(text.lstrip("0")) > _DIGITS_MAX):
        return None
    number = int(text[-_DIGITS_MAX:])
    return number if number <= most else None


def clamped(text: str) -> int:
    """The number that `are_digits` said there is, at most `WHOLE_MAX`: for positions, which may lie behind any end."""
    number = whole(text)
    return WHOLE_MAX if number is None else number
