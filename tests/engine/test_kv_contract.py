"""The conformance suite of `stratum.kv.contract`: every store runs it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stratum.kv.contract import RESERVED
from stratum.kv.lmdb_store import LmdbStore
from stratum.kv.memory_store import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from stratum.kv.contract import Store


@pytest.fixture(params=["lmdb", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    made: Store = (
        LmdbStore(str(tmp_path), map_bytes=1 << 30, readers_max=64, create=True)
        if request.param == "lmdb"
        else MemoryStore()
    )
    yield made
    made.close()


def test_a_transaction_is_seen_whole_or_not_at_all(store: Store) -> None:
    def interrupted() -> None:
        with store.transact() as tx:
            tx.put(b"a", b"1")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    with store.snapshot() as snapshot:
        assert snapshot.get(b"a") is None
    with store.transact() as tx:
        tx.put(b"a", b"1")
        tx.put(b"b", b"2")
    with store.snapshot() as snapshot:
        assert (snapshot.get(b"a"), snapshot.get(b"b")) == (b"1", b"2")


def test_a_snapshot_does_not_change(store: Store) -> None:
    with store.transact() as tx:
        tx.put(b"a", b"1")
    with store.snapshot() as snapshot:
        with store.transact() as tx:
            tx.put(b"a", b"2")
        assert snapshot.get(b"a") == b"1"
    with store.snapshot() as snapshot:
        assert snapshot.get(b"a") == b"2"


def test_ids_grow_and_name_the_newest_transaction(store: Store) -> None:
    before = store.last_id()
    with store.transact() as tx:
        tx.put(b"a", b"1")
        inside = tx.id
    assert before < inside == store.last_id()
    with store.snapshot() as snapshot:
        assert snapshot.id == inside


def test_scans_are_ordered_and_half_open(store: Store) -> None:
    with store.transact() as tx:
        for key in (b"b", b"a", b"ab", b"c", b"a\xff"):
            tx.put(key, key)
    with store.snapshot() as snapshot:
        assert [key for key, _ in snapshot.scan(b"a", b"c")] == [b"a", b"ab", b"a\xff", b"b"]
        assert snapshot.last_before(b"a", b"b") == (b"a\xff", b"a\xff")
        assert snapshot.last_before(b"a\xff\xff", b"b") is None
        assert snapshot.get_many([b"a", b"x", b"c"]) == {b"a": b"a", b"c": b"c"}


def test_delete_says_whether_there_was_something(store: Store) -> None:
    with store.transact() as tx:
        tx.put(b"a", b"")
        assert tx.delete(b"a")
        assert not tx.delete(b"a")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.dictionaries(
        st.binary(min_size=1, max_size=511).filter(lambda key: key < RESERVED), st.binary(max_size=5000), max_size=20
    ),
    start=st.binary(max_size=20),
    stop=st.binary(max_size=20),
)
def test_it_is_a_sorted_dictionary(store: Store, rows: dict[bytes, bytes], start: bytes, stop: bytes) -> None:
    with store.transact() as tx:
        for key, _ in list(tx.scan(b"", b"\xff" * 600)):
            tx.delete(key)
        for key, value in rows.items():
            tx.put(key, value)
    with store.snapshot() as snapshot:
        assert list(snapshot.scan(start, stop)) == [(key, rows[key]) for key in sorted(rows) if start <= key < stop]
        for limit in (1, 3, 1000):
            assert snapshot.first_rows(start, stop, limit) == list(snapshot.scan(start, stop))[:limit]


def test_what_last_id_names_can_be_read(store: Store) -> None:
    """A snapshot begun after `last_id` includes that transaction, also while another thread is in the middle of a commit."""
    ending = threading.Event()

    def commit() -> None:
        number = 0
        while not ending.is_set():
            number += 1
            with store.transact() as tx:
                tx.put(b"k", b"%d" % number)

    writer = threading.Thread(target=commit)
    writer.start()
    try:
        for _ in range(20_000):
            newest = store.last_id()
            with store.snapshot() as snapshot:
                assert snapshot.id >= newest
    finally:
        ending.set()
        writer.join()
