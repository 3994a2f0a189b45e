"""Which places a volume uses, and whether two of them overlap."""

from __future__ import annotations

import contextlib
import subprocess
from typing import TYPE_CHECKING

import pytest

from stratum import config, mount_table, places
from stratum.errors import InvalidArgument
from stratum.places import Place, Role
from tests.support import need_fuse

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def bound(source: Path, target: Path) -> Iterator[None]:
    need_fuse()
    subprocess.run(["mount", "--bind", source, target], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", target], check=True)


def test_places_are_compared_by_their_folders(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    assert places.relation(inner, inner) == "is"
    assert places.relation(inner, tmp_path / "a") == "lies in"
    assert places.relation(tmp_path / "a", inner / "not" / "there") == "holds"
    assert places.relation(inner, tmp_path / "a" / "bc") == ""
    assert places.relation(inner / ".." / "c", tmp_path / "a" / "b") == ""


def test_a_symbolic_link_is_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "round").symlink_to("round")
    assert places.relation(tmp_path / "link" / "deep", tmp_path / "real") == "lies in"
    assert places.relation(tmp_path / "link" / ".." / "real", tmp_path / "real") == "is"
    assert places.relation(tmp_path / "link" / "new", tmp_path / "real" / "new") == "is"
    assert places.relation(tmp_path / "round" / "x", tmp_path / "real") == ""


def test_a_bind_mount_is_what_it_shows(tmp_path: Path) -> None:
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "else where").mkdir()
    with bound(tmp_path / "real" / "deep", tmp_path / "else where"):
        assert places.relation(tmp_path / "else where" / "x", tmp_path / "real") == "lies in"
        assert places.relation(tmp_path / "else where", tmp_path / "real" / "deep") == "is"
        # What it hides lies there too, and is there again when the mount is not.
        assert places.relation(tmp_path / "else where", tmp_path) == "lies in"
        mount = mount_table.mount_at(str(tmp_path / "else where"))
        assert mount is not None
        assert mount.root.endswith("/real/deep")
        with bound(tmp_path, tmp_path / "else where"):
            assert [one.root == mount.root for one in mount_table.stacked_at(mount.path)] == [True, False]
    assert mount_table.mount_at(str(tmp_path / "else where")) is None


def test_no_place_plays_two_roles(tmp_path: Path) -> None:
    root = tmp_path / "v"
    settings = config.parse(config.render({"volume.hot": ["hot", str(tmp_path / "fast")], "mount.path": "/m"}), "x")
    used = places.configured(root, settings)
    assert places.conflicts(used) == []
    warm = Place(Role.WARM, tmp_path / "fast" / "warm")
    cold = Place(Role.COLD, root / "meta", "far")
    assert places.conflicts([*used, warm]) == [f"a hot folder {tmp_path}/fast holds {warm}"]
    assert places.conflicts([*used, cold]) == [f"the volume's metadata folder {root}/meta is {cold}"]
    assert places.conflicts([*used, Place(Role.WARM, root / "warm")]) == []
    assert places.conflicts([*used, Place(Role.HOT, tmp_path)]) != []
    with pytest.raises(InvalidArgument, match=r"the backup .* lies in the volume .*; no place may play two roles"):
        places.refuse_overlap("the backup", root / "saved", used)
    places.refuse_overlap("the backup", tmp_path / "saved", used)
    places.refuse_overlap("a new disk", root / "warm", used, places.BYTES | {Role.MOUNT})
