"""Presigned requests whose headers stand in the query, where SDKs move them."""

from __future__ import annotations

import base64
import hashlib
import uuid
import zlib
from typing import TYPE_CHECKING
from urllib.parse import quote, urlencode

import pytest
import requests
from botocore.auth import S3SigV4Auth, S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

if TYPE_CHECKING:
    from tests.support import Server

DATA = b"presigned" * 100
NOTHING = {"x-amz-checksum-crc32": "AAAAAA==", "x-amz-sdk-checksum-algorithm": "CRC32"}
"""What JavaScript's SDK (version 3) adds to each PutObject and UploadPart that it presigns."""


@pytest.fixture
def bucket(server: Server) -> str:
    name = f"presigned-{uuid.uuid4().hex[:10]}"
    server.client().create_bucket(Bucket=name)
    server.client().put_object(Bucket=name, Key="source", Body=b"from the source", Metadata={"of": "source"})
    return name


def presign(
    server: Server,
    method: str,
    path: str,
    query: dict[str, str] | list[tuple[str, str]],
    *,
    headers: dict[str, str] | None = None,
) -> str:
    """A URL with these parameters, signed by botocore; only `headers` are headers."""
    credentials = Credentials(server.access_key, server.secret_key)
    url = f"{server.endpoint}{path}?{urlencode(query, quote_via=quote)}"
    request = AWSRequest(method, url, headers=headers or {})
    S3SigV4QueryAuth(credentials, "s3", "us-east-1", expires=60).add_auth(request)
    return str(request.url)


def code_of(answer: requests.Response) -> tuple[int, str]:
    return answer.status_code, answer.text.partition("<Code>")[2].partition("</Code>")[0]


def test_a_presigned_copy_copies(server: Server, bucket: str) -> None:
    query = {"x-amz-copy-source": f"{bucket}/source", "x-id": "CopyObject"}
    answer = requests.put(presign(server, "PUT", f"/{bucket}/copy", query), timeout=10)
    assert (answer.status_code, "CopyObjectResult" in answer.text) == (200, True)
    found = server.client().get_object(Bucket=bucket, Key="copy")
    assert (found["Body"].read(), found["Metadata"]) == (b"from the source", {"of": "source"})


def test_a_presigned_part_is_copied(server: Server, bucket: str) -> None:
    client = server.client()
    upload = client.create_multipart_upload(Bucket=bucket, Key="parts")["UploadId"]
    query = {
        "partNumber": "1",
        "uploadId": upload,
        "X-Amz-Copy-Source": f"{bucket}/source",
        "x-amz-copy-source-range": "bytes=5-9",
    }
    answer = requests.put(presign(server, "PUT", f"/{bucket}/parts", query), timeout=10)
    assert (answer.status_code, "CopyPartResult" in answer.text) == (200, True)
    assert client.list_parts(Bucket=bucket, Key="parts", UploadId=upload)["Parts"][0]["Size"] == 5


@pytest.mark.parametrize("as_sent", ["x-amz-{}", "X-Amz-{}"])
def test_headers_in_the_query_count(server: Server, bucket: str, as_sent: str) -> None:
    wanted = {"acl": "public-read", "meta-a": "größe", "tagging": "a=b&c=d", "storage-class": "STANDARD"}
    query = {as_sent.format(name): value for name, value in wanted.items()}
    url = presign(server, "PUT", f"/{bucket}/key", query | NOTHING | {"X-Amz-Content-Sha256": "UNSIGNED-PAYLOAD"})
    assert requests.put(url, data=DATA, timeout=10).status_code == 200
    client = server.client()
    assert requests.get(f"{server.endpoint}/{bucket}/key", timeout=10).content == DATA
    assert client.get_object_tagging(Bucket=bucket, Key="key")["TagSet"] == [
        {"Key": "a", "Value": "b"},
        {"Key": "c", "Value": "d"},
    ]
    raw = server.raw("GET", f"/{bucket}/key")[1]["x-amz-meta-a"]
    assert raw.encode("latin-1").decode() == "größe"


def test_the_checksum_of_nothing_stands_for_none(server: Server, bucket: str) -> None:
    client = server.client()
    assert requests.put(presign(server, "PUT", f"/{bucket}/key", NOTHING), data=DATA, timeout=10).status_code == 200
    found = client.head_object(Bucket=bucket, Key="key", ChecksumMode="ENABLED")
    assert found["ChecksumCRC32"] == base64.b64encode(zlib.crc32(DATA).to_bytes(4, "big")).decode()
    assert requests.put(presign(server, "PUT", f"/{bucket}/key", NOTHING), data=b"", timeout=10).status_code == 200
    upload = client.create_multipart_upload(Bucket=bucket, Key="parts")["UploadId"]
    part = {"partNumber": "1", "uploadId": upload, **NOTHING}
    assert requests.put(presign(server, "PUT", f"/{bucket}/parts", part), data=DATA, timeout=10).status_code == 200
    right = base64.b64encode(zlib.crc32(DATA).to_bytes(4, "big")).decode()
    url = presign(server, "PUT", f"/{bucket}/key", NOTHING | {"x-amz-checksum-crc32": right})
    assert requests.put(url, data=DATA, timeout=10).status_code == 200
    assert code_of(requests.put(url, data=b"other", timeout=10)) == (400, "BadDigest")


def test_what_is_said_twice_is_the_same(server: Server, bucket: str) -> None:
    acl = {"x-amz-acl": "public-read"}
    for signed in ({}, acl):  # PHP's SDK signs the header beside the parameter, JavaScript's the parameter alone
        url = presign(server, "PUT", f"/{bucket}/key", acl, headers=dict(signed))
        assert requests.put(url, data=DATA, headers=acl, timeout=10).status_code == 200
    url = presign(server, "PUT", f"/{bucket}/key", acl, headers={"x-amz-acl": "private"})
    answer = requests.put(url, data=b"other", headers={"x-amz-acl": "private"}, timeout=10)
    assert code_of(answer) == (400, "InvalidArgument")
    url = presign(server, "PUT", f"/{bucket}/key", acl)
    answer = requests.put(url, data=b"other", headers={"x-amz-acl": "private"}, timeout=10)
    assert code_of(answer) == (403, "AccessDenied")
    url = presign(server, "PUT", f"/{bucket}/key", [("x-amz-acl", "private"), ("X-Amz-Acl", "public-read")])
    assert code_of(requests.put(url, data=b"other", timeout=10)) == (400, "InvalidArgument")
    assert server.client().get_object(Bucket=bucket, Key="key")["Body"].read() == DATA


def test_what_is_not_built_is_refused_in_the_query_too(server: Server, bucket: str) -> None:
    for name, value in (
        ("x-amz-server-side-encryption", "AES256"),
        ("x-amz-object-lock-mode", "GOVERNANCE"),
        ("x-amz-grant-read", 'id="x"'),
        ("x-amz-website-redirect-location", "/"),
    ):
        answer = requests.put(presign(server, "PUT", f"/{bucket}/key", {name: value}), data=DATA, timeout=10)
        assert code_of(answer) == (501, "NotImplemented"), name


def test_a_parameter_that_no_header_can_be(server: Server, bucket: str) -> None:
    for name, value in (("x-amz-meta-a", "b\r\nx-evil: 1"), ("x-amz-meta-a b", "c"), ("x-amz-meta-a\r\nx-evil", "1")):
        answer = requests.put(presign(server, "PUT", f"/{bucket}/key", {name: value}), data=DATA, timeout=10)
        assert code_of(answer) == (400, "InvalidArgument"), name


def test_presigned_version_2_with_headers_in_the_query(server: Server, bucket: str) -> None:
    """As boto3 makes them, which moves Content-Type and Content-MD5 as well."""
    old = server.client(signature_version="s3")
    put = {
        "Bucket": bucket, "Key": "key", "Metadata": {"a": "b"}, "ACL": "public-read", "ContentType": "text/x-test",
        "ContentMD5": base64.b64encode(hashlib.md5(DATA).digest()).decode(),
    }  # fmt: skip
    url = old.generate_presigned_url("put_object", put)
    assert "x-amz-meta-a=b" in url
    assert requests.put(url, data=DATA, timeout=10).status_code == 200
    answer = requests.get(f"{server.endpoint}/{bucket}/key", timeout=10)
    assert (answer.content, answer.headers["Content-Type"], answer.headers["x-amz-meta-a"]) == (
        DATA,
        "text/x-test",
        "b",
    )
    assert code_of(requests.put(url, data=b"other", timeout=10)) == (400, "BadDigest")
    assert code_of(requests.put(url.replace("public-read", "private"), data=DATA, timeout=10))[0] == 403
    copy = {"Bucket": bucket, "Key": "copy", "CopySource": f"{bucket}/source"}
    assert requests.put(old.generate_presigned_url("copy_object", copy), timeout=10).status_code == 200
    assert server.client().get_object(Bucket=bucket, Key="copy")["Body"].read() == b"from the source"


def test_a_parameter_that_nothing_signs_does_not_count(server: Server, bucket: str) -> None:
    """The header signature of Version 2 covers no such parameter."""
    client = server.client(signature_version="s3")
    client.meta.events.register(
        "before-sign.s3.PutObject",
        lambda request, **_: setattr(request, "url", f"{request.url}?x-amz-acl=public-read"),
    )
    with pytest.raises(client.exceptions.ClientError, match="AccessDenied"):
        client.put_object(Bucket=bucket, Key="key", Body=DATA)


def test_a_signed_header_request_with_headers_in_its_query(server: Server, bucket: str) -> None:
    request = AWSRequest("PUT", f"{server.endpoint}/{bucket}/key?x-amz-copy-source={bucket}%2Fsource")
    S3SigV4Auth(Credentials(server.access_key, server.secret_key), "s3", "us-east-1").add_auth(request)
    assert requests.put(str(request.url), headers=dict(request.headers), timeout=10).status_code == 200
    assert server.client().get_object(Bucket=bucket, Key="key")["Body"].read() == b"from the source"


def test_version_2_of_calls_on_a_bucket(server: Server, bucket: str) -> None:
    """As botocore signs them in path style: the resource ends with a slash that the path has not."""
    old = server.client(signature_version="s3")
    name = "signed-by-version-2"
    old.create_bucket(Bucket=name)
    old.head_bucket(Bucket=name)
    old.get_bucket_location(Bucket=name)
    old.put_object(Bucket=name, Key="key", Body=DATA)
    assert [found["Key"] for found in old.list_objects(Bucket=name)["Contents"]] == ["key"]
    assert requests.get(old.generate_presigned_url("list_objects", {"Bucket": name}), timeout=10).status_code == 200
    old.delete_object(Bucket=name, Key="key")
    old.delete_bucket(Bucket=name)
    wrong = server.client(secret_key="wrong", signature_version="s3")
    with pytest.raises(wrong.exceptions.ClientError, match="SignatureDoesNotMatch"):
        wrong.get_bucket_acl(Bucket=bucket)


@pytest.mark.parametrize("names", ["host;host", "host" + ";" * 2, "host;\u20ac", "host;\xe9"])
def test_signed_headers_are_named_in_ascii_and_once(server: Server, bucket: str, names: str) -> None:
    """A name given thousands of times would be copied and hashed as often, before it is known who sent the request."""
    url = presign(server, "GET", f"/{bucket}/source", {}).replace("SignedHeaders=host", f"SignedHeaders={quote(names)}")
    assert code_of(requests.get(url, timeout=10)) == (400, "AuthorizationQueryParametersError")
    request = AWSRequest("GET", f"{server.endpoint}/{bucket}/source")
    S3SigV4Auth(Credentials(server.access_key, server.secret_key), "s3", "us-east-1").add_auth(request)
    authorization = request.headers["Authorization"].replace("SignedHeaders=host", f"SignedHeaders={names}")
    headers = {**dict(request.headers), "Authorization": authorization.encode()}
    answer = requests.get(str(request.url), headers=headers, timeout=10)
    assert code_of(answer) == (400, "AuthorizationHeaderMalformed")
