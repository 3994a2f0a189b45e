"""The audit log by itself: a chain that several writers share, that shows every tampering, and that fails as it was told to."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from stratum import audit
from stratum.audit import AuditLog, Head
from stratum.audit_strangers import ADDRESSES_MAX, RECORDED_ALL_MAX, RECORDED_MAX, Strangers
from stratum.errors import AuditUnavailable

if TYPE_CHECKING:
    from pathlib import Path


def opened(folder: Path, **settings: Any) -> AuditLog:
    return AuditLog(folder, **{"block": True, "synced": False, "rotate_bytes": 1 << 20, "keep_days": 365, **settings})


def write(folder: Path, count: int, **settings: Any) -> None:
    log = opened(folder, **settings)
    for number in range(count):
        log.record({"what": number}).result(10)
    log.close()


def test_records_are_chained_over_files_and_writers(tmp_path: Path) -> None:
    logs = [opened(tmp_path, rotate_bytes=4096) for _ in range(4)]

    def work(log: AuditLog, name: int) -> None:
        for number in range(100):
            log.record({"writer": name, "number": number}).result(10)

    threads = [threading.Thread(target=work, args=(log, name)) for name, log in enumerate(logs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for log in logs:
        log.close()
    done = audit.verify(tmp_path)
    assert done.problems == []
    assert done.files > 5
    assert done.records == done.last == 400 + done.files
    events = list(audit.events(tmp_path))
    for name in range(4):
        assert [event["number"] for event in events if event.get("writer") == name] == list(range(100))
    assert [event["n"] for event in audit.newest(tmp_path, 30)] == [event["n"] for event in events[-30:]]


def test_every_tampering_shows(tmp_path: Path) -> None:
    anchors: list[Head] = []
    log = opened(tmp_path, rotate_bytes=4096, anchor=anchors.append)
    for number in range(100):
        log.record({"what": number}).result(10)
    log.close()
    anchor = {"records": anchors[-1].records, "hash": anchors[-1].hash}
    assert audit.verify(tmp_path, anchor).problems == []
    whole = {path: path.read_bytes() for _, path in audit.files(tmp_path)}
    seed = 20261125
    choice = random.Random(seed)
    for attempt in range(60):
        path = choice.choice(list(whole))
        lines = whole[path].splitlines(keepends=True)
        at = choice.randrange(len(lines))
        match attempt % 6:
            case 0:  # a changed byte
                place = choice.randrange(len(lines[at]) - 1)
                lines[at] = lines[at][:place] + bytes((lines[at][place] ^ 1,)) + lines[at][place + 1 :]
            case 1:  # a missing line; the last one of all is for the anchor
                del lines[at]
            case 2:  # two lines exchanged
                other = at - 1 if at else 1
                lines[at], lines[other] = lines[other], lines[at]
            case 3:  # a line twice
                lines.insert(at, lines[at])
            case 4:  # written anew from there on, with true hashes: only the anchor knows
                lines = rewritten(lines, at)
            case _:  # a whole file
                lines = []
        if lines:
            path.write_bytes(b"".join(lines))
        else:
            path.unlink()
        oldest = not lines and path == next(iter(whole))
        problems = audit.verify(tmp_path, anchor).problems
        assert oldest or problems, f"seed {seed}, attempt {attempt}, {path.name} line {at + 1}"
        path.write_bytes(whole[path])
    assert audit.verify(tmp_path, anchor).problems == []


def rewritten(lines: list[bytes], at: int) -> list[bytes]:
    texts = [line.decode()[audit.HASH_BYTES + 1 :].rstrip("\n") for line in lines]
    before = json.loads(texts[0])["continues"]
    made = []
    for place, text in enumerate(texts):
        said = text.replace('"time"', '"when"') if place == at else text
        before = audit.chained(before, said)
        made.append(f"{before} {said}\n".encode())
    return made


def test_a_torn_record_was_never_acknowledged_and_is_cut_off(tmp_path: Path) -> None:
    write(tmp_path, 5)
    (_, path), *_ = audit.files(tmp_path)
    with path.open("ab") as file:
        file.write(b"0" * 100)
    assert audit.verify(tmp_path).problems == []
    write(tmp_path, 5)
    done = audit.verify(tmp_path)
    assert (done.problems, done.records) == ([], 11)


def test_what_is_known_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two writers take turns; each reads what the other added, also when a line is longer than what is read at first."""
    long = "x" * 3 * audit.TAIL_BYTES
    first, second = opened(tmp_path, rotate_bytes=1 << 26), opened(tmp_path, rotate_bytes=1 << 26)
    for log in (first, second, first):
        log.record({"what": long}).result(10)
    read = []
    real = os.pread

    def counted(fd: int, size: int, at: int) -> bytes:
        read.append(size)
        return real(fd, size, at)

    monkeypatch.setattr("stratum.audit.os.pread", counted)
    second.record({"what": "short"}).result(10)
    del read[:]
    for number in range(20):
        (first, second)[number % 2].record({"what": number}).result(10)
    assert len(read) == 20
    assert max(read) < 1000
    third = opened(tmp_path, rotate_bytes=1 << 26)
    third.record({"what": long}).result(10)
    fourth = opened(tmp_path, rotate_bytes=1 << 26)
    fourth.record({"what": "after the long one"}).result(10)
    for log in (first, second, third, fourth):
        log.close()
    done = audit.verify(tmp_path)
    assert (done.problems, done.records) == ([], 27)


def test_old_files_go_and_the_rest_still_verifies(tmp_path: Path) -> None:
    write(tmp_path, 200, rotate_bytes=4096)
    before = audit.files(tmp_path)
    for _, path in before[:3]:
        os.utime(path, (0, 0))
    write(tmp_path, 60, rotate_bytes=4096)
    left = audit.files(tmp_path)
    assert left[0][0] == before[3][0]
    done = audit.verify(tmp_path)
    assert done.problems == []
    assert done.first > 1


def fill(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stratum.audit.os.pwrite", full)


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("block", [True, False])
def test_a_full_disk_blocks_or_drops_as_told_and_the_gap_is_on_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, block: bool
) -> None:
    log = opened(tmp_path, block=block)
    log.record({"what": "before"}).result(10)
    real = os.pwrite
    fill(tmp_path, monkeypatch)
    for number in range(3):
        done = log.record({"what": number})
        if block:
            with pytest.raises(AuditUnavailable):
                done.result(10)
        else:
            done.result(10)
    if block:
        with pytest.raises(AuditUnavailable, match="make room"):
            log.check()
    else:
        log.check()
    monkeypatch.setattr("stratum.audit.os.pwrite", real)
    wait_until(lambda: not log.failing)
    log.check()
    log.record({"what": "after"}).result(10)
    log.close()
    verified = audit.verify(tmp_path)
    assert (verified.problems, verified.unrecorded) == ([], 3)
    assert [event.get("what", event.get("event")) for event in audit.events(tmp_path)] == [
        "begin", "before", "unrecorded", "after",
    ]  # fmt: skip


def test_a_write_that_stops_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 3)
    size = audit.files(tmp_path)[0][1].stat().st_size
    real = os.pwrite
    calls: list[int] = []

    def half(fd: int, data: bytes, at: int) -> int:
        calls.append(at)
        if len(calls) == 1:
            return real(fd, data[:10], at)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stratum.audit.os.pwrite", half)
    log = opened(tmp_path)
    with pytest.raises(AuditUnavailable):
        log.record({"what": "torn"}).result(10)
    assert audit.files(tmp_path)[0][1].stat().st_size == size
    monkeypatch.setattr("stratum.audit.os.pwrite", real)
    wait_until(lambda: not log.failing)
    log.close()
    assert audit.verify(tmp_path).problems == []


def test_a_log_whose_end_is_no_record_is_not_written_on(tmp_path: Path) -> None:
    write(tmp_path, 3)
    with audit.files(tmp_path)[0][1].open("ab") as file:
        file.write(b"somebody was here\n")
    log = opened(tmp_path)
    with pytest.raises(AuditUnavailable, match="verify"):
        log.record({"what": 1}).result(10)
    log.close()
    assert audit.verify(tmp_path).problems


def test_strangers_are_recorded_some_and_counted_all() -> None:
    ticking = [0.0]
    strangers = Strangers(lambda: ticking[0])
    answers = [strangers.is_only_counted("a") for _ in range(50)]
    assert answers == [False] * RECORDED_MAX + [True] * (50 - RECORDED_MAX)
    assert not strangers.is_only_counted("b"), "one address does not use up another's share"
    assert strangers.counts(now=False) == []
    recorded = RECORDED_MAX + 1
    for number in range(1000):
        recorded += not strangers.is_only_counted(f"address {number}")
    assert recorded == RECORDED_ALL_MAX
    ticking[0] = 61.0
    counts = strangers.counts(now=False)
    assert len(counts) == ADDRESSES_MAX + 1
    assert sum(event["count"] for event in counts) + recorded == 1051
    assert counts[0] == {
        "face": "s3", "event": "refusals", "from": "a", "count": 50 - RECORDED_MAX, "seconds": 61
    }  # fmt: skip
    assert not strangers.is_only_counted("a"), "a new window"
    assert strangers.counts(now=True) == []


def test_what_was_counted_is_in_the_log_when_it_closes(tmp_path: Path) -> None:
    log = opened(tmp_path)
    log.record({"what": "something"}).result(10)
    for _ in range(RECORDED_MAX + 5):
        log.is_only_counted("203.0.113.9")
    log.close()
    assert [event["count"] for event in audit.events(tmp_path) if event.get("event") == "refusals"] == [5]
    assert audit.verify(tmp_path).problems == []
