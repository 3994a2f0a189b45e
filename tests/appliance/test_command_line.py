"""The command line as a user meets it, and `serve` from start to end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import Server, is_alive, need_fuse, serving, stratum


def test_init(tmp_path: Path) -> None:
    facts = json.loads(stratum("init", tmp_path / "v", "--json").stdout)
    assert set(facts) >= {"volume", "config", "endpoint", "admin", "access_key", "secret_key", "mount"}
    assert facts["mount"] is None
    assert facts["endpoint"].startswith("http://127.0.0.1:")
    assert facts["admin"] != facts["endpoint"]
    everything = b"".join(path.read_bytes() for path in (tmp_path / "v").rglob("*") if path.is_file())
    assert facts["secret_key"].encode() not in everything
    assert oct((tmp_path / "v" / "meta").stat().st_mode)[-3:] == "700"
    again = stratum("init", tmp_path / "v", "--json", expect=3)
    assert "not empty" in again.stderr
    assert json.loads(again.stdout)["error"] == "VolumeInvalid"
    other = json.loads(
        stratum(
            "init",
            tmp_path / "w",
            "--create",
            "--hot",
            tmp_path / "h1",
            "--hot",
            tmp_path / "h2",
            "--s3-listen",
            "127.0.0.1:1",
            "--mount",
            tmp_path / "m",
            "--json",
        ).stdout
    )
    assert (other["endpoint"], other["mount"]) == ("http://127.0.0.1:1", str(tmp_path / "m"))
    assert (tmp_path / "h1").is_dir()
    assert not (tmp_path / "w" / "hot").exists()


def test_users_keys_and_buckets(tmp_path: Path) -> None:
    stratum("init", tmp_path / "v")
    env = {"STRATUM_VOLUME": str(tmp_path / "v")}
    user = json.loads(stratum("user", "add", "ada", "--email", "ada@example.org", "--json", env=env).stdout)
    assert set(user) >= {"user_id", "access_key", "secret_key"}
    stratum("user", "add", tmp_path / "v", "ada", expect=5)
    stratum("user", "add", tmp_path / "v", "bob", "--email", "ada@example.org", expect=5)
    stratum("user", "add", tmp_path / "v", "no spaces", expect=6)
    assert {row["name"] for row in json.loads(stratum("user", "list", tmp_path / "v", "--json").stdout)["users"]} == {
        "admin",
        "ada",
    }
    assert "secret" not in stratum("key", "list", tmp_path / "v", "--json").stdout
    stratum("key", "revoke", tmp_path / "v", "NOSUCHKEY", expect=4)
    stratum("bucket", "create", "one", "--owner", "ada", env=env)
    stratum("bucket", "create", tmp_path / "v", "one", expect=5)
    stratum("bucket", "create", tmp_path / "v", "Not_A_Name", expect=6)
    stratum("bucket", "set", tmp_path / "v", "one", expect=6)
    stratum("bucket", "set", tmp_path / "v", "two", "--uid", "1", expect=4)
    changed = json.loads(
        stratum("bucket", "set", tmp_path / "v", "one", "--anonymous", "read", "--file-mode", "640", "--json").stdout
    )
    assert (changed["anonymous"], changed["file_mode"], changed["owner"]["name"]) == ("read", "0640", "ada")
    assert [
        row["name"] for row in json.loads(stratum("bucket", "list", tmp_path / "v", "--json").stdout)["buckets"]
    ] == ["one"]
    stratum("bucket", "remove", tmp_path / "v", "one")
    stratum("user", "remove", tmp_path / "v", "ada")
    refused = stratum("user", "remove", tmp_path / "v", "admin", expect=6)
    assert "last administrator" in refused.stderr
    assert json.loads(stratum("status", tmp_path / "v", "--json").stdout)["processes"] == []


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    assert "stratum init" in stratum("status", tmp_path / "none", expect=3).stderr
    stratum("init", tmp_path / "v")
    assert json.loads(stratum("config", "show", tmp_path / "v", "--json").stdout)["s3"]["workers"] == 2
    stratum("config", "check", tmp_path / "v")
    with (tmp_path / "v" / "stratum.toml").open("a") as file:
        file.write("\n[logg]\n")
    assert "did you mean 'log'" in stratum("config", "check", tmp_path / "v", expect=3).stderr
    for words in (["--help"], ["init", "--help"], ["user", "add", "--help"], ["--version"]):
        assert stratum(*words).stdout
    assert stratum("nonsense", expect=2).stderr


def test_fsck_and_gc_exit_codes(tmp_path: Path) -> None:
    stratum("init", tmp_path / "v")
    assert json.loads(stratum("fsck", tmp_path / "v", "--json").stdout) == {
        "schema": "stratum.fsck/1",
        "findings": [],
        "code": 0,
    }
    assert json.loads(stratum("gc", tmp_path / "v", "--json").stdout) == {
        "schema": "stratum.gc/1",
        "leaked_objects": 0,
        "leaked_bytes": 0,
        "applied": False,
    }
    stratum("bucket", "create", tmp_path / "v", "one")
    from stratum.volume import Volume

    with Volume(tmp_path / "v", "test") as opened, opened.store.transact() as tx:
        tx.delete(b"Bone")
    found = json.loads(stratum("fsck", tmp_path / "v", "--json", expect=1).stdout)
    assert [finding["kind"] for finding in found["findings"]] == ["directory-without-bucket"]
    stratum("fsck", tmp_path / "v", "--repair", expect=2)
    stratum("fsck", tmp_path / "v")
    stratum("fsck", tmp_path / "missing", expect=3)


def test_serve_ends_cleanly_while_somebody_sits_inside(tmp_path: Path) -> None:
    need_fuse()
    server = Server(tmp_path, mount=True).start()
    assert server.mount is not None
    stratum("bucket", "create", server.root, "inside")
    sitting = subprocess.Popen(["sleep", "60"], cwd=server.mount / "inside")
    writing = (server.mount / "inside" / "f").open("wb")
    writing.write(b"not yet flushed by a close")
    writing.flush()
    started = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - started < 30
    assert str(server.mount) not in Path("/proc/self/mounts").read_text()
    assert not any(
        str(server.root) in " ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])
    )
    sitting.kill()
    sitting.wait()
    with pytest.raises(OSError):
        writing.close()
    server.start()
    assert (server.mount / "inside" / "f").read_bytes() == b"not yet flushed by a close"
    assert server.stop() == 0


def test_a_mount_that_does_not_answer_is_fenced(tmp_path: Path) -> None:
    """A stopped daemon's kernel cache must not go on answering once S3 said 200."""
    need_fuse()
    server = Server(tmp_path, mount=True, settings={"mount": {"acknowledge_s_max": 1.0}}).start()
    assert server.mount is not None
    client = server.client()
    client.create_bucket(Bucket="fence")
    client.put_object(Bucket="fence", Key="f", Body=b"old")
    path = server.mount / "fence" / "f"
    assert path.read_bytes() == b"old"
    pid = next(process["pid"] for process in server.processes() if process["role"] == "mount")
    os.kill(pid, signal.SIGSTOP)
    client.put_object(Bucket="fence", Key="f", Body=b"new!")
    try:
        size: int | None = os.stat(path).st_size
    except OSError:
        size = None
    assert size in {None, 4}, "the old state was shown after the 200"
    # It was killed before S3 answered; the kernel may take a moment to take it apart.
    deadline = time.monotonic() + 10
    while is_alive(pid):
        assert time.monotonic() < deadline, "a fenced daemon is ended"
        time.sleep(0.01)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if path.read_bytes() == b"new!":
                break
        except OSError:
            pass
        time.sleep(0.1)
    assert path.read_bytes() == b"new!"
    assert server.stop() == 0


def test_logs_are_structured_and_hold_no_secrets(tmp_path: Path) -> None:
    with serving(tmp_path, settings={"log": {"format": "json"}}) as server:
        client = server.client()
        client.create_bucket(Bucket="logs")
        client.put_object(Bucket="logs", Key="k y", Body=b"x")
        url = client.generate_presigned_url("get_object", {"Bucket": "logs", "Key": "k y"})
        import requests

        requests.get(url, timeout=10)
        server.raw("GET", "/logs/%ff%0a%1b[31m")
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    requests_logged = [line for line in lines if line["event"] == "request"]
    assert {line["operation"] for line in requests_logged} >= {"CreateBucket", "PutObject", "GetObject"}
    assert all(line["request_id"] for line in requests_logged)
    text = server.log.read_text()
    assert server.secret_key not in text
    assert "X-Amz-Signature" not in text


def test_the_parts_alone(tmp_path: Path) -> None:
    need_fuse()
    server = Server(tmp_path, mount=True)
    assert server.mount is not None
    stratum("bucket", "create", server.root, "alone")

    def run(*words: str | Path) -> Any:
        return subprocess.Popen(
            [sys.executable, "-m", "stratum.cli.main", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    mount = run("mount", server.root, tmp_path / "elsewhere", "--json")
    assert json.loads(mount.stdout.readline())["ready"] is True
    (tmp_path / "elsewhere" / "alone" / "f").write_text("by the mount alone")
    second = stratum("mount", server.root, tmp_path / "second", expect=3)
    assert "mounted for writing" in second.stderr
    s3 = run("s3", server.root)
    client = server.client(retries={"max_attempts": 10})
    assert client.get_object(Bucket="alone", Key="f")["Body"].read() == b"by the mount alone"
    for process in (s3, mount):
        process.terminate()
        assert process.wait(20) == 0
        process.stdout.close()
    assert str(tmp_path / "elsewhere") not in Path("/proc/self/mounts").read_text()


def test_memory_stays_bounded(tmp_path: Path) -> None:
    """All processes together, while large objects pass in both directions: below 600 MiB PSS, the store's mapped pages apart."""
    import concurrent.futures

    with serving(tmp_path) as server:
        client = server.client(max_pool_connections=20)
        client.create_bucket(Bucket="memory")
        data = os.urandom(32 << 20)
        peak = 0
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            tasks = [
                pool.submit(client.put_object, Bucket="memory", Key=f"k{number}", Body=data) for number in range(16)
            ]
            tasks += [pool.submit(read_back, client, f"k{number % 4}") for number in range(8)]
            while not all(task.done() for task in tasks):
                pids = [process["pid"] for process in server.processes()]
                peak = max(peak, sum(unmapped_bytes(pid) for pid in pids))
            assert all(task.exception() is None for task in tasks[:16])
        print(f"peak {peak >> 20} MiB")
        assert 0 < peak < 600 << 20


def read_back(client: Any, key: str) -> bytes:
    data: bytes = client.get_object(Bucket="memory", Key=key)["Body"].read()
    return data


def unmapped_bytes(pid: int) -> int:
    """PSS of a process without the pages of the metadata store."""
    total, store = 0, False
    try:
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            if "-" in line.split(" ")[0] and not line.startswith(("Vm", "Pss")):
                store = line.endswith("data.mdb")
            elif line.startswith("Pss:") and not store:
                total += int(line.split()[1]) * 1024
    except OSError:
        return 0
    return total


def test_the_endpoint_ends_in_whatever_phase_it_is_asked_to(tmp_path: Path) -> None:
    """SIGTERM while the workers start must not get lost in them."""
    root = tmp_path / "volume"
    stratum("init", root)
    for step in range(8):
        words = [sys.executable, "-m", "stratum.cli.main", "s3", str(root)]
        with (tmp_path / "log").open("a") as log:
            process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=log)
        time.sleep(0.4 + 0.06 * step)  # the moment is what the test is about
        process.terminate()
        process.wait(10)
    assert "process_killed" not in (tmp_path / "log").read_text()
