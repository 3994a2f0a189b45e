"""Every call that looks something up, as the first that looks into a clone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.s3.test_objects import bucket, refused, s3
from tests.support import stratum

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support import Server

__all__ = ["bucket", "s3"]  # fixtures
KEY = "deep/down/7"
BODY = b"7" * 50_000


def _copy(s3: Any, name: str) -> Any:
    s3.copy_object(Bucket=name, Key="copied", CopySource={"Bucket": name, "Key": KEY})
    return s3.get_object(Bucket=name, Key="copied")["Body"].read()


def _part(s3: Any, name: str) -> Any:
    upload = s3.create_multipart_upload(Bucket=name, Key="parts")["UploadId"]
    s3.upload_part_copy(
        Bucket=name, Key="parts", UploadId=upload, PartNumber=1, CopySource={"Bucket": name, "Key": KEY}
    )
    return len(s3.list_parts(Bucket=name, Key="parts", UploadId=upload)["Parts"])


def _put(s3: Any, name: str) -> Any:
    etag = s3.list_objects_v2(Bucket=name, Prefix=KEY)["Contents"][0]["ETag"]
    s3.put_object(
        Bucket=name,
        Key="deep/down/8",
        Body=b"n" * 300_000,
        IfMatch=s3.head_object(Bucket=name, Key="deep/down/8")["ETag"],
    )
    s3.put_object(Bucket=name, Key=KEY, Body=BODY, IfMatch=etag)
    return s3.get_object(Bucket=name, Key=KEY)["Body"].read()


def _put_blindly(s3: Any, name: str) -> Any:
    refused(s3.put_object, 412, "PreconditionFailed", Bucket=name, Key=KEY, Body=BODY, IfNoneMatch="*")
    s3.put_object(Bucket=name, Key="deep/down/new", Body=BODY, IfNoneMatch="*")
    return s3.get_object(Bucket=name, Key=KEY)["Body"].read()


def _delete(s3: Any, name: str) -> Any:
    s3.delete_object(Bucket=name, Key=KEY)
    refused(s3.get_object, 404, "NoSuchKey", Bucket=name, Key=KEY)
    return s3.list_objects_v2(Bucket=name, Prefix="deep/")["KeyCount"]


def _delete_many(s3: Any, name: str) -> Any:
    keys = [{"Key": f"deep/down/{number}"} for number in range(20)]
    assert len(s3.delete_objects(Bucket=name, Delete={"Objects": keys})["Deleted"]) == 20
    return s3.list_objects_v2(Bucket=name)["KeyCount"]


CALLS: dict[str, tuple[Callable[[Any, str], Any], Any]] = {
    "get": (lambda s3, name: s3.get_object(Bucket=name, Key=KEY)["Body"].read(), BODY),
    "range": (lambda s3, name: s3.get_object(Bucket=name, Key=KEY, Range="bytes=10-19")["Body"].read(), BODY[:10]),
    "head": (lambda s3, name: s3.head_object(Bucket=name, Key=KEY)["ContentLength"], len(BODY)),
    "tags": (lambda s3, name: s3.get_object_tagging(Bucket=name, Key=KEY)["TagSet"], [{"Key": "a", "Value": "b"}]),
    "acl": (lambda s3, name: len(s3.get_object_acl(Bucket=name, Key=KEY)["Grants"]), 1),
    "attributes": (lambda s3, name: s3.get_object_attributes(Bucket=name, Key=KEY, ObjectAttributes=["ObjectSize"])["ObjectSize"], len(BODY)),
    "list": (lambda s3, name: s3.list_objects_v2(Bucket=name, StartAfter="deep/down/18")["KeyCount"], 9),
    "list one level": (lambda s3, name: s3.list_objects_v2(Bucket=name, Delimiter="/", Prefix="deep/")["CommonPrefixes"], [{"Prefix": "deep/down/"}]),
    "list a page": (lambda s3, name: s3.list_objects_v2(Bucket=name, MaxKeys=7, Prefix="deep/down/1")["KeyCount"], 7),
    "copy": (_copy, BODY),
    "copy a part": (_part, 1),
    "put": (_put, BODY),
    "put blindly": (_put_blindly, BODY),
    "delete": (_delete, 19),
    "delete many": (_delete_many, 0),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_a_young_clone_answers_every_call(server: Server, s3: Any, bucket: str, call: str) -> None:
    for number in range(20):
        s3.put_object(Bucket=bucket, Key=f"deep/down/{number}", Body=b"%d" % (number % 10) * 50_000, Tagging="a=b")
    name = f"{bucket}-young"
    stratum("clone", server.root, bucket, name)
    s3.delete_object(Bucket=bucket, Key=KEY)
    do, wanted = CALLS[call]
    assert do(s3, name) == wanted


def test_a_bucket_that_is_a_young_clone_is_not_empty(server: Server, s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="a/b", Body=b"x")
    name = f"{bucket}-young"
    stratum("clone", server.root, bucket, name)
    refused(s3.delete_bucket, 409, "BucketNotEmpty", Bucket=name)
    s3.delete_object(Bucket=name, Key="a/b")
    s3.delete_bucket(Bucket=name)
    stratum("snapshot", "create", server.root, bucket, "one")
    stratum("snapshot", "remove", server.root, bucket, "one")
    refused(s3.head_bucket, 404, "404", Bucket=f"{bucket}.snap.one")
