"""No place plays two roles: a volume does not take itself for its cold tier, whatever the way to it."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from stratum import backup, cold_admin, packs, roles
from stratum.errors import ConfigInvalid, InvalidArgument
from stratum.tier_rows import ColdRow
from stratum.volume import Volume
from tests.support import Server, need_fuse, stratum
from tests.tiers.conftest import directory_row, make_tiered
from tests.tiers.fault_proxy import FaultProxy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def s3_row(folder: Path, endpoint: str, bucket: str, keys: tuple[str, str] = ("a", "s"), **changed: str) -> ColdRow:
    credentials = folder / f"credentials-{bucket}"
    credentials.write_text(json.dumps({"access_key": keys[0], "secret_key": keys[1]}))
    credentials.chmod(0o600)
    row = ColdRow("s3", endpoint, bucket, "", "", str(credentials), "", "", 0, 0)
    for name, value in changed.items():
        setattr(row, name, value)
    return row


# -- the volume itself --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    need_fuse()
    server = Server(tmp_path_factory.mktemp("self"), mount=True)
    server.owned = True
    server.start()
    server.client().create_bucket(Bucket="archive")
    yield server
    server.stop()


def left(server: Server) -> list[str]:
    listed = server.client().list_objects_v2(Bucket="archive")
    return [item["Key"] for item in listed.get("Contents", [])]


@pytest.mark.parametrize("way", ["address", "host name", "proxy", "proxy with a prefix", "encrypted"])
def test_its_own_endpoint_is_no_cold_tier(served: Server, tmp_path: Path, way: str) -> None:
    port = served.endpoint.rpartition(":")[2]
    proxy = FaultProxy(served.endpoint)
    endpoint = {"address": served.endpoint, "host name": f"http://localhost:{port}", "encrypted": served.endpoint}.get(
        way, proxy.endpoint
    )
    keys = (served.access_key, served.secret_key)
    row = s3_row(tmp_path, endpoint, "archive", keys, prefix="a/b/" if "prefix" in way else "")
    if way == "encrypted":
        (tmp_path / "key").write_text("07" * 32)
        (tmp_path / "key").chmod(0o600)
        row.encryption_key = str(tmp_path / "key")
    try:
        with Volume(served.root, "test") as opened:
            with pytest.raises(InvalidArgument, match="this volume itself"):
                cold_admin.add(opened, "self", row)
    finally:
        proxy.stop()
    assert left(served) == []


def test_a_directory_in_its_own_mount_is_no_cold_tier(served: Server, tmp_path: Path) -> None:
    assert served.mount is not None
    inside = served.mount / "archive" / "folder"
    inside.mkdir()
    link = tmp_path / "link"
    link.symlink_to(inside)
    with Volume(served.root, "test") as opened:
        for path in (inside, link, served.mount, served.mount / "archive"):
            with pytest.raises(InvalidArgument, match=r"two roles|mount of this volume"):
                cold_admin.add(opened, "self", directory_row(path))
    inside.rmdir()
    assert left(served) == []


def test_a_marker_that_shows_up_by_a_way_nobody_knows_is_found(served: Server, tmp_path: Path) -> None:
    """As through an export of the mount: no path tells."""
    assert served.mount is not None
    inside = served.mount / "archive" / "exported"
    inside.mkdir()
    with Volume(served.root, "test") as opened, pytest.MonkeyPatch.context() as patch:
        patch.setattr(roles, "refuse_folder", lambda *_: None)
        with pytest.raises(InvalidArgument, match="appeared in bucket 'archive'"):
            cold_admin.add(opened, "self", directory_row(inside))
    assert [path for path in inside.rglob("*") if path.is_file()] == []
    stratum("cold", "list", served.root)
    with Volume(served.root, "test") as opened, opened.snapshot() as reader:
        assert cold_admin.describe(reader) == []


def test_an_endpoint_that_became_its_own_is_found_at_the_next_start(served: Server, tmp_path: Path) -> None:
    client = served.client()
    with Volume(served.root, "test") as opened:
        text = json.dumps({"instance": opened.instance, "epoch": 1})
        client.put_object(Bucket="archive", Key="p/stratum-instance.json", Body=text.encode())
        row = s3_row(tmp_path, "http://elsewhere:1", "archive", prefix="p/")
        opened.mutate(lambda tx: tx.put(b"nself", row.encode()))
        with pytest.raises(ConfigInvalid, match="its marker lies in bucket 'archive'"):
            roles.refuse(opened)
    told = stratum("config", "check", served.root, expect=3)
    assert "two roles" in told.stderr
    with Volume(served.root, "test") as opened:
        opened.mutate(lambda tx: tx.delete(b"nself"))
    client.delete_object(Bucket="archive", Key="p/stratum-instance.json")
    stratum("config", "check", served.root)


# -- folders ------------------------------------------------------------------------------------------------------------


def test_folders_of_two_roles_are_refused(tmp_path: Path) -> None:
    with Volume(make_tiered(tmp_path), "test") as opened:
        hot = opened.root / "hot"
        for path in (
            hot,
            hot / "below",
            opened.meta,
            tmp_path / "d0",
            tmp_path / "d0" / "below",
            tmp_path / "archive" / "x",
        ):
            with pytest.raises(InvalidArgument, match=r"two roles|disk of the warm tier"):
                opened.warm.add(path)
            path.mkdir(exist_ok=True)
            with pytest.raises(InvalidArgument, match=r"two roles|already"):
                cold_admin.add(opened, "other", directory_row(path))
        for path in (opened.root, opened.root / "backups", hot, tmp_path / "d0", tmp_path / "archive"):
            path.mkdir(exist_ok=True)
            with pytest.raises(InvalidArgument, match="would be lost with"):
                backup.make(opened, path)
        assert backup.make(opened, tmp_path).path.parent == tmp_path
        assert roles.problems(opened) == []


def test_init_refuses_folders_in_each_other(tmp_path: Path) -> None:
    root, fast = tmp_path / "volume", tmp_path / "fast"
    disks = [word for number in range(3) for word in ("--warm", tmp_path / f"d{number}")]
    for words in (
        ["--hot", fast, "--hot", fast / "below"],
        ["--hot", fast, "--mount", fast / "mount"],
        ["--hot", root / "meta" / "hot"],
        [*disks, "--ec", "2+1", "--hot", tmp_path / "d0" / "hot"],
        ["--warm", fast / "d3", *disks[2:], "--ec", "2+1", "--hot", fast],
    ):
        done = stratum("init", root, *words, expect=6)
        assert "two roles" in done.stderr, words
        assert not root.exists()


def test_an_edited_configuration_is_refused_by_check_and_serve(tmp_path: Path) -> None:
    server = Server(tmp_path)
    (tmp_path / "fast" / "below").mkdir(parents=True)
    server.configure({"volume": {"hot": ["hot", str(tmp_path / "fast"), str(tmp_path / "fast" / "below")]}})
    for words in (("config", "check", server.root), ("serve", server.root)):
        assert "two roles" in stratum(*words, expect=3).stderr


# -- remotes ------------------------------------------------------------------------------------------------------------


def test_two_remotes_are_two_places(tmp_path: Path, moto: str) -> None:
    root = make_tiered(tmp_path, remote=False)
    other = moto.replace("127.0.0.1", "localhost")
    bucket = f"roles-{os.urandom(6).hex()}"
    with Volume(root, "test") as opened:
        cold_admin.add(opened, "far", s3_row(tmp_path, moto, bucket, prefix="a/b/"), create_bucket=True)
        for endpoint, prefix in (
            (moto, "a/b/"), (moto + "/", "a/b/"), (moto, "a/b/c/"), (moto, "a/"), (moto, ""),
            (other, "a/b/"), (other, "a/b/c/"), (other, "a/"), (other, ""),
        ):  # fmt: skip
            with pytest.raises(InvalidArgument, match="'far'"):
                cold_admin.add(opened, "second", s3_row(tmp_path, endpoint, bucket, prefix=prefix))
        cold_admin.add(opened, "second", s3_row(tmp_path, moto, bucket, prefix="a/bc/"))
        (tmp_path / "archive").mkdir()
        cold_admin.add(opened, "near", directory_row(tmp_path / "archive"))
        (tmp_path / "link").symlink_to(tmp_path / "archive")
        with pytest.raises(InvalidArgument, match="two roles"):
            cold_admin.add(opened, "nearer", directory_row(tmp_path / "link"))
        assert roles.problems(opened) == []
        with opened.snapshot() as reader:
            assert packs.scan(reader) is not None
            assert [row["name"] for row in cold_admin.describe(reader)] == ["far", "near", "second"]
        found = {info.key for info in opened.cold.remote("far")[1].raw.list("")}
        assert found == {"stratum-instance.json"}, "no probe stays behind"
