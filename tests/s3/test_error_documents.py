"""Error documents as the SDKs read them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import boto3
import defusedxml.ElementTree
from botocore.config import Config
from botocore.exceptions import ClientError

from tests.s3.test_objects import bucket, refused, s3

if TYPE_CHECKING:
    from tests.support import Server

__all__ = ["bucket", "s3"]


def test_key_and_bucket_are_named(s3: Any, bucket: str) -> None:
    error = refused(s3.get_object, 404, "NoSuchKey", Bucket=bucket, Key="a/ö&").response
    assert error["Error"]["Message"] == "The specified key does not exist."
    assert (error["Error"]["BucketName"], error["Error"]["Key"]) == (bucket, "a/ö&")
    assert error["Error"]["Resource"] == f"/{bucket}/a/ö&"
    assert error["ResponseMetadata"]["RequestId"]
    assert error["ResponseMetadata"]["HostId"]
    error = refused(s3.list_objects_v2, 404, "NoSuchBucket", Bucket="no-such-bucket").response
    assert error["Error"]["Message"] == "The specified bucket does not exist"
    assert error["Error"]["BucketName"] == "no-such-bucket"
    error = refused(s3.abort_multipart_upload, 404, "NoSuchUpload", Bucket=bucket, Key="k", UploadId="0" * 32).response
    assert error["Error"]["UploadId"] == "0" * 32
    s3.put_object(Bucket=bucket, Key="k", Body=b"x")
    error = refused(s3.get_object, 412, "PreconditionFailed", Bucket=bucket, Key="k", IfMatch='"x"').response
    assert error["Error"]["Condition"] == "If-Match"
    error = refused(s3.get_object, 416, "InvalidRange", Bucket=bucket, Key="k", Range="bytes=9-").response
    assert (error["Error"]["ActualObjectSize"], error["Error"]["RangeRequested"]) == ("1", "bytes=9-")


def test_what_is_wrong_with_a_part_is_told(s3: Any, bucket: str) -> None:
    upload_id = s3.create_multipart_upload(Bucket=bucket, Key="k")["UploadId"]
    etags = [
        s3.upload_part(Bucket=bucket, Key="k", UploadId=upload_id, PartNumber=number, Body=b"x")["ETag"]
        for number in (1, 2)
    ]
    parts = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(etags, 1)]
    words = {"Bucket": bucket, "Key": "k", "UploadId": upload_id}
    told = refused(
        s3.complete_multipart_upload, 400, "EntityTooSmall", MultipartUpload={"Parts": parts}, **words
    ).response["Error"]
    assert (told["ProposedSize"], told["MinSizeAllowed"], told["PartNumber"]) == ("1", "5242880", "1")
    parts[1]["ETag"] = '"0"'
    told = refused(
        s3.complete_multipart_upload, 400, "InvalidPart", MultipartUpload={"Parts": parts}, **words
    ).response["Error"]
    assert (told["UploadId"], told["PartNumber"], told["ETag"]) == (upload_id, "2", "0")


def test_the_identifiers_are_those_of_the_headers(server: Server, bucket: str) -> None:
    _, headers, body = server.raw("GET", f"/{bucket}/k")
    document = defusedxml.ElementTree.fromstring(body)
    assert document is not None
    assert document.findtext("RequestId") == headers["x-amz-request-id"]
    assert document.findtext("HostId") == headers["x-amz-id-2"]
    assert document.findtext("Message") == "Access Denied"


def test_a_wrong_method_is_told_the_right_ones(server: Server, bucket: str) -> None:
    for path, method, allowed in (
        (f"/{bucket}?uploads", "DELETE", {"GET"}),
        (f"/{bucket}/k?uploads", "PUT", {"POST"}),
        ("/", "PUT", {"GET"}),
        (f"/{bucket}/k", "PATCH", {"DELETE", "GET", "HEAD", "PUT"}),
    ):
        status, headers, _ = server.raw(method, path)
        assert (status, set(headers["allow"].split(", "))) == (405, allowed), (method, path)


def test_a_wrong_region_is_explained(server: Server, bucket: str) -> None:
    client = boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        region_name="eu-west-1",
        config=Config(signature_version="s3v4", retries={"max_attempts": 1}),
    )
    redirected: list[dict[str, Any]] = []
    client.meta.events.register(
        "needs-retry.s3.*", lambda response, **_: redirected.append(response[1]) if response else None
    )
    # boto3 reads the region out of the answer, signs again, and succeeds.
    assert client.list_objects_v2(Bucket=bucket)["KeyCount"] == 0
    error = redirected[0]["Error"]
    assert error["Code"] == "AuthorizationHeaderMalformed"
    assert error["Message"] == (
        "The authorization header is malformed; the region 'eu-west-1' is wrong; expecting 'us-east-1'"
    )
    assert error["Region"] == "us-east-1"
    assert redirected[0]["ResponseMetadata"]["HTTPHeaders"]["x-amz-bucket-region"] == "us-east-1"


def test_a_wrong_location_is_explained(s3: Any) -> None:
    place = {"LocationConstraint": "eu-west-1"}
    error = refused(
        s3.create_bucket,
        400,
        "IllegalLocationConstraintException",
        Bucket="elsewhere-bucket",
        CreateBucketConfiguration=place,
    ).response["Error"]
    assert error["Message"].startswith(
        "The eu-west-1 location constraint is incompatible for the region specific endpoint"
    )
    assert "us-east-1" in error["Message"]


def test_head_of_a_refused_bucket_says_its_region(server: Server, bucket: str) -> None:
    status, headers, body = server.raw("HEAD", f"/{bucket}")
    assert (status, headers["x-amz-bucket-region"], body) == (403, "us-east-1", b"")
    status, headers, _ = server.raw("HEAD", "/no-such-bucket-here")
    assert status in {403, 404}


def test_no_message_names_what_is_inside(s3: Any, server: Server, bucket: str) -> None:
    calls: list[tuple[Any, dict[str, Any]]] = [
        (s3.get_object, {"Bucket": "nope-bucket", "Key": "k"}),
        (s3.delete_bucket, {"Bucket": "nope-bucket"}),
        (s3.get_bucket_tagging, {"Bucket": bucket}),
        (s3.get_bucket_lifecycle_configuration, {"Bucket": bucket}),
        (s3.restore_object, {"Bucket": bucket, "Key": "nope", "RestoreRequest": {"Days": 1}}),
        (server.client(access_key="A" * 20).list_buckets, {}),
        (server.client(secret_key="x" * 40).list_buckets, {}),
    ]
    for call, arguments in calls:
        try:
            call(**arguments)
        except ClientError as error:
            text = str(error.response)
            assert "`" not in text
            assert "stratum " not in text
