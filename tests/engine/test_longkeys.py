"""Long strings keep their order whatever their length."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from stratum import longkeys
from stratum.kv.contract import KEY_BYTES_MAX
from stratum.kv.memory_store import MemoryStore
from stratum.longkeys import PIECE_BYTES

P = PIECE_BYTES
# Few letters and lengths around the piece size make shared beginnings likely.
strings = st.builds(
    lambda head, count, tail: head * count + tail,
    st.sampled_from([b"a", b"b"]), st.sampled_from([0, 1, P - 1, P, P + 1, 2 * P - 1, 2 * P, 2 * P + 1]), st.binary(max_size=3).map(lambda b: b.replace(b"\0", b"!")),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(chosen=st.sets(strings, max_size=25), start=strings, prefix=strings)
@example(chosen={b"a" * P, b"a" * P + b"!", b"a" * P + b"/", b"a" * (P - 1) + b"b"}, start=b"a" * P, prefix=b"")
def test_scan_equals_a_sorted_set(chosen: set[bytes], start: bytes, prefix: bytes) -> None:
    store = MemoryStore()
    nodes = iter(range(100, 10_000))
    with store.transact() as tx:
        for string in chosen:
            longkeys.put(tx, b"D", 7, string, string[-5:], lambda: next(nodes))
    with store.snapshot() as snapshot:
        assert all(len(key) <= KEY_BYTES_MAX for key, _ in snapshot.scan(b"", b"\xff"))
        assert [string for string, _ in longkeys.scan(snapshot, b"D", 7)] == sorted(chosen)
        assert [string for string, _ in longkeys.scan(snapshot, b"D", 7, start, prefix)] == sorted(
            s for s in chosen if s >= start and s.startswith(prefix)
        )
        assert all(longkeys.get(snapshot, b"D", 7, string) == string[-5:] for string in chosen)


@settings(max_examples=100, deadline=None)
@given(chosen=st.lists(strings, unique=True, max_size=15), removed=st.sets(st.integers(0, 14)))
def test_deleting_everything_leaves_nothing(chosen: list[bytes], removed: set[int]) -> None:
    store = MemoryStore()
    nodes = iter(range(100, 10_000))
    with store.transact() as tx:
        for string in chosen:
            longkeys.put(tx, b"D", 7, string, b"", lambda: next(nodes))
        for at in sorted(removed):
            if at < len(chosen):
                assert longkeys.delete(tx, b"D", 7, chosen[at])
        left = {string for at, string in enumerate(chosen) if at not in removed}
        assert [string for string, _ in longkeys.scan(tx, b"D", 7)] == sorted(left)
        for string in left:
            assert longkeys.delete(tx, b"D", 7, string)
        assert list(tx.scan(b"", b"\xff")) == []
