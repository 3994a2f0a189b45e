"""A small disk, writers at full speed, and a mover that must keep them from ever seeing it full."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import pytest

from stratum.tiering.pressure import measure
from tests.support import Server, disk_of, longer, stratum

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SECONDS = longer(5, 300)
DISK_BYTES = 320 * 1024 * 1024
WRITERS = 4
KEPT_BYTES_MAX = 1 << 30
"""Of each writer: minutes of this would fill the machine."""
BUCKET = "filling"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 of DISK_BYTES in a file."""
    with disk_of(tmp_path, DISK_BYTES) as folder:
        yield folder


class Writer(threading.Thread):
    """Puts objects and mount files of all sizes until told to stop; remembers what was acknowledged."""

    def __init__(self, server: Server, number: int, ending: threading.Event) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._chance = random.Random(number)
        self._number = number
        self._ending = ending
        self.written: dict[str, str] = {}
        self.error: BaseException | None = None
        self.bytes = 0
        self._kept: deque[tuple[str, int]] = deque()

    def run(self) -> None:
        try:
            client: Any = self._server.client(read_timeout=120, retries={"max_attempts": 1})
            assert self._server.mount is not None
            count = 0
            while not self._ending.is_set():
                size = self._chance.choice([20_000, 200_000, 2_000_000, 9_000_000])
                data = self._chance.randbytes(size)
                key = f"{self._number}/{count}"
                if self._number % 2:
                    client.put_object(Bucket=BUCKET, Key=key, Body=data)
                else:
                    path = self._server.mount / BUCKET / key
                    path.parent.mkdir(exist_ok=True)
                    path.write_bytes(data)
                self.written[key] = hashlib.md5(data).hexdigest()
                self._kept.append((key, size))
                self.bytes += size
                count += 1
                while sum(kept for _, kept in self._kept) > KEPT_BYTES_MAX:
                    old, _ = self._kept.popleft()
                    client.delete_object(Bucket=BUCKET, Key=old)
                    del self.written[old]
        except BaseException as error:
            self.error = error


@pytest.mark.longer
@pytest.mark.timeout(SECONDS + 600)
@pytest.mark.parametrize("others", ["warm", "warm, and a remote that died", "a remote alone"])
def test_writers_never_see_a_full_disk(tmp_path: Path, small_disk: Path, moto: str, others: str) -> None:
    words: list[str | Path] = ["--create", "--hot", small_disk / "hot"]
    if "warm" in others:
        words += [word for number in range(3) for word in ("--warm", tmp_path / f"d{number}")] + ["--ec", "2+1"]
    server = Server(tmp_path, mount=True, init_words=words)
    server.configure({"tiering": {"interval_s": 0.2}})
    if "died" in others:
        (tmp_path / "archive").mkdir()
        stratum("cold", "add", server.root, "archive", "--directory", tmp_path / "archive")
        (tmp_path / "archive").rename(tmp_path / "unplugged")
    elif "remote" in others:
        credentials = tmp_path / "credentials"
        credentials.write_text('{"access_key": "a", "secret_key": "b"}')
        credentials.chmod(0o600)
        stratum(
            "cold", "add", server.root, "far", "--endpoint", moto, "--bucket", "remote", "--create-bucket", "--credentials", credentials
        )  # fmt: skip
    server.start()
    seconds = min(SECONDS, 20) if "alone" in others else SECONDS  # moto keeps everything in memory
    worst = 0.0
    try:
        server.client().create_bucket(Bucket=BUCKET)
        ending = threading.Event()
        writers = [Writer(server, number, ending) for number in range(WRITERS)]
        for writer in writers:
            writer.start()
        until = time.monotonic() + seconds
        while all(writer.is_alive() for writer in writers) and (
            time.monotonic() < until or sum(writer.bytes for writer in writers) < DISK_BYTES
        ):
            worst = max(worst, measure(small_disk).used_percent)
            time.sleep(0.05)
        ending.set()
        for writer in writers:
            writer.join(120)
            assert writer.error is None, writer.error
        total = sum(writer.bytes for writer in writers)
        took_s = seconds + time.monotonic() - until
        print(f"pressure: {total / took_s / 1e6:.0f} MB/s acknowledged, {worst:.1f} % at worst")
        assert worst < 95
        client: Any = server.client()
        for writer in writers:
            for key, digest in writer.written.items():
                assert hashlib.md5(client.get_object(Bucket=BUCKET, Key=key)["Body"].read()).hexdigest() == digest, key
        assert stratum("fsck", server.root).stdout == "clean\n"
    finally:
        assert server.stop() == 0
    assert server.errors() == []
