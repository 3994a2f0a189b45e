"""Helpers that several suites share."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
from botocore.config import Config

from stratum import buckets, filling, mount_table, mounting, objects, volume
from stratum.content import INLINE_BYTES_MAX, NewContent
from stratum.identity import Identities
from stratum.preconditions import NO_CONDITIONS, Conditions
from stratum.schema import ObjectMetadata
from stratum.volume import Volume

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stratum.schema import Inode

BUCKET = "bucket"


def longer(usual: int, soak: int) -> int:
    """How much of something a test marked `longer` does: `usual` in make check, `soak` in make soak."""
    return soak if os.environ.get("STRATUM_SOAK") else usual


def new_seed() -> int:
    """A seed of chance, or the one of STRATUM_SEED that repeats a run. It is printed, so a failure shows it."""
    seed = int(os.environ.get("STRATUM_SEED") or random.SystemRandom().randrange(1 << 30))
    print(f"seed {seed}")
    return seed


def stratum(
    *words: str | Path, expect: int | None = 0, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command line."""
    done = subprocess.run(
        [sys.executable, "-m", "stratum.cli.main", *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {})},
        timeout=120,
    )
    if expect is not None:
        assert done.returncode == expect, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def make_volume(root: Path, *, bucket: str = BUCKET) -> str:
    """An empty volume with an administrator and a bucket; the administrator's id."""
    volume.create(root, {})
    with Volume(root, "test") as opened:
        user, _, _ = Identities(opened).add_user("admin", admin=True)
        opened.mutate(lambda tx: buckets.create(tx, bucket, user.user_id))
    return user.user_id


def put(
    opened: Volume,
    key: str | bytes,
    data: bytes,
    *,
    bucket: str = BUCKET,
    conditions: Conditions = NO_CONDITIONS,
    inline_max: int = INLINE_BYTES_MAX,
) -> Inode:
    """PutObject on the engine."""
    key = key.encode() if isinstance(key, str) else key
    request = objects.PutRequest(bucket, key, hashlib.md5(data).digest(), ObjectMetadata(), conditions=conditions)
    if len(data) <= inline_max:
        return opened.mutate(lambda tx: objects.put(tx, request, NewContent(len(data), inline=data)))
    with opened.segments.writer(len(data)) as writer:
        writer.write(data)
        new = NewContent(len(data), extents=writer.finish())
        writer.committing()
        inode = opened.mutate(lambda tx: objects.put(tx, request, new))
        writer.keep()
    return inode


def get(opened: Volume, key: str | bytes, *, bucket: str = BUCKET) -> bytes:
    key = key.encode() if isinstance(key, str) else key
    return filling.patiently(opened, lambda: objects.read_all(opened, bucket, key))


def delete(opened: Volume, key: str | bytes, *, bucket: str = BUCKET) -> bool:
    key = key.encode() if isinstance(key, str) else key
    return opened.mutate(lambda tx: objects.delete(tx, buckets.get(tx, bucket), key), frees=True)


STARTED: list[Server] = []


class LeapingClock:
    """The wall clock of processes that are started with `environment`; they see `set` at once."""

    def __init__(self, folder: Path) -> None:
        library, self._offset = folder / "leap.so", folder / "leap"
        source = Path(__file__).with_name("leap.c")
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        self.set(0)
        self.environment = {"LD_PRELOAD": str(library), "STRATUM_TEST_LEAP": str(self._offset)}

    def set(self, seconds: int) -> None:
        """How far it is ahead of the true one."""
        with self._offset.open("r+b" if self._offset.exists() else "wb") as file:
            file.write(struct.pack("<q", seconds))


class Server:
    """A `stratum serve` of its own volume, ended by `stop` or `kill`."""

    def __init__(
        self,
        root: Path,
        *,
        mount: bool = False,
        settings: dict[str, dict[str, Any]] | None = None,
        init_words: list[str | Path] | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.environment = environment or {}
        self.root = root / "volume"
        self.mount = root / "mount" if mount else None
        words: list[str | Path] = ["init", self.root, "--json", *(init_words or ())]
        if self.mount:
            words += ["--mount", self.mount]
        facts = json.loads(stratum(*words).stdout)
        self.access_key, self.secret_key = facts["access_key"], facts["secret_key"]
        self.endpoint, self.admin = facts["endpoint"], facts["admin"]
        self.log = root / "serve.log"
        if settings:
            self.configure(settings)
        self.process: subprocess.Popen[str] | None = None
        self.owned = False
        """Whether a fixture stops it; otherwise the end of the test does, however it ends."""

    def configure(self, settings: dict[str, dict[str, Any]]) -> None:
        """Change values in stratum.toml."""
        path = self.root / "stratum.toml"
        lines, section = [], ""
        for line in path.read_text().splitlines():
            if line.startswith("["):
                section = line.strip("[]")
            name = line.partition(" = ")[0]
            wanted = settings.get(section, {})
            lines.append(f"{name} = {json.dumps(wanted[name])}" if name in wanted else line)
        path.write_text("\n".join(lines) + "\n")
        if settings.get("s3", {}).get("tls_certificate"):
            self.endpoint = self.endpoint.replace("http:", "https:")

    def start(self, *words: str) -> Server:
        STARTED.append(self)
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "stratum.cli.main", "serve", str(self.root), "--json", *words],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **self.environment},
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"serve did not get ready:\n{self.log.read_text()[-4000:]}"
        assert json.loads(line)["ready"] is True
        return self

    def stop(self) -> int:
        if self.process is None:
            return 0
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(40)
        finally:
            if self.process.stdout is not None:
                self.process.stdout.close()
            self.process = None
        return code

    def kill(self) -> None:
        """End the supervisor the hard way; its parts follow."""
        assert self.process is not None
        pids = [process["pid"] for process in self.processes()]
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.process = None
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and any(is_alive(pid) for pid in pids):
            time.sleep(0.02)

    def processes(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = [
            p
            for p in json.loads(stratum("status", self.root, "--json", expect=None).stdout)["processes"]
            if p["state"] == "running"
        ]
        return found

    def client(self, access_key: str | None = None, secret_key: str | None = None, **config: Any) -> Any:
        config.setdefault("signature_version", "s3v4")
        config.setdefault("retries", {"max_attempts": 1})
        return boto3.client(
            "s3", endpoint_url=self.endpoint, aws_access_key_id=access_key or self.access_key, aws_secret_access_key=secret_key or self.secret_key,
            region_name="us-east-1", config=Config(**config), verify=False,
        )  # fmt: skip

    def raw(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """One plain request; nothing is added to it."""
        host = self.endpoint.partition("//")[2]
        connection = http.client.HTTPConnection(host, timeout=30)
        try:
            connection.putrequest(method, path, skip_host="Host" in (headers or {}), skip_accept_encoding=True)
            for name, value in (headers or {}).items():
                connection.putheader(name, value)
            if body is not None and not any(
                name.lower() in {"content-length", "transfer-encoding"} for name in headers or {}
            ):
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def wait_for_log(self, pattern: bytes, *, times: int, seconds: float = 20.0) -> None:
        """Until the log has that many lines with the pattern."""
        deadline = time.monotonic() + seconds
        while len(re.findall(pattern, self.log.read_bytes())) < times:
            assert time.monotonic() < deadline, f"no {times} lines with {pattern!r} in the log"
            time.sleep(0.05)

    def errors(self) -> list[str]:
        """Log lines nobody should see."""
        return [line for line in self.log.read_text().splitlines() if " ERROR " in line or "Traceback" in line]


def unseal(folder: Path) -> None:
    """Let the folders in which something was mounted be removed again."""
    mounted = {mount.path for mount in mount_table.mounts()}
    for path, names, _ in os.walk(folder):
        names[:] = [name for name in names if f"{path}/{name}" not in mounted]
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                mounting.seal(descriptor, sealed=False)
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def temporary_folder() -> Iterator[str]:
    """As `tempfile.TemporaryDirectory`, for whoever mounts in it."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            yield folder
        finally:
            unseal(Path(folder))


def is_alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextlib.contextmanager
def serving(
    root: Path, *, mount: bool = False, settings: dict[str, dict[str, Any]] | None = None, allow_errors: bool = False
) -> Iterator[Server]:
    server = Server(root, mount=mount, settings=settings)
    server.owned = True
    server.start()
    try:
        yield server
    finally:
        code = server.stop()
        assert code == 0, f"serve ended with {code}:\n{server.log.read_text()[-3000:]}"
    if not allow_errors:
        assert server.errors() == [], "unexpected log lines"


def stop_forgotten() -> None:
    """End what a failed test left running: a dead mount in a temporary folder hangs whoever cleans up."""
    for server in STARTED:
        if not server.owned and server.process is not None:
            server.process.kill()
            server.process.wait()
            server.process = None
            time.sleep(0.5)
            if server.mount:
                subprocess.run(["umount", "--lazy", str(server.mount)], capture_output=True)


@contextlib.contextmanager
def disk_of(root: Path, size: int) -> Iterator[Path]:
    """An ext4 of so many bytes, in a file of `root`, mounted at `root/disk`."""
    need_fuse()
    image, folder = root / "image", root / "disk"
    with image.open("wb") as file:
        file.truncate(size)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    folder.mkdir()
    subprocess.run(["mount", "-o", "loop", image, folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def need_fuse() -> None:
    """A mount needs /dev/fuse and root; on CI their absence is a failure, never a skip."""
    import pytest

    if not Path("/dev/fuse").exists() or os.geteuid() != 0:
        if os.environ.get("CI"):
            pytest.fail("/dev/fuse is missing or we are not root")
        pytest.skip("no /dev/fuse here")
