"""The disks of the warm tier: their rows, the markers on them, and where shards lie on them.

A disk is used only while its marker says that it is the disk of this volume that its row means: an empty directory where a disk was not mounted is a
missing disk.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from stratum import private
from stratum.errors import InvalidArgument
from stratum.schema import key_u64, prefix_range, unpack_u64
from stratum.segments import fsync_folder
from stratum.tier_rows import DiskRow

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stratum.transaction import InodeReader, MetadataTransaction

MARKER = "stratum-disk.json"


def disks(reader: InodeReader) -> dict[int, DiskRow]:
    return {unpack_u64(key[1:])[0]: DiskRow.decode(raw) for key, raw in reader.scan(*prefix_range(b"d"))}


def find_disk(reader: InodeReader, path: Path) -> int:
    """The disk in use at a path. Raises `InvalidArgument`."""
    for number, row in disks(reader).items():
        if Path(row.path) == path and row.state != "replaced":
            return number
    raise InvalidArgument(f"{path} is no disk of the warm tier; `stratum disk list` shows them")


def same_devices(paths: Iterable[Path]) -> list[tuple[Path, Path]]:
    """Pairs of folders that lie on one device, where one failure takes both."""
    seen: dict[int, Path] = {}
    pairs = []
    for path in paths:
        try:
            device = path.stat().st_dev
        except OSError:
            continue
        if device in seen:
            pairs.append((seen[device], path))
        else:
            seen[device] = path
    return pairs


def prepare_folder(path: Path, instance: str, disk: int, *, create: bool = False) -> None:
    """Make an empty folder a disk of this volume. Raises `InvalidArgument` if it holds anything, or is not there and not to be made."""
    private.require_folder(path, "a disk of the warm tier", create=create)
    _check_empty(path)
    write_marker(path, instance, disk)


def _check_empty(path: Path) -> None:
    if any(name.name != "lost+found" for name in path.iterdir()):
        raise InvalidArgument(f"{path} is not empty; a disk of the warm tier begins empty")


def write_marker(path: Path, instance: str, disk: int) -> None:
    """From now on the folder is this disk and no other. Raises `OSError`."""
    temporary = path / (MARKER + ".new")
    private.write(temporary, json.dumps({"volume": instance, "disk": disk}).encode())
    temporary.rename(path / MARKER)
    fsync_folder(path)


def disk_of(path: Path, instance: str) -> int:
    """The number of the disk of a volume that a folder is; 0 if it is empty or not there. Raises `InvalidArgument` if it holds anything else."""
    try:
        marker = json.loads((path / MARKER).read_bytes())
    except FileNotFoundError:
        if path.is_dir():
            _check_empty(path)
        return 0
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be a disk of the warm tier: {error.strerror}") from error
    except ValueError:
        marker = {}
    if marker.get("volume") != instance:
        raise InvalidArgument(f"{path} is a disk of another volume")
    return int(marker["disk"])


def set_disk(tx: MetadataTransaction, number: int, row: DiskRow) -> None:
    tx.put(key_u64(b"d", number), row.encode())


def shard_name(number: int, index: int) -> str:
    """Below the folder of a disk."""
    counter = number & 0xFFFFFFFF
    return f"packs/{number >> 32:08x}/{counter >> 12:05x}/{number:016x}.{index:02d}.shard"


_SHARD = re.compile(r"([0-9a-f]{16})\.([0-9]{2})\.shard(\..*\.new)?")


def parse_shard_name(name: str) -> tuple[int, int, bool] | None:
    """(pack, index, whether it is whole) of a file's name; None if it is not ours."""
    found = _SHARD.fullmatch(name)
    return (int(found[1], 16), int(found[2]), found[3] is None) if found is not None else None
