"""A filesystem that forgets what was not fsynced: the disk of the power-cut test.

It keeps two states of everything: `current`, which programs see, and `durable`, what fsync made safe, with the changes
between them in a list. `cut` writes to a real folder what a disk could hold at that instant: the durable state and, of
the changes since, any subset in pages of 4 KiB, in any order. It is strict: fsync of a file does not save its name;
only fsync of the folder does. Writes through a descriptor opened with O_DSYNC are durable at once.

    python -m tests.appliance.forgetful MOUNTPOINT      commands on standard input: "cut SEED FOLDER"
"""

from __future__ import annotations

import errno
import os
import random
import stat
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyfuse3
import trio

PAGE_BYTES = 4096


@dataclass
class Node:
    number: int
    mode: int
    current: bytearray = field(default_factory=bytearray)
    durable: bytearray = field(default_factory=bytearray)
    changes: list[tuple[str, int, bytes]] = field(default_factory=list)
    names: dict[bytes, int] = field(default_factory=dict)
    durable_names: dict[bytes, int] = field(default_factory=dict)
    name_changes: list[tuple[bytes, int]] = field(default_factory=list)

    @property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(self.mode)


def apply(target: bytearray, change: tuple[str, int, bytes]) -> None:
    kind, offset, data = change
    if kind == "truncate":
        del target[offset:]
        target.extend(bytes(offset - len(target)))
    else:
        target.extend(bytes(max(0, offset + len(data) - len(target))))
        target[offset : offset + len(data)] = data


class Forgetful(pyfuse3.Operations):
    def __init__(self) -> None:
        super().__init__()
        self.nodes = {1: Node(1, stat.S_IFDIR | 0o755)}
        self.handles: dict[int, tuple[int, bool]] = {}
        self.last = 1

    def _new(self, mode: int) -> Node:
        self.last += 1
        node = self.nodes[self.last] = Node(self.last, mode)
        return node

    def _attributes(self, node: Node) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = node.number
        entry.st_mode = node.mode
        entry.st_nlink = 1
        entry.st_size = len(node.current)
        entry.st_blocks = len(node.current) // 512
        entry.attr_timeout = entry.entry_timeout = 300
        return entry

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        number = self.nodes[parent_inode].names.get(name)
        if number is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._attributes(self.nodes[number])

    async def getattr(self, inode: int, ctx: Any) -> pyfuse3.EntryAttributes:
        return self._attributes(self.nodes[inode])

    async def setattr(self, inode: int, attr: Any, fields: Any, fh: Any, ctx: Any) -> pyfuse3.EntryAttributes:
        node = self.nodes[inode]
        if fields.update_size:
            self._change(node, ("truncate", attr.st_size, b""), durable=False)
        if fields.update_mode:
            node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(attr.st_mode)
        return self._attributes(node)

    def _change(self, node: Node, change: tuple[str, int, bytes], *, durable: bool) -> None:
        apply(node.current, change)
        if durable:
            apply(node.durable, change)
        else:
            node.changes.append(change)

    def _name(self, parent: Node, name: bytes, number: int) -> None:
        if number:
            parent.names[name] = number
        else:
            parent.names.pop(name, None)
        parent.name_changes.append((name, number))

    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: Any) -> pyfuse3.EntryAttributes:
        node = self._new(stat.S_IFDIR | mode & 0o7777)
        self._name(self.nodes[parent_inode], name, node.number)
        return self._attributes(node)

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: Any
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        node = self._new(stat.S_IFREG | mode & 0o7777)
        self._name(self.nodes[parent_inode], name, node.number)
        return self._open(node.number, flags), self._attributes(node)

    async def unlink(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        self._name(self.nodes[parent_inode], name, 0)

    async def rmdir(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        if self.nodes[self.nodes[parent_inode].names[name]].names:
            raise pyfuse3.FUSEError(errno.ENOTEMPTY)
        self._name(self.nodes[parent_inode], name, 0)

    def _open(self, number: int, flags: int) -> pyfuse3.FileInfo:
        handle = len(self.handles) + 1
        self.handles[handle] = (number, bool(flags & os.O_DSYNC))
        return pyfuse3.FileInfo(fh=handle, keep_cache=True)

    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        if flags & os.O_TRUNC:
            self._change(self.nodes[inode], ("truncate", 0, b""), durable=False)
        return self._open(inode, flags)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        return bytes(self.nodes[self.handles[fh][0]].current[off : off + size])

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        number, durable = self.handles[fh]
        node = self.nodes[number]
        for at in range(0, len(buf), PAGE_BYTES):
            self._change(node, ("write", off + at, buf[at : at + PAGE_BYTES]), durable=durable)
        return len(buf)

    async def fsync(self, fh: int, datasync: bool) -> None:
        node = self.nodes[self.handles[fh][0]]
        for change in node.changes:
            apply(node.durable, change)
        node.changes.clear()

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        node = self.nodes[fh]
        node.durable_names = dict(node.names)
        node.name_changes.clear()

    async def opendir(self, inode: int, ctx: Any) -> int:
        return inode

    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        for at, (name, number) in enumerate(list(self.nodes[fh].names.items())):
            if at >= start_id and not pyfuse3.readdir_reply(token, name, self._attributes(self.nodes[number]), at + 1):
                return

    async def statfs(self, ctx: Any) -> pyfuse3.StatvfsData:
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_blocks = data.f_bfree = data.f_bavail = 1 << 28
        data.f_files = data.f_ffree = data.f_favail = 1 << 20
        data.f_namemax = 255
        return data

    async def access(self, inode: int, mode: int, ctx: Any) -> bool:
        return True

    def cut(self, seed: int, target: Path) -> None:
        """What the disk could hold now. One task, no await: an instant."""
        dice = random.Random(seed)
        survive = dice.choice([0.0, 0.0, 0.5, 0.9])
        self._write_out(self.nodes[1], target, dice, survive)

    def _write_out(self, node: Node, target: Path, dice: random.Random, survive: float) -> None:
        if not node.is_folder:
            data = bytearray(node.durable)
            for change in node.changes:
                if dice.random() < survive:
                    apply(data, change)
            # Sparse, as the volume's own files are.
            with target.open("wb") as file:
                for at in range(0, len(data), 1 << 16):
                    piece = data[at : at + (1 << 16)]
                    if any(piece):
                        file.seek(at)
                        file.write(piece)
                file.truncate(len(data))
            target.chmod(stat.S_IMODE(node.mode))
            return
        target.mkdir()
        names = dict(node.durable_names)
        for name, number in node.name_changes:
            if dice.random() < survive:
                if number:
                    names[name] = number
                else:
                    names.pop(name, None)
        for name, number in names.items():
            self._write_out(self.nodes[number], target / os.fsdecode(name), dice, survive)


async def _main(operations: Forgetful) -> None:
    token = trio.lowlevel.current_trio_token()

    def commands() -> None:
        for line in sys.stdin:
            _, seed, folder = line.split()
            trio.from_thread.run_sync(operations.cut, int(seed), Path(folder), trio_token=token)
            print("cut", flush=True)
        trio.from_thread.run_sync(pyfuse3.terminate, trio_token=token)

    threading.Thread(target=commands, daemon=True).start()
    print("mounted", flush=True)
    await pyfuse3.main(min_tasks=1, max_tasks=200)


def main() -> None:
    operations = Forgetful()
    options = {*pyfuse3.default_options, "fsname=forgetful", "allow_other"} - {"default_permissions"}
    pyfuse3.init(operations, sys.argv[1], options)
    try:
        trio.run(_main, operations)
    finally:
        pyfuse3.close(unmount=True)
        time.sleep(0)


if __name__ == "__main__":
    main()
