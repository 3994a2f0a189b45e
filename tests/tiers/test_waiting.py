"""What a process sees that waits for a remote: how long, and how it ends the wait."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from botocore.exceptions import ClientError

from tests.support import Server, need_fuse, stratum
from tests.tiers.fault_proxy import FaultProxy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BUCKET = "tiered"
DATA = os.urandom(700_000)
RECALL_S_MAX = 6.0


class Far:
    """A served and mounted volume whose remote answers nothing while it is `away`."""

    def __init__(self, server: Server, proxy: FaultProxy) -> None:
        assert server.mount is not None
        self.server = server
        self.proxy = proxy
        self.s3: Any = server.client(read_timeout=60, retries={"total_max_attempts": 1})
        self.home = server.mount / BUCKET

    def away(self, *, away: bool = True) -> None:
        """A request that hangs when it comes back goes on hanging."""
        self.proxy.plan = lambda method, path, _: "hang" if away and method == "GET" and "/v1/" in path else ""

    def cold(self, key: str, data: bytes = DATA) -> Path:
        """A file whose bytes lie in the remote alone."""
        self.s3.put_object(Bucket=BUCKET, Key=key, Body=data)
        stratum("tier", "move", self.server.root, f"{BUCKET}/{key}", "cold", "--wait")
        return self.home / key


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, moto: str) -> Iterator[Far]:
    need_fuse()
    root = tmp_path_factory.mktemp("waiting")
    proxy = FaultProxy(moto)
    credentials = root / "credentials"
    credentials.write_text('{"access_key": "AKREMOTE", "secret_key": "remotesecretvalue"}')
    credentials.chmod(0o600)
    server = Server(root, mount=True)
    server.owned = True
    unpressed = {"low_percent": 99.7, "high_percent": 99.8, "emergency_percent": 99.9}
    server.configure({
        "tiering": {"interval_s": 0.1, **unpressed}, "cold": {"recall_s_max": RECALL_S_MAX, "request_s_max": 25.0},
    })  # fmt: skip
    stratum(
        "cold", "add", server.root, "far", "--endpoint", proxy.endpoint, "--bucket", "waiting", "--create-bucket", "--credentials", credentials,
    )  # fmt: skip
    server.start()
    made = Far(server, proxy)
    made.s3.create_bucket(Bucket=BUCKET)
    try:
        yield made
    finally:
        made.away(away=False)
        code = server.stop()
        proxy.stop()
    assert code == 0
    expected = ("operation_failed operation=read", "internal_error", "body_broken")
    assert [line for line in server.errors() if "Traceback" in line or not any(word in line for word in expected)] == []


@pytest.fixture
def far(served: Far) -> Iterator[Far]:
    served.away(away=False)
    yield served
    served.away(away=False)


@pytest.mark.parametrize("face", ["s3", "mount"])
def test_a_read_waits_one_deadline(far: Far, face: str) -> None:
    path = far.cold(f"once-{face}")
    read = path.read_bytes if face == "mount" else partial(far.s3.get_object, Bucket=BUCKET, Key=path.name)
    far.away()
    began = time.monotonic()
    with pytest.raises((ClientError, OSError)):
        read()
    assert RECALL_S_MAX * 0.9 <= time.monotonic() - began < RECALL_S_MAX * 1.7


def test_what_the_kernel_asks_for_again_has_waited_already(far: Far) -> None:
    """A handle from before the file went goes through the kernel's cache, which asks for a range and then for its pages."""
    far.s3.put_object(Bucket=BUCKET, Key="was-hot", Body=DATA)
    path = far.home / "was-hot"
    with path.open("rb", buffering=0) as file:
        stratum("tier", "move", far.server.root, f"{BUCKET}/was-hot", "cold", "--wait")
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        far.away()
        began = time.monotonic()
        with pytest.raises(OSError, match="Input/output error"):
            file.read(300_000)
        assert RECALL_S_MAX * 0.9 <= time.monotonic() - began < RECALL_S_MAX * 1.7


WAITS = """
import os, signal, sys
how, path = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore both
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
if how.endswith("caught"):
    signal.signal(getattr(signal, how.split()[0]), lambda *_: os._exit(7))
elif how == "restarted":
    signal.signal(signal.SIGALRM, lambda *_: print("rang", flush=True))
    signal.siginterrupt(signal.SIGALRM, False)
file = open(path, "rb", buffering=0)
print("opened", flush=True)
print(len(os.pread(file.fileno(), 1000, 0)), flush=True)
"""


def _waiter(far: Far, path: Path, how: str) -> subprocess.Popen[str]:
    """A process whose read has reached the remote."""
    far.proxy.requests.clear()
    process = subprocess.Popen([sys.executable, "-c", WAITS, how, path], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "opened\n"
    deadline = time.monotonic() + 20
    while not any(method == "GET" and "/v1/" in asked for method, asked in far.proxy.requests):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.mark.parametrize(
    ("how", "signal_sent", "code"),
    [
        ("", signal.SIGKILL, -signal.SIGKILL), ("", signal.SIGINT, -signal.SIGINT), ("", signal.SIGTERM, -signal.SIGTERM), ("", signal.SIGQUIT, -signal.SIGQUIT),
        ("", signal.SIGALRM, -signal.SIGALRM), ("SIGTERM caught", signal.SIGTERM, 7), ("SIGINT caught", signal.SIGINT, 7),
    ],
)  # fmt: skip
def test_who_waits_for_a_remote_can_be_ended(far: Far, how: str, signal_sent: signal.Signals, code: int) -> None:
    path = far.cold(f"ended-{signal_sent.name}-{how.partition(' ')[2]}")
    far.away()
    with _waiter(far, path, how) as process:
        process.send_signal(signal_sent)
        assert process.wait(RECALL_S_MAX * 0.7) == code, "long before the read would have failed"
    far.away(away=False)


def test_a_signal_that_ends_nothing_costs_no_bytes(far: Far) -> None:
    """The read goes on and the handler runs when it returns; a signal that ends the process ends it then, too."""
    path = far.cold("restarted")
    gate = threading.Event()

    def plan(method: str, asked: str, _number: int) -> str:
        if method == "GET" and "/v1/" in asked:
            gate.wait(20)
        return ""

    far.proxy.plan = plan
    for ended in (False, True):
        if ended:
            path = far.cold("restarted-and-ended")
            gate.clear()
        with _waiter(far, path, "restarted") as process:
            process.send_signal(signal.SIGALRM)
            if ended:
                time.sleep(0.3)
                process.send_signal(signal.SIGTERM)
                assert process.wait(RECALL_S_MAX * 0.7) == -signal.SIGTERM
            gate.set()
            told = process.communicate(timeout=20)[0]
        if not ended:
            assert sorted(told.split()) == ["1000", "rang"]


@pytest.mark.parametrize("change", ["append", "edit", "copied"])
def test_what_was_just_written_is_read_while_the_remote_is_away(far: Far, change: str) -> None:
    """Of a cold file: not with the page or the range that the kernel would read around it, of which the rest is away."""
    path = far.cold(f"partly-{change}")
    at = len(DATA) if change == "append" else 300_001
    new = b"just written"
    far.away()
    with path.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), new, at)
        assert os.pread(file.fileno(), len(new), at) == new, "before it is synced"
        os.fsync(file.fileno())
        assert os.pread(file.fileno(), len(new), at) == new
    if change == "copied":
        stratum("clone", far.server.root, f"{BUCKET}/{path.name}", f"{BUCKET}/{path.name}-clone")
        path = far.home / f"{path.name}-clone"
    for _ in range(2):
        with path.open("rb", buffering=0) as file:
            assert os.pread(file.fileno(), len(new), at) == new
    assert (
        far.s3.get_object(Bucket=BUCKET, Key=path.name, Range=f"bytes={at}-{at + len(new) - 1}")["Body"].read() == new
    )
    far.away(away=False)


def _mapped(path: Path) -> bytes:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
        return mapped[:]


def test_a_file_that_has_come_back_is_cached_again(far: Far) -> None:
    path = far.cold("back")
    with path.open("r+b") as file:
        file.write(b"changed")
    with pytest.raises(OSError, match="No such device"):
        _mapped(path)
    stratum("tier", "move", far.server.root, f"{BUCKET}/back", "hot", "--wait")
    assert _mapped(path) == b"changed" + DATA[7:]
    path = far.cold("written-anew")
    path.write_bytes(DATA[1:])
    assert _mapped(path) == DATA[1:]
