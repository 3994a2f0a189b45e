"""Byte ranges (RFC 9110 section 14) as S3 treats them: one range, anything else is ignored."""

from __future__ import annotations

import re

from stratum.s3.errors import S3Error

_RANGE = re.compile(r"\s*bytes\s*=\s*(\d*)\s*-\s*(\d*)\s*", re.IGNORECASE)


def parse(header: str, size: int) -> tuple[int, int] | None:
    """(start, stop) of a Range header; None to answer the whole object. Raises `S3Error` InvalidRange."""
    match = _RANGE.fullmatch(header)
    if match is None or match.group(1) == match.group(2) == "":
        return None
    first, last = match.group(1)[:19], match.group(2)[:19]
    if not first:
        start, stop = max(0, size - int(last)), size
        if int(last) == 0:
            start = size
    else:
        start, stop = int(first), min(int(last) + 1 if last else size, size)
        if last and int(last) < int(first):
            return None
    if start >= size:
        raise S3Error(
            "InvalidRange", "the range lies outside the object", ActualObjectSize=str(size), RangeRequested=header
        )
    return start, stop


def parse_copy(header: str, size: int) -> tuple[int, int]:
    """x-amz-copy-source-range: `bytes=first-last`, both there and inside the source."""
    match = _RANGE.fullmatch(header)
    if match is None or not match.group(1) or not match.group(2) or int(match.group(2)) < int(match.group(1)):
        raise S3Error(
            "InvalidArgument",
            "x-amz-copy-source-range is not bytes=first-last",
            ArgumentName="x-amz-copy-source-range",
            ArgumentValue=header,
        )
    start, stop = int(match.group(1)), int(match.group(2)) + 1
    if stop > size:
        raise S3Error("InvalidRange", f"the range ends behind the source, which has {size} bytes")
    return start, stop
