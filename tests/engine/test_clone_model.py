"""Trees and clones of them under operations by seed, against plain copies of a plain tree."""

from __future__ import annotations

import copy
import os
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from stratum import (
    buckets,
    clones,
    files,
    filling,
    frozen,
    housekeeping,
    listing,
    tree,
)
from stratum.errors import NotFound, StillFilling
from stratum.files import Attributes, Caller
from stratum.schema import Kind
from stratum.volume import Volume
from tests.engine.test_clones import number_of
from tests.engine.test_filling import nobody, settle, small_pages, waiting
from tests.engine.test_reclaim import allocated
from tests.support import BUCKET, delete, get, longer, make_volume, put

if TYPE_CHECKING:
    from pathlib import Path

ME = Caller(0, 0)
ROOM = 40
__all__ = ["small_pages"]  # a fixture


@dataclass(eq=False)
class File:
    data: bytes = b""
    mode: int = 0o644


@dataclass(eq=False)
class Directory:
    children: dict[str, File | Directory] = field(default_factory=dict)


class World:
    """A volume and what it should be: `buckets` are directories; a file that has two names is one object at two places."""

    def __init__(self, opened: Volume, chance: random.Random) -> None:
        self.opened = opened
        self.chance = chance
        self.root = Directory({BUCKET: Directory()})
        self.made = 0

    def name(self) -> str:
        """Mostly new, sometimes too long for one row."""
        self.made += 1
        return f"{self.chance.choice('abc')}{self.made}" + "l" * (240 if self.chance.random() < 0.1 else 0)

    def directories(self) -> list[tuple[str, Directory]]:
        found: list[tuple[str, Directory]] = []
        pending: list[tuple[str, Directory]] = [(name, node) for name, node in self.root.children.items()]  # type: ignore[misc]  # the root holds directories
        while pending:
            path, node = pending.pop()
            found.append((path, node))
            pending += [
                (f"{path}/{name}", child) for name, child in node.children.items() if isinstance(child, Directory)
            ]
        return sorted(found, key=lambda item: item[0])

    def files(self) -> list[tuple[str, Directory, str, File]]:
        return [
            (path, node, name, child)
            for path, node in self.directories()
            for name, child in sorted(node.children.items())
            if isinstance(child, File)
        ]

    def number(self, path: str) -> int:
        return number_of(self.opened, path.encode())

    # -- operations -----------------------------------------------------------------------------------------------------

    def step(self) -> None:
        kinds = (
            self.put, self.put, self.put, self.mkdir, self.mkdir, self.link, self.unlink, self.unlink, self.rename, self.chmod, self.rmdir, self.clone, self.clone,
            self.fill_some, self.look_up_what_is_not_there, self.keep_house,
        )  # fmt: skip
        self.chance.choice(kinds)()

    def put(self) -> None:
        path, node = self.chance.choice(self.directories())
        old = [name for name, child in node.children.items() if isinstance(child, File)]
        name = self.chance.choice(old) if old and self.chance.random() < 0.5 else self.name()
        data = os.urandom(self.chance.choice((0, 10, 5000)))
        bucket, _, key = f"{path}/{name}".partition("/")
        put(self.opened, key, data, bucket=bucket, inline_max=100)
        before = node.children.get(name)
        node.children[name] = File(data, before.mode if isinstance(before, File) else 0o644)

    def mkdir(self) -> None:
        path, node = self.chance.choice(self.directories())
        number, name = self.number(path), self.name()
        self.opened.mutate(lambda tx: files.make(tx, number, name.encode(), 0o040755, ME))
        node.children[name] = Directory()

    def link(self) -> None:
        found = self.files()
        if found:
            path, _, name, file = self.chance.choice(found)
            inside = [item for item in self.directories() if item[0].split("/")[0] == path.split("/")[0]]
            where, node = self.chance.choice(inside)
            number, parent, new = self.number(f"{path}/{name}"), self.number(where), self.name()
            self.opened.mutate(lambda tx: files.link(tx, number, parent, new.encode()))
            node.children[new] = file

    def unlink(self) -> None:
        found = self.files()
        if found:
            path, node, name, _ = self.chance.choice(found)
            parent = self.number(path)
            self.opened.mutate(lambda tx: files.unlink(tx, parent, name.encode(), nobody))
            del node.children[name]

    def rename(self) -> None:
        path, node = self.chance.choice(self.directories())
        if node.children:
            name = self.chance.choice(sorted(node.children))
            moved = f"{path}/{name}"
            inside = [
                item
                for item in self.directories()
                if item[0].split("/")[0] == path.split("/")[0] and not f"{item[0]}/".startswith(f"{moved}/")
            ]
            where, target = self.chance.choice(inside)
            before, after, new = self.number(path), self.number(where), self.name()
            self.opened.mutate(lambda tx: files.rename(tx, before, name.encode(), after, new.encode(), 0, nobody))
            target.children[new] = node.children.pop(name)

    def chmod(self) -> None:
        found = self.files()
        if found:
            path, _, name, file = self.chance.choice(found)
            file.mode = self.chance.randrange(0o1000)
            number = self.number(f"{path}/{name}")
            self.opened.mutate(lambda tx: files.set_attributes(tx, number, Attributes(mode=file.mode)))

    def rmdir(self) -> None:
        empty = [
            (path, node, name)
            for path, node in self.directories()
            for name, child in sorted(node.children.items())
            if isinstance(child, Directory) and not child.children
        ]
        if empty:
            path, node, name = self.chance.choice(empty)
            parent = self.number(path)
            self.opened.mutate(lambda tx: files.rmdir(tx, parent, name.encode(), nobody))
            del node.children[name]

    def clone(self) -> None:
        if sum(len(node.children) for _, node in self.directories()) > ROOM * 4:
            return
        found = self.files()
        if found and self.chance.random() < 0.2:
            path, _, name, file = self.chance.choice(found)
            source = f"{path}/{name}"
            made: File | Directory = copy.deepcopy(file)
        else:
            source, node = self.chance.choice(self.directories())
            made = copy.deepcopy(node)
        where, target = self.chance.choice(self.directories())
        name = self.name()
        if isinstance(made, Directory) and self.chance.random() < 0.4:
            name = f"bucket-{self.made}"
            where, target = "", self.root
        clones.clone(self.opened, source.encode(), f"{where}/{name}".encode())
        target.children[name] = made

    def fill_some(self) -> None:
        found = waiting(self.opened)
        if found:
            filling.provide(self.opened, StillFilling(self.chance.choice(found)))

    def look_up_what_is_not_there(self) -> None:
        path, _ = self.chance.choice(self.directories())
        with pytest.raises(NotFound):
            self.number(f"{path}/{self.name()}")

    def keep_house(self) -> None:
        housekeeping.run_once(self.opened)
        if self.chance.random() < 0.3:
            self.opened.mutate(frozen.collect)
        if self.chance.random() < 0.1:
            filling.fill_all(self.opened)

    # -- what is there ----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        names: dict[int, int] = {}
        for _, _, _, file in self.files():
            names[id(file)] = names.get(id(file), 0) + 1
        for path, node in self.directories():

            def look(path: str = path) -> dict[str, Any]:
                with self.opened.snapshot() as reader:
                    found = clones.find(reader, path.encode())
                    return {
                        entry.decode().removesuffix("/"): reader.inode(dentry.inode)
                        for entry, dentry in tree.scan_dentries(reader, found.number)
                    }

            listed = filling.patiently(self.opened, look)
            assert listed.keys() == node.children.keys(), path
            for name, child in node.children.items():
                inode = listed[name]
                if isinstance(child, Directory):
                    assert inode.kind == Kind.DIRECTORY
                    assert inode.entries == len(child.children)
                    continue
                bucket, _, key = f"{path}/{name}".partition("/")
                assert get(self.opened, key, bucket=bucket) == child.data, (path, name)
                assert (inode.mode, inode.nlink) == (child.mode, names[id(child)]), (path, name)
        for bucket in self.root.children:
            prefix = f"{bucket}/"
            wanted = sorted(
                f"{path}/{name}"[len(prefix) :] for path, _, name, _ in self.files() if f"{path}/".startswith(prefix)
            )

            def keys(bucket: str = bucket) -> list[str]:
                with self.opened.snapshot() as reader:
                    page = listing.list_page(reader, buckets.get(reader, bucket), limit=10_000)
                return [key.decode() for key, *_ in page.objects if not key.endswith(b"/")]

            assert filling.patiently(self.opened, keys) == wanted


def play(world: World, steps: int) -> None:
    chance = world.chance
    for number in range(steps):
        world.step()
        if number % 25 == 24 and chance.random() < 0.5:
            world.check()
        if chance.random() < 0.02:
            world.opened.close()
            world.opened = Volume(world.opened.root, "test")
    world.check()
    settle(world.opened)
    world.check()
    for path, _, name, _ in world.files():
        bucket, _, key = f"{path}/{name}".partition("/")
        delete(world.opened, key, bucket=bucket)
    housekeeping.run_once(world.opened)
    assert allocated(world.opened) == 0
    settle(world.opened)


@pytest.mark.longer
@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("seed", range(longer(6, 60)))
def test_clones_are_what_was_cloned_whatever_happens_meanwhile(tmp_path: Path, seed: int) -> None:
    make_volume(tmp_path / "volume")
    world = World(Volume(tmp_path / "volume", "test"), random.Random(seed))
    try:
        play(world, longer(120, 600))
    finally:
        world.opened.close()
