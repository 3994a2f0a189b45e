"""`stratum serve`: starts the parts, restarts what dies, ends them in order.

Invariants
* A part that dies is started again, with a pause that grows while it keeps dying.
* At the end the mount goes first (its last writes need nobody), then the S3 workers; whatever is left after the grace period
  is killed. No stale mount remains.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stratum import counting, notify
from stratum.config import load
from stratum.housekeeping import Housekeeper
from stratum.log import get_logger
from stratum.processes import KeptProcess, end_all
from stratum.status import endpoint_answers, mount_answers, port_answers
from stratum.volume import Volume

if TYPE_CHECKING:
    from collections.abc import Callable

    from stratum.config import Config

log = get_logger("supervisor")
GRACE_S = 25.0
START_S_MAX = 60.0


def serve(root: Path, announce: Callable[[dict[str, Any]], None]) -> int:
    """Run until SIGTERM or SIGINT; `announce` is called once, when every face answers. The exit code."""
    config = load(root)
    ending = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ending.set())
    roles = ["s3", "tierd", "admin", *(["mount"] if config.mount_path else [])]
    parts = [
        KeptProcess(
            role,
            ["-m", "stratum.cli.main", role, str(root), "--supervised"],
            environment=notify.without_notifications(),
        )
        for role in roles
    ]
    with Volume(root, "supervisor") as volume:
        counting.attach(volume.meta / counting.FOLDER, "supervisor")
        housekeeper = Housekeeper(volume)
        watchdog = notify.Watchdog(time.monotonic())
        code = 0
        try:
            for part in parts:
                part.keep_alive()
            watcher = threading.Thread(target=_wait_ready, args=(config, root, parts, announce, ending), daemon=True)
            watcher.start()
            while not ending.wait(0.1):
                counting.beat()
                for part in parts:
                    part.keep_alive()
                watchdog.feed(time.monotonic(), healthy=volume.failed is None)
                if volume.failed is not None:
                    log.error("ending", error=str(volume.failed))
                    code = 70
                    break
        finally:
            ending.set()
            notify.send(STOPPING=1)
            end_all(parts, GRACE_S)
            if config.mount_path:
                _detach(root / config.mount_path)
            housekeeper.stop()
    return code


def _detach(mountpoint: Path) -> None:
    """Leave no stale mount, whatever became of its daemon."""
    if str(mountpoint) in Path("/proc/self/mounts").read_text():
        subprocess.run(["umount", "--lazy", "--", str(mountpoint)], check=False, capture_output=True)


def _wait_ready(
    config: Config,
    root: Path,
    parts: list[KeptProcess],
    announce: Callable[[dict[str, Any]], None],
    ending: threading.Event,
) -> None:
    deadline = time.monotonic() + START_S_MAX
    waiting = {part.role for part in parts} - {"tierd"}
    admin = config.admin_listen
    while waiting and not ending.is_set():
        if "s3" in waiting and endpoint_answers(config):
            waiting.discard("s3")
        if "admin" in waiting and port_answers(admin):
            waiting.discard("admin")
        if "mount" in waiting and mount_answers(root / config.mount_path):
            waiting.discard("mount")
        if time.monotonic() > deadline:
            log.error("not_ready", parts=",".join(sorted(waiting)), seconds=START_S_MAX)
            deadline = float("inf")
        ending.wait(0.05)
    if not ending.is_set():
        notify.send(READY=1, STATUS=f"serving {config.endpoint}")
        announce(
            {
                "ready": True,
                "endpoint": config.endpoint,
                "admin": config.admin_endpoint,
                "mount": str(root / config.mount_path) if config.mount_path else None,
                "pid": os.getpid(),
            }
        )
