"""`python -m stratum.kv.as_it_stands FOLDER`: read every row of a metadata store that nobody has open, and print what it says of itself.

A program of its own because LMDB may end the process that reads a damaged page. Whoever starts it holds the gate: it takes no lock.
"""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path

import lmdb

from stratum.kv.journal import Journal, newest_mark, rows_of
from stratum.kv.lmdb_access import TAIL, TAIL_VALUE


def _agrees(folder: Path, txn: lmdb.Transaction) -> bool:
    """Whether the store has what the whole records behind the journal's first damaged one left."""
    mark = newest_mark((folder / "checkpoint").read_bytes())
    if mark is None:
        return False
    with closing(Journal(folder / "journal")) as journal:
        newest, end = mark.transaction, 0
        for transaction, following, _ in journal.records(mark):
            newest, end = transaction, following
        wanted: dict[bytes, bytes | None] = {}
        for _, _, body in journal.whole_from(mark, end, newest):
            wanted.update(rows_of(body))
    return all(txn.get(key) == value for key, value in wanted.items())


def main() -> int:
    folder = Path(sys.argv[1])
    with lmdb.open(str(folder), readonly=True, lock=False, create=False, readahead=True) as environment:
        with environment.begin() as txn:
            rows = sum(len(value) >= 0 for _, value in txn.cursor())
            if rows != txn.stat()["entries"]:
                return 1
            raw = txn.get(TAIL)
            epoch, end, records = TAIL_VALUE.unpack(raw) if raw is not None else (0, 0, 0)
            told = {"rows": rows, "epoch": epoch, "end": end, "records": records, "transaction": txn.id()}
            print(json.dumps({**told, "agrees": _agrees(folder, txn)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
