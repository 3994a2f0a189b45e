"""The units: systemd reads them, rates them as hardened, and what they start exists."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from stratum.cli.main import build_parser

FOLDER = Path(__file__).parents[2] / "systemd"
UNITS = sorted(path for path in FOLDER.iterdir() if path.suffix in {".service", ".socket", ".timer", ".target"})
SERVICES = [path for path in UNITS if path.suffix == ".service"]
HELPER = "stratum-mountd.service"
EXPOSURE_MAX = 2.0
HELPER_EXPOSURE_MAX = 4.5


@pytest.fixture
def analyze() -> str:
    found = shutil.which("systemd-analyze")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("systemd-analyze is missing; `make install` installs systemd")
        pytest.skip("no systemd-analyze here")
    return found


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The units, starting a program that is there: verify looks for it."""
    folder = tmp_path / "units"
    folder.mkdir()
    program = tmp_path / "stratum"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for path in UNITS:
        (folder / path.name).write_text(path.read_text().replace("/usr/bin/stratum", str(program)))
    return folder


def test_systemd_finds_no_fault(analyze: str, installed: Path) -> None:
    names = [path.name.replace("@.", "@mnt-data.") for path in UNITS]
    done = subprocess.run(
        [analyze, "verify", "--man=no", *names], capture_output=True, text=True, check=False, cwd=installed,
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{installed}:"},
    )  # fmt: skip
    ours = [line for line in done.stderr.splitlines() if "stratum" in line]
    assert (done.returncode, ours) == (0, []), done.stderr


@pytest.mark.parametrize("path", SERVICES, ids=lambda path: path.name)
def test_every_service_is_hardened(analyze: str, path: Path) -> None:
    done = subprocess.run(
        [analyze, "security", "--no-pager", "--offline=true", str(path)], capture_output=True, text=True, check=True
    )
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found is not None, done.stdout
    assert float(found[1]) <= (HELPER_EXPOSURE_MAX if path.name == HELPER else EXPOSURE_MAX)


@pytest.mark.parametrize("path", SERVICES, ids=lambda path: path.name)
def test_what_a_service_starts_exists(path: Path) -> None:
    line = re.search(r"^ExecStart=/usr/bin/stratum (.*)$", path.read_text(), re.MULTILINE)
    assert line is not None
    build_parser().parse_args(line[1].replace("${STRATUM_VOLUME}", "/srv/volume").replace("%f", "/mnt/data").split())


def test_services_that_stay_tell_when_they_are_ready_and_that_they_live() -> None:
    for path in SERVICES:
        text = path.read_text()
        if "Type=oneshot" in text or path.name == HELPER:
            continue
        assert "\nType=notify\n" in text, path.name
        assert "\nWatchdogSec=" in text, path.name
        assert "\nStartLimitBurst=" in text, path.name
