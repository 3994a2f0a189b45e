"""How full the hot disks are, by psutil: bytes and inodes, with hysteresis.

A level is entered at its mark and left below the mark before it: relief that began above `high` goes on until `low`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from stratum.tiering.policy import LEVELS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from stratum.config import Config


@dataclass(slots=True, frozen=True)
class Usage:
    """Of one disk."""

    path: str
    total_bytes: int
    used_bytes: int
    used_percent: float
    inodes_percent: float

    @property
    def worst_percent(self) -> float:
        return max(self.used_percent, self.inodes_percent)


def measure(folder: Path) -> Usage:
    """Raises `OSError`. What only root may fill counts as used."""
    usage = psutil.disk_usage(str(folder))
    stat = os.statvfs(folder)
    inodes = 100.0 * (1 - stat.f_favail / stat.f_files) if stat.f_files else 0.0
    used = usage.total - usage.free
    return Usage(str(folder), usage.total, used, 100.0 * used / usage.total if usage.total else 100.0, inodes)


class Gauge:
    """The level of each hot disk; `measure_one` is replaced in tests."""

    def __init__(self, folders: list[Path], config: Config, measure_one: Callable[[Path], Usage] = measure) -> None:
        self._folders = folders
        self._marks = (config.tiering_low_percent, config.tiering_high_percent, config.tiering_emergency_percent)
        self._measure = measure_one
        self._levels: dict[str, str] = {}
        self.usages: list[Usage] = []

    def look(self) -> str:
        """The worst level. Raises `OSError` if a disk cannot be asked."""
        self.usages = [self._measure(folder) for folder in self._folders]
        for usage in self.usages:
            self._levels[usage.path] = self._level(usage.worst_percent, self._levels.get(usage.path, "ok"))
        return max(self._levels.values(), key=LEVELS.index)

    def _level(self, percent: float, before: str) -> str:
        low, high, emergency = self._marks
        if percent >= emergency:
            return "emergency"
        if percent >= high:
            return "emergency" if before == "emergency" else "high"
        if percent >= low:
            return "high" if before in {"high", "emergency"} else "low"
        return "ok"

    def excess_bytes(self) -> int:
        """How many bytes must go until every disk is at `low`."""
        return sum(max(int(usage.used_bytes - usage.total_bytes * self._marks[0] / 100), 0) for usage in self.usages)

    def full_folders(self) -> set[int]:
        """Numbers of the disks at or above `low` after having been above `high`."""
        return {number for number, usage in enumerate(self.usages) if self._levels[usage.path] in {"high", "emergency"}}
