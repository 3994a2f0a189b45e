"""`make bench`: one table, every row a ratio from alternating runs of one compiled client.

The client is a program that takes `-e HOST:PORT -a KEY -s SECRET -ops LIST -c CLIENTS -d SECONDSs -name NAME` and prints one
line an operation with `units/s=`; name it in $S3LOAD. Rivals come as RIVALS=name:host:port:key:secret[,...].
The rows it does not have come from `bench/load`, a client of our own, which is built if Go is there.
Absolute figures belong to the machine; the ratios are what counts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import psutil
from botocore.config import Config

if TYPE_CHECKING:
    from stratum.transaction import MetadataTransaction

ROOT = Path(__file__).resolve().parent.parent
STRATUM = [sys.executable, "-m", "stratum.cli.main"]
OPERATIONS = ["put4k", "get4k", "stat", "list", "delete", "put64m", "get64m"]
SIZED = {"put64k": 64 * 1024, "put1m": 1024 * 1024}
MIB = 1024 * 1024
# What each row must reach against a rival of that name, and against the bare application.
TARGETS = {
    "put4k": {"minio": 2.5, "seaweedfs": 1.3}, "get4k": {"minio": 2.2, "seaweedfs": 2.2, "bare": 0.45}, "stat": {"minio": 1.8, "seaweedfs": 1.3, "bare": 0.45},
    "list": {"minio": 5.0, "seaweedfs": 2.2}, "delete": {"minio": 2.0, "seaweedfs": 0.8}, "put64k": {"minio": 2.0}, "put1m": {"minio": 1.5}, "put64m": {"minio": 1.0, "seaweedfs": 2.0}, "get64m": {"minio": 1.2, "seaweedfs": 1.2},
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


def build_load(folder: Path) -> Path | None:
    """Our own client for the sizes the other one does not know."""
    if shutil.which("go") is None:
        print("no Go here: the rows put64k and put1m are left out", file=sys.stderr)
        return None
    program = folder / "load"
    subprocess.run(["go", "build", "-o", str(program), "."], cwd=ROOT / "bench" / "load", check=True)
    return program


def load_sized(program: Path, target: Target, clients: int, seconds: int) -> None:
    for name, size in SIZED.items():
        words = [str(program), "-e", target.endpoint, "-a", target.access_key, "-s", target.secret_key, "-op", "put"]
        words += ["-size", str(size), "-c", str(clients), "-d", f"{seconds}s"]
        found = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
        assert found["errors"] == 0, f"{target.name} refused {found['errors']} requests of {name}"
        target.figures.setdefault(name, []).append(found["per_s"])
        target.latency[name] = f"p50={found['p50_ms']:.2f}ms p99={found['p99_ms']:.2f}ms"


def fill(root: Path, count: int) -> None:
    """Empty objects straight through the engine: the row is about listing them."""
    from stratum import buckets, objects
    from stratum.content import NewContent
    from stratum.schema import ObjectMetadata
    from stratum.volume import Volume

    metadata = ObjectMetadata(content_type="application/octet-stream", owner="bench")
    with Volume(root, "bench") as volume:
        volume.mutate(lambda tx: buckets.create(tx, "million", "bench", acl="public-read"))
        for start in range(0, count, 1000):

            def put(tx: MetadataTransaction, start: int = start) -> None:
                for number in range(start, min(start + 1000, count)):
                    request = objects.PutRequest("million", f"keys/{number:09d}".encode(), bytes(16), metadata)
                    objects.put(tx, request, NewContent(0, inline=b""))

            volume.mutate(put)


def list_flat(target: Target, log: Path, count: int) -> dict[str, float]:
    """Server-side milliseconds of a page of 1,000 at the start, in the middle and at the end of `count` keys."""
    found: dict[str, float] = {}
    for place, start in (("first page", 0), ("middle page", count // 2), ("last page", count - 1001)):
        offset = log.stat().st_size
        for _ in range(25):
            url = f"http://{target.endpoint}/million?list-type=2&start-after=keys/{start:09d}"
            with urllib.request.urlopen(url, timeout=30) as answer:
                assert answer.read().count(b"<Key>") == 1000, "a page has not 1,000 keys"
        lines = log.read_text()[offset:]
        times = [float(text) for text in re.findall(r"operation=ListObjectsV2 .*ms=([\d.]+)", lines)]
        found[place] = statistics.median(times)
    return found


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
        found = re.search(r"operation=(CopyObject|CompleteMultipartUpload) .*ms=([\d.]+)", line)
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
    parser.add_argument("--list-keys", type=int, default=1_000_000, help="keys of the bucket whose pages are timed")
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
        sized = build_load(Path(folder))
        fill(root, options.list_keys)
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
                    if sized is not None and target.name != "bare":
                        load_sized(sized, target, options.clients, options.seconds)
            edits = metadata_only(ours, log)
            edits.update(list_flat(ours, log, options.list_keys))
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
    for operation in [*OPERATIONS, *SIZED]:
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
        what = f"LIST of many keys, {name}" if name.endswith("page") else f"{name} of 1 GiB (target < 5 ms)"
        print(f"| {what} | {milliseconds:.1f} ms in the server |")
    for target in targets:
        if target.process:
            print(
                f"{target.name}: CPU {target.cpu_s:.0f} s, memory {target.memory_bytes / MIB:.0f} MiB PSS with the store's mapped pages"
            )


if __name__ == "__main__":
    sys.exit(main())
