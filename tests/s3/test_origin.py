"""Answers name the address that the client used."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from stratum import config
from stratum.errors import ConfigInvalid
from stratum.s3.origin import _forwarded, is_trusted
from tests.support import serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support import Server

OURS = ("127.0.0.0/8", "10.1.0.0/16", "fd00::/8")


@pytest.fixture(scope="module")
def behind_proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = {"s3": {"domain": "s3.test", "trusted_proxies": ["127.0.0.1"]}}
    with serving(tmp_path_factory.mktemp("origin"), settings=settings) as server:
        server.client().create_bucket(Bucket="open-bucket", ACL="public-read-write")
        yield server


def location(server: Server, path: str, headers: dict[str, str]) -> str:
    """What CompleteMultipartUpload says, of a client without a key."""
    status, _, body = server.raw("POST", f"{path}?uploads", b"", headers)
    assert status == 200, body
    upload_id = re.findall(rb"<UploadId>(.*?)<", body)[0].decode()
    _, part, _ = server.raw("PUT", f"{path}?uploadId={upload_id}&partNumber=1", b"x", headers)
    listed = f"<CompleteMultipartUpload><Part><PartNumber>1</PartNumber><ETag>{part['etag']}</ETag></Part></CompleteMultipartUpload>"
    status, _, body = server.raw("POST", f"{path}?uploadId={upload_id}", listed.encode(), headers)
    assert status == 200, body
    return body.partition(b"<Location>")[2].partition(b"</Location>")[0].decode()


def test_location_is_where_the_client_was(behind_proxy: Server) -> None:
    assert location(behind_proxy, "/open-bucket/a%20b", {"Host": "files.example:8080"}) == (
        "http://files.example:8080/open-bucket/a%20b"
    )
    assert location(behind_proxy, "/a/b", {"Host": "open-bucket.s3.test"}) == "http://open-bucket.s3.test/a/b"


def test_location_behind_a_trusted_proxy(behind_proxy: Server) -> None:
    for headers in (
        {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "s3.example.org"},
        {"Forwarded": 'for=192.0.2.7;proto=https;host="s3.example.org"'},
    ):
        told = location(behind_proxy, "/open-bucket/k", {"Host": "inner:1", **headers})
        assert told == "https://s3.example.org/open-bucket/k"


def test_a_stranger_cannot_say_where_he_was(server: Server) -> None:
    server.client().create_bucket(Bucket="origin-bucket", ACL="public-read-write")
    headers = {"Host": "here:1", "X-Forwarded-Host": "elsewhere", "Forwarded": "host=elsewhere;proto=https"}
    assert location(server, "/origin-bucket/k", headers) == "http://here:1/origin-bucket/k"


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, ("", "")),
        ({"x-forwarded-proto": "https"}, ("https", "")),
        ({"x-forwarded-proto": "https", "x-forwarded-host": "a", "x-forwarded-for": "192.0.2.1"}, ("https", "a")),
        # What the client sent stands before what the proxy added.
        ({"x-forwarded-host": "evil, a", "x-forwarded-for": "192.0.2.1"}, ("", "a")),
        # Two proxies of ours, each of which added its part; and two of which the outer one's values were kept.
        ({"x-forwarded-host": "a, inner", "x-forwarded-for": "192.0.2.1, 10.1.2.3"}, ("", "a")),
        ({"x-forwarded-host": "a", "x-forwarded-for": "192.0.2.1, 10.1.2.3"}, ("", "a")),
        ({"forwarded": "for=192.0.2.1;host=a;proto=https, for=10.1.2.3:81;host=inner;proto=http"}, ("https", "a")),
        ({"forwarded": 'host=evil, for="[2001:db8::1]:7";HOST="a:8"'}, ("", "a:8")),
        ({"forwarded": 'for=192.0.2.1;host=a, for="[fd00::1]:7";host=inner'}, ("", "a")),
        ({"forwarded": ";;=,", "x-forwarded-host": "a"}, ("", "")),
    ],
)
def test_what_proxies_say(fields: dict[str, str], wanted: tuple[str, str]) -> None:
    assert _forwarded(fields, OURS) == wanted


def test_who_is_trusted() -> None:
    assert is_trusted("127.0.0.1", OURS)
    assert is_trusted("::ffff:10.1.9.9", OURS)
    assert not is_trusted("10.2.0.1", OURS)
    assert not is_trusted("unknown", OURS)
    assert not is_trusted("", OURS)


def test_a_proxy_is_an_address_or_a_network(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="trusted_proxies"):
        config.parse(
            '[s3]\nlisten = "127.0.0.1:1"\ntrusted_proxies = ["proxy.example"]\n[admin]\nlisten = "127.0.0.1:2"\n',
            str(tmp_path),
        )
