"""What a long command says of how far it is."""

from __future__ import annotations

import io
import socket
from typing import TYPE_CHECKING

import pytest

from stratum import backup, fsck
from stratum.cli.output import size
from stratum.cli.progress import Progress, span
from stratum.volume import Volume
from tests.support import make_volume, put

if TYPE_CHECKING:
    from pathlib import Path


class Screen(io.StringIO):
    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize(("terminal", "seconds"), [(True, 0.5), (False, 60.0)])
def test_bytes_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, terminal: bool, seconds: float
) -> None:
    screen, clock = Screen(terminal=terminal), Clock()
    monkeypatch.setattr("sys.stderr", screen)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        with Progress("reading", clock=clock) as progress:
            progress.at(1, 100)
            assert screen.getvalue() == ""
            clock.now_s += seconds
            progress.at(round(seconds * (1 << 20)), round(seconds * (4 << 20)))
        told = manager.recv(1000).decode()
    done = size(seconds * (1 << 20))
    assert told == f"STATUS=reading: {done} of {size(seconds * (4 << 20))} (25 %), 1.0 MiB/s, {span(seconds * 3)} left"
    assert told.removeprefix("STATUS=") in screen.getvalue()
    assert screen.getvalue().endswith("\r" if terminal else "\n")


def test_an_unknown_total_and_large_numbers() -> None:
    assert Progress("x").text(500, 0, 2.0) == "x: 500 B, 250 B/s"
    assert Progress("x").text(0, 1000, 2.0) == "x: 0 B of 1000 B (0 %), 0 B/s"
    assert size(12_345_678_901_234) == "11.2 TiB"
    assert [span(5), span(65), span(7260)] == ["5 s", "1 min 5 s", "2 h 1 min"]


def test_fsck_tells_how_much_it_has_read(tmp_path: Path) -> None:
    make_volume(tmp_path / "volume")
    told: list[tuple[int, int]] = []
    with Volume(tmp_path / "volume", "test") as opened:
        for number in range(3):
            put(opened, str(number), bytes(100_000), inline_max=0)
        assert fsck.check(opened, seen=lambda done, total: told.append((done, total))) == []
    assert told == [(100_000, 300_000), (200_000, 300_000), (300_000, 300_000)]


def test_a_backup_counts_what_it_writes_and_reads_back(tmp_path: Path) -> None:
    root = tmp_path / "volume"
    make_volume(root)
    told: list[tuple[int, int]] = []
    with Volume(root, "test") as opened:
        put(opened, "k", b"x" * 1000)
        made = backup.make(opened, tmp_path, watch=lambda *far: told.append(far))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert {total for _, total in told} == {told[-1][0]}
    size = told[-1][0] // 2
    told.clear()
    backup.verify(made.path, lambda *far: told.append(far))
    assert told[-1] == (size, size)
    told.clear()
    backup.restore(made.path, tmp_path / "again", watch=lambda *far: told.append(far))
    assert told[-1] == (size, size)
