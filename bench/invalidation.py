"""`make bench-invalidation`: what mounts add to an S3 PUT of a key that each of them has cached.

Anonymous PUTs of 4 KiB through one connection, alternating between no mount, a writable one, and that and two read-only
ones. Before each PUT every mount has stat'ed and read the key, and after each it must show the new bytes at the first ask.
"""

from __future__ import annotations

import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

STRATUM = [sys.executable, "-m", "stratum.cli.main"]
PUTS = 300
ROUNDS = 3


@contextmanager
def running(words: list[str], log: Path) -> Iterator[None]:
    with log.open("a") as stderr:
        process = subprocess.Popen([*STRATUM, *words], stdout=subprocess.PIPE, stderr=stderr)
    try:
        assert process.stdout is not None
        assert process.stdout.readline(), "it did not get ready"
        yield
    finally:
        process.terminate()
        process.wait()


def measure(endpoint: str, mounts: list[Path]) -> list[float]:
    """Milliseconds of each PUT."""
    connection = http.client.HTTPConnection(endpoint)
    times = []
    for number in range(PUTS):
        for mount in mounts:
            (mount / "open" / "k").stat()
            (mount / "open" / "k").read_bytes()
        body = number.to_bytes(8, "big") + os.urandom(4088)
        begun = time.perf_counter()
        connection.request("PUT", "/open/k", body)
        answer = connection.getresponse()
        answer.read()
        times.append((time.perf_counter() - begun) * 1000)
        assert answer.status == 200
        for mount in mounts:
            assert (mount / "open" / "k").read_bytes() == body, "a mount shows an old state"
    return times


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        root, log = base / "volume", base / "log"
        words = [*STRATUM, "init", str(root), "--json"]
        facts = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
        subprocess.run([*STRATUM, "bucket", "create", str(root), "open"], check=True, capture_output=True)
        subprocess.run(
            [*STRATUM, "bucket", "set", str(root), "open", "--anonymous", "read-write"], check=True, capture_output=True
        )
        found: dict[int, list[float]] = {0: [], 1: [], 3: []}
        with running(["serve", str(root), "--json"], log):
            endpoint = facts["endpoint"].removeprefix("http://")
            measure(endpoint, [])
            for _ in range(ROUNDS):
                for count in found:
                    with ExitStack() as stack:
                        mounts = [base / f"mount{number}" for number in range(count)]
                        for number, mount in enumerate(mounts):
                            flags = ["--read-only"] if number else []
                            stack.enter_context(running(["mount", str(root), str(mount), *flags], log))
                        found[count] += measure(endpoint, mounts)
                    for mount in mounts:
                        release = [*STRATUM, "mount", str(root), str(mount), "--release"]
                        subprocess.run(release, check=True, capture_output=True)
    alone = statistics.median(found[0])
    print("mounts  p50 ms  p99 ms  p50 against none")
    for count, times in found.items():
        cuts = statistics.quantiles(times, n=100)
        print(f"{count:6}  {cuts[49]:6.2f}  {cuts[98]:6.2f}  {cuts[49] / alone:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
