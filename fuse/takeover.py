"""A mount that goes on in a new program: nothing is unmounted, and who has files open only waits.

At SIGUSR2 the process replaces itself by whatever the same command line starts now. At SIGTERM, if the mount helper made the mount, the
process ends and the helper keeps what it passes on until the next one claims it (`stratum/kept_mounts.py`).

What is passed on is the connection to the kernel, the session with the lock
that says it lives, and what the kernel counts on: the inodes it looked up and the handles it has open. So for the rest of
the volume the mount has merely not answered for a moment: its row, slot and orphans stay, writers wait for it as for any slow
mount (and fence it if it takes too long), and names and pages that the kernel keeps stay right, since the new program follows the change log
from where the old one left it.

libfuse refuses a connection whose first message it has not seen, so the new program is told that message (INIT) once more. The kernel
has no request of that number any more and says so (ENOENT) to the answer, which libfuse takes for an interrupted request.

Invariants
* Nothing is passed on unless no handler runs and nothing is uncommitted. Otherwise the mount goes on as it is, or is unmounted at SIGTERM, and the log
  says why.
* The process replaces itself only if a new program has been seen to start and to open the volume.
* While the helper keeps a mount the row of its session names no process, so that nobody kills a stranger for it; whoever fences it forbids the next
  process to go on with it in the same transaction.
* A new program that fails later than that ends: the connection closes with it, and the mount is as after a crash.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from stratum.errors import NotFound, UnfinishedMount
from stratum.fuse import _negotiate
from stratum.log import get_logger
from stratum.mount_rows import mount_rows
from stratum.mountd import ask_claim, ask_keep
from stratum.sessions import Inherited

if TYPE_CHECKING:
    from stratum.fuse.invalidation import Follower
    from stratum.fuse.operations import Operations
    from stratum.volume import Volume

log = get_logger("mount")
ENVIRONMENT = "STRATUM_TAKEOVER"
"""Where the new program finds the descriptor of what was passed on."""
VERSION = 1
HANDLED_SIGNALS = frozenset((signal.SIGTERM, signal.SIGINT, signal.SIGUSR2))
REHEARSAL = "import sys, stratum.cli.main; from stratum.fuse import takeover; takeover.rehearse(sys.argv[1])"
REHEARSAL_S_MAX = 60.0
SYSTEMCTL_S_MAX = 2.0
CGROUP = Path("/proc/self/cgroup")
QUIET_S_MAX = 10.0
"""How long requests are held up for those that are being worked on (a recall from a remote can take longer)."""


@dataclass(slots=True, frozen=True)
class Handover:
    """What one program passes to the next. `wanted`: what was agreed on with the kernel, as bits."""

    session: Inherited
    connection: int
    init: bytes
    wanted: int
    files: dict[str, Any]


@dataclass(slots=True, frozen=True)
class Passing:
    """What `stratum.fuse.daemon.serve` leaves to be done when the volume is closed. `kept`: the file that the helper has too; None: become the next program."""

    handover: Handover
    signals: SignalsLater
    asked: dict[str, Any]
    kept: int | None = None


def rehearse(root: str) -> None:
    """In a process of the new program: do what can fail, and print the version of what it takes over."""
    import stratum.fuse.daemon  # noqa: F401  whether it can be imported is what is asked
    from stratum.volume import Volume

    Volume(Path(root), "rehearsal").close()
    print(VERSION)


def renew(volume: Volume, mountpoint: Path) -> None:
    """Have the running mount at `mountpoint` go on in the program that is installed now. Raises `NotFound`, `UnfinishedMount`."""
    with volume.snapshot() as reader:
        mounts = mount_rows(reader)
    found = [(key, row) for key, row in mounts.items() if row["mountpoint"] == str(mountpoint)]
    if not found:
        raise NotFound(f"nothing of {volume.root} is mounted at {mountpoint}; mount it: stratum mount VOLUME DIR")
    session, row = found[0]
    if not row.get("renews"):
        raise UnfinishedMount(f"{mountpoint} is served by a program that cannot pass it on yet; restart it")
    refused = row.get("refused")
    process = volume.session.rows()[session]
    if process.get("kept"):
        raise UnfinishedMount(f"{mountpoint} waits for a new program already; start it")
    os.kill(int(str(process["pid"])), signal.SIGUSR2)
    deadline = time.monotonic() + REHEARSAL_S_MAX + 2 * QUIET_S_MAX
    while time.monotonic() < deadline:
        time.sleep(0.05)
        with volume.snapshot() as reader:
            now = mount_rows(reader).get(session)
        if now is None:
            break
        if now.get("refused") != refused:
            raise UnfinishedMount(f"{mountpoint} goes on as it is: {now['refused']['why']}")
        if volume.session.rows().get(session, process)["started_ns"] != process["started_ns"]:
            return
    raise UnfinishedMount(f"{mountpoint} did not go on in a new program; look at its log")


async def why_not_possible(volume: Volume) -> str:
    """Empty if a new program starts and knows this volume."""
    words = [sys.executable, "-c", REHEARSAL, str(volume.root)]
    try:
        with trio.fail_after(REHEARSAL_S_MAX):
            done = await trio.run_process(words, capture_stdout=True, capture_stderr=True, check=False)
    except (OSError, trio.TooSlowError) as error:
        return f"a new program does not start ({type(error).__name__}: {error})"
    if done.returncode or done.stdout.strip() != str(VERSION).encode():
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        return f"a new program cannot go on with it: {last or done.stdout!r}"
    return ""


async def stand_still(operations: Operations, follower: Follower) -> str:
    """Take no more requests, and have nothing uncommitted. If that cannot be, say why; requests are taken as before.

    First the kernel is told nothing more: to forget a name it needs a directory's lock, and whoever holds that may wait for an
    answer of ours. (A thread that waits in there could not even be ended.)
    """
    session = operations.commits.session
    assert session is not None, "the loop runs"
    await trio.to_thread.run_sync(follower.pause)
    session.pause()
    with trio.move_on_after(QUIET_S_MAX) as waited:
        await session.quiet()
    why = ""
    if waited.cancelled_caught:
        why = f"requests are being worked on for over {QUIET_S_MAX} s; try again"
    else:
        await operations.flush_old(everything=True)
        if operations.open_files.uncommitted():
            why = (
                "a file is open that lost its name before it was committed, or could not be committed; try again later"
            )
    if why:
        go_on(operations, follower)
    return why


def go_on(operations: Operations, follower: Follower) -> None:
    """After `stand_still`, if nothing came of it."""
    assert operations.commits.session is not None, "the loop runs"
    operations.commits.session.resume()
    follower.resume()


async def keep(volume: Volume, operations: Operations, helper: Path, mountpoint: Path) -> int:
    """After `stand_still`: give the mount to the helper. Returns the file for what is to be told. Raises `StratumError`; then it is ours still."""
    session = volume.session
    await operations.commit(partial(session.tell_kept, kept=True), frees=True)
    descriptor = os.memfd_create("handover", os.MFD_CLOEXEC)
    try:
        await trio.to_thread.run_sync(ask_keep, helper, mountpoint, _negotiate.begin(), session.lock, descriptor)
    except BaseException:
        os.close(descriptor)
        await operations.commit(partial(session.tell_kept, kept=False), frees=True)
        raise
    return descriptor


def prepare(volume: Volume, operations: Operations) -> Handover:
    """After `stand_still`. From now on the volume's session lives on when this process closes it."""
    told = operations.open_files.told()
    told["orphans"] = list(operations.orphans)
    told["lock_waits"] = operations.locks.told() if operations.locks is not None else []
    told["names"] = operations.auditor.names.told() if operations.auditor is not None else []
    init, wanted = _negotiate.negotiated()
    return Handover(volume.session.pass_on(), os.dup(_negotiate.begin()), init, wanted, told)


class SignalsLater:
    """Where there is no handler yet or any more: the default of each signal is to end the process, which would leave a dead mount.

    They are noted by whatever thread gets them, and sent again to whoever handles them: the loop of this program, or, kept
    waiting by the main thread over exec, that of the next one.
    """

    def __init__(self) -> None:
        self._noted: list[int] = []
        for number in HANDLED_SIGNALS:
            signal.signal(number, lambda got, _frame: self._noted.append(got))

    def take(self) -> None:
        """There are handlers now."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED_SIGNALS)
        self._send()

    def keep(self) -> None:
        """Right before exec, in the main thread."""
        signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED_SIGNALS)
        self._send()

    def _send(self) -> None:
        noted, self._noted = set(self._noted), []
        for number in noted:
            signal.pthread_kill(threading.get_ident(), number)


def pass_on(passing: Passing, counter: int) -> None:
    """Become the new program, or leave it to the helper. `counter`: the session's, read when nothing could count any more. Raises `OSError`."""
    handover = passing.handover
    told = {
        **asdict(handover),
        "session": asdict(handover.session) | {"counter": counter},
        "init": handover.init.hex(),
        "version": VERSION,
        "asked": passing.asked,
    }
    descriptor = os.memfd_create("handover", 0) if passing.kept is None else passing.kept
    left = memoryview(json.dumps(told).encode())
    while left:
        left = left[os.write(descriptor, left) :]
    if passing.kept is not None:
        return
    for inherited in (handover.session.lock, handover.connection):
        os.set_inheritable(inherited, True)
    sys.stdout.flush()
    sys.stderr.flush()
    os.environ[ENVIRONMENT] = str(descriptor)
    passing.signals.keep()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606  ourselves, with our own words


def is_due() -> bool:
    """Whether a program before this one has passed something on."""
    return ENVIRONMENT in os.environ


def received() -> Handover | None:
    """What the program before this one has passed on, once."""
    number = os.environ.pop(ENVIRONMENT, "")
    if not number:
        return None
    told = _read(int(number))
    handover = _handover(told, told["session"]["lock"], told["connection"])
    for inherited in (handover.session.lock, handover.connection):
        os.set_inheritable(inherited, False)
    return handover


def claimed(helper: Path, mountpoint: Path, asked: dict[str, Any]) -> Handover | None:
    """What the helper keeps for this mountpoint, if it is what is `asked` for; otherwise it is let go of, and the mount is a stale one."""
    try:
        descriptors = ask_claim(helper, mountpoint)
    except UnfinishedMount as error:
        log.debug("nothing_claimed", why=error.message)
        return None
    if not descriptors:
        return None
    connection, lock, file = descriptors
    try:
        told = _read(file)
        if told["version"] == VERSION and told["asked"] == asked:
            return _handover(told, lock, connection)
        why = "it is of another program or was mounted otherwise"
    except (ValueError, KeyError, TypeError) as error:
        why = f"what it was told is damaged ({type(error).__name__})"
    log.warning("kept_mount_let_go", mountpoint=str(mountpoint), why=why)
    let_go(connection, lock)
    return None


def let_go(connection: int, lock: int) -> None:
    """Do not go on with it: the kernel ends what waits for it, and its session is dead."""
    os.close(connection)
    os.close(lock)


def _read(descriptor: int) -> dict[str, Any]:
    with open(descriptor, "rb") as file:
        file.seek(0)
        told: dict[str, Any] = json.loads(file.read())
    return told


def _handover(told: dict[str, Any], lock: int, connection: int) -> Handover:
    session = Inherited(**(told["session"] | {"lock": lock}))
    return Handover(session, connection, bytes.fromhex(told["init"]), told["wanted"], told["files"])


async def is_stopped_for_good() -> bool:
    """Whether systemd has a job to stop this unit, not to restart it. False also if that cannot be known."""
    if "INVOCATION_ID" not in os.environ:
        return False
    unit = CGROUP.read_text().rstrip().rpartition("/")[2]  # noqa: ASYNC240  the kernel's memory
    if not unit.endswith(".service"):
        return False
    words = ["systemctl", "list-jobs", "--no-legend", "--plain", "--", unit]
    # Of the socket it would make use itself, for which systemd rebukes us.
    clean = {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"}
    try:
        with trio.fail_after(SYSTEMCTL_S_MAX):
            done = await trio.run_process(words, capture_stdout=True, capture_stderr=True, check=False, env=clean)
    except (OSError, trio.TooSlowError):
        return False
    jobs = [line.split() for line in done.stdout.decode(errors="replace").splitlines()]
    return any(job[1:3] == [unit, "stop"] for job in jobs)


def take_over(handover: Handover, operations: Operations) -> None:
    """Before the loop runs: know what the kernel knows."""
    operations.open_files.take_over(handover.files)
    if operations.locks is not None:
        operations.locks.take_over(handover.files["lock_waits"])
    for number in handover.files["orphans"]:
        operations.add_orphan(number)
    if operations.auditor is not None:
        operations.auditor.names.take_over(handover.files["names"])
