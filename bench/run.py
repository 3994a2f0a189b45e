"""`make bench`: one table, every row a ratio from alternating runs of one compiled client.

The client is a program that takes `-e HOST:PORT -a KEY -s SECRET -ops LIST -c CLIENTS -d SECONDSs -name NAME` and prints one
line an operation with `units/s=`; name it in $S3LOAD. Rivals come as RIVALS=name:host:port:key:secret[,...].
Absolute figures belong to the machine; the ratios are what counts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import boto3
import psutil
from botocore.config import Config

ROOT = Path(__file__).resolve().parent.parent
STRATUM = [sys.executable, "-m", "stratum.cli.main"]
OPERATIONS = ["put4k", "get4k", "stat", "list", "delete", "put64m", "get64m"]
MIB = 1024 * 1024
# What each row must reach against a rival of that name, and against the bare application.
TARGETS = {
    "put4k": {"minio": 2.5, "seaweedfs": 1.3}, "get4k": {"minio": 2.2, "seaweedfs": 2.2, "bare": 0.45}, "stat": {"minio": 1.8, "seaweedfs": 1.3, "bare": 0.45},
    "list": {"minio": 5.0, "seaweedfs": 2.2}, "delete": {"minio": 2.0, "seaweedfs": 0.8}, "put64m": {"minio": 1.0, "seaweedfs": 2.0}, "get64m": {"minio": 1.2, "seaweedfs": 1.2},
}  # fmt: skip


@dataclass
class Target:
    name: str
    endpoint: str
    access_key: str
    secret_key: str
    process: psutil.Process | None = None
    figures: dict[str, list[float]] = field(default_factory=dict)
    latency: dict[str, str] = field(default_factory=dict)
    cpu_s: float = 0.0
    memory_bytes: int = 0

    def tree(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)] if self.process else []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def load(binary: str, target: Target, operations: list[str], clients: int, seconds: int) -> None:
    before = sum(sum(process.cpu_times()[:2]) for process in target.tree())
    words = [
        binary,
        "-e",
        target.endpoint,
        "-a",
        target.access_key,
        "-s",
        target.secret_key,
        "-ops",
        ",".join(operations),
        "-c",
        str(clients),
        "-d",
        f"{seconds}s",
        "-name",
        target.name,
    ]
    output = subprocess.run(words, capture_output=True, text=True, check=False).stdout
    target.cpu_s += sum(sum(process.cpu_times()[:2]) for process in target.tree()) - before
    target.memory_bytes = max(target.memory_bytes, sum(process.memory_full_info().pss for process in target.tree()))
    for line in output.splitlines():
        found = re.search(r"^\S+\s+(\S+)\s.*units/s=([\d.]+).*(p50=\S+ p99=\S+)?", line)
        if found:
            name = {"list1000/page": "list"}.get(found.group(1), found.group(1))
            if name in operations:
                target.figures.setdefault(name, []).append(float(found.group(2)))
                tail = re.search(r"p50=\S+\s+p99=\S+", line)
                target.latency[name] = tail.group() if tail else ""


def metadata_only(target: Target, log: Path) -> dict[str, float]:
    """Server-side milliseconds of CopyObject and CompleteMultipartUpload of 1 GiB, from the request log."""
    client = boto3.client(
        "s3", endpoint_url=f"http://{target.endpoint}", aws_access_key_id=target.access_key, aws_secret_access_key=target.secret_key, region_name="us-east-1",
        config=Config(signature_version="s3v4"),
    )  # fmt: skip
    client.create_bucket(Bucket="large")
    piece = os.urandom(64 * MIB)
    upload = client.create_multipart_upload(Bucket="large", Key="k")["UploadId"]
    parts = [
        {
            "PartNumber": n,
            "ETag": client.upload_part(Bucket="large", Key="k", UploadId=upload, PartNumber=n, Body=piece)["ETag"],
        }
        for n in range(1, 17)
    ]
    client.complete_multipart_upload(Bucket="large", Key="k", UploadId=upload, MultipartUpload={"Parts": parts})
    for number in range(9):
        client.copy_object(Bucket="large", Key=f"copy{number}", CopySource={"Bucket": "large", "Key": "k"})
    times: dict[str, list[float]] = {}
    for line in log.read_text().splitlines():
        found = re.search(r"operation=(copy_object|complete_upload) .*ms=([\d.]+)", line)
        if found:
            times.setdefault(found.group(1), []).append(float(found.group(2)))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rivals", default="", help="name:host:port:key:secret, several with commas")
    parser.add_argument("--load", default=os.environ.get("S3LOAD", ""), help="the load program ($S3LOAD)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=8)
    options = parser.parse_args()
    if not options.load or not Path(options.load).exists():
        print(
            "make bench needs a compiled load program: S3LOAD=/path/to/it make bench (a Python client would measure itself)",
            file=sys.stderr,
        )
        return 2
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "volume"
        port, bare_port = free_port(), free_port()
        facts = json.loads(
            subprocess.run(
                [*STRATUM, "init", str(root), "--s3-listen", f"127.0.0.1:{port}", "--json"],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        log = Path(folder) / "log"
        with log.open("w") as stderr:
            server = subprocess.Popen([*STRATUM, "serve", str(root)], stdout=subprocess.PIPE, stderr=stderr)
        bare = subprocess.Popen([sys.executable, "-m", "bench.bare", str(bare_port)], cwd=ROOT)
        try:
            assert server.stdout is not None
            server.stdout.readline()
            time.sleep(1)
            ours = Target(
                "stratum", f"127.0.0.1:{port}", facts["access_key"], facts["secret_key"], psutil.Process(server.pid)
            )
            targets = [ours, Target("bare", f"127.0.0.1:{bare_port}", "none", "none-needed", psutil.Process(bare.pid))]
            for rival in filter(None, options.rivals.split(",")):
                name, host, rival_port, key, secret = rival.split(":")
                targets.append(Target(name, f"{host}:{rival_port}", key, secret))
            for number in range(options.rounds):
                for target in targets:
                    print(f"round {number + 1}: {target.name}", file=sys.stderr, flush=True)
                    load(
                        options.load,
                        target,
                        [op for op in OPERATIONS if target.name != "bare" or op in {"put4k", "get4k", "stat"}],
                        options.clients,
                        options.seconds,
                    )
            edits = metadata_only(ours, log)
        finally:
            for process in (server, bare):
                process.terminate()
                process.wait()
    report(targets, edits)
    return 0


def report(targets: list[Target], edits: dict[str, float]) -> None:
    ours, others = targets[0], targets[1:]
    print("| row | stratum/s | " + " | ".join(f"x {other.name}" for other in others) + " | latency |")
    print("|---|---|" + "---|" * (len(others) + 1))
    for operation in OPERATIONS:
        mine = ours.figures.get(operation, [])
        cells = []
        for other in others:
            theirs = other.figures.get(operation, [])
            ratios = [a / b for a, b in zip(mine, theirs, strict=False) if b]
            wanted = TARGETS.get(operation, {}).get(other.name)
            goal = f" (target {wanted})" if wanted else ""
            cells.append(
                f"{statistics.median(ratios):.2f} [{min(ratios):.2f}-{max(ratios):.2f}]{goal}" if ratios else "-"
            )
        print(
            f"| {operation} | {statistics.median(mine):,.0f} | "
            + " | ".join(cells)
            + f" | {ours.latency.get(operation, '')} |"
            if mine
            else f"| {operation} | - |"
        )
    for name, milliseconds in edits.items():
        print(f"| {name} of 1 GiB | {milliseconds:.1f} ms | (target < 5 ms) |")
    for target in targets:
        if target.process:
            print(
                f"{target.name}: CPU {target.cpu_s:.0f} s, memory {target.memory_bytes / MIB:.0f} MiB PSS with the store's mapped pages"
            )


if __name__ == "__main__":
    sys.exit(main())
