"""Tags of objects and buckets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stratum import tags
from stratum.errors import InvalidTag
from tests.s3.test_access import add_user
from tests.s3.test_objects import bucket, refused, s3

if TYPE_CHECKING:
    from tests.support import Server

__all__ = ["bucket", "s3"]  # fixtures


def as_set(found: dict[str, str]) -> dict[str, Any]:
    return {"TagSet": [{"Key": key, "Value": value} for key, value in found.items()]}


def of(s3: Any, bucket: str, key: str) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in s3.get_object_tagging(Bucket=bucket, Key=key)["TagSet"]}


def test_tags_of_an_object(s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="k", Body=b"x", Metadata={"a": "b"})
    before = s3.head_object(Bucket=bucket, Key="k")
    assert of(s3, bucket, "k") == {}
    wanted = {"project": "blue/green", "empty": "", "größe": "a + b = c @ x_y.z:1"}
    s3.put_object_tagging(Bucket=bucket, Key="k", Tagging=as_set(wanted))
    assert of(s3, bucket, "k") == wanted
    after = s3.head_object(Bucket=bucket, Key="k")
    assert (after["ETag"], after["LastModified"], after["Metadata"]) == (
        before["ETag"],
        before["LastModified"],
        {"a": "b"},
    )
    assert after["ResponseMetadata"]["HTTPHeaders"]["x-amz-tagging-count"] == "3"
    assert s3.get_object(Bucket=bucket, Key="k")["TagCount"] == 3
    s3.delete_object_tagging(Bucket=bucket, Key="k")
    assert of(s3, bucket, "k") == {}
    assert "TagCount" not in s3.get_object(Bucket=bucket, Key="k")
    refused(s3.get_object_tagging, 404, "NoSuchKey", Bucket=bucket, Key="none")
    refused(s3.put_object_tagging, 404, "NoSuchKey", Bucket=bucket, Key="none", Tagging=as_set({}))


def test_tags_come_with_put_copy_and_complete(s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="k", Body=b"x", Tagging="a=1&b%20c=d%2Fe&bare")
    assert of(s3, bucket, "k") == {"a": "1", "b c": "d/e", "bare": ""}
    source = {"Bucket": bucket, "Key": "k"}
    s3.copy_object(Bucket=bucket, Key="same", CopySource=source)
    s3.copy_object(Bucket=bucket, Key="meta", CopySource=source, MetadataDirective="REPLACE", Metadata={"x": "y"})
    s3.copy_object(Bucket=bucket, Key="other", CopySource=source, TaggingDirective="REPLACE", Tagging="z=9")
    s3.copy_object(Bucket=bucket, Key="none", CopySource=source, TaggingDirective="REPLACE")
    assert of(s3, bucket, "same") == of(s3, bucket, "meta") == of(s3, bucket, "k")
    assert (of(s3, bucket, "other"), of(s3, bucket, "none")) == ({"z": "9"}, {})
    upload = s3.create_multipart_upload(Bucket=bucket, Key="parts", Tagging="p=q")["UploadId"]
    part = s3.upload_part(Bucket=bucket, Key="parts", UploadId=upload, PartNumber=1, Body=b"x")
    s3.complete_multipart_upload(
        Bucket=bucket,
        Key="parts",
        UploadId=upload,
        MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]},
    )
    assert of(s3, bucket, "parts") == {"p": "q"}
    s3.put_object(Bucket=bucket, Key="k", Body=b"new")
    assert of(s3, bucket, "k") == {}, "an overwrite is a new object"


@pytest.mark.parametrize(
    "wanted",
    [
        {f"k{number}": "" for number in range(11)}, {"x" * 129: ""}, {"x": "v" * 257}, {"aws:x": "1"}, {"a\nb": "1"}, {"a": "<b>"},
    ],
)  # fmt: skip
def test_tags_that_are_none(s3: Any, bucket: str, wanted: dict[str, str]) -> None:
    s3.put_object(Bucket=bucket, Key="k", Body=b"x", Tagging="a=1")
    refused(s3.put_object_tagging, 400, "InvalidTag", Bucket=bucket, Key="k", Tagging=as_set(wanted))
    assert of(s3, bucket, "k") == {"a": "1"}


def test_limits_of_tags(server: Server, s3: Any, bucket: str) -> None:
    most = {f"{number}" + "k" * 127: "v" * 256 for number in range(10)}
    s3.put_object(Bucket=bucket, Key="k", Body=b"x")
    s3.put_object_tagging(Bucket=bucket, Key="k", Tagging=as_set(most))
    assert of(s3, bucket, "k") == most
    twice = {"TagSet": [{"Key": "a", "Value": "1"}, {"Key": "a", "Value": "2"}]}
    refused(s3.put_object_tagging, 400, "InvalidTag", Bucket=bucket, Key="k", Tagging=twice)
    refused(s3.put_object, 400, "InvalidTag", Bucket=bucket, Key="n", Body=b"", Tagging="a=1&a=2")
    refused(s3.put_object, 400, "InvalidTag", Bucket=bucket, Key="n", Body=b"", Tagging="a=%FF")
    refused(s3.head_object, 404, "404", Bucket=bucket, Key="n")


def test_tags_of_a_bucket(server: Server, s3: Any, bucket: str) -> None:
    refused(s3.get_bucket_tagging, 404, "NoSuchTagSet", Bucket=bucket)
    wanted = {f"k{number}": str(number) for number in range(50)}
    s3.put_bucket_tagging(Bucket=bucket, Tagging=as_set(wanted))
    assert {t["Key"]: t["Value"] for t in s3.get_bucket_tagging(Bucket=bucket)["TagSet"]} == wanted
    refused(s3.put_bucket_tagging, 400, "InvalidTag", Bucket=bucket, Tagging=as_set({**wanted, "one": "more"}))
    other, _ = add_user(server)
    refused(other.get_bucket_tagging, 403, "AccessDenied", Bucket=bucket)
    refused(other.put_bucket_tagging, 403, "AccessDenied", Bucket=bucket, Tagging=as_set({}))
    s3.delete_bucket_tagging(Bucket=bucket)
    refused(s3.get_bucket_tagging, 404, "NoSuchTagSet", Bucket=bucket)


def test_tags_are_their_owners(server: Server, s3: Any) -> None:
    """Who may read the bytes by a canned ACL learns nothing of the tags, neither by a copy."""
    owner, _ = add_user(server)
    other, _ = add_user(server)
    owner.create_bucket(Bucket="tag-owner", ACL="public-read-write")
    other.create_bucket(Bucket="tag-other")
    owner.put_object(Bucket="tag-owner", Key="k", Body=b"x", ACL="public-read", Tagging="secret=plan")
    assert other.get_object(Bucket="tag-owner", Key="k")["Body"].read() == b"x"
    assert "TagCount" not in other.get_object(Bucket="tag-owner", Key="k")
    source = {"Bucket": "tag-owner", "Key": "k"}
    for call, more in (
        (other.get_object_tagging, {}), (other.put_object_tagging, {"Tagging": as_set({})}), (other.delete_object_tagging, {}),
    ):  # fmt: skip
        refused(call, 403, "AccessDenied", Bucket="tag-owner", Key="k", **more)
    refused(other.copy_object, 403, "AccessDenied", Bucket="tag-other", Key="k", CopySource=source)
    other.copy_object(Bucket="tag-other", Key="k", CopySource=source, TaggingDirective="REPLACE", Tagging="mine=1")
    assert of(other, "tag-other", "k") == {"mine": "1"}
    other.put_object(Bucket="tag-owner", Key="theirs", Body=b"x", Tagging="a=b")
    assert of(other, "tag-owner", "theirs") == of(owner, "tag-owner", "theirs") == of(s3, "tag-owner", "theirs")
    status, _, _ = server.raw("GET", "/tag-owner/k?tagging")
    assert status == 403


@given(
    st.dictionaries(
        st.text("abc xyzäé0189+-=._:/@", min_size=1, max_size=20),
        st.text("abÖ +&=%/".replace("&", "").replace("%", ""), max_size=20),
        max_size=10,
    )
)
def test_the_header_carries_any_tags(wanted: dict[str, str]) -> None:
    from urllib.parse import quote_plus

    assert tags.parse_header("&".join(f"{quote_plus(k)}={quote_plus(v)}" for k, v in wanted.items())) == wanted


@given(st.text(max_size=200))
def test_any_header_is_tags_or_refused(text: str) -> None:
    try:
        found = tags.parse_header(text)
    except InvalidTag:
        return
    assert len(found) <= tags.OBJECT_TAGS_MAX
