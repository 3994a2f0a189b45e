"""The cells of packs on their way in: which bytes are fetched, and that readers get theirs whoever fetches them."""

from __future__ import annotations

import os
import random
import threading
import time
from typing import TYPE_CHECKING

import pytest

from stratum import recall
from stratum.deadlines import Deadline
from stratum.errors import TierUnavailable
from stratum.recall import CELL_BYTES, RecallCache
from tests.support import new_seed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

BLOCK = 64 * 1024
PACK = 7


class Far:
    """A pack of `cells` cells and a bit. `ranges` lists what was asked for, `sent` counts what was taken; `fails_at` breaks off there, once."""

    def __init__(self, cells: int, piece_bytes: int = BLOCK) -> None:
        self.data = os.urandom(cells * CELL_BYTES + 1000)
        self.ranges: list[tuple[int, int]] = []
        self.sent = 0
        self.fails_at: int | None = None
        self.gate: threading.Event | None = None
        self._piece_bytes = piece_bytes

    def fetch(self, first: int, last: int) -> Iterator[bytes]:
        self.ranges.append((first, last))
        for at in range(first, last, self._piece_bytes):
            if self.gate is not None:
                assert self.gate.wait(20)
            if self.fails_at is not None and at >= self.fails_at:
                self.fails_at = None
                raise TierUnavailable("on purpose")
            piece = self.data[at : min(at + self._piece_bytes, last)]
            self.sent += len(piece)
            yield piece

    def read(self, cache: RecallCache, start: int, stop: int, wanted_stop: int = 0, patience_s: float = 0.0) -> bytes:
        """All of [start, stop), verified."""
        at = start
        while at < stop:
            least = min(at + BLOCK, stop)
            piece = cache.read(
                PACK, len(self.data), at, least, stop, max(wanted_stop, stop), self.fetch, Deadline(20), patience_s
            )  # fmt: skip
            assert len(piece) >= least - at
            assert piece == self.data[at : at + len(piece)]
            at += len(piece)
        return self.data[start:at]


@pytest.fixture
def cache(tmp_path: Path) -> RecallCache:
    return RecallCache(tmp_path / "recall", 1 << 30)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def settled(cache: RecallCache) -> None:
    until(lambda: not cache._fetches)


def test_who_wants_the_middle_of_a_cell_does_not_wait_for_its_beginning(cache: RecallCache) -> None:
    far = Far(3)
    far.read(cache, CELL_BYTES + 5 * BLOCK, CELL_BYTES + 6 * BLOCK)
    settled(cache)
    assert far.ranges == [(CELL_BYTES + 5 * BLOCK, 2 * CELL_BYTES)]


def test_who_reads_backwards_begins_a_cell_anew_once(cache: RecallCache) -> None:
    far = Far(2)
    for block in range(31, -1, -1):
        far.read(cache, block * BLOCK, (block + 1) * BLOCK)
        settled(cache)
    assert far.ranges == [
        (CELL_BYTES + 15 * BLOCK, 2 * CELL_BYTES), (CELL_BYTES, 2 * CELL_BYTES), (15 * BLOCK, CELL_BYTES), (0, CELL_BYTES),
    ]  # fmt: skip


def test_a_fetch_that_broke_off_is_gone_on_with_in_one_request(cache: RecallCache) -> None:
    """Cells that were claimed and got nothing are nobody's again."""
    far = Far(6)
    far.fails_at = 2 * CELL_BYTES + 3 * BLOCK
    far.read(cache, 0, BLOCK, 6 * CELL_BYTES)
    settled(cache)
    far.read(cache, 0, 6 * CELL_BYTES)
    settled(cache)
    assert far.ranges == [(0, 6 * CELL_BYTES), (2 * CELL_BYTES + 3 * BLOCK, 6 * CELL_BYTES)]
    assert far.sent == 6 * CELL_BYTES


def test_a_fetch_ends_before_a_cell_that_somebody_else_has(cache: RecallCache, tmp_path: Path) -> None:
    far = Far(8)
    other = RecallCache(tmp_path / "recall", 1 << 30)  # as another process
    far.read(other, 4 * CELL_BYTES, 5 * CELL_BYTES)
    settled(other)
    far.read(cache, 0, 8 * CELL_BYTES)
    settled(cache)
    assert sorted(far.ranges) == [
        (0, 4 * CELL_BYTES),
        (4 * CELL_BYTES, 5 * CELL_BYTES),
        (5 * CELL_BYTES, 8 * CELL_BYTES),
    ]
    assert far.sent == 8 * CELL_BYTES


def test_two_that_want_the_same_at_once_make_one_request(cache: RecallCache, tmp_path: Path) -> None:
    far = Far(4)
    far.gate = threading.Event()
    others = [cache, RecallCache(tmp_path / "recall", 1 << 30)]
    readers = [
        threading.Thread(target=far.read, args=(others[number % 2], 3 * BLOCK, 3 * CELL_BYTES)) for number in range(8)
    ]
    for reader in readers:
        reader.start()
    far.gate.set()
    for reader in readers:
        reader.join(20)
        assert not reader.is_alive()
    assert far.ranges == [(3 * BLOCK, 3 * CELL_BYTES)]


def test_what_is_being_fetched_is_not_asked_for_again(cache: RecallCache) -> None:
    """Before the first byte has come its cells are not claimed; who asks ahead must know all the same."""
    far = Far(8)
    far.gate = threading.Event()
    reader = threading.Thread(target=far.read, args=(cache, 0, BLOCK, 8 * CELL_BYTES))
    reader.start()
    until(lambda: bool(far.ranges))
    cache.ask(PACK, len(far.data), 2 * CELL_BYTES, 8 * CELL_BYTES, far.fetch)
    far.gate.set()
    reader.join(20)
    settled(cache)
    assert far.ranges == [(0, 8 * CELL_BYTES)]


def test_behind_what_another_process_fetches_nothing_is_asked_for(cache: RecallCache, tmp_path: Path) -> None:
    """It claims its cells little by little."""
    far = Far(20)
    far.gate = threading.Event()
    other = RecallCache(tmp_path / "recall", 1 << 30)
    reader = threading.Thread(target=far.read, args=(other, 0, BLOCK, 20 * CELL_BYTES))
    reader.start()
    until(lambda: bool(far.ranges))
    cache.ask(PACK, len(far.data), 0, 20 * CELL_BYTES, far.fetch)
    far.gate.set()
    far.read(cache, 0, 20 * CELL_BYTES)
    reader.join(20)
    settled(other)
    assert far.ranges == [(0, 20 * CELL_BYTES)]


def test_a_cell_that_is_none_is_fetched_again(cache: RecallCache, tmp_path: Path) -> None:
    """Of an older version, or what a power cut left: length without bytes."""
    far = Far(1)
    for content in (b"", b"cel", bytes(5000), far.data[:CELL_BYTES], recall.CELL_MAGIC + b"\xff" * 100):
        (tmp_path / "recall" / f"{PACK:016x}.0000").write_bytes(content)
        far.read(cache, 10 * BLOCK, 11 * BLOCK)
        settled(cache)
    assert far.ranges == [(10 * BLOCK, CELL_BYTES)] * 5


def test_who_is_patient_gets_the_rest_of_the_cell(cache: RecallCache) -> None:
    far = Far(2)
    far.read(cache, 0, BLOCK, 2 * CELL_BYTES)
    found = cache.read(
        PACK, len(far.data), BLOCK, 2 * BLOCK, 2 * CELL_BYTES, 2 * CELL_BYTES, far.fetch, Deadline(20), 20.0
    )
    assert len(found) >= CELL_BYTES - BLOCK


def test_patience_ends_when_nobody_fetches_the_rest(cache: RecallCache) -> None:
    far = Far(2)
    far.fails_at = 4 * BLOCK
    far.read(cache, 0, BLOCK, 2 * CELL_BYTES)
    settled(cache)
    found = cache.read(PACK, len(far.data), BLOCK, 2 * BLOCK, CELL_BYTES, CELL_BYTES, far.fetch, Deadline(3600), 3600.0)
    assert found == far.data[BLOCK : BLOCK + len(found)]


def test_readers_of_all_sorts_get_their_bytes(tmp_path: Path) -> None:
    """Several processes' caches, ranges by chance, fetches that break off, cells that are trimmed and dropped meanwhile."""
    seed = new_seed()
    far = Far(12, 3 * BLOCK // 2)
    caches = [RecallCache(tmp_path / "recall", 5 * CELL_BYTES) for _ in range(3)]
    errors: list[BaseException] = []

    def work(number: int) -> None:
        chance = random.Random(seed + number)
        try:
            for _ in range(60):
                start = chance.randrange(len(far.data) // BLOCK) * BLOCK
                stop = min(start + chance.choice((1, 2, 20, 60)) * BLOCK, len(far.data))
                dice = chance.random()
                if dice < 0.05:
                    far.fails_at = chance.randrange(len(far.data))
                elif dice < 0.1:
                    chance.choice(caches).trim()
                elif dice < 0.15:
                    chance.choice(caches).drop(PACK)
                try:
                    far.read(
                        chance.choice(caches),
                        start,
                        stop,
                        chance.choice((0, len(far.data))),
                        chance.choice((0.0, 0.005)),
                    )
                except TierUnavailable as error:
                    assert error.message == "on purpose"  # noqa: PT017
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert not errors
    for cache in caches:
        settled(cache)
    assert len(os.listdir("/proc/self/fd")) < 200
