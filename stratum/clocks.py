"""Waiting by the wall clock, which may leap.

Pauses that outlive a process are kept as moments of the wall clock. When it is set back afterwards, by three days say, a
moment that was a minute ahead is three days ahead: a retry, a daily task or an alert would be put off that long.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable

STAMP = "%Y%m%d-%H%M%S"
"""In UTC; texts of it have the order of time."""
_STAMPED = re.compile(r"(?<!\d)\d{8}-\d{6}(?!\d)")
AHEAD_S_MAX = 3600.0
N = TypeVar("N")


def by_stamp(names: Iterable[N], now_s: float | None = None) -> list[N]:
    """Names that tell when something was made, the oldest first.

    Those from the future come before all others: the clock was wrong then, and what was made since must not be taken for older, or removed
    in their favour.
    """
    latest = time.strftime(STAMP, time.gmtime((time.time() if now_s is None else now_s) + AHEAD_S_MAX))

    def order(name: N) -> tuple[bool, str]:
        found = _STAMPED.findall(str(name))
        stamp = found[-1] if found else ""
        return stamp <= latest, stamp

    return sorted(names, key=order)


def come(until_s: float, now_s: float, wait_s_max: float) -> bool:
    """Whether `until_s` has come, or is further ahead than the `wait_s_max` seconds that were waited for at most."""
    return not until_s - wait_s_max <= now_s < until_s


class LeapWatch:
    """Tells when the wall clock leapt against the monotonic one; half of a leap is believed each time it is looked at.

    A machine that slept leaps too: its monotonic clock stands still meanwhile.
    """

    def __init__(self, wall_s: float, monotonic_s: float, least_s: float) -> None:
        self._offset_s = wall_s - monotonic_s
        self._least_s = least_s

    def leapt_s(self, wall_s: float, monotonic_s: float) -> float:
        """How far, if at least `least_s`; else 0."""
        offset_s = wall_s - monotonic_s
        leap_s = offset_s - self._offset_s
        if abs(leap_s) < self._least_s:
            self._offset_s = offset_s
            return 0.0
        self._offset_s += leap_s / 2
        return leap_s
