"""The table of shared locks against a model: who holds which byte."""

from __future__ import annotations

import errno
import random
from typing import TYPE_CHECKING

import pytest

from stratum.file_locks import FLOCK, RANGES, TO_THE_END, Lock, LockTable
from tests.support import new_seed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BYTES = 12
OWNERS = [(1, 10), (1, 11), (2, 10)]


@pytest.fixture
def dead() -> set[int]:
    return set()


@pytest.fixture
def tables(tmp_path: Path, dead: set[int]) -> Iterator[dict[int, LockTable]]:
    """Of two sessions; LMDB wants one process to open a map once, so each looks through its own link."""
    first = LockTable(tmp_path, 1, dead.__contains__)
    second = LockTable.__new__(LockTable)
    second.session, second._is_dead, second._map, second._by_handle = 2, dead.__contains__, first._map, {}
    yield {1: first, 2: second}
    first.close()


def test_ranges_are_split_and_joined_as_fcntl_has_it(tables: dict[int, LockTable]) -> None:
    rng = random.Random(new_seed())
    held: dict[tuple[int, int], dict[int, bool]] = {who: {} for who in OWNERS}
    for _ in range(3000):
        who = rng.choice(OWNERS)
        start = rng.randrange(BYTES)
        last = rng.randrange(start, BYTES)
        wanted = Lock(RANGES, 7, *who, start, last, exclusive=rng.random() < 0.5)
        table, span = tables[who[0]], range(start, last + 1)
        if rng.random() < 0.4:
            table.give_up(wanted)
            for at in span:
                held[who].pop(at, None)
            continue
        blocked = any(
            at in held[other] and (wanted.exclusive or held[other][at])
            for other in OWNERS if other != who for at in span
        )  # fmt: skip
        assert (table.obstacle(wanted) is not None) == blocked
        assert (table.take(wanted) is not None) == blocked
        if not blocked:
            held[who].update(dict.fromkeys(span, wanted.exclusive))
        for other in OWNERS:
            whole = Lock(RANGES, 7, 3, 1, 0, TO_THE_END, exclusive=True)
            mine = [lock for lock in tables[1].all_of(RANGES, 7) if (lock.session, lock.owner) == other]
            assert {at: lock.exclusive for lock in mine for at in range(lock.start, lock.last + 1)} == held[other]
            assert len({(lock.start, lock.last) for lock in mine}) == len(mine)
            assert all(lock.excludes(whole) for lock in mine)


def test_who_dies_holds_nothing(tables: dict[int, LockTable], dead: set[int]) -> None:
    wanted = Lock(FLOCK, 7, 1, 10, 0, TO_THE_END, exclusive=True)
    other = Lock(FLOCK, 7, 2, 10, 0, TO_THE_END, exclusive=True)
    assert tables[1].take(wanted) is None
    assert tables[2].take(other) == wanted
    dead.add(1)
    assert tables[2].take(other) is None
    assert tables[2].all_of(FLOCK, 7) == [other]


def test_who_waits_for_itself(tables: dict[int, LockTable]) -> None:
    def lock(who: tuple[int, int], at: int) -> Lock:
        return Lock(RANGES, at, *who, 5, 5, exclusive=True)

    for at, who in enumerate(OWNERS):
        assert tables[who[0]].take(lock(who, at)) is None
    assert tables[1].wait(1, lock(OWNERS[0], 1))
    assert tables[1].wait(2, lock(OWNERS[1], 2))
    assert not tables[2].wait(3, lock(OWNERS[2], 0)), errno.EDEADLK
    tables[1].waits_no_more(1, lock(OWNERS[0], 1))
    assert tables[2].wait(3, lock(OWNERS[2], 0))
