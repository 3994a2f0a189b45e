"""`make bench-mount`: one table of what a mount does against the bare disk, and against other mounts, in one run.

Every row is measured in alternating rounds on each directory; ratios are of medians of those pairs. Other mounts come as
RIVALS_MOUNTS=name:DIRECTORY[,...]; each directory must be empty. Absolute figures belong to the machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parent.parent
STRATUM = [sys.executable, "-m", "stratum.cli.main"]
MIB = 1024 * 1024
BLOCK = os.urandom(4096)
SCAN_FILES = 10_000
LARGE_BYTES = 512 * MIB
Row = tuple[str, bool]
"""A name, and whether more is better (a rate) or less (a time)."""


@dataclass
class Place:
    name: str
    path: Path
    figures: dict[str, list[float]] = field(default_factory=dict)

    def add(self, row: str, value: float) -> None:
        self.figures.setdefault(row, []).append(value)


def drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def rate(processes: int, seconds: float, work: Callable[[int, int], None]) -> float:
    """Calls of `work(process, number)` a second, in all processes together."""
    context = multiprocessing.get_context("fork")
    counts = context.Array("q", processes, lock=False)
    start = context.Barrier(processes + 1)

    def run(process: int) -> None:
        start.wait()
        end, number = time.perf_counter() + seconds, 0
        while time.perf_counter() < end:
            work(process, number)
            number += 1
        counts[process] = number

    children = [context.Process(target=run, args=(process,)) for process in range(processes)]
    for child in children:
        child.start()
    start.wait()
    begun = time.perf_counter()
    for child in children:
        child.join()
        assert child.exitcode == 0, "a process of the benchmark failed"
    return float(sum(counts)) / (time.perf_counter() - begun)


def make(path: Path, size: int, *, sync: bool) -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o644)
    if size:
        os.write(descriptor, BLOCK[:size])
    if sync:
        os.fsync(descriptor)
    os.close(descriptor)


def small_files(place: Place, folder: Path, seconds: float) -> None:
    for label, size, sync in (
        ("create 4 KiB + fsync", 4096, True),
        ("create 4 KiB", 4096, False),
        ("create empty", 0, False),
    ):
        for processes in (1, 8):
            if size == 0 and processes == 1:
                continue
            below = folder / f"{size}{sync}{processes}"
            below.mkdir()
            value = rate(processes, seconds, lambda p, n, b=below, s=size, y=sync: make(b / f"{p}-{n}", s, sync=y))  # type: ignore[misc]  # bound now
            place.add(f"{label}, {processes} processes", value)
    below = folder / "4096True8"
    counted = [len(list(below.glob(f"{process}-*"))) for process in range(8)]

    def each(act: Callable[[str], object]) -> Callable[[int, int], None]:
        return lambda process, number: void(act(f"{below}/{process}-{number % max(counted[process], 1)}"))

    drop_caches()
    place.add("stat, first time, 8 processes", rate(8, min(seconds, 0.5), each(os.stat)))
    place.add("stat, cached", rate(1, seconds, each(os.stat)))
    place.add("open + read + close, 8 processes", rate(8, seconds, each(read_small)))
    renamed = folder / "renamed"
    renamed.mkdir()
    for process in range(8):
        make(renamed / f"{process}-0", 0, sync=False)
    place.add(
        "rename, 8 processes", rate(8, seconds, lambda p, n: os.rename(f"{renamed}/{p}-{n}", f"{renamed}/{p}-{n + 1}"))
    )
    made = folder / "made"
    made.mkdir()
    place.add("mkdir, 8 processes", rate(8, seconds, lambda p, n: os.mkdir(f"{made}/{p}-{n}")))
    left = [iter(sorted(below.glob(f"{process}-*"))) for process in range(8)]
    total = sum(counted)
    begun = time.perf_counter()
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=unlink_all, args=(names,)) for names in left]
    for child in children:
        child.start()
    for child in children:
        child.join()
    place.add("unlink, 8 processes", total / (time.perf_counter() - begun))


def unlink_all(names: object) -> None:
    for path in names:  # type: ignore[attr-defined]  # an iterator of paths, made before the fork
        os.unlink(path)


def void(_: object) -> None:
    return


def read_small(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.read(descriptor, 8192)
    os.close(descriptor)


def scan(place: Place, folder: Path) -> None:
    below = folder / "scan"
    below.mkdir()
    for number in range(SCAN_FILES):
        (below / f"{number:06d}").touch()
    for label in ("cold", "warm"):
        if label == "cold":
            drop_caches()
        begun = time.perf_counter()
        assert sum(1 for entry in os.scandir(below) if entry.stat().st_size == 0) == SCAN_FILES
        place.add(f"scandir + stat of {SCAN_FILES:,}, {label} (time)", time.perf_counter() - begun)


def large_file(place: Place, folder: Path, seconds: float) -> None:
    path = folder / "large"
    piece = os.urandom(MIB)
    begun = time.perf_counter()
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    for _ in range(LARGE_BYTES // MIB):
        os.write(descriptor, piece)
    os.fsync(descriptor)
    place.add("write 512 MiB + fsync (MiB/s)", LARGE_BYTES / MIB / (time.perf_counter() - begun))
    dice = random.Random(1)

    def overwrite(_process: int, _number: int) -> None:
        os.pwrite(descriptor, BLOCK, dice.randrange(LARGE_BYTES // 4096) * 4096)
        os.fsync(descriptor)

    place.add("random 4 KiB write + fsync", rate(1, seconds, overwrite))
    os.close(descriptor)
    for label in ("cold", "warm"):
        if label == "cold":
            drop_caches()
        begun = time.perf_counter()
        with path.open("rb", buffering=0) as file:
            while file.read(MIB):
                pass
        place.add(f"read 512 MiB, {label} (MiB/s)", LARGE_BYTES / MIB / (time.perf_counter() - begun))
    path.unlink()


def databases(place: Place, folder: Path, seconds: float) -> None:
    for journal in ("delete", "wal"):
        database = sqlite3.connect(folder / f"{journal}.db", isolation_level=None)
        database.execute(f"pragma journal_mode={journal}")
        database.execute("pragma synchronous=full")
        database.execute("create table t(n integer primary key, text)")
        end, count = time.perf_counter() + seconds, 0
        while time.perf_counter() < end:
            database.execute("insert into t(text) values (hex(randomblob(50)))")
            count += 1
        database.close()
        place.add(f"SQLite transactions, {journal}", count / seconds)


def trees(place: Place, folder: Path, archive: Path) -> None:
    def timed(row: str, words: list[str], where: Path) -> None:
        begun = time.perf_counter()
        subprocess.run(words, cwd=where, check=True, capture_output=True)
        place.add(f"{row} (time)", time.perf_counter() - begun)

    timed("untar of 1,200 files", ["tar", "xf", str(archive)], folder)
    timed("git clone", ["git", "clone", "-q", "--no-hardlinks", str(archive.with_name("repository")), "clone"], folder)
    subprocess.run(["git", "status"], cwd=folder / "clone", check=True, capture_output=True)
    timed("git status, warm", ["git", "status"], folder / "clone")


def sources(folder: Path) -> Path:
    """A repository of 1,200 files and an archive of it."""
    repository = folder / "repository"
    repository.mkdir()
    dice = random.Random(2)
    for number in range(1200):
        path = repository / f"d{number % 40}" / f"f{number}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(dice.randbytes(dice.randrange(200, 20_000)))
    for words in (
        ["init", "-q"],
        ["add", "-A"],
        ["-c", "user.name=b", "-c", "user.email=b@example.org", "commit", "-qm", "one"],
    ):
        subprocess.run(["git", *words], cwd=repository, check=True, capture_output=True)
    archive = folder / "archive.tar"
    subprocess.run(["tar", "cf", str(archive), "--exclude=.git", "-C", str(folder), "repository"], check=True)
    return archive


def measure(place: Place, archive: Path, seconds: float) -> None:
    folder = place.path / f"run{time.monotonic_ns()}"
    folder.mkdir()
    small_files(place, folder, seconds)
    scan(place, folder)
    large_file(place, folder, seconds)
    databases(place, folder, seconds)
    trees(place, folder, archive)
    shutil.rmtree(folder)


def report(places: list[Place]) -> None:
    ours, others = places[0], places[1:]
    print("| row | stratum | " + " | ".join(f"x {other.name}" for other in others) + " |")
    print("|---|---|" + "---|" * len(others))
    for row, values in ours.figures.items():
        cells = []
        for other in others:
            ratios = [a / b for a, b in zip(values, other.figures[row], strict=True)]
            cells.append(f"{statistics.median(ratios):.2f} [{min(ratios):.2f}-{max(ratios):.2f}]")
        shown = statistics.median(values)
        print(f"| {row} | {shown:,.0f} | " if shown >= 100 else f"| {row} | {shown:.3g} | ", end="")
        print(" | ".join(cells) + " |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rivals", default=os.environ.get("RIVALS_MOUNTS", ""), help="name:DIRECTORY, several with commas"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        archive = sources(base)
        words = [*STRATUM, "init", str(base / "volume"), "--mount", str(base / "mount"), "--json"]
        json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
        with (base / "log").open("w") as log:
            server = subprocess.Popen([*STRATUM, "serve", str(base / "volume")], stdout=subprocess.PIPE, stderr=log)
        try:
            assert server.stdout is not None
            server.stdout.readline()
            (base / "mount" / "bench").mkdir()
            (base / "disk").mkdir()
            places = [Place("stratum", base / "mount" / "bench"), Place("the bare disk", base / "disk")]
            for rival in filter(None, options.rivals.split(",")):
                name, _, path = rival.partition(":")
                places.append(Place(name, Path(path)))
            for number in range(options.rounds):
                for place in places:
                    print(f"round {number + 1}: {place.name}", file=sys.stderr, flush=True)
                    measure(place, archive, options.seconds)
            family = psutil.Process(server.pid).children(recursive=True)
            mount = next(process for process in family if "mount" in process.cmdline())
            memory = mount.memory_full_info()
        finally:
            server.terminate()
            server.wait()
            release = [*STRATUM, "mount", str(base / "volume"), str(base / "mount"), "--release"]
            subprocess.run(release, check=True, capture_output=True)
    report(places)
    print(f"the mount's process: {memory.uss / MIB:.0f} MiB of its own")
    return 0


if __name__ == "__main__":
    sys.exit(main())
