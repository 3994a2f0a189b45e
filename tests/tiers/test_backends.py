"""One suite that every backend and decorator passes, and what each decorator adds."""

from __future__ import annotations

import itertools
import os
import random
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from stratum.cold_admin import probe
from stratum.cold_backends.contract import (
    PART_BYTES,
    Backend,
    RemoteConflict,
    RemoteDamaged,
    RemoteError,
    RemoteNotFound,
    RemoteRefused,
)
from stratum.cold_backends.decorator import Decorator
from stratum.cold_backends.directory import DirectoryBackend
from stratum.cold_backends.encrypt import CHUNK_BYTES, Encrypting
from stratum.cold_backends.faults import Faulty
from stratum.cold_backends.limit import Limited
from stratum.cold_backends.retry import OPEN_S, Retrying, may_help
from stratum.cold_backends.s3 import S3Backend
from tests.support import Server
from tests.tiers.fault_proxy import FaultProxy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KEY = bytes(range(32))
_numbers = itertools.count()


def s3(endpoint: str) -> S3Backend:
    backend = S3Backend(endpoint, f"bucket-{next(_numbers)}", "some/prefix/", credentials=("access", "secret"))
    backend.create_bucket("")
    backend.create_bucket("")
    return backend


@pytest.fixture(params=["directory", "s3", "retrying", "limited", "encrypting", "decorator", "faulty", "everything"])
def backend(request: pytest.FixtureRequest, tmp_path: Path, moto: str) -> Iterator[Backend]:
    plain: Backend = s3(moto) if request.param in {"s3", "everything"} else DirectoryBackend(tmp_path)
    quiet = Faulty(plain, lambda _operation, _key: "")
    made: Backend = {
        "directory": plain,
        "s3": plain,
        "decorator": Decorator(plain),
        "faulty": quiet,
        "retrying": Retrying(plain),
        "limited": Limited(plain, bytes_per_s=1e12, requests_per_s=1e6),
        "encrypting": Encrypting(plain, KEY),
        "everything": Encrypting(Retrying(Limited(plain)), KEY),
    }[request.param]
    yield made
    made.close()


def read(backend: Backend, key: str, start: int = 0, stop: int | None = None) -> bytes:
    return b"".join(backend.get(key, start, stop).pieces)


@pytest.mark.parametrize("size", [1, 1000, CHUNK_BYTES, CHUNK_BYTES + 1, 700_000])
def test_what_was_put_comes_back_by_ranges(backend: Backend, size: int) -> None:
    data = os.urandom(size)
    backend.put("v1/a/b", data, {"one": "1"})
    info = backend.head("v1/a/b")
    assert (info.size, info.metadata["one"]) == (size, "1")
    assert read(backend, "v1/a/b") == data
    for start, stop in (
        (0, 1),
        (0, size),
        (size // 2, size),
        (size // 3, size // 2 + 1),
        (size - 1, size + 500),
        (size // 2, None),
    ):
        assert read(backend, "v1/a/b", start, stop) == data[start:stop]
    assert backend.get("v1/a/b", 0, 1).info.size == size


def test_put_replaces_and_delete_is_repeatable(backend: Backend) -> None:
    backend.put("k", b"old", {})
    backend.put("k", memoryview(b"newer"), {})
    assert read(backend, "k") == b"newer"
    backend.delete("k")
    backend.delete("k")
    for ask in (lambda: backend.head("k"), lambda: read(backend, "k")):
        with pytest.raises(RemoteNotFound):
            ask()


def test_a_conditional_put_has_one_winner(backend: Backend) -> None:
    backend.put("k", b"first", {}, if_absent=True)
    with pytest.raises(RemoteConflict):
        backend.put("k", b"second", {}, if_absent=True)
    assert read(backend, "k") == b"first"


def test_listing_is_ordered_and_by_prefix(backend: Backend) -> None:
    names = ["b/2", "a/1", "b/10", "b/1", "c"]
    for name in names:
        backend.put(name, name.encode() * 100, {})
    assert [(info.key, info.size) for info in backend.list("b/")] == [("b/1", 300), ("b/10", 400), ("b/2", 300)]
    assert [info.key for info in backend.list("")] == sorted(names)
    assert list(backend.list("nothing")) == []


def test_multipart_goes_on_where_it_was(backend: Backend) -> None:
    parts = [os.urandom(PART_BYTES), os.urandom(100_000)]
    upload = backend.create_upload("big", {"m": "2"})
    backend.upload_part("big", upload, 1, parts[0])
    assert next((key, found) for key, found, _ in backend.list_uploads("big"))[0] == "big"
    assert backend.list_parts("big", upload) == {1: PART_BYTES}
    with pytest.raises(RemoteNotFound):
        backend.head("big")
    backend.upload_part("big", upload, 2, b"wrong")
    backend.upload_part("big", upload, 2, parts[1])
    backend.complete_upload("big", upload, 2)
    whole = b"".join(parts)
    assert backend.head("big").size == len(whole)
    assert backend.head("big").metadata["m"] == "2"
    assert (
        read(backend, "big", PART_BYTES - 70_000, PART_BYTES + 70_000)
        == whole[PART_BYTES - 70_000 : PART_BYTES + 70_000]
    )
    with pytest.raises(RemoteNotFound):
        backend.list_parts("big", upload)


def test_an_aborted_upload_leaves_nothing(backend: Backend) -> None:
    upload = backend.create_upload("big", {})
    backend.upload_part("big", upload, 1, b"x" * 1000)
    backend.abort_upload("big", upload)
    backend.abort_upload("big", upload)
    assert list(backend.list_uploads("")) == []
    with pytest.raises(RemoteNotFound):
        backend.list_parts("big", upload)


def test_the_probe_finds_out_what_is_there(backend: Backend) -> None:
    found = probe(backend, backend)
    assert found["ranges"]
    assert found["conditional_puts"]
    assert found["multipart"]
    assert found["metadata"]
    assert list(backend.list("")) == []


# -- objects that others changed -------------------------------------------------------------------------------------------


def raw_of(backend: Backend) -> Backend:
    while isinstance(backend, Decorator):
        backend = backend.inner
    return backend


def stored(backend: Backend, key: str) -> bytes:
    """What lies in the remote, whatever decorators make of it."""
    return b"".join(raw_of(backend).get(key).pieces)


def tamper(backend: Backend, key: str, data: bytes | None) -> None:
    """Somebody puts other bytes in the place of an object's, with the same metadata; None removes it."""
    raw = raw_of(backend)
    if data is None:
        raw.delete(key)
    else:
        raw.put(key, data, raw.head(key).metadata)


SIZE = 700_000


@pytest.mark.parametrize("left", [0, 1, 15, 65_536, 65_552, 300_000, SIZE - 1])
def test_a_truncated_object_ends_and_says_so(backend: Backend, left: int) -> None:
    """Its size is what is there, or reading is an error; there are never more bytes than that, and none behind the end."""
    data = os.urandom(SIZE)
    backend.put("k", data, {})
    tamper(backend, "k", stored(backend, "k")[:left])
    for start, stop in ((0, SIZE), (0, None), (100, 200_000), (left, SIZE), (SIZE - 10, SIZE), (SIZE - 10, None)):
        try:
            body = backend.get("k", start, stop)
            found = b"".join(body.pieces)
        except RemoteError:
            continue
        assert body.info.size <= left
        assert found == data[start : min(SIZE if stop is None else stop, body.info.size)]


def test_a_longer_object_gives_what_was_asked_for(backend: Backend) -> None:
    data = os.urandom(SIZE)
    backend.put("k", data, {})
    tamper(backend, "k", stored(backend, "k") + b"more")
    for start, stop in ((0, SIZE), (100, 200_000), (SIZE - 10, SIZE)):
        try:
            assert read(backend, "k", start, stop) == data[start:stop]
        except RemoteDamaged:
            continue


def test_an_object_that_goes_or_changes_while_it_is_read_is_whole_or_an_error(backend: Backend) -> None:
    for other in (None, os.urandom(SIZE), os.urandom(SIZE // 2), b""):
        data = os.urandom(SIZE)
        backend.put("k", data, {})
        pieces = iter(backend.get("k", 0, SIZE).pieces)
        begun = next(pieces)
        tamper(backend, "k", None if other is None else other)
        try:
            found = begun + b"".join(pieces)
        except RemoteError:
            continue
        assert found == data


def test_metadata_that_nobody_can_read_is_damage(tmp_path: Path) -> None:
    backend = DirectoryBackend(tmp_path)
    backend.put("k", b"data", {})
    for text in ("", "{", "[]", '{"sha256": "zz", "metadata": {}}', '{"sha256": ""}'):
        (tmp_path / "metadata" / "k").write_text(text)
        with pytest.raises(RemoteDamaged):
            backend.get("k")


# -- decorators -----------------------------------------------------------------------------------------------------------


def failing(tmp_path: Path, faults: dict[tuple[str, int], str]) -> Faulty:
    """A directory whose n-th call of an operation fails as told."""
    seen: dict[str, int] = {}

    def plan(operation: str, _key: str) -> str:
        seen[operation] = seen.get(operation, 0) + 1
        return faults.get((operation, seen[operation]), "")

    return Faulty(DirectoryBackend(tmp_path), plan)


def test_retries_mend_refusals_lost_answers_and_broken_bodies(tmp_path: Path) -> None:
    pauses: list[float] = []
    inner = failing(
        tmp_path,
        {("put", 1): "refuse", ("put", 2): "lose", ("get", 1): "refuse", ("get", 2): "truncate", ("delete", 1): "lose",
         ("complete_upload", 1): "lose", ("upload_part", 1): "lose"},
    )  # fmt: skip
    backend = Retrying(inner, pause=pauses.append, chance=random.Random(1))
    data = os.urandom(900_000)
    backend.put("k", data, {})
    assert read(backend, "k") == data
    backend.delete("k")
    upload = backend.create_upload("m", {})
    backend.upload_part("m", upload, 1, b"part")
    backend.complete_upload("m", upload, 1)
    assert read(backend, "m") == b"part"
    assert len(pauses) == backend.retries == 7
    assert all(0 <= pause <= 5 for pause in pauses)


@pytest.mark.parametrize("other", ["same length", "shorter", "gone"])
def test_the_rest_of_a_broken_body_is_of_the_same_object(tmp_path: Path, other: str) -> None:
    """Or it is none: a mixture of two would be neither."""
    inner = failing(tmp_path, {("get", 1): "truncate"})
    data = os.urandom(SIZE)
    inner.put("k", data, {})

    def pause(_: float) -> None:
        tamper(inner, "k", {"same length": os.urandom(SIZE), "shorter": data[: SIZE // 2], "gone": None}[other])

    backend = Retrying(inner, pause=pause)
    with pytest.raises(RemoteNotFound if other == "gone" else RemoteDamaged):
        read(backend, "k")
    assert len([call for call in inner.calls if call[0] == "get"]) == 2


def test_a_body_that_always_ends_early_is_given_up(tmp_path: Path) -> None:
    inner = Faulty(DirectoryBackend(tmp_path), lambda operation, _: "truncate" if operation == "get" else "")
    inner.put("k", os.urandom(SIZE), {})
    with pytest.raises(RemoteError):
        read(Retrying(inner, pause=lambda _: None), "k")
    assert len(inner.calls) < 10


def test_a_refusal_is_not_retried(tmp_path: Path) -> None:
    backend = Retrying(Faulty(DirectoryBackend(tmp_path), lambda *_: ""), pause=lambda _: pytest.fail("it waited"))
    with pytest.raises(RemoteNotFound):
        backend.head("k")
    with pytest.raises(RemoteRefused):
        backend.put("../escape", b"", {})
    assert not backend.breaker.is_open


def test_the_breaker_opens_tries_and_closes(tmp_path: Path) -> None:
    now = [0.0]
    broken = [True]
    inner = Faulty(DirectoryBackend(tmp_path), lambda *_: "refuse" if broken[0] else "")
    backend = Retrying(inner, pause=lambda _: None, clock=lambda: now[0], attempts=2)
    for _ in range(10):
        with pytest.raises(RemoteError):
            backend.put("k", b"", {})
    assert backend.breaker.is_open
    calls = len(inner.calls)
    with pytest.raises(RemoteError, match="left alone"):
        backend.put("k", b"", {})
    assert len(inner.calls) == calls
    now[0] += OPEN_S
    with pytest.raises(RemoteError):
        backend.put("k", b"", {})
    assert len(inner.calls) == calls + 1, "one request tries, and fails"
    now[0] += OPEN_S
    broken[0] = False
    backend.put("k", b"x", {})
    assert not backend.breaker.is_open
    assert read(backend, "k") == b"x"


def test_limits_pace_bytes_and_requests(tmp_path: Path) -> None:
    now = [100.0]

    def pause(seconds: float) -> None:
        now[0] += seconds

    backend = Limited(
        DirectoryBackend(tmp_path), bytes_per_s=1_000_000, requests_per_s=10, clock=lambda: now[0], pause=pause
    )
    for number in range(5):
        backend.put(f"k{number}", bytes(1_000_000), {})
    assert 2.9 <= now[0] - 100 <= 5
    begin = now[0]
    for _ in range(50):
        backend.head("k0")
    assert 3 <= now[0] - begin <= 6


def test_nothing_readable_leaves_an_encrypted_remote(tmp_path: Path) -> None:
    inner = DirectoryBackend(tmp_path)
    data = b"a very readable text " * 20_000
    Encrypting(inner, KEY).put("k", data, {})
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"readable" not in stored
    assert KEY.hex().encode() not in stored
    with pytest.raises(RemoteRefused, match="key"):
        read(Encrypting(inner, bytes(32)), "k")


@pytest.mark.parametrize("damage", ["flip", "swap", "cut", "other-object"])
def test_encrypted_bytes_that_were_changed_are_refused(tmp_path: Path, damage: str) -> None:
    inner = DirectoryBackend(tmp_path)
    backend = Encrypting(inner, KEY)
    data = os.urandom(5 * CHUNK_BYTES)
    backend.put("k", data, {})
    path = tmp_path / "objects" / "k"
    raw, sealed = bytearray(path.read_bytes()), CHUNK_BYTES + 16
    if damage == "flip":
        raw[sealed * 2 + 5] ^= 1
    elif damage == "swap":
        raw[:sealed], raw[sealed : 2 * sealed] = raw[sealed : 2 * sealed], raw[:sealed]
    elif damage == "cut":
        del raw[3 * sealed :]
    if damage == "other-object":
        for table in ("objects", "metadata"):
            (tmp_path / table / "other").write_bytes((tmp_path / table / "k").read_bytes())
    else:
        path.write_bytes(raw)
    with pytest.raises(RemoteDamaged):
        read(backend, "other" if damage == "other-object" else "k")


def test_a_directory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    backend = DirectoryBackend(tmp_path / "unplugged")
    for ask in (lambda: backend.put("k", b"", {}), lambda: list(backend.list("")), lambda: backend.delete("k")):
        with pytest.raises(RemoteError):
            ask()
    assert not (tmp_path / "unplugged").exists()


def test_a_dead_remote_is_an_error_in_time() -> None:
    backend = S3Backend("http://127.0.0.1:1", "b", credentials=("a", "b"), connect_s_max=0.5, read_s_max=0.5)
    with pytest.raises(RemoteError) as caught:
        backend.head("k")
    assert "did not answer" in caught.value.message


def test_a_range_is_one_request_whatever_becomes_of_it(moto: str) -> None:
    """But for answers of which boto3 knows more than we do."""
    proxy = FaultProxy(moto)
    backend = s3(proxy.endpoint)
    try:
        backend.put("k", b"0123456789", {"One": "1"})
        for fault, error, count in (
            ("", None, 1),
            ("503", RemoteError, 1),
            ("refuse", RemoteError, 1),
            ("truncate", RemoteError, 1),
            ("403", RemoteRefused, 2),
        ):
            proxy.plan = lambda _method, _path, _number, fault=fault: fault  # type: ignore[misc]
            before = len(proxy.requests)
            if error is None:
                assert read(backend, "k", 2, 5) == b"234"
            else:
                with pytest.raises(error) as caught:
                    read(backend, "k", 2, 5)
                assert isinstance(caught.value, RemoteRefused) == (error is RemoteRefused)
            assert len(proxy.requests) - before == count, fault
    finally:
        backend.close()
        proxy.stop()


def test_ranges_are_signed_as_boto3_signs_whatever_the_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moto believes everything; our own endpoint compares signatures."""
    remote = Server(tmp_path).start()
    remote.client().create_bucket(Bucket="archive")
    for prefix in ("", "plain/", "a b+c~%41/ü/'(!)*/"):
        backend = S3Backend(
            remote.endpoint + "/", "archive", prefix, credentials=(remote.access_key, remote.secret_key)
        )
        backend.put("v1/a-b_c.d", b"0123456789", {"one": "1"})
        slow = backend.get("v1/a-b_c.d", 3)
        with monkeypatch.context() as patch:
            patch.setattr(backend._client, "get_object", None)  # else it would mend what we get wrong
            body = backend.get("v1/a-b_c.d", 3, 20)
        assert (body.info, b"".join(body.pieces)) == (slow.info, b"".join(slow.pieces))
        with pytest.raises(RemoteNotFound):
            backend.get("other", 3, 5)
        backend.close()
    stranger = S3Backend(remote.endpoint, "archive", credentials=(remote.access_key, "not-the-secret"))
    with pytest.raises(RemoteRefused):
        stranger.get("v1/a-b_c.d", 3, 5)


def test_a_body_that_stands_still_is_an_error_that_asking_again_may_mend() -> None:
    head = b"HTTP/1.1 206 Partial\r\nContent-Length: 10\r\nContent-Range: bytes 0-9/10\r\n\r\n012"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        backend = S3Backend(endpoint, "b", credentials=("a", "b"), read_s_max=0.3)

        def answer() -> None:
            near, _ = listener.accept()
            near.recv(65536)
            near.sendall(head)
            ended.wait(20)
            near.close()

        ended = threading.Event()
        server = threading.Thread(target=answer)
        server.start()
        try:
            with pytest.raises(RemoteError) as caught:
                read(backend, "k", 0, 10)
        finally:
            ended.set()
            server.join()
    assert may_help(caught.value)
    backend.close()
