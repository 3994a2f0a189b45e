"""The places a volume uses, by role, and whether two of them overlap. No place may play two roles.

Two paths are compared as the kernel sees them: symbolic links are followed, and a path is taken for the path in its file system, so a
bind mount of a folder is that folder. A path that is not there yet counts as below its nearest ancestor that is.
Nothing here asks a mount of ours anything: a daemon that hangs hangs nobody who compares paths.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from stratum import mount_table
from stratum.errors import InvalidArgument
from stratum.mount_rows import mount_rows

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from stratum.config import Config
    from stratum.mount_table import Mount
    from stratum.transaction import InodeReader
    from stratum.volume import Volume


class Role(StrEnum):
    """What a place is to the volume; the text stands in messages."""

    VOLUME = "the volume"
    META = "the volume's metadata folder"
    HOT = "a hot folder"
    WARM = "a disk of the warm tier"
    COLD = "a remote's directory"
    AUDIT = "the audit log's folder"
    MOUNT = "the volume's mountpoint"


BYTES = frozenset((Role.META, Role.HOT, Role.WARM, Role.COLD, Role.AUDIT))
"""The roles of folders that hold something of the volume. VOLUME itself holds the usual ones of them."""
LINKS_MAX = 40
"""As the kernel follows in one path (path_resolution(7))."""


@dataclass(slots=True, frozen=True)
class Place:
    role: Role
    path: Path
    name: str = ""
    """Of a remote."""

    def __str__(self) -> str:
        return f"{self.role} {self.name + ' at ' if self.name else ''}{self.path}"


@dataclass(slots=True, frozen=True)
class Location:
    """Where a path leads: `parts` in the file system `device`; `mount` is what it is reached through."""

    device: str
    parts: tuple[str, ...]
    real: Path
    mount: Mount | None


def real(path: Path) -> Path:
    """Symbolic links followed by readlink(2) alone: lstat(2) of a mountpoint would ask the mount's daemon."""
    rest = _parts(str(path.absolute()))[::-1]
    reached = "/"
    followed = 0
    while rest:
        name, rest = rest[-1], rest[:-1]
        if name in {".", ".."}:
            reached = os.path.dirname(reached) if name == ".." else reached  # noqa: PTH120  text, not a place yet
            continue
        candidate = f"{reached.rstrip('/')}/{name}"
        try:
            target = os.readlink(candidate) if followed < LINKS_MAX else ""  # noqa: PTH115  no Path a component
        except OSError:
            target = ""
        if not target:
            reached = candidate
            continue
        followed += 1
        reached = "/" if target.startswith("/") else reached
        rest += _parts(target)[::-1]
    return Path(reached)


def _parts(path: str) -> tuple[str, ...]:
    return tuple(part for part in path.split("/") if part)


def locate(path: Path, table: Sequence[Mount] | None = None, *, beneath: bool = False) -> Location:
    """`beneath`: of the folder that a mount at the very path hides."""
    at_last = real(path)
    parts = _parts(str(at_last))
    best: Mount | None = None
    depth = -1
    for mount in table if table is not None else mount_table.mounts():
        at = _parts(mount.path)
        if parts[: len(at)] != at or len(at) < depth or (beneath and at == parts):
            continue
        if len(at) == depth and best is not None and mount.parent != best.id:
            continue  # the one that is mounted on it is in front
        best, depth = mount, len(at)
    if best is None:
        return Location("", parts, at_last, None)
    return Location(best.device, _parts(best.root) + parts[depth:], at_last, best)


def relation(one: Path, other: Path, table: Sequence[Mount] | None = None) -> str:
    """How `one` lies to `other`: "is", "lies in" or "holds"; empty if they have nothing in common.

    Where one is a mountpoint the folder beneath counts too: what is mounted there now can be away at the next start.
    """
    table = table if table is not None else mount_table.mounts()
    for beneath in (False, True):
        first, second = locate(one, table, beneath=beneath), locate(other, table, beneath=beneath)
        for left, right in (((first.device, first.parts), (second.device, second.parts)), (("", _parts(str(first.real))), ("", _parts(str(second.real))))):  # fmt: skip
            found = _compared(left, right)
            if found:
                return found
    return ""


def _compared(one: tuple[str, tuple[str, ...]], other: tuple[str, tuple[str, ...]]) -> str:
    if one[0] != other[0]:
        return ""
    if one[1] == other[1]:
        return "is"
    if one[1][: len(other[1])] == other[1]:
        return "lies in"
    return "holds" if other[1][: len(one[1])] == one[1] else ""


def configured(root: Path, config: Config) -> list[Place]:
    """What `stratum.toml` names. Needs no store."""
    found = [Place(Role.VOLUME, root), Place(Role.META, root / "meta")]
    found += [Place(Role.HOT, root / hot) for hot in config.volume_hot]
    if config.audit_enabled:
        found.append(Place(Role.AUDIT, root / config.audit_folder))
    if config.mount_path:
        found.append(Place(Role.MOUNT, root / config.mount_path))
    return found


def recorded(reader: InodeReader) -> list[Place]:
    """What the store names: warm disks, remotes that are directories, and live mounts."""
    from stratum import cold, warm_disks  # which import whoever checks a path

    found = [Place(Role.WARM, Path(row.path)) for row in warm_disks.disks(reader).values() if row.state != "replaced"]
    found += [
        Place(Role.COLD, Path(row.endpoint) / row.prefix, name)
        for name, row in cold.rows(reader).items()
        if row.kind == "directory"
    ]
    found += [Place(Role.MOUNT, Path(str(row["mountpoint"]))) for row in mount_rows(reader).values()]
    return found


def of(volume: Volume) -> list[Place]:
    """Every place that an open volume uses."""
    with volume.snapshot() as reader:
        found = [*configured(volume.root, volume.config), *recorded(reader)]
    return list(dict.fromkeys(found))


def overlapping(
    path: Path, places: Iterable[Place], roles: Collection[Role] = frozenset(Role)
) -> tuple[str, Place] | None:
    """The first place of these roles that `path` has something in common with, and how."""
    table = mount_table.mounts()
    for place in places:
        if place.role in roles:
            found = relation(path, place.path, table)
            if found:
                return found, place
    return None


def refuse_overlap(what: str, path: Path, places: Iterable[Place], roles: Collection[Role] = frozenset(Role)) -> None:
    """Raises `InvalidArgument` if `path`, which is to be `what`, has something in common with a place of these roles."""
    found = overlapping(path, places, roles)
    if found is not None:
        how, place = found
        raise InvalidArgument(
            f"{what} {path} {how} {place}; no place may play two roles: choose another folder for {what}"
        )


def stratum_mount_of(path: Path) -> Mount | None:
    """The Stratum mount of any volume that a path lies in, be it its root or below."""
    mount = locate(path).mount
    return mount if mount is not None and mount.is_stratum else None


def is_mount_of(mount: Mount, root: Path) -> bool:
    """Whether a Stratum mount shows the volume at `root`, by the name that the kernel has for it: the path, if it is a plain one."""
    return mount.source in {str(root), str(real(root))}


def conflicts(places: Sequence[Place]) -> list[str]:
    """What is wrong among the places themselves: one a line. Folders of the volume may lie in VOLUME, and nowhere else in each other."""
    table = mount_table.mounts()
    found = []
    for number, one in enumerate(places):
        for other in places[number + 1 :]:
            how = relation(one.path, other.path, table)
            if not how or one == other or _may(one, other, how):
                continue
            found.append(f"{one} {how} {other}")
    return found


def _may(one: Place, other: Place, how: str) -> bool:
    if Role.VOLUME not in {one.role, other.role}:
        return one.role == other.role == Role.MOUNT
    # In the volume's folder lie its own, whichever role they play.
    return how == ("holds" if one.role == Role.VOLUME else "lies in")


def mountpoint_troubles(mountpoint: Path, used: Iterable[Place], *, over: bool = False) -> list[str]:
    """Why a volume that uses these places may not be mounted there. Whoever mounts over a folder that it reads waits for itself, for ever.

    `over`: what the folder holds may be hidden.
    """
    table = mount_table.mounts()
    mountpoint = real(mountpoint)
    found = []
    for place in used:
        how = relation(mountpoint, place.path, table) if place.role != Role.MOUNT else ""
        if how and not (place.role == Role.VOLUME and how == "lies in"):
            found.append(
                f"the mountpoint {mountpoint} {how} {place}; no place may play two roles: choose another folder"
            )
    outer = stratum_mount_of(mountpoint.parent)
    if outer is not None:
        found.append(f"the mountpoint {mountpoint} lies in the Stratum mount {outer.path}; choose a folder outside it")
    if not found and not over and mount_table.mount_at(str(mountpoint)) is None:
        held = entries_in(mountpoint)
        if held:
            found.append(
                f"{mountpoint} is not empty, and a mount would hide what lies in it ({held} entries): empty it, or mount with --over"
            )
    return found


def entries_in(folder: Path) -> int:
    """How many names a folder has; 0 also if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sum(1 for _ in entries)
    except OSError:
        return 0
