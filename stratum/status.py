"""What a volume is doing, for people: `stratum status`, and whether its faces answer."""

from __future__ import annotations

import http.client
import os
import socket
import ssl
from typing import TYPE_CHECKING, Any

from stratum import buckets, health, mounting, places
from stratum.config import parse_listen
from stratum.processes import proportional_bytes
from stratum.volume import Volume

if TYPE_CHECKING:
    from pathlib import Path

    from stratum.config import Config

REACHED_AT = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  asking, not listening


def endpoint_answers(config: Config) -> bool:
    host, port = parse_listen(config.s3_listen, "s3.listen")
    host = REACHED_AT.get(host, host)
    try:
        if config.s3_tls_certificate:
            context = ssl.create_default_context()
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(host, port, timeout=2, context=context)
        else:
            connection = http.client.HTTPConnection(host, port, timeout=2)
        connection.request("GET", "/_stratum/v1/live")
        answered = connection.getresponse().status < 500
        connection.close()
    except (OSError, http.client.HTTPException):
        return False
    return answered


def port_answers(listen: str) -> bool:
    host, port = parse_listen(listen, "")
    try:
        socket.create_connection((REACHED_AT.get(host, host), port), timeout=2).close()
    except OSError:
        return False
    return True


def mount_answers(mountpoint: Path) -> bool:
    """A live mount of ours: it is in the table, and its root answers."""
    with mounting.top(places.real(mountpoint)) as now:
        if now is None or not now.line.is_stratum:
            return False
        try:
            os.fstatvfs(now.descriptor)
        except OSError:
            return False
    return True


def sessions(volume: Volume) -> list[dict[str, Any]]:
    """The other processes that have the volume open."""
    return [
        {
            "role": row["role"],
            "pid": 0 if row.get("kept") else row["pid"],
            "started_ns": row["started_ns"],
            "state": "dead" if volume.session.is_dead(session) else "kept" if row.get("kept") else "running",
        }
        for session, row in volume.session.rows().items()
        if session != volume.session.id
    ]


def status(root: Path) -> tuple[dict[str, Any], list[health.Finding]]:
    """What the volume holds, who has it open and what is wrong with it; needs no running server."""
    with Volume(root, "status") as volume:
        config = volume.config
        processes = sessions(volume)
        with volume.snapshot() as reader:
            usage = [reader.usage_of(row.inode) for _, row in buckets.scan(reader)]
        findings = health.examine(volume)
        disks = []
        for folder in volume.segments.folders:
            try:
                stat = health.probe(lambda folder=folder: os.statvfs(folder))  # type: ignore[misc]  # bound now
            except (OSError, TimeoutError):
                continue
            disks.append(
                {
                    "path": str(folder),
                    "total_bytes": stat.f_blocks * stat.f_frsize,
                    "free_bytes": stat.f_bavail * stat.f_frsize,
                }
            )
        pids = [int(str(process["pid"])) for process in processes if process["state"] == "running"]
        return {
            "volume": str(volume.root), "health": health.worst(findings).name.lower(), "findings": [item.document(volume.root) for item in findings],
            "endpoint": config.endpoint, "admin": config.admin_endpoint, "mount": str(volume.root / config.mount_path) if config.mount_path else None,
            "buckets": len(usage), "objects": sum(objects for objects, _ in usage), "bytes": sum(size for _, size in usage), "disks": disks,
            "metadata_bytes": volume.store.used_bytes(), "processes": processes, "memory_bytes": proportional_bytes(pids),
        }, findings  # fmt: skip
