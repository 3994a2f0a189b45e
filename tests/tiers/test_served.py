"""The tiers of a served volume: real processes, real clients, a remote over HTTP that can fail, and a mount."""

from __future__ import annotations

import json
import mmap
import os
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

import boto3
import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.client import Config
from botocore.credentials import Credentials
from botocore.exceptions import ClientError

from tests.support import Server, need_fuse, stratum
from tests.tiers.fault_proxy import FaultProxy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BUCKET = "tiered"
DATA = os.urandom(3_000_000)
UNPRESSED = {"low_percent": 99.7, "high_percent": 99.8, "emergency_percent": 99.9}
"""However full the disk is that the tests run on."""


class Served:
    """A served and mounted volume with 2+1 disks and moto, behind a proxy, as its remote."""

    def __init__(self, server: Server, proxy: FaultProxy, moto: str) -> None:
        self.server = server
        self.proxy = proxy
        self.moto = moto
        self.s3: Any = server.client()
        assert server.mount is not None
        self.mount = server.mount / BUCKET

    def move(self, key: str, tier: str, *, expect: int = 0) -> None:
        """What a test before this one did to the remote may have to be forgotten first."""
        deadline = time.monotonic() + 20
        while True:
            done = stratum("tier", "move", self.server.root, f"{BUCKET}/{key}", tier, "--wait", expect=None)
            if done.returncode == expect or "no remote of the cold tier answers" not in done.stdout:
                break
            assert time.monotonic() < deadline, done.stdout
            time.sleep(0.5)
        assert done.returncode == expect, done.stdout

    def explain(self, key: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(stratum("explain", self.server.root, f"{BUCKET}/{key}", "--json").stdout)
        return found

    def body(self, key: str, **more: Any) -> bytes:
        """Patient with a worker that still leaves the remote alone, for what a test before this one did to it."""
        deadline = time.monotonic() + 20
        while True:
            try:
                found: bytes = self.s3.get_object(Bucket=BUCKET, Key=key, **more)["Body"].read()
                return found
            except ClientError as error:
                if "left alone" not in str(error) or time.monotonic() > deadline:
                    raise
                told = error.response["ResponseMetadata"]["HTTPHeaders"]
            assert told["retry-after"] == "2"
            time.sleep(0.3)

    @staticmethod
    def body_by(client: Any, key: str) -> bytes:
        found: bytes = client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        return found

    def until(self, key: str, tier: str, seconds: float = 20.0) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while True:
            found = self.explain(key)
            if found["tier"] == tier:
                return found
            assert time.monotonic() < deadline, f"{key} does not get {tier}: {found}"
            time.sleep(0.1)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, moto: str) -> Iterator[Served]:
    need_fuse()
    root = tmp_path_factory.mktemp("tiers")
    proxy = FaultProxy(moto)
    credentials = root / "credentials"
    credentials.write_text('{"access_key": "AKREMOTE", "secret_key": "remotesecretvalue"}')
    credentials.chmod(0o600)
    disks = [word for number in range(3) for word in ("--warm", root / f"d{number}")]
    server = Server(root, mount=True, init_words=[*disks, "--create", "--ec", "2+1"])
    server.owned = True
    server.configure({
        "lifecycle": {"debug_day_s": 1.0}, "tiering": {"interval_s": 0.1, **UNPRESSED}, "cold": {"recall_s_max": 3.0, "request_s_max": 1.0, "delete_after_s": 0.0},
    })  # fmt: skip
    added = stratum(
        "cold", "add", server.root, "far", "--endpoint", proxy.endpoint, "--bucket", "remote", "--create-bucket", "--prefix", "p",
        "--credentials", credentials,
    )  # fmt: skip
    assert "remotesecretvalue" not in added.stdout + added.stderr
    server.start()
    made = Served(server, proxy, moto)
    made.s3.create_bucket(Bucket=BUCKET)
    try:
        yield made
    finally:
        code = server.stop()
        proxy.stop()
    assert code == 0
    # A read through the mount that cannot have its bytes is logged as what it is.
    expected = ("operation_failed operation=read", "damage_found", "internal_error", "body_broken")
    assert [line for line in server.errors() if "Traceback" in line or not any(word in line for word in expected)] == []
    assert "remotesecretvalue" not in server.log.read_text()


@pytest.fixture(autouse=True)
def _well(served: Served) -> Iterator[None]:
    served.proxy.plan = lambda _method, _path, _number: ""
    yield
    served.proxy.plan = lambda _method, _path, _number: ""


@pytest.mark.parametrize("size", [1, 900, 20_000, len(DATA)])
def test_there_and_back_on_both_faces(served: Served, size: int) -> None:
    key = f"k{size}"
    etag = served.s3.put_object(Bucket=BUCKET, Key=key, Body=DATA[:size], Metadata={"a": "b"})["ETag"]
    for tier, storage_class, location in (
        ("warm", "STANDARD_IA", "Local"),
        ("cold", "GLACIER_IR", "Remote"),
        ("hot", None, "Local"),
    ):
        served.move(key, tier)
        head = served.s3.head_object(Bucket=BUCKET, Key=key)
        assert (head["ETag"], head["Metadata"], head.get("StorageClass")) == (etag, {"a": "b"}, storage_class)
        assert served.explain(key)["location"] == location
        (row,) = served.s3.list_objects_v2(Bucket=BUCKET, Prefix=key, MaxKeys=1)["Contents"]
        assert row["StorageClass"] == (storage_class or "STANDARD")
        assert served.body(key) == DATA[:size]
        assert (served.mount / key).read_bytes() == DATA[:size]
        why = json.loads(os.getxattr(served.mount / key, "user.stratum.why"))
        assert why["tier"] == tier
        assert os.getxattr(served.mount / key, "user.s3.storage-class").decode() == (storage_class or "STANDARD")


def test_ranges_and_overwrites_of_cold_objects(served: Served) -> None:
    served.s3.put_object(Bucket=BUCKET, Key="ranges", Body=DATA)
    served.move("ranges", "cold")
    assert served.body("ranges", Range="bytes=1000000-1999999") == DATA[1_000_000:2_000_000]
    assert served.body("ranges", Range="bytes=-5") == DATA[-5:]
    with (served.mount / "ranges").open("r+b") as file:
        file.seek(1_500_000)
        file.write(b"changed")
    expected = DATA[:1_500_000] + b"changed" + DATA[1_500_007:]
    assert served.body("ranges") == expected
    assert served.explain("ranges")["location"] == "Mixed"
    served.s3.copy_object(Bucket=BUCKET, Key="copied", CopySource=f"{BUCKET}/ranges")
    assert served.body("copied") == expected


def test_put_with_a_class_goes_there(served: Served) -> None:
    served.s3.put_object(Bucket=BUCKET, Key="ia", Body=DATA, StorageClass="STANDARD_IA")
    served.s3.put_object(Bucket=BUCKET, Key="gl", Body=DATA, StorageClass="GLACIER")
    assert served.until("ia", "warm")["rule"] == "asked"
    served.until("gl", "cold")
    assert served.s3.head_object(Bucket=BUCKET, Key="gl")["StorageClass"] == "GLACIER"
    assert served.body("gl") == DATA
    with pytest.raises(ClientError) as caught:
        served.s3.put_object(Bucket=BUCKET, Key="no", Body=b"", StorageClass="OUTPOSTS")
    assert caught.value.response["Error"]["Code"] == "InvalidStorageClass"


def test_a_hint_in_the_metadata_moves(served: Served) -> None:
    served.s3.put_object(Bucket=BUCKET, Key="hinted", Body=DATA, Metadata={"stratum-priority": "warm"})
    assert served.until("hinted", "warm")["rule"] == "pin"
    with pytest.raises(ClientError) as caught:
        served.s3.put_object(Bucket=BUCKET, Key="hinted", Body=b"", Metadata={"stratum-priority": "tepid"})
    assert caught.value.response["Error"]["Code"] == "InvalidArgument"


def test_repeated_reads_promote_through_both_faces(served: Served) -> None:
    served.s3.put_object(Bucket=BUCKET, Key="popular", Body=DATA)
    served.move("popular", "warm")
    served.s3.head_object(Bucket=BUCKET, Key="popular")
    os.stat(served.mount / "popular")
    assert (
        served.mount / "popular"
    ).read_bytes() == DATA  # from now on it is in the kernel's cache, where nobody sees reads
    for _ in range(2):
        assert served.body("popular") == DATA
    assert served.until("popular", "hot")["moves"][0]["cause"] == "repeated reads"


def test_a_hundred_clients_make_one_fetch(served: Served) -> None:
    served.s3.put_object(Bucket=BUCKET, Key="crowd", Body=DATA)
    served.move("crowd", "cold")
    served.proxy.requests.clear()
    clients = [served.server.client() for _ in range(20)]

    def read(number: int) -> bool:
        found: bytes = clients[number % 20].get_object(Bucket=BUCKET, Key="crowd")["Body"].read()
        return found == DATA

    with ThreadPoolExecutor(20) as pool:
        assert all(pool.map(read, range(100)))
    fetched = [path for method, path in served.proxy.requests if method == "GET" and "/v1/" in path]
    assert len(fetched) == 1


@pytest.mark.parametrize("fault", ["hang", "503", "flip"])
def test_a_remote_in_trouble_stalls_nobody_else(served: Served, fault: str) -> None:
    """The cold read fails or is mended; hot reads, stat and listings on both faces go on; afterwards all is right."""
    key = f"trouble-{fault}"
    served.s3.put_object(Bucket=BUCKET, Key=key, Body=DATA)
    served.s3.put_object(Bucket=BUCKET, Key="calm", Body=DATA)
    served.move(key, "cold")
    served.proxy.plan = lambda method, path, _number: fault if method == "GET" and "/v1/" in path else ""
    with ThreadPoolExecutor(12) as pool:
        clients = [served.server.client(read_timeout=60) for _ in range(10)]
        waiting = [pool.submit(served.body_by, client, key) for client in clients]
        waiting.append(pool.submit((served.mount / key).read_bytes))
        for _ in range(5):
            assert served.body("calm") == DATA
            assert (served.mount / "calm").read_bytes() == DATA
            assert (served.mount / key).stat().st_size == len(DATA)
            assert key in os.listdir(served.mount)
        served.s3.put_object(Bucket=BUCKET, Key="calm", Body=DATA)
        for result in waiting:
            error = result.exception(60)
            assert error is not None or result.result() == DATA
    served.proxy.plan = lambda _method, _path, _number: ""
    deadline = time.monotonic() + 30
    while True:  # the breaker may have to close first
        try:
            assert served.body(key) == DATA
            assert (served.mount / key).read_bytes() == DATA
            break
        except (ClientError, OSError):
            assert time.monotonic() < deadline
            time.sleep(0.5)


def test_a_truncated_object_is_an_error_on_both_faces(served: Served) -> None:
    """Not a body without end; and what is right again can be read again."""
    key = "truncated"
    served.s3.put_object(Bucket=BUCKET, Key=key, Body=DATA)
    served.move(key, "cold")
    place = served.explain(key)["extents"][0]["place"]
    name = "p/" + place.removeprefix("remote far: ").partition(" at ")[0]
    far = boto3.client("s3", endpoint_url=served.moto, aws_access_key_id="a", aws_secret_access_key="s", region_name="us-east-1")  # fmt: skip
    whole = far.get_object(Bucket="remote", Key=name)
    body = whole["Body"].read()

    def replace(data: bytes) -> None:
        far.put_object(Bucket="remote", Key=name, Body=data, Metadata=whole["Metadata"])
        for path in (served.server.root / "recall").iterdir():
            path.unlink(missing_ok=True)

    for left in (len(DATA) // 2, 0):
        replace(body[:left])
        with pytest.raises(ClientError) as caught:
            served.s3.get_object(Bucket=BUCKET, Key=key, Range=f"bytes={len(DATA) - 100}-")
        assert caught.value.response["Error"]["Code"] == "InternalError"
        with (served.mount / key).open("rb", buffering=0) as file, pytest.raises(OSError, match="Input/output"):
            os.pread(file.fileno(), 100, len(DATA) - 100)
    replace(body)
    assert served.body(key) == DATA
    assert (served.mount / key).read_bytes() == DATA


@pytest.mark.parametrize("fault", ["503", "flip-put", "lose"])
def test_sending_through_a_bad_network_loses_nothing(served: Served, fault: str) -> None:
    key = f"sent-{fault}"
    served.s3.put_object(Bucket=BUCKET, Key=key, Body=DATA)
    wrong = [3]

    def plan(method: str, path: str, _number: int) -> str:
        if method == "PUT" and "/v1/" in path and wrong[0]:
            wrong[0] -= 1
            return fault
        return ""

    served.proxy.plan = plan
    done = stratum("tier", "move", served.server.root, f"{BUCKET}/{key}", "cold", "--wait", expect=None)
    assert served.body(key) == DATA
    if done.returncode:
        assert served.explain(key)["tier"] == "hot"
        served.proxy.plan = lambda _method, _path, _number: ""
        served.move(key, "cold")
    assert served.explain(key)["location"] == "Remote"
    assert served.body(key) == DATA


def test_lifecycle_moves_and_expires(served: Served) -> None:
    served.s3.create_bucket(Bucket="rules")
    rules = [
        {"ID": "cool", "Status": "Enabled", "Filter": {"Prefix": "cool/"}, "Transitions": [{"Days": 1, "StorageClass": "STANDARD_IA"}]},
        {"ID": "gone", "Status": "Enabled", "Filter": {"And": {"Prefix": "gone/", "ObjectSizeGreaterThan": 10}}, "Expiration": {"Days": 1}},
        {"ID": "tagged", "Status": "Enabled", "Filter": {"And": {"Prefix": "tag/", "Tags": [{"Key": "a", "Value": "1"}, {"Key": "b", "Value": ""}]}}, "Expiration": {"Days": 1}},
        {"ID": "one", "Status": "Enabled", "Filter": {"Tag": {"Key": "cool", "Value": "yes"}}, "Transitions": [{"Days": 1, "StorageClass": "STANDARD_IA"}]},
        {"ID": "off", "Status": "Disabled", "Filter": {"Prefix": "off/"}, "Expiration": {"Days": 1}},
        {"ID": "up", "Status": "Enabled", "Filter": {"Prefix": ""}, "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 1}},
    ]  # fmt: skip
    with pytest.raises(ClientError) as caught:
        served.s3.get_bucket_lifecycle_configuration(Bucket="rules")
    assert caught.value.response["Error"]["Code"] == "NoSuchLifecycleConfiguration"
    served.s3.put_bucket_lifecycle_configuration(Bucket="rules", LifecycleConfiguration={"Rules": rules})
    assert served.s3.get_bucket_lifecycle_configuration(Bucket="rules")["Rules"] == rules
    for key in ("cool/a", "gone/a", "gone/small", "off/a", "other"):
        served.s3.put_object(Bucket="rules", Key=key, Body=DATA[:5] if key == "gone/small" else DATA)
    served.s3.put_object(Bucket="rules", Key="tag/half", Body=DATA, Tagging="a=1")
    answer = served.s3.put_object(Bucket="rules", Key="tag/both", Body=DATA, Tagging="a=1&b=&c=3")
    assert 'rule-id="tagged"' in answer["Expiration"]
    served.s3.put_object(Bucket="rules", Key="tag/cool", Body=DATA)
    served.s3.put_object_tagging(Bucket="rules", Key="tag/cool", Tagging={"TagSet": [{"Key": "cool", "Value": "yes"}]})
    served.s3.create_multipart_upload(Bucket="rules", Key="open")
    told = served.s3.head_object(Bucket="rules", Key="gone/a")["Expiration"]
    assert 'rule-id="gone"' in told
    until = parsedate_to_datetime(told.partition('expiry-date="')[2].partition('"')[0]).timestamp()
    assert 86400 <= until - time.time() <= 2 * 86400, "the header tells real days"
    deadline = time.monotonic() + 30
    while True:
        listed = {row["Key"]: row["StorageClass"] for row in served.s3.list_objects_v2(Bucket="rules")["Contents"]}
        uploads = served.s3.list_multipart_uploads(Bucket="rules").get("Uploads", [])
        if (
            listed
            == {
                "cool/a": "STANDARD_IA",
                "gone/small": "STANDARD",
                "off/a": "STANDARD",
                "other": "STANDARD",
                "tag/cool": "STANDARD_IA",
                "tag/half": "STANDARD",
            }
            and not uploads
        ):
            break
        assert time.monotonic() < deadline, (listed, uploads)
        time.sleep(0.2)
    assert served.s3.get_object(Bucket="rules", Key="cool/a")["Body"].read() == DATA
    served.s3.delete_bucket_lifecycle(Bucket="rules")
    served.s3.put_object(Bucket="rules", Key="gone/b", Body=DATA)
    time.sleep(2.5)
    served.s3.head_object(Bucket="rules", Key="gone/b")


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        ({"Status": "enabled", "Filter": {"Prefix": ""}, "Expiration": {"Days": 1}}, "MalformedXML"),
        ({"Status": "Enabled", "Filter": {"Prefix": ""}}, "MalformedXML"),
        ({"Status": "Enabled", "Filter": {"Prefix": ""}, "Expiration": {"Days": 0}}, "InvalidArgument"),
        ({"ID": "x" * 256, "Status": "Enabled", "Filter": {"Prefix": ""}, "Expiration": {"Days": 1}}, "InvalidArgument"),
        ({"Status": "Enabled", "Filter": {"Prefix": ""}, "Transitions": [{"Days": 1, "StorageClass": "NOWHERE"}]}, "InvalidStorageClass"),
        ({"Status": "Enabled", "Filter": {"Prefix": ""}, "Expiration": {"Date": "2027-01-01T01:00:00Z"}}, "MalformedXML"),
        ({"Status": "Enabled", "Filter": {"Prefix": "a", "And": {"Prefix": "b", "ObjectSizeGreaterThan": 1}}, "Expiration": {"Days": 1}}, "MalformedXML"),
    ],
)  # fmt: skip
def test_rules_that_are_none(served: Served, rule: dict[str, Any], code: str) -> None:
    with pytest.raises(ClientError) as caught:
        served.s3.put_bucket_lifecycle_configuration(Bucket=BUCKET, LifecycleConfiguration={"Rules": [rule]})
    assert caught.value.response["Error"]["Code"] == code


def test_all_conditions_of_a_filter_hold_however_they_are_written(served: Served) -> None:
    """Amazon's schema wants And; clients of other servers leave it out, or put an empty Prefix beside it."""
    tag = {"Key": "a", "Value": " 1 "}
    for given, found in (
        ({"Prefix": "p/", "Tag": tag}, {"And": {"Prefix": "p/", "Tags": [tag]}}),
        ({"Prefix": "", "And": {"Prefix": "p/", "Tags": [tag]}}, {"And": {"Prefix": "p/", "Tags": [tag]}}),
        ({"Prefix": "p/", "And": {"Prefix": "p", "Tags": [tag]}}, {"And": {"Prefix": "p/", "Tags": [tag]}}),
        ({"Prefix": " "}, {"Prefix": " "}),
        ({"Prefix": ""}, {"Prefix": ""}),
    ):
        rule = {"ID": "r", "Status": "Disabled", "Filter": given, "Expiration": {"Days": 1}}
        served.s3.put_bucket_lifecycle_configuration(Bucket=BUCKET, LifecycleConfiguration={"Rules": [rule]})
        rules = served.s3.get_bucket_lifecycle_configuration(Bucket=BUCKET)["Rules"]
        assert rules == [{**rule, "Filter": found}]
    served.s3.delete_bucket_lifecycle(Bucket=BUCKET)


def test_restore_makes_a_copy_for_a_while(served: Served) -> None:
    served.s3.put_object(Bucket=BUCKET, Key="archived", Body=DATA, StorageClass="GLACIER")
    served.until("archived", "cold")
    assert (
        served.s3.restore_object(Bucket=BUCKET, Key="archived", RestoreRequest={"Days": 4})["ResponseMetadata"][
            "HTTPStatusCode"
        ]
        == 202
    )
    served.until("archived", "hot")
    head = served.s3.head_object(Bucket=BUCKET, Key="archived")
    assert head["StorageClass"] == "GLACIER"
    assert head["Restore"].startswith('ongoing-request="false", expiry-date=')
    again = served.s3.restore_object(Bucket=BUCKET, Key="archived", RestoreRequest={"Days": 1})
    assert again["ResponseMetadata"]["HTTPStatusCode"] == 200
    served.until("archived", "cold")
    assert "Restore" not in served.s3.head_object(Bucket=BUCKET, Key="archived")
    assert served.body("archived") == DATA
    served.s3.put_object(Bucket=BUCKET, Key="fresh", Body=DATA)
    with pytest.raises(ClientError) as caught:
        served.s3.restore_object(Bucket=BUCKET, Key="fresh", RestoreRequest={"Days": 1})
    assert caught.value.response["Error"]["Code"] == "InvalidObjectState"


def _signed(served: Served, path: str) -> tuple[int, bytes]:
    request = AWSRequest("GET", served.server.endpoint + path)
    S3SigV4Auth(Credentials(served.server.access_key, served.server.secret_key), "s3", "us-east-1").add_auth(request)
    plain = urllib.request.Request(served.server.endpoint + path, headers=dict(request.headers))
    try:
        with urllib.request.urlopen(plain) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_explain_over_http_is_for_who_may_read(served: Served) -> None:
    served.s3.put_object(Bucket=BUCKET, Key="why", Body=DATA)
    status, body = _signed(served, f"/_stratum/v1/explain/{BUCKET}/why")
    assert status == 200, body
    assert json.loads(body)["key"] == "why"
    assert _signed(served, f"/_stratum/v1/explain/{BUCKET}/nothing")[0] == 404
    assert _signed(served, "/_stratum/v1/other")[0] == 405
    assert served.server.raw("GET", f"/_stratum/v1/explain/{BUCKET}/why")[0] == 403
    stranger = json.loads(stratum("user", "add", served.server.root, "stranger", "--json").stdout)
    request = AWSRequest("GET", f"{served.server.endpoint}/_stratum/v1/explain/{BUCKET}/why")
    S3SigV4Auth(Credentials(stranger["access_key"], stranger["secret_key"]), "s3", "us-east-1").add_auth(request)
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(urllib.request.Request(request.url, headers=dict(request.headers)))


def test_versions_of_the_remote_do_not_pile_up(served: Served) -> None:
    """A bucket with versioning: what is removed is removed by its version."""
    direct: Any = boto3.client(
        "s3",
        endpoint_url=served.moto,
        aws_access_key_id="a",
        aws_secret_access_key="b",
        region_name="us-east-1",
        config=Config(signature_version="s3v4"),
    )
    direct.put_bucket_versioning(Bucket="remote", VersioningConfiguration={"Status": "Enabled"})
    served.s3.put_object(Bucket=BUCKET, Key="versioned", Body=DATA)
    served.move("versioned", "cold")
    where = served.explain("versioned")["extents"][0]["place"].split(": ")[1].split(" at ")[0]
    served.s3.delete_object(Bucket=BUCKET, Key="versioned")
    deadline = time.monotonic() + 20
    while True:
        found = direct.list_object_versions(Bucket="remote", Prefix=f"p/{where}")
        if not found.get("Versions") and not found.get("DeleteMarkers"):
            break
        assert time.monotonic() < deadline, found
        time.sleep(0.2)


def test_scrub_disks_and_status(served: Served) -> None:
    served.s3.put_object(Bucket=BUCKET, Key="scrubbed", Body=DATA)
    served.move("scrubbed", "warm")
    path = next(path for path in sorted(served.server.root.parent.glob("d0/packs/**/*.shard")))
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 1
    path.write_bytes(raw)
    stratum("scrub", "speed", served.server.root, "1000000000")
    done = json.loads(stratum("scrub", "start", served.server.root, "--wait", "--json").stdout)
    assert done["found"] == done["healed"] == 1
    assert served.body("scrubbed") == DATA
    old, new = served.server.root.parent / "d0", served.server.root.parent / "e0"
    done = json.loads(stratum("disk", "replace", served.server.root, old, new, "--create", "--wait", "--json").stdout)
    assert done["failing"] == []
    disks = json.loads(stratum("disk", "list", served.server.root, "--json").stdout)["disks"]
    assert {disk["state"] for disk in disks} == {"active"}
    assert str(new) in {disk["path"] for disk in disks}
    assert served.body("scrubbed") == DATA
    status = json.loads(stratum("tier", "status", served.server.root, "--json").stdout)
    assert status["warm_bytes"] >= len(DATA)
    assert json.loads(stratum("cold", "check", served.server.root, "--json").stdout)["remotes"][0]["reachable"]
    assert stratum("fsck", served.server.root).stdout == "clean\n"


def test_a_second_volume_as_the_remote(served: Served, tmp_path: Path) -> None:
    """Stratum archives into Stratum."""
    remote = Server(tmp_path / "remote").start()
    try:
        remote.client().create_bucket(Bucket="archive")
        credentials = tmp_path / "credentials"
        credentials.write_text(
            f"aws_access_key_id = {remote.access_key}\naws_secret_access_key = {remote.secret_key}\n"
        )
        credentials.chmod(0o600)
        added = json.loads(stratum(
            "cold", "add", served.server.root, "ours", "--endpoint", remote.endpoint, "--bucket", "archive", "--credentials", credentials, "--json",
        ).stdout)  # fmt: skip
        assert all(added["can"][what] for what in ("ranges", "checksums", "conditional_puts", "multipart"))
        served.s3.put_object(Bucket=BUCKET, Key="ours", Body=DATA)
        served.move("ours", "cold")
        assert served.body("ours") == DATA
        assert "remote ours" in served.explain("ours")["extents"][0]["place"]
        stratum("cold", "drain", served.server.root, "ours")
        deadline = time.monotonic() + 30
        while next(
            row
            for row in json.loads(stratum("cold", "list", served.server.root, "--json").stdout)["remotes"]
            if row["name"] == "ours"
        )["packs"]:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        stratum("cold", "remove", served.server.root, "ours")
        assert served.body("ours") == DATA
    finally:
        remote.stop()


def test_a_cold_file_is_read_without_the_kernels_cache(served: Served) -> None:
    served.s3.put_object(Bucket=BUCKET, Key="mapped", Body=DATA)
    served.move("mapped", "cold")
    with (served.mount / "mapped").open("rb") as file:
        with pytest.raises(OSError, match="No such device"):
            mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
        assert file.read() == DATA
    served.move("mapped", "hot")
    with (
        (served.mount / "mapped").open("rb") as file,
        mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ) as mapped,
    ):
        assert mapped[:] == DATA


def test_an_expiration_header_cannot_be_split(served: Served) -> None:
    served.s3.create_bucket(Bucket="split")
    rule = {"ID": "a\nX-Evil: 1", "Status": "Enabled", "Filter": {"Prefix": ""}, "Expiration": {"Days": 30}}
    served.s3.put_bucket_lifecycle_configuration(Bucket="split", LifecycleConfiguration={"Rules": [rule]})
    served.s3.put_object(Bucket="split", Key="k", Body=b"x")
    head = served.s3.head_object(Bucket="split", Key="k")
    assert "x-evil" not in head["ResponseMetadata"]["HTTPHeaders"]
    assert "a%0AX-Evil" in head["Expiration"]


def test_an_object_archived_behind_our_back_is_restored_on_request(served: Served) -> None:
    """403 until somebody asks; then the remote is asked, the bytes come back for a while, and stay readable."""
    direct: Any = boto3.client(
        "s3", endpoint_url=served.moto, aws_access_key_id="a", aws_secret_access_key="b", region_name="us-east-1", config=Config(signature_version="s3v4")
    )  # fmt: skip
    served.s3.put_object(Bucket=BUCKET, Key="deep", Body=DATA)
    served.move("deep", "cold")
    key = "p/" + served.explain("deep")["extents"][0]["place"].split(": ")[1].split(" at ")[0]
    direct.copy_object(Bucket="remote", Key=key, CopySource={"Bucket": "remote", "Key": key}, StorageClass="GLACIER")
    with pytest.raises(ClientError) as caught:
        served.body("deep")
    answer = caught.value.response
    assert (answer["ResponseMetadata"]["HTTPStatusCode"], answer["Error"]["Code"]) == (403, "InvalidObjectState")
    with pytest.raises(OSError, match="Input/output error"):
        (served.mount / "deep").read_bytes()
    served.s3.restore_object(Bucket=BUCKET, Key="deep", RestoreRequest={"Days": 10})
    served.until("deep", "hot")
    assert served.body("deep") == DATA
    assert (served.mount / "deep").read_bytes() == DATA


def test_reads_that_fail_bring_nothing_back(served: Served) -> None:
    served.s3.put_object(Bucket=BUCKET, Key="failing", Body=DATA)
    served.move("failing", "cold")
    served.proxy.plan = lambda method, path, _number: "403" if method == "GET" and "/v1/" in path else ""
    for _ in range(4):
        with pytest.raises(ClientError):
            served.body("failing")
        with pytest.raises(OSError, match="Input/output error"):
            (served.mount / "failing").read_bytes()
    time.sleep(1.5)
    assert served.explain("failing")["inputs"]["reads"] == 0
