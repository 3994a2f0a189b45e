"""Ending a mount whose daemon does not answer, or is gone, from outside.

A stopped daemon's kernel cache would go on answering, and a killed one may not be able to end: a thread of it can wait in the kernel for a
directory's lock that a client holds who waits for the daemon. (Asking the kernel for less does not help: up to Linux 6.18 it takes that lock
for FUSE_EXPIRE_ONLY, too.) So whoever fences ends the daemon, then its connection, and puts a dead mount in the place of the old one, of
which the kernel knows nothing: who comes by the path gets an error, whatever was cached, and writes nothing into the folder beneath.
"""

from __future__ import annotations

import fcntl
import os
import signal
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from stratum import metrics, mounting
from stratum.errors import StratumError
from stratum.log import get_logger
from stratum.mount_rows import mount_rows
from stratum.mountd import ask_detach, helper_of
from stratum.processes import is_ending
from stratum.schema import key_u64

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from stratum.volume import Volume

UNREACHABLE_S = 0.005
FENCING_S_MAX = 40.0
"""Longer than the helper may take to answer (`mountd.IDLE_S_MAX`)."""
log = get_logger("fencing")


def fence(volume: Volume, session: int, row: dict[str, Any]) -> None:
    """Make a mount that does not answer unable to answer anybody.

    One at a time in all processes: nothing is detached twice, since the second time it would be the mount that came after it.
    """
    key = key_u64(b"T", session)
    with _alone(volume):
        with volume.snapshot() as reader:
            if reader.get(key) is None:
                return
        _fence(volume, session, row)
        try:
            with volume.store.transact() as tx:
                tx.delete(key)
        except StratumError as error:
            log.error("mount_row_not_removed", session=session, error=str(error))


@contextmanager
def _alone(volume: Volume) -> Iterator[None]:
    try:
        descriptor = os.open(volume.meta / "fencing.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:  # a full disk: better twice than not at all
        log.warning("fencing_not_alone", why=str(error))
        yield
        return
    deadline = time.monotonic() + FENCING_S_MAX
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    log.warning("fencing_not_alone", why="whoever fences a mount does not end")
                    break
                time.sleep(UNREACHABLE_S)
        yield
    finally:
        os.close(descriptor)


def _fence(volume: Volume, session: int, row: dict[str, Any]) -> None:
    mountpoint = str(row["mountpoint"])
    kept, dead = _forbidden(volume, session), volume.session.is_dead(session)
    if dead and kept:
        log.warning("kept_mount_ended", session=session, mountpoint=mountpoint)
    else:
        log.error("mount_fenced", session=session, mountpoint=mountpoint)
        metrics.FENCES.add()
    process = volume.session.rows().get(session)
    if not dead and not kept and process is not None:
        # The lock is held, so the number still belongs to that daemon. A stopped one dies too; its descriptor closes with it.
        with suppress(ProcessLookupError, PermissionError):
            os.kill(int(str(process["pid"])), signal.SIGKILL)
    # With its process a connection has ended, and its number may be that of another one by now.
    why = "" if dead else abort(row)
    try:
        take_away(volume, row, cover=True)
    except (StratumError, OSError) as error:
        # Aborted, it answers ENOTCONN to whoever asks for what the kernel does not know.
        log.error("mount_not_detached", mountpoint=mountpoint, error=str(error))
    else:
        if helper_of(volume.root, volume.config) is not None:
            why = ""  # who detaches it ends its connection
    if why:
        log.error("connection_not_aborted", mountpoint=mountpoint, device=row["device"], error=why)


def abort(row: dict[str, Any]) -> str:
    """End the connection of a live mount; who waits for its answers gets errors. Why it cannot be done; empty if it was."""
    try:
        if not mounting.abort(int(row["device"])):
            log.info("connection_ended_before", mountpoint=row["mountpoint"], device=row["device"])
    except OSError as error:
        return str(error)
    return ""


def abort_of_process(volume: Volume, pid: int) -> None:
    """End the connections of a daemon that was killed and is still there: a thread of it may wait for one of its own clients."""
    with volume.snapshot() as reader:
        mounts = mount_rows(reader)
    processes = volume.session.rows()
    for session, row in mounts.items():
        if processes.get(session, {}).get("pid") != pid or volume.session.is_dead(session):
            continue
        why = abort(row)
        if why and helper_of(volume.root, volume.config) is not None:
            try:
                take_away(volume, row, cover=True)
            except StratumError as error:
                why = f"{why}; {error.message}"
            else:
                why = ""
        if why:
            log.error("connection_not_aborted", mountpoint=row["mountpoint"], device=row["device"], error=why)
        else:
            log.warning("connection_aborted", mountpoint=row["mountpoint"], device=row["device"], pid=pid)


def fence_ending(volume: Volume) -> int:
    """Fence the mounts of daemons that were killed and cannot end; how many there were. For those that nobody's child process is."""
    with volume.snapshot() as reader:
        mounts = mount_rows(reader)
    processes = volume.session.rows()
    found = 0
    for session, row in mounts.items():
        process = processes.get(session)
        if process is None or process.get("kept") or session == volume.session.id:
            continue
        started_s = int(str(process["started_ns"])) / 1e9
        if is_ending(int(str(process["pid"])), started_s) and not volume.session.is_dead(session):
            log.error("daemon_cannot_end", pid=process["pid"], mountpoint=row["mountpoint"])
            fence(volume, session, row)
            found += 1
    return found


def _forbidden(volume: Volume, session: int) -> bool:
    """Whether the helper keeps a mount for its next daemon, which from now on cannot go on with it. (Detaching lets go of its lock.)"""
    try:
        return volume.session.forbid(session)
    except StratumError as error:
        log.error("mount_not_forbidden", session=session, error=str(error))
        return False


def take_away(volume: Volume, row: dict[str, Any], *, cover: bool) -> None:
    """Take a mount away from its mountpoint, and end its connection. Not what others have mounted there since.

    `cover`: leave a dead one in its place. Raises `UnfinishedMount`, `OSError`.
    """
    path, number, device = str(row["mountpoint"]), int(row.get("mount_id", 0)), int(row["device"])
    helper = helper_of(volume.root, volume.config)
    with mounting.top(path) as now:
        if helper is None and now is not None and now.line.is_stratum and not number:
            # It was found there, or an older program did not note the id.
            number = now.id if now.line.minor == device else 0
    if helper is not None:
        ask_detach(helper, path, number, device, cover=cover)
    elif number and cover:
        mounting.cover(path, number, os.geteuid(), os.getegid())
    elif number:
        mounting.detach(path, number)


def remove_dead(volume: Volume, mountpoint: Path) -> None:
    """Detach what is mounted there, if it is a mount of ours whose daemon is gone. Raises `UnfinishedMount`, `OSError`."""
    with mounting.top(mountpoint) as now:
        if now is None or not now.line.is_stratum or not mounting.is_dead(now):
            return
        row = {"mountpoint": str(mountpoint), "device": now.line.minor}
    take_away(volume, row, cover=False)
