"""Users, keys, canned ACLs and anonymous access, while the server runs."""

from __future__ import annotations

import concurrent.futures
import json
import uuid
from typing import TYPE_CHECKING, Any

import pytest
import requests
from botocore import UNSIGNED
from botocore.exceptions import ClientError

from tests.s3.test_objects import refused
from tests.support import stratum

if TYPE_CHECKING:
    from tests.support import Server


def add_user(server: Server, *words: str) -> tuple[Any, dict[str, str]]:
    facts = json.loads(stratum("user", "add", server.root, f"u{uuid.uuid4().hex[:8]}", "--json", *words).stdout)
    return server.client(facts["access_key"], facts["secret_key"]), facts


@pytest.fixture
def bucket(server: Server) -> str:
    name = f"acl-{uuid.uuid4().hex[:12]}"
    server.client().create_bucket(Bucket=name)
    return name


def test_a_revoked_key_and_a_removed_user_are_refused_at_once(server: Server) -> None:
    client, facts = add_user(server, "--email", "x@example.org", "--display-name", "X")
    client.list_buckets()
    second = json.loads(stratum("key", "create", server.root, facts["name"], "--json").stdout)
    stratum("key", "revoke", server.root, facts["access_key"])
    for _ in range(8):  # every worker obeys
        refused(client.list_buckets, 403, "InvalidAccessKeyId")
    other = server.client(second["access_key"], second["secret_key"])
    assert other.list_buckets()["Owner"]["DisplayName"] == "X"
    stratum("user", "remove", server.root, facts["name"])
    refused(other.list_buckets, 403, "InvalidAccessKeyId")


def test_users_have_their_own_buckets(server: Server, bucket: str) -> None:
    client, _ = add_user(server)
    own = f"own-{uuid.uuid4().hex[:10]}"
    client.create_bucket(Bucket=own)
    assert [item["Name"] for item in client.list_buckets()["Buckets"]] == [own]
    refused(client.create_bucket, 409, "BucketAlreadyExists", Bucket=bucket)
    refused(client.list_objects_v2, 403, "AccessDenied", Bucket=bucket)
    refused(client.put_object, 403, "AccessDenied", Bucket=bucket, Key="k", Body=b"")
    refused(client.delete_bucket, 403, "AccessDenied", Bucket=bucket)
    refused(client.put_bucket_acl, 403, "AccessDenied", Bucket=bucket, ACL="public-read")
    server.client().put_object(Bucket=bucket, Key="secret", Body=b"s")
    refused(client.get_object, 403, "AccessDenied", Bucket=bucket, Key="secret")
    refused(
        client.copy_object,
        403,
        "AccessDenied",
        Bucket=own,
        Key="stolen",
        CopySource={"Bucket": bucket, "Key": "secret"},
    )
    upload = client.create_multipart_upload(Bucket=own, Key="mp")["UploadId"]
    refused(
        client.upload_part_copy,
        403,
        "AccessDenied",
        Bucket=own,
        Key="mp",
        UploadId=upload,
        PartNumber=1,
        CopySource={"Bucket": bucket, "Key": "secret"},
    )
    refused(client.delete_objects, 403, "AccessDenied", Bucket=bucket, Delete={"Objects": [{"Key": "secret"}]})
    assert server.client().get_object(Bucket=bucket, Key="secret")["Body"].read() == b"s"


def test_canned_acls(server: Server, bucket: str) -> None:
    owner, (other, _) = server.client(), add_user(server)
    anonymous = server.client(signature_version=UNSIGNED)
    for key, acl in (("private", "private"), ("public", "public-read"), ("signed", "authenticated-read")):
        owner.put_object(Bucket=bucket, Key=key, Body=b"x", ACL=acl)
    readers = {"private": (False, False), "public": (True, True), "signed": (True, False)}
    for key, (by_other, by_anonymous) in readers.items():
        for client, allowed in ((other, by_other), (anonymous, by_anonymous)):
            if allowed:
                assert client.get_object(Bucket=bucket, Key=key)["Body"].read() == b"x"
            else:
                refused(client.get_object, 403, "AccessDenied", Bucket=bucket, Key=key)
    refused(anonymous.list_objects_v2, 403, "AccessDenied", Bucket=bucket)
    owner.put_bucket_acl(Bucket=bucket, ACL="public-read")
    assert len(anonymous.list_objects_v2(Bucket=bucket)["Contents"]) == 3
    refused(anonymous.put_object, 403, "AccessDenied", Bucket=bucket, Key="k", Body=b"")
    owner.put_bucket_acl(Bucket=bucket, ACL="public-read-write")
    other.put_object(Bucket=bucket, Key="theirs", Body=b"t")
    refused(anonymous.get_object, 403, "AccessDenied", Bucket=bucket, Key="theirs")
    owner.put_object_acl(Bucket=bucket, Key="private", ACL="public-read")
    assert anonymous.get_object(Bucket=bucket, Key="private")["Body"].read() == b"x"
    grants = owner.get_object_acl(Bucket=bucket, Key="private")["Grants"]
    assert [(grant["Grantee"]["Type"], grant["Permission"]) for grant in grants] == [
        ("Group", "READ"),
        ("CanonicalUser", "FULL_CONTROL"),
    ]
    policy = owner.get_bucket_acl(Bucket=bucket)
    owner.put_bucket_acl(Bucket=bucket, AccessControlPolicy={"Owner": policy["Owner"], "Grants": policy["Grants"][-1:]})
    assert len(owner.get_bucket_acl(Bucket=bucket)["Grants"]) == 1
    without_owner = policy["Grants"][:-1]
    policy["Grants"][0]["Permission"] = "WRITE_ACP"
    for grants in (policy["Grants"], [], without_owner):
        refused(
            owner.put_bucket_acl,
            501,
            "NotImplemented",
            Bucket=bucket,
            AccessControlPolicy={"Owner": policy["Owner"], "Grants": grants},
        )


def test_the_operators_anonymous_switch(server: Server, bucket: str) -> None:
    anonymous = server.client(signature_version=UNSIGNED)
    server.client().put_object(Bucket=bucket, Key="k", Body=b"x")
    stratum("bucket", "set", server.root, bucket, "--anonymous", "read")
    assert anonymous.get_object(Bucket=bucket, Key="k")["Body"].read() == b"x"
    assert anonymous.list_objects_v2(Bucket=bucket)["KeyCount"] == 1
    refused(anonymous.put_object, 403, "AccessDenied", Bucket=bucket, Key="k", Body=b"")
    stratum("bucket", "set", server.root, bucket, "--anonymous", "read-write")
    anonymous.put_object(Bucket=bucket, Key="theirs", Body=b"y")
    anonymous.delete_object(Bucket=bucket, Key="k")
    stratum("bucket", "set", server.root, bucket, "--anonymous", "none")
    refused(anonymous.get_object, 403, "AccessDenied", Bucket=bucket, Key="theirs")


@pytest.mark.parametrize("operation", ["put", "complete", "copy"])
def test_one_winner(server: Server, bucket: str, operation: str) -> None:
    """32 conditional creates of one key at once, over two workers: one 200 and thirty-one 412, twenty times."""
    client = server.client(max_pool_connections=40)
    client.put_object(Bucket=bucket, Key="source", Body=b"s" * 20_000)
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        for number in range(20):
            key = f"{operation}-{number}"
            uploads: list[tuple[str, str]] = []
            if operation == "complete":
                for _ in range(32):
                    upload = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
                    uploads.append(
                        (
                            upload,
                            client.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"x")[
                                "ETag"
                            ],
                        )
                    )

            def attempt(at: int, key: str = key, uploads: list[tuple[str, str]] = uploads) -> int:
                try:
                    if operation == "put":
                        client.put_object(Bucket=bucket, Key=key, Body=b"%d" % at, IfNoneMatch="*")
                    elif operation == "copy":
                        client.copy_object(
                            Bucket=bucket, Key=key, CopySource={"Bucket": bucket, "Key": "source"}, IfNoneMatch="*"
                        )
                    else:
                        parts = [{"PartNumber": 1, "ETag": uploads[at][1]}]
                        client.complete_multipart_upload(
                            Bucket=bucket,
                            Key=key,
                            UploadId=uploads[at][0],
                            MultipartUpload={"Parts": parts},
                            IfNoneMatch="*",
                        )
                except ClientError as error:
                    return int(error.response["ResponseMetadata"]["HTTPStatusCode"])
                return 200

            assert sorted(pool.map(attempt, range(32))) == [200] + [412] * 31
    workers = [process["pid"] for process in server.processes() if process["role"] == "s3"]
    assert len(workers) >= 2


def test_virtual_host_style(tmp_path: Any) -> None:
    from tests.support import serving

    with serving(tmp_path, settings={"s3": {"domain": "s3.test"}}) as server:
        client = server.client()
        client.create_bucket(Bucket="named")
        client.put_object(Bucket="named", Key="a/b", Body=b"x", ACL="public-read")
        url = f"{server.endpoint}/a/b"
        assert requests.get(url, headers={"Host": "named.s3.test"}, timeout=10).content == b"x"
        assert requests.get(url, headers={"Host": "other.s3.test:80"}, timeout=10).status_code == 404


def test_quotas(server: Server) -> None:
    client = server.client()
    client.create_bucket(Bucket="bounded")
    stratum("quota", "set", server.root, "--bucket", "bounded", "--bytes", "6000000", "--objects", "2")
    client.put_object(Bucket="bounded", Key="a", Body=b"x" * 1000)
    with pytest.raises(ClientError, match="QuotaExceeded") as caught:
        client.put_object(Bucket="bounded", Key="b", Body=b"x" * 6_000_000)
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403
    upload = client.create_multipart_upload(Bucket="bounded", Key="b")["UploadId"]
    where = {"Bucket": "bounded", "Key": "b", "UploadId": upload}
    with pytest.raises(ClientError, match="QuotaExceeded"):
        client.upload_part(**where, PartNumber=1, Body=b"x" * 6_000_000)
    client.delete_object(Bucket="bounded", Key="a")
    part = client.upload_part(**where, PartNumber=1, Body=b"x" * 6_000_000)
    with pytest.raises(ClientError, match="QuotaExceeded"):
        client.put_object(Bucket="bounded", Key="c", Body=b"x")
    parts = {"Parts": [{"ETag": part["ETag"], "PartNumber": 1}]}
    client.complete_multipart_upload(**where, MultipartUpload=parts)
    client.put_object(Bucket="bounded", Key="c", Body=b"")
    with pytest.raises(ClientError, match="QuotaExceeded"):
        client.copy_object(Bucket="bounded", Key="d", CopySource="bounded/c")
    rows = json.loads(stratum("quota", "show", server.root, "--json").stdout)["quotas"]
    assert rows == [
        {
            "kind": "bucket",
            "name": "bounded",
            "bytes": 6_000_000,
            "bytes_max": 6_000_000,
            "objects": 2,
            "objects_max": 2,
        }
    ]
    stratum("quota", "set", server.root, "--bucket", "bounded", expect=6)
    stratum("quota", "set", server.root, "--bytes", "5", expect=6)
    stratum("quota", "set", server.root, "--bucket", "none", "--bytes", "5", expect=4)
    stratum("quota", "set", server.root, "--bucket", "bounded", "--remove")
    client.put_object(Bucket="bounded", Key="d", Body=b"")
