"""What listings say beside the keys."""

from __future__ import annotations

import itertools
from typing import Any
from urllib.parse import unquote_plus

import pytest

from tests.s3.test_objects import bucket, s3

__all__ = ["bucket", "s3"]
ODD = "a b+&<ö\n%/"
ENCODED = {
    # What the API reference names under encoding-type of each call.
    "list_objects": ("Delimiter", "Marker", "NextMarker", "Prefix"),
    "list_objects_v2": ("Delimiter", "Prefix", "StartAfter"),
    "list_object_versions": ("Delimiter", "KeyMarker", "NextKeyMarker", "Prefix"),
    "list_multipart_uploads": ("Delimiter", "KeyMarker", "NextKeyMarker", "Prefix"),
}
COUNT = {"list_object_versions": "MaxKeys", "list_multipart_uploads": "MaxUploads"}
AFTER = {"list_objects": "Marker", "list_objects_v2": "StartAfter"}
ITEMS = {"list_object_versions": "Versions", "list_multipart_uploads": "Uploads"}


@pytest.mark.parametrize("call", ENCODED)
def test_encoding_type_encodes_what_the_documentation_names(s3: Any, bucket: str, call: str) -> None:
    keys = [f"{ODD}{name}" for name in ("1", "2", "3|x", "3|y")]
    for key in keys:
        s3.put_object(Bucket=bucket, Key=key, Body=b"")
        s3.create_multipart_upload(Bucket=bucket, Key=key)
    after = {AFTER.get(call, "KeyMarker"): f"{ODD}0"}
    words = {"Bucket": bucket, "Prefix": ODD, "Delimiter": "|", COUNT.get(call, "MaxKeys"): 2, **after}
    page = getattr(s3, call)(**words, EncodingType="url")
    assert page["EncodingType"] == "url"
    found = {name: page[name] for name in ENCODED[call]}
    found |= {f"key {number}": item["Key"] for number, item in enumerate(page[ITEMS.get(call, "Contents")])}
    for name, value in found.items():
        wanted = {"Prefix": ODD, "Delimiter": "|", **after}.get(name)
        assert value.isascii(), name
        assert " " not in value, name
        assert unquote_plus(value) == wanted if wanted else unquote_plus(value).startswith(ODD), name
    rest = getattr(s3, call)(**{**words, COUNT.get(call, "MaxKeys"): 10}, EncodingType="url")
    assert [unquote_plus(item["Prefix"]) for item in rest["CommonPrefixes"]] == [f"{ODD}3|"]


@pytest.mark.parametrize("call", ["list_objects", "list_objects_v2", "list_object_versions", "list_multipart_uploads"])
def test_pages_go_on_under_an_odd_prefix(s3: Any, bucket: str, call: str) -> None:
    """As a client does that takes the encoding off: the next page is asked for with what the last one said."""
    keys = [f"{ODD}{number}" for number in range(5)]
    for key in keys:
        s3.put_object(Bucket=bucket, Key=key, Body=b"")
        s3.create_multipart_upload(Bucket=bucket, Key=key)
    pages = s3.get_paginator(call).paginate(Bucket=bucket, Prefix=ODD, PaginationConfig={"PageSize": 2})
    assert (
        list(itertools.chain.from_iterable([i["Key"] for i in page[ITEMS.get(call, "Contents")]] for page in pages))
        == keys
    )


def test_uploads_of_a_key_come_in_the_order_of_their_initiation(s3: Any, bucket: str) -> None:
    begun = [(key, s3.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]) for key in ["b", "a"] * 12]
    wanted = sorted(begun, key=lambda pair: pair[0])  # stable: in order of initiation within a key
    page = s3.list_multipart_uploads(Bucket=bucket)
    assert [(item["Key"], item["UploadId"]) for item in page["Uploads"]] == wanted
    moments = [item["Initiated"] for item in page["Uploads"] if item["Key"] == "a"]
    assert moments == sorted(moments)
    found = []
    markers: dict[str, str] = {}
    while True:
        page = s3.list_multipart_uploads(Bucket=bucket, MaxUploads=5, **markers)
        found += [(item["Key"], item["UploadId"]) for item in page["Uploads"]]
        if not page["IsTruncated"]:
            break
        markers = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
    assert found == wanted
    # A marker whose upload is gone goes on behind where it was.
    key, upload_id = wanted[3]
    s3.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id)
    page = s3.list_multipart_uploads(Bucket=bucket, KeyMarker=key, UploadIdMarker=upload_id)
    assert [(item["Key"], item["UploadId"]) for item in page["Uploads"]] == wanted[4:]
