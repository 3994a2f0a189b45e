"""What the mount's process costs after a walk over a million files and a large file both ways. Slow: `make soak`."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from stratum import buckets, objects
from stratum.content import NewContent
from stratum.schema import ObjectMetadata
from stratum.volume import Volume
from tests.support import serving

if TYPE_CHECKING:
    from stratum.transaction import MetadataTransaction

FILES = int(os.environ.get("STRATUM_MEMORY_FILES", "1000000"))
LARGE_MIB = int(os.environ.get("STRATUM_MEMORY_LARGE_MIB", "10240"))
MIB = 1024 * 1024
LIMIT_MIB = 300


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

                def put(tx: MetadataTransaction, start: int = start) -> None:
                    buckets.get(tx, "many")
                    for number in range(start, start + 1000):
                        key = f"d{number // 1000:04d}/{number:07d}".encode()
                        request = objects.PutRequest("many", key, bytes(16), ObjectMetadata())
                        objects.put(tx, request, NewContent(0, inline=b""))

                volume.mutate(put)
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
