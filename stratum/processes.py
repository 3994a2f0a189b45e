"""Processes: facts about them, and keeping children alive."""

from __future__ import annotations

import ctypes
import os
import pwd
import resource
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import psutil

from stratum import metrics
from stratum.config import CONFIG_NAME
from stratum.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

RESTART_PAUSE_S = 0.1
RESTART_PAUSE_S_MAX = 10.0
YOUNG_S = 10.0
log = get_logger("processes")

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Ask the kernel to end this process when its parent ends, however it ends."""
    parent = os.getppid()
    _libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def become_owner(volume: Path | None) -> None:
    """As root, go on as whoever a volume's metadata belongs to: a file that root leaves there locks its services out.

    Call it before there are threads.
    """
    if volume is None or os.geteuid() != 0:
        return
    try:
        owner = next(
            path.stat() for path in (volume / "meta", volume) if (volume / CONFIG_NAME).exists() and path.exists()
        )
    except (OSError, StopIteration):
        return
    if owner.st_uid == 0:
        return
    try:
        os.initgroups(pwd.getpwuid(owner.st_uid).pw_name, owner.st_gid)
    except KeyError:
        os.setgroups([])
    os.setgid(owner.st_gid)
    os.setuid(owner.st_uid)
    # The kernel gives /proc/self of a process that changed its user to root; ours is still to be looked into.
    _libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)


def raise_descriptor_limit() -> int:
    """Allow as many open files as the system lets this process have; how many that are."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def proportional_bytes(pids: list[int]) -> int:
    """Memory of processes, shared pages divided among their users (PSS)."""
    total = 0
    for pid in pids:
        try:
            total += psutil.Process(pid).memory_full_info().pss
        except psutil.Error:
            continue
    return total


class KeptProcess:
    """One place for a child: started again when it ends, later each time while it keeps ending young."""

    def __init__(
        self,
        role: str,
        words: list[str],
        *,
        descriptors: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`words` are arguments of this Python; the child inherits `descriptors` and nothing else that is open."""
        self.role = role
        self._words = words
        self._descriptors = descriptors
        self._environment = environment
        self._pause_s = RESTART_PAUSE_S
        self._not_before_s = 0.0
        self._started_s = 0.0
        self.process: subprocess.Popen[bytes] | None = None

    def keep_alive(self) -> None:
        """Start it if it is not there and its pause is over. Never blocks."""
        now = time.monotonic()
        if self.process is not None and self.process.poll() is not None:
            metrics.RESTARTS.add()
            log.warning("process_ended", role=self.role, pid=self.process.pid, code=self.process.returncode)
            young = now - self._started_s < YOUNG_S
            self._pause_s = min(self._pause_s * 2, RESTART_PAUSE_S_MAX) if young else RESTART_PAUSE_S
            self.process, self._not_before_s = None, now + self._pause_s
        if self.process is None and now >= self._not_before_s:
            self._started_s = now
            self.process = subprocess.Popen(
                [sys.executable, "-P", *self._words], pass_fds=self._descriptors, stdin=subprocess.DEVNULL, stdout=sys.stderr,
                env=self._environment,
            )  # fmt: skip
            log.info("process_started", role=self.role, pid=self.process.pid)


def end_all(kept: Sequence[KeptProcess], grace_s: float) -> None:
    """Ask all of them to end, the last one first; kill what is left after `grace_s`."""
    processes = [(place.role, place.process) for place in reversed(kept) if place.process is not None]
    for _, process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + grace_s
    for role, process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            log.error("process_killed", role=role, pid=process.pid)
            process.kill()
            process.wait()
