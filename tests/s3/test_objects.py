"""Objects through boto3 over a real socket."""

from __future__ import annotations

import base64
import hashlib
import os
import uuid
from typing import TYPE_CHECKING, Any

import pytest
from botocore.exceptions import ClientError

if TYPE_CHECKING:
    from tests.support import Server

BIG = os.urandom(5_500_000)


@pytest.fixture
def bucket(server: Server) -> str:
    name = f"test-{uuid.uuid4().hex[:12]}"
    server.client().create_bucket(Bucket=name)
    return name


@pytest.fixture
def s3(server: Server) -> Any:
    return server.client()


def refused(call: Any, status: int, code: str, **arguments: Any) -> ClientError:
    with pytest.raises(ClientError) as caught:
        call(**arguments)
    assert (caught.value.response["ResponseMetadata"]["HTTPStatusCode"], caught.value.response["Error"]["Code"]) == (
        status,
        code,
    )
    return caught.value


@pytest.mark.parametrize("size", [0, 1, 4096, 16384, 16385, 65536, 1_000_000, len(BIG)])
def test_what_was_put_comes_back(s3: Any, bucket: str, size: int) -> None:
    data = BIG[:size]
    etag = s3.put_object(
        Bucket=bucket, Key="k", Body=data, ContentType="text/plain", Metadata={"a": "b"}, CacheControl="no-cache"
    )["ETag"]
    assert etag == f'"{hashlib.md5(data).hexdigest()}"'
    answer = s3.get_object(Bucket=bucket, Key="k")
    assert answer["Body"].read() == data
    assert (answer["ETag"], answer["ContentType"], answer["Metadata"], answer["CacheControl"]) == (
        etag,
        "text/plain",
        {"a": "b"},
        "no-cache",
    )
    assert s3.head_object(Bucket=bucket, Key="k")["ContentLength"] == size


def test_ranges(s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="k", Body=BIG)
    for header, wanted in (
        ("bytes=0-0", BIG[:1]),
        ("bytes=100-70000", BIG[100:70001]),
        ("bytes=-5", BIG[-5:]),
        ("bytes=5000000-", BIG[5000000:]),
        ("bytes=0-99999999", BIG),
    ):
        answer = s3.get_object(Bucket=bucket, Key="k", Range=header)
        assert answer["Body"].read() == wanted
        assert answer["ResponseMetadata"]["HTTPStatusCode"] == 206
    assert s3.get_object(Bucket=bucket, Key="k", Range="bytes=0-1,3-4")["ResponseMetadata"]["HTTPStatusCode"] == 200
    assert s3.get_object(Bucket=bucket, Key="k", Range="lines=1-2")["ResponseMetadata"]["HTTPStatusCode"] == 200
    refused(s3.get_object, 416, "InvalidRange", Bucket=bucket, Key="k", Range=f"bytes={len(BIG)}-")
    refused(s3.get_object, 416, "InvalidRange", Bucket=bucket, Key="k", Range="bytes=-0")


def test_read_preconditions(s3: Any, bucket: str) -> None:
    etag = s3.put_object(Bucket=bucket, Key="k", Body=b"x")["ETag"]
    assert s3.get_object(Bucket=bucket, Key="k", IfMatch=etag)["Body"].read() == b"x"
    refused(s3.get_object, 412, "PreconditionFailed", Bucket=bucket, Key="k", IfMatch='"other"')
    refused(s3.get_object, 304, "304", Bucket=bucket, Key="k", IfNoneMatch=etag)
    refused(s3.get_object, 304, "304", Bucket=bucket, Key="k", IfModifiedSince="2040-01-01")
    refused(s3.get_object, 412, "PreconditionFailed", Bucket=bucket, Key="k", IfUnmodifiedSince="1994-01-01")
    assert s3.head_object(Bucket=bucket, Key="k", IfMatch=etag, IfUnmodifiedSince="1994-01-01")["ETag"] == etag


def test_write_preconditions(s3: Any, bucket: str) -> None:
    refused(s3.put_object, 404, "NoSuchKey", Bucket=bucket, Key="k", Body=b"", IfMatch='"x"')
    etag = s3.put_object(Bucket=bucket, Key="k", Body=b"1", IfNoneMatch="*")["ETag"]
    refused(s3.put_object, 412, "PreconditionFailed", Bucket=bucket, Key="k", Body=b"2", IfNoneMatch="*")
    refused(s3.put_object, 412, "PreconditionFailed", Bucket=bucket, Key="k", Body=b"2", IfMatch='"x"')
    s3.put_object(Bucket=bucket, Key="k", Body=b"2", IfMatch=etag)
    refused(s3.delete_object, 412, "PreconditionFailed", Bucket=bucket, Key="k", IfMatch=etag)
    assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == b"2"
    source = {"Bucket": bucket, "Key": "k"}
    refused(
        s3.copy_object, 412, "PreconditionFailed", Bucket=bucket, Key="c", CopySource=source, CopySourceIfMatch=etag
    )
    refused(
        s3.copy_object, 412, "PreconditionFailed", Bucket=bucket, Key="c", CopySource=source, CopySourceIfNoneMatch="*"
    )
    s3.copy_object(Bucket=bucket, Key="c", CopySource=source, IfNoneMatch="*")
    refused(s3.copy_object, 412, "PreconditionFailed", Bucket=bucket, Key="c", CopySource=source, IfNoneMatch="*")
    s3.delete_object(Bucket=bucket, Key="k", IfMatch=s3.head_object(Bucket=bucket, Key="k")["ETag"])
    refused(s3.head_object, 404, "404", Bucket=bucket, Key="k")


def test_copy_and_its_directives(s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="k", Body=BIG, ContentType="text/css", Metadata={"a": "b"})
    source = {"Bucket": bucket, "Key": "k"}
    s3.copy_object(Bucket=bucket, Key="kept", CopySource=source)
    s3.copy_object(
        Bucket=bucket,
        Key="new",
        CopySource=source,
        MetadataDirective="REPLACE",
        Metadata={"c": "d"},
        ContentType="text/html",
    )
    kept, new = s3.get_object(Bucket=bucket, Key="kept"), s3.get_object(Bucket=bucket, Key="new")
    assert kept["Body"].read() == new["Body"].read() == BIG
    assert (kept["Metadata"], kept["ContentType"]) == ({"a": "b"}, "text/css")
    assert (new["Metadata"], new["ContentType"]) == ({"c": "d"}, "text/html")
    refused(s3.copy_object, 400, "InvalidRequest", Bucket=bucket, Key="k", CopySource=source)
    s3.copy_object(Bucket=bucket, Key="k", CopySource=source, MetadataDirective="REPLACE", Metadata={"self": "1"})
    assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == BIG
    refused(s3.copy_object, 404, "NoSuchKey", Bucket=bucket, Key="x", CopySource={"Bucket": bucket, "Key": "nothing"})
    refused(
        s3.copy_object,
        404,
        "NoSuchBucket",
        Bucket=bucket,
        Key="x",
        CopySource={"Bucket": "no-such-bucket-here", "Key": "k"},
    )
    answer = s3.copy_object(Bucket=bucket, Key="summed", CopySource=source, ChecksumAlgorithm="SHA256")
    assert answer["CopyObjectResult"]["ChecksumSHA256"]


def test_delete_objects(s3: Any, bucket: str) -> None:
    for key in ("a", "b/c", "d"):
        s3.put_object(Bucket=bucket, Key=key, Body=b"")
    etag = s3.head_object(Bucket=bucket, Key="d")["ETag"]
    objects = [
        {"Key": "a"},
        {"Key": "b/c", "VersionId": "null"},
        {"Key": "never"},
        {"Key": "d", "ETag": '"wrong"'},
        {"Key": "d", "VersionId": "v1"},
    ]
    answer = s3.delete_objects(Bucket=bucket, Delete={"Objects": objects}, BypassGovernanceRetention=True)
    assert sorted(item["Key"] for item in answer["Deleted"]) == ["a", "b/c", "never"]
    assert [(item["Code"], item.get("VersionId")) for item in answer["Errors"]] == [
        ("PreconditionFailed", None),
        ("NoSuchVersion", "v1"),
    ]
    assert (
        s3.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": "d", "ETag": etag}], "Quiet": True}).get("Deleted")
        is None
    )
    assert s3.list_objects_v2(Bucket=bucket)["KeyCount"] == 0
    refused(
        s3.delete_objects,
        400,
        "MalformedXML",
        Bucket=bucket,
        Delete={"Objects": [{"Key": f"k{at}"} for at in range(1001)]},
    )


def test_listing_pages(s3: Any, bucket: str) -> None:
    keys = [f"{letter}/{number:02}" for letter in "abc" for number in range(10)] + ["top", "x&<y>", "plus+ space"]
    for key in keys:
        s3.put_object(Bucket=bucket, Key=key, Body=b"")
    for name in ("list_objects", "list_objects_v2"):
        pages = s3.get_paginator(name).paginate(Bucket=bucket, PaginationConfig={"PageSize": 7})
        assert [item["Key"] for page in pages for item in page["Contents"]] == sorted(keys)
    versions = s3.get_paginator("list_object_versions").paginate(Bucket=bucket, PaginationConfig={"PageSize": 7})
    assert [(item["Key"], item["VersionId"], item["IsLatest"]) for page in versions for item in page["Versions"]] == [
        (key, "null", True) for key in sorted(keys)
    ]
    page = s3.list_objects(Bucket=bucket, Delimiter="/", MaxKeys=2)
    assert ([item["Prefix"] for item in page["CommonPrefixes"]], page["NextMarker"], page["IsTruncated"]) == (
        ["a/", "b/"],
        "b/",
        True,
    )
    page = s3.list_objects(Bucket=bucket, Delimiter="/", Marker=page["NextMarker"])
    assert [item["Prefix"] for item in page["CommonPrefixes"]] == ["c/"]
    assert [item["Key"] for item in page["Contents"]] == ["plus+ space", "top", "x&<y>"]
    page = s3.list_objects_v2(Bucket=bucket, Prefix="b/", StartAfter="b/04", FetchOwner=True)
    assert page["KeyCount"] == 5
    assert list(page["Contents"][0]["Owner"]) == ["ID"]
    assert s3.list_objects(Bucket=bucket, MaxKeys=1)["Contents"][0]["Owner"]["DisplayName"] == "admin"
    assert s3.list_objects_v2(Bucket=bucket, MaxKeys=0)["IsTruncated"] is False
    refused(s3.list_objects_v2, 400, "InvalidArgument", Bucket=bucket, ContinuationToken="nonsense!")


def test_buckets(s3: Any, server: Server) -> None:
    name = f"b-{uuid.uuid4().hex[:10]}"
    s3.create_bucket(Bucket=name)
    s3.create_bucket(Bucket=name)
    assert name in [item["Name"] for item in s3.list_buckets()["Buckets"]]
    assert [item["Name"] for item in s3.list_buckets(Prefix=name)["Buckets"]] == [name]
    assert s3.get_bucket_location(Bucket=name)["LocationConstraint"] is None
    assert s3.head_bucket(Bucket=name)["ResponseMetadata"]["HTTPStatusCode"] == 200
    s3.put_object(Bucket=name, Key="k", Body=b"")
    refused(s3.delete_bucket, 409, "BucketNotEmpty", Bucket=name)
    s3.delete_object(Bucket=name, Key="k")
    s3.create_multipart_upload(Bucket=name, Key="open")
    s3.delete_bucket(Bucket=name)
    refused(s3.head_bucket, 404, "404", Bucket=name)
    refused(s3.list_objects_v2, 404, "NoSuchBucket", Bucket=name)
    refused(
        s3.create_bucket,
        400,
        "InvalidLocationConstraint",
        Bucket=name,
        CreateBucketConfiguration={"LocationConstraint": "mars-1"},
    )


def test_get_object_attributes(s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="k", Body=b"abc", ChecksumAlgorithm="SHA256")
    answer = s3.get_object_attributes(
        Bucket=bucket, Key="k", ObjectAttributes=["ETag", "Checksum", "ObjectSize", "StorageClass"]
    )
    assert (answer["ObjectSize"], answer["StorageClass"], answer["ETag"]) == (
        3,
        "STANDARD",
        hashlib.md5(b"abc").hexdigest(),
    )
    assert answer["Checksum"]["ChecksumSHA256"] == "ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0="


def test_overrides_and_versions(s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="k", Body=b"abc")
    answer = s3.get_object(
        Bucket=bucket,
        Key="k",
        ResponseContentType="image/png",
        ResponseContentDisposition="attachment",
        VersionId="null",
    )
    assert (answer["ContentType"], answer["ContentDisposition"]) == ("image/png", "attachment")
    refused(s3.get_object, 404, "NoSuchVersion", Bucket=bucket, Key="k", VersionId="3HL4kqtJlcpXroDTDmJ")
    assert "Status" not in s3.get_bucket_versioning(Bucket=bucket)


def test_what_is_not_built_says_so(s3: Any, bucket: str) -> None:
    refused(s3.put_bucket_policy, 501, "NotImplemented", Bucket=bucket, Policy="{}")
    refused(s3.put_object, 501, "NotImplemented", Bucket=bucket, Key="k", Body=b"", ServerSideEncryption="AES256")
    refused(s3.put_object, 400, "InvalidStorageClass", Bucket=bucket, Key="k", Body=b"", StorageClass="GLACIER")
    refused(s3.put_object, 400, "InvalidStorageClass", Bucket=bucket, Key="k", Body=b"", StorageClass="NONSENSE")
    s3.put_object(Bucket=bucket, Key="plain", Body=b"x")
    encrypted = {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": "k" * 32}
    refused(s3.get_object, 400, "InvalidRequest", Bucket=bucket, Key="plain", **encrypted)
    refused(s3.put_object, 501, "NotImplemented", Bucket=bucket, Key="k", Body=b"", GrantRead="id=1")
    refused(s3.create_multipart_upload, 501, "NotImplemented", Bucket=bucket, Key="k", ServerSideEncryption="aws:kms")
    refused(s3.restore_object, 404, "NoSuchKey", Bucket=bucket, Key="k")
    refused(s3.head_object, 404, "404", Bucket=bucket, Key="k")


def test_expected_bucket_owner(s3: Any, bucket: str) -> None:
    owner = s3.get_bucket_acl(Bucket=bucket)["Owner"]["ID"]
    s3.put_object(Bucket=bucket, Key="k", Body=b"", ExpectedBucketOwner=owner)
    refused(s3.put_object, 403, "AccessDenied", Bucket=bucket, Key="k", Body=b"", ExpectedBucketOwner="0" * 32)
    refused(s3.get_object, 403, "AccessDenied", Bucket=bucket, Key="k", ExpectedBucketOwner="0" * 32)


def test_ranges_of_an_empty_object(s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="k", Body=b"")
    for wanted in ({"PartNumber": 1}, {"Range": "bytes=-8"}, {"Range": f"bytes=-{'9' * 5000}"}):
        for call in (s3.get_object, s3.head_object):
            answer = call(Bucket=bucket, Key="k", **wanted)
            assert "ContentRange" not in answer, wanted
            assert (answer["ContentLength"], answer["ResponseMetadata"]["HTTPStatusCode"]) == (0, 200), wanted
    for wanted in ({"Range": "bytes=0-"}, {"Range": "bytes=-0"}, {"Range": "bytes=0-0"}):
        refused(s3.get_object, 416, "InvalidRange", Bucket=bucket, Key="k", **wanted)


def test_not_modified_has_the_headers_of_the_answer(s3: Any, bucket: str) -> None:
    s3.put_object(
        Bucket=bucket,
        Key="k",
        Body=b"x",
        CacheControl="max-age=9",
        Expires="Thu, 01 Jan 2037 00:00:00 GMT",
        ContentLanguage="de",
    )
    full = s3.get_object(Bucket=bucket, Key="k")["ResponseMetadata"]["HTTPHeaders"]
    for call in (s3.get_object, s3.head_object):
        error = refused(call, 304, "304", Bucket=bucket, Key="k", IfNoneMatch=full["etag"])
        headers = error.response["ResponseMetadata"]["HTTPHeaders"]
        for name in ("etag", "last-modified", "cache-control", "expires"):
            assert headers[name] == full[name], name
        assert "content-length" not in headers
        assert "content-language" not in headers


def test_overrides_take_latin_1(s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="k", Body=b"x")
    name = 'attachment; filename="Grüße.txt"'
    answer = s3.get_object(Bucket=bucket, Key="k", ResponseContentDisposition=name)
    assert answer["ContentDisposition"] == name
    for bad in ("a\x07b", "a\x7fb", "a\x85b", "snow \u2603"):
        refused(s3.get_object, 400, "InvalidArgument", Bucket=bucket, Key="k", ResponseContentDisposition=bad)


def test_a_thousand_long_keys_are_deleted_at_once(server: Server, s3: Any, bucket: str) -> None:
    """As clients send them that write every character as a reference: over 5 MiB."""
    keys = [f"{number:04}{'é' * 510}" for number in range(1000)]
    for key in (keys[0], keys[-1]):
        s3.put_object(Bucket=bucket, Key=key, Body=b"")
    referred = ["".join(f"&#x{ord(letter):08x};" for letter in key) for key in keys]
    listed = "".join(f"<Object><Key>{key}</Key><VersionId></VersionId></Object>" for key in referred)
    document = f"<Delete>{listed}</Delete>".encode()
    assert len(document) > 5 * 1024 * 1024

    def replaced(request: Any, **_: Any) -> None:
        request.data = document
        for name in ("x-amz-checksum-crc32", "x-amz-sdk-checksum-algorithm"):
            del request.headers[name]
        request.headers["Content-MD5"] = base64.b64encode(hashlib.md5(document).digest()).decode()

    client = server.client(request_checksum_calculation="when_required")
    client.meta.events.register("before-sign.s3.DeleteObjects", replaced)
    answer = client.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": "k"}]})
    assert "Errors" not in answer
    assert len(answer["Deleted"]) == 1000
    assert all("VersionId" not in entry for entry in answer["Deleted"])
    assert "Contents" not in s3.list_objects_v2(Bucket=bucket)
