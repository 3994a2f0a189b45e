"""Bad input: every row of the must-refuse list that this scope has. Nothing refused may leave anything behind."""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import itertools
import socket
import time
import uuid
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
import requests

from stratum import checksums
from stratum.s3 import signatures

if TYPE_CHECKING:
    from tests.support import Server

DATA = b"x" * 20_000


class Signer:
    """Signs by hand, so that a test can do it wrongly."""

    def __init__(self, server: Server, bucket: str) -> None:
        self.server = server
        self.bucket = bucket
        self.host = server.endpoint.partition("//")[2]

    def headers(
        self, method: str, path: str, payload: str, *, extra: dict[str, str] | None = None, unsigned: tuple[str, ...] = (), stamp: str | None = None, scope: str | None = None,
        secret: str | None = None, access_key: str | None = None, query: str = "", encoding: str = "latin-1",
    ) -> dict[str, str]:  # fmt: skip
        stamp = stamp or dt.datetime.now(dt.UTC).strftime("%Y%m%dT%H%M%SZ")
        scope = scope or f"{stamp[:8]}/us-east-1/s3/aws4_request"
        headers = {"host": self.host, "x-amz-date": stamp, "x-amz-content-sha256": payload, **(extra or {})}
        signed = sorted(name for name in headers if name not in unsigned)
        canonical = signatures.canonical_request(method, path.encode(), query, headers.get, signed, payload)
        date, region, service = scope.split("/")[:3]
        key = signatures.signing_key(secret or self.server.secret_key, date, region, service)
        signature = signatures.signature(key, signatures.string_to_sign(stamp, scope, canonical.encode(encoding)))
        credential = f"{access_key or self.server.access_key}/{scope}"
        self.seed, self.key, self.stamp, self.scope = signature, key, stamp, scope
        return {
            **headers,
            "Authorization": f"AWS4-HMAC-SHA256 Credential={credential},SignedHeaders={';'.join(signed)},Signature={signature}",
        }

    def send(self, method: str, path: str, body: bytes, headers: dict[str, str], query: str = "") -> tuple[int, str]:
        headers = {name: value for name, value in headers.items() if name != "host"}
        status, _, answer = self.server.raw(
            method,
            quote(path, safe="/~%") + (f"?{query}" if query else ""),
            body,
            headers={"Host": self.host, **headers},
        )
        return status, answer.partition(b"<Code>")[2].partition(b"</Code>")[0].decode()


@pytest.fixture
def signer(server: Server) -> Signer:
    bucket = f"refuse-{uuid.uuid4().hex[:10]}"
    server.client().create_bucket(Bucket=bucket)
    return Signer(server, bucket)


@pytest.fixture(autouse=True)
def nothing_left(signer: Signer) -> Any:
    yield
    assert "Contents" not in signer.server.client().list_objects_v2(Bucket=signer.bucket, Prefix="bad")


def put_bad(
    signer: Signer, body: bytes = DATA, payload: str | None = None, *, path: str | None = None, **how: Any
) -> tuple[int, str]:
    path = path or f"/{signer.bucket}/bad"
    return signer.send(
        "PUT", path, body, signer.headers("PUT", path, payload or hashlib.sha256(body).hexdigest(), **how)
    )


def test_a_good_request_is_accepted(signer: Signer) -> None:
    assert put_bad(signer, path=f"/{signer.bucket}/good") == (200, "")


def test_signatures(signer: Signer) -> None:
    old = dt.datetime.now(dt.UTC) - dt.timedelta(hours=2)
    today = time.strftime("%Y%m%d", time.gmtime())
    assert put_bad(signer, secret="wrong") == (403, "SignatureDoesNotMatch")
    assert put_bad(signer, access_key="AKIDOESNOTEXIST") == (403, "InvalidAccessKeyId")
    assert put_bad(signer, stamp=old.strftime("%Y%m%dT%H%M%SZ")) == (403, "RequestTimeTooSkewed")
    assert put_bad(signer, scope=f"{today}/us-east-1/s3/aws5_request") == (400, "AuthorizationHeaderMalformed")
    assert put_bad(signer, scope=f"{today}/us-east-1/ec2/aws4_request") == (400, "AuthorizationHeaderMalformed")
    assert put_bad(signer, scope=f"{today}/mars/s3/aws4_request") == (400, "AuthorizationHeaderMalformed")
    assert put_bad(signer, scope="20200101/us-east-1/s3/aws4_request") == (400, "AuthorizationHeaderMalformed")
    assert put_bad(signer, extra={"x-amz-meta-a": "b"}, unsigned=("x-amz-meta-a",)) == (403, "AccessDenied")
    assert put_bad(signer, unsigned=("host",)) == (403, "AccessDenied")
    path = f"/{signer.bucket}/bad"
    for header, answer in (
        ("AWS4-HMAC-SHA256 nonsense", (400, "AuthorizationHeaderMalformed")),
        ("AWS HAHAHA", (400, "InvalidArgument")),
        ("", (403, "AccessDenied")),
        ("Bearer x", (400, "InvalidArgument")),
    ):
        assert signer.send("PUT", path, DATA, {"Authorization": header}) == answer, header
    both = signer.headers("PUT", path, hashlib.sha256(DATA).hexdigest(), query="X-Amz-Signature=0")
    assert signer.send("PUT", path, DATA, both, "X-Amz-Signature=0") == (400, "InvalidArgument")
    assert signer.send("PUT", path, DATA, {}) == (403, "AccessDenied")
    assert signer.send("PUT", f"/{signer.bucket}", b"", {}) == (403, "AccessDenied")


def test_the_payload_must_be_what_was_signed(signer: Signer) -> None:
    assert put_bad(signer, DATA, hashlib.sha256(b"other").hexdigest()) == (400, "XAmzContentSHA256Mismatch")
    assert put_bad(signer, DATA, "NOT-A-HASH") == (400, "InvalidArgument")
    assert put_bad(signer, extra={"content-md5": base64.b64encode(bytes(16)).decode()}) == (400, "BadDigest")
    assert put_bad(signer, extra={"content-md5": ""}) == (400, "InvalidDigest")
    assert put_bad(signer, extra={"x-amz-checksum-crc32": "AAAAAA==", "x-amz-checksum-sha1": "x"}) == (
        400,
        "InvalidRequest",
    )
    assert put_bad(signer, extra={"x-amz-sdk-checksum-algorithm": "CRC99"}) == (400, "InvalidRequest")


def chunked(
    signer: Signer,
    chunks: list[bytes],
    *,
    spoil: int | None = None,
    trailer: bytes | None = None,
    trailer_signature: bool = True,
) -> bytes:
    """A signed aws-chunked body; `spoil` is the chunk whose signature is wrong."""
    previous, body = signer.seed, b""
    for number, chunk in enumerate([*chunks, b""]):
        text = signatures.chunk_string_to_sign(signer.stamp, signer.scope, previous, hashlib.sha256(chunk).hexdigest())
        previous = signatures.signature(signer.key, text)
        shown = "0" * 64 if number == spoil else previous
        body += b"%x;chunk-signature=%s\r\n" % (len(chunk), shown.encode()) + (chunk + b"\r\n" if chunk else b"")
    if trailer is not None:
        text = signatures.trailer_string_to_sign(
            signer.stamp, signer.scope, previous, hashlib.sha256(trailer + b"\n").hexdigest()
        )
        signature = signatures.signature(signer.key, text) if trailer_signature else "0" * 64
        body += trailer + b"\r\nx-amz-trailer-signature:" + signature.encode() + b"\r\n"
    return body + b"\r\n"


def send_chunked(
    signer: Signer,
    chunks: list[bytes],
    *,
    key: str = "bad",
    decoded: int | None = None,
    payload: str = signatures.STREAMING_SIGNED,
    extra: dict[str, str] | None = None,
    body: bytes | None = None,
    **how: Any,
) -> tuple[int, str]:
    path = f"/{signer.bucket}/{key}"
    more = {
        "x-amz-decoded-content-length": str(sum(map(len, chunks)) if decoded is None else decoded),
        "content-encoding": "aws-chunked",
        **(extra or {}),
    }
    if decoded == -1:
        del more["x-amz-decoded-content-length"]
    headers = signer.headers("PUT", path, payload, extra=more)
    return signer.send("PUT", path, chunked(signer, chunks, **how) if body is None else body, headers)


def test_signed_chunks(signer: Signer) -> None:
    good = [b"a" * 70_000, b"b" * 8192, b"c"]
    assert send_chunked(signer, good, key="good") == (200, "")
    got = signer.server.client().get_object(Bucket=signer.bucket, Key="good")
    assert got["Body"].read() == b"".join(good)
    assert "ContentEncoding" not in got
    for spoil in range(4):
        assert send_chunked(signer, good, spoil=spoil) == (403, "SignatureDoesNotMatch")
    assert send_chunked(signer, good, decoded=5) == (400, "IncompleteBody")
    assert send_chunked(signer, good, decoded=999_999) == (400, "IncompleteBody")
    assert send_chunked(signer, good, decoded=-1) == (411, "MissingContentLength")
    assert send_chunked(signer, [b"short", b"b" * 9000]) == (403, "InvalidChunkSizeError")
    assert send_chunked(signer, good, body=b"zz;chunk-signature=0\r\n") == (400, "IncompleteBody")
    assert send_chunked(signer, good, body=b"5\r\nhello\r\n0\r\n\r\n") == (400, "IncompleteBody")
    assert send_chunked(signer, good, body=b"") == (400, "IncompleteBody")


def test_trailers(signer: Signer) -> None:
    data = b"a" * 9000
    crc = base64.b64encode(__import__("zlib").crc32(data).to_bytes(4, "big"))
    announced = {"x-amz-trailer": "x-amz-checksum-crc32"}
    kind = signatures.STREAMING_SIGNED_TRAILER
    line = b"x-amz-checksum-crc32:" + crc
    assert send_chunked(signer, [data], key="good", payload=kind, extra=announced, trailer=line) == (200, "")
    assert send_chunked(signer, [data], payload=kind, extra=announced, trailer=line, trailer_signature=False) == (
        403,
        "SignatureDoesNotMatch",
    )
    assert send_chunked(signer, [data], payload=kind, extra=announced, trailer=b"x-amz-checksum-crc32:AAAAAA==") == (
        400,
        "BadDigest",
    )
    assert send_chunked(signer, [data], payload=kind, extra=announced, trailer=b"x-amz-checksum-sha1:AAAA") == (
        400,
        "MalformedTrailerError",
    )
    unsigned = signatures.STREAMING_UNSIGNED_TRAILER
    framed = b"%x\r\n" % len(data) + data + b"\r\n0\r\n"
    assert send_chunked(
        signer, [data], key="good", payload=unsigned, extra=announced, body=framed + line + b"\r\n\r\n"
    ) == (200, "")
    assert send_chunked(signer, [data], payload=unsigned, extra=announced, body=framed + b"\r\n") == (
        400,
        "MalformedTrailerError",
    )
    assert send_chunked(
        signer, [data], payload=unsigned, extra=announced, body=framed + line + b"\r\n" + line + b"\r\n\r\n"
    ) == (400, "MalformedTrailerError")
    assert send_chunked(signer, [data], payload=unsigned, extra={"x-amz-trailer": "x-evil"}, body=framed + b"\r\n") == (
        400,
        "InvalidRequest",
    )


@pytest.mark.parametrize("algorithm", checksums.ALGORITHMS)
def test_a_trailer_of_each_algorithm_is_compared(signer: Signer, algorithm: str) -> None:
    name = f"x-amz-checksum-{algorithm.lower()}"
    hasher = checksums.new(algorithm)
    hasher.update(b"hello")
    right, wrong = checksums.encode(hasher.digest()), checksums.encode(bytes(len(hasher.digest())))
    for key, value, answer in (("good", right, (200, "")), ("bad", wrong, (400, "BadDigest"))):
        body = f"5\r\nhello\r\n0\r\n{name}:{value}\r\n\r\n".encode()
        found = send_chunked(
            signer,
            [b"hello"],
            key=key,
            payload=signatures.STREAMING_UNSIGNED_TRAILER,
            extra={"x-amz-trailer": name},
            body=body,
        )
        assert found == answer


def test_a_trailer_of_an_unknown_algorithm_is_refused(signer: Signer) -> None:
    body = b"5\r\nhello\r\n0\r\nx-amz-checksum-nonsense:AAAA\r\n\r\n"
    for more in ({"x-amz-trailer": "x-amz-checksum-nonsense"}, {"x-amz-sdk-checksum-algorithm": "NONSENSE"}):
        found = send_chunked(signer, [b"hello"], payload=signatures.STREAMING_UNSIGNED_TRAILER, extra=more, body=body)
        assert found == (400, "InvalidRequest")


def test_an_unsigned_trailer_still_needs_a_good_signature(signer: Signer) -> None:
    """The hole that several servers had: the streaming payload type skipped authentication."""
    path = f"/{signer.bucket}/bad"
    extra = {"x-amz-decoded-content-length": "5", "x-amz-trailer": "x-amz-checksum-crc32"}
    headers = signer.headers("PUT", path, signatures.STREAMING_UNSIGNED_TRAILER, extra=extra, secret="wrong")
    assert signer.send("PUT", path, b"5\r\nhello\r\n0\r\n\r\n", headers) == (403, "SignatureDoesNotMatch")
    client = signer.server.client()
    url = client.generate_presigned_url("put_object", {"Bucket": signer.bucket, "Key": "bad"})
    answer = requests.put(
        url + "0",
        data=b"5\r\nhello\r\n0\r\n\r\n",
        headers={"x-amz-content-sha256": signatures.STREAMING_UNSIGNED_TRAILER, "x-amz-decoded-content-length": "5"},
        timeout=10,
    )
    assert answer.status_code == 403


def test_presigned_urls(signer: Signer) -> None:
    client = signer.server.client()
    client.put_object(Bucket=signer.bucket, Key="good", Body=b"here")
    get = client.generate_presigned_url("get_object", {"Bucket": signer.bucket, "Key": "good"}, ExpiresIn=60)
    assert requests.get(get, timeout=10).content == b"here"
    assert requests.get(get.replace("good", "other"), timeout=10).status_code == 403
    # A browser asks before it uses the URL; that is not what was signed.
    assert requests.options(get, timeout=10).status_code == 400
    for seconds, status in ((0, 403), (-7, 403), (604_801, 403), ("x", 400), ("", 400)):
        answer = requests.get(get.replace("X-Amz-Expires=60", f"X-Amz-Expires={seconds}"), timeout=10)
        assert answer.status_code == status, seconds
        assert b"SignatureDoesNotMatch" not in answer.content, "the bad value itself is what is refused"
    url = client.generate_presigned_url("put_object", {"Bucket": signer.bucket, "Key": "bad"})
    for header in ("x-amz-copy-source", "x-amz-acl", "x-amz-meta-a", "x-amz-storage-class", "x-amz-tagging"):
        answer = requests.put(url, data=b"", headers={header: f"{signer.bucket}/good"}, timeout=10)
        assert (answer.status_code, b"HeadersNotSigned" in answer.content) == (403, True), header
    old = signer.server.client(signature_version="s3").generate_presigned_url(
        "get_object", {"Bucket": signer.bucket, "Key": "good"}
    )
    assert "AWSAccessKeyId" in old
    assert requests.get(old, timeout=10).content == b"here"
    assert requests.get(old + "x", timeout=10).status_code == 403
    assert requests.get(old.replace("Expires=1", "Expires=0"), timeout=10).status_code == 403


def test_keys_are_data_and_limits_hold(signer: Signer) -> None:
    client = signer.server.client()
    for key in ("a/../b", "./x", "/lead", "a//b", "%2e%2e/", "...", "..%2f", "-" * 1024):
        client.put_object(Bucket=signer.bucket, Key=key, Body=key.encode())
        assert client.get_object(Bucket=signer.bucket, Key=key)["Body"].read() == key.encode()
        client.copy_object(Bucket=signer.bucket, Key="copy", CopySource={"Bucket": signer.bucket, "Key": key})
        assert client.get_object(Bucket=signer.bucket, Key="copy")["Body"].read() == key.encode()
    assert len(client.list_objects_v2(Bucket=signer.bucket)["Contents"]) == 9
    unsigned = hashlib.sha256(b"").hexdigest()
    path = f"/{signer.bucket}/" + "k" * 1025
    assert signer.send("PUT", path, b"", signer.headers("PUT", path, unsigned)) == (400, "KeyTooLongError")
    assert signer.server.raw("GET", f"/{signer.bucket}/a%00b")[0] in {400, 403}
    path = f"/{signer.bucket}/bad"
    big = {"x-amz-meta-a": "v" * 2049}
    assert put_bad(signer, extra=big) == (400, "MetadataTooLarge")
    assert put_bad(signer, extra={f"x-amz-meta-{at}": "v" * 5000 for at in range(4)}) == (
        400,
        "RequestHeaderSectionTooLarge",
    )
    assert put_bad(signer, extra={"x-amz-acl": "everything"}) == (400, "InvalidArgument")
    for source in (
        "",
        "/",
        "nothing",
        f"{signer.bucket}/",
        f"{signer.bucket}/x?versionId=1",
        f"{signer.bucket}/x?evil=1",
    ):
        headers = signer.headers("PUT", path, unsigned, extra={"x-amz-copy-source": source})
        status, code = signer.send("PUT", path, b"", headers)
        assert status in {400, 404}, (source, status, code)


def test_xml_bodies(signer: Signer) -> None:
    path = f"/{signer.bucket}"
    bomb = b'<?xml version="1.0"?><!DOCTYPE d [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><Delete><Object><Key>&b;</Key></Object></Delete>'
    outside = b'<!DOCTYPE d [<!ENTITY x SYSTEM "file:///etc/passwd">]><Delete><Object><Key>&x;</Key></Object></Delete>'
    cases = [
        (bomb, "MalformedXML"), (outside, "MalformedXML"), (b"<Delete>", "MalformedXML"), (b"", "MalformedXML"), (b"<Other/>", "MalformedXML"),
        (b"<Delete><Evil/></Delete>", "MalformedXML"), (b"<Delete><Object><Key>a</Key><Key>b</Key></Object></Delete>", "MalformedXML"),
        (b"<Delete><Object/></Delete>", "MalformedXML"), (b"<Delete>" + b"<a>" * 50 + b"</a>" * 50 + b"</Delete>", "MalformedXML"),
        (b"<Delete>" + b" " * 9_000_000 + b"</Delete>", "MaxMessageLengthExceeded"), (b"\xff\xfe<", "MalformedXML"),
    ]  # fmt: skip
    for body, code in cases:
        headers = signer.headers("POST", path, hashlib.sha256(body).hexdigest(), query="delete=")
        assert signer.send("POST", path, body, headers, "delete") == (400, code), body[:60]


def test_query_parameters(signer: Signer) -> None:
    empty = hashlib.sha256(b"").hexdigest()
    path = f"/{signer.bucket}"

    def listed(query: str) -> tuple[int, str]:
        canonical = signatures.canonical_query(signatures.split_query(query))
        return signer.send("GET", path, b"", signer.headers("GET", path, empty, query=canonical), query)

    assert listed("max-keys=1000000000") == (200, "")
    for query in (
        "max-keys=-1",
        "max-keys=x",
        "max-keys=9999999999999999999",
        "encoding-type=base64",
        "list-type=3",
        "prefix=%ff",
        "list-type=2&continuation-token=x",
    ):
        assert listed(query) == (400, "InvalidArgument"), query
    assert listed("x-id=ListObjects&unknown=1") == (200, "")
    assert signer.send("PATCH", path, b"", {})[0] == 405
    assert signer.send("OPTIONS", path, b"", {}) == (400, "BadRequest")


def raw_socket(signer: Signer, request: bytes, *, close: bool = False) -> bytes:
    host, _, port = signer.host.partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(request)
        if close:
            return b""
        answer = b""
        while data := connection.recv(65536):
            answer += data
        return answer


def request_bytes(
    signer: Signer, headers: dict[str, str], body: bytes, *, length: int | None = None, more: str = ""
) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    framing = f"Content-Length: {length}\r\n" if length is not None else ""
    return f"PUT /{signer.bucket}/bad HTTP/1.1\r\n{lines}{framing}{more}Connection: close\r\n\r\n".encode() + body


def test_broken_framing(signer: Signer) -> None:
    headers = signer.headers("PUT", f"/{signer.bucket}/bad", signatures.UNSIGNED)
    raw_socket(signer, request_bytes(signer, headers, b"only a part", length=100_000), close=True)
    raw_socket(
        signer,
        request_bytes(signer, headers, b"5\r\nhello\r\n5\r\nwo", more="Transfer-Encoding: chunked\r\n"),
        close=True,
    )
    assert "Contents" not in signer.server.client().list_objects_v2(Bucket=signer.bucket)
    answer = raw_socket(
        signer, request_bytes(signer, headers, b"5\r\nhello\r\n0\r\n\r\n", more="Transfer-Encoding: chunked\r\n")
    )
    assert b"200" in answer.split(b"\r\n")[0]
    both = request_bytes(signer, headers, b"0\r\n\r\n", length=5, more="Transfer-Encoding: chunked\r\n")
    assert b"400" in raw_socket(signer, both).split(b"\r\n")[0]
    assert b"400" in raw_socket(signer, request_bytes(signer, headers, b"", length=-1)).split(b"\r\n")[0]
    assert b"411" in raw_socket(signer, request_bytes(signer, headers, b"")).split(b"\r\n")[0]
    proven = signer.headers("PUT", f"/{signer.bucket}/bad", hashlib.sha256(b"hello").hexdigest())
    answer = raw_socket(
        signer, request_bytes(signer, proven, b"5\r\nhello\r\n0\r\n\r\n", more="Transfer-Encoding: chunked\r\n")
    )
    assert b"200" in answer.split(b"\r\n")[0]
    signer.server.client().delete_object(Bucket=signer.bucket, Key="bad")


def test_metadata_that_is_not_ascii_comes_back_as_it_was_sent(signer: Signer) -> None:
    """Signed as Go's clients do (the bytes that are sent) and as botocore does (its text as UTF-8, sent as Latin-1)."""
    values = (b"caf\xc3\xa9", b"\xff", b"\xc3\xa0  la \xc3\x85", b"a\xa0 \xa0b", "größe".encode("latin-1"))
    for value, encoding in itertools.product(values, ("latin-1", "utf-8")):
        text = value.decode("latin-1")
        headers = signer.headers(
            "PUT", f"/{signer.bucket}/bad", signatures.UNSIGNED, extra={"x-amz-meta-a": text}, encoding=encoding
        )
        lines = b"".join(f"{name}: {text}\r\n".encode("latin-1") for name, text in headers.items())
        request = (
            f"PUT /{signer.bucket}/bad HTTP/1.1\r\n".encode()
            + lines
            + b"Content-Length: 1\r\nConnection: close\r\n\r\nx"
        )
        assert raw_socket(signer, request).split(b" ")[1] == b"200"
        found = signer.server.client().head_object(Bucket=signer.bucket, Key="bad")
        assert found["Metadata"]["a"].encode("latin-1") == value
    signer.server.client().delete_object(Bucket=signer.bucket, Key="bad")


def test_header_injection(signer: Signer) -> None:
    client = signer.server.client()
    client.put_object(Bucket=signer.bucket, Key="good", Body=b"x")
    url = client.generate_presigned_url(
        "get_object", {"Bucket": signer.bucket, "Key": "good", "ResponseContentType": "a\r\nX-Evil: 1"}
    )
    answer = requests.get(url, timeout=10)
    assert (answer.status_code, "X-Evil" in answer.headers) == (400, False)


def test_anonymous_overrides_are_refused(signer: Signer) -> None:
    client = signer.server.client()
    client.put_object(Bucket=signer.bucket, Key="good", Body=b"x", ACL="public-read")
    url = f"{signer.server.endpoint}/{signer.bucket}/good"
    assert requests.get(url, timeout=10).content == b"x"
    assert requests.get(url + "?response-content-type=text/html", timeout=10).status_code == 400


def test_preconditions_do_not_tell_strangers_anything(signer: Signer) -> None:
    client = signer.server.client()
    etag = client.put_object(Bucket=signer.bucket, Key="good", Body=b"x")["ETag"]
    url = f"{signer.server.endpoint}/{signer.bucket}/good"
    for headers in ({"If-None-Match": etag}, {"If-Match": '"no"'}, {}):
        assert requests.get(url, headers=headers, timeout=10).status_code == 403
    assert requests.get(f"{signer.server.endpoint}/{signer.bucket}/absent", timeout=10).status_code == 403
