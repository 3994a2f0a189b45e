"""Wherever a request is cut into segments, alone or behind others on its connection, it gets the same answer and leaves the same behind.

A real socket whose other end is the worker's own protocol and application, in one event loop: only so is it certain that a
segment was read before the next one came.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import hashlib
import random
import re
import socket
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import pytest
import uvicorn
import uvloop
from uvicorn.server import ServerState

from stratum import buckets, log, metrics, multipart, objects, volume
from stratum.errors import StratumError
from stratum.identity import Identities
from stratum.s3 import app, framing, routes, signatures
from stratum.s3.chunked import ChunkedDecoder
from stratum.s3.connection import Connection
from stratum.s3.errors import S3Error
from stratum.schema import ObjectMetadata
from stratum.volume import Volume
from tests.support import longer, new_seed, put

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from pathlib import Path

    from stratum.transaction import MetadataTransaction

BUCKET = "splits"
HOST = "splits.test"
AT_ONCE = 24
ANSWER_S_MAX = 60
HALF_S = 0.05
_VARYING = re.compile(
    rb"x-amz-request-id: \w+|x-amz-id-2: [^\r]*|<HostId>[^<]*|<RequestId>[^<]*|<UploadId>[^<]*|<LastModified>[^<]*|(?i:last-modified|date): [^\r]*|<CreationDate>[^<]*|request \w{16}"
)


class Watched(Connection):
    """Says what it has read, so that the next segment is sent behind that."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn narrows it
        self.read_bytes, self.gone, self.news = 0, False, asyncio.Event()
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.read_bytes += len(data)
        self.news.set()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.gone = True
        self.news.set()

    async def has_read(self, count: int) -> bool:
        """Whether so many bytes were read; not if the connection was closed before."""
        while self.read_bytes < count and not self.gone and not self.transport.is_closing():
            self.news.clear()
            await self.news.wait()
        return self.read_bytes >= count


class Endpoint:
    """A worker without a listener."""

    def __init__(self, root: Path) -> None:
        volume.create(root, {})
        self.stack = contextlib.ExitStack()
        self.volume = self.stack.enter_context(Volume(root, "s3"))
        user, self.access_key, self.secret_key = Identities(self.volume).add_user("admin", admin=True)
        self.volume.mutate(lambda tx: buckets.create(tx, BUCKET, user.user_id, acl="public-read-write"))
        self.volume.mutate(lambda tx: buckets.change(tx, BUCKET, anonymous="read-write"))
        put(self.volume, "here", b"0123456789", bucket=BUCKET)
        self.upload = self.volume.mutate(self._begin_upload)
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self._loop = self._runner.get_loop()
        self._application = app.Application(self.volume)
        self.statuses: list[int] = []
        """What the application answered, also where nobody heard it."""
        self._busy, self._idle = 0, asyncio.Event()
        self._idle.set()
        self._config = uvicorn.Config(
            self._noting, interface="asgi3", http=Connection, lifespan="off", ws="none", log_config=None, access_log=False,
            proxy_headers=False, server_header=False,
        )  # fmt: skip
        self._config.load()
        self._state = ServerState()

    def _begin_upload(self, tx: MetadataTransaction) -> str:
        return multipart.create(
            tx, BUCKET, b"parts", owner="", acl="", metadata=ObjectMetadata(), algorithm="", checksum_type=""
        ).upload_id

    async def _noting(self, scope: Any, receive: Any, send: Any) -> None:
        async def noting(message: dict[str, Any]) -> None:
            if "status" in message:
                self.statuses.append(message["status"])
            await send(message)

        self._busy += 1
        self._idle.clear()
        try:
            await self._application(scope, receive, noting)
        finally:
            self._busy -= 1
            if not self._busy:
                self._idle.set()

    async def rests(self) -> None:
        """Until no request is under way."""
        await self._idle.wait()

    def close(self) -> None:
        self._runner.close()
        self.stack.close()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._runner.run(work)

    async def connect(self) -> tuple[socket.socket, Watched]:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        made: list[Watched] = []

        def protocol() -> Watched:
            made.append(Watched(config=self._config, server_state=self._state, app_state={}, _loop=loop))
            return made[0]

        await loop.connect_accepted_socket(cast("Callable[[], asyncio.Protocol]", protocol), theirs)
        return ours, made[0]

    async def answer(self, segments: list[bytes], *, half: bool = False) -> bytes:
        """All that comes back, until the connection is closed; `half`: which is closed from this side first."""
        loop = asyncio.get_running_loop()
        ours, theirs = await self.connect()
        reading = loop.create_task(self._all(ours))
        sent = 0
        try:
            for segment in segments:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    await loop.sock_sendall(ours, segment)
                sent += len(segment)
                if not await theirs.has_read(sent):
                    break
            if half:
                await asyncio.wait([reading], timeout=HALF_S)  # whoever still waits for more is told that none comes
                with contextlib.suppress(OSError):
                    ours.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(ANSWER_S_MAX):
                return await reading
        finally:
            reading.cancel()
            ours.close()

    @staticmethod
    async def _all(connection: socket.socket) -> bytes:
        loop, pieces = asyncio.get_running_loop(), []
        with contextlib.suppress(ConnectionResetError):
            while data := await loop.sock_recv(connection, 65536):
                pieces.append(data)
        return _VARYING.sub(b"", b"".join(pieces))

    def left_behind(self, key: str) -> Any:
        """What of an object does not change with each PUT of it."""
        with self.volume.snapshot() as reader:
            try:
                state = objects.head(reader, buckets.get(reader, BUCKET), key.encode())
            except StratumError:
                return None
        found = state.metadata
        return (
            state.etag,
            state.size,
            found.content_type,
            dict(found.user),
            dict(found.headers),
            dict(found.tags),
            found.acl,
        )


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    log.set_up("human", "error")
    found = Endpoint(tmp_path_factory.mktemp("splits") / "volume")
    yield found
    found.close()
    log.set_up("human", "info")


@dataclass
class Case:
    """A request, and the object it may leave."""

    name: str
    raw: bytes
    key: str = ""
    statuses: tuple[int, ...] = (200,)


def plain(method: str, target: str, *lines: str, body: bytes = b"", close: bool = True, host: bool = True) -> bytes:
    """Unsigned: what the bucket allows everybody."""
    head = [
        f"{method} {target} HTTP/1.1",
        *(["Host: h"] if host else []),
        *lines,
        *(["Connection: close"] if close else []),
    ]
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body


def signed(
    endpoint: Endpoint, method: str, path: str, query: str = "", body: bytes = b"", *, headers: dict[str, str] | None = None,
    payload: str | None = None, chunks: list[bytes] | None = None, trailer: bytes = b"",
) -> bytes:  # fmt: skip
    """Signature Version 4, with the chunks of a streaming body signed if `payload` says so."""
    stamp = dt.datetime.now(dt.UTC).strftime("%Y%m%dT%H%M%SZ")
    scope = f"{stamp[:8]}/us-east-1/s3/aws4_request"
    payload = payload or hashlib.sha256(body).hexdigest()
    fields = {"host": HOST, "x-amz-date": stamp, "x-amz-content-sha256": payload, **(headers or {})}
    names = sorted(fields)
    canonical_query = signatures.canonical_query(signatures.split_query(query))
    canonical = signatures.canonical_request(method, path.encode(), canonical_query, fields.get, names, payload)
    key = signatures.signing_key(endpoint.secret_key, stamp[:8], "us-east-1", "s3")
    seed = signatures.signature(key, signatures.string_to_sign(stamp, scope, canonical.encode()))
    if chunks is not None:
        body = b""
        for chunk in [*chunks, b""]:
            extension = b""
            if payload != signatures.STREAMING_UNSIGNED_TRAILER:
                text = signatures.chunk_string_to_sign(stamp, scope, seed, hashlib.sha256(chunk).hexdigest())
                seed = signatures.signature(key, text)
                extension = b";chunk-signature=" + seed.encode()
            body += b"%x%s\r\n" % (len(chunk), extension) + (chunk + b"\r\n" if chunk else b"")
        body += trailer + b"\r\n"
    fields["Authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={endpoint.access_key}/{scope},SignedHeaders={';'.join(names)},Signature={signatures.signature(key, signatures.string_to_sign(stamp, scope, canonical.encode()))}"
    )
    lines = [f"{name}: {value}" for name, value in fields.items()]
    if body or method in {"PUT", "POST"}:
        lines.append(f"Content-Length: {len(body)}")
    return plain(method, path + (f"?{query}" if query else ""), *lines, body=body, host=False)


HTTP_CHUNKS = b"5;a=b\r\nhello\r\n3\r\nabc\r\n0\r\n\r\n"
HTTP_TRAILERS = b"5\r\nhello\r\n0\r\nContent-Type: evil/trailer\r\nX-Amz-Meta-Evil: yes\r\nx-amz-acl: evil\r\n\r\n"
UPGRADE = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAI")


def framing_cases() -> list[Case]:
    """What is hard to read, with heads as short as can be."""
    chunked = "Transfer-Encoding: chunked"
    path = f"/{BUCKET}/framed"
    small = plain(
        "PUT", path, "Content-Length: 5", "x-amz-meta-a:  b \t", "Content-Type: text/x", body=b"hello", close=False
    )
    get = plain("GET", f"/{BUCKET}/here", close=False)
    return [
        Case("put", plain("PUT", path, "Content-Length: 5", "X-Empty:", "Content-Type: text/x", body=b"hello"), "framed"),
        Case("get", plain("GET", f"/{BUCKET}/here", "Range: bytes=2-4"), statuses=(206,)),
        Case("head", plain("HEAD", f"/{BUCKET}/here")),
        Case("chunked", plain("PUT", path, chunked, body=HTTP_CHUNKS), "framed"),
        Case("trailers", plain("PUT", path, chunked, "Content-Type: good/header", body=HTTP_TRAILERS), "framed"),
        Case("upgrade", plain("PUT", path, *UPGRADE, "Content-Length: 5", body=b"hello", close=False) + plain("GET", f"/{BUCKET}/here"), "framed", (200, 200)),
        Case("upgrade chunked", plain("PUT", path, *UPGRADE, chunked, body=HTTP_TRAILERS, close=False) + plain("GET", f"/{BUCKET}/here", *UPGRADE, close=False)
             + plain("HEAD", f"/{BUCKET}/here"), "framed", (200, 200, 200)),
        Case("upgrade in trailers", plain("PUT", path, chunked, body=b"0\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n", close=False) + plain("GET", f"/{BUCKET}/here"),
             "framed", (200, 200)),
        Case("close in trailers", plain("PUT", path, chunked, body=b"0\r\nConnection: close\r\n\r\n", close=False) + plain("GET", f"/{BUCKET}/here"),
             "framed", (200,)),
        Case("pipelined", small + b"\r\n" + get + small + get + plain("DELETE", f"/{BUCKET}/none"), "framed", (200, 200, 200, 200, 204)),
        Case("pipelined chunks", plain("PUT", path, chunked, body=HTTP_TRAILERS, close=False) + get + plain("PUT", path, chunked, body=HTTP_CHUNKS), "framed", (200, 200, 200)),
        Case("garbage behind", get + b"\x16\x03\x01 hello\r\n\r\n", statuses=(200, 400)),
        Case("no host behind", get + plain("GET", f"/{BUCKET}/here", host=False), statuses=(200, 400)),
        Case("broken chunk", plain("PUT", path, chunked, body=b"5\r\nhelloX\r\n0\r\n\r\n"), "framed", (400,)),
        Case("broken trailer", plain("PUT", path, chunked, body=b"5\r\nhello\r\n0\r\nA b\r\n\r\n"), "framed", (400,)),
        Case("broken chunk, refused before", plain("PUT", "/nobody/k", chunked, body=b"5\r\nhelloX\r\n0\r\n\r\n"), statuses=(404,)),
        Case("gzip", plain("PUT", path, "Transfer-Encoding: gzip, chunked", body=HTTP_CHUNKS), "framed", (501,)),
        Case("two lengths", plain("PUT", path, "Content-Length: 5", "Content-Length: 5", body=b"hello"), "framed", (400,)),
        Case("length and chunks", plain("PUT", path, chunked, "Content-Length: 5", body=HTTP_CHUNKS), "framed", (400,)),
        Case("folded", plain("PUT", path, "A: b", " c", "Content-Length: 5", body=b"hello"), "framed", (400,)),
        Case("bare LF", plain("GET", f"/{BUCKET}/here", "A: b\nB: c"), statuses=(400,)),
        Case("two hosts", plain("GET", f"/{BUCKET}/here", "Host: h"), statuses=(400,)),
        Case("absolute", plain("GET", f"http://h/{BUCKET}/here")),
        Case("two slashes", plain("GET", "//here"), statuses=(400,)),
        Case("expectation", plain("PUT", path, "Content-Length: 5", "Expect: x", body=b"hello"), "framed"),
        Case("connect", plain("CONNECT", "h:80"), statuses=(405,)),
        Case("old", f"PUT {path} HTTP/1.0\r\nContent-Length: 5\r\n\r\nhello".encode(), "framed"),
        Case("old get", f"GET /{BUCKET}/here HTTP/1.0\r\n\r\n".encode()),
        Case("http 2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", statuses=(400,)),
        Case("no version", b"GET /\r\n\r\n", statuses=(505,)),
    ]  # fmt: skip


def called_routes() -> list[tuple[str, str, str]]:
    """Those that are more than a fixed answer, but for the ones that a query or header alone tells apart."""
    return [
        at
        for at, route in routes.TABLE.items()
        if route.operation in metrics.S3_OPERATIONS
        and at[1] != routes.SERVICE
        and at[2] != "list-type"
        and not at[2].startswith(" ")
    ]


def call_cases(endpoint: Endpoint) -> list[Case]:
    """A signed request for each call of the table, and one for each way of sending a body."""
    documents = {
        "delete": b"<Delete><Object><Key>none</Key></Object></Delete>",
        "tagging": b"<Tagging><TagSet><Tag><Key>a</Key><Value>b</Value></Tag></TagSet></Tagging>",
        "versioning": b"<VersioningConfiguration/>",
        "lifecycle": b"<LifecycleConfiguration><Rule><ID>a</ID><Filter/><Status>Enabled</Status><Expiration><Days>9</Days></Expiration></Rule></LifecycleConfiguration>",
        "restore": b"<RestoreRequest><Days>1</Days></RestoreRequest>",
        "complete": b"<CompleteMultipartUpload><Part><PartNumber>7</PartNumber><ETag>none</ETag></Part></CompleteMultipartUpload>",
    }
    cases = []
    for method, resource, name in called_routes():
        path = f"/{BUCKET}" if resource == routes.BUCKET else f"/{BUCKET}/called"
        query, where, headers = name, path, {}
        body = documents.get(name, b"") if method in {"PUT", "POST"} else b""
        if name == "uploadId":
            where = f"/{BUCKET}/parts"
            query = f"uploadId={'none' if method == 'DELETE' else endpoint.upload}"
            query += "&partNumber=1" if method == "PUT" else ""
            body = documents["complete"] if method == "POST" else b"part" if method == "PUT" else b""
        elif name == "acl" and method == "PUT":
            headers = {"x-amz-acl": "public-read-write"}
        elif name == "attributes":
            headers = {"x-amz-object-attributes": "ETag,ObjectSize"}
        elif (method, name) == ("PUT", "") and path.endswith("called"):
            headers, body = {"x-amz-meta-a": "b", "content-type": "text/x"}, b"called"
        elif (method, name) == ("DELETE", ""):
            where += "-not"
        key = "called" if where.endswith("called") else ""
        raw = signed(endpoint, method, where, query, body, headers=headers)
        cases.append(Case(f"{method} {where}?{name}", raw, key, ()))
    copied = {"x-amz-copy-source": f"/{BUCKET}/here", "x-amz-copy-source-range": "bytes=1-3"}
    chunks, decoded = [b"a" * 8192, b"b"], {"x-amz-decoded-content-length": "8193"}
    crc = {"x-amz-trailer": "x-amz-checksum-crc32", "x-amz-decoded-content-length": "5"}
    line = b"x-amz-checksum-crc32:NhCmhg==\r\n"
    cases += [
        Case("list buckets", signed(endpoint, "GET", "/")),
        Case("list v2", signed(endpoint, "GET", f"/{BUCKET}", "list-type=2&prefix=he")),
        Case("copy", signed(endpoint, "PUT", f"/{BUCKET}/copied", headers={"x-amz-copy-source": f"/{BUCKET}/here"}), "copied"),
        Case("copy part", signed(endpoint, "PUT", f"/{BUCKET}/parts", f"partNumber=2&uploadId={endpoint.upload}", headers=copied)),
        Case("signed chunks", signed(endpoint, "PUT", f"/{BUCKET}/called", payload=signatures.STREAMING_SIGNED, headers=decoded, chunks=chunks), "called"),
        Case("unsigned trailer", signed(endpoint, "PUT", f"/{BUCKET}/called", payload=signatures.STREAMING_UNSIGNED_TRAILER, headers=crc, chunks=[b"hello"],
                                        trailer=line), "called"),
        Case("wrong trailer", signed(endpoint, "PUT", f"/{BUCKET}/called", payload=signatures.STREAMING_UNSIGNED_TRAILER, headers=crc, chunks=[b"hello"],
                                     trailer=b"x-amz-checksum-crc32:AAAAAA==\r\n"), "called", (400,)),
        Case("wrong signature", signed(endpoint, "GET", f"/{BUCKET}/here").replace(b"Signature=", b"Signature=0"), statuses=(403,)),
    ]  # fmt: skip
    return cases


def statuses(answer: bytes) -> tuple[int, ...]:
    return tuple(int(found) for found in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer) if found != b"100")


async def same_everywhere(endpoint: Endpoint, case: Case, cuts: list[tuple[int, ...]]) -> None:
    """The answer to the request in one piece is that to the request cut at each of `cuts`."""
    whole = await endpoint.answer([case.raw])
    left = endpoint.left_behind(case.key)
    if case.statuses:
        assert statuses(whole) == case.statuses, f"{case.name}: {whole!r}"
    assert b" 500 " not in whole[:40], f"{case.name}: {whole!r}"
    for at in range(0, len(cuts), AT_ONCE):
        batch = cuts[at : at + AT_ONCE]
        segments = [[case.raw[a:b] for a, b in pairwise((0, *cut, len(case.raw)))] for cut in batch]
        for cut, found in zip(batch, await asyncio.gather(*map(endpoint.answer, segments)), strict=True):
            assert found == whole, f"{case.name} cut at {cut}: {found!r}, whole: {whole!r}"
        assert endpoint.left_behind(case.key) == left, f"{case.name} cut at {batch}"


def several(chance: random.Random, length: int) -> tuple[int, ...]:
    """A cut into up to eight segments."""
    return tuple(sorted(chance.sample(range(1, length), min(chance.randint(2, 7), length - 1))))


@pytest.mark.parametrize("case", framing_cases(), ids=lambda case: case.name)
def test_framing_does_not_depend_on_segments(endpoint: Endpoint, case: Case) -> None:
    chance = random.Random(new_seed())
    cuts: list[tuple[int, ...]] = [(at,) for at in range(1, len(case.raw))]
    cuts += [several(chance, len(case.raw)) for _ in range(longer(8, 2000))]
    cuts.append(tuple(range(1, len(case.raw))))
    endpoint.run(same_everywhere(endpoint, case, cuts))


@pytest.mark.longer
def test_no_call_depends_on_segments(endpoint: Endpoint) -> None:
    """Of each call at some bytes, chosen anew in each run; in soak at every one."""
    chance = random.Random(new_seed())
    for case in call_cases(endpoint):
        every: list[tuple[int, ...]] = [(at,) for at in range(1, len(case.raw))]
        cuts = chance.sample(every, min(len(every), longer(48, len(every))))
        cuts += [several(chance, len(case.raw)) for _ in range(longer(8, 200))]
        endpoint.run(same_everywhere(endpoint, case, cuts))


@pytest.mark.longer
def test_pipelined_requests_get_the_answers_they_get_alone(endpoint: Endpoint) -> None:
    """Some calls in a row on one connection, cut anywhere."""
    chance = random.Random(new_seed())

    async def row(cases: list[Case]) -> None:
        for _ in range(2):  # what is there before the second time is what is there before all others
            alone = [await endpoint.answer([case.raw]) for case in cases]
        raws = [case.raw.replace(b"Connection: close\r\n", b"") for case in cases[:-1]] + [cases[-1].raw]
        wanted = b"".join(alone).replace(b"connection: close\r\n", b"")
        whole = b"".join(raws)
        for cut in (), several(chance, len(whole)):
            found = await endpoint.answer([whole[a:b] for a, b in pairwise((0, *cut, len(whole)))])
            assert found.replace(b"connection: close\r\n", b"") == wanted, (
                f"{[case.name for case in cases]} cut at {cut}"
            )

    kept = [
        case
        for case in call_cases(endpoint)
        if case.statuses in {(), (200,)} and "not" not in case.name and "uploads" not in case.name
    ]
    for _ in range(longer(60, 2000)):
        endpoint.run(row(chance.sample(kept, chance.randint(2, 6))))


def test_the_cases_are_all_calls(endpoint: Endpoint) -> None:
    """Each call of the table is made, and no answer is an error of ours."""
    assert len(call_cases(endpoint)) > len(called_routes()) > 25
    for case in call_cases(endpoint):
        answer = endpoint.run(endpoint.answer([case.raw]))
        assert statuses(answer)[0] not in {405, 500, 503}, (case.name, answer)
        assert b"SignatureDoesNotMatch" not in answer or case.statuses, case.name


@pytest.mark.parametrize("behind", [b"\r\n", b"GET / HT", b"GET / HTTP/1.1\r\nA: b\r\n"])
def test_a_connection_that_answers_nothing_has_a_deadline(endpoint: Endpoint, behind: bytes) -> None:
    """A blank line is the beginning of no request, and ended the wait for one."""

    async def last(*segments: bytes) -> bool:
        loop = asyncio.get_running_loop()
        ours, theirs = await endpoint.connect()
        sent = 0
        for segment in segments:
            await loop.sock_sendall(ours, segment)
            sent += len(segment)
            await theirs.has_read(sent)
            if segment is not behind:
                await loop.sock_recv(ours, 65536)
                await asyncio.sleep(0)
        armed = theirs._deadline is not None
        ours.close()
        return armed

    get = plain("GET", f"/{BUCKET}/here", close=False)
    assert endpoint.run(last(behind))
    assert endpoint.run(last(get, behind))
    assert endpoint.run(last(get, get, behind))
    unread = plain("GET", app.LIVE_PATH, "Content-Length: 1000", close=False)
    assert endpoint.run(last(unread, behind)), "the rest of a body that nobody reads"


def test_a_fault_of_ours_in_reading_a_head_is_logged(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its client gets a refusal; llhttp cannot tell why its caller failed."""

    def fail(_method: str, _target: bytes) -> None:
        raise KeyError("fault")

    monkeypatch.setattr(framing, "split_target", fail)
    assert statuses(endpoint.run(endpoint.answer([plain("GET", "/")]))) == (400,)
    assert "KeyError('fault')" in capfd.readouterr().err


def decoded(body: bytes, cuts: tuple[int, ...], size: int) -> tuple[bytes, dict[str, str], str]:
    """Payload, trailers and the code of the error, of an unsigned aws-chunked body in pieces."""
    decoder = ChunkedDecoder(
        decoded_bytes=size, signer=None, signed_trailer=False, trailers_expected=["x-amz-checksum-crc32"]
    )
    payload = b""
    try:
        for a, b in pairwise((0, *cuts, len(body))):
            payload += b"".join(decoder.feed(body[a:b]))
        decoder.finish()
    except S3Error as error:
        return b"", {}, error.code
    return payload, decoder.trailers, ""


@pytest.mark.parametrize(
    ("body", "size"),
    [
        (b"5;a=b\r\nhello\r\n0\r\nx-amz-checksum-crc32: NhCmhg== \r\n\r\n", 5),
        (b"%x\r\n" % 8192 + b"a" * 8192 + b"\r\n1\r\nb\r\n0\r\nx-amz-checksum-crc32:x\r\n\r\n", 8193),
        (b"5\r\nhello\r\n0\r\n\r\n", 5),
        (b"5\r\nhello\r\n0\r\nx-amz-checksum-crc32:x\r\n", 5),
        (b"5\r\nhelloX\n0\r\n\r\n", 5),
        (b"5\r\nhello\r\n0\r\nx-amz-checksum-crc32:x\r\n\r\nmore", 5),
        (b"\xb2\r\nhe\r\n0\r\n\r\n", 2),
        (b"00000000000000005\r\nhello\r\n0\r\n\r\n", 5),
        (b"-5\r\nhello\r\n0\r\n\r\n", 5),
        (b"5" + b";" + b"x" * 8191 + b"\r\nhello\r\n0\r\nx-amz-checksum-crc32:x\r\n\r\n", 5),
        (b"5" + b";" + b"x" * 8190 + b"\r\nhello\r\n0\r\nx-amz-checksum-crc32:x\r\n\r\n", 5),
        (b"ffffffffffffffff\r\nhello", 5),
    ],
)
def test_an_aws_chunked_body_does_not_depend_on_segments(body: bytes, size: int) -> None:
    whole = decoded(body, (), size)
    every = range(1, len(body))
    cuts = [(at,) for at in every] if len(body) < 1000 else [(at,) for at in (*every[:20], *every[-120:])]
    for cut in (*cuts, tuple(every)):
        assert decoded(body, cut, size) == whole, cut
