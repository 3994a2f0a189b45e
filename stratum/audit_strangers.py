"""What the audit log says of strangers: some refusals of each address a minute in full, the rest as a count.

Anybody who reaches the port can be refused as often as he likes, and a record of each would let him fill the audit disk (with
audit.full = "block": stop the volume). Users who are known are recorded each time.

Invariants
* Per window at most RECORDED_MAX records of one address and RECORDED_ALL_MAX of all, and ADDRESSES_MAX + 1 counts.
* Every refusal is in a record or in a count.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

WINDOW_S = 60.0
RECORDED_MAX = 20
RECORDED_ALL_MAX = 200
ADDRESSES_MAX = 32
OTHERS = "others"


class Strangers:
    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._began_s = monotonic()
        self._recorded: Counter[str] = Counter()
        self._counted: Counter[str] = Counter()

    def is_only_counted(self, address: str) -> bool:
        """Take note of a refusal; whether it gets no record of its own."""
        with self._lock:
            if self._recorded[address] < RECORDED_MAX and self._recorded.total() < RECORDED_ALL_MAX:
                self._recorded[address] += 1
                return False
            if address not in self._counted and len(self._counted) >= ADDRESSES_MAX:
                address = OTHERS
            self._counted[address] += 1
            return True

    def counts(self, *, now: bool) -> list[dict[str, Any]]:
        """Events that tell what was counted in the window that has ended, or ends `now`."""
        with self._lock:
            seconds = self._monotonic() - self._began_s
            if seconds < WINDOW_S and not now:
                return []
            counted, self._counted = self._counted, Counter()
            self._recorded, self._began_s = Counter(), self._monotonic()
        return [
            {"face": "s3", "event": "refusals", "from": address, "count": count, "seconds": round(seconds)}
            for address, count in counted.items()
        ]
