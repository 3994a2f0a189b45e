"""Listings of a mount while the directory changes."""

from __future__ import annotations

import os
import random
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from tests.mount.raw_listing import RawListing
from tests.support import stratum

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support import Server


@pytest.mark.parametrize("filled", [False, True], ids=["not kept yet", "kept by the kernel"])
@pytest.mark.parametrize("meanwhile", ["nothing", "put", "list", "put and list"])
def test_who_removes_what_he_lists_leaves_nothing(s3: Any, home: Path, meanwhile: str, *, filled: bool) -> None:
    """Although the kernel keeps listings, whoever is half-way through one gets every name that was there all the time."""
    folder = home / "full"
    folder.mkdir()
    wanted = {f"name-{number:04d}" for number in range(1500)}
    for name in wanted:
        (folder / name).touch()
    if filled:
        assert set(os.listdir(folder)) == wanted
    listing = RawListing(folder)
    seen: list[str] = []
    dice = random.Random(f"{meanwhile} {filled}")
    put = 0
    while names := listing.read(dice.choice([300, 1000, 5000])):
        for name in names:
            if name in wanted:
                seen.append(name)
                (folder / name).unlink(missing_ok=True)
        if "put" in meanwhile:
            put += 1
            s3.put_object(Bucket=home.name, Key=f"full/a-new-{put}", Body=b"")
        if "list" in meanwhile:
            assert not wanted & set(seen) & set(os.listdir(folder))
    listing.close()
    assert set(seen) == wanted
    assert not wanted & set(os.listdir(folder))


DIRECTORY = 4
"""DT_DIR."""


@pytest.mark.parametrize("filled", [False, True], ids=["not kept yet", "kept by the kernel"])
@pytest.mark.parametrize("where", ["root", "bucket", "folder", "empty folder", "object of its own", "snapshot"])
def test_a_directory_lists_itself_and_its_parent(
    mounted: Server, s3: Any, home: Path, where: str, *, filled: bool
) -> None:
    assert mounted.mount is not None
    for name in ("folder", "empty"):
        (home / name).mkdir()
    for number in range(40):
        (home / "folder" / f"name-{number:04d}").touch()
    s3.put_object(Bucket=home.name, Key="own/", Body=b"bytes")
    s3.put_object(Bucket=home.name, Key="own/name", Body=b"")
    path = {"root": mounted.mount, "bucket": home, "folder": home / "folder", "empty folder": home / "empty", "object of its own": home / "own"}.get(where)  # fmt: skip
    if path is None:
        stratum("snapshot", "create", mounted.root, f"{home.name}/folder", "dots")
        path = mounted.mount / f"{home.name}.snap.dots"
    if filled:
        os.listdir(path)
    listing = RawListing(path)
    found = listing.rest(120)  # a few names at a time
    names = [name for name, *_ in found]
    assert names[:2] == [".", ".."]
    assert len(set(names)) == len(names)
    assert sorted(names[2:]) == sorted(os.listdir(path))
    assert found[0][1:3] == (path.stat().st_ino, DIRECTORY)
    parent = path if where == "root" else path.parent
    assert found[1][1:3] == (parent.stat().st_ino, DIRECTORY)
    for position, (_, _, _, offset) in enumerate(found):
        listing.seek(offset)
        assert [name for name, *_ in listing.rest(300)] == names[position + 1 :]
    listing.close()
    listed = subprocess.run(["ls", "-a", path], capture_output=True, text=True, check=True).stdout.split("\n")
    assert {".", ".."} <= set(listed)
    if where == "snapshot":
        stratum("snapshot", "remove", mounted.root, f"{home.name}/folder", "dots")


def test_where_a_listing_was_is_found_again_after_names_have_gone(home: Path) -> None:
    """telldir(3) and seekdir(3) over deletions, in front of the place and at it."""
    for number in range(300):
        (home / f"name-{number:04d}").touch()
    listing = RawListing(home)
    entries = listing.entries(2000)
    name, _, _, offset = entries[-1]
    (home / entries[3][0]).unlink()
    listing.seek(offset)
    behind = [found for found, *_ in listing.rest()]
    (home / name).unlink()
    listing.seek(offset)
    again = [found for found, *_ in listing.rest()]
    assert set(behind) <= set(again), "none is left out"
    listing.close()
