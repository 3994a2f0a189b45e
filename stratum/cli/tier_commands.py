"""What the tier, disk, cold, scrub, explain and rebuild commands do."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stratum import buckets, cold_admin, counting, hints, notify, objects, packs, warm
from stratum.cli.commands import duration_s, init_document, init_settings, set_up_logs, show, table
from stratum.cli.progress import Progress
from stratum.errors import Busy, InvalidArgument, NotFound
from stratum.health import SILENT_S_MAX
from stratum.manifest import Names
from stratum.schema import key_u64, pack_json, prefix_range, unpack_json
from stratum.tier_rows import VALID, ColdRow, DiskRow, MoveRow, PackRow, Tier
from stratum.tiering import daemon, heal
from stratum.tiering.explain import explain as explain_key
from stratum.tiering.mover import exclusive
from stratum.tiering.rebuild import rebuild
from stratum.volume import Volume

if TYPE_CHECKING:
    from argparse import Namespace

    from stratum.transaction import InodeReader, MetadataTransaction

LOOK_S = 0.05


def tierd(options: Namespace) -> int:
    """The daemon, until SIGTERM."""
    from stratum.processes import die_with_parent

    if options.supervised:
        die_with_parent(signal.SIGTERM)
    set_up_logs(options)
    ending = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ending.set())
    with Volume(options.volume, "tierd") as opened:
        counting.attach(opened.meta / counting.FOLDER, "tierd")
        watchdog = notify.Watchdog(time.monotonic())
        worker = daemon.Tierd(opened)
        thread = threading.Thread(target=worker.run, name="tierd", daemon=True)
        thread.start()
        notify.send(READY=1, STATUS="moving data between the tiers")
        while not ending.wait(0.2) and thread.is_alive() and opened.failed is None:
            watchdog.feed(time.monotonic(), healthy=worker.silent_s() < SILENT_S_MAX["tierd"])
        notify.send(STOPPING=1)
        worker.stop()
        thread.join(20)
        return 70 if opened.failed is not None else 0


def split_name(text: str) -> tuple[str, bytes]:
    """`bucket/key`."""
    bucket, slash, key = text.partition("/")
    if not slash or not key:
        raise InvalidArgument(f"{text!r} is not BUCKET/KEY")
    return bucket, os.fsencode(key)


# -- disks --------------------------------------------------------------------------------------------------------------


def warn_about_devices(paths: list[Path]) -> list[str]:
    """One failing device must not take two shards: say so loudly."""
    texts = [
        f"{first} and {second} lie on one device: if it fails, both are lost"
        for first, second in warm.same_devices(paths)
    ]
    for text in texts:
        print(f"WARNING: {text}", file=sys.stderr)
    return texts


def _active_paths(opened: Volume) -> list[Path]:
    with opened.snapshot() as reader:
        return [Path(row.path) for row in warm.disks(reader).values() if row.state == "active"]


def disk_add(options: Namespace) -> int:
    with Volume(options.volume, "cli") as opened:
        if not opened.config.volume_ec:
            raise InvalidArgument(
                'the volume has no warm tier: set volume.ec = "K+M" in stratum.toml, restart, then add disks'
            )
        number = opened.warm.add(options.path.absolute())
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
            number = warm.find_disk(tx, path)
            rows = warm.disks(tx)
            left = sum(1 for other, row in rows.items() if other != number and row.state == "active")
            if left < k + m and not options.force:
                raise InvalidArgument(
                    f"{left} disks would be left and {k}+{m} shards need {k + m}; `stratum disk replace` it, add one first, or --force"
                )
            rows[number].state = "draining"
            warm.set_disk(tx, number, rows[number])

        opened.mutate(remove, frees=True)
    return show(options, {"draining": str(path)}, f"{path} is being emptied; `stratum disk list` shows how far it is")


def disk_replace(options: Namespace) -> int:
    with Volume(options.volume, "cli") as opened:
        _code(opened)
        old, new = options.path.absolute(), options.new.absolute()
        with opened.snapshot() as reader:
            number = warm.find_disk(reader, old)
        if old == new:
            _set_aside(new)
            opened.mutate(lambda tx: _retire(tx, number, 0), frees=True)
        successor = opened.warm.add(new)
        opened.mutate(lambda tx: _retire(tx, number, successor), frees=True)
        warnings = warn_about_devices(_active_paths(opened))
    document = {"replaced": str(old), "by": str(new), "warnings": warnings}
    return show(
        options, document, f"{new} replaces {old}; it is being rebuilt; `stratum disk list` shows how far it is"
    )


def _set_aside(path: Path) -> None:
    """A new disk is mounted where the old one was: it must be empty, as `WarmStore.add` will see."""
    if (path / warm.MARKER).exists():
        raise InvalidArgument(f"{path} still is the disk it was; mount the new one there, or name another folder")


def _retire(tx: MetadataTransaction, number: int, successor: int) -> None:
    row = warm.disks(tx)[number]
    row.state, row.successor = "replaced", successor
    warm.set_disk(tx, number, row)


def disk_list(options: Namespace) -> int:
    with Volume(options.volume, "cli") as opened:
        with opened.snapshot() as reader:
            rows = warm.disks(reader)
            stored = [row for _, row in packs.scan(reader) if row.state == VALID and row.tier == Tier.WARM]
            queue = [unpack_json(raw) for _, raw in reader.scan(*prefix_range(b"h"))]
        disks = [_disk(opened, number, row, stored) for number, row in rows.items()]
    repair: dict[str, Any] = {
        "packs_waiting": len(queue),
        "failing": [why["error"] for why in queue if why.get("error")],
    }
    document = {"ec": opened.config.volume_ec, "disks": disks, "repair": repair}
    text = table(disks, ["path", "state", "present", "shards", "shard_bytes", "free_bytes"])
    text += f"\nrepair queue: {len(queue)} packs" + "".join(f"\n  {error}" for error in repair["failing"][:10])
    return show(options, document, text)


def _disk(opened: Volume, number: int, row: DiskRow, stored: list[PackRow]) -> dict[str, Any]:
    on_it = [pack for pack in stored if number in pack.disks]
    present = row.state != "replaced" and opened.warm.is_present(number, row)
    free = 0
    if present:
        stat = os.statvfs(row.path)
        free = stat.f_bavail * stat.f_frsize
    return {
        "disk": f"{number:016x}", "path": row.path, "state": row.state, "present": present, "shards": len(on_it),
        "shard_bytes": sum(pack.shard_bytes for pack in on_it), "free_bytes": free,
    }  # fmt: skip


# -- remotes ------------------------------------------------------------------------------------------------------------


def cold_row(options: Namespace) -> ColdRow:
    """The remote that the options of `cold add` and `rebuild` describe. Raises `InvalidArgument`."""
    if bool(options.directory) == bool(options.bucket):
        raise InvalidArgument("name either --bucket (and --endpoint) or --directory")
    prefix = cold_admin.normal_prefix(options.prefix)
    return ColdRow(
        kind="directory" if options.directory else "s3",
        endpoint=str(options.directory.absolute()) if options.directory else options.endpoint or "",
        bucket=options.bucket or "", prefix=prefix, region=options.region,
        credentials=str(options.credentials.absolute()) if options.credentials else "",
        encryption_key=str(options.encryption_key.absolute()) if options.encryption_key else "",
        storage_class=getattr(options, "storage_class", ""), epoch=0, added_s=0,
    )  # fmt: skip


def cold_add(options: Namespace) -> int:
    with Volume(options.volume, "cli") as opened:
        row = cold_admin.add(opened, options.name, cold_row(options), create_bucket=options.create_bucket)
    document = {"name": options.name, **asdict(row)}
    can = "\n".join(f"  {what.replace('_', ' '):18}{'yes' if does else 'no'}" for what, does in row.can.items())
    note = (
        ""
        if row.can.get("checksums")
        else "\nit does not compare checksums: what is sent is read back before anything is freed"
    )
    return show(options, document, f"added remote {options.name}; it does:\n{can}{note}")


def cold_list(options: Namespace) -> int:
    with Volume(options.volume, "cli") as opened, opened.snapshot() as reader:
        rows = cold_admin.describe(reader)
    return show(options, rows, table(rows, ["name", "kind", "endpoint", "bucket", "prefix", "state", "packs", "bytes"]))


def cold_check(options: Namespace) -> int:
    with Volume(options.volume, "cli") as opened:
        with opened.snapshot() as reader:
            names = [row["name"] for row in cold_admin.describe(reader)]
        if options.name and options.name not in names:
            raise NotFound(f"there is no remote {options.name!r}; `stratum cold list` shows them")
        with Progress("asking the remote") as progress:
            found = [
                cold_admin.check(opened, name, read=options.read, seen=progress.at)
                for name in ([options.name] if options.name else names)
            ]
    good = all(row["reachable"] and not row["error"] and not row["missing"] and not row["damaged"] for row in found)
    lines = [
        f"{row['name']}: {'reachable' if row['reachable'] else 'NOT REACHABLE'}, {row['packs']} packs, {len(row['missing'])} missing, "
        f"{len(row['damaged'])} damaged{'; ' + row['error'] if row['error'] else ''}"
        for row in found
    ]
    show(options, found, "\n".join(lines) or "(no remotes)")
    return 0 if good else 1


def cold_remove(options: Namespace) -> int:
    with Volume(options.volume, "cli") as opened:
        cold_admin.remove(opened, options.name)
    return show(options, {"removed": options.name}, f"removed remote {options.name}; its marker stays in the bucket")


def cold_drain(options: Namespace) -> int:
    with Volume(options.volume, "cli") as opened:
        cold_admin.set_state(opened, options.name, "active" if options.cancel else "draining")
    text = "is in use again" if options.cancel else "is being emptied; `stratum cold list` shows how far it is"
    return show(options, {"name": options.name, "draining": not options.cancel}, f"{options.name} {text}")


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
                _work(opened, lambda worker: worker.scrub_now())
        return _print_scrub(options, _scrub_state(opened), final=options.wait)


def _print_scrub(options: Namespace, state: dict[str, Any], *, final: bool = False) -> int:
    unhealed = list(state["unhealed"])
    text = f"{state['state']}: {state.get('checked', 0)} checked, {state.get('read_bytes', 0)} bytes read, {state['found']} damaged, {state.get('healed', 0)} healed"
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
        options, {"bytes_per_s": options.bytes_per_s}, f"scrub reads at most {options.bytes_per_s} bytes a second"
    )


def _work(opened: Volume, step: Any) -> None:
    """Do a step here if nobody else moves data; otherwise leave it to who does, and wait a moment."""
    try:
        with exclusive(opened):
            step(daemon.Tierd(opened))
    except Busy:
        time.sleep(LOOK_S)


# -- tiers --------------------------------------------------------------------------------------------------------------


def explain(options: Namespace) -> int:
    bucket, key = split_name(options.key)
    with Volume(options.volume, "cli") as opened:
        document = explain_key(opened, bucket, key)
    lines = [
        f"{bucket}/{document['key']}: {document['location']}, hottest tier {document['tier']}",
        f"rule {document['rule']}: {', '.join(f'{name}={value}' for name, value in document['inputs'].items())}",
        f"next: {document['next']}",
    ]
    lines += [
        f"  {entry['offset']:>14} +{entry['length']:<12} {entry['tier']:5} {entry['place']}"
        + (f" (copies: {', '.join(entry['copies'])})" if entry["copies"] else "")
        for entry in document["extents"]
    ]
    lines += [
        f"  {move['time']} {move['event']} {move.get('from', '')} -> {move.get('to', '')}: {move.get('cause', '')} {move.get('error', '')}"
        for move in document["moves"]
    ]
    return show(options, document, "\n".join(lines))


def _find(reader: InodeReader, text: str) -> int:
    bucket, key = split_name(text)
    return objects.head(reader, buckets.get(reader, bucket), key).inode.number


def tier_move(options: Namespace) -> int:
    target = hints.TIERS[options.tier]
    with Volume(options.volume, "cli") as opened:
        with opened.snapshot() as reader:
            number = _find(reader, options.key)
            if target == Tier.WARM and not opened.config.volume_ec:
                raise InvalidArgument("the volume has no warm tier")
        row = MoveRow(int(target), "tier move", time.time_ns())
        opened.mutate(lambda tx: hints.ask(tx, number, row), frees=True)
        error = ""
        if options.wait:
            error = _wait_for(opened, number, row)
    document = {"key": options.key, "to": options.tier, "done": options.wait and not error, "error": error}
    show(options, document, f"{options.key}: {error or ('moved' if options.wait else 'asked for')}")
    return 1 if error else 0


def _wait_for(opened: Volume, number: int, asked: MoveRow) -> str:
    """Until the move is done and its source freed, or has failed once; why it failed."""
    while True:
        with opened.snapshot() as reader:
            raw = reader.get(key_u64(b"m", number))
        if raw is None:
            return ""
        row = MoveRow.decode(raw)
        if row.asked_ns != asked.asked_ns:
            return "somebody asked for another move of it"
        if row.error:
            return row.error
        _work(opened, lambda worker: worker.move_asked())


def tier_status(options: Namespace) -> int:
    with Volume(options.volume, "cli") as opened, opened.snapshot() as reader:
        document = tier_facts(reader)
    lines = [f"hot disks: {document['level']}" + (" (paused)" if document["paused"] else "")]
    lines += [
        f"  {tier:5} {facts['files']:>10} files with it as their hottest tier"
        for tier, facts in document["tiers"].items()
    ]
    lines += [
        f"  {name}: {value}"
        for name, value in document.items()
        if name in {"warm_bytes", "cold_bytes", "moves_waiting", "moves_failing", "repairs_waiting"}
    ]
    lines += [f"  not working: {step}" for step in document["failing"]]
    return show(options, document, "\n".join(lines))


def tier_facts(reader: InodeReader) -> dict[str, Any]:
    """What `tier status` shows."""
    tierd = packs.setting(reader, "tierd")
    moves = [MoveRow.decode(raw) for _, raw in reader.scan(*prefix_range(b"m"))]
    stored = [row for _, row in packs.scan(reader) if row.state == VALID]
    tiers = {
        tier.name.lower(): {"files": sum(1 for _ in reader.scan(b"b" + bytes((tier,)), b"b" + bytes((tier + 1,))))}
        for tier in Tier
    }
    return {
        "level": tierd.get("level", "unknown"), "disks": tierd.get("disks", []), "failing": tierd.get("failing", []),
        "paused": bool(packs.setting(reader, "paused")), "draining": packs.setting(reader, "drain").get("tier", ""), "tiers": tiers,
        "warm_bytes": sum(row.live_bytes for row in stored if row.tier == Tier.WARM),
        "cold_bytes": sum(row.live_bytes for row in stored if row.tier == Tier.COLD),
        "moves_waiting": len(moves), "moves_failing": sum(1 for move in moves if move.error),
        "repairs_waiting": sum(1 for _ in reader.scan(*prefix_range(b"h"))),
        "moved_bytes": tierd.get("moved_bytes", {}),
    }  # fmt: skip


def tier_pause(options: Namespace) -> int:
    return _set(
        options,
        "paused",
        {"since_s": int(time.time())},
        "background moves are paused; what is asked for and full disks are served",
    )


def tier_resume(options: Namespace) -> int:
    return _set(options, "paused", None, "background moves go on")


def tier_drain(options: Namespace) -> int:
    if options.cancel:
        return _set(options, "drain", None, "the tier is in use again")
    return _set(
        options,
        "drain",
        {"tier": options.tier},
        f"the {options.tier} tier is being emptied; `stratum tier status` shows how far it is",
    )


def _set(options: Namespace, name: str, value: dict[str, Any] | None, text: str) -> int:
    key = b"g" + name.encode()

    def change(tx: MetadataTransaction) -> None:
        if value is None:
            tx.delete(key)
        else:
            tx.put(key, pack_json(value))

    with Volume(options.volume, "cli") as opened:
        opened.mutate(change, frees=True)
    return show(options, {name: value}, text)


def tier_plan(options: Namespace) -> int:
    horizon_s = duration_s(options.horizon)
    with Volume(options.volume, "cli") as opened:
        with opened.snapshot() as reader:
            level = str(packs.setting(reader, "tierd").get("level", "ok"))
        rows = daemon.plan(opened, level, horizon_s)
        with opened.snapshot() as reader:
            names = manifest_names(reader, [row["inode"] for row in rows])
    for row in rows:
        row["key"] = names.get(row.pop("inode"), "(without a name)")
    document = {"horizon_s": horizon_s, "level": level, "moves": rows, "bytes": sum(row["size"] for row in rows)}
    text = (
        table(rows, ["key", "size", "from", "to", "action", "rule"]) + f"\n{len(rows)} files, {document['bytes']} bytes"
    )
    return show(options, document, text)


def manifest_names(reader: InodeReader, numbers: list[int]) -> dict[int, str]:
    """`bucket/key` of inodes."""
    names = Names(reader)
    found = {}
    for number in numbers:
        bucket, keys = names.of(reader.inode(number))
        if keys:
            found[number] = f"{bucket}/{os.fsdecode(keys[0])}"
    return found


def rebuild_volume(options: Namespace) -> int:
    root = options.volume.absolute()
    row = cold_row(options)
    changed, warm_paths = init_settings(options)
    report = rebuild(root, changed, warm_paths, options.from_cold, row)
    document = {
        **init_document(root, report.access_key, report.secret_key), "files": report.files, "bytes": report.size, "packs": report.packs,
        "snapshot": report.snapshot, "lost": report.lost, "damaged": report.damaged,
    }  # fmt: skip
    keys = (
        f"access key  {report.access_key}\nsecret key  {report.secret_key}   (shown only now)"
        if report.access_key
        else "users and keys are those of the snapshot"
    )
    text = (
        f"volume      {root}\n{keys}\n{report.files} files, {report.size} bytes in {report.packs} packs; snapshot: {report.snapshot or 'none'}"
        + "".join(f"\nlost: {name}" for name in report.lost[:50])
    )
    return show(options, document, text)
