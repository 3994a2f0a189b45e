"""What a mount remembers: lookup counts, handles, unwritten changes. All of it belongs to the trio thread.

Invariants
* An inode is *used* while a handle is open on it or the kernel knows its number; a used inode that loses its last name is
  held by an O row of this session, for a while even if nobody has it open: an open(2) may be on its way to it.
* A file that was created and not committed yet is *pending*: it has a handle, a number and an entry in `pending`, and no row. It
  is committed by its first flush, fsync or release, and before anything that must see or change its name.
* A buffer exists only while a file is open or dirty, and is changed only under its file's lock.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import trio

from stratum.write_buffer import WriteBuffer

if TYPE_CHECKING:
    from stratum.read_ahead import Follower
    from stratum.schema import Inode
    from stratum.volume import Volume

POSITIONS_MAX = 4096
USES_LISTING, DIRECTORY, CHANGES_NOTHING = 1 << 62, 1 << 61, 1 << 60
"""Bits of a handle that `negotiate.c` looks for: the first two of a directory's, the last of a file's."""


@dataclass(slots=True)
class Pending:
    """A created file whose row is still to come. `lost`: its name was taken or its directory removed before it came."""

    parent: int
    name: bytes
    inode: Inode
    created_ns: int
    lost: bool = False


class FileLock:
    """A lock that a handler takes without a turn of the scheduler if it is free, as it nearly always is."""

    __slots__ = ("_held", "_waiting")

    def __init__(self) -> None:
        self._held = False
        self._waiting: list[trio.Event] = []

    async def __aenter__(self) -> None:
        while self._held:
            event = trio.Event()
            self._waiting.append(event)
            await event.wait()
        self._held = True

    async def __aexit__(self, *_: object) -> None:
        self._held = False
        woken, self._waiting = self._waiting, []
        for event in woken:  # all of them: one that was cancelled meanwhile would keep the others asleep
            event.set()


class FileState:
    """One inode in use."""

    __slots__ = (
        "buffer", "dirty_since", "failure", "handles", "linkable", "lock", "nameless", "number", "pending", "refused_at",
        "writers",
    )  # fmt: skip

    def __init__(self, number: int) -> None:
        self.number = number
        self.handles = 0
        self.writers = 0
        """How many of the handles may write: only through one of those can a mapping have been stored to."""
        self.buffer: WriteBuffer | None = None
        self.dirty_since = 0.0
        self.failure = ""
        """Why the last try in the background failed: it is tried four times a second, and told once."""
        self.lock = FileLock()
        self.nameless = False
        self.linkable = False
        """Made without a name (O_TMPFILE) and without one still: it may get one."""
        self.pending: Pending | None = None
        self.refused_at = -math.inf
        """When a read last waited in vain for a remote."""

    @property
    def uncommitted(self) -> bool:
        """Whether there is something to commit."""
        if self.pending is not None:
            return not self.pending.lost
        return self.dirty

    @property
    def dirty(self) -> bool:
        return self.buffer is not None and self.buffer.dirty


@dataclass(slots=True)
class FileHandle:
    state: FileState
    writable: bool
    has_read: bool = False
    follower: Follower | None = None


@dataclass(slots=True)
class DirectoryHandle:
    """`positions` maps a cookie to the entry it stands behind, for the cookies a kernel can come back to."""

    number: int
    mtime_ns: int
    positions: dict[int, bytes] = field(default_factory=dict)

    def remember(self, cookie: int, entry: bytes) -> None:
        if len(self.positions) >= POSITIONS_MAX:
            del self.positions[next(iter(self.positions))]
        self.positions[cookie] = entry


class OpenFiles:
    def __init__(self) -> None:
        self.files: dict[int, FileState] = {}
        self.handles: dict[int, FileHandle] = {}
        self.directories: dict[int, DirectoryHandle] = {}
        self.lookups: dict[int, int] = {}
        self.pending: dict[tuple[int, bytes], FileState] = {}
        self.tells_closes = False
        """Whether each close is to be told, since it may end locks."""
        self._numbers = itertools.count(1)

    def state(self, number: int) -> FileState | None:
        return self.files.get(number)

    def is_open(self, number: int) -> bool:
        state = self.files.get(number)
        return state is not None and state.handles > 0

    def is_used(self, number: int) -> bool:
        """Whether the kernel may still ask for an inode. Called by the committer's thread too: dictionary reads only."""
        return number in self.lookups or self.is_open(number)

    def open(self, number: int, *, writable: bool, truncated: bool = False) -> int:
        """A handle. Closing one that can change nothing and changed nothing tells us nothing: the kernel need not ask for a flush."""
        state = self.files.get(number)
        if state is None:
            state = self.files[number] = FileState(number)
        state.handles += 1
        state.writers += writable
        handle = next(self._numbers) | (0 if writable or truncated or self.tells_closes else CHANGES_NOTHING)
        self.handles[handle] = FileHandle(state, writable)
        return handle

    def create(self, parent: int, name: bytes, inode: Inode) -> int:
        """A handle of a file that is not committed yet."""
        handle = self.open(inode.number, writable=True)
        state = self.handles[handle].state
        state.pending = Pending(parent, name, inode, inode.ctime_ns)
        state.dirty_since = trio.current_time()
        self.pending[parent, name] = state
        return handle

    def create_nameless(self, number: int, *, writable: bool) -> int:
        """A handle of a file that was made without a name."""
        handle = self.open(number, writable=writable, truncated=True)
        state = self.handles[handle].state
        state.nameless = state.linkable = True
        return handle

    def linked(self, number: int) -> None:
        """A file that was made without a name has one."""
        state = self.files.get(number)
        if state is not None:
            state.nameless = state.linkable = False

    def close(self, handle: int) -> FileHandle:
        """The handle; that its file has one less is still to be counted, when what was written is committed."""
        opened = self.handles.pop(handle)
        opened.state.writers -= opened.writable
        return opened

    def committed(self, state: FileState) -> None:
        """A pending file has its row now."""
        assert state.pending is not None, "only a pending file is committed once"
        self.pending.pop((state.pending.parent, state.pending.name), None)
        state.pending = None

    def lose(self, state: FileState) -> None:
        """A pending file will never have a row: who has it open goes on with it until it is closed."""
        assert state.pending is not None, "only a pending file is lost"
        self.pending.pop((state.pending.parent, state.pending.name), None)
        state.pending.lost = True
        state.pending.inode.nlink = 0
        state.nameless = True

    def children(self, directory: int) -> list[FileState]:
        """The pending files of a directory."""
        return [state for (parent, _), state in self.pending.items() if parent == directory]

    def buffer(self, volume: Volume, state: FileState, inode: Inode) -> WriteBuffer:
        if state.buffer is None:
            state.buffer = WriteBuffer(volume, inode)
        return state.buffer

    def open_directory(self, number: int, mtime_ns: int, *, cached: bool) -> int:
        """`cached`: the kernel may keep the listing; it asks for the directory's mtime before it uses what it kept.

        Not while somebody has the directory open as it was before: the kernel would list it anew, look in that for where the other
        one was, and end his listing if that entry is gone.
        """
        others = (other for other in self.directories.values() if other.number == number)
        uses = cached and all(other.mtime_ns == mtime_ns for other in others)
        handle = next(self._numbers) | DIRECTORY | (USES_LISTING if uses else 0)
        self.directories[handle] = DirectoryHandle(number, mtime_ns)
        return handle

    def drop(self, state: FileState) -> None:
        """Forget a file that nobody has open and that has nothing unwritten."""
        if state.handles == 0 and not state.uncommitted:
            self.files.pop(state.number, None)

    def looked_up(self, number: int) -> None:
        self.lookups[number] = self.lookups.get(number, 0) + 1

    def forget(self, number: int, count: int) -> None:
        left = self.lookups.get(number, 0) - count
        if left > 0:
            self.lookups[number] = left
        else:
            self.lookups.pop(number, None)

    def uncommitted(self) -> bool:
        """Whether there are bytes that only this process has: some that can be committed, or those of a lost file."""
        return any(state.uncommitted or state.pending is not None for state in self.files.values())

    def told(self) -> dict[str, Any]:
        """What a kernel counts on, for another program to take over; nothing may be uncommitted."""
        assert not self.uncommitted(), "what only this process has cannot be told"
        return {
            "lookups": list(self.lookups.items()),
            "handles": [
                (handle, opened.state.number, opened.writable, opened.state.nameless)
                for handle, opened in self.handles.items()
            ],
            "linkable": [state.number for state in self.files.values() if state.linkable],
            "directories": [
                (
                    handle,
                    opened.number,
                    opened.mtime_ns,
                    [(cookie, entry.hex()) for cookie, entry in opened.positions.items()],
                )
                for handle, opened in self.directories.items()
            ],
            "next": next(self._numbers),
        }

    def take_over(self, told: dict[str, Any]) -> None:
        """Go on from what another program has told."""
        self.lookups.update((number, count) for number, count in told["lookups"])
        for handle, number, writable, nameless in told["handles"]:
            state = self.files.setdefault(number, FileState(number))
            state.handles += 1
            state.writers += writable
            state.nameless = nameless
            self.handles[handle] = FileHandle(state, writable)
        for number in told.get("linkable", ()):  # the program before this one may not have known of it
            self.files[number].linkable = True
        for handle, number, mtime_ns, positions in told["directories"]:
            opened = self.directories[handle] = DirectoryHandle(number, mtime_ns)
            opened.positions.update((cookie, bytes.fromhex(entry)) for cookie, entry in positions)
        self._numbers = itertools.count(told["next"])

    def dirty_bytes(self) -> int:
        return sum(state.buffer.memory_bytes for state in self.files.values() if state.buffer is not None)
