"""What is mounted where, as the kernel's table says it (proc_pid_mountinfo(5)). Reading it asks no file system anything."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

FUSE_TYPE = "fuse.stratum"
"""The type of every mount of ours, whoever made it."""
_OCTAL = re.compile(rb"\\([0-7]{3})")


@dataclass(slots=True, frozen=True)
class Mount:
    """One line of the table. `root` is the path in the file system that is shown at `path`.

    `id` is given out again when the mount is gone; `stratum/mounts.py` knows one that is not.
    """

    id: int
    parent: int
    device: str
    root: str
    path: str
    file_system: str
    source: str
    options: frozenset[str]

    @property
    def minor(self) -> int:
        """Of the device: the number of a FUSE connection."""
        return int(self.device.partition(":")[2])

    @property
    def is_stratum(self) -> bool:
        return self.file_system == FUSE_TYPE


def _text(field: bytes) -> str:
    """The kernel writes blanks, tabs, line feeds and backslashes as three octal digits, every other byte as it is."""
    return os.fsdecode(_OCTAL.sub(lambda found: bytes((int(found[1], 8),)), field))


def mounts(table: Path = Path("/proc/self/mountinfo")) -> list[Mount]:
    found = []
    for line in table.read_bytes().splitlines():
        fields = line.split(b" ")
        at = fields.index(b"-", 6)
        options = frozenset(_text(fields[at + 3]).split(",")) if len(fields) > at + 3 else frozenset()
        found.append(
            Mount(
                int(fields[0]), int(fields[1]), _text(fields[2]), _text(fields[3]), _text(fields[4]),
                _text(fields[at + 1]), _text(fields[at + 2]), options,
            )
        )  # fmt: skip
    return found


def stacked_at(path: str) -> list[Mount]:
    """The mounts at a path, the one that is reached through it last."""
    here = {mount.id: mount for mount in mounts() if mount.path == path}
    above = {mount.parent: mount for mount in here.values()}
    lowest = next((mount for mount in here.values() if mount.parent not in here), None)
    stack = []
    while lowest is not None and lowest not in stack:
        stack.append(lowest)
        lowest = above.get(lowest.id)
    return stack


def mount_at(path: str) -> Mount | None:
    """The topmost mount at a path."""
    stack = stacked_at(path)
    return stack[-1] if stack else None
