"""Requests with odd values in odd places: refused or ignored, but never an error of ours."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import pytest

from stratum.s3 import routes
from tests.s3.test_splits import AT_ONCE, BUCKET, call_cases, framing_cases, signed
from tests.s3.test_splits import endpoint as endpoint  # noqa: PLC0414  the fixture
from tests.support import longer, new_seed

if TYPE_CHECKING:
    from tests.s3.test_splits import Endpoint

ODD = (
    "", "0", "1", "-1", "+1", "01", "1_0", "\xb2", "9" * 19, "9" * 400, "1e9", "NaN", "inf", "true", "null", "None", "*", "/", "//", "..", ".", "%", "%00", "%ff", "%2F", "%25",
    "a,b", ",", ";", "=", "&", "?", "#", '"', '""', '"x', "W/", "\\", "'", "<a>", "&amp;", "bytes=", "bytes=0-", "bytes=-0", "bytes=9-1", "\xe9", "\xff", "\t", "a b", "a" * 300,
    "2020-01-01", "2020-01-01T00:00:00Z", "0001-01-01T00:00:00+23:59", "Thu, 01 Jan 1970 00:00:00 GMT", "Thu, 01 Jan 99999 00:00:00 GMT", "20200101T000000Z", "AAAAAA==", "AAAA", "=",
    "CRC32", "SHA256", "COMPOSITE", "FULL_OBJECT", "ENABLED", "REPLACE", "COPY", "private", "STANDARD", "GLACIER", "url", "splits/here", "/splits/here?versionId=null", "splits/%",
    "a=b&a=b", "a=%ff", "ETag,ObjectParts,x", "STREAMING-UNSIGNED-PAYLOAD-TRAILER", "x-amz-checksum-crc32", "aws-chunked", "gzip,aws-chunked", "text/x; charset=\xe9",
)  # fmt: skip
HEADERS = sorted({name for route in routes.TABLE.values() for name in route.common} - {
    "authorization", "host", "content-length", "transfer-encoding", "connection", "expect", "x-amz-date", "x-amz-content-sha256",
} | {"x-amz-meta-a", "x-amz-meta-stratum-pin-until", "x-amz-meta-stratum-priority", "forwarded", "x-forwarded-for", "x-forwarded-host"})  # fmt: skip
PARAMETERS = sorted(
    {name for route in routes.TABLE.values() for name in route.parameters if name and not name.startswith(" ")}
)
DOCUMENTS = (
    "<Delete><Quiet>{}</Quiet><Object><Key>{}</Key><ETag>{}</ETag><Size>{}</Size><LastModifiedTime>{}</LastModifiedTime><VersionId>{}</VersionId></Object></Delete>",
    "<Tagging><TagSet><Tag><Key>{}</Key><Value>{}</Value></Tag></TagSet></Tagging>",
    "<LifecycleConfiguration><Rule><ID>{}</ID><Filter><Prefix>{}</Prefix></Filter><Status>Enabled</Status><Expiration><Days>{}</Days></Expiration></Rule></LifecycleConfiguration>",
    "<LifecycleConfiguration><Rule><Filter><ObjectSizeGreaterThan>{}</ObjectSizeGreaterThan></Filter><Status>Enabled</Status><Expiration><Date>{}</Date></Expiration></Rule></LifecycleConfiguration>",
    "<RestoreRequest><Days>{}</Days><GlacierJobParameters><Tier>{}</Tier></GlacierJobParameters></RestoreRequest>",
    "<CompleteMultipartUpload><Part><PartNumber>{}</PartNumber><ETag>{}</ETag><ChecksumCRC32>{}</ChecksumCRC32></Part></CompleteMultipartUpload>",
    "<CreateBucketConfiguration><LocationConstraint>{}</LocationConstraint></CreateBucketConfiguration>",
    "<AccessControlPolicy><Owner><ID>{}</ID></Owner><AccessControlList><Grant><Permission>{}</Permission></Grant></AccessControlList></AccessControlPolicy>",
    "{}",
)  # fmt: skip
FRAGMENTS = (
    b"\xb2",
    b"%",
    b"%f",
    b"\t",
    b" ",
    b",",
    b":",
    b";",
    b"=",
    b"&",
    b"?",
    b"/",
    b"//",
    b"\r",
    b"\n",
    b"\r\n",
    b"\r\n\r\n",
    b"\0",
    b"\xff",
    b"9" * 30,
    b"-",
    b'"',
    b"x" * 5000,
)


def odd_call(endpoint: Endpoint, chance: random.Random) -> bytes:
    """A signed call of the table with values that few clients send."""
    method, resource, sub = chance.choice(list(routes.TABLE))
    path = {routes.SERVICE: "/", routes.BUCKET: f"/{BUCKET}"}.get(
        resource, f"/{BUCKET}/" + chance.choice(("here", "odd", "parts", "none"))
    )
    if method == "DELETE" and resource == routes.BUCKET and not sub:
        path += "-none"
    query = [sub] if sub and not sub.startswith(" ") else []
    if sub == "uploadId":
        query = [f"uploadId={endpoint.upload}", "partNumber=1"][: chance.randint(1, 2)]
    for _ in range(chance.randint(0, 3)):
        name, value = (
            chance.choice(
                PARAMETERS if chance.random() < 0.3 else [*routes.TABLE[method, resource, sub].parameters] or PARAMETERS
            ),
            chance.choice(ODD),
        )
        query.append(name.strip() + "=" + "".join(f"%{byte:02x}" for byte in value.encode("latin-1")))
    allowed = [name for name in routes.TABLE[method, resource, sub].headers if name in HEADERS] or HEADERS
    headers = {
        chance.choice(HEADERS if chance.random() < 0.3 else allowed): chance.choice(ODD)
        for _ in range(chance.randint(0, 3))
    }
    if sub.startswith(" copy"):
        headers.setdefault("x-amz-copy-source", f"/{BUCKET}/here")
    body = b""
    if method in {"PUT", "POST"}:
        document = chance.choice(DOCUMENTS)
        body = document.format(*(chance.choice(ODD) for _ in range(6))).encode(chance.choice(("latin-1", "utf-8")))
    return signed(endpoint, method, path, "&".join(query), body, headers=headers)


def spoilt(raw: bytes, chance: random.Random) -> bytes:
    """A request with something put in, left out, doubled or changed."""
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(raw) + 1)
        until = min(len(raw), at + chance.randint(1, 40))
        kind = chance.randrange(5)
        if kind == 0:
            raw = raw[:at] + chance.choice(FRAGMENTS) + raw[at:]
        elif kind == 1:
            raw = raw[:at] + raw[until:]
        elif kind == 2:
            raw = raw[:at] + bytes([chance.randrange(256)]) + raw[at + 1 :]
        elif kind == 3:
            raw = raw[:until] + raw[at:]
        else:
            lines = raw.split(b"\r\n")
            lines.insert(chance.randrange(len(lines)), chance.choice(lines))
            raw = b"\r\n".join(lines)
    return raw


async def all_answered(endpoint: Endpoint, requests: list[bytes], *, half: bool) -> None:
    """None of them is answered with 500. Failures name the first of those sent at once that was."""
    for at in range(0, len(requests), AT_ONCE):
        endpoint.statuses.clear()
        batch = requests[at : at + AT_ONCE]
        await asyncio.gather(*(endpoint.answer([raw], half=half) for raw in batch))
        await endpoint.rests()
        assert endpoint.statuses, "no request came to the application"
        if 500 in endpoint.statuses:
            for raw in batch:
                endpoint.statuses.clear()
                await endpoint.answer([raw], half=half)
                await endpoint.rests()
                assert 500 not in endpoint.statuses, raw
            pytest.fail("a request failed among others, and not alone")


@pytest.mark.longer
def test_odd_calls_are_no_errors_of_ours(endpoint: Endpoint) -> None:
    chance = random.Random(new_seed())
    endpoint.run(all_answered(endpoint, [odd_call(endpoint, chance) for _ in range(longer(2000, 100_000))], half=False))


@pytest.mark.longer
def test_spoilt_requests_are_no_errors_of_ours(endpoint: Endpoint) -> None:
    chance = random.Random(new_seed())
    whole = [case.raw for case in (*framing_cases(), *call_cases(endpoint))]
    endpoint.run(
        all_answered(endpoint, [spoilt(chance.choice(whole), chance) for _ in range(longer(2000, 100_000))], half=True)
    )
