"""Tags of objects and buckets: what one may be, and the form of the x-amz-tagging header. Pure.

Source: Amazon S3 user guide, "Categorizing your storage using tags", and "Using cost allocation S3 bucket tags".
"""

from __future__ import annotations

from urllib.parse import unquote_to_bytes

from stratum.errors import InvalidTag

OBJECT_TAGS_MAX = 10
BUCKET_TAGS_MAX = 50
KEY_CHARACTERS_MAX = 128
VALUE_CHARACTERS_MAX = 256
_SIGNS = frozenset(" +-=._:/@")
_RESERVED = "aws:"


def _has_good_characters(text: str) -> bool:
    """Letters and digits of any script, spaces and a few signs; so neither a control character nor a quote."""
    return all(c in _SIGNS or c.isalnum() for c in text)


def check(key: str, value: str) -> None:
    """Raises `InvalidTag`."""
    if not 1 <= len(key) <= KEY_CHARACTERS_MAX:
        raise InvalidTag(f"the key of a tag has from 1 to {KEY_CHARACTERS_MAX} characters; this one has {len(key)}")
    if len(value) > VALUE_CHARACTERS_MAX:
        raise InvalidTag(f"the value of tag {key!r} has {len(value)} characters; {VALUE_CHARACTERS_MAX} is the most")
    if key.lower().startswith(_RESERVED):
        raise InvalidTag(f"the tag {key!r} begins with {_RESERVED!r}, which is reserved")
    if not (_has_good_characters(key) and _has_good_characters(value)):
        raise InvalidTag(
            f"the tag {key!r} or its value has characters other than letters, digits, spaces and + - = . _ : / @"
        )


def collect(pairs: list[tuple[str, str]], count_max: int) -> dict[str, str]:
    """The tags as a map. Raises `InvalidTag` if there are too many, one is not allowed, or a key comes twice."""
    if len(pairs) > count_max:
        raise InvalidTag(f"{len(pairs)} tags were sent; {count_max} is the most")
    found: dict[str, str] = {}
    for key, value in pairs:
        check(key, value)
        if key in found:
            raise InvalidTag(f"the tag {key!r} comes twice")
        found[key] = value
    return found


def parse_header(text: str) -> dict[str, str]:
    """Tags of an x-amz-tagging header, `a=b&c=d` in the manner of a query. Raises `InvalidTag`."""
    pairs = []
    for part in filter(None, text.split("&")):
        key, _, value = part.replace("+", "%20").partition("=")
        try:
            pairs.append((unquote_to_bytes(key).decode(), unquote_to_bytes(value).decode()))
        except UnicodeDecodeError as error:
            raise InvalidTag(f"the tag {key!r} is not UTF-8") from error
    return collect(pairs, OBJECT_TAGS_MAX)
