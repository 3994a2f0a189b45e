"""Group commit: nobody inherits another's failure, and nobody commits after being declared dead."""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING

import pytest

from stratum.committer import Mutation
from stratum.errors import NoSpace, PreconditionFailed, SessionDead, StorageFailed, StratumError
from stratum.preconditions import Conditions
from stratum.schema import key_u64
from tests.support import get, put

if TYPE_CHECKING:
    from stratum.transaction import MetadataTransaction
    from stratum.volume import Volume


def write(tx: MetadataTransaction, key: bytes) -> None:
    tx.put(key, b"")


def submit_together(opened: Volume, mutations: list[Mutation[None]]) -> None:
    """Let them gather behind one that blocks, so that they make one batch."""
    gate, entered = threading.Event(), threading.Event()

    def block(_: MetadataTransaction) -> None:
        entered.set()
        gate.wait(10)

    blocker: Mutation[None] = Mutation(block, frees=False)
    opened.committer.submit(blocker)
    entered.wait(10)
    for mutation in mutations:
        opened.committer.submit(mutation)
    gate.set()
    blocker.wait()


def test_a_mutation_that_fails_after_writing_takes_nobody_with_it(opened: Volume) -> None:
    def good(key: bytes) -> Mutation[None]:
        return Mutation(lambda tx: tx.put(key, b"1"), frees=False)

    def bad(tx: MetadataTransaction) -> None:
        tx.put(b"~bad", b"1")
        raise ValueError("half-way")

    mutations = [good(b"~a"), Mutation(bad, frees=False), good(b"~b")]
    submit_together(opened, mutations)
    mutations[0].wait()
    mutations[2].wait()
    with pytest.raises(ValueError, match="half-way"):
        mutations[1].wait()
    with opened.snapshot() as reader:
        assert [key for key, _ in reader.scan(b"~", b"\x7f")] == [b"~a", b"~b"]


def test_concurrent_callers_share_transactions(opened: Volume) -> None:
    before = opened.committer.batches
    mutations: list[Mutation[None]] = [Mutation(partial(write, key=b"~%d" % at), frees=False) for at in range(50)]
    submit_together(opened, mutations)
    for mutation in mutations:
        mutation.wait()
    assert opened.committer.batches - before <= 3
    assert len({mutation.transaction_id for mutation in mutations}) == 1


def test_one_of_many_conditional_creates_wins(opened: Volume) -> None:
    outcomes: list[bool] = []

    def create(at: int) -> None:
        try:
            put(opened, "lock", b"%d" % at, conditions=Conditions(if_none_match="*"))
            outcomes.append(True)
        except PreconditionFailed:
            outcomes.append(False)

    threads = [threading.Thread(target=create, args=(at,)) for at in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [False] * 15 + [True]


def test_a_session_declared_dead_cannot_commit(opened: Volume) -> None:
    with opened.store.transact() as tx:
        tx.delete(key_u64(b"Z", opened.session.id))
    with pytest.raises(SessionDead):
        put(opened, "late", b"x")
    with pytest.raises(SessionDead):
        put(opened, "later", b"x")


def test_after_a_failed_sync_nothing_is_written_any_more(opened: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    put(opened, "before", b"x" * 100_000)

    def broken(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.fdatasync", broken)
    with pytest.raises(StorageFailed):
        put(opened, "during", b"x" * 100_000)
    monkeypatch.undo()
    with pytest.raises(StratumError):
        put(opened, "after", b"x")
    assert get(opened, "before") == b"x" * 100_000
    assert isinstance(opened.failed, StorageFailed)


def test_a_volume_whose_disk_is_gone_takes_no_writes(opened: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> int:
        raise FileNotFoundError("the volume's folder is gone")

    monkeypatch.setattr(opened, "free_bytes", broken)
    opened._space_checked_s = 0.0
    for _ in range(2):
        with pytest.raises(StorageFailed, match="folder is gone"):
            put(opened, "k", b"x")


def test_a_disk_that_does_not_answer_leaves_the_last_answer(opened: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = threading.Event()

    def hung() -> int:
        answers.wait(30)
        return 0

    monkeypatch.setattr(opened, "free_bytes", hung)
    opened._space_checked_s = 0.0
    put(opened, "k", b"x")
    answers.set()
    with opened._space_asking:
        pass  # now it has answered: there is no space
    with pytest.raises(NoSpace):
        put(opened, "k", b"x")


def test_a_committer_that_breaks_fails_its_callers_instead_of_leaving_them(
    opened: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> bool:
        raise MemoryError("no memory")

    monkeypatch.setattr(opened.committer, "_may_grow", broken)
    with pytest.raises(StorageFailed, match="committer failed"):
        put(opened, "k", b"x")
    with pytest.raises(StorageFailed):
        put(opened, "k", b"x")


def test_who_cannot_know_whether_mounts_followed_says_so(opened: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was committed all the same keeps its bytes."""

    def broken(_: int) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(opened._acknowledger, "_wait", broken)
    opened.mutate(lambda tx: tx.put(b"T" + bytes(8), b"{}"))  # a mount that is not ours
    with pytest.raises(StorageFailed, match="not known whether every mount"):
        put(opened, "key", b"body" * 10_000)
    opened.mutate(lambda tx: tx.delete(b"T" + bytes(8)))
    assert get(opened, "key") == b"body" * 10_000
