"""The table of calls: against the model of S3 that botocore carries, and against clients that ask for more than a call knows."""

from __future__ import annotations

import itertools
import json
import uuid
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

import botocore.session
import pytest
import requests
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from stratum import metrics
from stratum.s3 import headers, routes
from tests.s3.test_access import add_user

if TYPE_CHECKING:
    from tests.support import Server

_MODEL = botocore.session.Session().get_service_model("s3")
"""Of a session of its own: clients change the URIs in theirs."""
_ELSEWHERE = {"WriteGetObjectResponse", "ListDirectoryBuckets"}
"""Calls to another host, and one that is told from ListBuckets by its host alone."""


def _calls() -> dict[str, tuple[str, str, str]]:
    """Each operation of S3 and the route that its method and URI name."""
    found = {}
    for name in sorted(set(_MODEL.operation_names) - _ELSEWHERE):
        http = _MODEL.operation_model(name).http
        path, _, query = http["requestUri"].partition("?")
        resource = routes.OBJECT if "{Key+}" in path else routes.BUCKET if "{Bucket}" in path else routes.SERVICE
        sub = next((key for key, _ in parse_qsl(query, keep_blank_values=True)), "")
        if name in {"UploadPart", "CompleteMultipartUpload", "AbortMultipartUpload", "ListParts"}:
            sub = "uploadId"
        found[name] = (http["method"], resource, {"CopyObject": " copy", "UploadPartCopy": " copy part"}.get(name, sub))
    return found


@pytest.mark.parametrize("name", sorted(_calls()))
def test_every_call_of_s3_has_a_route(name: str) -> None:
    """It honours or refuses each of the call's parameters and headers."""
    route = routes.TABLE[_calls()[name]]
    shape = _MODEL.operation_model(name).input_shape
    for member in shape.members.values() if shape is not None else ():
        where, as_sent = member.serialization.get("location"), member.serialization.get("name", "")
        if where == "querystring":
            assert as_sent in routes.SUBRESOURCES | headers.PARAMETERS | {"id"} | set(route.parameters), as_sent
        elif where in {"header", "headers"} and as_sent.lower().startswith(("x-amz-", "if-")):
            assert headers.is_known(as_sent.lower() + ("a" if where == "headers" else "")), as_sent


def test_every_operation_that_is_counted_has_a_route() -> None:
    built = {route.operation for route in routes.TABLE.values()}
    assert set(metrics.S3_OPERATIONS) <= built | {"Explain", "Refused"}


def test_what_a_route_honours_is_known() -> None:
    for route in routes.TABLE.values():
        assert all(headers.is_known(name) for name in route.headers), route.operation


@pytest.fixture(scope="module")
def bucket(server: Server) -> str:
    name = f"routes-{uuid.uuid4().hex[:10]}"
    client = server.client()
    client.create_bucket(Bucket=name)
    client.put_object(Bucket=name, Key="kept", Body=b"kept")
    return name


def send(
    server: Server,
    method: str,
    path: str,
    *,
    headers: dict[str, str] | None = None,
    data: bytes = b"",
    keys: tuple[str, str] | None = None,
) -> requests.Response:
    """A request signed by botocore."""
    sent = AWSRequest(method, server.endpoint + path, data=data, headers=headers or {})
    S3SigV4Auth(Credentials(*(keys or (server.access_key, server.secret_key))), "s3", "us-east-1").add_auth(sent)
    return requests.request(method, str(sent.url), data=data, headers=dict(sent.headers), timeout=20)


def code_of(answer: requests.Response) -> tuple[int, str]:
    return answer.status_code, answer.text.partition("<Code>")[2].partition("</Code>")[0]


_PUT_REFUSED = [
    ("?partNumber=1", {}, 400, "InvalidArgument"),
    ("?uploadId=x", {}, 400, "InvalidArgument"),
    ("?partNumber=1", {"x-amz-copy-source": "/{bucket}/kept"}, 400, "InvalidArgument"),
    ("?versionId=null", {}, 400, "InvalidArgument"),
    ("?response-content-type=a", {}, 400, "InvalidArgument"),
    ("?acl&tagging", {}, 400, "InvalidArgument"),
    ("?policy", {}, 405, "MethodNotAllowed"),
    ("?delete", {}, 405, "MethodNotAllowed"),
    ("?renameObject", {}, 501, "NotImplemented"),
    ("?retention", {}, 501, "NotImplemented"),
    ("", {"Content-Range": "bytes 0-3/10"}, 501, "NotImplemented"),
    ("", {"If-Modified-Since": "Sat, 01 Jan 2022 00:00:00 GMT"}, 501, "NotImplemented"),
    ("", {"x-amz-if-match-size": "7"}, 501, "NotImplemented"),
    ("", {"x-amz-if-match-last-modified-time": "Sat, 01 Jan 2022 00:00:00 GMT"}, 501, "NotImplemented"),
    ("", {"x-amz-if-match-initiated-time": "Sat, 01 Jan 2022 00:00:00 GMT"}, 501, "NotImplemented"),
    ("", {"x-amz-copy-source-range": "bytes=0-1"}, 400, "InvalidArgument"),
    ("", {"x-amz-copy-source-if-match": "x"}, 400, "InvalidArgument"),
    ("", {"x-amz-metadata-directive": "REPLACE"}, 400, "InvalidArgument"),
    ("", {"x-amz-mp-object-size": "1"}, 400, "InvalidArgument"),
    ("", {"x-amz-checksum-type": "COMPOSITE"}, 400, "InvalidRequest"),
    ("", {"x-amz-checksum-nonsense": "AAAA"}, 400, "InvalidRequest"),
    ("", {"x-amz-checksum-sha512": "AAAA"}, 400, "BadDigest"),
    ("", {"x-amz-checksum-algorithm": "NONSENSE"}, 400, "InvalidRequest"),
    ("", {"x-amz-sdk-checksum-algorithm": "NONSENSE"}, 400, "InvalidRequest"),
    ("", {"x-amz-write-offset-bytes": "0"}, 501, "NotImplemented"),
    ("", {"x-amz-server-side-encryption-customer-key-MD5": "x"}, 501, "NotImplemented"),
    ("", {"x-amz-object-lock-event-hold": "ON"}, 501, "NotImplemented"),
    ("", {"x-amz-security-token": "token"}, 400, "InvalidToken"),
]  # fmt: skip


@pytest.mark.parametrize(("query", "more", "status", "code"), _PUT_REFUSED)
def test_a_put_that_asks_for_more_replaces_nothing(
    server: Server, bucket: str, query: str, more: dict[str, str], status: int, code: str
) -> None:
    more = {name: value.format(bucket=bucket) for name, value in more.items()}
    answer = send(server, "PUT", f"/{bucket}/kept{query}", headers=more, data=b"replaced")
    assert code_of(answer) == (status, code)
    assert server.client().get_object(Bucket=bucket, Key="kept")["Body"].read() == b"kept"


@pytest.mark.parametrize(
    ("method", "path", "more", "status"),
    [
        ("GET", "/kept", {"x-amz-copy-source": "a/b"}, 400),
        ("GET", "/kept?uploadId=x&partNumber=1", {}, 400),
        ("GET", "/kept?max-parts=3", {}, 400),
        ("GET", "/kept", {"x-amz-server-side-encryption": "AES256"}, 400),
        ("HEAD", "/kept", {"x-amz-checksum-crc32": "AAAAAA=="}, 400),
        ("GET", "?prefix=a", {"If-Match": "x"}, 501),
        ("GET", "?versions&marker=a", {}, 400),
        ("POST", "/kept?restore&versionId=none", {}, 404),
        ("GET", "?list-type=2&marker=a", {}, 400),
        ("GET", "", {"x-amz-optional-object-attributes": "RestoreStatus"}, 501),
        ("DELETE", "/kept", {"If-None-Match": "*"}, 501),
        ("DELETE", "/kept", {"x-amz-mfa": "1 2"}, 501),
        ("DELETE", "/kept?uploadId=x&versionId=null", {}, 400),
        ("DELETE", "", {"If-Match": "x"}, 501),
        ("POST", "/kept?uploads", {"If-None-Match": "*"}, 501),
        ("POST", "/kept?uploads&partNumber=1", {}, 400),
        ("POST", "/kept?uploadId=x", {"x-amz-meta-a": "b"}, 400),
        ("POST", "/kept?uploadId=x", {"x-amz-checksum-nonsense": "b"}, 400),
        ("POST", "/kept?uploadId=x", {"x-amz-sdk-checksum-algorithm": "NONSENSE"}, 400),
        ("PUT", "/kept?acl", {"x-amz-acl": "private", "x-amz-copy-source": "a/b"}, 400),
        ("PUT", "/copy", {"x-amz-copy-source": "/{bucket}/kept", "x-amz-checksum-md5": "AAAA"}, 400),
        ("PUT", "/copy", {"x-amz-copy-source": "/{bucket}/kept", "x-amz-checksum-algorithm": "NONSENSE"}, 400),
        ("PUT", "/copy", {"x-amz-copy-source": "/{bucket}/kept", "x-amz-trailer": "x-amz-checksum-crc32"}, 400),
        ("PUT", "/part?uploadId=x&partNumber=1", {"x-amz-meta-a": "b"}, 400),
        ("PUT", "/part?uploadId=x&partNumber=1", {"x-amz-checksum-nonsense": "AAAA"}, 400),
        ("PUT", "/part?uploadId=x&partNumber=1", {"If-Match": "b"}, 501),
        ("PUT", "/part?uploadId=x", {"x-amz-copy-source": "/{bucket}/kept"}, 400),
    ],
)  # fmt: skip
def test_no_call_ignores_what_s3_knows(
    server: Server, bucket: str, method: str, path: str, more: dict[str, str], status: int
) -> None:
    more = {name: value.format(bucket=bucket) for name, value in more.items()}
    assert send(server, method, f"/{bucket}{path}", headers=more).status_code == status
    client = server.client()
    assert client.get_object(Bucket=bucket, Key="kept")["Body"].read() == b"kept"
    assert [item["Key"] for item in client.list_objects_v2(Bucket=bucket)["Contents"]] == ["kept"]


def test_what_s3_does_not_know_and_what_asks_for_nothing_is_no_hindrance(server: Server, bucket: str) -> None:
    ignored = {
        "x-amz-user-agent": "aws-sdk-js/3", "amz-sdk-invocation-id": "x", "amz-sdk-request": "attempt=1", "x-amz-unheard-of": "x",
        "x-amz-request-payer": "requester", "x-amz-object-lock-legal-hold": "OFF", "x-amz-checksum-type": "FULL_OBJECT",
        "x-amz-server-side-encryption-bucket-key-enabled": "false", "x-amz-checksum-algorithm": "CRC32C",
    }  # fmt: skip
    answer = send(server, "PUT", f"/{bucket}/other?x-id=PutObject&unknown=1", headers=ignored, data=b"x")
    assert (answer.status_code, "x-amz-checksum-crc32c" in answer.headers) == (200, True)
    assert send(server, "GET", f"/{bucket}/other?id=5&v=2", headers={"If-None-Match": "x"}).content == b"x"
    assert send(server, "GET", f"/{bucket}", headers={"If-None-Match": "x"}).status_code == 200
    harmless = {"x-amz-bypass-governance-retention": "true"}
    assert send(server, "DELETE", f"/{bucket}/other", headers=harmless).status_code == 204
    wanted = {"x-amz-bucket-object-lock-enabled": "false", "x-amz-object-ownership": "ObjectWriter"}
    assert send(server, "PUT", f"/{bucket}-second", headers=wanted).status_code == 200
    assert send(server, "DELETE", f"/{bucket}-second").status_code == 204
    for name, value in (
        ("x-amz-bucket-object-lock-enabled", "true"),
        ("x-amz-object-ownership", "BucketOwnerEnforced"),
    ):
        answer = send(server, "PUT", f"/{bucket}-third", headers={name: value})
        assert code_of(answer) == (501, "NotImplemented")


def test_buckets_of_a_region(server: Server, bucket: str) -> None:
    client = server.client()
    assert bucket in [item["Name"] for item in client.list_buckets(BucketRegion="us-east-1")["Buckets"]]
    assert client.list_buckets(BucketRegion="eu-west-1")["Buckets"] == []


# -- who may ask ------------------------------------------------------------------------------------------------------

_DOCUMENT = b"<Delete>" + b"<Object><Key>kept</Key></Object>" * 3 + b"</Delete>"


def _request_of(route: tuple[str, str, str], bucket: str, key: str) -> tuple[str, str, dict[str, str]]:
    """Method, path and headers of a call."""
    method, resource, sub = route
    path = {routes.SERVICE: "/", routes.BUCKET: f"/{bucket}", routes.OBJECT: f"/{bucket}/{key}"}[resource]
    source = {"x-amz-copy-source": f"/{bucket}/kept"} if sub.startswith(" ") else {}
    query = {
        "list-type": "list-type=2",
        "uploadId": "uploadId=x",
        " copy": "",
        " copy part": "uploadId=x&partNumber=1",
    }.get(sub, sub)
    if (method, sub) == ("PUT", "uploadId"):
        query += "&partNumber=1"
    return method, f"{path}?{query}" if query else path, source


@pytest.mark.parametrize("route", sorted(set(routes.TABLE) - {("GET", "service", ""), ("PUT", "bucket", "")}))
def test_a_stranger_learns_nothing(server: Server, bucket: str, route: tuple[str, str, str]) -> None:
    """Neither whether a key is there nor what is built, from whichever call, with a document or without."""
    facts = _strangers(server)
    versions = ("", "versionId=none") if "versionId" in routes.TABLE[route].parameters else ("",)
    asked = itertools.product(("kept", "absent"), (b"", _DOCUMENT), (True, False), versions)
    for key, data, anonymous, version in asked:
        method, path, more = _request_of(route, bucket, key)
        if version:
            path += f"{'&' if '?' in path else '?'}{version}"
        if anonymous:
            answer = requests.request(method, server.endpoint + path, data=data, headers=more, timeout=20)
        else:
            answer = send(server, method, path, headers=more, data=data, keys=facts)
        assert answer.status_code == 403, (route, key, data, anonymous, answer.text)
        if method != "HEAD":
            assert code_of(answer)[1] == "AccessDenied", (route, key, data, anonymous)
    assert server.client().get_object(Bucket=bucket, Key="kept")["Body"].read() == b"kept"


def test_a_stranger_does_not_learn_which_sources_there_are(server: Server, bucket: str) -> None:
    keys = _strangers(server)
    assert send(server, "PUT", f"/{bucket}-theirs", keys=keys).status_code == 200
    for key in ("kept", "absent"):
        source = {"x-amz-copy-source": f"/{bucket}/{key}", "x-amz-copy-source-if-match": "none"}
        answer = send(server, "PUT", f"/{bucket}-theirs/copy", headers=source, keys=keys)
        assert code_of(answer) == (403, "AccessDenied")


_USERS: dict[str, tuple[str, str]] = {}


def _strangers(server: Server) -> tuple[str, str]:
    """The keys of a user who owns nothing; one a server."""
    if server.endpoint not in _USERS:
        _, facts = add_user(server)
        _USERS[server.endpoint] = (facts["access_key"], facts["secret_key"])
    return _USERS[server.endpoint]


@pytest.mark.parametrize(
    "path", ["?delete", "?tagging", "?lifecycle", "?acl", "/kept?tagging", "/kept?acl", "/kept?uploadId=x"]
)
def test_a_stranger_is_refused_before_the_document_comes(server: Server, bucket: str, path: str) -> None:
    """Nothing of the body is sent, and the answer is there."""
    method = "POST" if path in {"?delete", "/kept?uploadId=x"} else "PUT"
    sent = {"Content-Length": "2000000", "Expect": "100-continue", "Content-Type": "application/xml"}
    status, _, body = server.raw(method, f"/{bucket}{path}", headers=sent)
    assert (status, b"AccessDenied" in body) == (403, True)


def test_reading_a_bucket_does_not_include_parts(server: Server, bucket: str) -> None:
    client, shared = server.client(), f"{bucket}-shared"
    client.create_bucket(Bucket=shared, ACL="public-read")
    upload = client.create_multipart_upload(Bucket=shared, Key="k")["UploadId"]
    client.upload_part(Bucket=shared, Key="k", UploadId=upload, PartNumber=1, Body=b"x")
    keys = _strangers(server)
    assert send(server, "GET", f"/{shared}?uploads", keys=keys).status_code == 200
    assert code_of(send(server, "GET", f"/{shared}/k?uploadId={upload}", keys=keys)) == (403, "AccessDenied")
    client.put_bucket_acl(Bucket=shared, ACL="public-read-write")
    assert code_of(send(server, "GET", f"/{shared}/k?uploadId={upload}", keys=keys)) == (403, "AccessDenied")
    theirs = (
        send(server, "POST", f"/{shared}/theirs?uploads", keys=keys).text.partition("<UploadId>")[2].partition("<")[0]
    )
    assert send(server, "GET", f"/{shared}/theirs?uploadId={theirs}", keys=keys).status_code == 200


# -- what is not configured -------------------------------------------------------------------------------------------

_TERRAFORM: list[tuple[str, tuple[str, str] | dict[str, Any]]] = [
    ("head_bucket", {}),
    ("get_bucket_location", {}),
    ("get_bucket_policy", ("NoSuchBucketPolicy", "The bucket policy does not exist")),
    ("get_bucket_acl", {}),
    ("get_bucket_cors", ("NoSuchCORSConfiguration", "The CORS configuration does not exist")),
    ("get_bucket_website", ("NoSuchWebsiteConfiguration", "does not have a website configuration")),
    ("get_bucket_versioning", {}),
    ("get_bucket_accelerate_configuration", {}),
    ("get_bucket_request_payment", {"Payer": "BucketOwner"}),
    ("get_bucket_logging", {}),
    ("get_bucket_lifecycle_configuration", ("NoSuchLifecycleConfiguration", "")),
    ("get_bucket_replication", ("ReplicationConfigurationNotFoundError", "")),
    ("get_bucket_encryption", ("ServerSideEncryptionConfigurationNotFoundError", "encryption configuration was not found")),
    ("get_object_lock_configuration", ("ObjectLockConfigurationNotFoundError", "")),
    ("get_bucket_tagging", ("NoSuchTagSet", "")),
]  # fmt: skip
"""What the provider `aws` of Terraform reads after it made a bucket, in its order, and what it looks for in an error."""
_SCANNERS: list[tuple[str, tuple[str, str] | dict[str, Any]]] = [
    ("get_public_access_block", ("NoSuchPublicAccessBlockConfiguration", "")),
    ("get_bucket_policy_status", ("NoSuchBucketPolicy", "")),
    ("get_bucket_ownership_controls", ("OwnershipControlsNotFoundError", "")),
    ("get_bucket_notification_configuration", {}),
    ("list_bucket_analytics_configurations", {"IsTruncated": False}),
    ("list_bucket_inventory_configurations", {"IsTruncated": False}),
    ("list_bucket_metrics_configurations", {"IsTruncated": False}),
    ("list_bucket_intelligent_tiering_configurations", {"IsTruncated": False}),
    ("delete_bucket_policy", {}),
    ("delete_bucket_cors", {}),
    ("delete_bucket_encryption", {}),
    ("delete_bucket_website", {}),
    ("delete_bucket_replication", {}),
    ("delete_bucket_ownership_controls", {}),
    ("delete_public_access_block", {}),
]


@pytest.mark.parametrize(("call", "wanted"), _TERRAFORM + _SCANNERS)
def test_what_is_not_configured_is_said_to_be(
    server: Server, bucket: str, call: str, wanted: tuple[str, str] | dict[str, Any]
) -> None:
    client = server.client()
    if isinstance(wanted, tuple):
        with pytest.raises(client.exceptions.ClientError) as caught:
            getattr(client, call)(Bucket=bucket)
        error = caught.value.response["Error"]
        assert error["Code"] == wanted[0]
        assert wanted[1] in error["Message"]
    else:
        answer = getattr(client, call)(Bucket=bucket)
        assert {name: answer[name] for name in wanted} == wanted
    other = server.client(*_strangers(server))
    with pytest.raises(client.exceptions.ClientError, match=r"AccessDenied|403"):
        getattr(other, call)(Bucket=bucket)


def test_one_configuration_by_its_name(server: Server, bucket: str) -> None:
    client = server.client()
    for call in (client.get_bucket_metrics_configuration, client.delete_bucket_analytics_configuration):
        with pytest.raises(client.exceptions.ClientError, match="NoSuchConfiguration"):
            call(Bucket=bucket, Id="x")
    for call in (client.get_object_retention, client.get_object_legal_hold):
        with pytest.raises(client.exceptions.ClientError, match="Bucket is missing Object Lock Configuration"):
            call(Bucket=bucket, Key="kept")


def test_writing_a_configuration_is_not_built(server: Server, bucket: str) -> None:
    client = server.client()
    for call, more in (
        (client.put_bucket_policy, {"Policy": json.dumps({"Statement": []})}),
        (client.put_bucket_versioning, {"VersioningConfiguration": {"Status": "Enabled"}}),
        (client.put_bucket_request_payment, {"RequestPaymentConfiguration": {"Payer": "Requester"}}),
        (client.put_public_access_block, {"PublicAccessBlockConfiguration": {"BlockPublicAcls": True}}),
    ):
        with pytest.raises(client.exceptions.ClientError, match="NotImplemented"):
            call(Bucket=bucket, **more)


def test_the_smallest_object_that_a_lifecycle_moves(server: Server, bucket: str) -> None:
    """Terraform sets it with each configuration and waits until it reads it back."""
    client = server.client()
    rules = {"Rules": [{"ID": "r", "Status": "Enabled", "Filter": {"Prefix": "a"}, "Expiration": {"Days": 3}}]}
    for sent in ("all_storage_classes_128K", "varies_by_storage_class"):
        put = {"Bucket": bucket, "LifecycleConfiguration": rules, "TransitionDefaultMinimumObjectSize": sent}
        assert client.put_bucket_lifecycle_configuration(**put)["TransitionDefaultMinimumObjectSize"] == sent
        found = client.get_bucket_lifecycle_configuration(Bucket=bucket)
        assert found["TransitionDefaultMinimumObjectSize"] == sent
    with pytest.raises(client.exceptions.ClientError, match="InvalidRequest"):
        client.put_bucket_lifecycle_configuration(**{**put, "TransitionDefaultMinimumObjectSize": "none"})
    client.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration=rules)
    assert "TransitionDefaultMinimumObjectSize" not in client.get_bucket_lifecycle_configuration(Bucket=bucket)
    client.delete_bucket_lifecycle(Bucket=bucket)


def test_a_preflight_hears_that_there_is_no_cors(server: Server, bucket: str) -> None:
    answer = requests.options(f"{server.endpoint}/{bucket}/kept", headers={"Origin": "https://a.test"}, timeout=10)
    assert code_of(answer) == (400, "BadRequest")
    asked = {"Origin": "https://a.test", "Access-Control-Request-Method": "PUT"}
    answer = requests.options(f"{server.endpoint}/{bucket}/kept", headers=asked, timeout=10)
    assert code_of(answer) == (403, "AccessForbidden")
    url = server.client().generate_presigned_url("put_object", {"Bucket": bucket, "Key": "kept"})
    assert code_of(requests.options(url, headers=asked, timeout=10)) == (403, "AccessForbidden")


def test_a_post_to_a_bucket(server: Server, bucket: str) -> None:
    answer = requests.post(f"{server.endpoint}/{bucket}", files={"file": b"x"}, timeout=10)
    assert code_of(answer) == (501, "NotImplemented")
    assert code_of(send(server, "POST", f"/{bucket}")) == (412, "PreconditionFailed")
