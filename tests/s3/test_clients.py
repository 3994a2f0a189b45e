"""The programs people point at an S3 endpoint, over http and https."""

from __future__ import annotations

import datetime as dt
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from boto3.s3.transfer import TransferConfig

from tests.support import serving, stratum

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support import Server

BIN = Path(sys.executable).parent


def run(words: list[str | Path], env: dict[str, str], *, fails: bool = False) -> str:
    done = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "HOME": env.get("HOME", "/nonexistent"), **env},
        timeout=200,
    )
    assert (done.returncode != 0) == fails, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture
def bucket(server: Server) -> str:
    name = f"client-{uuid.uuid4().hex[:12]}"
    server.client().create_bucket(Bucket=name)
    return name


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small tree with awkward names."""
    root = tmp_path / "tree"
    for name, data in {
        "a.txt": b"a",
        "sub/b.bin": os.urandom(300_000),
        "sub/deep/c d+e.txt": b"c" * 9000,
        "sub/ü.txt": b"u",
        "empty": b"",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def aws_environment(server: Server, home: Path) -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": server.access_key,
        "AWS_SECRET_ACCESS_KEY": server.secret_key,
        "AWS_DEFAULT_REGION": "us-east-1",
        "HOME": str(home),
        "AWS_ENDPOINT_URL": server.endpoint,
    }


def test_aws(server: Server, bucket: str, tree: Path, tmp_path: Path) -> None:
    env = aws_environment(server, tmp_path)
    aws: list[str | Path] = [BIN / "python", BIN / "aws", "s3"]
    run([*aws, "cp", tree / "a.txt", f"s3://{bucket}/one"], env)
    run([*aws, "sync", tree, f"s3://{bucket}/tree"], env)
    run([*aws, "sync", f"s3://{bucket}/tree", tmp_path / "back"], env)
    assert contents(tmp_path / "back") == contents(tree)
    (tree / "a.txt").unlink()
    run([*aws, "sync", "--delete", tree, f"s3://{bucket}/tree"], env)
    assert "a.txt" not in run([*aws, "ls", "--recursive", f"s3://{bucket}/tree"], env)
    url = run([*aws, "presign", f"s3://{bucket}/one"], env).strip()
    import requests

    assert requests.get(url, timeout=10).content == b"a"
    run([*aws, "cp", "--no-sign-request", f"s3://{bucket}/one", tmp_path / "x"], env, fails=True)
    stratum("bucket", "set", server.root, bucket, "--anonymous", "read")
    run([*aws, "cp", "--no-sign-request", f"s3://{bucket}/one", tmp_path / "x"], env)
    run([*aws, "cp", "--no-sign-request", tmp_path / "x", f"s3://{bucket}/y"], env, fails=True)
    run([*aws, "mv", f"s3://{bucket}/one", f"s3://{bucket}/moved"], env)
    run([*aws, "rm", "--recursive", f"s3://{bucket}/"], env)
    assert server.client().list_objects_v2(Bucket=bucket)["KeyCount"] == 0
    run([*aws, "rb", f"s3://{bucket}"], env)


def test_s3cmd(server: Server, bucket: str, tree: Path, tmp_path: Path) -> None:
    host = server.endpoint.partition("//")[2]
    config = tmp_path / "s3cfg"
    config.write_text(
        f"[default]\naccess_key = {server.access_key}\nsecret_key = {server.secret_key}\nhost_base = {host}\nhost_bucket = {host}\nuse_https = False\nbucket_location = us-east-1\n"
    )
    s3cmd: list[str | Path] = [BIN / "python", BIN / "s3cmd", "-c", config, "--no-progress"]
    env = {"HOME": str(tmp_path), "LANG": "C.UTF-8"}
    run([*s3cmd, "sync", f"{tree}/", f"s3://{bucket}/tree/"], env)
    run([*s3cmd, "sync", f"s3://{bucket}/tree/", f"{tmp_path}/back/"], env)
    assert contents(tmp_path / "back") == contents(tree)
    run([*s3cmd, "cp", f"s3://{bucket}/tree/a.txt", f"s3://{bucket}/copy"], env)
    run([*s3cmd, "setacl", "--acl-public", f"s3://{bucket}/copy"], env)
    assert "File size: 1" in run([*s3cmd, "info", f"s3://{bucket}/copy"], env)
    run([*s3cmd, "del", "--recursive", "--force", f"s3://{bucket}"], env)
    assert server.client().list_objects_v2(Bucket=bucket)["KeyCount"] == 0


def test_rclone(server: Server, bucket: str, tree: Path, tmp_path: Path) -> None:
    env = {
        "RCLONE_CONFIG": str(tmp_path / "none"), "RCLONE_CONFIG_S_TYPE": "s3", "RCLONE_CONFIG_S_PROVIDER": "Other", "RCLONE_CONFIG_S_ENDPOINT": server.endpoint,
        "RCLONE_CONFIG_S_ACCESS_KEY_ID": server.access_key, "RCLONE_CONFIG_S_SECRET_ACCESS_KEY": server.secret_key, "RCLONE_CONFIG_S_REGION": "us-east-1", "HOME": str(tmp_path),
    }  # fmt: skip
    (tree / "large").write_bytes(os.urandom(12_000_000))
    run(["rclone", "sync", tree, f"s:{bucket}/tree", "--s3-upload-cutoff", "5M", "--s3-chunk-size", "5M"], env)
    run(["rclone", "check", tree, f"s:{bucket}/tree"], env)
    run(["rclone", "copy", f"s:{bucket}/tree", tmp_path / "back"], env)
    assert contents(tmp_path / "back") == contents(tree)
    run(["rclone", "moveto", f"s:{bucket}/tree/large", f"s:{bucket}/renamed"], env)
    run(["rclone", "purge", f"s:{bucket}/tree"], env)
    assert [item["Key"] for item in server.client().list_objects_v2(Bucket=bucket)["Contents"]] == ["renamed"]


def test_restic(server: Server, bucket: str, tree: Path, tmp_path: Path) -> None:
    env = {
        "RESTIC_REPOSITORY": f"s3:{server.endpoint}/{bucket}", "RESTIC_PASSWORD": "test", "AWS_ACCESS_KEY_ID": server.access_key,
        "AWS_SECRET_ACCESS_KEY": server.secret_key, "AWS_DEFAULT_REGION": "us-east-1", "HOME": str(tmp_path), "RESTIC_CACHE_DIR": str(tmp_path / "cache"),
    }  # fmt: skip
    run(["restic", "init"], env)
    run(["restic", "backup", tree], env)
    (tree / "more").write_bytes(os.urandom(100_000))
    run(["restic", "backup", tree], env)
    run(["restic", "check", "--read-data"], env)
    run(["restic", "restore", "latest", "--target", tmp_path / "back"], env)
    assert contents(tmp_path / "back" / tree.relative_to("/")) == contents(tree)
    run(["restic", "forget", "--keep-last", "1", "--prune"], env)
    run(["restic", "check"], env)


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    root = tmp_path_factory.mktemp("secure")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1)).not_valid_after(now + dt.timedelta(days=2)).sign(key, hashes.SHA256())
    )  # fmt: skip
    (root / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (root / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    with serving(
        root,
        settings={"s3": {"tls_certificate": str(root / "cert.pem"), "tls_key": str(root / "key.pem"), "workers": 1}},
    ) as running:
        yield running


@pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning")
def test_boto3_over_https(secure: Server, tmp_path: Path) -> None:
    """Over https the SDK sends unsigned chunks with a trailing checksum inside HTTP chunks."""
    client = secure.client()
    client.create_bucket(Bucket="secure")
    data = os.urandom(9_000_000)
    for size in (0, 10, 100_000, len(data)):
        client.put_object(Bucket="secure", Key="k", Body=data[:size], ChecksumAlgorithm="CRC64NVME")
        assert client.get_object(Bucket="secure", Key="k")["Body"].read() == data[:size]
    (tmp_path / "file").write_bytes(data)
    client.upload_file(
        str(tmp_path / "file"),
        "secure",
        "mp",
        Config=TransferConfig(multipart_threshold=5 << 20, multipart_chunksize=5 << 20),
    )
    client.download_file("secure", "mp", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == data
    client.delete_objects(Bucket="secure", Delete={"Objects": [{"Key": "k"}, {"Key": "mp"}]})
    assert client.list_objects_v2(Bucket="secure")["KeyCount"] == 0
