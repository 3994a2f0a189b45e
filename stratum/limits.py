"""How many requests and bytes a second a user, a bucket or everybody without a name may ask of S3, over all worker processes.

Invariants
* What is owed is kept in one file that every process maps (`meta/paces`), one slot a limit: workers share a limit, however requests
  spread over them. A slot is changed under a lock of the file.
* Too many requests are refused before anything is done; bytes are slowed down, and refused only when more than DEBT_S_MAX is owed.
* Losing the file forgives debts and nothing else.

A slot holds the two moments until which requests and bytes are paid for (the generic cell rate algorithm, ITU-T I.371): what is allowed
after a pause is BURST_S worth of the rate.

Row: `glimits` {"buckets": {name: [requests a second, bytes a second]}, "users": {id: ...}, "anonymous": {"": ...}}; 0 is no limit.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import mmap
import os
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stratum import metrics
from stratum.errors import InvalidArgument, TooManyRequests
from stratum.schema import pack_json, unpack_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from stratum.transaction import InodeReader, MetadataTransaction

FILE = "paces"
SLOTS = 4096
BURST_S = 1.0
DEBT_S_MAX = 5.0
AHEAD_S_MAX = 3600.0
"""A moment further ahead is of another boot."""
MOMENT_MAX = (1 << 64) - 1
_SLOT = struct.Struct("<QQQQ")
KINDS = ("buckets", "users", "anonymous")
_REQUESTS, _BYTES = 1, 2


RATES = {"requests": (0.001, 1e9), "bytes": (1.0, 1e15)}
"""What may be allowed a second, from and to."""


@dataclass(slots=True, frozen=True)
class Limit:
    """0 is no limit."""

    requests_per_s: float = 0.0
    bytes_per_s: float = 0.0


def _rate(number: Any, kind: str) -> float:
    """What a row says, whoever wrote it: no limit instead of what is none, and otherwise one that can be reckoned with."""
    if not isinstance(number, int | float) or not math.isfinite(number) or number <= 0:
        return 0.0
    least, most = RATES[kind]
    return min(max(float(number), least), most)


def _decoded(raw: bytes | None) -> dict[str, dict[str, Limit]]:
    found: dict[str, dict[str, Limit]] = {}
    for kind, rows in (unpack_json(raw) if raw else {}).items():
        found[kind] = {
            name: Limit(_rate(requests, "requests"), _rate(size, "bytes")) for name, (requests, size) in rows.items()
        }
    return found


def everything(reader: InodeReader) -> Iterator[tuple[str, str, Limit]]:
    """(kind, name or user id, limit)."""
    for kind, rows in _decoded(reader.get(b"glimits")).items():
        for name, limit in rows.items():
            yield kind, name, limit


def put(tx: MetadataTransaction, kind: str, name: str, limit: Limit | None) -> None:
    """Set or remove one. Raises `InvalidArgument`."""
    if limit is not None:
        for unit, number in (("requests", limit.requests_per_s), ("bytes", limit.bytes_per_s)):
            if number != 0 and number != _rate(number, unit):
                least, most = RATES[unit]
                raise InvalidArgument(f"{number:g} {unit} a second is no limit; give {least:g} to {most:g}")
        if limit == Limit():
            raise InvalidArgument("a limit is a positive number of requests or bytes a second, or both")
    raw = tx.get(b"glimits")
    rows: dict[str, dict[str, Any]] = unpack_json(raw) if raw else {}
    rows.setdefault(kind, {}).pop(name, None)
    if limit is not None:
        rows[kind][name] = [limit.requests_per_s, limit.bytes_per_s]
    if any(rows.values()):
        tx.put(b"glimits", pack_json(rows))
    else:
        tx.delete(b"glimits")


class Paces:
    """The shared file. `clock` is in ns and the same for all processes."""

    def __init__(self, meta: Path, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock = clock
        self._fd = os.open(meta / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.posix_fallocate(self._fd, 0, SLOTS * _SLOT.size)
        self._table = mmap.mmap(self._fd, SLOTS * _SLOT.size)

    def close(self) -> None:
        self._table.close()
        os.close(self._fd)

    def _slot(self, identity: int) -> int:
        for step in range(SLOTS):
            at = (identity + step) % SLOTS * _SLOT.size
            owner = _SLOT.unpack_from(self._table, at)[0]
            if owner == identity:
                return at
            if not owner:
                _SLOT.pack_into(self._table, at, identity, 0, 0, 0)
                return at
        return identity % SLOTS * _SLOT.size  # more limits than slots: two share one

    def charge(self, who: str, word: int, amount: float, rate: float, *, patience_s: float) -> float:
        """Owe `amount` of what is paid for at `rate` a second. Returns how many seconds more than BURST_S are owed then; if that is
        more than `patience_s`, nothing was charged.
        """
        identity = int.from_bytes(hashlib.sha256(who.encode()).digest()[:8], "little") | 1
        fcntl.lockf(self._fd, fcntl.LOCK_EX)
        try:
            at = self._slot(identity) + 8 * word
            now = self._clock()
            paid = int.from_bytes(self._table[at : at + 8], "little")
            if paid < now or paid > now + AHEAD_S_MAX * 1e9:
                paid = now
            paid = min(paid + round(amount / rate * 1e9), MOMENT_MAX)
            owed_s = (paid - now) / 1e9 - BURST_S
            if owed_s <= patience_s:
                self._table[at : at + 8] = paid.to_bytes(8, "little")
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN)
        return max(owed_s, 0.0)


class Pace:
    """What one request has to go by. Nothing is shared but the file."""

    __slots__ = ("_limits", "_paces")

    def __init__(self, paces: Paces, limits: list[tuple[str, float]]) -> None:
        self._paces = paces
        self._limits = limits

    def sent(self, count: int) -> float:
        """So many bytes went by; how many seconds to wait before the next."""
        return max(
            (self._paces.charge(who, _BYTES, count, rate, patience_s=math.inf) for who, rate in self._limits),
            default=0.0,
        )


class Limiter:
    """One a process. The file is opened when there is a limit."""

    def __init__(self, meta: Path) -> None:
        self._meta = meta
        self._paces: Paces | None = None
        self._raw: bytes | None = None
        self._rows: dict[str, dict[str, Limit]] = {}

    def admit(self, reader: InodeReader, user_id: str | None, bucket: str) -> Pace | None:
        """Count a request; what its bytes go by, if they are limited. Raises `TooManyRequests`."""
        raw = reader.get(b"glimits")
        if raw is None:
            return None
        if raw != self._raw:
            self._raw, self._rows = raw, _decoded(raw)
        if self._paces is None:
            self._paces = Paces(self._meta)
        slow: list[tuple[str, float]] = []
        for kind, name in (("anonymous", "") if user_id is None else ("users", user_id), ("buckets", bucket)):
            limit = self._rows.get(kind, {}).get(name)
            if limit is None:
                continue
            requests, size = limit.requests_per_s, limit.bytes_per_s
            who = f"{kind} {name}"
            owed_s = self._paces.charge(who, _REQUESTS, 1, requests, patience_s=0.0) if requests else 0.0
            if size and not owed_s:
                owed_s = max(self._paces.charge(who, _BYTES, 0, size, patience_s=math.inf) - DEBT_S_MAX, 0.0)
                slow.append((who, size))
            if owed_s:
                metrics.S3_LIMITED.add(kind)
                raise TooManyRequests(
                    f"the limit of requests or bytes a second of {'this bucket' if kind == 'buckets' else 'this user'} is reached",
                    retry_s=math.ceil(owed_s),
                )
        return Pace(self._paces, slow) if slow else None
