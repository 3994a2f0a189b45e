"""What the tier, cold, explain and rebuild commands do."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from stratum import buckets, cold_admin, counting, hints, notify, objects, packs
from stratum.cli.commands import init_document, init_settings, set_up_logs
from stratum.cli.disk_commands import work
from stratum.cli.output import show, size, table
from stratum.cli.progress import Progress
from stratum.ending import Ending
from stratum.errors import InvalidArgument, NotFound
from stratum.health import SILENT_S_MAX
from stratum.manifest import Names
from stratum.schema import key_u64, pack_json, prefix_range
from stratum.tier_rows import VALID, ColdRow, MoveRow, Tier
from stratum.tiering import daemon, remote_watch
from stratum.tiering.explain import arrived_bytes
from stratum.tiering.explain import explain as explain_key
from stratum.tiering.rebuild import rebuild
from stratum.volume import Volume

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator

    from stratum.transaction import InodeReader, MetadataTransaction


def tierd(options: Namespace) -> int:
    """The daemon, until SIGTERM."""
    from stratum.processes import die_with_parent

    if options.supervised:
        die_with_parent(signal.SIGTERM)
    set_up_logs(options)
    ending = Ending.by_signals()
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
    return show(
        options,
        {"remotes": rows},
        table(rows, ["name", "kind", "endpoint", "bucket", "prefix", "state", "packs", "bytes"]),
    )


def cold_check(options: Namespace) -> int:
    with Volume(options.volume, "cli") as opened:
        with opened.snapshot() as reader:
            names = [row["name"] for row in cold_admin.describe(reader)]
        if options.name and options.name not in names:
            raise NotFound(f"there is no remote {options.name!r}; `stratum cold list` shows them")
        if options.restore_marker:
            if not options.name:
                raise InvalidArgument("--restore-marker wants the name of the remote")
            cold_admin.restore_marker(opened, options.name)
        with Progress("asking the remote") as progress:
            found = [
                cold_admin.check(opened, name, read=options.read, seen=progress.at)
                for name in ([options.name] if options.name else names)
            ]
        for row in found:
            remote_watch.note(opened, row["name"], remote_watch.ask(opened, row["name"]))
    good = all(row["reachable"] and not row["error"] and not row["missing"] and not row["damaged"] for row in found)
    lines = [
        f"{row['name']}: {'reachable' if row['reachable'] else 'NOT REACHABLE'}, {row['packs']} packs, {len(row['missing'])} missing, "
        f"{len(row['damaged'])} damaged{'; ' + row['error'] if row['error'] else ''}"
        for row in found
    ]
    show(options, {"remotes": found}, "\n".join(lines) or "(no remotes)")
    return 0 if good else 1


def cold_remove(options: Namespace) -> int:
    with Volume(options.volume, "cli") as opened:
        cold_admin.remove(opened, options.name)
    return show(options, {"removed": options.name}, f"removed remote {options.name}; its marker stays in the bucket")


def cold_sweep(options: Namespace) -> int:
    with Volume(options.volume, "cli") as opened:
        found = cold_admin.sweep(opened, options.name, age_s_min=options.older_than, apply=options.apply)
    text = f"{found['objects']} objects of {size(found['bytes'])} and {found['uploads']} unfinished uploads that nothing here refers to"
    lines = [text + (": removed" if options.apply else "; --apply removes them"), *found["keys"]]
    return show(options, found, "\n".join(lines))


def cold_drain(options: Namespace) -> int:
    with Volume(options.volume, "cli") as opened:
        cold_admin.set_state(opened, options.name, "active" if options.cancel else "draining")
    text = "is in use again" if options.cancel else "is being emptied; `stratum cold list` shows how far it is"
    return show(options, {"name": options.name, "draining": not options.cancel}, f"{options.name} {text}")


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
        + (f" DAMAGED: {entry['damaged']}" if entry.get("damaged") else "")
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
            with _showing_arrivals(opened, options.key, number, target):
                error = _wait_for(opened, number, row)
    document = {"key": options.key, "to": options.tier, "done": options.wait and not error, "error": error}
    show(options, document, f"{options.key}: {error or ('moved' if options.wait else 'asked for')}")
    return 1 if error else 0


@contextmanager
def _showing_arrivals(opened: Volume, key: str, number: int, target: Tier) -> Iterator[None]:
    """How many of a file's bytes have come to the tier, whoever moves them."""
    ending = threading.Event()

    def look() -> None:
        while not ending.wait(1.0):
            with opened.snapshot() as reader:
                progress.at(*arrived_bytes(reader, number, target))

    with Progress(f"moving {key}") as progress:
        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ending.set()
            thread.join()


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
        work(opened, lambda worker: worker.move_asked())


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
    lines += [f"  not working: {step}: {why}" for step, why in document["failing"].items()]
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
        "level": tierd.get("level", "unknown"), "disks": tierd.get("disks", []), "failing": tierd.get("troubles", {}),
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
    horizon_s = options.horizon
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
        table(rows, ["key", "size", "from", "to", "action", "rule"]) + f"\n{len(rows)} files, {size(document['bytes'])}"
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
    with Progress("looking through the remote") as progress:
        report = rebuild(
            root, changed, warm_paths, options.from_cold, row, create_folders=options.create, watch=progress.at
        )
    document = {
        **init_document(root, report.access_key, report.secret_key), "files": report.files, "bytes": report.size, "packs": report.packs,
        "snapshot": report.snapshot, "lost": report.lost, "damaged": report.damaged + report.warm.damaged, "warm_packs": report.warm.packs,
    }  # fmt: skip
    keys = (
        f"access key  {report.access_key}\nsecret key  {report.secret_key}   (shown only now)"
        if report.access_key
        else "users and keys are those of the snapshot"
    )
    warm = f" and {report.warm.packs} on warm disks" if report.warm.packs else ""
    text = (
        f"volume      {root}\n{keys}\n{report.files} files, {size(report.size)} in {report.packs} packs{warm}; snapshot: {report.snapshot or 'none'}"
        + "".join(f"\nlost: {name}" for name in report.lost[:50])
    )
    return show(options, document, text)
