"""kill -9 of any process, at seeded moments, under mixed S3 and mount load: no acknowledged write is lost, no wrong byte served."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from botocore.exceptions import BotoCoreError, ClientError

from tests.support import Server, need_fuse, new_seed, stratum

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SIZES = (100, 5_000, 40_000, 700_000, 5_000_000)
BUCKET = "crash"
ABSENT = -1


def content(key: str, version: int) -> bytes:
    """What version `version` of `key` holds: recognisable, and of a size that depends on both."""
    dice = random.Random(f"{key} {version}")
    return f"{key} {version} ".encode().ljust(40) + dice.randbytes(dice.choice(SIZES) if dice.random() < 0.9 else 0)


def version_of(key: str, data: bytes | None) -> int:
    """The version that `data` is, whole; raises if it is none."""
    if data is None:
        return ABSENT
    name, number, *_ = data[:40].split()
    assert name.decode() == key, f"{key} holds bytes of {name!r}"
    assert data == content(key, int(number)), f"{key} holds a damaged version {int(number)} ({len(data)} bytes)"
    return int(number)


class Writer(threading.Thread):
    """Writes versions of its own keys through one face and remembers what was acknowledged."""

    def __init__(
        self,
        name: str,
        write: Callable[[str, bytes], None],
        remove: Callable[[str], None],
        seed: int,
        ending: threading.Event,
    ) -> None:
        super().__init__(name=name, daemon=True)
        self.keys = [f"{name}/key{number}" for number in range(6)]
        self.acknowledged = dict.fromkeys(self.keys, ABSENT)
        self.possible: dict[str, set[int]] = {key: {ABSENT} for key in self.keys}
        self.done = 0
        self._write, self._remove = write, remove
        self._dice = random.Random(seed)
        self._ending = ending
        self._version = 0

    def run(self) -> None:
        while not self._ending.is_set():
            key = self._dice.choice(self.keys)
            self._version += 1
            wanted = ABSENT if self._dice.random() < 0.1 else self._version
            self.possible[key] = {*self.possible[key], wanted}
            try:
                if wanted == ABSENT:
                    self._remove(key)
                else:
                    self._write(key, content(key, wanted))
            except (ClientError, BotoCoreError, OSError):
                time.sleep(0.02)  # it may or may not have happened: both are possible until something is acknowledged
                continue
            self.acknowledged[key] = wanted
            self.possible[key] = {wanted}
            self.done += 1

    def check(self, read: Callable[[str], bytes | None]) -> None:
        for key in self.keys:
            found = version_of(key, read(key))
            assert found in self.possible[key], (
                f"{key}: version {found} is there, acknowledged was {self.acknowledged[key]}, possible {self.possible[key]}"
            )


class Crash:
    def __init__(self, root: Path, seed: int) -> None:
        self.server = Server(root, mount=True, settings={"s3": {"threads": 8}}).start()
        assert self.server.mount is not None
        self.home = self.server.mount / BUCKET
        stratum("bucket", "create", self.server.root, BUCKET)
        self.dice = random.Random(seed)
        self.seed = seed
        self.writers: list[Writer] = []

    def client(self) -> Any:
        return self.server.client(retries={"max_attempts": 0}, connect_timeout=5, read_timeout=20)

    def mounted_device(self) -> int:
        """The mount's device number; raises if what lies under the mountpoint is all there is."""
        device = self.home.parent.stat().st_dev
        if device == self.server.root.stat().st_dev:
            raise OSError("not mounted")
        return device

    def write_file(self, key: str, data: bytes) -> None:
        """Replace a file as an editor does; durable when this returns."""
        device = self.mounted_device()
        path = self.home / key
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(path.name + ".new")
        with new.open("wb") as file:
            if os.fstat(file.fileno()).st_dev != device:
                raise OSError("written beside the mount")
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.rename(path)
        if self.mounted_device() != device:
            raise OSError("another mount by now")

    def remove_file(self, key: str) -> None:
        device = self.mounted_device()
        (self.home / key).unlink(missing_ok=True)
        if self.mounted_device() != device:
            raise OSError("another mount by now")

    def read_s3(self, key: str) -> bytes | None:
        client = self.client()
        for _ in range(100):
            try:
                data: bytes = client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
                return data
            except ClientError as error:
                if error.response["Error"]["Code"] == "NoSuchKey":
                    return None
                time.sleep(0.1)
            except BotoCoreError:
                time.sleep(0.1)
        raise AssertionError(f"{key} cannot be read (seed {self.seed})")

    def read_file(self, key: str) -> bytes | None:
        try:
            return (self.home / key).read_bytes()
        except FileNotFoundError:
            return None

    def begin(self) -> threading.Event:
        ending = threading.Event()
        fresh = not self.writers
        made = []
        for number in range(4):
            client = self.client()
            if number < 2:
                write = lambda key, data, client=client: client.put_object(Bucket=BUCKET, Key=key, Body=data)  # noqa: E731
                remove = lambda key, client=client: client.delete_object(Bucket=BUCKET, Key=key)  # noqa: E731
                writer = Writer(f"s3-{number}", write, remove, self.seed + number, ending)
            else:
                writer = Writer(f"mount-{number}", self.write_file, self.remove_file, self.seed + number, ending)
            if not fresh:
                before = self.writers[number]
                writer.acknowledged, writer.possible, writer._version, writer._dice, writer.done = (
                    before.acknowledged,
                    before.possible,
                    before._version,
                    before._dice,
                    before.done,
                )
            made.append(writer)
        self.writers = made
        for writer in made:
            writer.start()
        return ending

    def kill_something(self) -> str:
        processes = self.server.processes()
        victim = self.dice.choice(processes)
        if victim["role"] == "supervisor":
            self.server.kill()
            self.server.start()
        else:
            os.kill(victim["pid"], signal.SIGKILL)
        return str(victim["role"])

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + 40
        while time.monotonic() < deadline:
            try:
                self.client().list_buckets()
                if os.path.ismount(self.server.mount or "") and self.home.is_dir():
                    return
            except (ClientError, BotoCoreError, OSError):
                pass
            time.sleep(0.05)
        raise AssertionError(f"not up again after a kill (seed {self.seed}):\n{self.server.log.read_text()[-3000:]}")


def crash_rounds(root: Path, rounds: int) -> None:
    need_fuse()
    seed = new_seed()
    crash = Crash(root, seed)
    killed = []
    try:
        for _ in range(rounds):
            ending = crash.begin()
            time.sleep(crash.dice.uniform(0.1, 0.8))
            killed.append(crash.kill_something())
            time.sleep(crash.dice.uniform(0.0, 0.3))
            ending.set()
            for writer in crash.writers:
                writer.join(60)
                assert not writer.is_alive(), f"{writer.name} hangs (seed {seed}, killed {killed[-1]})"
            crash.wait_until_up()
            for writer in crash.writers:
                writer.check(crash.read_s3)
                writer.check(crash.read_file)
    finally:
        code = crash.server.stop()
    assert code == 0
    assert sum(writer.done for writer in crash.writers) > rounds, (
        f"nothing was written, so nothing was tested (killed {killed})"
    )
    assert json.loads(stratum("fsck", crash.server.root, "--json").stdout)["findings"] == []
    stratum("gc", crash.server.root, "--apply")
    assert json.loads(stratum("gc", crash.server.root, "--json").stdout)["leaked_bytes"] == 0
    assert json.loads(stratum("fsck", crash.server.root, "--json").stdout)["findings"] == []
    status = json.loads(stratum("status", crash.server.root, "--json").stdout)
    stored = sum(name.stat().st_blocks * 512 for name in (crash.server.root / "hot").rglob("*.segment"))
    assert stored <= status["bytes"] + 4096 * status["objects"] + 65536, "data files hold more than the objects do"
    print(f"killed {killed}, {sum(writer.done for writer in crash.writers)} operations acknowledged")


def test_crash(tmp_path: Path) -> None:
    crash_rounds(tmp_path, 4)


@pytest.mark.soak
@pytest.mark.timeout(5400)
def test_crash_many_rounds(tmp_path: Path) -> None:
    crash_rounds(tmp_path, 200)
