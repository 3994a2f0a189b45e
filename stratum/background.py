"""A command that goes on behind the shell: it returns to whoever called it when its work is ready.

The child keeps the caller's standard error until then, so that what goes wrong is seen; after it, lines go to syslog.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def run(work: Callable[[Callable[[], None]], int], tag: str) -> int:
    """Call `work(ready)` in a child of its own session; 0 once it called `ready`, else its exit code. Call it before there are threads."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        with open(reading, "rb") as told:  # noqa: PTH123  a descriptor
            if told.read(1):
                return 0
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or 1
    os.close(reading)
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)

    def ready() -> None:
        sys.stdout.flush()
        os.dup2(nothing, 1)
        os.dup2(_syslog(tag, nothing), 2)
        os.write(writing, b"1")
        os.close(writing)

    return work(ready)


def _syslog(tag: str, nothing: int) -> int:
    """Where to write lines for syslog; nowhere if this system has no way to it."""
    logger = shutil.which("logger")
    if logger is None:
        return nothing
    words = [logger, "--tag", tag, "--socket-errors=off"]
    started = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=nothing, stderr=nothing)
    assert started.stdin is not None
    return os.dup(started.stdin.fileno())
