"""Whether files say under which names they are found: by these a pack tells of them, and so a rebuild finds them again."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from stratum import names, tree
from stratum.schema import Inode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stratum.transaction import InodeReader


def wrong_rows(reader: InodeReader, inodes: Mapping[int, Inode], links: Mapping[int, int]) -> set[int]:
    """Inodes whose rows in table i are not their names; `links` are the names that were found of each."""
    wrong: set[int] = set()
    rows: Counter[int] = Counter()
    for number, (directory, entry) in names.scan(reader):
        inode = inodes.get(number)
        is_found = _holder(reader, inodes, directory, entry) == number
        rows[number] += is_found
        if not is_found or inode is None or not inode.flags & Inode.SEVERAL_NAMES:
            wrong.add(number)
    wrong.update(
        number
        for number, inode in inodes.items()
        if inode.flags & Inode.SEVERAL_NAMES and rows[number] != links[number]
    )
    return wrong


def _holder(reader: InodeReader, inodes: Mapping[int, Inode], directory: int, entry: bytes) -> int:
    """Which inode has a name; 0 for none."""
    if entry:
        dentry = tree.get_dentry(reader, directory, entry)
        return dentry.inode if dentry is not None else 0
    owner = inodes.get(directory)
    return owner.object_inode if owner is not None else 0


def names_of(
    reader: InodeReader, inodes: Mapping[int, Inode], directories: set[int], wanted: set[int]
) -> dict[int, list[names.Name]]:
    """The names of inodes as directories have them; all directories are read if any is wanted."""
    known: dict[int, list[names.Name]] = {number: [] for number in wanted}
    for directory in directories if wanted else ():
        for entry, dentry in tree.scan_dentries(reader, directory):
            if dentry.inode in known:
                known[dentry.inode].append((directory, entry))
        if inodes[directory].object_inode in known:
            known[inodes[directory].object_inode].append((directory, b""))
    return known
