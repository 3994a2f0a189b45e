"""Which signals end a process's wait for an answer of the mount.

The kernel interrupts a request for any signal, and a request that is answered with EINTR fails the system call with it, even if the handler
was set with SA_RESTART: the kernel takes no other number from us. Programs do not expect that of regular files, so only what is
to end the process ends its wait: a signal that kills it, and one of those by which a process is asked to end, whether or not it has a
handler. All others are delivered when the call returns, as they are on other network file systems.
"""

from __future__ import annotations

import signal
from pathlib import Path


def _bit(number: int) -> int:
    return 1 << number - 1


ASKED_TO_END = sum(map(_bit, (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGKILL)))
HARMLESS = sum(
    map(
        _bit,
        (signal.SIGCHLD, signal.SIGCONT, signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGURG, signal.SIGWINCH),
    )
)  # fmt: skip
"""Those that a process without a handler survives, stopped perhaps (signal(7))."""


def end_a_wait(process: int) -> bool:
    """Whether a thread (or process) has such a signal pending; also if that cannot be known."""
    try:
        return are_ending((Path("/proc") / str(process) / "status").read_text())
    except OSError:  # it is gone, or lives where this process cannot see it
        return True


def are_ending(status: str) -> bool:
    """Whether the signals that are pending by proc(5)'s `status` end a wait."""
    masks = {"SigPnd": 0, "ShdPnd": 0, "SigBlk": 0, "SigIgn": 0, "SigCgt": 0}
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name in masks:
            masks[name] = int(value, 16)
    pending = (masks["SigPnd"] | masks["ShdPnd"]) & ~masks["SigBlk"] & ~masks["SigIgn"]
    return bool(pending & ASKED_TO_END or pending & ~masks["SigCgt"] & ~HARMLESS)
