"""How background work makes way for users: while they ask for things it works a share of its time, in small pieces, one at a time.

A disk flushes what is on its way to it before it answers, so who writes a mebibyte beside somebody's commit makes that commit wait for it. Pieces
bound how long, and rests between them how often (docs/decisions/0008-tiers.md has the figures).

Invariants
* Whoever makes room on a disk that fills does not rest.
* A rest is as long as the piece before it asks for, and never longer than REST_S_MAX.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING

from stratum import metrics
from stratum.counting import FOLDER, Totals

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stratum.volume import Volume

BUSY_PER_S = 10.0
"""Requests, or mebibytes of them, a second. A monitor's probes are fewer."""
WATCHED_S = 1.0
LOOK_S = 0.1
REST_S_MAX = 1.0
WINDOW_BYTES = 2 * 1024 * 1024
"""Of a write at full speed: a burst of a whole shard would hold up everybody else's sync behind it."""
WINDOW_BYTES_POLITE = 256 * 1024
MIB = 1024 * 1024


class Courtesy:
    """Of one worker; its threads share it. `asked` counts what users have asked for so far, `filling` says whether a disk is."""

    def __init__(
        self,
        share: float,
        asked: Callable[[], float],
        filling: Callable[[], bool],
        *,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], object] = time.sleep,
    ) -> None:
        self.urgent = False
        """What is done now is what others wait for."""
        self._share = share
        self._asked = asked
        self._filling = filling
        self._clock = clock
        self._pause = pause
        self._looks: deque[tuple[float, float]] = deque()
        self._polite = False
        self._look_lock = threading.Lock()
        self._one = threading.Lock()

    @property
    def is_polite(self) -> bool:
        """Whether users ask for things, and nothing is more urgent than they are."""
        if self.urgent or self._share >= 1.0:
            return False
        return self.look()

    def look(self) -> bool:
        """Whether users ask for things and no disk is filling. Also to be called at leisure: work that begins then knows it at once."""
        with self._look_lock:
            now_s = self._clock()
            if not self._looks or now_s - self._looks[-1][0] >= LOOK_S:
                self._looks.append((now_s, self._asked()))
                while len(self._looks) > 2 and self._looks[1][0] <= now_s - WATCHED_S:
                    self._looks.popleft()
                (since_s, before), (_, asked) = self._looks[0], self._looks[-1]
                busy = asked - before >= BUSY_PER_S * max(now_s - since_s, WATCHED_S)
                self._polite = busy and not self._filling()
            return self._polite

    @property
    def window_bytes(self) -> int:
        """How much is written before the next window is begun."""
        return WINDOW_BYTES_POLITE if self.is_polite else WINDOW_BYTES

    @contextmanager
    def piece(self) -> Iterator[None]:
        """Around some milliseconds of work."""
        if not self.is_polite:
            yield
            return
        with self._one:
            began_s = self._clock()
            yield
            self._pause(min((self._clock() - began_s) * (1.0 / self._share - 1.0), REST_S_MAX))


AT_FULL_SPEED = Courtesy(1.0, lambda: 0.0, lambda: True)
"""For what users wait for themselves."""


def of_volume(volume: Volume) -> Courtesy:
    """Towards the users of all faces and processes of a volume."""
    config = volume.config
    weights = {
        metrics.S3_REQUESTS: 1.0, metrics.FUSE_REQUESTS: 1.0, metrics.S3_RECEIVED: 1.0 / MIB, metrics.S3_SENT: 1.0 / MIB,
    }  # fmt: skip
    totals = Totals(volume.meta / FOLDER, weights)
    return Courtesy(
        config.tiering_busy_share,
        totals.value,
        lambda: volume.relief.used_percent() >= config.tiering_high_percent,
    )
