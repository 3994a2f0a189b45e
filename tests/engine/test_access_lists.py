"""Access control lists without a kernel."""

from __future__ import annotations

import struct

import pytest

from stratum import access_lists
from stratum.access_lists import DEFAULT, GROUP, MASK, OTHERS, OWNER, OWNING_GROUP, USER, Entry
from stratum.errors import InvalidArgument, NoSuchAttribute
from stratum.kv.memory_store import MemoryStore
from stratum.schema import Inode, Kind, key_u64
from stratum.transaction import InodeReader

NOBODY = 0xFFFFFFFF
LIST = [
    Entry(OWNER, 7, NOBODY),
    Entry(USER, 6, 1001),
    Entry(OWNING_GROUP, 4, NOBODY),
    Entry(GROUP, 5, 2002),
    Entry(MASK, 5, NOBODY),
    Entry(OTHERS, 1, NOBODY),
]


@pytest.mark.parametrize(
    "entries",
    [
        LIST[:-1],  # no others
        LIST[1:],  # no owner
        [entry for entry in LIST if entry.tag != MASK],  # named ones need a mask
        [*LIST, LIST[-1]],  # others twice
        [LIST[1], LIST[0], *LIST[2:]],  # out of order
        [Entry(OWNER, 8, NOBODY), *LIST[1:]],  # no such permission
        [*LIST[:-1], Entry(64, 1, NOBODY)],  # no such class
    ],
)
def test_what_is_no_list_is_refused(entries: list[Entry]) -> None:
    with pytest.raises(InvalidArgument):
        access_lists.unpack(access_lists.pack(entries))


@pytest.mark.parametrize("raw", [b"", b"\x02\0\0", struct.pack("<I", 1), struct.pack("<I", 2) + b"\1\0\0"])
def test_bytes_that_are_no_list_are_refused(raw: bytes) -> None:
    with pytest.raises(InvalidArgument):
        access_lists.unpack(raw)


def test_a_list_is_stored_as_the_kernel_wrote_it() -> None:
    raw = access_lists.pack(LIST)
    assert access_lists.pack(access_lists.unpack(raw)) == raw


def test_permission_is_found_as_acl_5_says() -> None:
    inode = Inode(7, Kind.FILE, mode=0o751, uid=1000, gid=1000, now_ns=0, bucket=1)
    inode.flags |= Inode.ACCESS_LIST
    store = MemoryStore()
    with store.transact() as tx:
        tx.put(key_u64(b"Y", 7) + access_lists.ACCESS, access_lists.pack(LIST))
    with store.snapshot() as snapshot:
        reader = InodeReader(snapshot)

        def allowed(uid: int, *gids: int) -> int:
            return sum(bit for bit in (4, 2, 1) if access_lists.permits(reader, inode, uid, gids, bit))

        assert allowed(0) == 7
        assert allowed(1000) == 7  # the owner
        assert allowed(1001, 2002) == 4  # named: rw- within the mask r-x; its groups no longer count
        assert allowed(5, 1000) == 4  # the owning group
        assert allowed(5, 2002) == 5
        assert allowed(5, 1000, 2002) == 5
        assert allowed(5) == 1
        with pytest.raises(NoSuchAttribute):
            access_lists.get(reader, inode, DEFAULT)
