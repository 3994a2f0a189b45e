"""The audit log: who did what, when, from where, and how it ended; append-only, every record chained to the one before.

`audit/audit-NNNNNNNN.log` of the volume (or `audit.folder`), one record a line:

    SHA-256 (hex) of the hash before it and the JSON, a space, the JSON

The JSON has `n` (counts from 1 over all files), `time` and what the record is about. A file begins with {"event": "begin", "file",
"continues": the last hash of the file before}. So a changed, removed, inserted or moved line breaks the chain; that the newest lines are
gone shows in the anchor, a row of the metadata store (`gaudit`) that says what the log had come to.

Invariants
* One process appends at a time: it holds the flock of `audit/lock`, and reads what others appended before it adds to it.
* A record is acknowledged when it is synced (`audit.synced`). A torn last line was never acknowledged; the next writer cuts it off.
* What could not be recorded is counted, and the count is the next record. `audit.full` = "block": from the first failure on, what wants
  a record is refused before it does anything, until one could be written again. "drop": it goes on, and a health code says so.

Whoever can write to the folder and to the metadata store can write another history: send the log elsewhere (`stratum audit export`).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import queue
import threading
import time
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stratum import metrics
from stratum.audit_strangers import Strangers
from stratum.errors import AuditUnavailable
from stratum.log import get_logger
from stratum.segments import fsync_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from stratum.config import Config

log = get_logger("audit")
HASH_BYTES = 64
START = "0" * HASH_BYTES
BATCH_MAX = 256
ANCHOR_S = 30.0
RETRY_S = 1.0
TAIL_BYTES = 1 << 16
"""Read at first of a file that is opened; more if the last line is longer, as of a DeleteObjects with 1,000 keys."""
WAITING_MAX = 10_000
DAY_S = 86400.0


@dataclass(slots=True)
class Head:
    """Where the chain stands: in which file, how many records, the last hash."""

    file: int = 0
    records: int = 0
    hash: str = START


def file_name(number: int) -> str:
    return f"audit-{number:08d}.log"


def files(folder: Path) -> list[tuple[int, Path]]:
    found = [(int(path.stem[6:]), path) for path in folder.glob("audit-*.log") if path.stem[6:].isdigit()]
    return sorted(found)


def chained(before: str, text: str) -> str:
    return hashlib.sha256(f"{before}{text}".encode()).hexdigest()


class AuditLog:
    """The end of the log that one process writes. Its thread starts with the first record."""

    def __init__(
        self,
        folder: Path,
        *,
        block: bool,
        synced: bool = True,
        rotate_bytes: int,
        keep_days: int,
        anchor: Callable[[Head], None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder = folder
        self._block = block
        self._synced = synced
        self._rotate_bytes = rotate_bytes
        self._keep_days = keep_days
        self._anchor = anchor
        self._clock = clock
        self._queue: queue.SimpleQueue[tuple[dict[str, Any], Future[None]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._fd = -1
        self._size = 0
        self._strangers = Strangers()
        self._head = Head()
        self._anchored = Head()
        self._anchored_s = 0.0
        self.unrecorded = 0
        """What happened and is not in the log yet, not even as a count."""
        self.failing = False

    # -- for everybody ------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Before anything that wants a record. Raises `AuditUnavailable` while none can be written and that is to block."""
        if (self.failing and self._block) or self._queue.qsize() > WAITING_MAX:
            raise AuditUnavailable(
                f"the audit log in {self._folder} cannot be written, and audit.full is to block; make room there"
            )

    def record(self, event: dict[str, Any]) -> Future[None]:
        """Done when the event is in the log. Fails with `AuditUnavailable` if it cannot be and that is to block."""
        done: Future[None] = Future()
        if self._thread is None:
            with self._lock:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
                    self._thread.start()
        self._queue.put(({"time": self._now(), **event}, done))
        return done

    def is_only_counted(self, address: str) -> bool:
        """Whether a stranger's refused request gets no record, since that address has had its share; a count will follow."""
        return self._strangers.is_only_counted(address)

    def close(self) -> None:
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _now(self) -> str:
        now = self._clock()
        return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1e6):06d}Z"

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        ending = False
        while not ending:
            batch: list[tuple[dict[str, Any], Future[None]]] = []
            try:
                item = self._queue.get(timeout=RETRY_S if self.failing else ANCHOR_S)
                while item is not None:
                    batch.append(item)
                    if len(batch) >= BATCH_MAX:
                        break
                    item = self._queue.get_nowait()
                else:
                    ending = True
            except queue.Empty:
                pass
            batch += [({"time": self._now(), **event}, Future()) for event in self._strangers.counts(now=ending)]
            self._write(batch)
            self._tell_anchor(now=ending)

    def _write(self, batch: list[tuple[dict[str, Any], Future[None]]]) -> None:
        if not batch and not self.failing:
            return
        try:
            self._append([event for event, _ in batch])
        except OSError as error:
            self.unrecorded += len(batch)
            if not self.failing:
                log.error("audit_not_written", folder=str(self._folder), error=str(error), blocks=self._block)
                metrics.AUDIT_FAILING.add()
            self.failing = True
            metrics.AUDIT_DROPPED.add(amount=len(batch))
            for _, done in batch:
                if self._block:
                    done.set_exception(AuditUnavailable(f"the audit log in {self._folder} cannot be written ({error})"))
                else:
                    done.set_result(None)
            return
        if self.failing:
            log.info("audit_written_again", folder=str(self._folder))
            metrics.AUDIT_FAILING.add(amount=-1)
        self.failing, self.unrecorded = False, 0
        metrics.AUDIT_RECORDS.add(amount=len(batch))
        for _, done in batch:
            done.set_result(None)

    def _append(self, events: list[dict[str, Any]]) -> None:
        """Raises `OSError`; the log is as it was then."""
        if self.unrecorded:
            events = [{"time": self._now(), "event": "unrecorded", "count": self.unrecorded}, *events]
        with self._writing():
            head = self._head
            if self._size >= self._rotate_bytes:
                self._begin(head)
                head = self._head
            records, before, lines = head.records, head.hash, []
            for event in events:
                records += 1
                text = json.dumps({"n": records, **event}, separators=(",", ":"), default=str)
                before = chained(before, text)
                lines.append(f"{before} {text}\n")
            data = "".join(lines).encode()
            self._put(data)
            self._head = Head(head.file, records, before)

    def _put(self, data: bytes) -> None:
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(self._fd, data[written:], self._size + written)
            if self._synced:
                os.fdatasync(self._fd)
        except OSError:
            os.ftruncate(self._fd, self._size)
            raise
        self._size += len(data)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """The log is ours alone and `_head` is true."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._catch_up()
            yield
        finally:
            os.close(lock)

    def _catch_up(self) -> None:
        """See what other processes appended since. What is known already is not read again."""
        known = 0
        if self._fd >= 0 and os.fstat(self._fd).st_nlink and not self._path(self._head.file + 1).exists():
            if os.fstat(self._fd).st_size == self._size:
                return
            known = self._size
        else:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
            found = files(self._folder)
            if not found:
                self._begin(Head())
                return
            number, path = found[-1]
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            self._head = Head(number)
        try:
            self._read_end(known)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            os.close(self._fd)
            self._fd = -1
            raise OSError(
                f"the last record in {file_name(self._head.file)} is none; `stratum audit verify`, then move the file away"
            ) from error

    def _read_end(self, known: int) -> None:
        """Take the last record for the head, and cut a torn one off. Nothing before `known` has to be read."""
        size = os.fstat(self._fd).st_size
        if size < known:
            known = 0  # somebody cut it; the chain will tell
        piece = max(size - known, 0) if known else TAIL_BYTES
        while True:
            start = max(0, size - piece)
            tail = os.pread(self._fd, size - start, start)
            whole = tail.rfind(b"\n") + 1
            lines = tail[:whole].splitlines()
            # The first line of a tail that begins in the middle of the file may lack its beginning.
            if start in {0, known} or len(lines) > 1:
                break
            piece *= 8
        if whole < len(tail):
            log.warning("torn_record_removed", file=file_name(self._head.file), bytes=len(tail) - whole)
            size -= len(tail) - whole
            os.ftruncate(self._fd, size)
        if not lines and known:
            self._size = size
            return
        if not lines:  # a file that was begun and got no line
            os.close(self._fd)
            self._fd = -1
            self._path(self._head.file).unlink()
            self._catch_up()
            return
        line = lines[-1].decode("utf-8", "replace")
        self._head = Head(self._head.file, int(json.loads(line[HASH_BYTES + 1 :])["n"]), line[:HASH_BYTES])
        self._size = size

    def _path(self, number: int) -> Path:
        return self._folder / file_name(number)

    def _begin(self, head: Head) -> None:
        """The next file; old ones go when they are older than they must be."""
        if self._fd >= 0:
            os.close(self._fd)
        number = head.file + 1
        self._fd = os.open(self._path(number), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._size = 0
        text = json.dumps(
            {"n": head.records + 1, "time": self._now(), "event": "begin", "file": number, "continues": head.hash}, separators=(",", ":")
        )  # fmt: skip
        first = chained(head.hash, text)
        try:
            self._put(f"{first} {text}\n".encode())
        except OSError:
            os.close(self._fd)
            self._fd = -1
            self._path(number).unlink()
            raise
        fsync_folder(self._folder)
        self._head = Head(number, head.records + 1, first)
        oldest = self._clock() - self._keep_days * DAY_S
        for old, path in files(self._folder):
            if old < number and path.stat().st_mtime < oldest:
                log.info("audit_file_expired", file=path.name)
                path.unlink()

    def _tell_anchor(self, *, now: bool) -> None:
        if self._anchor is None or self._head == self._anchored:
            return
        if now or time.monotonic() - self._anchored_s >= ANCHOR_S:
            self._anchored_s = time.monotonic()
            self._anchored = self._head
            self._anchor(self._head)


def open_log(root: Path, config: Config, anchor: Callable[[Head], None] | None = None) -> AuditLog | None:
    """The log of the volume at `root`; None if it keeps none."""
    if not config.audit_enabled:
        return None
    return AuditLog(
        root / config.audit_folder, block=config.audit_full == "block", synced=config.audit_synced,
        rotate_bytes=config.audit_rotate_bytes, keep_days=config.audit_keep_days, anchor=anchor,
    )  # fmt: skip


# -- reading ------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Verified:
    """`first` and `last` are record numbers; `problems` say which file and line break the chain, and how."""

    files: int = 0
    records: int = 0
    first: int = 0
    last: int = 0
    hash: str = START
    unrecorded: int = 0
    problems: list[str] = field(default_factory=list)


def verify(folder: Path, anchor: dict[str, Any] | None = None) -> Verified:
    """Read the whole log. Lines that the retention removed are not missed: the oldest file says what it continues."""
    done = Verified()
    before, number_before = START, 0
    anchored = False
    for number, path in files(folder):
        done.files += 1
        if number_before and number != number_before + 1:
            done.problems.append(f"{file_name(number_before + 1)} is missing")
        number_before = number
        for place, line in enumerate(_lines(path), 1):
            where = f"{path.name} line {place}"
            text = line[HASH_BYTES + 1 :]
            try:
                event = json.loads(text)
                count = int(event["n"])
            except (ValueError, KeyError, TypeError):
                done.problems.append(f"{where}: it is no record")
                continue
            if place == 1:
                if event.get("event") != "begin" or event.get("file") != number:
                    done.problems.append(f"{where}: the file does not begin with its own name")
                elif done.files == 1:
                    before, done.last = str(event.get("continues")), count - 1
                    if number == 1 and before != START:
                        done.problems.append(f"{where}: the first file continues another one")
            if line[:HASH_BYTES] != chained(before, text):
                done.problems.append(
                    f"{where}: it does not follow from the line before: changed, moved, or lines are missing"
                )
            elif count != done.last + 1:
                done.problems.append(f"{where}: record {count} follows record {done.last}")
            before, done.last = line[:HASH_BYTES], count
            done.first = done.first or count
            done.records += 1
            done.unrecorded += int(event["count"]) if event.get("event") == "unrecorded" else 0
            anchored = anchored or bool(anchor and anchor["records"] == count and anchor["hash"] == before)
    done.hash = before
    if anchor and not anchored and (not done.first or anchor["records"] >= done.first):
        done.problems.append(
            f"the volume remembers record {anchor['records']} with another hash, or it is gone: the end was cut off or written anew"
        )
    return done


def _lines(path: Path) -> Iterator[str]:
    """Whole lines; a torn last one is on its way, or was never acknowledged."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line[:-1].decode("utf-8", "replace")


def events(folder: Path) -> Iterator[dict[str, Any]]:
    """Every record, the oldest first. Lines that are none are left out: `verify` names them."""
    for _, path in files(folder):
        for line in _lines(path):
            try:
                found = json.loads(line[HASH_BYTES + 1 :])
            except ValueError:
                continue
            if isinstance(found, dict):
                yield found


def newest(folder: Path, count: int) -> list[dict[str, Any]]:
    """The last `count` records, read from the end of as many files as it takes."""
    found: list[dict[str, Any]] = []
    for _, path in reversed(files(folder)):
        lines = list(_lines(path))[-(count - len(found)) :] if count > len(found) else []
        found[:0] = [json.loads(line[HASH_BYTES + 1 :]) for line in lines]
        if len(found) >= count:
            break
    return found
