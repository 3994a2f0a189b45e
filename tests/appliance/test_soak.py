"""An hour of mixed load from 50 clients on both faces, with faults by seed: nothing is lost, mixed up or leaked, and every error has a cause.

STRATUM_SOAK_S shortens it, STRATUM_SEED repeats one. Clients own their keys, so each knows what it must read; after an operation that failed
either outcome is right until the next one that succeeds.
"""

from __future__ import annotations

import datetime as dt
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from botocore.exceptions import BotoCoreError, ClientError

from tests.support import LeapingClock, Server, disk_of, new_seed, stratum

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SECONDS = float(os.environ.get("STRATUM_SOAK_S") or 3600)
S3_CLIENTS, MOUNT_CLIENTS = 30, 20
CLONES_MAX = 2
KEYS = 60
"""The last of them is asked for every half minute: it has moved by then."""
SIZES = (0, 100, 5_000, 40_000, 300_000, 2_000_000)
DISK_BYTES = 3 << 30
FAULT_EVERY_S = 20.0
DESCRIPTORS_MAX = 2 * 256 + 256
"""Of a process: two caches of 256 data files, and connections."""
BUCKET = "soak"
Content = bytes | None


@dataclass(slots=True)
class Fault:
    """From `began` to `ended` errors of these faces have a cause. Moments are of time.time()."""

    name: str
    faces: frozenset[str]
    began: float
    ended: float = float("inf")
    leap_s: int = 0
    """Of the server's clock meanwhile: its log lines carry that time."""


@dataclass(slots=True)
class Faults:
    seed: int
    told: list[Fault] = field(default_factory=list)

    def explain(self, face: str, began: float, ended: float) -> bool:
        return any(face in fault.faces and began <= fault.ended and ended >= fault.began for fault in list(self.told))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own for the hot tier: it is filled to the brim."""
    with disk_of(tmp_path, DISK_BYTES) as folder:
        yield folder


class Client(threading.Thread):
    """Puts, reads, removes and lists keys of its own, through one face and now and then the other; clones them, and looks into the clones."""

    def __init__(self, server: Server, faults: Faults, number: int, ending: threading.Event) -> None:
        super().__init__(daemon=True)
        self.face = "s3" if number < S3_CLIENTS else "mount"
        self._server = server
        self._faults = faults
        self._chance = random.Random(faults.seed * 1000 + number)
        self._prefix = f"client-{number}"
        self._ending = ending
        self.may: dict[str, set[str]] = {f"{self._prefix}/{key}": {""} for key in range(KEYS)}
        """Digests of what a key may hold; "" is nothing."""
        self.clones: dict[str, dict[str, set[str]]] = {}
        """Of each folder that is a clone of this client's: what its keys may hold."""
        self._cloned = 0
        self.s3: Any = server.client(read_timeout=120, connect_timeout=20, max_pool_connections=2)
        assert server.mount is not None
        self._folder = server.mount / BUCKET
        self.done = self.failed = 0
        self.wrong: list[str] = []

    def run(self) -> None:
        while not self._ending.is_set():
            key = f"{self._prefix}/{int(KEYS * self._chance.random() ** 3)}"
            works = (self.put, self.read, self.remove, self.list, self.read_clone, self.clone)
            work = self._chance.choices(works, (5, 8, 2, 1, 1, 0.03))[0]
            face = self.face if self._chance.random() < 0.9 else {"s3": "mount", "mount": "s3"}[self.face]
            began = time.time()
            try:
                work(face, key)
                self.done += 1
            except (ClientError, BotoCoreError, OSError) as error:
                self.failed += 1
                if not self._faults.explain(face, began, time.time()):
                    self.wrong.append(f"{time.time():.1f} {face} {work.__name__} {key}: {error!r}")
                time.sleep(0.2)
            time.sleep(self._chance.random() * 0.1)

    # -- one operation ------------------------------------------------------------------------------------------------

    def put(self, face: str, key: str) -> None:
        data = self._chance.randbytes(self._chance.choice(SIZES))
        self.may[key] = self.may[key] | {digest(data)}
        if face == "s3":
            self.s3.put_object(Bucket=BUCKET, Key=key, Body=data)
        else:
            path = self._folder / key
            path.parent.mkdir(exist_ok=True)
            fresh = path.with_name(f".{path.name}.{self._chance.getrandbits(32):x}")
            with fresh.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            fresh.rename(path)
        self.may[key] = {digest(data)}

    def read(self, face: str, key: str) -> None:
        found = digest(self.get(face, key))
        if found not in self.may[key]:
            self.wrong.append(
                f"{time.time():.1f} {face} read of {key}: {found[:8]!r}, not one of {[known[:8] for known in self.may[key]]}"
            )

    def get(self, face: str, key: str) -> Content:
        if face == "s3":
            try:
                data: bytes = self.s3.get_object(Bucket=BUCKET, Key=key)["Body"].read()
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                    return None
                raise
            return data
        with self.same_mount():
            try:
                return (self._folder / key).read_bytes()
            except FileNotFoundError:
                return None

    @contextmanager
    def same_mount(self) -> Iterator[None]:
        """What is not there is not there only if one mount stood there from beginning to end: between two of them the folder is empty."""
        before = self._folder.stat()
        yield
        after = self._folder.stat()
        if (before.st_dev, before.st_ino) != (after.st_dev, after.st_ino):
            raise OSError(errno.ENOTCONN, "another mount")

    def remove(self, face: str, key: str) -> None:
        self.may[key] = self.may[key] | {""}
        if face == "s3":
            self.s3.delete_object(Bucket=BUCKET, Key=key)
        else:
            with self.same_mount():
                (self._folder / key).unlink(missing_ok=True)
        self.may[key] = {""}

    def clone(self, face: str, _: str) -> None:
        """At most CLONES_MAX at a time; what goes through the other face meanwhile is somebody else's."""
        if len(self.clones) == CLONES_MAX:
            name = next(iter(self.clones))
            del self.clones[name]
            self.remove_clone(face, name)
        if all("" in digests for digests in self.may.values()):
            return  # perhaps there is no folder
        self._cloned += 1
        name = f"clone-{self._prefix}-{self._cloned}"
        held = {key.replace(self._prefix, name, 1): set(digests) for key, digests in self.may.items()}
        done = stratum("clone", self._server.root, f"{BUCKET}/{self._prefix}", f"{BUCKET}/{name}", expect=None)
        if done.returncode:
            raise OSError(errno.EIO, done.stderr)
        self.clones[name] = held

    def read_clone(self, face: str, _: str) -> None:
        if self.clones:
            name = self._chance.choice(list(self.clones))
            self.compare_clone(face, name, self._chance.choice(list(self.clones[name])))

    def compare_clone(self, face: str, name: str, key: str) -> None:
        found, held = digest(self.get(face, key)), self.clones[name]
        if found not in held[key]:
            self.wrong.append(f"{time.time():.1f} {face} read of {key}: {found[:8]!r}, not one of {held[key]}")
        held[key] = {found}  # nobody writes there

    def remove_clone(self, face: str, name: str) -> None:
        if face == "s3":
            for item in self.s3.list_objects_v2(Bucket=BUCKET, Prefix=f"{name}/").get("Contents", ()):
                self.s3.delete_object(Bucket=BUCKET, Key=item["Key"])
        else:
            with self.same_mount():
                shutil.rmtree(self._folder / name)

    def list(self, face: str, _: str) -> None:
        if face == "s3":
            answer = self.s3.list_objects_v2(Bucket=BUCKET, Prefix=f"{self._prefix}/")
            found = {item["Key"] for item in answer.get("Contents", ())}
        else:
            folder = self._folder / self._prefix
            with self.same_mount():
                found = {f"{self._prefix}/{name}" for name in os.listdir(folder)} if folder.exists() else set()
        for key, digests in self.may.items():
            if (key in found and digests == {""}) or (key not in found and "" not in digests):
                self.wrong.append(f"{time.time():.1f} {face} list: {key} is {'there' if key in found else 'missing'}")


def digest(data: Content) -> str:
    return "" if data is None else hashlib.md5(data).hexdigest()


# -- faults -------------------------------------------------------------------------------------------------------------


class Injector(threading.Thread):
    def __init__(
        self, server: Server, faults: Faults, disk: Path, remote: Path, clock: LeapingClock, ending: threading.Event
    ) -> None:
        super().__init__(daemon=True)
        self._server, self._faults, self._disk, self._remote, self._ending = server, faults, disk, remote, ending
        self._clock = clock
        self._chance = random.Random(faults.seed)

    def run(self) -> None:
        kinds = (self.kill_worker, self.kill_mount, self.kill_tierd, self.disk_full, self.cold_away, self.clock_leaps)
        while not self._ending.wait(FAULT_EVERY_S * (0.5 + self._chance.random())):
            self._chance.choice(kinds)()

    def _kill(self, role: str, faces: frozenset[str], seconds: float) -> None:
        # It is on record before it happens: what fails in this moment has its cause.
        fault = Fault(f"kill {role}", faces, time.time())
        self._faults.told.append(fault)
        pids = [process["pid"] for process in self._server.processes() if process["role"] == role]
        if pids:
            os.kill(self._chance.choice(pids), signal.SIGKILL)
        time.sleep(seconds)
        fault.ended = time.time()

    def kill_worker(self) -> None:
        self._kill("s3", frozenset({"s3"}), 10)

    def kill_mount(self) -> None:
        self._kill("mount", frozenset({"mount"}), 20)

    def kill_tierd(self) -> None:
        self._kill("tierd", frozenset(), 5)

    def disk_full(self) -> None:
        fault = Fault("disk full", frozenset({"s3", "mount"}), time.time())
        self._faults.told.append(fault)
        ballast = self._disk / "ballast"
        with ballast.open("wb") as file:
            stat = os.statvfs(self._disk)
            with suppress(OSError):  # somebody else took the last of it: it is full
                os.posix_fallocate(file.fileno(), 0, max(stat.f_bavail * stat.f_frsize - (4 << 20), 1 << 20))
        time.sleep(5)
        ballast.unlink()
        time.sleep(15)
        fault.ended = time.time()

    def cold_away(self) -> None:
        fault = Fault("cold away", frozenset({"s3", "mount"}), time.time())
        self._faults.told.append(fault)
        away = self._remote.with_name("unplugged")
        self._remote.rename(away)
        time.sleep(15)
        away.rename(self._remote)
        time.sleep(30)  # the breaker's pause
        fault.ended = time.time()

    def clock_leaps(self) -> None:
        """By hours, there and back; boto3 signs again with the server's time when it is refused, once."""
        fault = Fault("clock leaps", frozenset({"s3"}), time.time())
        fault.leap_s = self._chance.choice((-50, -3, 3, 50)) * 3600
        self._faults.told.append(fault)
        self._clock.set(fault.leap_s)
        time.sleep(10)
        self._clock.set(0)
        time.sleep(3)
        fault.ended = time.time()


# -- leaks --------------------------------------------------------------------------------------------------------------


def measured(server: Server) -> tuple[float, int]:
    """(resident bytes of all processes of the volume, open descriptors of the one that has the most)."""
    size, descriptors = 0.0, 0
    for process in server.processes():
        try:
            inside = psutil.Process(process["pid"])
            size += inside.memory_full_info().pss
            descriptors = max(descriptors, inside.num_fds())
        except psutil.Error:
            continue
    return size, descriptors


def unexplained_lines(server: Server, faults: Faults) -> list[str]:
    found = []
    for line in server.errors():
        try:
            moment = dt.datetime.strptime(line[:23] + "+0000", "%Y-%m-%dT%H:%M:%S.%f%z").timestamp()
        except ValueError:
            moment = 0.0
        if not any(
            fault.began - 1 <= moment - leap_s <= fault.ended + 30
            for fault in faults.told
            for leap_s in {0, fault.leap_s}
        ):
            found.append(line)
    return found


@pytest.mark.soak
@pytest.mark.timeout(SECONDS + 1200)
def test_an_hour_of_everything(tmp_path: Path, disk: Path) -> None:
    seed = new_seed()
    faults = Faults(seed)
    words: list[str | Path] = ["--hot", disk / "hot", "--create", "--ec", "2+1"]
    words += [word for number in range(3) for word in ("--warm", tmp_path / f"d{number}")]
    clock = LeapingClock(tmp_path)
    server = Server(tmp_path, mount=True, init_words=words, environment=clock.environment)
    server.configure(
        {
            "tiering": {"interval_s": 0.5, "mode": "strict", "idle_s": 10.0, "cold_after_s": 20.0},
            "cold": {"delete_after_s": 5.0},
            "log": {"level": "warning"},
        }
    )
    remote = tmp_path / "archive"
    remote.mkdir()
    stratum("cold", "add", server.root, "archive", "--directory", remote)
    server.start()
    try:
        server.client().create_bucket(Bucket=BUCKET)
        ending = threading.Event()
        clients = [Client(server, faults, number, ending) for number in range(S3_CLIENTS + MOUNT_CLIENTS)]
        injector = Injector(server, faults, disk, remote, clock, ending)
        for thread in (*clients, injector):
            thread.start()
        samples = []
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            time.sleep(min(10.0, SECONDS / 40))
            samples.append(measured(server))
        ending.set()
        for thread in (*clients, injector):
            thread.join(180)
            assert not thread.is_alive(), f"seed {seed}: {thread} hangs"
        wrong = [line for client in clients for line in client.wrong]
        done, failed = sum(client.done for client in clients), sum(client.failed for client in clients)
        kinds = ", ".join(f"{count} {name}" for name, count in Counter(fault.name for fault in faults.told).items())
        print(f"soak: {done} operations, {failed} failed, {len(wrong)} without a cause; faults: {kinds}")
        assert wrong == [], f"seed {seed}"
        quarter = len(samples) // 4
        early = statistics.median(size for size, _ in samples[quarter : 2 * quarter])
        late = statistics.median(size for size, _ in samples[3 * quarter :])
        descriptors = max(count for _, count in samples)
        print(
            f"soak: {early:.0f} bytes in the second quarter, {late:.0f} in the last; {descriptors} descriptors at most"
        )
        assert late <= early * 1.3 + 100e6, f"seed {seed}: memory grows"
        assert descriptors <= DESCRIPTORS_MAX, f"seed {seed}"
        for client in clients:
            for key in client.may:
                client.read("s3", key)
                client.read("mount", key)
            for name, keys in client.clones.items():
                for key in keys:
                    client.compare_clone("s3", name, key)
                    client.compare_clone("mount", name, key)
            assert client.wrong == [], f"seed {seed}"
        print(f"soak: {sum(client._cloned for client in clients)} clones")
        time.sleep(10)  # what was deleted last is given back
        assert json.loads(stratum("gc", server.root, "--json").stdout)["leaked_objects"] == 0, f"seed {seed}"
        assert unexplained_lines(server, faults) == [], f"seed {seed}"
    finally:
        code = server.stop()
    assert code == 0
    assert stratum("fsck", server.root).stdout == "clean\n", f"seed {seed}"
