"""ISO 8601 dates as users and clients write them. Pure."""

from __future__ import annotations

import re
from datetime import UTC, datetime

_CHARACTERS_MAX = 40
FIRST_S, LAST_S = -62135596800, 253402300799
"""The years 1 to 9999 in UTC: what can be written down again."""
_BEGINS_LIKE_A_DATE = re.compile(r"[0-9]{4}-?[0-9]{2}-?[0-9]{2}(?:[Tt ][0-9:.,+Z-]+)?")
_BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)


def seconds(text: str) -> float | None:
    """Seconds since 1970 of a date, or a date and a time; without a zone it is UTC. None for anything else."""
    if len(text) > _CHARACTERS_MAX or not _BEGINS_LIKE_A_DATE.fullmatch(text):
        return None  # `fromisoformat` takes any character for the T, so 20 digits would be a date
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    found = ((moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - _BEGINNING).total_seconds()
    return found if FIRST_S <= found <= LAST_S else None
