"""Numbers and dates that `int`, `isdigit` and the e-mail parser take or choke on: refused or ignored, and never a 500."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING
from urllib.parse import quote

import pytest

from stratum import iso_dates
from stratum.s3 import dates, numerals, ranges, signatures
from tests.s3.test_refusals import Signer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support import Server

NO_NUMBERS = ("", "-1", "+1", " 1", "1 ", "1_0", "\xb2", "\xb9\xb2", "0x1", "1e3", "1.0", "9" * 5000, "9" * 19, "NaN")
NO_DATES = (
    "", "yesterday", "Thu, 01 Jan 99999999999999999999 00:00:00 GMT", "Thu, 32 Jan 2020 00:00:00 GMT", "Thu, 01 Xyz 2020 00:00:00 GMT",
    "Thu, 01 Jan 2020 25:00:00 GMT", "Thu, 01 Jan 0000 00:00:00 GMT", "Thu, 01 Jan -001 00:00:00 GMT", "Thu, 01 Jan 2020 00:00:00 +99999999", "9" * 5000, "1" * 20,
    "Thu, \xb2 Jan 2020 00:00:00 GMT", "Mon, 01 Jan 0001 00:00:00 +2359", "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59",
)  # fmt: skip
EMPTY = hashlib.sha256(b"").hexdigest()


@pytest.fixture(scope="module")
def signer(server: Server) -> Iterator[Signer]:
    client = server.client()
    client.create_bucket(Bucket="numbers")
    client.put_object(Bucket="numbers", Key="k", Body=b"0123456789")
    upload = client.create_multipart_upload(Bucket="numbers", Key="parts")["UploadId"]
    part = client.upload_part(Bucket="numbers", Key="parts", UploadId=upload, PartNumber=1, Body=b"x")
    parts = [{"PartNumber": 1, "ETag": part["ETag"]}]
    client.complete_multipart_upload(Bucket="numbers", Key="parts", UploadId=upload, MultipartUpload={"Parts": parts})
    yield Signer(server, "numbers")
    assert client.get_object(Bucket="numbers", Key="k")["Body"].read() == b"0123456789"


def ask(
    signer: Signer, method: str, path: str, query: str = "", headers: dict[str, str] | None = None, body: bytes = b""
) -> tuple[int, str]:
    canonical = signatures.canonical_query(signatures.split_query(query))
    sent = signer.headers(method, path, hashlib.sha256(body).hexdigest(), extra=headers, query=canonical)
    return signer.send(method, path, body, sent, query)


def test_numbers() -> None:
    assert [numerals.whole(text) for text in NO_NUMBERS] == [None] * len(NO_NUMBERS)
    assert [numerals.whole(text) for text in ("0", "007", "9223372036854775807", "0" * 5000 + "7")] == [
        0,
        7,
        2**63 - 1,
        7,
    ]
    assert (numerals.whole("11", 10), numerals.clamped("9" * 5000), numerals.clamped("12")) == (None, 2**63 - 1, 12)


def test_dates() -> None:
    assert [dates.any_form(text) for text in NO_DATES] == [None] * len(NO_DATES)
    for text in ("Sun, 06 Nov 1994 08:49:37 GMT", "Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994", "Sun, 06 Nov 1994 09:49:37 +0100",
                 "1994-11-06T08:49:37Z", "1994-11-06T08:49:37.000Z", "1994-11-06T09:49:37+01:00", "1994-11-06T08:49:37"):  # fmt: skip
        assert dates.any_form(text) == 784111777, text
    assert dates.stamp("19941106T084937Z") == 784111777
    for stamp in ("19941306T084937Z", "19941106T084961Z", "1994110\u0666T084937Z", "19941106T084937", "9" * 5000):
        assert dates.stamp(stamp) is None
    assert iso_dates.seconds("2024-01-01") == 1704067200


def test_ranges_of_any_length() -> None:
    for header in (
        "bytes",
        "bytes=",
        "bytes=-",
        "bytes=a-b",
        "bytes=1-\xb2",
        "bytes=+1-2",
        "bytes=1_0-2",
        "bytes=2-1",
        "bytes=0-1,3-4",
        "octets=0-1",
    ):
        assert ranges.parse(header, 10) is None, header
    nines = "9" * 5000
    for header, wanted in (
        (f"bytes=0-{nines}", (0, 10)),
        (f"bytes=-{nines}", (0, 10)),
        ("BYTES = 1 - 2 ", (1, 3)),
        ("bytes=" + "0" * 5000 + "3-", (3, 10)),
    ):
        assert ranges.parse(header, 10) == wanted


@pytest.mark.parametrize("value", [value for value in NO_NUMBERS if value.isascii()])
@pytest.mark.parametrize(
    ("method", "path", "query"),
    [
        ("GET", "/numbers", "max-keys={}"),
        ("GET", "/numbers", "list-type=2&max-keys={}"),
        ("GET", "/numbers", "versions&max-keys={}"),
        ("GET", "/numbers", "uploads&max-uploads={}"),
        ("GET", "/", "max-buckets={}"),
        ("GET", "/numbers/k", "partNumber={}"),
        ("PUT", "/numbers/none", "partNumber={}&uploadId=none"),
    ],
)
def test_numbers_of_a_query(signer: Signer, method: str, path: str, query: str, value: str) -> None:
    status, code = ask(signer, method, path, query.format(quote(value)))
    if value == "" and "partNumber" not in query:
        assert (status, code) == (200, "")
    else:
        assert (status, code) == (400, "InvalidArgument")


def test_zeros_before_a_number_are_read(signer: Signer) -> None:
    """More of them than `int` takes."""
    headers = {"x-amz-checksum-mode": "ENABLED"}
    assert ask(signer, "GET", "/numbers/parts", "partNumber=" + "0" * 5000 + "1", headers) == (206, "")


def test_numbers_of_headers(signer: Signer) -> None:
    for value in NO_NUMBERS:
        if value.strip() != value:
            continue  # blanks around a header's value are no part of it
        for header in () if numerals.are_digits(value) else ("x-amz-max-parts", "x-amz-part-number-marker"):
            headers = {header: value, "x-amz-object-attributes": "ObjectParts"}
            assert ask(signer, "GET", "/numbers/parts", "attributes", headers)[0] == 400, (header, value)
        assert ask(signer, "DELETE", "/numbers/k", headers={"x-amz-if-match-size": value})[0] == 400, value
        assert ask(signer, "GET", "/numbers/k", headers={"range": f"bytes=0-{value}x"}) == (200, "")
        sent = signer.headers(
            "PUT", "/numbers/none", signatures.STREAMING_SIGNED, extra={"x-amz-decoded-content-length": value}
        )
        assert signer.send("PUT", "/numbers/none", b"", sent)[0] == 400, value
        copied = {"x-amz-copy-source": "/numbers/k", "x-amz-copy-source-range": f"bytes=0-{value}"}
        assert ask(signer, "PUT", "/numbers/none", "partNumber=1&uploadId=x", copied)[0] in {400, 404}


def test_numbers_of_documents(signer: Signer) -> None:
    upload = signer.server.client().create_multipart_upload(Bucket="numbers", Key="big")["UploadId"]
    for value in (*NO_NUMBERS, "\u0661"):
        part = f"<Part><PartNumber>{value}</PartNumber><ETag>x</ETag></Part>"
        size = f"<Object><Key>k</Key><Size>{value}</Size></Object>"
        rule = f"<Rule><ID>a</ID><Filter/><Status>Enabled</Status><Expiration><Days>{value}</Days></Expiration></Rule>"
        cases = [
            (
                "POST",
                "/numbers/big",
                f"uploadId={upload}",
                f"<CompleteMultipartUpload>{part}</CompleteMultipartUpload>",
            ),
            ("POST", "/numbers", "delete", f"<Delete>{size}</Delete>"),
            ("PUT", "/numbers", "lifecycle", f"<LifecycleConfiguration>{rule}</LifecycleConfiguration>"),
            ("POST", "/numbers/k", "restore", f"<RestoreRequest><Days>{value}</Days></RestoreRequest>"),
        ]
        for method, path, query, document in cases:
            if value.strip() != value or (value == "" and "Size" in document):
                continue
            status, code = ask(signer, method, path, query, body=document.encode())
            assert status in {400, 403}, (query, value, status, code)


def test_dates_of_headers_and_documents(signer: Signer) -> None:
    for value in NO_DATES:
        for header in ("if-modified-since", "if-unmodified-since"):
            assert ask(signer, "GET", "/numbers/k", headers={header: value}) == (200, ""), (header, value)
        if value.isascii():
            assert ask(signer, "DELETE", "/numbers/k", headers={"x-amz-if-match-last-modified-time": value})[0] == 400
        when = f"<Object><Key>k</Key><LastModifiedTime>{value}</LastModifiedTime></Object>"
        rule = f"<Rule><ID>a</ID><Filter/><Status>Enabled</Status><Expiration><Date>{value}</Date></Expiration></Rule>"
        if value:
            assert ask(signer, "POST", "/numbers", "delete", body=f"<Delete>{when}</Delete>".encode())[0] == 400, value
        document = f"<LifecycleConfiguration>{rule}</LifecycleConfiguration>".encode()
        assert ask(signer, "PUT", "/numbers", "lifecycle", body=document)[0] == 400, value


def test_dates_of_signatures(signer: Signer) -> None:
    for value in NO_DATES:
        sent = {"Authorization": f"AWS {signer.server.access_key}:x", "Date": value}
        assert signer.send("GET", "/numbers/k", b"", sent)[0] == 403, value
        sent = {
            "Authorization": f"AWS4-HMAC-SHA256 Credential={signer.server.access_key}/20200101/us-east-1/s3/aws4_request,SignedHeaders=host,Signature=x"
        }
        assert signer.send("GET", "/numbers/k", b"", {**sent, "Date": value})[0] in {400, 403}, value
        assert signer.send("GET", "/numbers/k", b"", {**sent, "x-amz-date": value})[0] in {400, 403}, value
    for value in NO_NUMBERS:
        presigned = f"AWSAccessKeyId={signer.server.access_key}&Signature=x&Expires={quote(value)}"
        assert signer.send("GET", "/numbers/k", b"", {}, presigned) == (403, "AccessDenied"), value


def test_a_lifecycle_of_a_million_years_can_be_read(signer: Signer) -> None:
    rule = "<Rule><ID>a</ID><Filter/><Status>Enabled</Status><Expiration><Days>2147483647</Days></Expiration></Rule>"
    document = f"<LifecycleConfiguration>{rule}</LifecycleConfiguration>".encode()
    assert ask(signer, "PUT", "/numbers", "lifecycle", body=document) == (200, "")
    assert ask(signer, "HEAD", "/numbers/k") == (200, "")
    assert ask(signer, "DELETE", "/numbers", "lifecycle")[0] == 204


@pytest.mark.parametrize("name", ["-" * 60 + "_", "a" * 60 + "_", "a-" * 30 + "_", "." * 60, "-." * 30, "a" * 300])
def test_a_name_of_a_bucket_costs_no_time(signer: Signer, name: str) -> None:
    assert ask(signer, "PUT", f"/{name}") == (400, "InvalidBucketName")
    assert ask(signer, "GET", f"/{name}")[0] in {400, 404}


def test_long_headers_are_answered(signer: Signer) -> None:
    for authorization in (
        "AWS4-HMAC-SHA256 " + "," * 15_000,
        "AWS " + ":" * 15_000,
        "AWS4-HMAC-SHA256 " + "Credential=x," * 1000 + "Signature=x",
    ):
        status, _ = signer.send("GET", "/numbers/k", b"", {"Authorization": authorization})
        assert status in {400, 403}
    assert ask(signer, "GET", "/numbers/k", headers={"range": "bytes=" + " " * 15_000 + "0"}) == (200, "")
    assert ask(signer, "GET", "/numbers/k", headers={"if-none-match": ", " * 7_000}) == (200, "")
    assert ask(signer, "GET", "/numbers", "&".join(["a"] * 600)) == (400, "InvalidURI")
    assert ask(signer, "GET", "/numbers/" + "k" * 17_000) == (414, "RequestURITooLong")
