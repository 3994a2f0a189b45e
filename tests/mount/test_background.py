"""What the mount's daemon does by age: bounded steps, however much there is to do, and a sign of life between them."""

from __future__ import annotations

import os
import shutil
import threading
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
import trio

from stratum import buckets, counting, files
from stratum.files import Caller
from stratum.fuse.base import FLUSHED_AT_ONCE, ORPHAN_S_MIN, RELEASED_AT_ONCE
from stratum.fuse.operations import Operations
from tests.support import BUCKET, longer, serving

if TYPE_CHECKING:
    from pathlib import Path

    import pyfuse3

    from stratum.transaction import MetadataTransaction
    from stratum.volume import Volume
    from tests.support import Server

SILENT_S_MAX = 15.0
"""The watchdog of the unit waits for 60 s. One look took 36 s with 15,000 files."""
CONTEXT = cast("pyfuse3.RequestContext", SimpleNamespace(uid=0, gid=0, pid=0, umask=0))


def test_files_that_are_due_share_transactions_and_life_is_seen_between_them(opened: Volume) -> None:
    count = 5 * FLUSHED_AT_ONCE
    left: list[int] = []

    async def run() -> None:
        operations = Operations(opened, root=1, shared=False, bucket="")
        with opened.snapshot() as reader:
            home = buckets.get(reader, BUCKET).inode
        for number in range(count):
            await operations.create(home, f"f{number}".encode(), 0o644, os.O_WRONLY, CONTEXT)
        assert len(operations.open_files.pending) == count
        before = opened.committer.batches
        await operations.flush_old(lambda: left.append(len(operations.open_files.pending)), everything=True)
        assert not operations.open_files.pending
        assert opened.committer.batches - before <= count / 8, "a commit a file"

    trio.run(run)
    assert left == [count - done * FLUSHED_AT_ONCE for done in range(1, 5)]


def test_inodes_without_a_name_are_let_go_of_in_bounded_steps(opened: Volume) -> None:
    async def run() -> None:
        operations = Operations(opened, root=1, shared=False, bucket="")
        with opened.snapshot() as reader:
            home = buckets.get(reader, BUCKET).inode
        caller = Caller(0, 0)
        numbers = []
        for number in range(RELEASED_AT_ONCE + 10):
            name = f"f{number}".encode()

            def make_and_remove(tx: MetadataTransaction, name: bytes = name) -> int:
                files.make(tx, home, name, 0o100644, caller)
                return files.unlink(tx, home, name, lambda _: True)

            numbers.append(await operations.commit(make_and_remove))
        for number in numbers:
            operations.add_orphan(number)
        held = operations.open_files.open(numbers[0], writable=False)
        assert not await operations.release_orphans(), "too young"
        operations.orphans = dict.fromkeys(numbers, trio.current_time() - ORPHAN_S_MIN)
        assert await operations.release_orphans(), "there are more"
        assert len(operations.orphans) == 11
        assert not await operations.release_orphans()
        assert list(operations.orphans) == numbers[:1], "who has it open keeps it"
        assert held

    trio.run(run)


class Silence:
    """How long the mount's loop went without a beat, at most."""

    def __init__(self, server: Server) -> None:
        self.longest_s = 0.0
        self._folder = server.root / "meta" / counting.FOLDER
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while not self._ending.wait(0.1):
            for process in counting.read_all(self._folder)[1]:
                if process.role == "mount":
                    self.longest_s = max(self.longest_s, process.silent_s)

    def end(self) -> float:
        self._ending.set()
        self._thread.join()
        return self.longest_s


@pytest.mark.longer
@pytest.mark.timeout(900)
def test_much_to_do_neither_silences_the_mount_nor_holds_up_what_was_written(tmp_path: Path) -> None:
    count = longer(600, 15_000)
    with serving(tmp_path, mount=True) as server:
        assert server.mount is not None
        client = server.client()
        home = server.mount / "much"
        home.mkdir()
        silence = Silence(server)
        try:
            held = [os.open(home / f"f{number}", os.O_CREAT | os.O_WRONLY, 0o644) for number in range(count)]
            os.write(held[-1], b"written and not flushed")
            seen_by(client, "much", f"f{count - 1}", b"written and not flushed")
            for descriptor in held:
                os.close(descriptor)
            (server.mount / "other").mkdir()
            removing = threading.Thread(target=shutil.rmtree, args=(home,))
            removing.start()
            with (server.mount / "other" / "f").open("wb", buffering=0) as file:
                file.write(b"beside the removal")
                seen_by(client, "other", "f", b"beside the removal")
            removing.join()
            with (server.mount / "other" / "g").open("wb", buffering=0) as file:
                file.write(b"while inodes are let go of")
                seen_by(client, "other", "g", b"while inodes are let go of")
        finally:
            assert silence.end() < SILENT_S_MAX


def seen_by(client: object, bucket: str, key: str, body: bytes) -> None:
    """Nobody flushes it: it is durable, and S3 shows it, because a second has passed."""
    deadline = time.monotonic() + 30
    while True:
        try:
            if client.get_object(Bucket=bucket, Key=key)["Body"].read() == body:  # type: ignore[attr-defined]
                return
        except client.exceptions.NoSuchKey:  # type: ignore[attr-defined]
            pass
        assert time.monotonic() < deadline
        time.sleep(0.05)
