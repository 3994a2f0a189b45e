"""The load of the power-cut test: changes one volume from several threads and prints a line when each is acknowledged.

python -m tests.appliance.power_cut_load VOLUME SEED [FLAG...]

Each flag takes one guard away, and the test must notice: no-data-sync, no-journal-sync, no-checkpoint-sync, no-pin.
"""

from __future__ import annotations

import os
import random
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lmdb

from stratum import buckets, compaction, housekeeping, stored_extents, volume
from stratum.files import Caller, make
from stratum.kv import journal, lmdb_store
from stratum.kv.lmdb_store import LmdbStore
from stratum.volume import Volume
from stratum.write_buffer import WriteBuffer
from tests.support import BUCKET, delete, put

SIZES = (50, 4_000, 20_000, 300_000, 4_500_000)
KEYS = 8


PATCH_AT = 20_000


def patch(key: str, version: int) -> bytes:
    return random.Random(f"patch {key} {version}").randbytes(200)


def content(key: str, version: int) -> bytes:
    if key.startswith("g"):  # a large file of which each version changes two places
        whole = bytearray(random.Random(key).randbytes(40_000))
        whole[:40] = f"{key} {version} ".encode().ljust(40)
        whole[PATCH_AT : PATCH_AT + 200] = patch(key, version)
        return bytes(whole)
    dice = random.Random(f"{key} {version}")
    return f"{key} {version} ".encode().ljust(40) + dice.randbytes(dice.choice(SIZES))


def work(opened: Volume, thread: int, seed: int, say: Any) -> None:
    dice = random.Random(f"{seed} {thread}")
    version = 0
    files: dict[str, int] = {}
    while True:
        version += 1
        key = f"t{thread}-{dice.randrange(KEYS)}"
        if dice.random() < 0.1:
            say(f"try {key} -1")
            delete(opened, key)
            say(f"ack {key} -1")
        elif thread % 2:
            # What the mount does: make a file once, then overwrite its content and fsync.
            key = f"{'f' if thread == 1 else 'g'}{key}"
            say(f"try {key} {version}")
            if key not in files:
                with opened.snapshot() as reader:
                    root = buckets.get(reader, BUCKET).inode
                files[key] = opened.mutate(
                    partial(make, parent=root, name=key.encode(), mode=0o100644, caller=Caller(0, 0))
                ).number
            with opened.snapshot() as reader:
                buffer = WriteBuffer(opened, reader.inode(files[key]))
            if key.startswith("g") and buffer.size:
                buffer.write(0, f"{key} {version} ".encode().ljust(40), 1)
                buffer.write(PATCH_AT, patch(key, version), 1)
            else:
                buffer.truncate(0, 1)
                buffer.write(0, content(key, version), 1)
            buffer.commit()
            say(f"ack {key} {version}")
        else:
            say(f"try {key} {version}")
            put(opened, key, content(key, version))
            say(f"ack {key} {version}")


def take_guards_away(flags: list[str]) -> None:
    if "no-data-sync" in flags:
        real = os.fdatasync

        def only_metadata(fd: int) -> None:
            if "/meta/" in os.readlink(f"/proc/self/fd/{fd}"):
                real(fd)

        os.fdatasync = only_metadata  # type: ignore[assignment]
        os.fsync = only_metadata  # type: ignore[assignment]
    if "no-journal-sync" in flags:
        vars(journal)["os"] = SimpleNamespace(**{**vars(os), "fdatasync": lambda _: None})
    if "no-checkpoint-sync" in flags:
        opening: Any = lmdb.open

        def opened(*words: Any, **names: Any) -> Any:
            environment = opening(*words, **names)
            proxy = SimpleNamespace(
                **{name: getattr(environment, name) for name in ("begin", "info", "copy", "close", "reader_check")}
            )
            proxy.sync = lambda *_: None
            return proxy

        vars(lmdb)["open"] = opened
        os.fdatasync = not_the_store(os.fdatasync)
    if "no-pin" in flags:
        checkpoint = LmdbStore._checkpoint

        def without(store: LmdbStore, txn: lmdb.Transaction) -> None:
            checkpoint(store, txn)
            if store._pin is not None:
                store._pin.abort()

        vars_of: Any = LmdbStore
        vars_of._checkpoint = without


def not_the_store(real: Any) -> Any:
    return lambda fd: None if os.readlink(f"/proc/self/fd/{fd}").endswith("data.mdb") else real(fd)


def main() -> None:
    root, seed, flags = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    take_guards_away(flags)
    lmdb_store.JOURNAL_RECORDS_MAX = 40  # several checkpoints in each short life
    volume.RESERVE_BYTES = 65536
    housekeeping.INTERVAL_S = 0.05  # and files are put together all the time
    compaction.QUIET_S, compaction.FILE_BYTES_MIN, compaction.NOTED_EVERY, compaction.PIECES_MIN = 0.0, 1, 1, 2
    stored_extents.AGE_S_MIN = 0.1  # small changes of large files move to data files while the power goes
    lock = threading.Lock()

    def say(line: str) -> None:
        with lock:
            print(line, flush=True)

    with Volume(root, "load") as opened:
        housekeeping.Housekeeper(opened)
        threads = [threading.Thread(target=work, args=(opened, number, seed, say), daemon=True) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
