"""Which requests of the kernel the audit log has, and under which path.

The kernel names what it works on by number; the path is put together from the names under which it looked the numbers up. What it
looked up before the log was switched on, or under another name since, is told by number.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import trio

from stratum import inventory

if TYPE_CHECKING:
    from concurrent.futures import Future

    from stratum.volume import Volume

CHANGES = frozenset(
    (
        "create",
        "mknod",
        "mkdir",
        "symlink",
        "link",
        "unlink",
        "rmdir",
        "rename",
        "setattr",
        "setxattr",
        "removexattr",
        "tmpfile",
    )
)
NAMING = frozenset(("lookup", "create", "mknod", "mkdir", "symlink"))
"""Requests that teach the name of a number."""
DEPTH_MAX = 4096


class Names:
    """(directory, name) of numbers, as long as the kernel knows them. `root` is the number that is mounted, `prefix` its path."""

    def __init__(self, root: int, prefix: str) -> None:
        self._root = root
        self._prefix = prefix
        self._by_number: dict[int, tuple[int, bytes]] = {}
        self._by_name: dict[tuple[int, bytes], int] = {}

    def learn(self, parent: int, name: bytes, number: int) -> None:
        if name in {b".", b".."} or number == self._root:
            return
        self.forget(number)
        self._by_number[number] = (parent, name)
        self._by_name[parent, name] = number

    def knows(self, number: int) -> bool:
        return number in self._by_number

    def forget(self, number: int) -> None:
        place = self._by_number.pop(number, None)
        if place is not None and self._by_name.get(place) == number:
            del self._by_name[place]

    def moved(self, parent: int, name: bytes, new_parent: int, new_name: bytes) -> None:
        number = self._by_name.get((parent, name))
        if number is not None:
            self.learn(new_parent, new_name, number)

    def told(self) -> list[tuple[int, int, str]]:
        return [(number, parent, name.hex()) for number, (parent, name) in self._by_number.items()]

    def take_over(self, told: list[tuple[int, int, str]]) -> None:
        for number, parent, name in told:
            self.learn(parent, bytes.fromhex(name), number)

    def path(self, number: int, name: bytes | None = None) -> str:
        """Below the root of all buckets, without a slash before it."""
        parts = [] if name is None else [os.fsdecode(name)]
        for _ in range(DEPTH_MAX):
            if number == self._root:
                return "/".join([part for part in (self._prefix, *reversed(parts)) if part]) or "."
            place = self._by_number.get(number)
            if place is None:
                break
            number, above = place
            parts.append(os.fsdecode(above))
        return "/".join([f"?{number:#x}", *reversed(parts)])


class Auditor:
    """What the handlers of one mount tell the log. Made only if there is one."""

    def __init__(self, volume: Volume, root: int, bucket: str) -> None:
        assert volume.audit is not None
        self._volume = volume
        self._log = volume.audit
        self.names = Names(root, bucket)

    def wants(self, operation: str, told: dict[str, Any]) -> bool:
        """`told` are the handler's arguments by name. A file that is written to is told when it is opened for it."""
        if operation in CHANGES:
            return True
        if operation != "open":
            return False
        return told["flags"] & os.O_ACCMODE != os.O_RDONLY or self._reads_are_wanted(told["inode"])

    def _reads_are_wanted(self, number: int) -> bool:
        with self._volume.snapshot() as reader:
            if not reader.has_inode(number):
                return False
            row = inventory.row_of(reader, reader.inode(number).bucket)
            return row is not None and row.audit_reads

    def check(self) -> None:
        """Raises `AuditUnavailable`."""
        self._log.check()

    def event(self, operation: str, told: dict[str, Any]) -> dict[str, Any]:
        """As it is if it goes well."""
        ctx = told.get("ctx")
        found: dict[str, Any] = {
            "face": "mount", "who": f"uid {ctx.uid}" if ctx is not None else "-", "from": f"pid {ctx.pid}" if ctx is not None else "-",
            "operation": operation, "status": "ok",
        }  # fmt: skip
        names = self.names
        if operation == "rename":
            found["path"] = names.path(told["parent_inode_old"], told["name_old"])
            found["to"] = names.path(told["parent_inode_new"], told["name_new"])
        elif operation == "link":
            found["path"] = names.path(told["inode"])
            found["to"] = names.path(told["new_parent_inode"], told["new_name"])
        elif "parent_inode" in told:
            found["path"] = names.path(told["parent_inode"], told.get("name"))
        else:
            found["path"] = names.path(told["inode"])
        if operation in {"setxattr", "removexattr"}:
            found["attribute"] = os.fsdecode(told["name"])
        if operation == "setattr":
            fields = told["fields"]
            found["changes"] = [
                name for name in ("size", "mode", "uid", "gid", "atime", "mtime") if getattr(fields, f"update_{name}")
            ]
        if operation == "open":
            found["for"] = "read" if told["flags"] & os.O_ACCMODE == os.O_RDONLY else "write"
        return found

    def learn(self, operation: str, told: dict[str, Any], number: int) -> None:
        if operation in NAMING:
            self.names.learn(told["parent_inode"], told["name"], number)
        elif operation == "link" and not self.names.knows(number):
            self.names.learn(told["new_parent_inode"], told["new_name"], number)

    async def record(self, event: dict[str, Any]) -> None:
        """Until it is in the log. Raises `AuditUnavailable`."""
        done = self._log.record(event)
        written = trio.Event()
        token = trio.lowlevel.current_trio_token()

        def wake(_: Future[None]) -> None:
            token.run_sync_soon(written.set)

        done.add_done_callback(wake)
        with trio.CancelScope(shield=True):
            await written.wait()
        done.result()
