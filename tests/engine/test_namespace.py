"""Keys, directories and listing against a plain sorted dictionary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stratum import buckets, fsck, listing
from stratum.errors import BucketNotEmpty, InvalidBucketName, InvalidName, KeyTooLong, NoSuchKey
from stratum.tree import check_key
from stratum.volume import Volume
from tests.support import BUCKET, delete, get, make_volume, put

if TYPE_CHECKING:
    from pathlib import Path

HOSTILE = [
    "a", "a/b", "a//b", "a/./b", "/x", "//", "./y", "../z", "d/", "d//", "é", "\x01", "a!", "a/", "a0", "L" * 399, "L" * 400, "L" * 401, "L" * 400 + "/x",
    "L" * 1024, "z/" * 512, "/" * 1024, "q/" + "c" * 300, " ", "%2e%2e/", "...", "tab\t", "new\nline",
]  # fmt: skip


def list_all(
    volume: Volume, *, prefix: bytes = b"", delimiter: bytes = b"", limit: int = 1000
) -> tuple[list[bytes], list[bytes]]:
    """Keys and common prefixes of all pages."""
    keys, prefixes, after = [], [], b""
    while True:
        with volume.snapshot() as reader:
            page = listing.list_page(
                reader, buckets.get(reader, BUCKET), prefix=prefix, delimiter=delimiter, after=after, limit=limit
            )
        keys += [key for key, *_ in page.objects]
        prefixes += page.prefixes
        assert len(page.objects) + len(page.prefixes) <= limit
        if not page.truncated:
            return keys, prefixes
        after = page.last


def expected(keys: list[bytes], prefix: bytes, delimiter: bytes) -> tuple[list[bytes], list[bytes]]:
    plain, prefixes = [], []
    for key in sorted(keys):
        if not key.startswith(prefix):
            continue
        at = key.find(delimiter, len(prefix)) if delimiter else -1
        if at < 0:
            plain.append(key)
        elif key[: at + len(delimiter)] not in prefixes:
            prefixes.append(key[: at + len(delimiter)])
    return plain, prefixes


def test_hostile_keys_coexist_and_list_in_s3_order(opened: Volume) -> None:
    for key in HOSTILE:
        put(opened, key, key.encode())
    everything = [key.encode() for key in HOSTILE]
    assert list_all(opened)[0] == sorted(everything)
    assert list_all(opened, limit=1)[0] == sorted(everything)
    for key in HOSTILE:
        assert get(opened, key) == key.encode()
    for prefix in (b"", b"a", b"a/", b"L" * 400, b"z/z/", b"d/"):
        for delimiter in (b"", b"/", b"//", b"L", b"z/z"):
            for limit in (1, 3, 1000):
                assert list_all(opened, prefix=prefix, delimiter=delimiter, limit=limit) == expected(
                    everything, prefix, delimiter
                ), (prefix, delimiter, limit)
    assert fsck.check(opened) == []
    for key in HOSTILE:
        assert delete(opened, key)
        assert not delete(opened, key)
    assert list_all(opened) == ([], [])
    with opened.snapshot() as reader:
        assert reader.inode(buckets.get(reader, BUCKET).inode).entries == 0
        assert [key for key, _ in reader.scan(b"D", b"E")] == [b"D" + (1).to_bytes(8, "big") + b"bucket/"]
    assert fsck.check(opened) == []


PARTS = st.sampled_from(["a", "b", "", ".", "..", "a!", "a0", "x" * 399, "x" * 401, "é"])
KEYS = st.lists(PARTS, min_size=1, max_size=4).map("/".join).filter(lambda key: 0 < len(key.encode()) <= 1024)


@settings(max_examples=25, deadline=None)
@given(
    steps=st.lists(st.tuples(st.booleans(), KEYS), max_size=30),
    prefix=KEYS,
    delimiter=st.sampled_from(["/", "a", "//", "/a", ""]),
    limit=st.integers(1, 7),
)
def test_any_history_lists_like_a_dictionary(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[bool, str]], prefix: str, delimiter: str, limit: int
) -> None:
    root = tmp_path_factory.mktemp("v") / "volume"
    make_volume(root)
    with Volume(root, "test") as volume:
        model: dict[bytes, bytes] = {}
        for is_put, key in steps:
            raw = key.encode()
            if is_put:
                put(volume, raw, raw)
                model[raw] = raw
            else:
                assert delete(volume, raw) == (model.pop(raw, None) is not None)
        assert list_all(volume, limit=limit)[0] == sorted(model)
        assert list_all(volume, prefix=prefix.encode(), delimiter=delimiter.encode(), limit=limit) == expected(
            list(model), prefix.encode(), delimiter.encode()
        )
        assert fsck.check(volume) == []


@pytest.mark.parametrize(
    ("key", "error"), [(b"", InvalidName), (b"a\0b", InvalidName), (b"\xff", InvalidName), (b"x" * 1025, KeyTooLong)]
)
def test_what_a_key_may_not_be(key: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        check_key(key)


@pytest.mark.parametrize(
    "name",
    [
        "ab",
        "a" * 64,
        "Upper",
        "under_score",
        "-a-",
        "a..b",
        "a.-b",
        "192.168.1.1",
        "a b",
        "xn--x",
        "x-s3alias",
        "",
        "é" * 5,
    ],
)
def test_what_a_bucket_name_may_not_be(name: str) -> None:
    with pytest.raises(InvalidBucketName):
        buckets.check_name(name)


def test_a_key_that_is_gone_is_not_found(opened: Volume) -> None:
    with pytest.raises(NoSuchKey):
        get(opened, "nothing")


def test_a_bucket_with_keys_cannot_be_removed(opened: Volume) -> None:
    put(opened, "deep/down/key", b"x")
    with pytest.raises(BucketNotEmpty, match="deep/down/key"):
        opened.mutate(lambda tx: buckets.remove(tx, BUCKET))
    delete(opened, "deep/down/key")
    opened.mutate(lambda tx: buckets.remove(tx, BUCKET))
    assert fsck.check(opened) == []


def test_a_volume_cannot_be_made_in_a_folder_with_content(tmp_path: Path) -> None:
    from stratum import volume
    from stratum.errors import VolumeInvalid

    (tmp_path / "precious").write_text("x")
    with pytest.raises(VolumeInvalid, match="not empty"):
        volume.create(tmp_path, {})
    assert (tmp_path / "precious").read_text() == "x"
