"""Named points between the steps of long work, where tests and drills may interrupt it.

`STRATUM_FAULT=NAME:COUNT` ends the process, as kill -9 would, the COUNT-th time it comes to NAME. Tests in the same process set
`hook` instead.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

hook: Callable[[str], None] | None = None
_seen: Counter[str] = Counter()
_lock = threading.Lock()


def boundary(name: str) -> None:
    """Every step before this point has been done, none behind it."""
    if hook is not None:
        hook(name)
    wanted = os.environ.get("STRATUM_FAULT", "")
    if wanted:
        point, _, count = wanted.partition(":")
        with _lock:
            _seen[name] += 1
            if point == name and _seen[name] == int(count or "1"):
                os.kill(os.getpid(), signal.SIGKILL)
