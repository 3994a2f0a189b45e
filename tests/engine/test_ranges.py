"""Range arithmetic against a model that has the bytes themselves."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stratum.s3 import ranges
from stratum.s3.errors import S3Error

FAR = "9" * 5000
positions = st.one_of(
    st.integers(0, 12).map(str),
    st.integers(0, 1 << 80).map(str),
    st.sampled_from(["00", "0" * 30 + "3", FAR, "1" + FAR]),
)
sizes = st.integers(0, 10)


def number(text: str) -> int:
    """Of any length: `int` takes 4,300 digits at once."""
    found = 0
    for at in range(0, len(text), 4000):
        piece = text[at : at + 4000]
        found = found * 10 ** len(piece) + int(piece)
    return found


def model(first: str, last: str, data: bytes) -> bytes | None:
    """The bytes that RFC 9110 section 14.1.2 gives; None where the range is unsatisfiable, all where it is invalid."""
    if not first:
        count = number(last)
        return None if not count else data[-min(count, len(data)) :] if data else b""
    if last and number(last) < number(first):
        return data
    if number(first) >= len(data):
        return None
    return data[number(first) : number(last) + 1 if last else None]


def served(header: str, data: bytes) -> bytes | None:
    try:
        found = ranges.parse(header, len(data))
    except S3Error as error:
        facts = (error.code, error.extra["ActualObjectSize"])
    else:
        start, stop = found or (0, len(data))
        assert found is None or start < stop <= len(data), "a Content-Range of no bytes cannot be written"
        return data[start:stop]
    assert facts == ("InvalidRange", str(len(data)))
    return None


@settings(deadline=None)
@given(positions, st.one_of(st.just(""), positions), sizes)
def test_first_and_last(first: str, last: str, size: int) -> None:
    data = bytes(range(size))
    assert served(f"bytes={first}-{last}", data) == model(first, last, data)


@settings(deadline=None)
@given(positions, sizes)
def test_the_last_bytes(count: str, size: int) -> None:
    data = bytes(range(size))
    assert served(f"bytes=-{count}", data) == model("", count, data)


@pytest.mark.parametrize(
    "header", ["bytes=", "bytes=-", "bytes=a-b", "bytes=0-1,3-4", "chars=0-1", "bytes=+1-2", "bytes=²-3", "", "=0-1"]
)
def test_what_is_no_range_gives_the_whole(header: str) -> None:
    assert ranges.parse(header, 10) is None


@settings(deadline=None)
@given(positions, positions, sizes)
def test_a_range_of_a_copy_lies_inside(first: str, last: str, size: int) -> None:
    wrong = "InvalidArgument" if number(last) < number(first) else "InvalidRange" if number(last) >= size else ""
    if wrong:
        with pytest.raises(S3Error) as caught:
            ranges.parse_copy(f"bytes={first}-{last}", size)
        assert caught.value.code == wrong
    else:
        assert ranges.parse_copy(f"bytes={first}-{last}", size) == (number(first), number(last) + 1)
