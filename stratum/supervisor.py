"""`stratum serve`: starts the parts, restarts what dies, ends them in order.

Invariants
* A part that dies is started again, with a pause that grows while it keeps dying.
* At the end the mount goes first (its last writes need nobody), then the S3 workers; whatever is left after the grace period
  is killed. No stale mount remains.
"""

from __future__ import annotations

import http.client
import os
import signal
import ssl
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stratum import packs, warm
from stratum.config import load, parse_listen
from stratum.housekeeping import Housekeeper
from stratum.log import get_logger
from stratum.processes import KeptProcess, end_all, proportional_bytes
from stratum.schema import unpack_json
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
    roles = ["s3", "tierd", "mount"] if config.mount_path else ["s3", "tierd"]
    parts = [KeptProcess(role, ["-m", "stratum.cli.main", role, str(root), "--supervised"]) for role in roles]
    with Volume(root, "supervisor") as volume:
        housekeeper = Housekeeper(volume)
        code = 0
        try:
            for part in parts:
                part.keep_alive()
            watcher = threading.Thread(target=_wait_ready, args=(config, root, parts, announce, ending), daemon=True)
            watcher.start()
            while not ending.wait(0.1):
                for part in parts:
                    part.keep_alive()
                if volume.failed is not None:
                    log.error("ending", error=str(volume.failed))
                    code = 70
                    break
        finally:
            ending.set()
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
    while waiting and not ending.is_set():
        if "s3" in waiting and endpoint_answers(config):
            waiting.discard("s3")
        if "mount" in waiting and mount_answers(root / config.mount_path):
            waiting.discard("mount")
        if time.monotonic() > deadline:
            log.error("not_ready", parts=",".join(sorted(waiting)), seconds=START_S_MAX)
            deadline = float("inf")
        ending.wait(0.05)
    if not ending.is_set():
        announce(
            {
                "ready": True,
                "endpoint": config.endpoint,
                "mount": str(root / config.mount_path) if config.mount_path else None,
                "pid": os.getpid(),
            }
        )


def endpoint_answers(config: Config) -> bool:
    host, port = parse_listen(config.s3_listen, "s3.listen")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  asking, not listening
    try:
        if config.s3_tls_certificate:
            context = ssl.create_default_context()
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(host, port, timeout=2, context=context)
        else:
            connection = http.client.HTTPConnection(host, port, timeout=2)
        connection.request("GET", "/")
        answered = connection.getresponse().status < 500
        connection.close()
    except (OSError, http.client.HTTPException):
        return False
    return answered


def mount_answers(mountpoint: Path) -> bool:
    """A live FUSE mount: it is in the table, and its root answers."""
    lines = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    if not any(
        fields[1].encode().decode("unicode_escape") == str(mountpoint) and fields[2] == "fuse.stratum"
        for fields in lines
    ):
        return False
    try:
        os.statvfs(mountpoint)
    except OSError:
        return False
    return True


def status(root: Path) -> dict[str, Any]:
    """What the volume holds and who has it open; needs no running server."""
    from stratum import buckets

    with Volume(root, "status") as volume:
        config = volume.config
        processes = []
        for session, row in volume.session.rows().items():
            if session != volume.session.id:
                processes.append(
                    {
                        "role": row["role"],
                        "pid": row["pid"],
                        "state": "dead" if volume.session.is_dead(session) else "running",
                    }
                )
        with volume.snapshot() as reader:
            rows = buckets.scan(reader)
            usage = [buckets.usage(reader, row) for _, row in rows]
            mounts = [raw for _, raw in reader.scan_prefix(b"T")]
        disks = []
        for folder in volume.segments.folders:
            stat = os.statvfs(folder)
            disks.append(
                {
                    "path": str(folder),
                    "total_bytes": stat.f_blocks * stat.f_frsize,
                    "free_bytes": stat.f_bavail * stat.f_frsize,
                }
            )
        pids = [int(str(process["pid"])) for process in processes if process["state"] == "running"]
        problems = _problems(volume, config, processes, served=bool(pids), mounted=bool(mounts))
        problems += _tier_problems(volume, served=bool(pids))
        return {
            "volume": str(volume.root), "health": "ok" if not problems else "degraded", "problems": problems, "endpoint": config.endpoint,
            "mount": str(volume.root / config.mount_path) if config.mount_path else None, "buckets": len(rows),
            "objects": sum(objects for objects, _ in usage), "bytes": sum(size for _, size in usage), "disks": disks,
            "metadata_bytes": volume.store.used_bytes(), "processes": processes, "memory_bytes": proportional_bytes(pids),
        }  # fmt: skip


def _tier_problems(volume: Volume, *, served: bool) -> list[str]:
    """What is wrong with the tiers; each names the command that says more."""
    with volume.snapshot() as reader:
        disks = {number: row for number, row in warm.disks(reader).items() if row.state != "replaced"}
        waiting = [unpack_json(raw) for _, raw in reader.scan_prefix(b"h")]
        tierd = packs.setting(reader, "tierd")
    problems = [
        f"the disk {row.path} of the warm tier is missing; mount it, or `stratum disk replace` it"
        for number, row in disks.items()
        if not volume.warm.is_present(number, row)
    ]
    failing = [str(why["error"]) for why in waiting if why.get("error")]
    if waiting:
        what = f", and {len(failing)} cannot be: {failing[0]}" if failing else ""
        problems.append(f"{len(waiting)} packs of the warm tier wait to be repaired{what}; see `stratum disk list`")
    if served and tierd.get("level") in {"high", "emergency"}:
        problems.append(f"a hot disk is above its {tierd['level']} mark; see `stratum tier status`")
    if served and tierd.get("failing"):
        problems.append(
            f"the tiering daemon cannot do: {', '.join(tierd['failing'])}; see its log and `stratum cold check`"
        )
    return problems


def _problems(
    volume: Volume, config: Config, processes: list[dict[str, Any]], *, served: bool, mounted: bool
) -> list[str]:
    problems = []
    if volume.free_bytes() < config.volume_free_bytes_min:
        problems.append(
            f"a disk has less than {config.volume_free_bytes_min} bytes free: only deletes are accepted; free space"
        )
    dead = [process for process in processes if process["state"] == "dead"]
    if dead and served:
        problems.append(f"{len(dead)} process(es) died and are being recovered")
    supervised = any(process["role"] == "supervisor" and process["state"] == "running" for process in processes)
    if supervised and config.mount_path and not mounted:
        problems.append("the mount is not up; see the log of `stratum serve`")
    return problems
