"""SIGTERM of a daemon whose mount the helper made: the mount stays, who uses it waits, and the next daemon goes on with it."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import pytest

from stratum.fuse import takeover
from stratum.kept_mounts import KEPT_MAX, KeptMounts
from stratum.mount_rows import mount_rows
from stratum.mount_table import mount_at
from stratum.mountd import MountHelper, Refused, ask_claim, ask_keep
from stratum.sessions import NO_PROCESS
from stratum.volume import Volume
from tests.appliance.test_mountd import NOBODY, PUT, Place, end, without_root
from tests.support import need_fuse, stratum

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from pathlib import Path

WAIT_S_MAX = 30.0
ENDED = r"not connected|abort"


@contextmanager
def placed(keep: str = "30s") -> Iterator[Place]:
    need_fuse()
    made = Place(keep)
    try:
        yield made
        assert stratum("fsck", made.root / "volume").returncode == 0
    finally:
        made.close()


@pytest.fixture
def place() -> Iterator[Place]:
    with placed() as made:
        yield made


def leave(process: subprocess.Popen[str]) -> None:
    process.terminate()
    assert process.wait(30) == 0
    assert process.stdout
    process.stdout.close()


def rows(place: Place) -> list[dict[str, object]]:
    with Volume(place.root / "volume", "test") as opened:
        return [row for row in opened.session.rows().values() if row["role"] == "mount"]


def gone(place: Place) -> bool:
    return mount_at(str(place.mountpoint)) is None


def until_gone(place: Place) -> None:
    deadline = time.monotonic() + WAIT_S_MAX
    while not gone(place):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_is_open_stays_open_over_a_restart(place: Place) -> None:
    first, *others = [place.prepare() for _ in range(4)]
    place.begin(first)
    bucket = place.mountpoint / "bucket"
    (bucket / "read").write_bytes(b"0123456789" * 1000)
    (bucket / "gone").write_bytes(b"still here")
    with (
        (bucket / "read").open("rb") as reading,
        (bucket / "write").open("w+b", buffering=0) as writing,
        (bucket / "gone").open("r+b", buffering=0) as unlinked,
    ):
        assert reading.read(5) == b"01234"
        (bucket / "gone").unlink()
        inode = (bucket / "read").stat().st_ino
        for number, second in enumerate(others):
            writing.write(b"before%d " % number)
            leave(first)
            assert not gone(place)
            (row,) = rows(place)
            assert row["pid"] == NO_PROCESS
            with ThreadPoolExecutor(1) as pool:
                answer = pool.submit(os.listdir, bucket)
                first = place.begin(second)
                assert set(answer.result(WAIT_S_MAX)) == {"read", "write"}
            writing.write(b"after%d " % number)
            unlinked.seek(0, os.SEEK_END)
            unlinked.write(b"!")
            reading.seek(0)
            assert reading.read() == b"0123456789" * 1000
        unlinked.seek(0)
        assert unlinked.read() == b"still here!!!"
        assert (bucket / "read").stat().st_ino == inode
        (row,) = rows(place)
        assert row["pid"] == first.pid
        assert (bucket / "write").read_bytes() == b"before0 after0 before1 after1 before2 after2 "
    end(first)
    assert gone(place)


def test_nobody_sees_anything_old_afterwards(place: Place) -> None:
    """What S3 changes while nobody answers is waited for; the deadline of the writer is not reached."""
    first, second = place.prepare(), place.prepare()
    place.begin(first)
    path = place.mountpoint / "bucket" / "a"
    path.write_bytes(b"old")
    assert path.read_bytes() == b"old"
    with path.open("rb") as held:
        writer = without_root(PUT, str(place.root / "volume"), "a", "new")
        leave(first)
        assert writer.stdin
        writer.stdin.close()
        place.begin(second)
        assert writer.wait(WAIT_S_MAX) == 0
        assert path.read_bytes() == b"new"
        assert held.read() == b"old"
    assert writer.stdout
    writer.stdout.close()
    end(second)


def test_programs_go_on_over_restarts(place: Place) -> None:
    """They see no error, nothing old, and each line that was appended once."""
    first, *others = [place.prepare() for _ in range(4)]
    place.begin(first)
    bucket = place.mountpoint / "bucket"
    ending = threading.Event()
    failures: list[str] = []
    rounds = [0, 0, 0]

    def write(number: int) -> None:
        try:
            with (bucket / f"log{number}").open("ab", buffering=0) as appended:
                while not ending.is_set():
                    data = os.urandom(3000)
                    (bucket / f"new{number}").write_bytes(data)
                    (bucket / f"new{number}").rename(bucket / f"f{number}")
                    if (bucket / f"f{number}").read_bytes() != data:
                        failures.append(f"f{number} has other bytes")
                    appended.write(b"x" * 100)
                    rounds[number] += 1
        except OSError as error:
            failures.append(f"{number}: {error}")

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        for second in others:
            before = list(rounds)
            while any(now == then for now, then in zip(rounds, before, strict=True)) and not failures:
                time.sleep(0.01)
            leave(first)
            first = place.begin(second)
    finally:
        ending.set()
        for thread in threads:
            thread.join(WAIT_S_MAX)
    assert failures == []
    assert [(bucket / f"log{number}").stat().st_size for number in range(3)] == [100 * count for count in rounds]
    end(first)


def test_who_cannot_wait_for_it_detaches_it_and_ends_nobody(place: Place) -> None:
    settings = place.root / "volume" / "stratum.toml"
    settings.write_text(settings.read_text().replace("acknowledge_s_max = 5", "acknowledge_s_max = 1"))
    first = place.mount()
    path = place.mountpoint / "bucket" / "a"
    path.write_bytes(b"old")
    assert path.read_bytes() == b"old"
    writer = without_root(PUT, str(place.root / "volume"), "a", "new")
    with path.open("rb") as held:
        leave(first)
        assert writer.stdin
        writer.stdin.close()
        assert writer.wait(60) == 0
        with pytest.raises(OSError, match=ENDED):  # fenced
            path.read_bytes()
        with pytest.raises(OSError, match=ENDED):
            os.fsync(held.fileno())
    assert writer.stdout
    writer.stdout.close()
    assert not ask_claim(place.socket, place.mountpoint)
    second = place.mount()
    assert path.read_bytes() == b"new"
    assert len(rows(place)) == 1
    end(second)


def test_a_session_that_was_fenced_while_it_was_claimed_is_not_gone_on_with(place: Place) -> None:
    leave(place.mount())
    with Volume(place.root / "volume", "test") as opened:
        with opened.snapshot() as reader:
            (session,) = mount_rows(reader)
        assert opened.session.forbid(session)
        assert opened.session.forbid(session), "once more changes nothing"
        assert not opened.session.forbid(opened.session.id)
    second = place.mount()
    assert (place.mountpoint / "bucket").is_dir()
    (row,) = rows(place)
    assert row["pid"] == second.pid
    end(second)


def test_who_does_not_come_back_loses_it() -> None:
    with placed("1s") as place:
        first = place.mount()
        (place.mountpoint / "bucket" / "gone").write_bytes(b"x" * 100_000)
        with (place.mountpoint / "bucket" / "gone").open("rb") as held:
            (place.mountpoint / "bucket" / "gone").unlink()
            leave(first)
            assert not gone(place)
            with pytest.raises(OSError, match=ENDED):
                os.stat(place.mountpoint / "bucket" / "whatever")
            until_gone(place)
            with pytest.raises(OSError, match=ENDED):
                os.fsync(held.fileno())
        second = place.mount()
        assert os.listdir(place.mountpoint / "bucket") == []
        end(second)
        assert rows(place) == []


def test_a_helper_that_keeps_nothing_lets_a_daemon_unmount() -> None:
    with placed("0s") as place:
        first = place.mount()
        (place.mountpoint / "bucket" / "a").write_bytes(b"bytes")
        leave(first)
        assert gone(place)
        assert rows(place) == []
        second = place.mount()
        assert (place.mountpoint / "bucket" / "a").read_bytes() == b"bytes"
        end(second)


def test_a_helper_that_ends_detaches_what_it_keeps(place: Place) -> None:
    leave(place.mount())
    place.helper.terminate()
    assert place.helper.wait(20) == 0
    assert gone(place)
    place.helper = place.start_helper("30s")
    second = place.mount()
    end(second)


def test_another_mount_of_the_place_does_not_go_on_with_it(place: Place) -> None:
    first = place.mount()
    (place.mountpoint / "bucket" / "a").write_bytes(b"bytes")
    second = place.prepare(str(place.mountpoint), "--read-only")
    with (place.mountpoint / "bucket" / "a").open("rb"):
        leave(first)
        place.begin(second)
        with pytest.raises(OSError, match="Read-only"):
            (place.mountpoint / "bucket" / "b").touch()
        assert (place.mountpoint / "bucket" / "a").read_bytes() == b"bytes"
    assert len(rows(place)) == 1
    end(second)


def test_a_daemon_that_is_killed_while_it_leaves_is_like_any_other(place: Place) -> None:
    """Whatever the kill hits: the next one comes up, and what was synced is there."""
    path = place.mountpoint / "bucket" / "a"
    for wait_s in (0.0, 0.005, 0.01, 0.02, 0.05, 0.2):
        process, following = place.prepare(), place.prepare()
        place.begin(process)
        held = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(held, b"%f" % wait_s)
        os.fsync(held)
        process.terminate()
        time.sleep(wait_s)
        process.kill()
        process.wait()
        assert process.stdout
        process.stdout.close()
        process = place.begin(following)
        with suppress(OSError):
            os.close(held)
        assert path.read_bytes() == b"%f" % wait_s
        assert len(rows(place)) == 1
        end(process)


@pytest.mark.parametrize(
    ("jobs", "ends"),
    [("7 {0} stop running", True), ("7 {0} restart running", False), ("", False), ("7 x{0} stop running", False)],
)
def test_a_unit_that_is_stopped_for_good_unmounts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: str, *, ends: bool
) -> None:
    """Of systemd, systemctl knows whether the unit's job is to stop or to restart."""
    import trio

    unit = "stratum-mount@mnt-data.service"
    (tmp_path / "systemctl").write_text(f"#!/bin/sh\necho '{jobs.format(unit)}'\n")
    (tmp_path / "systemctl").chmod(0o755)
    cgroup = tmp_path / "cgroup"
    cgroup.write_text(f"0::/system.slice/system-stratum\\x2dmount.slice/{unit}\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(takeover, "CGROUP", cgroup)
    monkeypatch.delenv("INVOCATION_ID", raising=False)
    assert trio.run(takeover.is_stopped_for_good) is False
    monkeypatch.setenv("INVOCATION_ID", "x")
    assert trio.run(takeover.is_stopped_for_good) is ends
    cgroup.write_text("0::/user.slice/session-3.scope\n")
    assert trio.run(takeover.is_stopped_for_good) is False
    cgroup.write_text(f"0::/{unit}\n")
    (tmp_path / "systemctl").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert trio.run(takeover.is_stopped_for_good) is False


def test_what_the_helper_does_not_keep(place: Place) -> None:
    process = place.mount()
    helper = MountHelper(NOBODY, [place.mounts])
    asked = {"action": "keep", "path": str(place.mountpoint)}
    with pytest.raises(Refused, match="not the user"):
        helper.answer(asked, 1000, 1000, (0, 1, 2))
    with pytest.raises(Refused, match="by 3 descriptors"):
        helper.answer(asked, NOBODY, NOBODY, (0,))
    with pytest.raises(Refused, match="nothing is mounted"):
        helper.answer({**asked, "path": f"{place.mounts}/other"}, NOBODY, NOBODY, (0, 1, 2))
    with pytest.raises(Refused, match="not below"):
        helper.answer({**asked, "path": "/etc"}, NOBODY, NOBODY, (0, 1, 2))
    given = os.pipe()
    ask_keep(place.socket, place.mountpoint, given[0], given[1], given[0])
    with pytest.raises(Exception, match="cannot be kept"):
        ask_keep(place.socket, place.mountpoint, given[0], given[1], given[0])
    os.close(given[1])
    found = ask_claim(place.socket, place.mountpoint)
    os.write(found[1], b"through it")
    assert os.read(given[0], 100) == b"through it"
    for number in (*found, given[0]):
        os.close(number)
    assert not ask_claim(place.socket, place.mountpoint)
    assert len(os.listdir(f"/proc/{place.helper.pid}/fd")) < 16, "it closed what it was given"
    end(process)


def test_a_damaged_document_is_not_gone_on_with(place: Place) -> None:
    process = place.mount()
    for document in (b"", b"{", b"[]", b"{}", b'{"version": 1, "asked": {}}', b'{"version": 99}'):
        file = os.memfd_create("told")
        os.write(file, document)
        given = os.pipe()
        ask_keep(place.socket, place.mountpoint, given[0], given[1], file)
        assert takeover.claimed(place.socket, place.mountpoint, {}) is None
        os.close(given[1])
        assert os.read(given[0], 1) == b"", "the others are closed"
        os.close(given[0])
        os.close(file)
    assert takeover.claimed(place.root / "nothing", place.mountpoint, {}) is None
    end(process)


def test_only_who_left_it_gets_it_back_and_it_is_bounded() -> None:
    detached: list[str] = []
    kept = KeptMounts(3600.0, detached.append)
    pipe = os.pipe()
    assert kept.keep("/a", 5, pipe)
    assert not kept.keep("/a", 5, pipe)
    assert kept.claim("/a", 6) == ()
    assert kept.claim("/b", 5) == ()
    assert kept.claim("/a", 0) == pipe
    assert kept.claim("/a", 5) == ()
    for number in range(KEPT_MAX):
        assert kept.keep(f"/{number}", 5, (os.dup(pipe[0]),))
    assert not kept.keep("/more", 5, pipe)
    kept.drop("/0")
    assert kept.keep("/more", 5, pipe)
    kept.end()
    assert set(detached) == {f"/{number}" for number in range(1, KEPT_MAX)} | {"/more"}
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(pipe[0])
    assert not [
        thread
        for thread in threading.enumerate()
        if isinstance(thread, threading.Timer) and not thread.finished.is_set()
    ]


def test_a_signal_from_the_keyboard_unmounts(place: Place) -> None:
    process = place.mount()
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert process.stdout
    process.stdout.close()
    assert gone(place)
