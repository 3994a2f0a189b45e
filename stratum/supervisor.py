"""`stratum serve`: starts the parts, restarts what dies, ends them in order.

Invariants
* One of them serves a volume: it holds the flock of `meta/serving.lock`.
* Ready is when every part has said so itself.
* A part that dies is started again, with a pause that grows while it keeps dying. One that says it cannot run (exit code 3) before it was ever
  ready ends all: what it needs is not there, and does not come by trying again.
* At the end the mount goes first (its last writes need nobody), then the S3 workers; whatever is left after the grace period
  is killed. No stale mount of ours remains, and no mount of anybody else's is touched.
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from stratum import counting, fencing, notify, places, preflight
from stratum.config import load
from stratum.ending import Ending
from stratum.errors import Busy, StratumError
from stratum.housekeeping import Housekeeper
from stratum.log import get_logger
from stratum.processes import CannotRun, KeptProcess, end_all
from stratum.roles import refuse as refuse_double_roles
from stratum.volume import Volume

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from stratum.config import Config

log = get_logger("supervisor")
GRACE_S = 25.0
START_S_MAX = 60.0
LOOK_S = 0.1
BEATING = frozenset(("s3", "mount"))
"""Parts whose loops do nothing that takes long. One step of the tiering daemon may take a quarter of an hour, and whoever looks at disks waits for them."""
NOT_WAITED_FOR = "tierd"
"""Who uses the volume does not miss it."""


def serve(root: Path, announce: Callable[[dict[str, Any]], None], *, words: list[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT; `announce` is called once, when every face answers. The exit code.

    `words` go to the mount. Raises `Busy` if the volume is served already, `StratumError` if a part cannot run.
    """
    config = load(root)
    ending = Ending.by_signals()
    with _alone(root):
        preflight.refuse(root, config)
        return _serve(root, config, announce, words or [], ending)


def _serve(
    root: Path,
    config: Config,
    announce: Callable[[dict[str, Any]], None],
    words: list[str],
    ending: Ending,
) -> int:
    with Volume(root, "supervisor") as volume:
        counting.attach(volume.meta / counting.FOLDER, "supervisor")
        refuse_double_roles(volume)
        housekeeper = Housekeeper(volume)
        parts = _Parts(volume, config, words)
        try:
            return parts.run(ending, announce)
        finally:
            notify.send(STOPPING=1)
            parts.end()
            housekeeper.stop()


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    descriptor = os.open(root / "meta" / "serving.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "that does not say its number yet"
            raise Busy(
                f"{root} is served already, by process {pid}; use that one, or end it first: kill {pid}"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


class _Parts:
    """The processes of a served volume, and what they say."""

    def __init__(self, volume: Volume, config: Config, words: list[str]) -> None:
        self._volume = volume
        self._config = config
        self._receiver = notify.Receiver()
        roles = ["s3", "tierd", "admin", *(["mount"] if config.mount_path else [])]
        self._parts = [
            KeptProcess(
                role,
                ["-m", "stratum.cli.main", role, str(volume.root), "--supervised", *(words if role == "mount" else [])],
                environment=self._receiver.environment,
                cannot_end=partial(fencing.abort_of_process, volume),
                beats_in=volume.meta / counting.FOLDER if role in BEATING else None,
                says_ready=True,
            )
            for role in roles
        ]
        self._waiting = set(roles) - {NOT_WAITED_FOR}

    def run(self, ending: Ending, announce: Callable[[dict[str, Any]], None]) -> int:
        """Until it is ending; the exit code. Raises `StratumError` if a part cannot run."""
        watchdog = notify.Watchdog(time.monotonic())
        deadline = time.monotonic() + START_S_MAX
        announced = False
        while not ending.is_set():
            counting.beat()
            self._listen()
            for part in self._parts:
                try:
                    part.keep_alive()
                except CannotRun as error:
                    self._listen()  # its last words
                    raise StratumError(f"{part.role} cannot run: {part.status or error}") from None
            if not self._waiting and not announced:
                announced = True
                self._announce(announce)
            elif not announced and time.monotonic() > deadline:
                log.error("not_ready", parts=",".join(sorted(self._waiting)), seconds=START_S_MAX)
                deadline = float("inf")
            watchdog.feed(time.monotonic(), healthy=self._volume.failed is None)
            if self._volume.failed is not None:
                log.error("ending", error=str(self._volume.failed))
                return 70
            ending.wait(LOOK_S)
        return 0

    def _listen(self) -> None:
        for pid, said in self._receiver.heard():
            for part in self._parts:
                if part.process is None or part.process.pid != pid:
                    continue
                part.status = said.get("STATUS", part.status)
                if said.get("READY") == "1":
                    part.is_ready()
                    self._waiting.discard(part.role)

    def _announce(self, announce: Callable[[dict[str, Any]], None]) -> None:
        config, root = self._config, self._volume.root
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

    def end(self) -> None:
        end_all(self._parts, GRACE_S)
        self._receiver.close()
        if self._config.mount_path:
            mountpoint = places.real(self._volume.root / self._config.mount_path)
            try:
                fencing.remove_dead(self._volume, mountpoint)
            except (StratumError, OSError) as error:
                log.error("mount_not_detached", mountpoint=str(mountpoint), error=str(error))
