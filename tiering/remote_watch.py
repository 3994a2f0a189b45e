"""Asks each remote for its marker now and then, and notes what is wrong with it as a whole, for health and for whoever waits.

One request each time and no retries: a remote that does not answer is asked again anyway, and is called unreachable when it has not answered twice.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from stratum import cold, packs, remote_trouble
from stratum.cold import Remote
from stratum.errors import StratumError, TierUnavailable
from stratum.health import probe
from stratum.log import get_logger
from stratum.remote_trouble import Trouble
from stratum.schema import pack_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from stratum.transaction import MetadataTransaction
    from stratum.volume import Volume

log = get_logger("remotes")
LOOK_S = 30.0
ASKED_S_MAX = 5.0
"""Moves wait meanwhile."""
UNANSWERED_MIN = 2


class RemoteWatch:
    """Part of `Tierd`."""

    def __init__(self, volume: Volume, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._volume = volume
        self._monotonic = monotonic
        self._looked_s = monotonic()
        self._unanswered: dict[str, int] = {}

    def run(self) -> bool:
        if self._monotonic() - self._looked_s >= LOOK_S:
            self._looked_s = self._monotonic()
            self.look()
        return False

    def look(self) -> None:
        """Ask all of them, and note what has changed."""
        with self._volume.snapshot() as reader:
            names = list(cold.rows(reader))
        for name in names:
            error = ask(self._volume, name)
            trouble = remote_trouble.of(error) if error is not None else None
            self._unanswered[name] = self._unanswered.get(name, 0) + 1 if trouble == Trouble.UNREACHABLE else 0
            if 0 < self._unanswered[name] < UNANSWERED_MIN:
                continue
            note(self._volume, name, error)


def ask(volume: Volume, name: str) -> StratumError | None:
    """What is wrong with a remote, by one request. Whatever it is, it says in ASKED_S_MAX."""

    def compare() -> None:
        row, remote = volume.cold.remote(name)
        once = Remote(remote.raw, remote.raw, remote.retrying, remote.raw)
        volume.cold.compare_marker(name, row, once)

    try:
        probe(compare, ASKED_S_MAX)
    except TimeoutError:
        what = f"remote {name!r} does not answer within {ASKED_S_MAX:g} s; it is tried again"
        return TierUnavailable(what, trouble=Trouble.UNREACHABLE)
    except StratumError as error:
        return error
    return None


def note(volume: Volume, name: str, error: StratumError | None) -> None:
    """Write down what is wrong with a remote, or that nothing is. Logged when it changes."""
    trouble = remote_trouble.of(error) if error is not None else None
    with volume.snapshot() as reader:
        known = set(cold.rows(reader))
        before = dict(packs.setting(reader, "remotes"))
    was = before.get(name, {}).get("trouble")
    after = {other: row for other, row in before.items() if other in known}
    after.pop(name, None)
    if trouble is not None and error is not None:
        row: dict[str, Any] = {"trouble": trouble.value, "what": error.message, "since_s": int(time.time())}
        after[name] = before[name] if was == trouble.value else row
    if after == before:
        return
    if was != (trouble.value if trouble is not None else None):
        if trouble is None:
            log.info("remote_right_again", remote=name)
        else:
            log.warning("remote_in_trouble", remote=name, trouble=trouble.value, error=error.message if error else "")

    def put(tx: MetadataTransaction) -> None:
        tx.put(b"gremotes", pack_json(after))

    volume.mutate(put, frees=True)
