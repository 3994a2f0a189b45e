"""What is read out of a connection: RFC 9112's framing, Upgrade, trailers, and answers in the order of the requests."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import shutil
import socket
import subprocess
import time
from email.utils import formatdate
from typing import TYPE_CHECKING

import pytest

from stratum.s3.connection import PIPELINED_MAX
from tests.support import serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support import Server

MIB = 1024 * 1024
CHUNKED = b"5\r\nhello\r\n0\r\n\r\n"
UPGRADE = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = {"s3": {"workers": 1, "idle_s_max": 5.0, "domain": "s3.test"}}
    with serving(tmp_path_factory.mktemp("framing"), settings=settings) as server:
        client = server.client()
        client.create_bucket(Bucket="open", ACL="public-read-write")
        client.put_object(Bucket="open", Key="large", Body=bytes(8 * MIB), ACL="public-read")
        client.put_object(Bucket="open", Key="small", Body=b"hello", ACL="public-read")
        yield server


def connect(server: Server) -> socket.socket:
    host, _, port = server.endpoint.partition("//")[2].partition(":")
    return socket.create_connection((host, int(port)), timeout=20)


class Reader:
    """Answers of a connection, one after the other."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._got = b""

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Raises EOFError at the end."""
        while b"\r\n\r\n" not in self._got:
            self._more()
        head, _, self._got = self._got.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        length = int(headers.get("content-length", "0"))
        while len(self._got) < length:
            self._more()
        body, self._got = self._got[:length], self._got[length:]
        return int(lines[0].split(" ")[1]), headers, body

    def _more(self) -> None:
        data = self._connection.recv(65536)
        if not data:
            raise EOFError
        self._got += data


def ask(server: Server, *pieces: bytes) -> tuple[int, str]:
    """Status and code of the first answer to what is sent in pieces."""
    with connect(server) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            connection.sendall(piece)
            if len(pieces) > 1:
                time.sleep(0.02)  # a segment of its own; were it none, the test would ask less
        status, _, body = Reader(connection).answer()
    return status, body.partition(b"<Code>")[2].partition(b"</Code>")[0].decode()


def head(request_line: str, *lines: str, host: bool = True) -> bytes:
    return "\r\n".join([request_line, *(("Host: h",) if host else ()), *lines, "", ""]).encode("latin-1")


def stored(server: Server, key: str) -> bytes:
    found: bytes = server.client().get_object(Bucket="open", Key=key)["Body"].read()
    return found


# -- Upgrade ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framing", ["Content-Length: 5", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize("cut", [None, -1, 0, 3])
def test_an_upgrade_that_is_not_offered_is_ignored(server: Server, framing: str, cut: int | None) -> None:
    """Java's HttpClient asks for h2c with its first request on every connection, whatever its method and body."""
    sent = f"PUT /open/upgraded HTTP/1.1\r\nHost: h\r\n{UPGRADE}{framing}\r\n\r\n".encode()
    body = b"hello" if "Length" in framing else CHUNKED
    at = len(sent) + (cut or 0)
    pieces = [sent + body] if cut is None else [(sent + body)[:at], (sent + body)[at:]]
    server.client().delete_object(Bucket="open", Key="upgraded")
    with connect(server) as connection:
        reader = Reader(connection)
        for number in range(2):
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(0.02 if cut is not None else 0)
            status, headers, _ = reader.answer()
            assert (status, headers.get("connection")) == (200, None), f"request {number}"
        connection.sendall(f"GET /open/upgraded HTTP/1.1\r\nHost: h\r\n{UPGRADE}\r\n".encode())
        assert reader.answer()[0] in {200, 403}
    assert stored(server, "upgraded") == b"hello"


JAVA = """
import java.net.*; import java.net.http.*; import java.net.http.HttpResponse.BodyHandlers; import java.net.http.HttpRequest.BodyPublishers;
public class Main {
  public static void main(String[] words) throws Exception {
    HttpClient client = HttpClient.newHttpClient();
    byte[] data = new byte[300000];
    for (int i = 0; i < data.length; i++) data[i] = (byte) (i * 31);
    URI sized = URI.create(words[0] + "/open/java"), chunked = URI.create(words[0] + "/open/java-chunked");
    int first = client.send(HttpRequest.newBuilder(sized).PUT(BodyPublishers.ofByteArray(data)).header("x-amz-acl", "public-read").build(), BodyHandlers.discarding()).statusCode();
    int second = client.send(HttpRequest.newBuilder(chunked).PUT(BodyPublishers.ofInputStream(() -> new java.io.ByteArrayInputStream(data))).header("x-amz-acl", "public-read").build(),
      BodyHandlers.discarding()).statusCode();
    int alike = 0;
    for (URI uri : new URI[] {sized, chunked, sized})
      if (java.util.Arrays.equals(client.send(HttpRequest.newBuilder(uri).build(), BodyHandlers.ofByteArray()).body(), data)) alike++;
    System.out.println(first + " " + second + " " + alike);
  }
}
"""


@pytest.mark.skipif(shutil.which("java") is None, reason="no Java here")
def test_javas_own_client(server: Server, tmp_path: Path) -> None:
    source = tmp_path / "Main.java"
    source.write_text(JAVA)
    done = subprocess.run(["java", source, server.endpoint], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["200", "200", "3"], done.stderr


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_curl_that_asks_for_http_2(server: Server) -> None:
    url = f"{server.endpoint}/open/curl"
    words = [
        "curl",
        "--silent",
        "--http2",
        "--write-out",
        "%{http_code} %{http_version} ",
        "-X",
        "PUT",
        "--data-binary",
        "hello",
        url,
        "--next",
    ]
    words += ["--silent", "--http2", f"{server.endpoint}/open/small"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.stdout == "200 1.1 hello", done.stderr
    assert stored(server, "curl") == b"hello"


# -- bodies -----------------------------------------------------------------------------------------------------------


def test_trailers_are_no_headers(server: Server) -> None:
    trailers = b"5\r\nhello\r\n0\r\nContent-Type: evil/trailer\r\nx-amz-meta-evil: yes\r\nx-amz-acl: nonsense\r\n\r\n"
    sent = head("PUT /open/trailed HTTP/1.1", "Content-Type: good/header", "Transfer-Encoding: chunked")
    for pieces in ((sent + trailers,), (sent, trailers), (sent + trailers[:20], trailers[20:])):
        assert ask(server, *pieces) == (200, "")
        found = server.client().head_object(Bucket="open", Key="trailed")
        assert (found["ContentType"], found["Metadata"], found["ContentLength"]) == ("good/header", {}, 5)


def test_a_body_is_whole_only_with_its_end(server: Server) -> None:
    client = server.client()
    for body in (b"5\r\nhello\r\n", b"5\r\nhel", b"", b"5\r\nhello\r\n0\r\nA: b\r\n"):
        with connect(server) as connection:
            connection.sendall(head("PUT /open/partial HTTP/1.1", "Transfer-Encoding: chunked") + body)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(65536)[:12] in {b"", b"HTTP/1.1 400"}
    for body in (b"5\r\nhelloX\r\n0\r\n\r\n", b"5 \r\nhello\r\n0\r\n\r\n", b"5\nhello\r\n0\r\n\r\n", b"+5\r\nhello\r\n0\r\n\r\n", b"0x5\r\nhello\r\n0\r\n\r\n",
                 b"\xb2\r\nhe\r\n0\r\n\r\n", b"1_0\r\nhe", b"fffffffffffffffff\r\n", b"5\r\nhello\r\n0\r\nA: b\n\r\n", b"5\r\nhello\r\n0\r\nContent-Length: 3\r\n\r\n"):  # fmt: skip
        sent = head("PUT /open/partial HTTP/1.1", "Transfer-Encoding: chunked")
        for pieces in ((sent + body,), (sent, body)):
            assert ask(server, *pieces) == (400, "IncompleteBody"), (body, len(pieces))
    assert "Contents" not in client.list_objects_v2(Bucket="open", Prefix="partial")
    for body in (
        b"5;a=b;c\r\nhello\r\n0;d\r\n\r\n",
        b'5;a="x\\"y"\r\nhello\r\n0\r\n\r\n',
        b"00000000000000000005\r\nhello\r\n000\r\n\r\n",
    ):
        assert ask(server, head("PUT /open/whole HTTP/1.1", "Transfer-Encoding: chunked") + body) == (200, "")
        assert stored(server, "whole") == b"hello"


def test_a_trailer_without_end_is_refused(server: Server) -> None:
    """It would be gathered in memory."""
    sent = head("PUT /open/partial HTTP/1.1", "Transfer-Encoding: chunked") + b"5\r\nhello\r\n0\r\nA: "
    assert ask(server, sent, *[b"b" * 65536] * 3) == (400, "IncompleteBody")
    many = b"".join(b"A%d: b\r\n" % at for at in range(600))
    assert ask(server, sent[:-3] + many + b"\r\n") == (400, "IncompleteBody")


@pytest.mark.parametrize(
    ("lines", "answer"),
    [
        (["Transfer-Encoding: gzip"], (400, "BadRequest")),
        (["Transfer-Encoding: xchunked"], (400, "BadRequest")),
        (["Transfer-Encoding: identity"], (400, "BadRequest")),
        (["Transfer-Encoding: chunked, gzip"], (400, "BadRequest")),
        (["Transfer-Encoding: chunked, chunked"], (400, "BadRequest")),
        (["Transfer-Encoding:"], (400, "BadRequest")),
        (["Transfer-Encoding: gzip, chunked"], (501, "NotImplemented")),
        (["Transfer-Encoding: gzip", "Transfer-Encoding: chunked"], (501, "NotImplemented")),
        (["Transfer-Encoding: ,chunked"], (501, "NotImplemented")),
        (["Transfer-Encoding: chunked", "Content-Length: 5"], (400, "BadRequest")),
        (["Content-Length: 5", "Transfer-Encoding: chunked"], (400, "BadRequest")),
        (["Content-Length: 5", "Content-Length: 5"], (400, "BadRequest")),
        (["Content-Length: 5, 5"], (400, "BadRequest")),
        (["Content-Length: +5"], (400, "BadRequest")),
        (["Content-Length: \xb2"], (400, "BadRequest")),
        (["Content-Length: 5_0"], (400, "BadRequest")),
        (["Content-Length: " + "9" * 5000], (400, "BadRequest")),
        (["Content-Length:"], (400, "BadRequest")),
        (["Content-Length: 5", "A: b", " c"], (400, "BadRequest")),
        (["Content-Length: 5", "A : b"], (400, "BadRequest")),
        (["Content-Length: 5", ": b"], (400, "BadRequest")),
        (["Content-Length: 5", "A: b\nB: c"], (400, "BadRequest")),
        (["Content-Length: 5", "A: \0"], (400, "BadRequest")),
        (["Content-Length: 5", "Host: h"], (400, "BadRequest")),
        (["Content-Length: 5", *["A: b"] * 600], (400, "RequestHeaderSectionTooLarge")),
    ],
)  # fmt: skip
def test_a_head_that_can_be_read_in_two_ways_is_refused(
    server: Server, lines: list[str], answer: tuple[int, str]
) -> None:
    body = CHUNKED if any("chunked" in line or "Transfer" in line for line in lines) else b"hello"
    assert ask(server, head("PUT /open/refused HTTP/1.1", *lines) + body) == answer
    assert "Contents" not in server.client().list_objects_v2(Bucket="open", Prefix="refused")


def test_what_may_be_read_in_one_way_only_is_accepted(server: Server) -> None:
    for lines, body in (
        (["Transfer-Encoding:  Chunked  "], CHUNKED),
        (["Content-Length:   5 \t "], b"hello"),
        (["content-length:05"], b"hello"),
        (["Content-Length: 5", "A:", "B:   ", "Expect: 100-Continue"], b"hello"),
        (["Content-Length: 5", "Expect: 200-ok"], b"hello"),
        (["Content-Length: 5", "Expect:"], b"hello"),
    ):
        with connect(server) as connection:
            connection.sendall(head("PUT /open/accepted HTTP/1.1", *lines) + body)
            reader = Reader(connection)
            status = reader.answer()[0]
            assert (reader.answer()[0] if status == 100 else status) == 200, lines
        assert stored(server, "accepted") == b"hello"
        server.client().delete_object(Bucket="open", Key="accepted")


def test_blanks_around_a_value_are_no_part_of_it(server: Server) -> None:
    lines = ("Content-Length: 1", "Content-Type:  text/x \t", "x-amz-meta-a: \t b  c \t ", "x-amz-acl: public-read ")
    assert ask(server, head("PUT /open/blanks HTTP/1.1", *lines) + b"x") == (200, "")
    found = server.client().head_object(Bucket="open", Key="blanks")
    assert (found["ContentType"], found["Metadata"]) == ("text/x", {"a": "b  c"})


def test_an_expectation_of_http_1_0_is_ignored(server: Server) -> None:
    with connect(server) as connection:
        connection.sendall(head("PUT /open/old HTTP/1.0", "Content-Length: 5", "Expect: 100-continue"))
        time.sleep(0.1)
        connection.sendall(b"hello")
        assert Reader(connection).answer()[0] == 200
    assert ask(server, head("PUT /open/old HTTP/1.0", "Content-Length: 5", "Expect: nonsense") + b"hello") == (200, "")


# -- targets and hosts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_line", "hosts", "answer"),
    [
        ("GET /open/small HTTP/1.1", [], (400, "BadRequest")),
        ("GET /open/small HTTP/1.1", [""], (400, "BadRequest")),
        ("GET /open/small HTTP/1.1", ["h", "h"], (400, "BadRequest")),
        ("GET /open/small HTTP/1.1", ["h h"], (400, "BadRequest")),
        ("GET /open/small HTTP/1.1", ["h/open"], (400, "BadRequest")),
        ("GET /open/small HTTP/1.1", ["user@h"], (400, "BadRequest")),
        ("GET /open/small HTTP/1.1", ["h:x"], (400, "BadRequest")),
        ("GET /open/small HTTP/1.1", ["[::1]:9000"], (200, "")),
        ("GET /open/small HTTP/1.1", ["h:"], (200, "")),
        ("GET /open/small HTTP/1.0", [], (200, "")),
        ("GET /open/small HTTP/1.0", ["h", "h"], (400, "BadRequest")),
        ("GET http://h/open/small HTTP/1.1", ["other"], (200, "")),
        ("GET HTTP://h:9/open/small?x=http://a/b HTTP/1.1", ["other"], (200, "")),
        ("GET http://h/open/small HTTP/1.1", [], (400, "BadRequest")),
        ("GET http://user@h/open/small HTTP/1.1", ["h"], (400, "BadRequest")),
        ("GET ftp://h/open/small HTTP/1.1", ["h"], (400, "BadRequest")),
        ("GET http://h HTTP/1.1", ["h"], (200, "")),
        ("GET http://h?max-buckets=1 HTTP/1.1", ["h"], (200, "")),
        ("GET * HTTP/1.1", ["h"], (400, "BadRequest")),
        ("OPTIONS * HTTP/1.1", ["h"], (400, "BadRequest")),
        ("CONNECT h:80 HTTP/1.1", ["h"], (405, "MethodNotAllowed")),
        ("GET //large HTTP/1.1", ["h"], (400, "InvalidBucketName")),
        ("GET // HTTP/1.1", ["h"], (400, "InvalidBucketName")),
        ("GET /%2Flarge HTTP/1.1", ["h"], (400, "InvalidBucketName")),
        ("GET /open/small HTTP/2.0", ["h"], (505, "HTTPVersionNotSupported")),
        ("GET /open/small HTTP/0.9", ["h"], (505, "HTTPVersionNotSupported")),
        ("GET /open/small", ["h"], (505, "HTTPVersionNotSupported")),
        ("GET /open/small HTTP/1.2", ["h"], (400, "BadRequest")),
        ("get /open/small HTTP/1.1", ["h"], (400, "BadRequest")),
    ],
)
def test_targets_and_hosts(server: Server, request_line: str, hosts: list[str], answer: tuple[int, str]) -> None:
    lines = [f"Host: {host}" for host in hosts]
    assert ask(server, head(request_line, *lines, host=False)) == answer


def test_http_2_with_prior_knowledge_is_refused(server: Server) -> None:
    assert ask(server, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n") == (400, "BadRequest")


def version_2(server: Server, method: str, resource: str, host: str, path: str, body: bytes = b"") -> tuple[int, str]:
    """What comes of a request that is signed with version 2 for `resource`."""
    date = formatdate(usegmt=True)
    digest = hmac.digest(server.secret_key.encode(), f"{method}\n\n\n{date}\n{resource}".encode(), hashlib.sha1)
    signed = f"Authorization: AWS {server.access_key}:{base64.b64encode(digest).decode()}"
    lines = (f"Host: {host}", f"Date: {date}", signed, f"Content-Length: {len(body)}")
    return ask(server, head(f"{method} {path} HTTP/1.1", *lines, host=False) + body)


def test_version_2_signs_the_bucket_wherever_it_stands(server: Server) -> None:
    """`/BUCKET/KEY` with the bucket of the Host, even where the key begins with the bucket's name."""
    client = server.client()
    client.put_object(Bucket="open", Key="secret", Body=b"s")
    client.put_object(Bucket="open", Key="open/secret", Body=b"s")
    for host in ("open.s3.test", "OPEN.S3.TEST:9000"):
        assert version_2(server, "GET", "/open/secret", host, "/secret") == (200, "")
        assert version_2(server, "GET", "/open/open/secret", host, "/open/secret") == (200, "")
        assert version_2(server, "GET", "/open/secret", host, "/open/secret") == (403, "SignatureDoesNotMatch")
        assert version_2(server, "PUT", "/open/secret", host, "/open/secret", b"x") == (403, "SignatureDoesNotMatch")
        assert version_2(server, "GET", "/open/", host, "/") == (200, "")
    assert version_2(server, "GET", "/open/secret", "s3.test", "/open/secret") == (200, "")
    assert version_2(server, "GET", "/open/open/secret", "s3.test", "/open/secret") == (403, "SignatureDoesNotMatch")
    assert stored(server, "open/secret") == b"s"
    client.delete_object(Bucket="open", Key="open/secret")


def test_a_header_that_is_no_list_stands_once(server: Server) -> None:
    joined = "AWS4-HMAC-SHA256 Credential=a/20200101/us-east-1/s3/aws4_request,SignedHeaders=host,Signature=0"
    for sent in (
        f"{joined}, {joined}",
        f"{joined},Signature=0",
        f"{joined},SignedHeaders=host,Signature=0",
        f"{joined.replace('host', 'host,Extra=1')}",
    ):
        assert ask(server, head("GET /open/small HTTP/1.1", f"Authorization: {sent}")) == (
            400,
            "AuthorizationHeaderMalformed",
        )
    both = ["Authorization: AWS a:b", "Authorization: AWS a:b"]
    assert ask(server, head("GET /open/small HTTP/1.1", *both)) == (400, "InvalidRequest")
    assert ask(server, head("GET /open/small HTTP/1.1", "Range: bytes=0-1", "Range: bytes=0-1")) == (
        400,
        "InvalidRequest",
    )


# -- one after the other ----------------------------------------------------------------------------------------------


def test_a_request_that_cannot_be_read_does_not_spoil_the_answer_before_it(server: Server) -> None:
    """The refusal would stand in the middle of the body of the one that is being sent."""
    for garbage in (
        b"\x16\x03\x01 hello\r\n\r\n",
        head("GET /open/x HTTP/1.1", host=False),
        b"GET / HTTP/1.1\r\nA b\r\n",
    ):
        with connect(server) as connection:
            connection.sendall(head("GET /open/large HTTP/1.1") + garbage)
            reader = Reader(connection)
            status, headers, body = reader.answer()
            assert (status, headers.get("connection"), body == bytes(8 * MIB)) == (200, None, True)
            status, headers, body = reader.answer()
            assert (status, headers["connection"]) == (400, "close")
            assert b"<Code>BadRequest</Code>" in body
            with pytest.raises(EOFError):
                reader.answer()


def test_pipelined_requests_are_answered_in_their_order(server: Server) -> None:
    puts = [head(f"PUT /open/line{at} HTTP/1.1", "Content-Length: 1") + b"%d" % at for at in range(5)]
    gets = [head("GET /open/large HTTP/1.1", f"Range: bytes=0-{at}") for at in range(5)]
    with connect(server) as connection:
        connection.sendall(b"\r\n".join(piece for pair in zip(puts, gets, strict=True) for piece in pair))
        reader = Reader(connection)
        for at in range(5):
            assert reader.answer()[0] == 200
            status, _, body = reader.answer()
            assert (status, len(body)) == (206, at + 1)


def test_few_requests_of_a_connection_wait_for_an_answer(server: Server) -> None:
    """A segment of ten thousand held the loop for as long as it took to read them, and kilobytes for each."""
    with connect(server) as connection:
        connection.sendall(head("GET /open/small HTTP/1.1") * 1000)
        reader, found = Reader(connection), []
        with contextlib.suppress(EOFError):
            while True:
                found.append(reader.answer()[0])
    assert set(found[:-1]) == {200}
    assert (found[-1], len(found)) == (503, PIPELINED_MAX + 2)


def test_nothing_is_answered_behind_a_connection_that_closes(server: Server) -> None:
    with connect(server) as connection:
        connection.sendall(head("GET /open/large HTTP/1.1", "Range: bytes=0-9", "Connection: close") * 2)
        reader = Reader(connection)
        assert reader.answer()[0] == 206
        with pytest.raises(EOFError):
            reader.answer()


def test_a_length_that_is_too_large_is_refused_before_its_body(server: Server) -> None:
    for more in ([], ["Expect: 100-continue"]):
        sent = head("PUT /open/huge HTTP/1.1", f"Content-Length: {(5 << 30) + 1}", *more)
        assert ask(server, sent) == (400, "EntityTooLarge")


@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_a_client_that_sends_all_before_it_reads_hears_why_it_was_refused(server: Server, framing: str) -> None:
    """A connection closed with bytes unread is reset, and a client that is still sending hears that alone."""
    data = bytes(24 * MIB)
    chunked = framing == "chunks"
    line = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(data)}"
    with connect(server) as connection:
        connection.sendall(head("PUT /nobody/k HTTP/1.1", line) + (b"%x\r\n" % len(data) if chunked else b""))
        for at in range(0, len(data), MIB):
            connection.sendall(data[at : at + MIB])
        reader = Reader(connection)
        status, headers, body = reader.answer()
        assert (status, headers["connection"]) == (404, "close")
        assert b"<Code>NoSuchBucket</Code>" in body
        with pytest.raises(EOFError):
            reader.answer()
