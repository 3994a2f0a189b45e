"""Counters that several processes share: each has a mapped file of numbers, and whoever scrapes adds the files up.

Invariants
* A process owns the file it holds the flock of. One that starts takes the lowest free file of its role and goes on counting
  in it, so a sum never falls because a process died. Gauges begin at zero, and count only while the lock is held.
* The place of a number follows from the declarations alone. A file of other declarations is emptied when it is taken.
* What is counted is visible to a scrape of any process at once: it is the same page of memory. It need not survive a power
  cut; a torn file is emptied.

File: magic (8 bytes), SHA-256 of the declarations (32), process id (8-byte double), time of the last beat in seconds since
the boot (double), 8 bytes spare, then one double a number.
"""

from __future__ import annotations

import bisect
import fcntl
import hashlib
import itertools
import math
import mmap
import os
import struct
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stratum.descriptors import is_owned

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

FOLDER = "metrics"
"""Below the volume's `meta`."""
_MAGIC = b"STRCNT01"
_HEAD = struct.Struct("<8s32sddd")
_PID, _BEAT = 40, 48


class _Numbers:
    """The numbers of this process: private until `attach`, which moves them into the shared file."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.declared: list[str] = []
        self.size = 0
        self.gauges: list[int] = []
        self.words: list[float] | memoryview[float] = []
        self.map: mmap.mmap | None = None
        self.descriptor = -1

    def allot(self, declaration: str, count: int) -> int:
        """Room for `count` numbers; where it begins."""
        assert self.map is None, "declare before attaching"
        assert isinstance(self.words, list)
        at = self.size
        self.declared.append(declaration)
        self.size += count
        self.words.extend([0.0] * count)
        return at

    def fingerprint(self) -> bytes:
        return hashlib.sha256("\n".join(self.declared).encode()).digest()


_numbers = _Numbers()


@dataclass(slots=True, frozen=True)
class Sample:
    """One line of an exposition."""

    suffix: str
    labels: tuple[tuple[str, str], ...]
    value: float


class Metric:
    """A name, its help, and its labels with every value they can have: that bounds how many series there are."""

    kind = ""

    def __init__(
        self, name: str, text: str, labels: Mapping[str, Sequence[str]] | None = None, *, width: int = 1
    ) -> None:
        self.name = name
        self.help = text
        self.label_names = tuple(labels or ())
        combinations = list(itertools.product(*(labels or {}).values()))
        start = _numbers.allot(f"{self.kind} {name} {labels} {width}", len(combinations) * width)
        self._places = {values: start + at * width for at, values in enumerate(combinations)}
        self._last = start + (len(combinations) - 1) * width

    @property
    def span(self) -> slice:
        """Where its numbers are."""
        return slice(min(self._places.values()), self._last + 1)

    def _place(self, labels: tuple[str, ...]) -> int:
        """A value nobody declared counts as the last combination: the declarations end with "Other" where that can be."""
        return self._places.get(labels, self._last)

    def samples(self, words: Sequence[float]) -> Iterator[Sample]:
        for values, at in self._places.items():
            yield Sample("", tuple(zip(self.label_names, values, strict=True)), words[at])


class Counter(Metric):
    """Only grows."""

    kind = "counter"

    def add(self, *labels: str, amount: float = 1.0) -> None:
        at = self._place(labels)
        with _numbers.lock:
            _numbers.words[at] += amount


class Gauge(Metric):
    """A number of now, of each process; a scrape shows the sum over those that live."""

    kind = "gauge"

    def __init__(self, name: str, text: str, labels: Mapping[str, Sequence[str]] | None = None) -> None:
        super().__init__(name, text, labels)
        _numbers.gauges.extend(self._places.values())

    def add(self, *labels: str, amount: float = 1.0) -> None:
        at = self._place(labels)
        with _numbers.lock:
            _numbers.words[at] += amount

    def set(self, value: float, *labels: str) -> None:
        _numbers.words[self._place(labels)] = value


class Histogram(Metric):
    """How observations spread over `bounds` (upper, inclusive), and their sum. Series nothing was observed in are left out."""

    kind = "histogram"

    def __init__(
        self, name: str, text: str, labels: Mapping[str, Sequence[str]] | None = None, *, bounds: Sequence[float]
    ) -> None:
        self.bounds = tuple(bounds)
        super().__init__(name, f"{text}", labels, width=len(self.bounds) + 2)

    def observe(self, value: float, *labels: str) -> None:
        at = self._place(labels)
        bucket = at + bisect.bisect_left(self.bounds, value)
        total = at + len(self.bounds) + 1
        with _numbers.lock:
            _numbers.words[bucket] += 1.0
            _numbers.words[total] += value

    def samples(self, words: Sequence[float]) -> Iterator[Sample]:
        for values, at in self._places.items():
            labels = tuple(zip(self.label_names, values, strict=True))
            count = 0.0
            lines = []
            for offset, bound in enumerate((*self.bounds, math.inf)):
                count += words[at + offset]
                lines.append(Sample("_bucket", (*labels, ("le", number_text(bound))), count))
            if count:
                yield from lines
                yield Sample("_sum", labels, words[at + len(self.bounds) + 1])
                yield Sample("_count", labels, count)


def number_text(value: float) -> str:
    if value == math.inf:
        return "+Inf"
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def attach(folder: Path, role: str) -> None:
    """Count in `folder` from now on. Once a process; what it counted before is kept."""
    if _numbers.map is not None:
        return
    folder.mkdir(mode=0o700, exist_ok=True)
    for number in itertools.count():
        descriptor = os.open(folder / f"{role}-{number}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if _lock(descriptor):
            break
        os.close(descriptor)
    size = _HEAD.size + _numbers.size * 8
    fingerprint = _numbers.fingerprint()
    if os.fstat(descriptor).st_size != size or os.pread(descriptor, 40, 0) != _MAGIC + fingerprint:
        os.ftruncate(descriptor, 0)
        # Taken from the disk now: on a full one a mapping without blocks would end the process when it is written.
        os.pwrite(descriptor, bytes(size), 0)
        os.pwrite(descriptor, _MAGIC + fingerprint, 0)
    shared = mmap.mmap(descriptor, size)
    words = memoryview(shared)[_HEAD.size :].cast("d")
    for at in _numbers.gauges:
        words[at] = 0.0
    with _numbers.lock:
        for at, value in enumerate(_numbers.words):
            if value:
                words[at] += value
        _numbers.words, _numbers.map, _numbers.descriptor = words, shared, descriptor
    struct.pack_into("<d", shared, _PID, os.getpid())
    beat()


def beat() -> None:
    """Say that the loop which does this process's work goes round."""
    if _numbers.map is not None:
        struct.pack_into("<d", _numbers.map, _BEAT, time.clock_gettime(time.CLOCK_BOOTTIME))


FILES_LOOK_S = 1.0


class Totals:
    """A weighted sum of counters over all processes, for whoever asks often: the files stay mapped, and new ones are looked for now and then."""

    def __init__(
        self, folder: Path, weights: Mapping[Counter, float], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder = folder
        self._weights = [(counter.span, weight) for counter, weight in weights.items()]
        self._clock = clock
        self._looked_s = float("-inf")
        self._mapped: dict[str, memoryview[float]] = {}

    def value(self) -> float:
        if self._clock() - self._looked_s >= FILES_LOOK_S:
            self._looked_s = self._clock()
            self._look()
        return sum(weight * sum(words[span]) for words in self._mapped.values() for span, weight in self._weights)

    def _look(self) -> None:
        expected = _MAGIC + _numbers.fingerprint()
        size = _HEAD.size + _numbers.size * 8
        for path in self._folder.iterdir() if self._folder.is_dir() else ():
            if path.name in self._mapped:
                continue
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size == size and os.pread(file.fileno(), 40, 0) == expected:
                    mapped = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
                    self._mapped[path.name] = memoryview(mapped)[_HEAD.size :].cast("d")


@dataclass(slots=True, frozen=True)
class Process:
    """One that counts now. `silent_s`: since its last beat."""

    role: str
    pid: int
    silent_s: float


def silent_s(folder: Path, pid: int) -> float | None:
    """For how long a process has not beaten; None if it does not count there (yet)."""
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    found: list[float] = []
    for path in folder.iterdir() if folder.is_dir() else ():
        try:
            with path.open("rb") as file:
                raw = file.read(_HEAD.size)
        except OSError:
            continue
        if len(raw) == _HEAD.size and raw.startswith(_MAGIC):
            _, _, owner, beaten, _ = _HEAD.unpack(raw)
            if int(owner) == pid:  # in more than one file if the number was somebody else's before
                found.append(max(0.0, now - beaten))
    return min(found, default=None)


def read_all(folder: Path) -> tuple[list[float], list[Process]]:
    """The sums of all files, and who lives. Files of other declarations are left out until somebody takes them."""
    total = [0.0] * _numbers.size
    living = []
    gauges = set(_numbers.gauges)
    expected = _MAGIC + _numbers.fingerprint()
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            raw = os.pread(descriptor, _HEAD.size + _numbers.size * 8, 0)
            alive = is_owned(descriptor)
        finally:
            os.close(descriptor)
        if len(raw) < _HEAD.size + _numbers.size * 8 or raw[:40] != expected:
            continue
        for at, value in enumerate(memoryview(raw)[_HEAD.size :].cast("d")):
            if value and (alive or at not in gauges):
                total[at] += value
        if alive:
            _, _, pid, beaten, _ = _HEAD.unpack_from(raw)
            silent = max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - beaten)
            living.append(Process(path.name.rpartition("-")[0], int(pid), silent))
    return total, living
