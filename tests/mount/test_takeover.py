"""A mount that goes on in a new program: what was open stays open, and nobody sees an error or anything old."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from stratum.cli.exit_codes import COULD_NOT_RUN
from tests.mount.test_several_mounts import mount_process
from tests.support import serving, stratum

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support import Server

WAIT_S_MAX = 60


class Mounted:
    def __init__(self, server: Server, directory: Path, process: subprocess.Popen[str]) -> None:
        self.server, self.directory, self.process = server, directory, process
        self.bucket = directory / "bucket"

    def count(self, event: str) -> int:
        return self.server.log.read_text().count(event)

    def wait_for(self, event: str, times: int) -> None:
        deadline = time.monotonic() + WAIT_S_MAX
        while self.count(event) < times:
            assert self.process.poll() is None, self.server.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.server.log.read_text()[-3000:]
            time.sleep(0.02)

    def pass_on(self) -> None:
        """Returns when the new program serves."""
        before = self.count("mount_taken_over")
        stratum("mount", self.server.root, self.directory, "--renew")
        self.wait_for("mount_taken_over", before + 1)

    def refuses(self) -> str:
        return stratum("mount", self.server.root, self.directory, "--renew", expect=COULD_NOT_RUN).stderr


@contextmanager
def mounting(server: Server, directory: Path, *flags: str) -> Iterator[Mounted]:
    with mount_process(server, directory, *flags) as process:
        yield Mounted(server, directory, process)


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path, allow_errors=True) as server:
        server.client().create_bucket(Bucket="bucket")
        yield server
        assert json.loads(stratum("fsck", server.root, "--json").stdout)["findings"] == []


def test_what_is_open_stays_open(plain: Server, tmp_path: Path) -> None:
    s3 = plain.client()
    with mounting(plain, tmp_path / "m") as mounted:
        bucket = mounted.bucket
        for number in range(2000):
            (bucket / f"f{number}").touch()
        (bucket / "read").write_bytes(b"0123456789" * 1000)
        (bucket / "gone").write_bytes(b"still here")
        process = mounted.process.pid
        with (
            (bucket / "read").open("rb") as reading,
            (bucket / "write").open("w+b", buffering=0) as writing,
            (bucket / "gone").open("r+b", buffering=0) as gone,
            os.scandir(bucket) as listing,
        ):
            assert reading.read(5) == b"01234"
            writing.write(b"before ")
            (bucket / "gone").unlink()
            names = {next(listing).name for _ in range(10)}
            inode = (bucket / "read").stat().st_ino
            for time_number in range(3):
                mounted.pass_on()
                assert reading.read(5) == (b"56789", b"01234", b"56789")[time_number]
                writing.write(b"after%d " % time_number)
                gone.seek(0, os.SEEK_END)
                gone.write(b"!")
            names |= {entry.name for entry in listing}
            assert names == {f"f{number}" for number in range(2000)} | {"read", "write"} | (names & {"gone"})
            gone.seek(0)
            assert gone.read() == b"still here!!!"
            assert (bucket / "read").stat().st_ino == inode
            assert mounted.process.pid == process
        assert s3.get_object(Bucket="bucket", Key="write")["Body"].read() == b"before after0 after1 after2 "
        s3.put_object(Bucket="bucket", Key="read", Body=b"replaced")
        assert (bucket / "read").read_bytes() == b"replaced"
    assert plain.errors() == []


def test_programs_that_go_on_meanwhile_see_no_error_and_nothing_old(plain: Server, tmp_path: Path) -> None:
    s3 = plain.client()
    failures: list[str] = []
    rounds = 0
    with mounting(plain, tmp_path / "m") as mounted:
        bucket = mounted.bucket
        ending = threading.Event()

        def write(name: str) -> None:
            nonlocal rounds
            try:
                with (bucket / f"log-{name}").open("ab", buffering=0) as appended:
                    while not ending.is_set():
                        data = os.urandom(3000)
                        (bucket / f"{name}.new").write_bytes(data)
                        (bucket / f"{name}.new").rename(bucket / name)
                        if hashlib.sha256((bucket / name).read_bytes()).digest() != hashlib.sha256(data).digest():
                            failures.append(f"{name} has other bytes")
                        appended.write(b"x" * 100)
                        rounds += 1
            except OSError as error:
                failures.append(f"{name}: {error}")

        def replace() -> None:
            number = 0
            while not ending.is_set():
                number += 1
                s3.put_object(Bucket="bucket", Key="shared", Body=b"%d" % number)
                if (bucket / "shared").read_bytes() != b"%d" % number:
                    failures.append(f"old bytes after PUT {number}")

        threads = [threading.Thread(target=write, args=(f"w{number}",)) for number in range(3)]
        threads.append(threading.Thread(target=replace))
        for thread in threads:
            thread.start()
        try:
            for _ in range(3):
                before = rounds
                mounted.pass_on()
                while rounds == before and not failures:
                    time.sleep(0.01)
        finally:
            ending.set()
            for thread in threads:
                thread.join(WAIT_S_MAX)
        assert not any(thread.is_alive() for thread in threads)
        assert failures == []
        appended = sum((bucket / f"log-w{number}").stat().st_size for number in range(3))
        assert appended == 100 * rounds
    assert plain.errors() == []


def test_a_kill_between_two_programs_is_like_any_other(plain: Server, tmp_path: Path) -> None:
    """Whatever it hits, the next mount comes up on the mountpoint, what was synced is there, and nobody waits for the dead one."""
    s3 = plain.client()
    for wait_s in (0.0, 0.1, 0.2):
        words = [sys.executable, "-m", "stratum.cli.main", "mount", str(plain.root), str(tmp_path / "m")]
        with plain.log.open("a") as log:
            process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready"), plain.log.read_text()[-2000:]
        mounted = Mounted(plain, tmp_path / "m", process)
        descriptor = os.open(mounted.bucket / f"open-{wait_s}", os.O_WRONLY | os.O_CREAT)
        os.write(descriptor, b"synced")
        os.fsync(descriptor)
        gone = os.open(mounted.bucket / "gone", os.O_WRONLY | os.O_CREAT)
        (mounted.bucket / "gone").unlink()
        process.send_signal(signal.SIGUSR2)
        mounted.wait_for("mount_passed_on", mounted.count("mount_taken_over") + 1)
        time.sleep(wait_s)
        process.kill()
        process.wait()
        process.stdout.close()
        for left in (descriptor, gone):
            with suppress(OSError):
                os.close(left)
        s3.put_object(Bucket="bucket", Key=f"after-{wait_s}", Body=b"of S3")
    with mounting(plain, tmp_path / "m") as mounted:
        for wait_s in (0.0, 0.1, 0.2):
            assert (mounted.bucket / f"open-{wait_s}").read_bytes() == b"synced"
            assert (mounted.bucket / f"after-{wait_s}").read_bytes() == b"of S3"


def test_signals_between_two_programs_are_not_lost(plain: Server, tmp_path: Path) -> None:
    """The default of each would end the process and leave a dead mount; these come at every moment of a takeover."""
    with mounting(plain, tmp_path / "m") as mounted:
        with (mounted.bucket / "open").open("wb", buffering=0) as held:
            before = mounted.count("mount_taken_over")
            deadline = time.monotonic() + WAIT_S_MAX
            sent = 0
            while mounted.count("mount_taken_over") < before + 3:
                assert mounted.process.poll() is None
                assert time.monotonic() < deadline
                mounted.process.send_signal(signal.SIGUSR2)
                sent += 1
                time.sleep(0.013)
            held.write(b"goes on")
        assert sent > 20
        assert (mounted.bucket / "open").read_bytes() == b"goes on"
        mounted.process.send_signal(signal.SIGUSR2)
        mounted.wait_for("mount_passed_on", mounted.count("mount_passed_on"))
    assert plain.errors() == []


def test_a_new_program_that_does_not_start_changes_nothing(plain: Server, tmp_path: Path) -> None:
    with mounting(plain, tmp_path / "m") as mounted:
        settings = plain.root / "stratum.toml"
        before = settings.read_text()
        with (mounted.bucket / "open").open("wb", buffering=0) as held:
            settings.write_text(before + "\nnonsense = [")
            mounted.process.send_signal(signal.SIGUSR2)
            mounted.wait_for("mount_not_passed_on", 1)
            held.write(b"goes on")
            settings.write_text(before)
            assert (mounted.bucket / "open").read_bytes() == b"goes on"
            mounted.pass_on()
            held.write(b" and on")
        assert (mounted.bucket / "open").read_bytes() == b"goes on and on"
    assert len(plain.errors()) == 1


def test_bytes_that_only_the_process_has_are_not_given_up(plain: Server, tmp_path: Path) -> None:
    """A created file that S3 replaced before it was committed lives in memory until it is closed."""
    with mounting(plain, tmp_path / "m") as mounted:
        with (mounted.bucket / "k").open("w+b", buffering=0) as held:
            plain.client().put_object(Bucket="bucket", Key="k", Body=b"of S3")
            held.write(b"of nobody else")
            os.fsync(held.fileno())
            assert "lost its name" in mounted.refuses()
            held.seek(0)
            assert held.read() == b"of nobody else"
        assert (mounted.bucket / "k").read_bytes() == b"of S3"
        mounted.pass_on()
        assert (mounted.bucket / "k").read_bytes() == b"of S3"
    assert len(plain.errors()) == 1


def test_a_bucket_mounted_in_the_background_goes_on(plain: Server, tmp_path: Path) -> None:
    plain.client().put_object(Bucket="bucket", Key="k", Body=b"bytes")
    directory = tmp_path / "m"
    stratum("mount", plain.root, directory, "--bucket", "bucket", "--read-only", "--background")
    try:
        rows = json.loads(stratum("status", plain.root, "--json", expect=None).stdout)
        assert rows
        found = subprocess.run(
            ["pgrep", "-f", f"mount {plain.root} {directory}"], capture_output=True, text=True, check=True
        )
        daemon = int(found.stdout.split()[0])
        with (directory / "k").open("rb") as held:
            os.kill(daemon, signal.SIGUSR2)
            deadline = time.monotonic() + WAIT_S_MAX
            while b"STRATUM_TAKEOVER" not in Path(f"/proc/{daemon}/environ").read_bytes():
                assert time.monotonic() < deadline
                time.sleep(0.02)
            assert held.read() == b"bytes"
        plain.client().put_object(Bucket="bucket", Key="k", Body=b"newer")
        assert (directory / "k").read_bytes() == b"newer"
    finally:
        subprocess.run(["umount", str(directory)], check=True)
