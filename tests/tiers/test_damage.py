"""Bytes of the tiers that are damaged or gone: a read ends with a clear error, and nobody forgets it."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest

from stratum import cold_admin
from stratum.cold_backends.decorator import Decorator
from stratum.errors import DataDamaged, StratumError
from stratum.tier_rows import ColdRow, Tier
from stratum.tiering.mover import Mover
from stratum.volume import Volume
from tests.support import get, put
from tests.tiers.conftest import directory_row, make_tiered

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from stratum.cold_backends.contract import Backend, RemoteBody

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
    for path in (opened.root / "recall").iterdir():
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
    forget_all = opened.root / "recall"
    forget_all.mkdir(exist_ok=True)
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
