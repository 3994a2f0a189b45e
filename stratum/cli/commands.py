"""One function a command: options in, exit code out."""

from __future__ import annotations

import json
import os
import socket
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stratum import (
    background,
    buckets,
    clones,
    config_rules,
    counting,
    notify,
    paths,
    places,
    preflight,
    private,
    roles,
    volume,
)
from stratum import log as logs
from stratum.cli.output import schema_of, show, table, to_json
from stratum.config import CONFIG_NAME, load, parse, parse_listen, render
from stratum.erasure import parse_code
from stratum.errors import ConfigInvalid, InvalidArgument, SessionDead
from stratum.health import SERVED
from stratum.identity import Identities
from stratum.mountd import helper_of
from stratum.places import Place, Role
from stratum.status import sessions
from stratum.tiering.explain import explain_inode
from stratum.volume import Volume
from stratum.warm_disks import disk_of, same_devices

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable

    from stratum.schema import BucketRow
    from stratum.transaction import MetadataTransaction


def _free_listen(taken: set[int]) -> str:
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port not in taken:
            taken.add(port)
            return f"127.0.0.1:{port}"


def init_settings(options: Namespace) -> tuple[dict[str, Any], list[Path]]:
    """(settings, warm folders) that the options of `init` and `rebuild` ask for. Raises `InvalidArgument`."""
    root = options.volume.absolute()
    changed: dict[str, Any] = {}
    taken: set[int] = set()
    for key, given in (("s3.listen", options.s3_listen), ("admin.listen", options.admin_listen)):
        if given:
            taken.add(parse_listen(given, key)[1])
    changed["s3.listen"] = options.s3_listen or _free_listen(taken)
    changed["admin.listen"] = options.admin_listen or _free_listen(taken)
    if options.mount:
        mountpoint = options.mount.absolute()
        changed["mount.path"] = str(mountpoint)
    if options.hot:
        changed["volume.hot"] = [str(hot.absolute()) for hot in options.hot]
    warm_paths = [path.absolute() for path in options.warm or ()]
    changed["volume.ec"] = _ec(options.ec, warm_paths)
    _refuse_overlaps(root, changed, warm_paths)
    for first, second in same_devices(warm_paths):
        print(f"WARNING: {first} and {second} lie on one device: if it fails, both are lost", file=sys.stderr)
    return changed, warm_paths


def _refuse_overlaps(root: Path, changed: dict[str, Any], warm_paths: list[Path]) -> None:
    """Before anything is made. Raises `InvalidArgument`."""
    used = places.configured(root, parse(render(changed), CONFIG_NAME))
    used += [Place(Role.WARM, path) for path in warm_paths]
    if "mount.path" in changed and (troubles := places.mountpoint_troubles(Path(changed["mount.path"]), used)):
        raise InvalidArgument(troubles[0])
    if found := places.conflicts([place for place in used if place.role != Role.MOUNT]):
        raise InvalidArgument(f"no place may play two roles: {'; '.join(found)}; choose other folders")


def init_document(root: Path, access_key: str, secret_key: str) -> dict[str, Any]:
    config = load(root)
    return {
        "volume": str(root), "config": str(root / CONFIG_NAME), "endpoint": config.endpoint, "admin": config.admin_endpoint,
        "access_key": access_key, "secret_key": secret_key, "mount": config.mount_path or None,
    }  # fmt: skip


def init(options: Namespace) -> int:
    root = options.volume.absolute()
    changed, warm_paths = init_settings(options)
    for path in warm_paths:
        private.require_folder(path, "a disk of the warm tier", create=options.create)
        disk_of(path, instance="")
    volume.create(root, changed, create_folders=options.create)
    with Volume(root, "init") as opened:
        _, access_key, secret_key = Identities(opened).add_user("admin", admin=True)
        for path in warm_paths:
            opened.warm.add(path)
    document = init_document(root, access_key, secret_key)
    text = (
        f"volume      {root}\nendpoint    {document['endpoint']}\naccess key  {access_key}\nsecret key  {secret_key}   (shown only now)\n"
        f"mount       {document['mount'] or '(none)'}\nnext: stratum serve {root}"
    )
    return show(options, document, text)


def _ec(text: str | None, paths: list[Path]) -> str:
    """The code of the warm tier, checked before anything is made. Raises `InvalidArgument`."""
    if bool(text) != bool(paths):
        raise InvalidArgument("--warm and --ec go together; give K+M folders with --warm, or neither")
    if not text:
        return ""
    try:
        k, m = parse_code(text)
    except ValueError as error:
        raise InvalidArgument(f"--ec: {error}") from error
    if len(set(paths)) != len(paths) or len(paths) < k + m:
        raise InvalidArgument(f"{text} wants {k + m} different folders; {len(set(paths))} were given with --warm")
    return text


def set_up_logs(options: Namespace) -> None:
    config = load(options.volume)
    logs.set_up(config.log_format, config.log_level)


def serve(options: Namespace) -> int:
    from stratum import supervisor

    set_up_logs(options)

    def announce(facts: dict[str, Any]) -> None:
        text = f"ready: {facts['endpoint']}" + (f", mounted at {facts['mount']}" if facts["mount"] else "")
        print(to_json(facts, schema_of(options)) if options.json else text, flush=True)

    return supervisor.serve(options.volume.absolute(), announce, words=["--over"] if options.over else [])


def s3(options: Namespace) -> int:
    from stratum.processes import die_with_parent
    from stratum.s3 import server

    if options.supervised:
        import signal

        die_with_parent(signal.SIGTERM)
    set_up_logs(options)
    server.serve(options.volume.absolute())
    return 0


def mount(options: Namespace) -> int:
    from stratum.fuse import takeover

    if options.background and not options.renew and not options.release and not takeover.is_due():
        return background.run(lambda ready: _mount(options, ready), "stratum-mount")
    return _mount(options, lambda: None)


def _mount(options: Namespace, announced: Callable[[], None]) -> int:
    from stratum.fuse import daemon, sharing, takeover
    from stratum.housekeeping import Housekeeper
    from stratum.processes import die_with_parent

    if options.supervised:
        import signal

        die_with_parent(signal.SIGTERM)
    set_up_logs(options)
    config = load(options.volume)
    directory = options.directory or (options.volume / config.mount_path if config.mount_path else None)
    if directory is None:
        raise InvalidArgument(f"no mountpoint: name one, or set mount.path in {options.volume / CONFIG_NAME}")
    directory = places.real(directory)  # as the kernel's table has it
    if options.renew:
        with Volume(options.volume, "renew") as opened:
            takeover.renew(opened, directory)
        return 0

    if options.release:
        daemon.release(helper_of(options.volume, config), directory)
        return show(options, {"released": str(directory)}, f"{directory} can be written to again")

    def ready() -> None:
        notify.send(READY=1, STATUS=f"mounted at {directory}")
        announced()
        if not options.supervised and not options.background:
            print(
                to_json({"ready": True, "mount": str(directory)}, schema_of(options))
                if options.json
                else f"ready: mounted at {directory}",
                flush=True,
            )

    bucket = options.bucket or ("" if options.directory else config.mount_bucket)
    locks = options.shared or (config.mount_shared and not options.shared_without_locks)
    shared = locks or options.shared_without_locks or config.mount_shared_without_locks
    wanted = sharing.Wanted(bucket, options.read_only, shared, locks, options.over)
    taken_over, kept = takeover.received(), None
    helper = helper_of(options.volume, config)
    if taken_over is None and helper is not None:
        taken_over = kept = takeover.claimed(helper, directory, wanted.document(options.volume.resolve()))
    try:
        opened = Volume(options.volume, "mount", taken_over.session if taken_over else None)
    except SessionDead:
        if kept is None:
            raise
        takeover.let_go(
            kept.connection, kept.session.lock
        )  # somebody could not wait for this mount and has detached it
        taken_over = None
        opened = Volume(options.volume, "mount")
    with opened:
        counting.attach(opened.meta / counting.FOLDER, "mount")
        opened.explain = partial(explain_inode, opened)
        housekeeper = None if options.supervised else Housekeeper(opened)
        try:
            passing = daemon.serve(opened, directory, ready=ready, wanted=wanted, taken_over=taken_over)
        finally:
            if housekeeper is not None:
                housekeeper.stop()
    if passing is not None:
        takeover.pass_on(passing, opened.session.next_number())
    return 0


# -- users and keys -----------------------------------------------------------------------------------------------------


def user_add(options: Namespace) -> int:
    with Volume(options.volume, "cli") as opened:
        user, access_key, secret_key = Identities(opened).add_user(
            options.name, display_name=options.display_name, email=options.email, admin=options.admin
        )
    document = {"user_id": user.user_id, "name": user.name, "access_key": access_key, "secret_key": secret_key}
    return show(
        options,
        document,
        f"user        {user.name} ({user.user_id})\naccess key  {access_key}\nsecret key  {secret_key}   (shown only now)",
    )


def user_list(options: Namespace) -> int:
    with Volume(options.volume, "cli") as opened:
        rows = [asdict(user) for user in Identities(opened).users()]
    return show(options, {"users": rows}, table(rows, ["name", "user_id", "display_name", "email", "admin"]))


def user_remove(options: Namespace) -> int:
    with Volume(options.volume, "cli") as opened:
        Identities(opened).remove_user(options.name)
    return show(options, {"removed": options.name}, f"removed {options.name}")


def key_create(options: Namespace) -> int:
    with Volume(options.volume, "cli") as opened:
        access_key, secret_key = Identities(opened).create_key(options.name)
    return show(
        options,
        {"access_key": access_key, "secret_key": secret_key},
        f"access key  {access_key}\nsecret key  {secret_key}   (shown only now)",
    )


def key_list(options: Namespace) -> int:
    with Volume(options.volume, "cli") as opened:
        rows = Identities(opened).access_keys()
    return show(options, {"keys": rows}, table(rows, ["access_key", "user"]))


def key_revoke(options: Namespace) -> int:
    with Volume(options.volume, "cli") as opened:
        Identities(opened).revoke_key(options.access_key)
    return show(options, {"revoked": options.access_key}, f"revoked {options.access_key}")


# -- buckets ------------------------------------------------------------------------------------------------------------


def _names(opened: Volume) -> dict[str, str]:
    return {user.user_id: user.name for user in Identities(opened).users()}


def _bucket_document(name: str, row: BucketRow, owner: str | None) -> dict[str, Any]:
    return {"name": name, "owner": {"id": row.owner, "name": owner}, "created_ns": row.created_ns, "acl": row.acl, "anonymous": row.anonymous, "uid": row.uid, "gid": row.gid,
            "file_mode": f"{row.file_mode:04o}", "dir_mode": f"{row.dir_mode:04o}", "audit_reads": row.audit_reads}  # fmt: skip


def bucket_create(options: Namespace) -> int:
    with Volume(options.volume, "cli") as opened:
        identities = Identities(opened)

        def create(tx: MetadataTransaction) -> BucketRow:
            if options.owner:
                owner = identities.find(tx, options.owner)
            else:
                owner = min((user for user in identities.users() if user.admin), key=lambda user: user.created_ns)
            return buckets.create(tx, options.name, owner.user_id)

        row = opened.mutate(create)
        names = _names(opened)
    return show(options, _bucket_document(options.name, row, names.get(row.owner)), f"made bucket {options.name}")


def bucket_list(options: Namespace) -> int:
    with Volume(options.volume, "cli") as opened, opened.snapshot() as reader:
        rows, names = [], _names(opened)
        for name, row in buckets.scan(reader):
            objects, size = buckets.usage(reader, row)
            rows.append({**_bucket_document(name, row, names.get(row.owner)), "objects": objects, "bytes": size})
    return show(options, {"buckets": rows}, table(rows, ["name", "objects", "bytes", "acl", "anonymous"]))


def bucket_remove(options: Namespace) -> int:
    with Volume(options.volume, "cli") as opened:
        opened.mutate(lambda tx: buckets.remove(tx, options.name), frees=True)
    return show(options, {"removed": options.name}, f"removed bucket {options.name}")


def bucket_set(options: Namespace) -> int:
    names = ("anonymous", "uid", "gid", "file_mode", "dir_mode", "audit_reads")
    settings = {name: value for name in names if (value := getattr(options, name)) is not None}
    if not settings:
        raise InvalidArgument(
            "nothing to set: give --anonymous, --uid, --gid, --file-mode, --dir-mode or --audit-reads"
        )
    with Volume(options.volume, "cli") as opened:
        row = opened.mutate(lambda tx: buckets.change(tx, options.name, **settings))
        owners = _names(opened)
    return show(options, _bucket_document(options.name, row, owners.get(row.owner)), f"changed bucket {options.name}")


# -- clones and snapshots -----------------------------------------------------------------------------------------------


def clone(options: Namespace) -> int:
    with Volume(options.volume, "clone") as opened:
        clones.clone(opened, os.fsencode(options.source), os.fsencode(options.target), wait=options.wait)
    document = {"source": options.source, "target": options.target}
    return show(options, document, f"cloned {options.source} to {options.target}")


def snapshot_create(options: Namespace) -> int:
    with Volume(options.volume, "snapshot") as opened:
        bucket = clones.create_snapshot(opened, os.fsencode(options.path), options.name, wait=options.wait)
    name = bucket.partition(clones.SNAPSHOT_MARK)[2]
    document = {"path": options.path, "name": name, "bucket": bucket}
    return show(options, document, f"snapshot {name} of {options.path} is bucket {bucket}")


def snapshot_list(options: Namespace) -> int:
    with Volume(options.volume, "snapshot") as opened, opened.snapshot() as reader:
        rows = []
        for bucket, row in clones.snapshots(reader, os.fsencode(options.path) if options.path else None):
            objects, size = buckets.usage(reader, row)
            rows.append(
                {
                    "path": row.snapshot_of,
                    "name": bucket.partition(clones.SNAPSHOT_MARK)[2],
                    "bucket": bucket,
                    "created_ns": row.created_ns,
                    "objects": objects,
                    "bytes": size,
                }
            )
    return show(options, {"snapshots": rows}, table(rows, ["path", "name", "created_at", "objects", "bytes"]))


def snapshot_remove(options: Namespace) -> int:
    with Volume(options.volume, "snapshot") as opened:
        bucket = clones.remove_snapshot(opened, os.fsencode(options.path), options.name)
    return show(options, {"removed": bucket}, f"removed snapshot {options.name} of {options.path}")


# -- configuration ------------------------------------------------------------------------------------------------------


def config_show(options: Namespace) -> int:
    config = load(options.volume)
    sections = config.as_dict()
    text = "\n".join(
        f"{section}.{name} = {json.dumps(value)}"
        for section, table in sections.items()
        for name, value in table.items()
    )
    return show(options, sections, text)


def config_check(options: Namespace) -> int:
    missing = config_rules.missing(options.volume.absolute(), load(options.volume))
    if missing:
        raise ConfigInvalid(f"{options.volume / CONFIG_NAME}: {'; '.join(missing)}")
    with Volume(options.volume, "cli") as opened:
        roles.refuse(opened)
        served = any(row["role"] in SERVED and row["state"] == "running" for row in sessions(opened))
        found = preflight.troubles(opened.root, opened.config, served=served)
        if opened.config.mount_path and not served:
            found += places.mountpoint_troubles(opened.root / opened.config.mount_path, places.of(opened))
    if found:
        raise ConfigInvalid("; ".join(found))
    return show(options, {"ok": True}, f"{options.volume / CONFIG_NAME} is valid")


def path_to_key(options: Namespace) -> int:
    with Volume(options.volume, "path") as opened, opened.snapshot() as reader:
        bucket, key = paths.to_key(reader, os.fsencode(options.text))
    text = key.decode("utf-8", "surrogateescape")
    return show(options, {"bucket": bucket, "key": text}, f"{bucket}/{text}")


def path_to_path(options: Namespace) -> int:
    bucket, _, key = options.text.partition("/")
    with Volume(options.volume, "path") as opened, opened.snapshot() as reader:
        path = paths.to_path(reader, bucket, os.fsencode(key)).decode("utf-8", "surrogateescape")
    return show(options, {"path": path}, path)
