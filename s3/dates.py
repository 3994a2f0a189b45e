"""Dates as clients write them. Each function gives seconds since 1970, or None for anything else. Pure.

Sources: RFC 9110 5.6.7, RFC 5322 3.3 (whose zones clients of Signature Version 2 send), ISO 8601, and AWS's own stamp.
"""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime, timedelta
from functools import lru_cache

from stratum.iso_dates import FIRST_S, LAST_S
from stratum.iso_dates import seconds as iso

_TEXT_CHARACTERS_MAX = 48
_MONTHS = {
    name: number + 1
    for number, name in enumerate(("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"))
}  # fmt: skip
_HTTP = re.compile(
    r"(?:[A-Z]{3,9},? )?([0-9]{1,2})[ -]([A-Z]{3})[ -]([0-9]{4}|[0-9]{2}) ([0-9]{2}):([0-9]{2}):([0-9]{2})(?: (?:GMT|UTC|UT|Z|([+-])([0-9]{2})([0-9]{2})))?",
    re.IGNORECASE,
)
_ASCTIME = re.compile(r"[A-Z]{3} ([A-Z]{3}) ([ 0-9][0-9]) ([0-9]{2}):([0-9]{2}):([0-9]{2}) ([0-9]{4})", re.IGNORECASE)
_STAMP = re.compile(r"([0-9]{4})([0-9]{2})([0-9]{2})T([0-9]{2})([0-9]{2})([0-9]{2})Z")
_STAMP_CHARACTERS = 16
_YEARS_AHEAD_MAX = 50


def _moment(year: int, month: int, day: int, hour: int, minute: int, second: int) -> datetime | None:
    leap = second == 60
    try:
        moment = datetime(year, month, day, hour, minute, second - leap, tzinfo=UTC)
    except ValueError:
        return None
    return moment + timedelta(seconds=1) if leap and year < 9999 else moment


def _year(text: str) -> int:
    """Of two digits it is the latest that is not more than 50 years ahead."""
    if len(text) == 4:
        return int(text)
    now = time.gmtime().tm_year
    year = now - now % 100 + int(text)
    return year - 100 if year > now + _YEARS_AHEAD_MAX else year


def http(text: str) -> int | None:
    """An HTTP date in its three forms, or an e-mail's; without a zone it is UTC."""
    if len(text) > _TEXT_CHARACTERS_MAX or not text.isascii():
        return None
    found = _HTTP.fullmatch(text)
    if found is None:
        return _asctime(text)
    month = _MONTHS.get(found[2].lower())
    if month is None:
        return None
    moment = _moment(_year(found[3]), month, int(found[1]), int(found[4]), int(found[5]), int(found[6]))
    if moment is None:
        return None
    ahead_s = (int(found[8]) * 60 + int(found[9])) * 60 if found[7] else 0
    seconds = int(moment.timestamp()) + (ahead_s if found[7] == "-" else -ahead_s)
    return seconds if FIRST_S <= seconds <= LAST_S else None


def _asctime(text: str) -> int | None:
    found = _ASCTIME.fullmatch(text)
    month = _MONTHS.get(found[1].lower()) if found is not None else None
    if found is None or month is None:
        return None
    moment = _moment(int(found[6]), month, int(found[2]), int(found[3]), int(found[4]), int(found[5]))
    return None if moment is None else int(moment.timestamp())


def stamp(text: str) -> int | None:
    """YYYYMMDDTHHMMSSZ."""
    return _stamp(text) if len(text) == _STAMP_CHARACTERS else None


@lru_cache(maxsize=1024)
def _stamp(text: str) -> int | None:
    found = _STAMP.fullmatch(text)
    if found is None:
        return None
    year, month, day, hour, minute, second = map(int, found.groups())
    moment = _moment(year, month, day, hour, minute, second)
    return None if moment is None else int(moment.timestamp())


def any_form(text: str) -> int | None:
    """In ISO 8601 or of HTTP: timestamps of documents, of which clients send both."""
    found = iso(text)
    return http(text) if found is None else int(found)
