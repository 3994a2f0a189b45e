"""What many small writes left in many pieces is put together, and nobody sees a difference."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING

import pytest

from stratum import buckets, clones, compaction, fsck, housekeeping, leaks, objects, stored_extents
from stratum.compaction import PIECES_MIN, WINDOW_BYTES, Compactor
from stratum.files import Caller, make
from stratum.write_buffer import WriteBuffer
from tests.engine.test_reclaim import allocated
from tests.support import BUCKET, get

if TYPE_CHECKING:
    from stratum.schema import Inode, Slice
    from stratum.volume import Volume

SIZE = 3 * WINDOW_BYTES + 12345


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "QUIET_S", 0.0)


def named(opened: Volume, name: bytes) -> Inode:
    with opened.snapshot() as reader:
        root = buckets.get(reader, BUCKET).inode
    return opened.mutate(lambda tx: make(tx, root, name, 0o100644, Caller(0, 0)))


def write(opened: Volume, inode: Inode, *pieces: tuple[int, bytes]) -> None:
    with opened.snapshot() as reader:
        buffer = WriteBuffer(opened, reader.inode(inode.number))
    for offset, data in pieces:
        buffer.write(offset, data, 1)
    buffer.commit()


def slices(opened: Volume, inode: Inode) -> list[Slice]:
    with opened.snapshot() as reader:
        return reader.slices(inode.number)


def candidates(opened: Volume) -> int:
    with opened.snapshot() as reader:
        return len(reader.first_rows(b"f", b"g", 100))


def settle(opened: Volume) -> int:
    """Until there is nothing left to do; how many bytes were written anew."""
    compactor, written = Compactor(opened), 0
    for _ in range(50):
        if not candidates(opened):
            return written
        written += compactor.run()
    raise AssertionError("it never ends")


@pytest.fixture
def pieces(opened: Volume) -> tuple[Inode, bytes]:
    """A file with a thousand overwrites of 4 KiB, in commits of four, and what is in it. The last window was left alone."""
    inode = named(opened, b"f")
    whole = bytearray(os.urandom(SIZE))
    write(opened, inode, (0, bytes(whole)))
    dice = random.Random(4)
    for _ in range(250):
        changed = []
        for _ in range(4):
            at, data = dice.randrange(2 * WINDOW_BYTES // 4096) * 4096, dice.randbytes(4096)
            whole[at : at + 4096] = data
            changed.append((at, data))
        write(opened, inode, *changed)
    return inode, bytes(whole)


def test_pieces_become_one_and_nothing_else_changes(opened: Volume, pieces: tuple[Inode, bytes]) -> None:
    inode, whole = pieces
    before = slices(opened, inode)
    with opened.snapshot() as reader:
        row, bucket = reader.inode(inode.number).pack(), buckets.get(reader, BUCKET)
        etag = objects.head(reader, bucket, b"f").etag
    assert len(before) > 500
    assert candidates(opened) == 1
    assert 0 < settle(opened) <= 3 * WINDOW_BYTES
    after = slices(opened, inode)
    assert len(after) <= 4
    assert get(opened, "f") == whole
    with opened.snapshot() as reader:
        assert reader.inode(inode.number).pack() == row
        assert objects.head(reader, bucket, b"f").etag == etag
    assert fsck.check(opened) == []
    stored_extents.AGE_S_MIN, kept = 0.0, stored_extents.AGE_S_MIN
    try:
        housekeeping.run_once(opened)
    finally:
        stored_extents.AGE_S_MIN = kept
    assert fsck.check(opened) == []
    assert settle(opened) == 0


def test_the_bytes_that_were_overwritten_are_given_back(opened: Volume, pieces: tuple[Inode, bytes]) -> None:
    inode, whole = pieces
    write(opened, inode, *((2 * WINDOW_BYTES + at * 65536, b"x" * 4096) for at in range(64)))
    write(opened, inode, (3 * WINDOW_BYTES, whole[3 * WINDOW_BYTES :]))  # else its extent would keep all of its bytes
    settle(opened)
    housekeeping.run_once(opened)
    assert allocated(opened) < SIZE * 1.2
    assert get(opened, "f")[: 2 * WINDOW_BYTES] == whole[: 2 * WINDOW_BYTES]


def test_holes_stay_holes(opened: Volume) -> None:
    inode = named(opened, b"f")
    end = 1 << 50
    write(opened, inode, *((at * 8192, b"%04d" % at * 100) for at in range(200)), (end, b"end"))
    before = slices(opened, inode)
    write(opened, inode, *((at * 8192, b"%04d" % at * 100) for at in range(200)))
    settle(opened)
    assert [(p.file_offset, p.length) for p in slices(opened, inode)] == [(p.file_offset, p.length) for p in before]
    with opened.snapshot() as reader:
        assert reader.inode(inode.number).size == end + 3
    assert fsck.check(opened) == []


def test_a_few_pieces_are_left_alone(opened: Volume) -> None:
    inode = named(opened, b"f")
    write(opened, inode, (0, os.urandom(SIZE)))
    write(opened, inode, *((at * 100_000, b"y" * 10) for at in range(PIECES_MIN // 2 - 1)))
    before = slices(opened, inode)
    assert settle(opened) == 0
    assert slices(opened, inode) == before


def test_what_another_file_shares_stays(opened: Volume, pieces: tuple[Inode, bytes]) -> None:
    inode, whole = pieces
    clones.clone(opened, f"{BUCKET}/f".encode(), f"{BUCKET}/g".encode())
    before = slices(opened, inode)
    assert settle(opened) == 0
    assert slices(opened, inode) == before
    assert get(opened, "g") == whole


def test_a_write_in_between_wins(opened: Volume, pieces: tuple[Inode, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    inode, whole = pieces
    real, count = opened.segments.sync_writers, [0]

    def interfering(writers: object) -> None:
        real(writers)  # type: ignore[arg-type]  # handed on
        count[0] += 1
        if count[0] == 1:
            monkeypatch.setattr(opened.segments, "sync_writers", real)
            write(opened, inode, (8192, b"now"))

    monkeypatch.setattr(opened.segments, "sync_writers", interfering)
    Compactor(opened).run()
    assert count[0] == 1
    expected = whole[:8192] + b"now" + whole[8195:]
    assert get(opened, "f") == expected
    assert candidates(opened) == 1, "it is looked at again"
    settle(opened)
    assert get(opened, "f") == expected
    assert len(slices(opened, inode)) <= 4
    assert fsck.check(opened) == []
    assert leaks.collect(opened) == []


def test_a_file_that_goes_is_forgotten(opened: Volume, pieces: tuple[Inode, bytes]) -> None:
    opened.mutate(lambda tx: objects.delete(tx, buckets.get(tx, BUCKET), b"f"), frees=True)
    assert settle(opened) == 0
    assert candidates(opened) == 0


def test_files_that_are_written_all_the_time_keep_nobody_waiting(
    opened: Volume, pieces: tuple[Inode, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    inode, _ = pieces
    monkeypatch.setattr(compaction, "QUIET_S", 1e9)
    monkeypatch.setattr(compaction, "FILES_AT_ONCE", 1)
    other = named(opened, b"other")
    write(opened, other, (0, os.urandom(SIZE)))
    write(opened, other, *((at * 16384, b"z" * 5000) for at in range(300)))
    assert candidates(opened) == 2
    compactor = Compactor(opened)
    asked: list[int] = []

    def ask(number: int, _budget: int) -> int:
        asked.append(number)
        return 0

    monkeypatch.setattr(compactor, "_file", ask)
    for _ in range(4):
        compactor.run()
    assert set(asked) == {inode.number, other.number}
