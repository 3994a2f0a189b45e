"""No reader is ever hurt by reclaim, and nothing a dead process left is kept."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
from typing import TYPE_CHECKING

from stratum import buckets, content, fsck, housekeeping, leaks, objects
from tests.support import BUCKET, delete, get, put

if TYPE_CHECKING:
    from pathlib import Path

    from stratum.schema import Inode
    from stratum.volume import Volume

BIG = os.urandom(6_000_000)


def data_files(volume: Volume) -> list[Path]:
    return [name for folder in volume.segments.folders for name in folder.glob("*/*/*.segment")]


def allocated(volume: Volume) -> int:
    return sum(name.stat().st_blocks * 512 for name in data_files(volume))


def test_deleted_bytes_come_back(opened: Volume) -> None:
    put(opened, "big", BIG)
    put(opened, "middle", BIG[:100_000])
    assert allocated(opened) >= len(BIG) + 100_000
    delete(opened, "big")
    delete(opened, "middle")
    housekeeping.run_once(opened)
    assert allocated(opened) == 0
    assert fsck.check(opened) == []


def test_bytes_come_back_although_another_process_keeps_the_file_open(opened: Volume) -> None:
    """Every process keeps descriptors of files it has read; a file that is only unlinked would keep its blocks until they close."""
    put(opened, "big", BIG)
    put(opened, "middle", BIG[:100_000])
    held = [os.open(path, os.O_RDONLY) for path in data_files(opened)]
    try:
        assert sum(os.fstat(fd).st_blocks for fd in held) * 512 >= len(BIG)
        delete(opened, "big")
        delete(opened, "middle")
        housekeeping.run_once(opened)
        assert allocated(opened) == 0
        assert [os.fstat(fd).st_blocks for fd in held] == [0] * len(held)
    finally:
        for fd in held:
            os.close(fd)


def test_two_who_give_back_at_once_do_not_stumble(opened: Volume) -> None:
    """The housekeeper and the tiering daemon see the same empty file, and one of them is quicker."""
    put(opened, "big", BIG)
    (name,) = data_files(opened)

    def quicker() -> bool:
        name.unlink()
        return True

    assert opened.segments.remove_if_unused(int(name.stem, 16), quicker)
    assert not opened.segments.remove_if_unused(int(name.stem, 16), lambda: False)


def test_a_reader_keeps_what_it_began_to_read(opened: Volume) -> None:
    put(opened, "big", BIG)
    with opened.reading():
        with opened.snapshot() as reader:
            state = objects.head(reader, buckets.get(reader, BUCKET), b"big")
            plan = objects.plan(reader, state, 0, state.size)
        pieces = content.read_planned(opened, plan, 0, state.size)
        first = bytes(next(pieces))
        put(opened, "big", b"new" * 2_000_000)
        housekeeping.run_once(opened)
        assert first + b"".join(pieces) == BIG
        housekeeping.run_once(opened)
        assert allocated(opened) >= 2 * len(BIG)
    housekeeping.run_once(opened)
    assert allocated(opened) < 2 * len(BIG)


def test_a_reader_in_another_process_counts_too(opened: Volume) -> None:
    put(opened, "big", BIG)
    script = (
        "import sys\nfrom pathlib import Path\nfrom stratum.volume import Volume\n"
        "v = Volume(Path(sys.argv[1]), 'reader')\n"
        "with v.reading():\n    print('reading', flush=True)\n    sys.stdin.readline()\n"
        "print('done', flush=True)\nsys.stdin.readline()\nv.close()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(opened.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdin is not None
    assert other.stdout is not None
    assert other.stdout.readline() == "reading\n"
    delete(opened, "big")
    housekeeping.run_once(opened)
    assert allocated(opened) >= len(BIG)
    other.stdin.write("\n")
    other.stdin.flush()
    assert other.stdout.readline() == "done\n"
    housekeeping.run_once(opened)
    assert allocated(opened) == 0
    other.communicate("\n")


def test_copies_share_bytes_until_the_last_one_goes(opened: Volume) -> None:
    put(opened, "one", BIG)
    request = objects.CopyRequest(BUCKET, b"one", BUCKET, b"two", None, "", "")
    opened.mutate(lambda tx: objects.copy(tx, request))
    assert allocated(opened) < 2 * len(BIG)
    delete(opened, "one")
    housekeeping.run_once(opened)
    assert get(opened, "two") == BIG
    delete(opened, "two")
    housekeeping.run_once(opened)
    assert allocated(opened) == 0


def test_what_a_killed_process_did_not_commit_is_removed(opened: Volume) -> None:
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom stratum.volume import Volume\n"
        "v = Volume(Path(sys.argv[1]), 'victim')\n"
        "big = v.segments.writer(None); big.write(b'x' * 70_000_000)\n"
        "small = v.segments.writer(50_000); small.write(b'y' * 50_000); small.finish()\n"
        "sys.path.insert(0, sys.argv[2])\nfrom tests.support import put\nput(v, 'kept', b'z' * 50_000)\n"
        "print('ready', flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(opened.root), "."], stdout=subprocess.PIPE, text=True)
    assert done.stdout == "ready\n"
    found = leaks.collect(opened)
    assert sum(leak.size for leak in found) >= 70_000_000
    assert len(leaks.collect(opened, apply=True)) >= 1
    assert leaks.collect(opened) == []
    assert get(opened, "kept") == b"z" * 50_000
    assert allocated(opened) < 100_000
    assert fsck.check(opened) == []


def test_500_readers_that_are_killed_leave_no_trace(opened: Volume) -> None:
    """Killed in the middle of a read: the map does not grow because of them, and the reader table does not fill."""
    for at in range(2000):
        put(opened, f"key{at}", b"x" * 4000)
    opened.store.checkpoint()
    before = opened.store.used_bytes()
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom stratum.volume import Volume\n"
        "for number in range(int(sys.argv[2])):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        v = Volume(Path(sys.argv[1]), 'reader')\n"
        "        v.reading().__enter__()\n"
        "        v.store.snapshot().__enter__()\n"
        "        os.kill(os.getpid(), 9)\n"
        "    os.waitpid(child, 0)\n"
    )
    for _ in range(10):
        subprocess.run([sys.executable, "-c", script, str(opened.root), "50"], check=True)
        housekeeping.run_once(opened)
        for at in range(50):
            put(opened, f"key{at}", b"y" * 4000)
    assert opened.store.used_bytes() <= 2 * before
    assert [row["role"] for row in opened.session.rows().values()] == ["test"]
    assert opened.store.check_readers() == 0


def test_a_file_with_many_slices_is_freed_in_steps(opened: Volume) -> None:
    from stratum.files import Caller, make, unlink
    from stratum.write_buffer import WriteBuffer

    with opened.snapshot() as reader:
        root = buckets.get(reader, BUCKET).inode
    inode: Inode = opened.mutate(lambda tx: make(tx, root, b"holes", 0o100644, Caller(0, 0)))
    buffer = WriteBuffer(opened, inode)
    for at in range(1500):
        buffer.write(at * 8192, b"x", 1)
    buffer.commit()
    opened.mutate(lambda tx: unlink(tx, root, b"holes", lambda _: False))
    assert fsck.check(opened) == []
    housekeeping.run_once(opened)
    with opened.snapshot() as reader:
        assert list(reader.scan(b"S", b"T")) == []
        assert list(reader.scan(b"W", b"Z")) == []
    assert fsck.check(opened) == []


BETWEEN_CHECKPOINTS_BYTES = 24 << 20
"""What commits free is used again behind a checkpoint, and one comes with every 2 MiB of journal."""


def test_overwrites_of_small_files_do_not_grow_the_store(opened: Volume) -> None:
    dice = random.Random(7)
    sizes: dict[int, int] = {}
    used = []
    for _ in range(3):
        for _ in range(1500):
            key = dice.randrange(200)
            sizes[key] = dice.randrange(1, content.INLINE_BYTES_MAX + 1)
            put(opened, f"d{key % 7}/{key}", BIG[: sizes[key]])
        used.append(opened.store.used_bytes())
    live = sum(sizes.values())
    assert used[-1] < 3 * live + BETWEEN_CHECKPOINTS_BYTES, f"{used[-1]} bytes for {live}"
    assert used[-1] < used[0] * 1.3, f"the store grows with every overwrite: {used}"


def test_a_snapshot_gives_its_reader_slot_back_at_once(opened: Volume) -> None:
    """Not when the garbage collector comes by: there are only so many."""
    gc.disable()
    try:
        for _ in range(opened.config.metadata_readers_max * 3):
            with opened.snapshot() as reader:
                reader.get(b"x")
    finally:
        gc.enable()
