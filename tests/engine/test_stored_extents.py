"""Bytes of small commits lie in the metadata store first and move to data files unseen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from stratum import content, fsck, housekeeping, leaks, objects, stored_extents
from stratum.errors import DataDamaged
from stratum.schema import STORED_SEGMENT, key_u64, prefix_range
from stratum.write_buffer import WriteBuffer
from tests.engine.test_reclaim import allocated
from tests.engine.test_write_buffer import new_file
from tests.support import delete, get

if TYPE_CHECKING:
    from stratum.schema import Inode
    from stratum.volume import Volume

BIG = os.urandom(100_000)


def write(opened: Volume, inode: Inode, offset: int, data: bytes) -> None:
    with opened.snapshot() as reader:
        buffer = WriteBuffer(opened, reader.inode(inode.number))
    buffer.write(offset, data, 1)
    buffer.commit()


def stored(opened: Volume) -> set[int]:
    with opened.snapshot() as reader:
        return stored_extents.numbers(reader)


@pytest.fixture
def inode(opened: Volume) -> Inode:
    made = new_file(opened)
    write(opened, made, 0, BIG)
    assert stored(opened) == set()
    return made


def clean(opened: Volume) -> None:
    housekeeping.run_once(opened)
    assert fsck.check(opened) == []
    assert leaks.collect(opened) == []


def test_a_small_write_needs_no_data_file(opened: Volume, inode: Inode, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a data file was synced")

    monkeypatch.setattr(opened.segments, "sync_writers", never)
    write(opened, inode, 50_000, b"x" * 4096)
    assert get(opened, "file") == BIG[:50_000] + b"x" * 4096 + BIG[54_096:]
    assert len(stored(opened)) == 1
    clean(opened)


def test_what_stays_moves_and_what_is_overwritten_never_does(opened: Volume, inode: Inode) -> None:
    for fill in range(20):
        write(opened, inode, 8192, bytes((fill,)) * 4096)
    write(opened, inode, 40_000, b"kept")
    housekeeping.run_once(opened)
    assert len(stored(opened)) == 2
    before = allocated(opened)
    assert stored_extents.move(opened, stored(opened)) == 2
    assert stored(opened) == set()
    assert allocated(opened) == before + 2 * 4096
    assert get(opened, "file") == BIG[:8192] + bytes((19,)) * 4096 + BIG[12_288:40_000] + b"kept" + BIG[40_004:]
    clean(opened)
    delete(opened, "file")
    housekeeping.run_once(opened)
    assert allocated(opened) == 0
    clean(opened)


def test_appended_lines_share_extents(opened: Volume, inode: Inode) -> None:
    text = b""
    for number in range(300):
        line = f"line {number}\n".encode()
        write(opened, inode, len(BIG) + len(text), line)
        text += line
    assert get(opened, "file") == BIG + text
    with opened.snapshot() as reader:
        assert len(reader.slices(inode.number)) <= 3
    clean(opened)


def test_a_reader_keeps_its_bytes_through_a_move_and_an_overwrite(opened: Volume, inode: Inode) -> None:
    write(opened, inode, 10, b"old")
    with opened.reading():
        with opened.snapshot() as reader:
            plan = content.plan_read(reader, reader.inode(inode.number))
        stored_extents.move(opened, stored(opened))
        assert b"".join(content.read_planned(opened, plan, 0, 20)) == BIG[:10] + b"old" + BIG[13:20]
        write(opened, inode, 10, b"new")
        housekeeping.run_once(opened)
        assert b"".join(content.read_planned(opened, plan, 0, 20)) == BIG[:10] + b"old" + BIG[13:20]
    clean(opened)


def test_the_mover_leaves_what_is_young(opened: Volume, inode: Inode, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("stratum.stored_extents.time.monotonic", lambda: clock[0])
    mover = stored_extents.Mover(opened)
    write(opened, inode, 0, b"first")
    mover.run()
    write(opened, inode, 50_000, b"second")
    mover.run()  # too early to look again
    assert len(stored(opened)) == 2
    clock[0] += stored_extents.AGE_S_MIN
    mover.run()
    assert len(stored(opened)) == 1
    clock[0] += stored_extents.AGE_S_MIN
    mover.run()
    assert stored(opened) == set()
    clean(opened)


def test_what_is_freed_while_it_moves_leaves_no_copy(
    opened: Volume, inode: Inode, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(opened, inode, 0, b"first")
    write(opened, inode, 50_000, b"second")
    sync = opened.segments.sync_writers

    def sync_and_overwrite(writers: object) -> None:
        sync(writers)  # type: ignore[arg-type]
        write(opened, inode, 0, b"FIRST")
        housekeeping.run_once(opened)

    monkeypatch.setattr(opened.segments, "sync_writers", sync_and_overwrite)
    assert stored_extents.move(opened, stored(opened)) == 1
    monkeypatch.undo()
    assert get(opened, "file")[:5] == b"FIRST"
    clean(opened)


@pytest.mark.parametrize("after_commit", [False, True])
def test_a_mover_that_is_killed_loses_nothing(opened: Volume, inode: Inode, *, after_commit: bool) -> None:
    write(opened, inode, 0, b"first")
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom stratum import stored_extents\nfrom stratum.volume import Volume\n"
        "v = Volume(Path(sys.argv[1]), 'mover')\nmutate = v.mutate\n"
        "def die(*a, **k):\n    if sys.argv[2] == 'True':\n        mutate(*a, **k)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "v.mutate = die\nwith v.snapshot() as reader:\n    present = stored_extents.numbers(reader)\nstored_extents.move(v, present)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(opened.root), str(after_commit)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert get(opened, "file") == b"first" + BIG[5:]
    assert bool(stored(opened)) != after_commit
    housekeeping.run_once(opened)
    leaks.collect(opened, apply=True)
    clean(opened)
    assert get(opened, "file") == b"first" + BIG[5:]


def test_damage_in_the_store_is_found(opened: Volume, inode: Inode) -> None:
    write(opened, inode, 0, b"first")
    (number,) = stored(opened)
    with opened.store.transact() as tx:
        raw = tx.get(key_u64(b"E", number)) or b""
        tx.put(key_u64(b"E", number), raw[:-1] + b"X")
    with pytest.raises(DataDamaged):
        objects.read_all(opened, "bucket", b"file")
    assert [finding.kind for finding in fsck.check(opened)] == ["damaged-extent"]
    with opened.store.transact() as tx:
        tx.put(key_u64(b"E", number), raw)
        tx.put(key_u64(b"E", number + 1), raw)
    assert [finding.kind for finding in fsck.check(opened, repair=True)] == ["stray-row"]
    clean(opened)
    with opened.snapshot() as reader:
        rows = [reader.extent(int.from_bytes(key[1:], "big"))[0] for key, _ in reader.scan(*prefix_range(b"X"))]
    assert [row.segment == STORED_SEGMENT for row in rows].count(True) == 1
