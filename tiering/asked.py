"""Moves that somebody asked for: `tier move`, a hint that changed, a PUT that named a storage class.

Rows `m` + inode (`MoveRow`). One that cannot be done stays, says why, and is tried again after a pause that grows.
"""

from __future__ import annotations

import itertools
import time
from functools import partial
from typing import TYPE_CHECKING

from stratum import filling, hints, housekeeping
from stratum.clocks import come
from stratum.errors import StratumError
from stratum.schema import Kind, key_u64, prefix_range, unpack_u64
from stratum.tier_rows import MoveRow, Tier
from stratum.tiering import files, records
from stratum.tiering.policy import Settings, decide

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stratum.tiering.mover import Mover
    from stratum.tiering.policy import Surroundings
    from stratum.transaction import InodeReader, MetadataTransaction
    from stratum.volume import Volume

AT_ONCE = 512
RETRY_S = 5.0
RETRY_S_MAX = 600.0


class Asked:
    """Part of `Tierd`. `clock` is wall time."""

    def __init__(self, volume: Volume, mover: Mover, *, clock: Callable[[], float] = time.time) -> None:
        self._volume = volume
        self._mover = mover
        self._settings = Settings.of(volume.config)
        self._clock = clock

    def run(self, level: str) -> bool:
        """Some of what is due, grouped by where it goes; whether there is more. `level` is that of the hot disks. Raises what the mover does."""
        with self._volume.snapshot() as reader:
            due = list(itertools.islice(self._due(reader), AT_ONCE))
            directories = [
                number for number, _ in due if reader.has_inode(number) and reader.inode(number).kind == Kind.DIRECTORY
            ]
        for number in directories:
            self._ask_below(number)
        groups: dict[tuple[int, str], list[int]] = {}
        around = files.surroundings(self._volume, level)
        for number, row in due:
            if number in directories:
                continue
            target = row.tier or self._wanted(number, around)
            groups.setdefault((target, row.cause), []).append(number)
        for (target, cause), numbers in groups.items():
            if target == 0:
                self._answer(numbers, dict(due), {})
            else:
                self._carry_out(numbers, Tier(target), cause, dict(due))
        return bool(due) and len(due) == AT_ONCE

    def waits(self) -> bool:
        """Whether anything is due."""
        with self._volume.snapshot() as reader:
            return next(self._due(reader), None) is not None

    def _due(self, reader: InodeReader) -> Iterator[tuple[int, MoveRow]]:
        now_s = self._clock()
        for key, raw in reader.scan(*prefix_range(b"m")):
            row = MoveRow.decode(raw)
            if row.state != "failed" and come(row.not_before_s, now_s, RETRY_S_MAX):
                yield unpack_u64(key[1:])[0], row

    def _wanted(self, number: int, around: Surroundings) -> int:
        """What the policy says of a file that somebody wants looked at; 0 for nothing."""
        with self._volume.snapshot() as reader:
            item = files.known(reader, number, self._settings, self._clock())
        decision = decide(item.facts, self._settings, around) if item is not None else None
        return int(decision.target or 0) if decision is not None else 0

    def _ask_below(self, directory: int) -> None:
        """A directory's hint changed: every file below it is looked at."""

        def ask(tx: MetadataTransaction, batch: list[int]) -> None:
            for number in batch:
                if tx.get(key_u64(b"m", number)) is None:
                    hints.ask(tx, number, MoveRow(0, "hint", tx.now_ns))

        pending = [(directory, b"")]
        while pending:
            number, after = pending.pop()
            rows = filling.page(self._volume, number, after, AT_ONCE)
            page = [(entry, dentry) for entry, dentry in rows if entry > after or not after]
            if page:
                pending.append((number, page[-1][0]))
            pending += [(dentry.inode, b"") for _, dentry in page if dentry.kind == Kind.DIRECTORY]
            found = [dentry.inode for _, dentry in page if dentry.kind == Kind.FILE]
            if found:
                self._volume.mutate(partial(ask, batch=found), frees=True)
            self._mover.pressing()  # a sign of life; a walk that began anew each time would never end
        self._volume.mutate(lambda tx: tx.delete(key_u64(b"m", directory)), frees=True)

    def _carry_out(self, numbers: list[int], target: Tier, cause: str, rows: dict[int, MoveRow]) -> None:
        """Raises what the mover does; what is done by then is answered."""
        left = set(numbers)
        for batch in self._mover.in_turn(self._mover.batches(numbers)):
            try:
                # What a user asked for goes even if it is little, and shared extents stay only where a pin holds them.
                outcome = self._mover.move(batch, target, cause=cause, alone=True, stays=self._pinned_hot)
            except StratumError as error:  # whoever waits for the move is told, whatever it is
                self._answer(sorted(left), rows, dict.fromkeys(left, error.message))
                raise
            while target != Tier.HOT and housekeeping.give_back(self._volume):
                pass
            self._answer(batch, rows, outcome.failed)
            left -= set(batch)

    def _pinned_hot(self, reader: InodeReader, number: int) -> bool:
        item = files.known(reader, number, self._settings, self._clock())
        return item is not None and item.facts.pin == Tier.HOT

    def _answer(self, numbers: list[int], rows: dict[int, MoveRow], failed: dict[int, str]) -> None:
        """Done rows go; failed ones are tried again later, and say why."""

        def answer(tx: MetadataTransaction) -> None:
            for number in numbers:
                key = key_u64(b"m", number)
                raw = tx.get(key)
                if raw is None or MoveRow.decode(raw).asked_ns != rows[number].asked_ns:
                    continue  # it was asked for anew meanwhile
                if number not in failed or not tx.has_inode(number):
                    tx.delete(key)
                    continue
                row = MoveRow.decode(raw)
                row.attempts += 1
                row.error = failed[number]
                row.not_before_s = self._clock() + min(RETRY_S * 2 ** (row.attempts - 1), RETRY_S_MAX)
                tx.put(key, row.encode())
                records.add(
                    tx,
                    number,
                    {
                        "event": "not moved",
                        "to": Tier(row.tier).name.lower() if row.tier else "",
                        "cause": row.cause,
                        "error": row.error,
                    },
                )

        self._volume.mutate(answer, frees=True)
