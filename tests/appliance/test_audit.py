"""The audit log of a served volume: both faces and the command line, what is refused, what is read, and what a full disk does."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from botocore.exceptions import ClientError

from stratum import audit
from stratum.audit_strangers import RECORDED_MAX
from tests.support import Server, need_fuse, serving, stratum

if TYPE_CHECKING:
    from pathlib import Path

AUDIT = {"audit": {"enabled": True}}


def events(server: Server) -> list[dict[str, Any]]:
    out = stratum("audit", "export", server.root).stdout
    return [json.loads(line) for line in out.splitlines()]


def test_s3_and_commands_leave_records_before_they_are_answered(tmp_path: Path) -> None:
    with serving(tmp_path, settings=AUDIT) as server:
        s3 = server.client()
        s3.create_bucket(Bucket="photos")
        s3.put_object(Bucket="photos", Key="a b\n/ü", Body=b"x")
        s3.get_object(Bucket="photos", Key="a b\n/ü")["Body"].read()
        found = [
            (event.get("operation"), event.get("key"), event["status"])
            for event in events(server)
            if event.get("face") == "s3"
        ]
        assert found == [("CreateBucket", None, 200), ("PutObject", "a b\n/ü", 200)]
        put = next(event for event in events(server) if event.get("operation") == "PutObject")
        assert put["who"] == "admin"
        assert put["from"].startswith("127.0.0.1:")
        assert put["request_id"] in server.log.read_text()
        stratum("bucket", "set", server.root, "photos", "--audit-reads", "on")
        s3.get_object(Bucket="photos", Key="a b\n/ü")["Body"].read()
        s3.list_objects_v2(Bucket="photos")
        s3.copy_object(Bucket="photos", Key="copy", CopySource={"Bucket": "photos", "Key": "a b\n/ü"})
        s3.delete_objects(Bucket="photos", Delete={"Objects": [{"Key": "copy"}, {"Key": "none"}]})
        stranger = server.client(secret_key="wrong" * 8)
        with pytest.raises(ClientError):
            stranger.get_object(Bucket="photos", Key="secret")
        stratum("user", "add", server.root, "eve")
        stratum("user", "add", server.root, "eve", expect=5)
        after = events(server)
    tail = [event for event in after if event["n"] > put["n"]]
    assert [(event["operation"], event["status"]) for event in tail] == [
        (f"bucket set {server.root} photos --audit-reads on", 0), ("GetObject", 200), ("ListObjectsV2", 200), ("CopyObject", 200), ("DeleteObjects", 200),
        ("GetObject", 403), (f"user add {server.root} eve", 0), (f"user add {server.root} eve", 5),
    ]  # fmt: skip
    assert tail[3]["source"]
    assert tail[4]["keys"] == [["copy", "deleted"], ["none", "deleted"]]
    assert (tail[5]["who"], tail[5]["key"]) == ("-", "secret")
    assert not any(server.secret_key in json.dumps(event) for event in after)
    verified = json.loads(stratum("audit", "verify", server.root, "--json").stdout)
    assert verified["problems"] == []
    assert "DeleteObjects" in stratum("audit", "tail", server.root, "-n", "5").stdout
    assert {
        event["bucket"]
        for event in map(json.loads, stratum("audit", "export", server.root, "--bucket", "photos").stdout.splitlines())
    } == {"photos"}


def test_the_end_that_is_cut_off_is_missed(tmp_path: Path) -> None:
    with serving(tmp_path, settings=AUDIT) as server:
        server.client().create_bucket(Bucket="photos")
    path = audit.files(server.root / "audit")[-1][1]
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    done = stratum("audit", "verify", server.root, expect=1)
    assert "cut off" in done.stdout


def test_the_mount_is_on_record_with_paths_users_and_errors(tmp_path: Path) -> None:
    need_fuse()
    with serving(tmp_path, mount=True, settings=AUDIT) as server:
        assert server.mount is not None
        server.client().create_bucket(Bucket="photos")
        folder = server.mount / "photos" / "2026"
        folder.mkdir()
        (folder / "a").write_text("x")
        (folder / "a").rename(folder / "b")
        os.link(folder / "b", folder / "c")
        os.chmod(folder / "c", 0o600)
        os.setxattr(folder / "c", "user.note", b"secret value")
        (server.mount / "photos" / "2026" / "b").read_text()
        os.unlink(folder / "c")
        with pytest.raises(OSError, match="not empty"):
            folder.rmdir()
        (folder / "sub").mkdir()
        (folder).rename(server.mount / "photos" / "2027")
        (server.mount / "photos" / "2027" / "sub" / "deep").write_text("d")
        denied = subprocess.run(
            ["setpriv", "--reuid", "65534", "--clear-groups", "touch", server.mount / "photos" / "mine"],
            capture_output=True,
            check=False,
        )
        assert denied.returncode == 1
        found = [event for event in events(server) if event.get("face") == "mount"]
    told = [(event["operation"], event["path"], event["status"]) for event in found]
    assert told == [
        ("mkdir", "photos/2026", "ok"), ("create", "photos/2026/a", "ok"), ("rename", "photos/2026/a", "ok"), ("link", "photos/2026/b", "ok"),
        ("setattr", "photos/2026/b", "ok"), ("setxattr", "photos/2026/b", "ok"), ("unlink", "photos/2026/c", "ok"), ("rmdir", "photos/2026", "ENOTEMPTY"),
        ("mkdir", "photos/2026/sub", "ok"), ("rename", "photos/2026", "ok"), ("create", "photos/2027/sub/deep", "ok"),
    ]  # fmt: skip
    assert {event["who"] for event in found} == {"uid 0"}
    assert found[2]["to"] == "photos/2026/b"
    assert (found[4]["changes"], found[5]["attribute"]) == (["mode"], "user.note")
    assert "secret value" not in json.dumps(found)


def test_a_full_audit_disk_refuses_what_wants_a_record_and_nothing_else(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], check=True)
    try:
        with serving(
            tmp_path, settings={"audit": {"enabled": True, "folder": str(small)}}, allow_errors=True
        ) as server:
            s3 = server.client()
            s3.create_bucket(Bucket="photos")
            s3.put_object(Bucket="photos", Key="kept", Body=b"k")
            (small / "ballast").write_bytes(bytes(os.statvfs(small).f_bavail * 4096))
            refused: list[int] = []
            for number in range(60):
                try:
                    s3.put_object(Bucket="photos", Key=f"{number}", Body=b"x")
                except ClientError as error:
                    refused.append(error.response["ResponseMetadata"]["HTTPStatusCode"])
            assert len(refused) > 10
            assert set(refused) == {503}
            assert s3.get_object(Bucket="photos", Key="kept")["Body"].read() == b"k"
            codes = [
                item["code"]
                for item in json.loads(stratum("health", "list", server.root, "--json", expect=2).stdout)["findings"]
            ]
            assert "STR-AUDIT-FAILING" in codes
            (small / "ballast").unlink()
            for _ in range(100):
                try:
                    s3.put_object(Bucket="photos", Key="again", Body=b"x")
                    break
                except ClientError:
                    continue
            else:
                pytest.fail("it does not recover")
            assert any(event.get("event") == "unrecorded" for event in events(server))
        stratum("audit", "verify", server.root)
    finally:
        subprocess.run(["umount", small], check=True)


def test_strangers_cannot_fill_the_log(tmp_path: Path) -> None:
    count = 300
    with serving(tmp_path, settings=AUDIT) as server:
        server.client().create_bucket(Bucket="photos")
        for number in range(count):
            assert server.raw("PUT", f"/photos/{number}", b"x")[0] == 403
        root = server.root
    told = [json.loads(line) for line in stratum("audit", "export", root).stdout.splitlines()]
    full = [event for event in told if event.get("status") == 403]
    counted = [event for event in told if event.get("event") == "refusals"]
    assert len(full) + sum(event["count"] for event in counted) == count
    assert len(full) <= 2 * RECORDED_MAX, "of each worker's share"
    assert {event["from"] for event in counted} == {"127.0.0.1"}
    assert "refusals" in stratum("audit", "tail", root, "-n", "20").stdout
