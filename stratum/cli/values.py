"""What an option of the command line may be: each number has a range, and a refusal says it with an example."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from stratum import iso_dates
from stratum.config_rules import is_address

if TYPE_CHECKING:
    from collections.abc import Callable

WHOLE_MAX = (1 << 63) - 1
DURATION_S_MAX = 36525 * 86400.0
"""A hundred years."""
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_NUMBER = re.compile(r"[0-9]{1,18}(\.[0-9]{1,9})?(e[0-9]{1,2})?")


def _refuse(text: str, wanted: str, example: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"{text!r} is not {wanted}; write for instance {example}")


def whole(least: int = 0, most: int = WHOLE_MAX, *, example: str = "10") -> Callable[[str], int]:
    """ASCII digits, within a range."""

    def parse(text: str) -> int:
        digits = text.isascii() and text.isdigit() and len(text) <= 19
        if not digits or not least <= int(text) <= most:
            raise _refuse(text, f"a whole number from {least} to {most}", example)
        return int(text)

    return parse


def number(least: float, most: float, *, example: str) -> Callable[[str], float]:
    """A decimal number that is finite, within a range."""

    def parse(text: str) -> float:
        if not _NUMBER.fullmatch(text) or not least <= float(text) <= most:
            raise _refuse(text, f"a number from {least:g} to {most:g}", example)
        return float(text)

    return parse


def octal(most: int = 0o7777) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-7]{1,5}", text) or int(text, 8) > most:
            raise _refuse(text, f"an octal mode from 0 to {most:o}", "0640")
        return int(text, 8)

    return parse


def duration(text: str) -> float:
    """Seconds of text like 90s, 15m, 4h or 2d."""
    digits, unit = text[:-1], text[-1:]
    seconds = -1.0
    if unit in _UNITS and digits.isascii() and digits.isdigit() and len(digits) <= 12:
        seconds = float(digits) * _UNITS[unit]
    if not 0 <= seconds <= DURATION_S_MAX:
        raise _refuse(text, "a whole number and one of s, m, h, d, up to a hundred years", "24h")
    return seconds


def moment(text: str) -> str:
    """A date, or a date and a time; what it is compared with is text."""
    if text and iso_dates.seconds(text) is None:
        raise _refuse(text, "a date or a time in UTC", "2026-11-24 or 2026-11-24T12:00:00Z")
    return text


def address(text: str) -> str:
    if text and not is_address(text):
        raise _refuse(text, "an e-mail address", "ada@example.org")
    return text
