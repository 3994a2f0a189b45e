"""Counters that processes share."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

from stratum import counting

if TYPE_CHECKING:
    from pathlib import Path

COUNT = """
import json, sys
from pathlib import Path
from stratum import counting
requests = counting.Counter("requests_total", "r", {"kind": ("a", "b", "other")})
running = counting.Gauge("running", "r")
spread = counting.Histogram("seconds", "s", bounds=(0.1, 1.0))
if "more" in sys.argv:
    counting.Counter("another_total", "another declaration")
requests.add("a")  # before it is attached
counting.attach(Path(sys.argv[1]), "worker")
for word in sys.stdin:
    word = word.strip()
    if word in ("a", "b", "unheard-of"):
        requests.add(word)
    elif word == "up":
        running.add()
    elif word.startswith("s"):
        spread.observe(float(word[1:]))
    elif word == "read":
        words, living = counting.read_all(Path(sys.argv[1]))
        print(json.dumps({"requests": [s.value for s in requests.samples(words)], "running": [s.value for s in running.samples(words)],
                          "seconds": {s.suffix + dict(s.labels).get("le", ""): s.value for s in spread.samples(words)},
                          "living": [p.pid for p in living]}), flush=True)
    else:
        break
"""


class Worker:
    def __init__(self, folder: Path, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", COUNT, str(folder), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def say(self, *words: str) -> None:
        assert self.process.stdin
        self.process.stdin.write("".join(f"{word}\n" for word in words))
        self.process.stdin.flush()

    def read(self) -> dict[str, object]:
        self.say("read")
        assert self.process.stdout
        found: dict[str, object] = json.loads(self.process.stdout.readline())
        return found

    def end(self, *, hard: bool = False) -> None:
        if hard:
            self.process.kill()
        else:
            self.say("end")
        self.process.wait(10)
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()


def test_sums_never_fall_and_gauges_are_those_of_the_living(tmp_path: Path) -> None:
    first, second = Worker(tmp_path), Worker(tmp_path)
    first.say("a", "b", "up", "s0.05", "s1.0", "s7", "unheard-of")
    first.read()
    second.say("a", "up")
    found = second.read()
    assert found["requests"] == [4.0, 1.0, 1.0], "each counted one before it was attached"
    assert found["running"] == [2.0]
    assert found["seconds"] == {"_bucket0.1": 1, "_bucket1": 2, "_bucket+Inf": 3, "_sum": 8.05, "_count": 3}
    assert sorted(found["living"]) == sorted([first.process.pid, second.process.pid])  # type: ignore[call-overload]  # values of JSON

    first.end(hard=True)
    found = second.read()
    assert found["requests"] == [4.0, 1.0, 1.0], "what a dead process counted stays"
    assert found["running"] == [1.0], "what a dead process was doing does not"

    third = Worker(tmp_path)
    found = third.read()
    assert found["requests"] == [5.0, 1.0, 1.0], "it goes on in the file of the dead one"
    assert found["running"] == [1.0]
    assert len(list(tmp_path.iterdir())) == 2
    second.end()
    third.end()


def test_a_file_of_other_declarations_is_emptied_when_it_is_taken(tmp_path: Path) -> None:
    old = Worker(tmp_path)
    old.say("a", "a")
    old.end()
    new = Worker(tmp_path, "more")
    assert new.read()["requests"] == [1.0, 0.0, 0.0]
    new.end()


def test_a_torn_file_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "worker-9").write_bytes(b"STRC")
    words, living = counting.read_all(tmp_path)
    assert not any(words)
    assert living == []


def test_numbers_read_as_prometheus_reads_them() -> None:
    assert [counting.number_text(value) for value in (0.0, 5.0, 0.25, float("inf"), 1e20)] == [
        "0",
        "5",
        "0.25",
        "+Inf",
        "1e+20",
    ]
