"""What the mount's process costs after a walk over a million files, a large file both ways, and with 100,000 open files. Slow: `make soak`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from stratum import buckets, objects
from stratum.content import NewContent
from stratum.schema import ObjectMetadata
from stratum.volume import Volume
from tests.support import put, serving, stratum

if TYPE_CHECKING:
    from stratum.transaction import MetadataTransaction

FILES = int(os.environ.get("STRATUM_MEMORY_FILES", "1000000"))
LARGE_MIB = int(os.environ.get("STRATUM_MEMORY_LARGE_MIB", "10240"))
MIB = 1024 * 1024
LIMIT_MIB = 300
OPEN_FILES = int(os.environ.get("STRATUM_OPEN_FILES", "100000"))
HOLDER = """
import os, resource, sys
directory, first, count, total = sys.argv[1], *map(int, sys.argv[2:])
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
held = [os.open(f"{directory}/f{(first + number) % total}", os.O_RDWR) for number in range(count)]
print("ready", flush=True)
for line in sys.stdin:
    for number, descriptor in enumerate(held):
        at = (first + number) % total
        assert os.pread(descriptor, 100, 0) == b"%d" % at, at
    print("read", flush=True)
"""
"""Opens files and holds them; reads all of them for each line it is sent. One process may not hold them all."""


def own_mib(pid: int) -> float:
    """RssAnon and RssShmem: what is not a page of a file."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))) / 1024


@pytest.mark.soak
def test_the_mounts_memory_is_bounded(tmp_path: Path) -> None:
    with serving(tmp_path, mount=True) as server:
        assert server.mount is not None
        server.client().create_bucket(Bucket="many")
        with Volume(server.root, "test") as volume:
            for start in range(0, FILES, 1000):

                def fill(tx: MetadataTransaction, start: int = start) -> None:
                    buckets.get(tx, "many")
                    for number in range(start, start + 1000):
                        key = f"d{number // 1000:04d}/{number:07d}".encode()
                        request = objects.PutRequest("many", key, bytes(16), ObjectMetadata())
                        objects.put(tx, request, NewContent(0, inline=b""))

                volume.mutate(fill)
        pid = next(process["pid"] for process in server.processes() if process["role"] == "mount")
        words = ["find", str(server.mount / "many"), "-type", "f", "-size", "-1"]
        found = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        assert found.count("\n") == FILES
        walked_mib = own_mib(pid)
        block = os.urandom(MIB)
        with (server.mount / "many" / "large").open("wb", buffering=0) as file:
            for _ in range(LARGE_MIB):
                file.write(block)
        with (server.mount / "many" / "large").open("rb", buffering=0) as file:
            while file.read(MIB):
                pass
        print(f"walked {FILES} files: {walked_mib:.0f} MiB; {LARGE_MIB} MiB both ways: {own_mib(pid):.0f} MiB")
        assert walked_mib < LIMIT_MIB
        assert own_mib(pid) < LIMIT_MIB


@pytest.mark.soak
def test_100_000_open_files_outlive_the_program(tmp_path: Path) -> None:
    files, each = OPEN_FILES // 5, 15_000
    with serving(tmp_path, mount=True) as server:
        assert server.mount is not None
        server.client().create_bucket(Bucket="many")
        with Volume(server.root, "test") as volume:
            for number in range(files):
                put(volume, f"f{number}", b"%d" % number, bucket="many")
        pid = next(process["pid"] for process in server.processes() if process["role"] == "mount")
        holders = []
        for first in range(0, OPEN_FILES, each):
            count = min(each, OPEN_FILES - first)
            words = [sys.executable, "-c", HOLDER, str(server.mount / "many"), str(first), str(count), str(files)]
            holders.append(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        try:
            for holder in holders:
                assert holder.stdout is not None
                assert holder.stdout.readline() == "ready\n"
            held_mib = own_mib(pid)
            began = time.monotonic()
            stratum("mount", server.root, server.mount, "--renew")
            print(f"{OPEN_FILES} open files: {held_mib:.0f} MiB; taken over in {time.monotonic() - began:.1f} s")
            for holder in holders:
                assert holder.stdin is not None
                holder.stdin.write("go\n")
                holder.stdin.flush()
            for holder in holders:
                assert holder.stdout is not None
                assert holder.stdout.readline() == "read\n"
            assert max(held_mib, own_mib(pid)) < LIMIT_MIB
        finally:
            for holder in holders:
                holder.communicate()
        assert all(holder.returncode == 0 for holder in holders)
