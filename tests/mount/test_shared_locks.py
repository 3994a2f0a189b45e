"""Locks that several writable mounts of a tree share."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.mount.test_semantics import code_of
from tests.mount.test_several_mounts import SHARED as WITHOUT_LOCKS
from tests.mount.test_several_mounts import mount_process, mounting
from tests.support import serving, stratum

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support import Server

SHARED = "--shared"
F_OFD_SETLK, F_OFD_SETLKW = 37, 38
HELPER = """
import fcntl, os, signal, struct, sys
signal.signal(signal.SIGUSR1, lambda *_: None)
files = {}
for line in sys.stdin:
    word, *rest = line.split()
    try:
        if word == "open":
            files[rest[0]] = open(rest[1], "r+b", 0)
            answer = "ok"
        elif word == "close":
            files.pop(rest[0]).close()
            answer = "ok"
        elif word == "add":
            file = files[rest[0]]
            for _ in range(int(rest[1])):
                fcntl.lockf(file, fcntl.LOCK_EX)
                number = int(os.pread(file.fileno(), 20, 0) or b"0") + 1
                os.pwrite(file.fileno(), b"%d" % number, 0)
                fcntl.lockf(file, fcntl.LOCK_UN)
            answer = "ok"
        elif word == "flock":
            fcntl.flock(files[rest[0]], int(rest[1]))
            answer = "ok"
        else:
            class Interrupted(Exception): pass
            def interrupt(*_): raise Interrupted
            signal.signal(signal.SIGUSR1, interrupt)
            try:
                fcntl.lockf(files[rest[0]], int(rest[1]), int(rest[2]), int(rest[3]))
                answer = "ok"
            except Interrupted:
                answer = "interrupted"
    except OSError as error:
        answer = os.strerror(error.errno)
    print(answer, flush=True)
"""


class Process:
    """Another process that locks files."""

    def __init__(self) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-u", "-c", HELPER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def begin(self, *words: object) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(" ".join(map(str, words)) + "\n")
        self.popen.stdin.flush()

    def end(self) -> str:
        assert self.popen.stdout is not None
        return self.popen.stdout.readline().strip()

    def do(self, *words: object) -> str:
        self.begin(*words)
        return self.end()

    def waits(self) -> None:
        """Until it sleeps in the kernel for an answer of the mount."""
        deadline = time.monotonic() + 30
        while Path(f"/proc/{self.popen.pid}/wchan").read_text() != "request_wait_answer":
            assert time.monotonic() < deadline, "it does not wait"
            time.sleep(0.005)


@contextmanager
def process(path: Path) -> Iterator[Process]:
    one = Process()
    try:
        assert one.do("open", "f", path) == "ok"
        yield one
    finally:
        one.popen.kill()
        one.popen.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("locks")) as served:
        served.client().create_bucket(Bucket="one")
        yield served


@pytest.fixture
def sides(server: Server, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A file as two mounts show it."""
    with mounting(server, tmp_path / "a", SHARED) as first, mounting(server, tmp_path / "b", SHARED) as second:
        path = first / "one" / "f"
        path.unlink(missing_ok=True)
        path.write_bytes(b"x" * 100)
        yield path, second / "one" / "f"


EXCLUSIVE, COMMON, GIVE_UP, TRY = fcntl.LOCK_EX, fcntl.LOCK_SH, fcntl.LOCK_UN, fcntl.LOCK_NB
BUSY = os.strerror(errno.EAGAIN)


def test_ranges_of_files_are_locked_over_mounts(sides: tuple[Path, Path]) -> None:
    with process(sides[0]) as here, process(sides[1]) as there, process(sides[1]) as third:
        assert here.do("lock", "f", EXCLUSIVE, 10, 20) == "ok"
        assert there.do("lock", "f", COMMON | TRY, 1, 29) == BUSY
        assert there.do("lock", "f", COMMON | TRY, 20, 0) == "ok"
        assert third.do("lock", "f", COMMON | TRY, 20, 0) == "ok"
        assert third.do("lock", "f", EXCLUSIVE | TRY, 20, 0) == BUSY
        with sides[1].open("r+b") as file:
            record = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 5, 100, 0)
            found = struct.unpack("hhqqi4x", fcntl.fcntl(file, fcntl.F_GETLK, record))
            assert found in {
                (fcntl.F_WRLCK, os.SEEK_SET, 20, 10, here.popen.pid),
                *((fcntl.F_RDLCK, os.SEEK_SET, 0, 20, one.popen.pid) for one in (there, third)),
            }
        assert here.do("lock", "f", GIVE_UP, 5, 22) == "ok"
        assert third.do("lock", "f", EXCLUSIVE | TRY, 5, 22) == "ok"
        assert third.do("lock", "f", EXCLUSIVE | TRY, 1, 21) == BUSY
        assert third.do("lock", "f", EXCLUSIVE | TRY, 1, 27) == BUSY
        assert here.do("open", "again", sides[0]) == "ok"
        assert here.do("close", "again") == "ok"
        assert third.do("lock", "f", EXCLUSIVE | TRY, 10, 20) == "ok", "a close of any descriptor gives all up"
        third.popen.kill()
        third.popen.wait()
        assert here.do("lock", "f", EXCLUSIVE | TRY, 0, 20) == "ok", "so does the end of a process"


def test_whole_files_are_locked_over_mounts(sides: tuple[Path, Path]) -> None:
    with sides[0].open("r+b") as here, sides[1].open("r+b") as there, sides[1].open("rb") as third:
        fcntl.flock(here, COMMON)
        fcntl.flock(there, COMMON | TRY)
        assert code_of(lambda: fcntl.flock(here, EXCLUSIVE | TRY)) == errno.EAGAIN
        fcntl.flock(there, GIVE_UP)
        fcntl.flock(here, EXCLUSIVE | TRY)
        assert code_of(lambda: fcntl.flock(third, COMMON | TRY)) == errno.EAGAIN
        here.close()
        fcntl.flock(third, EXCLUSIVE)  # the kernel tells of the last close when it has returned already
    with sides[0].open("r+b") as here, sides[1].open("r+b") as there:
        record = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 50, 0)
        fcntl.fcntl(here, F_OFD_SETLK, record)
        assert code_of(lambda: fcntl.fcntl(there, F_OFD_SETLK, record)) == errno.EAGAIN
        here.close()
        fcntl.fcntl(there, F_OFD_SETLKW, record)


@pytest.mark.parametrize("same", [True, False], ids=["one mount", "two mounts"])
def test_who_waits_gets_it_or_is_interrupted(sides: tuple[Path, Path], *, same: bool) -> None:
    with process(sides[0]) as holder, process(sides[0 if same else 1]) as waiter:
        for word in ("lock", "flock"):
            rest = (0, 0) if word == "lock" else ()
            assert holder.do(word, "f", EXCLUSIVE, *rest) == "ok"
            waiter.begin(word, "f", EXCLUSIVE, *rest)
            waiter.waits()
            assert sides[0].read_bytes() == b"x" * 100, "nobody else waits"
            assert holder.do(word, "f", GIVE_UP, *rest) == "ok"
            assert waiter.end() == "ok"
            assert waiter.do(word, "f", GIVE_UP, *rest) == "ok"
        assert holder.do("lock", "f", EXCLUSIVE, 0, 0) == "ok"
        waiter.begin("lock", "f", EXCLUSIVE, 0, 0)
        waiter.waits()
        waiter.popen.send_signal(signal.SIGUSR1)
        assert waiter.end() == "interrupted"
        waiter.begin("lock", "f", EXCLUSIVE, 0, 0)
        waiter.waits()
        waiter.popen.kill()
        waiter.popen.wait()
        assert holder.do("lock", "f", GIVE_UP, 0, 0) == "ok"
        with process(sides[1]) as third:
            assert third.do("lock", "f", EXCLUSIVE | TRY, 0, 0) == "ok"


@pytest.mark.parametrize("same", [True, False], ids=["one mount", "two mounts"])
def test_who_would_wait_for_itself_is_told(sides: tuple[Path, Path], *, same: bool) -> None:
    with process(sides[0]) as first, process(sides[0 if same else 1]) as second, process(sides[0]) as third:
        for at, one in enumerate((first, second, third)):
            assert one.do("lock", "f", EXCLUSIVE, 1, at) == "ok"
        first.begin("lock", "f", EXCLUSIVE, 1, 1)
        first.waits()
        second.begin("lock", "f", EXCLUSIVE, 1, 2)
        second.waits()
        assert third.do("lock", "f", COMMON, 1, 0) == os.strerror(errno.EDEADLK)
        assert third.do("lock", "f", GIVE_UP, 1, 2) == "ok"
        assert second.end() == "ok"
        assert second.do("lock", "f", GIVE_UP, 0, 0) == "ok"
        assert first.end() == "ok"


def test_what_was_written_under_a_lock_is_seen_under_the_next(sides: tuple[Path, Path]) -> None:
    sides[0].write_bytes(b"")
    with process(sides[0]) as one, process(sides[1]) as two, process(sides[1]) as three:
        for each in (one, two, three):
            each.begin("add", "f", 25)
        assert [each.end() for each in (one, two, three)] == ["ok"] * 3
    assert sides[1].read_bytes() == b"75"


def test_a_database_is_written_through_two_mounts(sides: tuple[Path, Path]) -> None:
    paths = [side.with_name("db") for side in sides]
    with sqlite3.connect(paths[0]) as database:
        database.execute("create table if not exists t (writer, number)")
    database.close()

    def write(writer: int) -> None:
        mine = sqlite3.connect(paths[writer], timeout=60, isolation_level=None)
        for number in range(20):
            mine.execute("begin immediate")
            mine.execute("insert into t values (?, ?)", (writer, number))
            mine.execute("commit")
        mine.close()

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    database = sqlite3.connect(paths[1])
    assert database.execute("select count(*), count(distinct number) from t").fetchall() == [(40, 20)]
    assert database.execute("pragma integrity_check").fetchall() == [("ok",)]
    database.close()
    paths[0].unlink()


def test_locks_of_a_mount_that_is_killed_are_gone(tmp_path: Path) -> None:
    with serving(tmp_path / "served", allow_errors=True) as server:
        server.client().create_bucket(Bucket="one")
        with mounting(server, tmp_path / "b", SHARED) as other:
            with suppress(AssertionError), mount_process(server, tmp_path / "a", SHARED) as mount:
                (tmp_path / "a" / "one" / "f").write_bytes(b"x")
                with process(tmp_path / "a" / "one" / "f") as holder, process(other / "one" / "f") as waiter:
                    assert holder.do("lock", "f", EXCLUSIVE, 0, 0) == "ok"
                    assert waiter.do("lock", "f", EXCLUSIVE | TRY, 0, 0) == BUSY
                    waiter.begin("lock", "f", EXCLUSIVE, 0, 0)
                    waiter.waits()
                    mount.kill()
                    mount.wait()
                    assert waiter.end() == "ok"


def test_a_mount_that_goes_on_in_a_new_program_keeps_locks_and_who_waits(server: Server, tmp_path: Path) -> None:
    with mounting(server, tmp_path / "a", SHARED) as first, mounting(server, tmp_path / "b", SHARED) as second:
        for side in (first, second):
            (side / "one" / "g").write_bytes(b"x")
        with (
            process(first / "one" / "g") as holder,
            process(first / "one" / "g") as waiter,
            process(second / "one" / "g") as other,
        ):
            assert holder.do("lock", "f", EXCLUSIVE, 10, 0) == "ok"
            waiter.begin("lock", "f", EXCLUSIVE, 10, 0)
            waiter.waits()
            stratum("mount", server.root, first, "--renew")
            assert other.do("lock", "f", EXCLUSIVE | TRY, 10, 0) == BUSY
            assert holder.do("lock", "f", GIVE_UP, 10, 0) == "ok"
            assert waiter.end() == "ok"
            assert other.do("lock", "f", EXCLUSIVE | TRY, 10, 0) == BUSY
            waiter.begin("close", "f")
            assert waiter.end() == "ok"
            assert other.do("lock", "f", EXCLUSIVE | TRY, 10, 0) == "ok"


def test_mounts_with_and_without_shared_locks_do_not_stand_beside_each_other(server: Server, tmp_path: Path) -> None:
    other = tmp_path / "b"
    for first, second in (
        ((), (SHARED,)),
        ((SHARED,), (WITHOUT_LOCKS,)),
        ((WITHOUT_LOCKS,), (SHARED,)),
        ((SHARED,), ()),
    ):
        with mounting(server, tmp_path / "a", *first):
            refused = stratum("mount", server.root, other, *second, expect=None)
            assert refused.returncode
            assert str(tmp_path / "a") in refused.stderr
            assert "--shared" in refused.stderr
    with mounting(server, tmp_path / "a", SHARED) as one, mounting(server, other, "--read-only", SHARED):
        (one / "one" / "h").write_bytes(b"x")
        with process(one / "one" / "h") as holder, (other / "one" / "h").open("rb") as reader:
            assert holder.do("lock", "f", EXCLUSIVE, 0, 0) == "ok"
            assert code_of(lambda: fcntl.lockf(reader, COMMON | TRY)) == errno.EAGAIN
