"""Bytes of the tiers that are damaged or gone: a read ends with a clear error, and nobody forgets it."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest

from stratum import cold_admin, counting, damage, fsck, health, metrics, support
from stratum.cold_backends.decorator import Decorator
from stratum.errors import DataDamaged, StratumError
from stratum.tier_rows import ColdRow, Tier
from stratum.tiering.damage_check import DamageCheck
from stratum.tiering.explain import explain
from stratum.tiering.heal import Healer, start_scrub
from stratum.tiering.mover import Mover
from stratum.volume import Volume
from tests.support import BUCKET, delete, get, put
from tests.tiers.conftest import directory_row, make_tiered

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from stratum.cold_backends.contract import Backend, RemoteBody
    from stratum.transaction import MetadataTransaction

DATA = os.urandom(3_000_000)


@pytest.fixture(params=["directory", "s3", "encrypted"])
def opened(request: pytest.FixtureRequest, tmp_path: Path, moto: str) -> Iterator[Volume]:
    """A volume with a remote of each kind."""
    root = make_tiered(tmp_path, remote=False, cold__recall_s_max=20.0)
    with Volume(root, "test") as found:
        if request.param == "s3":
            row = s3_row(tmp_path, moto, f"damage-{tmp_path.name.replace('_', '-')[-40:]}")
            cold_admin.add(found, "archive", row, create_bucket=True)
        else:
            (tmp_path / "archive").mkdir()
            key = ""
            if request.param == "encrypted":
                (tmp_path / "key").write_text("07" * 32)
                (tmp_path / "key").chmod(0o600)
                key = str(tmp_path / "key")
            cold_admin.add(found, "archive", directory_row(tmp_path / "archive", encryption_key=key))
        yield found


def s3_row(folder: Path, endpoint: str, bucket: str) -> ColdRow:
    credentials = folder / "credentials"
    credentials.write_text('{"access_key": "a", "secret_key": "s"}')
    credentials.chmod(0o600)
    return ColdRow("s3", endpoint, bucket, "", "", str(credentials), "", "", 0, 0)


def raw_of(opened: Volume) -> Backend:
    return opened.cold.remote("archive")[1].raw


def the_object(opened: Volume) -> str:
    return next(info.key for info in raw_of(opened).list("v1/"))


def spoil(opened: Volume, change: Callable[[bytes], bytes | None]) -> Callable[[], None]:
    """Change the one pack in the remote behind everybody's back, and forget what was recalled; undone by what is returned."""
    raw, key = raw_of(opened), the_object(opened)
    before, metadata = b"".join(raw.get(key).pieces), raw.head(key).metadata
    now = change(before)
    if now is None:
        raw.delete(key)
    else:
        raw.put(key, now, metadata)
    forget(opened)

    def undo() -> None:
        raw.put(key, before, metadata)
        forget(opened)

    return undo


def forget(opened: Volume) -> None:
    for path in opened.root.glob("recall/*"):
        path.unlink()


def in_time(function: Callable[[], object], seconds: float = 30.0) -> object:
    """What it returns or raises. One that never ends fails the test instead of hanging it."""
    box: list[object] = []

    def run() -> None:
        try:
            box.append(function())
        except StratumError as error:
            box.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert box, "it does not end"
    return box[0]


CHANGES: dict[str, Callable[[bytes], bytes | None]] = {
    "empty": lambda _: b"",
    "one byte": lambda data: data[:1],
    "truncated": lambda data: data[: len(data) // 2],
    "a byte short": lambda data: data[: len(DATA) - 1],
    "gone": lambda _: None,
    "flipped": lambda data: data[:1000] + bytes((data[1000] ^ 1,)) + data[1001:],
    "another": lambda data: os.urandom(len(data)),
}


def cold_file(opened: Volume, key: str = "k", data: bytes = DATA) -> int:
    number = put(opened, key, data).number
    Mover(opened).move([number], Tier.COLD, cause="test", alone=True)
    forget(opened)
    return number


class Counting(Decorator):
    """`gets`: how often bytes were asked for."""

    gets = 0

    def get(self, key: str, start: int = 0, stop: int | None = None) -> RemoteBody:
        self.gets += 1
        return super().get(key, start, stop)


@pytest.mark.parametrize("change", CHANGES)
def test_a_damaged_object_is_an_error_and_not_fetched_for_ever(opened: Volume, change: str) -> None:
    cold_file(opened)
    undo = spoil(opened, CHANGES[change])
    remote = opened.cold.remote("archive")[1]
    counting = Counting(remote.sealed)
    remote.sealed = counting
    assert isinstance(in_time(lambda: get(opened, "k")), DataDamaged)
    assert 1 <= counting.gets <= 8
    undo()
    assert get(opened, "k") == DATA


# -- remembered ---------------------------------------------------------------------------------------------------------


def rows(opened: Volume) -> list[tuple[str, bool]]:
    opened.mutate(lambda _: None)  # what was told before is committed by then
    with opened.snapshot() as reader:
        return [(thing.name, row.heals) for thing, _, row in damage.scan(reader)]


def damaged(opened: Volume) -> list[str]:
    """What health says."""
    opened.mutate(lambda _: None)
    return [item.thing for item in health.examine(opened) if item.code == "STR-DATA-DAMAGED"]


def check(opened: Volume) -> None:
    mover = Mover(opened)
    DamageCheck(opened, mover, Healer(opened, mover)).run(now=True)


def scrub(opened: Volume) -> None:
    healer = Healer(opened, Mover(opened))
    start_scrub(opened)
    for _ in range(200):
        healer.scrub()
        with opened.snapshot() as reader:
            if b'"done"' in (reader.get(b"gscrub") or b""):
                return
    raise AssertionError("the scrub does not end")


def reading(opened: Volume) -> None:
    for _ in range(5):
        assert isinstance(in_time(lambda: get(opened, "k")), DataDamaged)


FINDERS: dict[str, Callable[[Volume], object]] = {
    "a read": reading,
    "cold check": lambda opened: cold_admin.check(opened, "archive"),
    "cold check --read": lambda opened: cold_admin.check(opened, "archive", read=True),
    "scrub": scrub,
}


@pytest.mark.parametrize("finder", FINDERS)
@pytest.mark.parametrize("change", ["truncated", "gone"])
def test_damage_is_remembered_until_it_is_healed(opened: Volume, finder: str, change: str) -> None:
    cold_file(opened)
    undo = spoil(opened, CHANGES[change])
    assert damaged(opened) == []
    FINDERS[finder](opened)
    assert damaged(opened) == [f"{BUCKET}/k"]
    FINDERS[finder](opened)
    check(opened)
    assert damaged(opened) == [f"{BUCKET}/k"]
    assert rows(opened) == [("PACK", False)]
    undo()
    check(opened)
    assert (damaged(opened), rows(opened)) == ([], [])


def test_a_move_that_meets_damage_remembers_it_and_moves_the_others(opened: Volume) -> None:
    first = cold_file(opened)
    undo = spoil(opened, CHANGES["gone"])
    second = put(opened, "whole", DATA[:200_000]).number
    outcome = Mover(opened).move([first, second], Tier.WARM, cause="test", alone=True)
    assert list(outcome.failed) == [first]
    assert damaged(opened) == [f"{BUCKET}/k"]
    undo()
    assert Mover(opened).move([first], Tier.WARM, cause="test", alone=True).failed == {}
    check(opened)
    assert damaged(opened) == []


@pytest.mark.parametrize("how", ["deleted", "overwritten", "has come home"])
def test_what_nobody_misses_any_more_is_forgotten(opened: Volume, how: str) -> None:
    number = cold_file(opened)
    undo = spoil(opened, CHANGES["flipped"])
    reading(opened)
    assert damaged(opened) == [f"{BUCKET}/k"]
    if how == "deleted":
        delete(opened, "k")
    elif how == "overwritten":
        put(opened, "k", b"new")
    else:
        undo()
        Mover(opened).promote(extents_of(opened, number))
        check(opened)
    assert damaged(opened) == []
    check(opened)
    assert rows(opened) == []


def extents_of(opened: Volume, number: int) -> list[int]:
    with opened.snapshot() as reader:
        return [piece.extent for piece in reader.slices(number)]


def test_a_wrong_byte_is_told_of_the_file_that_has_it(opened: Volume) -> None:
    """Not of all that lie in the same pack."""
    numbers = [put(opened, name, os.urandom(400_000)).number for name in ("a", "b", "c")]
    Mover(opened).move(numbers, Tier.COLD, cause="test", alone=True)
    undo = spoil(opened, lambda data: data[:600_000] + bytes((data[600_000] ^ 1,)) + data[600_001:])
    cold_admin.check(opened, "archive", read=True)
    assert damaged(opened) == [f"{BUCKET}/b"]
    undo()
    check(opened)
    assert damaged(opened) == []


def lose_hot(opened: Volume) -> None:
    for path in (opened.root / "hot").rglob("*.segment"):
        path.write_bytes(bytes(path.stat().st_size))
    opened.segments.close()


def count(result: str) -> float:
    words = counting._numbers.words
    return sum(sample.value for sample in metrics.DAMAGE.samples(words) if dict(sample.labels)["result"] == result)


def test_damage_that_another_copy_heals_is_counted_and_not_listed(tiered: Volume) -> None:
    number = put(tiered, "k", DATA).number
    Mover(tiered).copy(extents_of(tiered, number), Tier.WARM)
    lose_hot(tiered)
    before = count("healing")
    assert get(tiered, "k") == DATA
    assert count("healing") > before
    assert damaged(tiered) == []
    assert {heals for _, heals in rows(tiered)} == {True}
    check(tiered)
    assert rows(tiered) == []
    for path in tiered.root.parent.glob("d*/packs/**/*.shard"):
        path.unlink()
    assert get(tiered, "k") == DATA, "the hot bytes are whole again"


def test_fsck_remembers_what_it_cannot_repair(tiered: Volume) -> None:
    put(tiered, "hot", DATA)
    put(tiered, "small", b"inline")
    moved = put(tiered, "warm", DATA).number
    Mover(tiered).move([moved], Tier.WARM, cause="test", alone=True)
    lose_hot(tiered)
    for path in sorted(tiered.root.parent.glob("d*/packs/**/*.shard"))[:2]:
        path.unlink()

    def flip(tx: MetadataTransaction) -> None:
        for key, raw in list(tx.scan(b"N", b"O")):
            tx.put(key, raw[:-1] + b"?")

    tiered.mutate(flip)
    fsck.check(tiered)
    assert sorted(damaged(tiered)) == [f"{BUCKET}/hot", f"{BUCKET}/small", f"{BUCKET}/warm"]


def test_a_burst_of_damage_is_bounded(tiered: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row a thing, so many rows and no more, and some names."""
    monkeypatch.setattr(damage, "ROWS_MAX", 15)
    for at in range(30):
        put(tiered, f"k{at:02d}", DATA[:70_000])
    lose_hot(tiered)
    for _ in range(3):
        for at in range(30):
            assert isinstance(in_time(lambda at=at: get(tiered, f"k{at:02d}")), DataDamaged)  # type: ignore[misc]
    assert len(rows(tiered)) == 15
    told = damaged(tiered)
    assert len(told) == 11
    assert "(others)" in told
    for at in range(30):
        delete(tiered, f"k{at:02d}")
    assert damaged(tiered) == []


def test_explain_and_the_support_bundle_tell_of_it(tmp_path: Path) -> None:
    root = make_tiered(tmp_path, remote=False)
    with Volume(root, "test") as opened:
        put(opened, "some/secret-name", DATA)
        lose_hot(opened)
        assert isinstance(in_time(lambda: get(opened, "some/secret-name")), DataDamaged)
        assert damaged(opened) == [f"{BUCKET}/some/secret-name"]
        health.note(opened, health.examine(opened), 1.0)
        assert "checksum" in explain(opened, BUCKET, b"some/secret-name")["extents"][0]["damaged"]
    bundle = "".join(support.gather(root).values())
    assert "STR-DATA-DAMAGED" in bundle
    assert "secret-name" not in bundle
