"""Several mounts of one volume: writable ones that share a tree, and mounts of one bucket."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from botocore.exceptions import ClientError

from stratum import acknowledge, buckets, objects
from stratum.processes import raise_descriptor_limit
from stratum.schema import ChangeRow, unpack_json
from stratum.stillness import name_of
from stratum.volume import Volume
from tests.appliance.test_admin import scrape, value
from tests.mount.raw_listing import RawListing
from tests.support import put, serving, stratum

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from stratum.transaction import MetadataTransaction
    from tests.support import Server

SHARED = "--shared-without-locks"
WRITERS = 8
ROUNDS = 12


@contextmanager
def mounting(server: Server, directory: Path, *flags: str) -> Iterator[Path]:
    with mount_process(server, directory, *flags):
        yield directory


@contextmanager
def mount_process(server: Server, directory: Path, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """`stratum mount` alone, ready; it must end well."""
    words = [sys.executable, "-m", "stratum.cli.main", "mount", str(server.root), str(directory), *flags]
    with server.log.open("a") as log:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready"), server.log.read_text()[-2000:]
        yield process
    finally:
        process.terminate()
        code = process.wait(30)
        subprocess.run(["umount", "--lazy", str(directory)], check=False, capture_output=True)
    assert code == 0


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A served volume that nobody has mounted."""
    with serving(tmp_path_factory.mktemp("plain")) as server:
        for bucket in ("one", "two"):
            server.client().create_bucket(Bucket=bucket)
        yield server


def test_two_writable_mounts_show_each_other_at_once(plain: Server, tmp_path: Path) -> None:
    s3 = plain.client()
    with mounting(plain, tmp_path / "a", SHARED) as first, mounting(plain, tmp_path / "b", SHARED) as second:
        sides = [first / "one", second / "one"]
        for number in range(40):
            here, there = sides[number % 2], sides[1 - number % 2]
            data = os.urandom(100 + number * 1000)
            (here / "f").write_bytes(data)
            assert (there / "f").read_bytes() == data
            assert (there / "f").stat().st_size == len(data)
            (here / "f").rename(here / "g")
            assert sorted(os.listdir(there)) == ["g"]
            assert not (there / "f").exists()
            with pytest.raises(FileExistsError):
                (there / "g").open("x")
            s3.put_object(Bucket="one", Key="g", Body=b"%d" % number)
            assert (here / "g").read_bytes() == (there / "g").read_bytes() == b"%d" % number
            with (there / "g").open("rb") as held:
                (here / "g").unlink()
                assert not (there / "g").exists()
                assert held.read() == b"%d" % number


def test_sixteen_writers_on_two_mounts_never_wait_for_each_other(plain: Server, tmp_path: Path) -> None:
    errors: list[str] = []

    def write(folder: Path, name: str) -> None:
        try:
            for number in range(ROUNDS):
                file = folder / f"{name}-{number}"
                file.write_bytes(name.encode() * 100)
                file.rename(folder / f"{name}-done-{number}")
                if number % 3 == 0:
                    (folder / f"{name}-done-{number}").unlink()
                (folder / f"{name}-d{number}").mkdir()
        except OSError as error:
            errors.append(f"{name}: {error}")

    with mounting(plain, tmp_path / "a", SHARED) as first, mounting(plain, tmp_path / "b", SHARED) as second:
        (first / "two" / "busy").mkdir()
        threads = [
            threading.Thread(target=write, args=(side / "two" / "busy", f"{at}{writer}"))
            for at, side in enumerate((first, second))
            for writer in range(WRITERS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in threads)
        assert errors == []
        listed = sorted(os.listdir(first / "two" / "busy"))
        assert listed == sorted(os.listdir(second / "two" / "busy"))
        assert len(listed) == 2 * WRITERS * (ROUNDS * 2 - ROUNDS // 3)
        for name in listed:
            if "-done-" in name:
                assert (second / "two" / "busy" / name).read_bytes() == name.partition("-")[0].encode() * 100
    assert "fenced" not in plain.log.read_text()
    assert json.loads(stratum("fsck", plain.root, "--json").stdout)["findings"] == []


def test_a_writer_with_many_descriptors_waits_for_mounts_too(plain: Server, tmp_path: Path) -> None:
    """Beyond 1,024 of them select(2) cannot be used."""
    raise_descriptor_limit()
    plain.client().create_bucket(Bucket="bucket")
    with mounting(plain, tmp_path / "a") as mount, Volume(plain.root, "test") as volume:
        open_ones = [os.dup(0) for _ in range(1100)]
        try:
            for number in range(10):
                put(volume, "k", b"%d" % number)
                assert (mount / "bucket" / "k").read_bytes() == b"%d" % number
        finally:
            for descriptor in open_ones:
                os.close(descriptor)


def test_an_announcement_of_what_was_never_committed_is_not_believed(
    plain: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next transaction has the same id, whether or not it announces its own rows."""
    plain.client().create_bucket(Bucket="announced")
    with mounting(plain, tmp_path / "a") as mount, Volume(plain.root, "test") as volume:
        key = mount / "announced" / "k"
        acknowledger = volume._acknowledger
        for number in range(40):
            if number > 1:
                assert key.read_bytes() == b"%d" % (number - 1)
                monkeypatch.setattr(acknowledge, "ANNOUNCED_ROWS_MAX", 16)
                wrong = ChangeRow(volume.session.id, 1, 1, orphan=False, entry=b"something else").pack()
                acknowledger.announce(volume.store.last_id() + 1, [wrong], [])
                monkeypatch.setattr(acknowledge, "ANNOUNCED_ROWS_MAX", 16 * (number % 2))
            put(volume, "k", b"%d" % number, bucket="announced")
            assert key.read_bytes() == b"%d" % number


def test_what_the_kernel_was_told_early_and_asked_for_again_is_told_again(
    plain: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount that sleeps tells the kernel before the commit. Whoever asks in between puts the old state back into its cache."""
    plain.client().create_bucket(Bucket="early")

    def lookups() -> float:
        return value(scrape(plain), "stratum_fuse_requests_total", operation="lookup")

    with mounting(plain, tmp_path / "a") as mount, Volume(plain.root, "test") as volume:
        key = mount / "early" / "k"
        announce = volume.committer._announce
        early = 0

        def announce_and_look(transaction_id: int, rows: list[bytes], live: list[int]) -> None:
            nonlocal early
            announce(transaction_id, rows, live)
            before = lookups()
            for _ in range(20):  # a mount that was busy this moment tells nobody before the commit
                key.stat()
                if lookups() > before:
                    early += 1
                    break
                time.sleep(0.01)
            assert key.read_bytes() == b"%d" % (number - 1)

        put(volume, "k", b"0", bucket="early")
        number = 0
        while early < 5:
            assert number < 60, f"of {number} changes the kernel was told of {early} before the commit"
            assert key.read_bytes() == b"%d" % number
            number += 1
            with monkeypatch.context() as patched:
                patched.setattr(volume.committer, "_announce", announce_and_look)
                put(volume, "k", b"%d" % number, bucket="early")
            assert key.read_bytes() == b"%d" % number
            assert key.stat().st_size == len(b"%d" % number)


def test_nobody_waits_for_a_mount_whose_kernel_knows_nothing_any_more(
    plain: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped when it has told the kernel, and need not say a word for the writer to answer."""
    plain.client().create_bucket(Bucket="still")
    fenced = plain.log.read_text().count("mount_fenced")
    with mount_process(plain, tmp_path / "a") as process, Volume(plain.root, "test") as volume:
        key = tmp_path / "a" / "still" / "k"
        for number in range(2):
            put(volume, "k", b"%d" % number, bucket="still")
            assert key.read_bytes() == b"%d" % number
        announce, acknowledger = volume.committer._announce, volume._acknowledger
        stopped = 0

        def announce_and_stop(transaction_id: int, rows: list[bytes], live: list[int]) -> None:
            nonlocal stopped
            announce(transaction_id, rows, live)
            (link,) = acknowledger._links.values()
            which = name_of(volume.session.id, acknowledger._announced)
            for _ in range(200):  # a mount that was busy this moment is waited for, so it must not be stopped
                if link.is_still(which):
                    process.send_signal(signal.SIGSTOP)
                    if link.is_still(which):  # nothing came in between
                        stopped += 1
                        return
                    process.send_signal(signal.SIGCONT)
                time.sleep(0.001)

        while stopped < 3:
            number += 1
            assert number < 60, f"of {number} changes the kernel was told of {stopped} before the commit"
            with monkeypatch.context() as patched:
                patched.setattr(volume.committer, "_announce", announce_and_stop)
                put(volume, "k", b"%d" % number, bucket="still")
            process.send_signal(signal.SIGCONT)
            assert key.read_bytes() == b"%d" % number
    assert plain.log.read_text().count("mount_fenced") == fenced


def test_a_poke_of_an_older_program_is_answered(plain: Server, tmp_path: Path) -> None:
    """Its pokes are the transaction alone."""
    with mounting(plain, tmp_path / "a"), Volume(plain.root, "test") as volume:
        with volume.snapshot() as reader:
            ((_, raw),) = reader.first_rows(b"T", b"U", 2)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection, volume.meta_descriptor() as folder:
            connection.connect(f"/proc/self/fd/{folder}/{unpack_json(raw)['socket']}")
            connection.settimeout(10)
            for _ in range(3):
                connection.send(struct.pack("<Q", 5))
                assert struct.unpack("<Q", connection.recv(100))[0] >= 5


def test_more_changes_than_are_told_at_once_are_all_forgotten(plain: Server, tmp_path: Path) -> None:
    s3 = plain.client()
    s3.create_bucket(Bucket="much")
    with mounting(plain, tmp_path / "a") as mount, Volume(plain.root, "test") as volume:
        for number in range(2500):
            put(volume, f"k{number}", b"old", bucket="much")
        names = sorted(os.listdir(mount / "much"))
        assert all((mount / "much" / name).read_bytes() == b"old" for name in names)

        def remove(tx: MetadataTransaction) -> None:
            for number in range(2500):
                objects.delete(tx, buckets.get(tx, "much"), b"k%d" % number)

        volume.mutate(remove, frees=True)
        assert not any((mount / "much" / name).exists() for name in names)


def test_announcements_survive_the_wire() -> None:
    announced = acknowledge.Announcement(7, 9, [b"a" * 40, b"b", b"c" * 1100])
    assert acknowledge.Announcement.unpack(announced.pack()) == announced
    assert len(acknowledge.Announcement(1, 1, [b"x"]).pack()) > acknowledge.POKE.size


@pytest.mark.parametrize(("first", "second"), [((), ()), ((SHARED,), ()), (("--bucket", "one"), ())])
def test_a_second_writable_mount_must_say_that_it_shares(
    plain: Server, tmp_path: Path, first: tuple[str, ...], second: tuple[str, ...]
) -> None:
    with mounting(plain, tmp_path / "a", *first):
        refused = stratum("mount", plain.root, tmp_path / "b", *second, expect=None)
        assert refused.returncode != 0
        assert SHARED in refused.stderr


def test_a_running_mount_gives_up_its_names_for_a_second_one(plain: Server, tmp_path: Path) -> None:
    """Everything that the first has cached before is dropped, moved names too, and what it has not committed is."""
    with mounting(plain, tmp_path / "a") as first:
        folder = first / "one" / "kept"
        (folder / "deep").mkdir(parents=True)
        for number in range(3000):
            (folder / f"f{number}").write_bytes(b"%d" % number)
        (folder / "deep" / "inner").write_bytes(b"inner")
        ending = threading.Event()
        moves = 0

        def move() -> None:
            nonlocal moves
            while not ending.is_set():
                (folder / f"m{moves}" if moves else folder / "f0").rename(folder / f"m{moves + 1}")
                moves += 1

        mover = threading.Thread(target=move)
        mover.start()
        with (folder / "open").open("wb") as held:
            held.write(b"not closed")
            held.flush()
            with mounting(plain, tmp_path / "b", SHARED) as second:
                ending.set()
                mover.join(30)
                there = second / "one" / "kept"
                assert (there / "open").read_bytes() == b"not closed"
                assert (there / f"m{moves}").read_bytes() == b"0"
                (there / f"m{moves}").unlink()
                assert not (folder / f"m{moves}").exists()
                for number in range(1, 3000):
                    if number % 3:
                        (there / f"f{number}").rename(there / f"g{number}")
                for number in range(1, 3000):
                    assert (folder / f"f{number}").exists() == (number % 3 == 0)
                (there / "deep").rename(there / "deeper")
                assert not (folder / "deep" / "inner").exists()
                assert (folder / "deeper" / "inner").read_bytes() == b"inner"
                with pytest.raises(FileExistsError):
                    (there / "open").open("x")
                (folder / "new").touch()
                assert (there / "new").exists()
        refused = stratum("mount", plain.root, tmp_path / "c", expect=None)
        assert SHARED in refused.stderr
    assert moves
    assert "fenced" not in plain.log.read_text()
    assert "mount_shared" in plain.log.read_text()


def test_a_mount_of_one_bucket(plain: Server, tmp_path: Path) -> None:
    s3 = plain.client()
    s3.put_object(Bucket="one", Key="secret", Body=b"of bucket one")
    with (
        mounting(plain, tmp_path / "a", "--bucket", "two") as two,
        mounting(plain, tmp_path / "b", "--bucket", "one") as one,
    ):
        s3.put_object(Bucket="two", Key="k", Body=b"through S3")
        assert (two / "k").read_bytes() == b"through S3"
        s3.put_object(Bucket="two", Key="k", Body=b"again")
        assert (two / "k").read_bytes() == b"again"
        s3.delete_object(Bucket="two", Key="k")
        assert not (two / "k").exists()
        (two / "d").mkdir()  # a directory: this root holds no buckets
        (two / "d" / "f").write_bytes(b"through the mount")
        assert s3.get_object(Bucket="two", Key="d/f")["Body"].read() == b"through the mount"
        with pytest.raises(ClientError):
            s3.head_bucket(Bucket="d")
        (two / "top").write_bytes(b"x")
        (two / "top").rename(two / "d" / "top")
        os.link(two / "d" / "top", two / "top")
        assert s3.get_object(Bucket="two", Key="top")["Body"].read() == b"x"
        assert two.stat().st_ino == 1
        assert (two / "d" / "..").stat().st_ino == 1
        listing = RawListing(two)
        assert [entry[:2] for entry in listing.rest()[:2]] == [(".", 1), ("..", 1)]
        listing.close()
        os.setxattr(two, "user.where", b"the bucket's directory")
        assert os.getxattr(two, "user.where") == b"the bucket's directory"
        before = two.stat().st_mtime_ns
        s3.put_object(Bucket="two", Key="later", Body=b"x")
        assert two.stat().st_mtime_ns > before
        with pytest.raises(FileNotFoundError):
            os.setxattr(two / "top", "user.stratum.clone", b"one/secret")
        os.setxattr(two / "top", "user.stratum.clone", b"two/d/f")
        assert (two / "top").read_bytes() == b"through the mount"
        (one / "secret").write_bytes(b"both are writable")
        assert s3.get_object(Bucket="one", Key="secret")["Body"].read() == b"both are writable"
    assert stratum("mount", plain.root, tmp_path / "c", "--bucket", "none", expect=4).returncode == 4


def test_the_configuration_says_the_same(tmp_path: Path) -> None:
    settings: dict[str, dict[str, Any]] = {"mount": {"bucket": "", "shared_without_locks": True}}
    with (
        serving(tmp_path / "volume", mount=True, settings=settings) as server,
        mounting(server, tmp_path / "other", SHARED) as other,
    ):
        assert server.mount is not None
        (server.mount / "made").mkdir()
        (other / "made" / "f").write_bytes(b"x")
        assert (server.mount / "made" / "f").read_bytes() == b"x"
