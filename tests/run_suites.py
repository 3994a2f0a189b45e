"""Run the suites of `make check` (or `make soak`), each with its time beside its budget, and the coverage of all processes."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUITES = {"engine": 240, "s3": 240, "mount": 240, "tiers": 180, "appliance": 120}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--soak", action="store_true", help="the long versions of the seeded tests")
    parser.add_argument("suites", nargs="*", default=list(SUITES))
    options = parser.parse_args()
    environment = {**os.environ, "STRATUM_SOAK": "1" if options.soak else "", "COVERAGE_FILE": str(ROOT / ".coverage")}
    for stale in ROOT.glob(".coverage.*"):
        stale.unlink()
    failed, lines = [], []
    for suite in options.suites:
        started = time.monotonic()
        words = [
            sys.executable,
            "-m",
            "coverage",
            "run",
            "-m",
            "pytest",
            f"tests/{suite}",
            *(["-m", "soak or longer", "--timeout", "5400"] if options.soak else ["-m", "not soak"]),
        ]
        if options.soak:
            words = [sys.executable, *words[4:]]
        code = subprocess.run(words, cwd=ROOT, env=environment).returncode
        if code not in {0, 5}:
            failed.append(suite)
        lines.append(
            f"suite {suite:10} {time.monotonic() - started:6.1f} s of {SUITES[suite]} s{'' if code in {0, 5} else '  FAILED'}"
        )
    if not options.soak:
        subprocess.run([sys.executable, "-m", "coverage", "combine", "--quiet"], cwd=ROOT, env=environment)
        subprocess.run(
            [sys.executable, "-m", "coverage", "report", "--skip-covered", "--precision=1"], cwd=ROOT, env=environment
        )
    print("\n".join(lines))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
