"""Limits of requests and bytes a second: shared by all workers, refused with a date to come back, and forgiven in time."""

from __future__ import annotations

import concurrent.futures
import socket
import subprocess
import sys
import time
import uuid
from functools import partial
from typing import TYPE_CHECKING

import pytest
import requests
from botocore.exceptions import ClientError

from stratum import limits
from stratum.errors import InvalidArgument, TooManyRequests
from stratum.limits import BURST_S, DEBT_S_MAX, Limit, Limiter, Paces
from stratum.s3.connection import REFUSED_MAX, address_of
from stratum.volume import Volume
from tests.s3.test_access import add_user
from tests.support import make_volume, serving, stratum

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support import Server

SECOND = 1_000_000_000


class Clock:
    def __init__(self) -> None:
        self.now_ns = 5 * SECOND

    def __call__(self) -> int:
        return self.now_ns


@pytest.fixture
def bucket(server: Server) -> Iterator[str]:
    name = f"limit-{uuid.uuid4().hex[:12]}"
    server.client().create_bucket(Bucket=name)
    yield name
    stratum("limit", "set", server.root, "--bucket", name, "--remove")


def test_a_pause_earns_a_second_s_worth(tmp_path: Path) -> None:
    clock = Clock()
    first, second = Paces(tmp_path, clock), Paces(tmp_path, clock)

    def taken(paces: Paces, count: int) -> int:
        return sum(paces.charge("users u", 1, 1, 10, patience_s=0.0) == 0.0 for _ in range(count))

    assert taken(first, 7) + taken(second, 50) == 10 * BURST_S
    clock.now_ns += SECOND // 2
    assert taken(second, 50) == 5
    clock.now_ns += 100 * SECOND
    assert taken(first, 50) == 10
    assert first.charge("users other", 1, 1, 10, patience_s=0.0) == 0.0
    # Another boot: the clock begins anew, and moments far ahead are forgiven.
    clock.now_ns = 0
    first.charge("users u", 1, 10 * 7200, 10, patience_s=1e9)
    clock.now_ns = 1
    assert taken(first, 50) == 10
    first.close()
    second.close()


CHARGING = """
import sys
from pathlib import Path
from stratum.limits import Paces
paces = Paces(Path(sys.argv[1]), lambda: 5_000_000_000)
print(sum(paces.charge("buckets b", 1, 1, 1000, patience_s=0.0) == 0.0 for _ in range(1000)))
"""


def test_processes_share_what_is_owed(tmp_path: Path) -> None:
    started = [
        subprocess.Popen([sys.executable, "-c", CHARGING, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    assert sum(int(process.communicate(timeout=60)[0]) for process in started) == 1000


def test_who_owes_too_many_bytes_is_refused_until_less_is_owed(tmp_path: Path) -> None:
    make_volume(tmp_path / "volume")
    with Volume(tmp_path / "volume", "test") as opened:
        opened.mutate(lambda tx: limits.put(tx, "buckets", "b", Limit(0, 1000)))
        limiter = Limiter(opened.meta)
        with opened.snapshot() as reader:
            pace = limiter.admit(reader, None, "b")
            assert pace is not None
            assert pace.sent(1000) == pytest.approx(0, abs=0.1)
            assert pace.sent(3000) == pytest.approx(3, abs=0.2)
            assert limiter.admit(reader, None, "b") is not None
            pace.sent(20000)
            with pytest.raises(TooManyRequests) as refused:
                limiter.admit(reader, None, "b")
            assert refused.value.retry_s == pytest.approx(23 - DEBT_S_MAX, abs=1.1)
            assert limiter.admit(reader, None, "other") is None
        for wrong in (Limit(-1, 0), Limit()):
            with pytest.raises(InvalidArgument):
                opened.mutate(partial(limits.put, kind="buckets", name="b", limit=wrong))
        opened.mutate(lambda tx: limits.put(tx, "buckets", "b", None))
        with opened.snapshot() as reader:
            assert limiter.admit(reader, None, "b") is None
            assert reader.get(b"glimits") is None


def test_requests_beyond_a_limit_are_refused_over_all_workers(server: Server, bucket: str) -> None:
    client, facts = add_user(server)
    stratum("limit", "set", server.root, "--user", facts["name"], "--requests-per-s", "5")
    assert facts["name"] in stratum("limit", "show", server.root).stdout
    began = time.monotonic()

    def ask(_: int) -> tuple[int, dict[str, str]]:
        try:
            client.list_buckets()
        except ClientError as error:
            answer = error.response["ResponseMetadata"]
            return answer["HTTPStatusCode"], answer["HTTPHeaders"]
        return 200, {}

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(60)))
    seconds = time.monotonic() - began
    refused = [headers for status, headers in answers if status == 503]
    assert 60 - len(refused) <= 5 * BURST_S + 5 * seconds + 1
    assert refused
    assert all(int(headers["retry-after"]) >= 1 for headers in refused)
    server.client().list_buckets()
    stratum("limit", "set", server.root, "--user", facts["name"], "--remove")
    for _ in range(20):
        client.list_buckets()


def test_bodies_keep_to_the_limit_of_bytes(server: Server, bucket: str) -> None:
    s3 = server.client()
    body = bytes(1_000_000)
    s3.put_object(Bucket=bucket, Key="big", Body=body)
    stratum("limit", "set", server.root, "--bucket", bucket, "--bytes-per-s", "1000000")
    began = time.monotonic()
    assert s3.get_object(Bucket=bucket, Key="big")["Body"].read() == body
    s3.put_object(Bucket=bucket, Key="other", Body=body)
    assert s3.get_object(Bucket=bucket, Key="other")["Body"].read() == body
    # Three seconds' worth, of which one is free: never faster than that, whatever the machine does.
    assert time.monotonic() - began > 1.5


def test_anonymous_requests_have_a_limit_of_their_own(server: Server, bucket: str) -> None:
    stratum("bucket", "set", server.root, bucket, "--anonymous", "read")
    server.client().put_object(Bucket=bucket, Key="k", Body=b"x")
    stratum("limit", "set", server.root, "--anonymous", "--requests-per-s", "2")
    try:
        found = {requests.get(f"{server.endpoint}/{bucket}/k", timeout=10).status_code for _ in range(30)}
        assert found == {200, 503}
        assert server.client().get_object(Bucket=bucket, Key="k")["Body"].read() == b"x"
    finally:
        stratum("limit", "set", server.root, "--anonymous", "--remove")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--bucket", "b"],
        ["--anonymous", "--user", "u", "--remove"],
        ["--anonymous", "--remove", "--bytes-per-s", "1"],
    ],
)
def test_wrong_words(server: Server, words: list[str]) -> None:
    stratum("limit", "set", server.root, *words, expect=6)


def _asked_from(server: Server, address: str) -> socket.socket:
    """A connection from a client address, with a request under way."""
    host, _, port = server.endpoint.partition("//")[2].partition(":")
    connection = socket.create_connection((host, int(port)), timeout=20, source_address=(address, 0))
    connection.sendall(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
    return connection


def test_one_address_has_a_share_of_the_connections(tmp_path: Path) -> None:
    with serving(tmp_path, settings={"s3": {"workers": 1, "connections_per_address_max": 4}}) as server:
        kept = [_asked_from(server, "127.0.0.1") for _ in range(4)]
        for connection in kept:
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        refused = [_asked_from(server, "127.0.0.1") for _ in range(2)]
        for connection in refused:
            answer = b""
            while data := connection.recv(65536):
                answer += data
            assert answer.startswith(b"HTTP/1.1 503")
            assert b"<Code>SlowDown</Code>" in answer
            assert b"retry-after: 1" in answer
            connection.close()
        with _asked_from(server, "127.0.0.2") as other:
            assert other.recv(65536).startswith(b"HTTP/1.1 200")
        kept.pop().close()
        assert _status_soon(server, "127.0.0.1") == b"HTTP/1.1 200"
        for connection in kept:
            connection.close()


def test_an_address_that_goes_on_connecting_is_dropped(tmp_path: Path) -> None:
    with serving(tmp_path, settings={"s3": {"workers": 1, "connections_per_address_max": 4}}) as server:
        host, _, port = server.endpoint.partition("//")[2].partition(":")
        idle = [socket.create_connection((host, int(port)), timeout=20) for _ in range(4 + REFUSED_MAX + 1)]
        assert idle[-1].recv(1) == b"", "closed long before the head's time is over"
        with _asked_from(server, "127.0.0.2") as other:
            assert other.recv(65536).startswith(b"HTTP/1.1 200")
        for connection in idle:
            connection.close()


def test_trusted_proxies_have_no_such_limit(tmp_path: Path) -> None:
    settings = {"s3": {"workers": 1, "connections_per_address_max": 2, "trusted_proxies": ["127.0.0.2"]}}
    with serving(tmp_path, settings=settings) as server:
        kept = [_asked_from(server, "127.0.0.2") for _ in range(6)]
        for connection in kept:
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
            connection.close()


def _status_soon(server: Server, address: str) -> bytes:
    """Once the worker has heard of what closed."""
    for _ in range(200):
        with _asked_from(server, address) as connection:
            status = connection.recv(65536)[:12]
        if status != b"HTTP/1.1 503":
            break
    return status


def test_of_ipv6_a_network_is_one_client() -> None:
    assert address_of(("2001:db8::1", 1)) == address_of(("2001:db8::ffff", 2)) != address_of(("2001:db8:0:1::1", 1))
    assert address_of(("::ffff:192.0.2.1", 1)) == "192.0.2.1"
    assert address_of(("fe80::1%eth0", 1)) == "fe80::/64"
    assert (address_of(("192.0.2.1", 1)), address_of(None)) == ("192.0.2.1", "")
