"""The drill: what a restore of a backup would bring now, tried over the real data.

Invariant: it changes nothing below the volume it is about.
"""

from __future__ import annotations

import random
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stratum import backup, config, content, fsck
from stratum.errors import InvalidArgument, NotFound, StratumError
from stratum.schema import Kind, key_u64, prefix_range, unpack_u64
from stratum.volume import Volume

if TYPE_CHECKING:
    from stratum.schema import Inode


@dataclass(slots=True)
class Drill:
    """What a restore of this backup would have brought now.

    `rpo_s`: what was written in these last seconds would be lost. `rto_s`: reading, verifying and opening took so long; the checks
    are not in it. Of the sample, so many files could not be read because they were replaced or removed since (`changed`), or because
    their bytes went to another tier since (`moved`): the next backup knows where. `lost` are those that nothing explains.
    """

    backup: str
    rpo_s: float
    rto_s: float
    files: int = 0
    sampled: int = 0
    read_bytes: int = 0
    changed: int = 0
    moved: int = 0
    lost: list[str] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.lost and not self.damage

    def document(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}


def drill(root: Path, source: Path, *, sample: int, scratch: Path | None = None, seed: int | None = None) -> Drill:
    """Restore a backup (of a folder: the newest one of this volume) into a scratch folder over the real data, check every row, and read
    `sample` files whole through their checksums. Raises `NotFound`, `BackupDamaged`.
    """
    root = root.absolute()
    with Volume(root, "drill") as live:
        path = source
        if source.is_dir():
            found = backup.of_instance(source, live.instance)
            if not found:
                raise NotFound(f"{source} holds no backup of {root}; `stratum meta backup {root} {source}` makes one")
            path = found[-1]
        with tempfile.TemporaryDirectory(prefix="stratum-drill-", dir=scratch) as folder:
            return _drill(live, path, Path(folder) / "volume", sample, random.Random(seed))


def _drill(live: Volume, path: Path, scratch: Path, sample: int, choice: random.Random) -> Drill:
    began = time.monotonic()
    told, _ = backup.restore(path, _scratch_volume(live, scratch))
    if told.instance != live.instance:
        raise InvalidArgument(f"{path} is of another volume ({told.instance}, this is {live.instance})")
    with Volume(scratch, "drill") as opened:
        done = Drill(str(path), round(time.time() - told.made_s, 1), round(time.monotonic() - began, 3))
        done.damage = [f"{item.kind}: {item.thing}: {item.what}" for item in fsck.check(opened, data=False)]
        for number in _choose(opened, done, sample, choice):
            _read(live, opened, number, done)
    return done


def _scratch_volume(live: Volume, scratch: Path) -> Path:
    """An empty volume whose data folders are the real ones; nothing that opens it writes there unless it is told to store something."""
    scratch.mkdir(mode=0o700)
    changed = {
        f"{section}.{name}": value for section, table in live.config.as_dict().items() for name, value in table.items()
    }
    changed["volume.hot"] = [str(folder) for folder in live.segments.folders]
    changed["mount.path"] = ""
    (scratch / config.CONFIG_NAME).write_text(config.render(changed))
    return scratch


def _choose(opened: Volume, done: Drill, sample: int, choice: random.Random) -> list[int]:
    """`sample` files, each as likely as any other."""
    chosen: list[int] = []
    with opened.snapshot() as reader:
        for key, raw in reader.scan(*prefix_range(b"I")):
            if raw[0] != Kind.FILE:
                continue
            done.files += 1
            if len(chosen) < sample:
                chosen.append(unpack_u64(key[1:])[0])
            elif (at := choice.randrange(done.files)) < sample:
                chosen[at] = unpack_u64(key[1:])[0]
    return chosen


def _read(live: Volume, opened: Volume, number: int, done: Drill) -> None:
    with opened.snapshot() as reader:
        inode = reader.inode(number)
        planned = content.plan_read(reader, inode)
    done.sampled += 1
    try:
        for piece in content.read_planned(opened, planned, 0, inode.size):
            done.read_bytes += len(piece)
    except StratumError as error:
        since = _compare(live, opened, inode)
        if since == "changed":
            done.changed += 1
        elif since == "moved":
            done.moved += 1
        else:
            done.lost.append(f"inode {number:#x}: {error.message}")


def _compare(live: Volume, opened: Volume, inode: Inode) -> str:
    """What became of a file since the backup: "changed", "moved", or "" if nothing did."""
    with live.snapshot() as now, opened.snapshot() as then:
        if not now.has_inode(inode.number) or now.inode(inode.number).version != inode.version:
            return "changed"
        for extent in {piece.extent for piece in then.slices(inode.number)}:
            if now.get(key_u64(b"X", extent)) != then.get(key_u64(b"X", extent)):
                return "moved"
            prefix = prefix_range(key_u64(b"c", extent))
            if dict(now.scan(*prefix)) != dict(then.scan(*prefix)):
                return "moved"
    return ""
