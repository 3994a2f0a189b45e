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
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from stratum import counting, metrics
from stratum.config import CONFIG_NAME
from stratum.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

RESTART_PAUSE_S = 0.1
RESTART_PAUSE_S_MAX = 10.0
YOUNG_S = 10.0
CANNOT_RUN = 3
"""`stratum.cli.exit_codes.COULD_NOT_RUN`: what it needs is not there."""
REFUSALS_MAX = 5
"""How often one that was ready before may say so: what it needs may be on its way back."""
SILENT_S_MAX = 45.0
"""Between two beats of a loop that beats four times a second. A disk that hangs is waited for in threads; a machine that swaps, or whose
processors many want, was seen to hold a loop up for some seconds. Below the 60 s of the units' watchdog, which ends the parent with it."""
LOOK_AT_BEATS_S = 1.0
TELL_AGAIN_S = 1.0
KILLED_S_MAX = 10.0
CLOCK_S_MAX = 300.0
"""How far the wall clock may have leapt back since."""
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


def _stat(pid: int) -> tuple[str, float]:
    """(state, seconds since 1970 at which it began) of a process (proc_pid_stat(5)). Raises `OSError`."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    began_s = float(fields[19]) / os.sysconf("SC_CLK_TCK")
    return fields[0], time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + began_s


def is_ending(pid: int, started_s: float) -> bool:
    """Whether a process that had begun by `started_s` was killed and cannot end, because the kernel holds a thread of it.

    Its age is compared so that nobody takes a later process of that number for it.
    """
    try:
        state, began_s = _stat(pid)
        threads = len(os.listdir(f"/proc/{pid}/task"))  # noqa: PTH208  of the kernel's memory, names only
    except OSError:
        return False
    return state in {"Z", "X"} and threads > 1 and began_s < started_s + CLOCK_S_MAX


class CannotRun(Exception):
    """A child says that it cannot run, and never could."""


class KeptProcess:
    """One place for a child: started again when it ends, later each time while it keeps ending before it was of use."""

    def __init__(
        self,
        role: str,
        words: list[str],
        *,
        descriptors: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
        cannot_end: Callable[[int], None] = lambda _: None,
        beats_in: Path | None = None,
        says_ready: bool = False,
    ) -> None:
        """`words` are arguments of this Python; the child inherits `descriptors` and nothing else that is open.

        `beats_in`: where it counts (`counting.py`); there its loop must give a sign of life every SILENT_S_MAX, from
        when it is ready if it `says_ready`.
        `cannot_end` is told the number of a process that was killed and is still there: a thread of it may wait in the kernel.
        """
        self.role = role
        self._cannot_end = cannot_end
        self._beats_in = beats_in
        self._says_ready = says_ready
        self._looked_s = 0.0
        self._told_s = 0.0
        self._was_ready = False
        """This process; `_ready_once`: or one before it."""
        self._ready_once = False
        self._refusals = 0
        self.status = ""
        """What it said last."""
        self._words = words
        self._descriptors = descriptors
        self._environment = environment
        self._pause_s = RESTART_PAUSE_S
        self._not_before_s = 0.0
        self._started_s = 0.0
        self.process: subprocess.Popen[bytes] | None = None

    def is_ready(self) -> None:
        """It said that it does its work."""
        self._was_ready = self._ready_once = True

    def keep_alive(self) -> None:
        """Start it if it is not there and its pause is over. Never blocks. Raises `CannotRun`."""
        now = time.monotonic()
        self._end_if_silent(now)
        self._end_what_holds_it(now)
        if self.process is not None and self.process.poll() is not None:
            metrics.RESTARTS.add()
            log.warning("process_ended", role=self.role, pid=self.process.pid, code=self.process.returncode)
            code = self.process.returncode
            young = not self._was_ready and now - self._started_s < YOUNG_S
            self._refusals = self._refusals + 1 if code == CANNOT_RUN and not self._was_ready else 0
            self._pause_s = min(self._pause_s * 2, RESTART_PAUSE_S_MAX) if young else RESTART_PAUSE_S
            if self._refusals >= (REFUSALS_MAX if self._ready_once else 1):
                raise CannotRun(f"it ended with code {code}")
            self.process, self._not_before_s, self._was_ready = None, now + self._pause_s, False
        if self.process is None and now >= self._not_before_s:
            self._started_s = now
            self.process = subprocess.Popen(
                [sys.executable, "-P", *self._words], pass_fds=self._descriptors, stdin=subprocess.DEVNULL, stdout=sys.stderr,
                env=self._environment,
            )  # fmt: skip
            log.info("process_started", role=self.role, pid=self.process.pid)

    def _end_what_holds_it(self, now: float) -> None:
        if self.process is None or self.process.poll() is not None or now - self._told_s < TELL_AGAIN_S:
            return
        with suppress(OSError):
            if _stat(self.process.pid)[0] in {"Z", "X"} and self.process.poll() is None:
                self._told_s = now
                self._cannot_end(self.process.pid)

    def _end_if_silent(self, now: float) -> None:
        """A loop that stands still answers nobody, and holds whoever asked: better none, and then a new one."""
        if self._beats_in is None or self.process is None or now - self._looked_s < LOOK_AT_BEATS_S:
            return
        # A parent that was stopped itself, or the machine with it, sees only what was before.
        late = now - self._looked_s > 2 * LOOK_AT_BEATS_S
        self._looked_s = now
        silent_s = counting.silent_s(self._beats_in, self.process.pid)
        if late or silent_s is None or silent_s < SILENT_S_MAX or (self._says_ready and not self._was_ready):
            return
        log.error("process_silent", role=self.role, pid=self.process.pid, seconds=round(silent_s))
        self.process.kill()

    def kill(self) -> None:
        """At once, whatever it waits for, as far as anybody can."""
        if self.process is None:
            return
        self.process.kill()
        deadline = time.monotonic() + KILLED_S_MAX
        while self.process.poll() is None and time.monotonic() < deadline:
            self._end_what_holds_it(time.monotonic())
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(0.05)
        if self.process.poll() is None:
            log.error("process_cannot_end", role=self.role, pid=self.process.pid)


def end_all(kept: Sequence[KeptProcess], grace_s: float) -> None:
    """Ask all of them to end, the last one first; kill what is left after `grace_s`."""
    places = [place for place in reversed(kept) if place.process is not None]
    for place in places:
        if place.process is not None and place.process.poll() is None:
            place.process.terminate()
    deadline = time.monotonic() + grace_s
    for place in places:
        process = place.process
        if process is None:
            continue
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            log.error("process_killed", role=place.role, pid=process.pid)
            place.kill()
