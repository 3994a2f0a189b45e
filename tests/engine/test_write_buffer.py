"""Random writes, truncations, reads and commits of one file against a bytearray: what fsx does, without a kernel."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stratum import buckets, content, fsck, housekeeping, stored_extents, write_buffer
from stratum.content import INLINE_BYTES_MAX
from stratum.errors import NoSpace
from stratum.files import Caller, make
from stratum.volume import Volume
from stratum.write_buffer import WriteBuffer, truncate_now
from tests.support import BUCKET, get, make_volume

if TYPE_CHECKING:
    from stratum.schema import Inode

SPAN = 60_000
offsets = st.one_of(
    st.integers(0, SPAN), st.sampled_from([0, 4096, INLINE_BYTES_MAX - 1, INLINE_BYTES_MAX, INLINE_BYTES_MAX + 1])
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), offsets, st.integers(1, 9000)),
        st.tuples(st.just("truncate"), offsets, st.just(0)),
        st.tuples(st.just("read"), offsets, st.integers(1, SPAN)),
        st.tuples(
            st.sampled_from(["commit", "spill", "reopen", "truncate_now", "reclaim", "move"]), offsets, st.just(0)
        ),
    ),
    max_size=30,
)


def new_file(volume: Volume) -> Inode:
    with volume.snapshot() as reader:
        root = buckets.get(reader, BUCKET).inode
    return volume.mutate(lambda tx: make(tx, root, b"file", 0o100644, Caller(0, 0)))


def show(volume: Volume, buffer: WriteBuffer, start: int, stop: int) -> bytes:
    """What the mount's read handler answers."""
    with volume.reading():
        with volume.snapshot() as reader:
            inode = reader.inode(buffer.number)
            end = buffer.size if buffer.dirty else inode.size
            stop = min(stop, end)
            if stop <= start:
                return b""
            first, committed = start, max(start, min(stop, inode.size))
            if buffer.dirty:
                first, committed = buffer.not_covered(start, committed)
            plan = content.plan_read(reader, inode, first, committed)
        base = bytearray(first - start)
        base += b"".join(content.read_planned(volume, plan, first, committed))
    base += bytes(stop - start - len(base))
    if buffer.dirty:
        buffer.overlay(start, base)
    return bytes(base)


@settings(max_examples=60, deadline=None)
@given(history=steps, merged_bytes_max=st.sampled_from([3000, 65536]))
def test_a_file_is_a_bytearray(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple[str, int, int]], merged_bytes_max: int
) -> None:
    root = tmp_path_factory.mktemp("v") / "volume"
    make_volume(root)
    with patch.object(write_buffer, "MERGED_BYTES_MAX", merged_bytes_max), Volume(root, "test") as volume:
        inode = new_file(volume)
        buffer, model, fill = WriteBuffer(volume, inode), bytearray(), 1
        for step, offset, length in history:
            if step == "write":
                fill = fill % 255 + 1
                model.extend(bytes(max(0, offset + length - len(model))))
                model[offset : offset + length] = bytes((fill,)) * length
                buffer.write(offset, bytes((fill,)) * length, fill)
            elif step == "truncate":
                del model[offset:]
                model.extend(bytes(offset - len(model)))
                buffer.truncate(offset, 1)
            elif step == "read":
                assert show(volume, buffer, offset, offset + length) == bytes(model[offset : offset + length])
            elif step == "spill":
                buffer.spill()
            elif step == "reclaim":
                housekeeping.run_once(volume)
            elif step == "move":
                with volume.snapshot() as reader:
                    stored = stored_extents.numbers(reader)
                stored_extents.move(volume, stored)
            else:
                buffer.commit()
                assert get(volume, "file") == bytes(model)
                if step == "truncate_now":
                    del model[offset:]
                    model.extend(bytes(offset - len(model)))
                    buffer = WriteBuffer(volume, volume.mutate(partial(truncate_now, number=inode.number, size=offset)))
                if step == "reopen":
                    with volume.snapshot() as reader:
                        buffer = WriteBuffer(volume, reader.inode(inode.number))
        assert show(volume, buffer, 0, len(model) + 10) == bytes(model)
        buffer.commit()
        assert get(volume, "file") == bytes(model)
        assert fsck.check(volume) == []
        housekeeping.run_once(volume)
        assert get(volume, "file") == bytes(model)
        assert fsck.check(volume) == []


def test_a_failed_commit_loses_nothing(opened: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = WriteBuffer(opened, new_file(opened))
    buffer.write(0, b"a" * 100_000, 1)
    buffer.spill()
    buffer.write(100_000, b"b" * 100_000, 1)
    monkeypatch.setattr(opened, "free_bytes", lambda: 0)
    opened._space_checked_s = 0.0
    with pytest.raises(NoSpace):
        buffer.commit()
    assert get(opened, "file") == b""
    monkeypatch.undo()
    opened._space_checked_s = 0.0
    buffer.commit()
    assert get(opened, "file") == b"a" * 100_000 + b"b" * 100_000
    assert fsck.check(opened) == []


def test_a_petabyte_of_nothing_costs_nothing(opened: Volume) -> None:
    inode = new_file(opened)
    buffer = WriteBuffer(opened, inode)
    buffer.write(0, b"head", 1)
    buffer.truncate(1 << 50, 1)
    buffer.commit()
    with opened.snapshot() as reader:
        assert reader.inode(inode.number).size == 1 << 50
    assert show(opened, buffer, (1 << 50) - 4, 1 << 50) == b"\0\0\0\0"
    opened.mutate(lambda tx: truncate_now(tx, inode.number, 2))
    assert get(opened, "file") == b"he"
    assert fsck.check(opened) == []
