"""Both faces' operations, mixed with restarts, against a plain dictionary: names, bytes, kinds, listing."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from stratum import buckets, files, fsck, housekeeping, listing, objects, tree
from stratum.errors import StratumError
from stratum.files import Caller
from stratum.schema import Inode, Kind
from stratum.volume import Volume
from stratum.write_buffer import WriteBuffer
from tests.support import BUCKET, delete, get, longer, make_volume, put

NAMES = st.sampled_from(["a", "b", "c"])
PATHS = st.lists(NAMES, min_size=1, max_size=3)
DATA = st.builds(
    lambda size, letter: letter * size,
    st.sampled_from([0, 10, 16_384, 16_385, 70_000]),
    st.sampled_from([b"x", b"y", b"z"]),
)
ME = Caller(0, 0)


def unused(_: int) -> bool:
    return False


class TwoFaces(RuleBasedStateMachine):
    """`keys` maps S3 keys to bytes; `folders` holds directories the mount made or kept."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        make_volume(self.folder / "volume")
        self.volume = Volume(self.folder / "volume", "model")
        self.keys: dict[str, bytes] = {}
        self.folders: set[str] = set()

    def teardown(self) -> None:
        self.volume.close()
        shutil.rmtree(self.folder)

    # -- helpers ------------------------------------------------------------------------------------------------------

    def is_folder(self, path: str) -> bool:
        return path in self.folders or any(
            key.startswith(path + "/") for key in (*self.keys, *(folder + "/" for folder in self.folders))
        )

    def locate(self, path: list[str]) -> tuple[int, bytes] | None:
        """(directory, name) as a kernel would resolve it, if the way there exists."""
        with self.volume.snapshot() as reader:
            at = buckets.get(reader, BUCKET).inode
            for name in path[:-1]:
                try:
                    inode = files.lookup(reader, at, name.encode())
                except StratumError:
                    return None
                if inode.kind != Kind.DIRECTORY:
                    return None
                at = inode.number
        return at, path[-1].encode()

    def keep(self, path: list[str]) -> None:
        """The mount took something out of this path's directory: if nothing is left, the directory stays as explicit."""
        parent = "/".join(path[:-1])
        if parent and not self.is_folder_with_content(parent):
            self.folders.add(parent)

    def is_folder_with_content(self, path: str) -> bool:
        return any(key.startswith(path + "/") for key in self.keys) or any(
            folder.startswith(path + "/") for folder in self.folders
        )

    # -- S3 -----------------------------------------------------------------------------------------------------------

    @rule(path=PATHS, data=DATA)
    def s3_put(self, path: list[str], data: bytes) -> None:
        put(self.volume, "/".join(path), data)
        self.keys["/".join(path)] = data

    @rule(path=PATHS)
    def s3_delete(self, path: list[str]) -> None:
        assert delete(self.volume, "/".join(path)) == (self.keys.pop("/".join(path), None) is not None)

    @rule(source=PATHS, to=PATHS)
    def s3_copy(self, source: list[str], to: list[str]) -> None:
        if "/".join(source) in self.keys:
            request = objects.CopyRequest(
                BUCKET, "/".join(source).encode(), BUCKET, "/".join(to).encode(), None, "", ""
            )
            self.volume.mutate(lambda tx: objects.copy(tx, request))
            self.keys["/".join(to)] = self.keys["/".join(source)]

    @rule(path=PATHS)
    def s3_delete_directory_key(self, path: list[str]) -> None:
        name = "/".join(path)
        was = (
            name in self.folders
            and not any(key.startswith(name + "/") for key in self.keys)
            and not any(f.startswith(name + "/") for f in self.folders)
        )
        deleted = delete(self.volume, name + "/")
        assert deleted == was
        if was:
            self.folders.discard(name)

    # -- the mount ------------------------------------------------------------------------------------------------------

    @rule(path=PATHS, data=DATA, offset=st.sampled_from([0, 5, 20_000]))
    def mount_write(self, path: list[str], data: bytes, offset: int) -> None:
        place, key = self.locate(path), "/".join(path)
        if place is None or self.is_folder(key):
            return
        inode: Inode
        try:
            with self.volume.snapshot() as reader:
                inode = files.lookup(reader, *place)
        except StratumError:
            inode = self.volume.mutate(lambda tx: files.make(tx, *place, 0o100644, ME))
            self.keys[key] = b""
        buffer = WriteBuffer(self.volume, inode)
        buffer.write(offset, data, 1) if data else buffer.truncate(offset, 1)
        buffer.commit()
        old = self.keys[key]
        if data:
            self.keys[key] = old[:offset].ljust(offset, b"\0") + data + old[offset + len(data) :]
        else:
            self.keys[key] = old[:offset].ljust(offset, b"\0")

    @rule(path=PATHS)
    def mount_mkdir(self, path: list[str]) -> None:
        place, name = self.locate(path), "/".join(path)
        if place is None:
            return
        try:
            self.volume.mutate(lambda tx: files.make(tx, *place, 0o040755, ME))
        except StratumError:
            assert self.is_folder(name) or name in self.keys
        else:
            self.folders.add(name)

    @rule(path=PATHS)
    def mount_unlink(self, path: list[str]) -> None:
        place, key = self.locate(path), "/".join(path)
        if place is None:
            return
        try:
            self.volume.mutate(lambda tx: files.unlink(tx, *place, unused))
        except StratumError:
            assert key not in self.keys or self.is_folder(key)
        else:
            del self.keys[key]
            self.keep(path)

    @rule(path=PATHS)
    def mount_rmdir(self, path: list[str]) -> None:
        place, name = self.locate(path), "/".join(path)
        if place is None:
            return
        try:
            self.volume.mutate(lambda tx: files.rmdir(tx, *place, unused))
        except StratumError:
            assert not self.is_folder(name) or self.is_folder_with_content(name)
        else:
            self.folders.discard(name)
            self.keep(path)

    @rule(source=PATHS, to=PATHS)
    def mount_rename(self, source: list[str], to: list[str]) -> None:
        old, new = self.locate(source), self.locate(to)
        if old is None or new is None:
            return
        old_name, new_name = "/".join(source), "/".join(to)
        moved_folder = self.is_folder(old_name)
        shadowed = moved_folder and new_name in self.keys and not self.is_folder(new_name)
        try:
            self.volume.mutate(lambda tx: files.rename(tx, *old, *new, 0, unused))
        except StratumError:
            return
        if old_name == new_name:
            return
        assert not shadowed
        if moved_folder:
            self.folders.discard(new_name)
            self.keys = {
                new_name + key[len(old_name) :] if key.startswith(old_name + "/") else key: data
                for key, data in self.keys.items()
            }
            self.folders = {
                new_name + name[len(old_name) :] if name == old_name or name.startswith(old_name + "/") else name
                for name in self.folders
            }
            if not self.is_folder_with_content(new_name):
                self.folders.add(new_name)
        else:
            self.keys[new_name] = self.keys.pop(old_name)
        self.keep(source)

    # -- time passes ------------------------------------------------------------------------------------------------------

    @rule()
    def restart(self) -> None:
        self.volume.close()
        self.volume = Volume(self.folder / "volume", "model")

    @rule()
    def reclaim(self) -> None:
        housekeeping.run_once(self.volume)

    # -- what must hold ---------------------------------------------------------------------------------------------------

    @invariant()
    def s3_lists_the_model(self) -> None:
        with self.volume.snapshot() as reader:
            page = listing.list_page(reader, buckets.get(reader, BUCKET))
        listed = [key.decode() for key, *_ in page.objects]
        folders = [name + "/" for name in self.folders if not self.is_folder_with_content(name)]
        assert listed == sorted([*self.keys, *folders], key=str.encode)

    @invariant()
    def bytes_are_the_models(self) -> None:
        for key, data in self.keys.items():
            assert get(self.volume, key) == data

    @precondition(lambda self: len(self.keys) % 3 == 0)
    @invariant()
    def everything_agrees(self) -> None:
        assert fsck.check(self.volume) == []

    @invariant()
    def directories_are_the_models(self) -> None:
        def walk(directory: int, path: str) -> set[str]:
            found = set()
            with self.volume.snapshot() as reader:
                children = [
                    (entry, dentry)
                    for entry, dentry in tree.scan_dentries(reader, directory)
                    if dentry.kind == Kind.DIRECTORY
                ]
            for entry, dentry in children:
                name = path + os.fsdecode(entry[:-1])
                found |= {name} | walk(dentry.inode, name + "/")
            return found

        with self.volume.snapshot() as reader:
            root = buckets.get(reader, BUCKET).inode
        wanted = set(self.folders)
        for path in (*self.keys, *(folder + "/x" for folder in self.folders)):
            parts = path.split("/")[:-1]
            wanted |= {"/".join(parts[: at + 1]) for at in range(len(parts))}
        assert walk(root, "") == wanted


deep: Any = settings(
    max_examples=longer(40, 1000),
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestTwoFaces: Any = pytest.mark.longer(TwoFaces.TestCase)
TestTwoFaces.settings = deep
