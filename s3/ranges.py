"""Byte ranges (RFC 9110 section 14) as S3 treats them: one range, anything else is ignored."""

from __future__ import annotations

from stratum.s3 import numerals
from stratum.s3.errors import S3Error


def _positions(header: str) -> tuple[str, str] | None:
    """The digits before and behind the dash of `bytes=first-last`; None for any other form."""
    unit, _, spec = header.partition("=")
    first, dash, last = (part.strip(" \t") for part in spec.partition("-"))
    if unit.strip(" \t").lower() != "bytes" or not dash or not (first or last):
        return None
    return (first, last) if all(not part or numerals.are_digits(part) for part in (first, last)) else None


def _is_less(one: str, other: str) -> bool:
    """Of digits, however many."""
    one, other = one.lstrip("0"), other.lstrip("0")
    return (len(one), one) < (len(other), other)


def parse(header: str, size: int) -> tuple[int, int] | None:
    """(start, stop) of a Range header; None to answer the whole object. Raises `S3Error` InvalidRange.

    The last bytes of an empty object are satisfiable and all of it: there is no Content-Range that could say so.
    """
    positions = _positions(header)
    if positions is None:
        return None
    first, last = positions
    if not first:
        count = numerals.clamped(last)
        if count and not size:
            return None
        start, stop = size - min(count, size), size
    else:
        if last and _is_less(last, first):
            return None
        start, stop = numerals.clamped(first), min(numerals.clamped(last) + 1 if last else size, size)
    if start >= size:
        raise S3Error("InvalidRange", ActualObjectSize=str(size), RangeRequested=header[:256])
    return start, stop


def parse_copy(header: str, size: int) -> tuple[int, int]:
    """x-amz-copy-source-range: `bytes=first-last`, both there and inside the source."""
    first, last = _positions(header) or ("", "")
    if not first or not last or _is_less(last, first):
        raise S3Error(
            "InvalidArgument",
            "The x-amz-copy-source-range value must be of the form bytes=first-last where first and last are the"
            " zero-based offsets of the first and last bytes to copy",
            ArgumentName="x-amz-copy-source-range",
            ArgumentValue=header[:256],
        )
    start, stop = numerals.clamped(first), numerals.clamped(last) + 1
    if stop > size:
        raise S3Error(
            "InvalidRange",
            f"Range specified is not valid for source object of size: {size}",
            RangeRequested=header[:256],
        )
    return start, stop
