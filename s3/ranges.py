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


def parse(header: str, size: int) -> tuple[int, int] | None:
    """(start, stop) of a Range header; None to answer the whole object. Raises `S3Error` InvalidRange."""
    positions = _positions(header)
    if positions is None:
        return None
    first, last = positions
    if not first:
        start, stop = size - min(numerals.clamped(last), size), size
    else:
        start, stop = numerals.clamped(first), min(numerals.clamped(last) + 1 if last else size, size)
        if last and numerals.clamped(last) < start:
            return None
    if start >= size:
        raise S3Error(
            "InvalidRange", "the range lies outside the object", ActualObjectSize=str(size), RangeRequested=header
        )
    return start, stop


def parse_copy(header: str, size: int) -> tuple[int, int]:
    """x-amz-copy-source-range: `bytes=first-last`, both there and inside the source."""
    first, last = (numerals.whole(part) for part in _positions(header) or ("", ""))
    if first is None or last is None or last < first:
        raise S3Error(
            "InvalidArgument",
            "x-amz-copy-source-range is not bytes=first-last",
            ArgumentName="x-amz-copy-source-range",
            ArgumentValue=header,
        )
    start, stop = first, last + 1
    if stop > size:
        raise S3Error("InvalidRange", f"the range ends behind the source, which has {size} bytes")
    return start, stop
