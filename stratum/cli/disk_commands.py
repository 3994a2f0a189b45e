"""What the disk and scrub commands do, and how a command waits for the mover's work."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stratum import packs, private, warm, warm_disks, warm_sweep
from stratum.cli.output import show, size, table
from stratum.cli.progress import Progress, span
from stratum.errors import Busy, InvalidArgument
from stratum.schema import pack_json, prefix_range, unpack_json
from stratum.tier_rows import VALID, DiskRow, PackRow, Tier
from stratum.tiering import daemon, heal, leaving
from stratum.tiering.mover import exclusive
from stratum.volume import Volume

if TYPE_CHECKING:
    from argparse import Namespace

    from stratum.transaction import MetadataTransaction

LOOK_S = 0.05


# -- disks --------------------------------------------------------------------------------------------------------------


def warn_about_devices(paths: list[Path]) -> list[str]:
    """One failing device must not take two shards: say so loudly."""
    texts = [
        f"{first} and {second} lie on one device: if it fails, both are lost"
        for first, second in warm_disks.same_devices(paths)
    ]
    for text in texts:
        print(f"WARNING: {text}", file=sys.stderr)
    return texts


def _active_paths(opened: Volume) -> list[Path]:
    with opened.snapshot() as reader:
        return [Path(row.path) for row in warm_disks.disks(reader).values() if row.state == "active"]


def disk_add(options: Namespace) -> int:
    with Volume(options.volume, "cli") as opened:
        if not opened.config.volume_ec:
            raise InvalidArgument(
                'the volume has no warm tier: set volume.ec = "K+M" in stratum.toml, restart, then add disks'
            )
        number = opened.warm.add(options.path.absolute(), create=options.create)
        warnings = warn_about_devices(_active_paths(opened))
    document = {"disk": f"{number:016x}", "path": str(options.path.absolute()), "warnings": warnings}
    return show(options, document, f"added {document['path']}")


def _code(opened: Volume) -> tuple[int, int]:
    code = warm.code_of(opened.config.volume_ec)
    if code is None:
        raise InvalidArgument("the volume has no warm tier")
    return code


def disk_remove(options: Namespace) -> int:
    with Volume(options.volume, "cli") as opened:
        k, m = _code(opened)
        path = options.path.absolute()

        def remove(tx: MetadataTransaction) -> None:
            number = warm_disks.find_disk(tx, path)
            rows = warm_disks.disks(tx)
            left = sum(1 for other, row in rows.items() if other != number and row.state == "active")
            if left < k + m and not options.force:
                raise InvalidArgument(
                    f"{left} disks would be left and {k}+{m} shards need {k + m}; `stratum disk replace` it, add one first, or --force"
                )
            rows[number].state = "draining"
            warm_disks.set_disk(tx, number, rows[number])

        opened.mutate(remove, frees=True)
        with opened.snapshot() as reader:
            number = warm_disks.find_disk(reader, path)
        failing = _wait_until_left(opened, number, f"emptying {path}") if options.wait else []
    text = (
        f"{path} is empty and forgotten"
        if options.wait
        else f"{path} is being emptied; `stratum disk list` shows how far it is"
    )
    return _left(options, {"draining": str(path)}, text, failing)


def disk_replace(options: Namespace) -> int:
    with Volume(options.volume, "cli") as opened:
        _code(opened)
        old, new = options.path.absolute(), options.new.absolute()
        with opened.snapshot() as reader:
            number = warm_disks.find_disk(reader, old)
        private.require_folder(new, "a disk of the warm tier", create=options.create)
        if old == new:
            _set_aside(new)
            opened.mutate(lambda tx: _retire(tx, number, 0), frees=True)
        successor = opened.warm.add(new, create=options.create)
        opened.mutate(lambda tx: _retire(tx, number, successor), frees=True)
        warnings = warn_about_devices(_active_paths(opened))
        failing = _wait_until_left(opened, number, f"rebuilding {old} on {new}") if options.wait else []
    how = "it is rebuilt" if options.wait else "it is being rebuilt; `stratum disk list` shows how far it is"
    document = {"replaced": str(old), "by": str(new), "warnings": warnings}
    return _left(options, document, f"{new} replaces {old}; {how}", failing)


def _left(options: Namespace, document: dict[str, Any], text: str, failing: list[str]) -> int:
    if failing:
        text = f"{len(failing)} packs cannot be repaired; they are tried again:" + "".join(
            f"\n  {error}" for error in failing[:10]
        )
    if options.wait:
        document["failing"] = failing
    show(options, document, text)
    return 1 if failing else 0


def _wait_until_left(opened: Volume, number: int, what: str) -> list[str]:
    """Until nothing is left on a disk, or nothing that can be repaired: what is in the way then."""
    with Progress(what) as progress:
        while True:
            with opened.snapshot() as reader:
                row = warm_disks.disks(reader).get(number)
                if row is None or row.state == "active":
                    return []
                rebuild = leaving.progress(reader, number)
                queue = [unpack_json(raw) for _, raw in reader.scan(*prefix_range(b"h"))]
            if rebuild is not None:
                progress.at(rebuild.done_bytes, rebuild.total_bytes)
                if queue and all(why.get("error") for why in queue):
                    return [str(why["error"]) for why in queue]
            work(opened, lambda worker: worker.repair_now())


def _set_aside(path: Path) -> None:
    """A new disk is mounted where the old one was: it must be empty, as `WarmStore.add` will see."""
    if (path / warm_disks.MARKER).exists():
        raise InvalidArgument(f"{path} still is the disk it was; mount the new one there, or name another folder")


def _retire(tx: MetadataTransaction, number: int, successor: int) -> None:
    row = warm_disks.disks(tx)[number]
    row.state, row.successor = "replaced", successor
    warm_disks.set_disk(tx, number, row)


def disk_sweep(options: Namespace) -> int:
    with Volume(options.volume, "cli") as opened:
        path = options.path.absolute()
        found = warm_sweep.sweep(opened, path, age_s_min=options.older_than, apply=options.apply)
    text = f"{found['shards']} shards of {size(found['bytes'])} that nothing here refers to"
    lines = [text + (": removed" if options.apply else "; --apply removes them"), *found["names"]]
    return show(options, found, "\n".join(lines))


def disk_list(options: Namespace) -> int:
    with Volume(options.volume, "cli") as opened:
        with opened.snapshot() as reader:
            rows = warm_disks.disks(reader)
            stored = [row for _, row in packs.scan(reader) if row.state == VALID and row.tier == Tier.WARM]
            queue = [unpack_json(raw) for _, raw in reader.scan(*prefix_range(b"h"))]
            rebuilds = {number: leaving.progress(reader, number) for number in rows}
        disks = [_disk(opened, number, row, stored, rebuilds[number]) for number, row in rows.items()]
    repair: dict[str, Any] = {
        "packs_waiting": len(queue),
        "failing": [why["error"] for why in queue if why.get("error")],
    }
    document = {"ec": opened.config.volume_ec, "disks": disks, "repair": repair}
    text = table(disks, ["path", "state", "present", "shards", "shard_bytes", "free_bytes"])
    text += "".join(
        f"\n{disk['path']}: {_how_far(rebuild)}"
        for disk, rebuild in zip(disks, rebuilds.values(), strict=True)
        if rebuild
    )
    text += f"\nrepair queue: {len(queue)} packs" + "".join(f"\n  {error}" for error in repair["failing"][:10])
    return show(options, document, text)


def _how_far(rebuild: leaving.Rebuild) -> str:
    left = f", {span(rebuild.eta_s)} left" if rebuild.eta_s is not None else ""
    return f"{size(rebuild.done_bytes)} of {size(rebuild.total_bytes)} rebuilt elsewhere, {size(rebuild.bytes_per_s)}/s{left}"


def _disk(
    opened: Volume, number: int, row: DiskRow, stored: list[PackRow], rebuild: leaving.Rebuild | None
) -> dict[str, Any]:
    on_it = [pack for pack in stored if number in pack.disks]
    present = row.state != "replaced" and opened.warm.is_present(number, row)
    free = 0
    if present:
        stat = os.statvfs(row.path)
        free = stat.f_bavail * stat.f_frsize
    return {
        "disk": f"{number:016x}", "path": row.path, "state": row.state, "present": present, "shards": len(on_it),
        "shard_bytes": sum(pack.shard_bytes for pack in on_it), "free_bytes": free,
        "rebuild": rebuild.document() if rebuild else None,
    }  # fmt: skip


# -- scrub --------------------------------------------------------------------------------------------------------------


def _scrub_state(opened: Volume) -> dict[str, Any]:
    with opened.snapshot() as reader:
        return {"state": "never run", "unhealed": [], "found": 0, **packs.setting(reader, "scrub")}


def scrub_start(options: Namespace) -> int:
    with Volume(options.volume, "cli") as opened:
        heal.start_scrub(opened)
        with Progress("checking every stored byte") as progress:
            while options.wait and (state := _scrub_state(opened))["state"] == "running":
                progress.at(state.get("read_bytes", 0), state.get("total_bytes", 0))
                work(opened, lambda worker: worker.scrub_now())
        return _print_scrub(options, _scrub_state(opened), final=options.wait)


def _print_scrub(options: Namespace, state: dict[str, Any], *, final: bool = False) -> int:
    unhealed = list(state["unhealed"])
    text = f"{state['state']}: {state.get('checked', 0)} checked, {size(state.get('read_bytes', 0))} read, {state['found']} damaged, {state.get('healed', 0)} healed"
    show(options, state, text + "".join(f"\n  not healed: {thing}" for thing in unhealed))
    return 1 if final and (unhealed or state["found"] != state.get("healed", 0)) else 0


def scrub_status(options: Namespace) -> int:
    with Volume(options.volume, "cli") as opened:
        return _print_scrub(options, _scrub_state(opened))


def scrub_set(options: Namespace) -> int:
    """Pause and resume."""
    with Volume(options.volume, "cli") as opened:

        def change(tx: MetadataTransaction) -> None:
            state = packs.setting(tx, "scrub")
            wanted = {"pause": ("running", "paused"), "resume": ("paused", "running")}[options.action]
            if state.get("state") != wanted[0]:
                raise InvalidArgument(f"scrub is {state.get('state', 'not running')}; nothing to {options.action}")
            tx.put(b"gscrub", pack_json({**state, "state": wanted[1]}))

        opened.mutate(change, frees=True)
        return _print_scrub(options, _scrub_state(opened))


def scrub_speed(options: Namespace) -> int:
    if options.bytes_per_s < 1:
        raise InvalidArgument("the speed is bytes a second, at least 1")
    with Volume(options.volume, "cli") as opened:
        opened.mutate(lambda tx: tx.put(b"gscrub_speed", pack_json({"bytes_per_s": options.bytes_per_s})), frees=True)
    return show(
        options, {"bytes_per_s": options.bytes_per_s}, f"scrub reads at most {size(options.bytes_per_s)} a second"
    )


def work(opened: Volume, step: Any) -> None:
    """Do a step here if nobody else moves data; otherwise leave it to who does, and wait a moment."""
    try:
        with exclusive(opened):
            step(daemon.Tierd(opened))
    except Busy:
        time.sleep(LOOK_S)
