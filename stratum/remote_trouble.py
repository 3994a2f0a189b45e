"""What can be wrong with a remote as a whole, as opposed to one of its objects: a finite list, each with its words and its health code.

The tiering daemon asks each remote now and then and notes what it finds (tiering/remote_watch.py).
Row: `gremotes` {name: {"trouble", "what", "since_s"}}.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

from stratum.cold_backends.contract import RemoteDenied, RemoteError, RemoteGone
from stratum.errors import ForeignRemote, StratumError, TierUnavailable

if TYPE_CHECKING:
    from stratum.tier_rows import ColdRow

MARKER = "stratum-instance.json"


class Trouble(enum.StrEnum):
    """The value is that of the rows and of `cold check --json`."""

    GONE = "gone"
    """The bucket, or the directory."""
    DENIED = "denied"
    UNREACHABLE = "unreachable"
    NO_MARKER = "no marker"
    FOREIGN = "foreign"
    SUPERSEDED = "superseded"


CODES = {
    Trouble.GONE: "STR-COLD-GONE", Trouble.DENIED: "STR-COLD-DENIED", Trouble.UNREACHABLE: "STR-COLD-UNREACHABLE",
    Trouble.NO_MARKER: "STR-COLD-NO-MARKER", Trouble.FOREIGN: "STR-COLD-FOREIGN", Trouble.SUPERSEDED: "STR-COLD-SUPERSEDED",
}  # fmt: skip


def place(row: ColdRow) -> str:
    """Where a remote is, for messages."""
    if row.kind == "directory":
        return f"the directory {row.endpoint}{'/' + row.prefix if row.prefix else ''}"
    below = f" below {row.prefix}" if row.prefix else ""
    return f"the bucket {row.bucket!r}{below} at {row.endpoint or 'AWS'}"


def of_error(name: str, row: ColdRow, error: RemoteError) -> TierUnavailable:
    """Why a remote cannot be asked at all."""
    where = place(row)
    if isinstance(error, RemoteGone):
        bring = "plug in or mount its disk" if row.kind == "directory" else "restore it, or its name"
        what = f"remote {name!r}: {where} is not there; {bring}. What lies only there cannot be read until then, and nothing goes there"
        return TierUnavailable(what, trouble=Trouble.GONE)
    if isinstance(error, RemoteDenied):
        keys = f"those in {row.credentials}" if row.credentials else "those of the environment"
        what = f"remote {name!r}: {where} does not take the credentials, {keys} ({error.message}); give valid ones, with access to the bucket"
        return TierUnavailable(what, trouble=Trouble.DENIED)
    what = f"remote {name!r}: {where} does not answer ({error.message}); it is tried again"
    return TierUnavailable(what, trouble=Trouble.UNREACHABLE)


def of_marker(name: str, row: ColdRow, instance: str, found: dict[str, Any] | None) -> ForeignRemote | None:
    """Why nothing may be written where this marker lies; None if it is the right one."""
    where = place(row)
    if found is None:
        return ForeignRemote(
            f"remote {name!r}: the marker {MARKER} is gone from {where}, and nothing is written there without it: somebody emptied it, or it is another "
            f"one of that name; if the objects are there, `stratum cold check {name} --restore-marker` puts it back",
            trouble=Trouble.NO_MARKER,
        )
    if found["instance"] != instance:
        return ForeignRemote(
            f"remote {name!r}: {where} belongs to the volume {found['instance']} now, and this is {instance}; nothing is written there. Find out who took "
            "it: two volumes cannot share a place",
            trouble=Trouble.FOREIGN,
        )
    if found["epoch"] != row.epoch:
        return ForeignRemote(
            f"remote {name!r}: a rebuilt volume has taken {where} over (epoch {found['epoch']}, and this volume knows {row.epoch}); nothing is written "
            "there from here. Retire this volume, or the rebuilt one",
            trouble=Trouble.SUPERSEDED,
        )
    return None


def of(error: StratumError) -> Trouble | None:
    """What an error says about a remote as a whole."""
    found = error.facts.get("trouble")
    return found if isinstance(found, Trouble) else None
