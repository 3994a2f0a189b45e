"""Clients that stall, vanish or talk nonsense: they are cut off, hold no thread and leave nothing."""

from __future__ import annotations

import os
import re
import socket
import time
from typing import TYPE_CHECKING

import psutil
import pytest

from stratum.s3.connection import HEAD_BYTES_MAX
from tests.support import serving

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support import Server

MIB = 1024 * 1024
IDLE_S_MAX = 1.5


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with one worker of two threads that waits for nobody longer than IDLE_S_MAX."""
    settings = {"s3": {"idle_s_max": IDLE_S_MAX, "workers": 1, "threads": 2}}
    with serving(tmp_path_factory.mktemp("impatient"), settings=settings) as server:
        client = server.client()
        client.create_bucket(Bucket="open", ACL="public-read-write")
        client.put_object(Bucket="open", Key="large", Body=os.urandom(96 * MIB), ACL="public-read")
        yield server


def connect(server: Server) -> socket.socket:
    host, _, port = server.endpoint.partition("//")[2].partition(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    return connection


def read_all(connection: socket.socket) -> bytes:
    pieces = []
    try:
        while data := connection.recv(65536):
            pieces.append(data)
    except ConnectionResetError:
        pass  # a server that closes with bytes of ours unread resets; what it said before that came
    return b"".join(pieces)


def worker_rss_bytes(server: Server) -> int:
    assert server.process is not None
    family = psutil.Process(server.process.pid).children(recursive=True)
    return max(p.memory_full_info().uss for p in family if "stratum.s3.worker" in " ".join(p.cmdline()))


def test_stalled_uploads_hold_no_thread_and_are_cut_off(impatient: Server) -> None:
    head = "PUT /open/stalled{} HTTP/1.1\r\nHost: h\r\nContent-Length: 5000000\r\n\r\n"
    stalled = [connect(impatient) for _ in range(24)]
    for number, connection in enumerate(stalled):
        connection.sendall(head.format(number).encode() + b"x" * 2_000_000)
    client = impatient.client()
    client.put_object(Bucket="open", Key="quick", Body=b"q" * MIB)
    assert client.get_object(Bucket="open", Key="quick")["Body"].read() == b"q" * MIB
    for connection in stalled:
        assert b"RequestTimeout" in read_all(connection)
        connection.close()
    assert [item["Key"] for item in client.list_objects_v2(Bucket="open")["Contents"]] == ["large", "quick"]


def test_a_reader_that_stops_is_cut_off_and_costs_little_memory(impatient: Server) -> None:
    before = worker_rss_bytes(impatient)
    readers = [connect(impatient) for _ in range(12)]
    for connection in readers:
        connection.sendall(b"GET /open/large HTTP/1.1\r\nHost: h\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    assert impatient.client().head_object(Bucket="open", Key="large")["ContentLength"] == 96 * MIB
    assert worker_rss_bytes(impatient) - before < 12 * 8 * MIB
    # Nothing is read until the server has given up on all of them.
    wanted = rb"client_gone .*read nothing"
    impatient.wait_for_log(wanted, times=12)
    for connection in readers:
        assert len(read_all(connection)) < 96 * MIB, "a body that was cut off must not look whole"
        connection.close()


def test_a_reader_that_vanishes_ends_its_stream(impatient: Server) -> None:
    connection = connect(impatient)
    connection.sendall(b"GET /open/large HTTP/1.1\r\nHost: h\r\n\r\n")
    assert connection.recv(100).startswith(b"HTTP/1.1 200")
    connection.close()
    impatient.wait_for_log(rb"client_gone .*went away", times=1)


def test_a_slow_reader_gets_every_byte(impatient: Server) -> None:
    """It reads all the time, but for longer than IDLE_S_MAX the kernel has no room for more."""
    connection = connect(impatient)
    connection.sendall(b"GET /open/large HTTP/1.1\r\nHost: h\r\nRange: bytes=0-20971519\r\nConnection: close\r\n\r\n")
    pieces = []
    for _ in range(25):
        pieces.append(connection.recv(65536))
        time.sleep(IDLE_S_MAX / 5)
    head, _, body = b"".join([*pieces, read_all(connection)]).partition(b"\r\n\r\n")
    assert re.match(rb"HTTP/1.1 206", head)
    assert len(body) == 20 * MIB


def test_a_head_without_end_is_refused(impatient: Server) -> None:
    connection = connect(impatient)
    connection.sendall(b"GET / HTTP/1.1\r\nHost: h\r\n" + b"X-Long: " + b"a" * 20_000 + b"\r\n")
    for number in range(6):
        connection.sendall(f"X-{number}: ".encode() + b"b" * (HEAD_BYTES_MAX // 4) + b"\r\n")
    answer = read_all(connection)
    assert b"400" in answer.split(b"\r\n")[0]
    assert b"<Code>RequestHeaderSectionTooLarge</Code>" in answer


def test_what_is_not_http_is_refused_in_s3s_words(impatient: Server) -> None:
    connection = connect(impatient)
    connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
    answer = read_all(connection)
    assert b"400" in answer.split(b"\r\n")[0]
    assert b"<Code>BadRequest</Code>" in answer
    assert b"x-amz-request-id: " in answer


def test_nothing_is_read_behind_a_body_that_was_refused(impatient: Server) -> None:
    """A client that waits for 100-continue does not send its body after a refusal; what follows must not be taken for it."""
    connection = connect(impatient)
    connection.sendall(
        b"PUT /closed/k HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 40\r\n\r\n"
        b"GET /open/quick HTTP/1.1\r\nHost: h\r\n\r\n"
    )
    answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 404")
    assert b"connection: close" in answer.lower()
    assert answer.count(b"HTTP/1.1") == 1
