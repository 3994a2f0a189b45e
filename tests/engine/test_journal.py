"""The journal before the store: what a power cut, a crash at any step, a full or a failing disk leave of it."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import lmdb
import pytest

from stratum.errors import NoSpace, StorageFailed
from stratum.kv import journal, lmdb_store
from stratum.kv.journal import BLOCK_BYTES, Journal, Mark, Marks
from stratum.kv.lmdb_store import LmdbStore

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
FILES = ("data.mdb", "journal", "checkpoint")
MARK = Mark(7, 41, b"n" * 16, b"l" * 16, bytes(512))


def opened(folder: Path, *, create: bool = False) -> LmdbStore:
    return LmdbStore(str(folder), map_bytes=1 << 30, readers_max=64, create=create, journal_bytes=8 << 20)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "store"
    made.mkdir()
    opened(made, create=True).close()
    return made


def put(store: LmdbStore, **rows: str) -> None:
    with store.transact() as tx:
        for key, value in rows.items():
            tx.put(key.encode(), value.encode())


def rows(store: LmdbStore) -> dict[str, str]:
    with store.snapshot() as snapshot:
        return {key.decode(): value.decode() for key, value in snapshot.scan(b"", b"\xff" * 9)}


def image(folder: Path, name: str, **other: Path) -> Path:
    """What the disk has at this instant; of the files in `other`, what those have."""
    made = folder.parent / name
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    for file in FILES:
        shutil.copy(other.get(file.partition(".")[0], folder) / file, made / file)
    return made


def test_records_follow_each_other_until_one_is_torn(tmp_path: Path) -> None:
    file = Journal(tmp_path / "j")
    file.fill(1 << 16)
    written: list[tuple[int, list[tuple[bytes, bytes | None]]]] = []
    at = 0
    for number in range(3):
        wanted: list[tuple[bytes, bytes | None]] = [(b"k%d" % number, b"v" * 5000 * number), (b"gone", None)]
        parts = []
        for key, value in wanted:
            parts += [journal.pack_row(len(key), journal.DELETED if value is None else len(value)), key, value or b""]
        data = journal.record(MARK, 42 + number, parts)
        assert len(data) % BLOCK_BYTES == 0
        file.write(data, at)
        at += len(data)
        written.append((42 + number, wanted))

    def found(mark: Mark = MARK) -> list[tuple[int, list[tuple[bytes, bytes | None]]]]:
        return [(transaction, list(changed)) for transaction, _, changed in file.records(mark)]

    assert found() == written
    assert found(Mark(8, 41, MARK.nonce, MARK.lineage, MARK.head)) == [], "of another epoch"
    assert found(Mark(7, 42, MARK.nonce, MARK.lineage, MARK.head)) == [], "the first one does not follow the mark"
    assert found(Mark(7, 41, b"x" * 16, MARK.lineage, MARK.head)) == [], "made by somebody who does not know the nonce"
    whole = (tmp_path / "j").read_bytes()
    dice = random.Random(5)
    for _ in range(300):
        place = dice.randrange(at)
        torn = bytearray(whole)
        torn[place] ^= 1 << dice.randrange(8)
        (tmp_path / "j").write_bytes(torn)
        kept = found()
        assert kept == written[: len(kept)]
        assert len(kept) < 3 or whole[place] == 0, "a changed byte of a record is noticed; padding is not one"
    for size in range(0, at, 1777):
        (tmp_path / "j").write_bytes(whole[:size])
        assert found() == written[: len(found())]


def test_the_newest_mark_that_holds_counts(tmp_path: Path) -> None:
    marks = Marks(tmp_path / "c")
    assert marks.newest() is None
    for epoch in (1, 2, 3):
        marks.write(Mark(epoch, epoch * 10, b"n" * 16, b"l" * 16, bytes(512)))
    newest = marks.newest()
    assert newest is not None
    assert (newest.epoch, newest.transaction, marks.epoch()) == (3, 30, 3)
    with (tmp_path / "c").open("r+b") as file:
        file.seek((1 + 3 % 2) * BLOCK_BYTES + 100)
        file.write(b"torn")
    newest = marks.newest()
    assert newest is not None
    assert newest.epoch == 2
    marks.close()


def test_a_power_cut_brings_back_every_commit(folder: Path) -> None:
    """LMDB's file as it was at the checkpoint, and any mixture of that and of what came later."""
    store = opened(folder)
    put(store, a="1", b="1")
    store.checkpoint()
    before = image(folder, "before")
    for number in range(100):
        put(store, a=f"{number}", **{f"k{number}": "x" * 300})
    with store.transact() as tx:
        tx.delete(b"b")
    expected, newest = rows(store), store.last_id()
    after = image(folder, "after")
    store.close()
    dice = random.Random(3)
    old, new = (before / "data.mdb").read_bytes(), (after / "data.mdb").read_bytes()
    for survive in (0.0, 0.3, 0.7, 1.0):
        cut = image(after, "cut")
        mixed = bytearray(old.ljust(len(new), b"\0"))
        for at in range(0, len(new), 4096):
            if dice.random() < survive:
                mixed[at : at + 4096] = new[at : at + 4096]
        (cut / "data.mdb").write_bytes(mixed)
        again = opened(cut)
        assert (rows(again), again.last_id()) == (expected, newest)
        put(again, z="more")
        again.close()
        again = opened(cut)
        assert rows(again) == {**expected, "z": "more"}
        again.close()


def test_mending_may_be_interrupted_at_every_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(folder)
    store.checkpoint()
    before = image(folder, "before")
    for number in range(5):
        put(store, **{f"k{number}": "x"})
    expected = rows(store)
    after = image(folder, "after", data=before)
    store.close()

    class Interrupted(Exception):
        pass

    for step in range(1000):
        cut = image(after, "cut")
        left = [step]

        def counted(real: Any, left: list[int] = left) -> Any:
            def call(*words: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    raise Interrupted
                return real(*words)

            return call

        fake = SimpleNamespace(**vars(os))
        for name in ("pwrite", "fsync", "fdatasync"):
            setattr(fake, name, counted(getattr(os, name)))
        monkeypatch.setattr(lmdb_store, "os", fake)
        monkeypatch.setattr(journal, "os", fake)
        monkeypatch.setattr(Journal, "records", stopping(Journal.records, counted))
        try:
            opened(cut).close()
            done = True
        except Interrupted:
            done = False
        monkeypatch.undo()
        again = opened(cut)
        assert rows(again) == expected, f"step {step}"
        again.close()
        if done:
            assert step > 8
            return
    pytest.fail("it never ends")


def stopping(real: Any, counted: Any) -> Any:
    def records(self: Journal, mark: Mark) -> Iterator[Any]:
        for found in real(self, mark):
            yield counted(lambda found=found: found)()

    return records


def test_a_commit_that_fails_behind_its_record_has_not_happened(folder: Path) -> None:
    store = opened(folder)
    put(store, a="1")
    real = store._env

    class Failing:
        def begin(self, *words: Any, **names: Any) -> Any:
            txn = real.begin(*words, **names)
            if not names.get("write"):
                return txn

            def commit() -> None:
                txn.abort()
                raise lmdb.DiskError("mdb_txn_commit: No space left on device")

            return SimpleNamespace(
                commit=commit, abort=txn.abort, put=txn.put, get=txn.get, delete=txn.delete, id=txn.id
            )

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    failing: Any = Failing()
    store._env = failing
    with pytest.raises(NoSpace):
        put(store, a="2")
    store._env = real
    again = opened(image(folder, "cut"))
    assert rows(again) == {"a": "1"}
    again.close()
    put(store, b="3")
    again = opened(image(folder, "cut"))
    assert rows(again) == rows(store) == {"a": "1", "b": "3"}
    again.close()
    store.close()


CHILD = """
import sys, os, time
from pathlib import Path
from stratum.kv import lmdb_store
from stratum.kv.lmdb_store import LmdbStore
lmdb_store.JOURNAL_RECORDS_MAX = 25
store = LmdbStore(sys.argv[1], map_bytes=1 << 30, readers_max=64, journal_bytes=1 << 20)
who = sys.argv[2].encode()
if len(sys.argv) > 3:  # die between the record and LMDB's commit
    real = store._journal.write
    def write(data, at):
        real(data, at)
        os._exit(9)
    store._journal.write = write
number = 0
while True:
    with store.transact() as tx:
        shared = int(tx.get(b"shared") or b"0") + 1
        number += 1
        tx.put(b"shared", b"%d" % shared)
        tx.put(b"w" + who, b"%d" % number)
        tx.put(b"r%d" % (shared % 500), who * 50)
    print(number, flush=True)
"""


def child(folder: Path, who: str, *more: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", CHILD, str(folder), who, *more]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> int:
    """The newest number it was told of; it has been killed."""
    assert process.stdout is not None
    lines = process.stdout.read().split("\n")
    return int(lines[-2]) if len(lines) > 1 else 0


def test_processes_share_a_journal_and_die(folder: Path) -> None:
    """Three at once over many checkpoints, one killed; then the power goes under the others."""
    children = [child(folder, str(number)) for number in range(3)]
    for process in children:
        assert process.stdout is not None
        for _ in range(150):
            assert process.stdout.readline()
    children[0].kill()
    children[0].wait()
    for process in children[1:]:
        assert process.stdout is not None
        for _ in range(150):
            assert process.stdout.readline()
    for process in children[1:]:
        process.send_signal(signal.SIGSTOP)
    time.sleep(0.05)
    cut = image(folder, "cut")
    told = []
    for process, read in zip(children, (150, 300, 300), strict=True):
        process.kill()
        process.wait()
        told.append(said(process) or read)
    for place in (cut, folder):
        store = opened(place)
        found = rows(store)
        assert [int(found[f"w{number}"]) >= told[number] for number in range(3)] == [True] * 3, (found, told)
        assert int(found["shared"]) == sum(int(found[f"w{number}"]) for number in range(3))
        put(store, more="1")
        store.close()


def test_a_record_nobody_was_told_of_is_written_over(folder: Path) -> None:
    store = opened(folder)
    put(store, a="1")
    dying = child(folder, "9", "die")
    assert dying.wait(30) == 9
    assert "w9" not in rows(store)
    put(store, b="2")
    again = opened(image(folder, "cut"))
    assert rows(again) == {"a": "1", "b": "2"}
    again.close()
    store.close()
    dying = child(folder, "9", "die")
    assert dying.wait(30) == 9
    store = opened(folder)
    assert rows(store)["w9"] == "1", "alone again, its record is as good as a commit"
    store.close()


def test_many_that_begin_at_once_agree(tmp_path: Path) -> None:
    """The first ones make the files; none wipes what another has written already."""
    for number in range(5):
        folder = tmp_path / str(number)
        folder.mkdir()
        lmdb.open(str(folder), map_size=1 << 30).close()
        children = [child(folder, str(who)) for who in range(4)]
        for process in children:
            assert process.stdout is not None
            for _ in range(20):
                assert process.stdout.readline()
        told = []
        for process in children:
            process.kill()
            process.wait()
            told.append(said(process) or 20)
        store = opened(folder)
        found = rows(store)
        assert all(int(found[f"w{who}"]) >= told[who] for who in range(4))
        store.close()


def test_an_idle_process_holds_no_page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb_store, "CHECKPOINT_S", 0.05)
    store = opened(folder)
    put(store, a="1")
    assert store._pin is not None
    deadline = time.monotonic() + 10
    while store._pin is not None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    again = opened(image(folder, "idle"))
    assert again._mark.transaction == store.last_id(), "nothing was left to apply"
    again.close()
    put(store, a="2")
    assert store._pin is not None
    store.close()


def test_churn_does_not_grow_the_store(folder: Path) -> None:
    store = opened(folder)
    for number in range(3000):
        put(store, **{f"k{number % 50}": "x" * 3000})
    for number in range(6000):
        put(store, **{f"k{number % 50}": "y" * 3000})
    assert store.used_bytes() <= 40 << 20, "9,000 commits wrote over 100 MB of pages"
    store.close()


def test_a_checkpoint_is_of_one_file(folder: Path) -> None:
    store = opened(folder)
    put(store, a="1")
    old = image(folder, "old")
    put(store, a="2")
    store.checkpoint()
    copy = folder.parent / "copy"
    copy.mkdir()
    store.copy_to(str(copy))
    store.close()
    again = opened(copy)
    assert rows(again) == {"a": "2"}
    again.close()
    restored = image(folder, "restored", data=copy.rename(folder.parent / "other"))
    with pytest.raises(StorageFailed, match="of another one"):
        opened(restored)
    for file in ("journal", "checkpoint"):
        (restored / file).unlink()
    with pytest.raises(StorageFailed, match="lost its checkpoint"):
        opened(restored)
    with pytest.raises(StorageFailed, match="older than its checkpoint"):
        opened(image(folder, "stale", data=old))
    other = folder.parent / "compact"
    other.mkdir()
    store = opened(folder)
    store.copy_to(str(other))
    store.close()
    for file in ("journal", "checkpoint"):
        shutil.copy(folder / file, other / file)
    store = opened(other)
    assert rows(store) == {"a": "2"}, "a copy that has no name yet takes nothing from a journal that lies beside it"
    store.close()


def test_a_program_that_knows_no_journal_is_noticed(folder: Path) -> None:
    other = lmdb.open(str(folder), map_size=1 << 30)
    with other.begin(write=True) as txn:
        txn.put(b"a", b"1")
    other.close()
    with pytest.raises(StorageFailed, match="knows no journal"):
        opened(folder)


def test_a_disk_that_refuses_a_flush_stops_everybody(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(folder)
    put(store, a="1")
    other = child(folder, "1")
    assert other.stdout is not None
    assert other.stdout.readline()

    def refuse(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(journal, "os", SimpleNamespace(**{**vars(os), "fdatasync": refuse}))
    with pytest.raises(StorageFailed):
        put(store, a="2")
    monkeypatch.undo()
    assert other.wait(30) != 0, "it was told"
    told = said(other)
    with pytest.raises(StorageFailed):
        put(store, a="3")
    found = rows(store)
    store.close()
    store = opened(folder)
    assert int(rows(store)["w1"]) >= told
    assert rows(store)["a"] in {"1", "2"}, "of the commit that failed nobody knows"
    assert {key: value for key, value in rows(store).items() if key != "a"} == {
        k: v for k, v in found.items() if k != "a"
    }
    put(store, a="4")
    store.close()
