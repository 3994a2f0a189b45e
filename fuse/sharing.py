"""From one writable mount of a tree to several: who may stand beside whom, and how a running mount stops caching names.

Writable mounts of one tree cache no names: to be asked to forget one would mean to wait for a directory's lock, which the kernel
may hold for somebody who waits for the asker. A mount that was alone has cached names, so whoever comes second asks it to
stop, and is not mounted before it has:

1. The second mount sets `asked` in the row of the first.
2. The first, in its loop: from now on names are answered to be kept for no time, and none is made before its commit.
3. It commits what has no row yet, then drops, in a thread, every name the kernel may have from before. The kernel carries a name
   along through a rename with the time it had, so those that were renamed meanwhile are dropped after that, until there are none.
4. It sets `shared` in its row. Until then it is asked to forget names as ever, and nobody it waits for waits for it.

It stays shared until it is unmounted.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pyfuse3
import trio

from stratum import filling, housekeeping, mount_names
from stratum.errors import Busy, UnfinishedMount
from stratum.log import get_logger
from stratum.mount_rows import mount_rows, tell_mount_row
from stratum.schema import key_u64, unpack_json

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from stratum.fuse.operations import Operations
    from stratum.transaction import InodeReader, MetadataTransaction
    from stratum.volume import Volume

log = get_logger("mount")
ROWS_AT_ONCE = 1000
CHECK_S = 0.25
ASKED_S_MAX = 60.0
"""How long the second mount waits for the first: a million names take about ten seconds."""


@dataclass(slots=True, frozen=True)
class Wanted:
    """What is mounted and how. `bucket` empty: all of them."""

    bucket: str = ""
    read_only: bool = False
    shared: bool = False
    locks: bool = False
    """Locks reach all mounts that say so too; writable ones are `shared` then."""
    over: bool = False
    """Although the mountpoint is not empty."""

    def document(self, root: Path) -> dict[str, Any]:
        """What is wanted of the volume at `root`, to be compared by the process that goes on with it."""
        agreed = asdict(self) | {"volume": str(root)}
        del agreed["over"]  # of no matter to a mount that is there
        if not self.locks:
            del agreed["locks"]  # a program that does not know of them may have told it
        return agreed


def _writable(reader: InodeReader, wanted: Wanted) -> dict[int, dict[str, Any]]:
    """The rows of the writable mounts that show something of the same tree, by session."""
    found = {}
    for session, row in mount_rows(reader).items():
        overlaps = not row.get("bucket") or not wanted.bucket or row["bucket"] == wanted.bucket
        if overlaps and not row["read_only"]:
            found[session] = row
    return found


def check(reader: InodeReader, wanted: Wanted) -> None:
    """Raises `Busy` if there is a writable mount of an overlapping tree that does not go with this one."""
    if wanted.read_only:
        return
    for row in _writable(reader, wanted).values():
        if not (wanted.shared and row.get("shared")):
            raise Busy(
                f"this tree is mounted for writing at {row['mountpoint']}; unmount that one, mount with --read-only, "
                "mount both with --shared, or this one with --shared-without-locks, which that one will then follow"
            )
    check_locks(reader, wanted)


def check_locks(reader: InodeReader, wanted: Wanted) -> None:
    """Raises `Busy` if there is a writable mount of an overlapping tree that does not keep its locks where this one would.

    What the kernel does with locks is agreed on when it mounts, so a mount that is running cannot follow.
    """
    if wanted.read_only:
        return
    for row in _writable(reader, wanted).values():
        if wanted.locks and not row.get("locks"):
            raise Busy(
                f"this tree is mounted for writing at {row['mountpoint']} without --shared, so locks would not reach there; "
                "unmount that one and mount it with --shared too"
            )
        if row.get("locks") and not wanted.locks:
            raise Busy(
                f"this tree is mounted for writing with --shared at {row['mountpoint']}; mount with --shared, or with --read-only"
            )


def what_is_shared(reader: InodeReader, session: int) -> tuple[bool, bool]:
    """(names, locks) of a mount that is there. Raises `UnfinishedMount` if it has been fenced."""
    raw = reader.get(key_u64(b"T", session))
    if raw is None:
        raise UnfinishedMount("this mount was detached because it did not answer; mount again")
    row = unpack_json(raw)
    return bool(row["shared"]), bool(row.get("locks"))


def ask(volume: Volume, wanted: Wanted) -> None:
    """Have the writable mounts of the tree stop caching names, if `wanted` is to stand beside them. Blocks, at most ASKED_S_MAX.

    Returns also if one of them did not; `check` tells. Raises `Busy` if it would come to nothing.
    """
    if wanted.read_only or not wanted.shared:
        return
    with volume.snapshot() as reader:
        check_locks(reader, wanted)
    deadline = time.monotonic() + ASKED_S_MAX
    while time.monotonic() < deadline:
        with volume.snapshot() as reader:
            alone = {session for session, row in _writable(reader, wanted).items() if not row.get("shared")}
        if not alone:
            return
        if any(volume.session.is_dead(session) for session in alone):
            housekeeping.recover(volume)
            continue

        def set_asked(tx: MetadataTransaction) -> None:
            for session, row in _writable(tx, wanted).items():
                if not row.get("shared") and not row.get("asked"):
                    tell_mount_row(tx, session, asked=True)

        volume.mutate(set_asked)
        time.sleep(CHECK_S / 4)


async def share_when_asked(volume: Volume, operations: Operations) -> None:
    """The task of a mount that stands alone, until it does not."""
    key = key_u64(b"T", volume.session.id)
    while not operations.shared:
        await trio.sleep(CHECK_S)
        with volume.snapshot() as reader:
            raw = reader.get(key)
        if raw is not None and unpack_json(raw).get("asked"):
            async with operations.forgetting:
                await share(volume, operations)


async def share(volume: Volume, operations: Operations) -> None:
    """Steps 2 to 4 of the module's text."""
    began = time.monotonic()
    operations.stop_caching_names()
    while True:
        await operations.flush_old(everything=True)
        if not operations.open_files.pending:
            break
        await trio.sleep(CHECK_S)  # a full disk; the log has said so
    known = list({operations.root, *operations.open_files.lookups})
    await trio.to_thread.run_sync(_drop_known, volume, operations, known)
    while operations.renamed_to:
        names, operations.renamed_to = operations.renamed_to, set()
        await trio.to_thread.run_sync(_drop, operations, names)
    operations.renamed_to = None
    operations.names_cached = False
    await operations.commit(lambda tx: tell_mount_row(tx, volume.session.id, shared=True))
    log.warning(
        "mount_shared",
        why="another writable mount of this tree was asked for; locks do not reach across",
        inodes=len(known),
        seconds=round(time.monotonic() - began, 3),
    )


def _drop_known(volume: Volume, operations: Operations, known: list[int]) -> None:
    """Make the kernel drop the names of the inodes it knows."""
    inodes = set(known)
    for parent in known:
        at = b""
        while True:
            rows = filling.page(volume, parent, at, ROWS_AT_ONCE)
            _drop(operations, {(parent, entry.removesuffix(b"/")) for entry, row in rows if row.inode in inodes})
            if len(rows) < ROWS_AT_ONCE:
                break
            at = rows[-1][0]


def _drop(operations: Operations, names: Iterable[tuple[int, bytes]]) -> None:
    """An alias is never cached, so only plain names are dropped."""
    for parent, name in names:
        if mount_names.is_plain(name):
            with suppress(FileNotFoundError):
                pyfuse3.invalidate_entry(operations.kernel_number(parent), name)
