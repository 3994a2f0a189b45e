"""Commands that save the metadata, bring it back, and prove that they can."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from stratum import backup, backup_remote, drill
from stratum import upgrade as upgrading
from stratum.cli.output import show, size
from stratum.cli.progress import Progress
from stratum.cli.tier_commands import cold_row
from stratum.errors import InvalidArgument, StratumError
from stratum.volume import Volume

if TYPE_CHECKING:
    from argparse import Namespace


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def meta_backup(options: Namespace) -> int:
    if options.keep is not None and options.keep < 1:
        raise InvalidArgument("--keep 0 would remove the backup that was just made; give at least 1")
    backup.prepare_target(options.target, create=options.create)
    began, sent = time.monotonic(), ""
    with Volume(options.volume, "backup") as opened, Progress("saving the metadata") as progress:
        if options.to_cold:
            backup_remote.check(opened, options.to_cold, plain=options.unencrypted)
        made = backup.make(opened, options.target, keep=options.keep or 0, watch=progress.at)
        if options.to_cold:
            with Progress(f"sending it to {options.to_cold}") as sending:
                sent = backup_remote.send(
                    opened,
                    made,
                    options.to_cold,
                    keep=options.keep or 0,
                    watch=sending.at,
                )
    document = {
        "backup": str(made.path), "made_at": _moment(made.made_s), "rows": made.rows, "bytes": made.size, "duration_s": round(time.monotonic() - began, 3), "remote_key": sent or None,
    }  # fmt: skip
    text = f"{made.path}: {made.rows} rows, {size(made.size)}, verified; it holds the keys of the volume: keep it as safe as these"
    return show(
        options, document, text + (f"\nsent to remote {options.to_cold} as {sent}, and read back" if sent else "")
    )


def meta_fetch(options: Namespace) -> int:
    backup.prepare_target(options.target, create=options.create)
    with Progress("fetching the backup") as progress:
        told = backup_remote.fetch(cold_row(options), options.target, progress.at)
    document = {"backup": str(told.path), "instance": told.instance, "made_at": _moment(told.made_s), "rows": told.rows}
    text = f"{told.path}: {told.rows} rows as of {document['made_at']}, verified\nnext: stratum meta restore VOLUME {told.path}"
    return show(options, document, text)


def meta_verify(options: Namespace) -> int:
    with Progress("reading the backup") as progress:
        told = backup.verify(options.file, progress.at)
    document = {"backup": str(told.path), "instance": told.instance, "made_at": _moment(told.made_s), "rows": told.rows}
    return show(options, document, f"{told.path} is whole: {told.rows} rows as of {document['made_at']}")


def meta_restore(options: Namespace) -> int:
    with Progress("reading the backup") as progress:
        told, replaced = backup.restore(options.file, options.volume, adopt=options.adopt_data, watch=progress.at)
    document = {
        "restored": str(options.volume), "made_at": _moment(told.made_s), "rows": told.rows, "replaced": str(replaced) if replaced else None,
    }  # fmt: skip
    lines = [f"{options.volume} is as of {document['made_at']}: {told.rows} rows"]
    if replaced:
        lines.append(f"what was there lies in {replaced}; remove it when all is well")
    if not options.metadata_only:
        lines += _adopt(options, document)
    lines.append(f"next: stratum fsck {options.volume}, then serve it; files whose bytes were freed since are named")
    return show(options, document, "\n".join(lines))


def _adopt(options: Namespace, document: dict[str, Any]) -> list[str]:
    """Take up what was moved since the backup; what is to be said of it."""
    from stratum.tiering.adopt import adopt
    from stratum.tiering.mover import exclusive

    try:
        with Volume(options.volume, "restore") as opened, exclusive(opened):
            done = adopt(opened)
    except StratumError as error:  # the metadata is in place all the same
        document["adopted"] = {"not_asked": [error.message]}
        return [f"not looked for what was moved since: {error.message}"]
    document["adopted"] = done.document()
    return [
        f"{len(done.extents)} extents in {done.packs} packs from after the backup were taken up, and {done.files} files as they were sent",
        *(f"not asked: {what}; restore again when it is there" for what in done.not_asked),
        *(f"damaged: {what}" for what in done.damaged),
        *(f"lost: {name}" for name in done.lost),
    ]


def drill_restore(options: Namespace) -> int:
    if options.sample < 0:
        raise InvalidArgument("--sample is a number of files, 0 or more")
    done = drill.drill(
        options.volume, options.source, sample=options.sample, scratch=options.scratch, seed=options.seed
    )
    lines = [
        f"backup   {done.backup}",
        f"RPO      {done.rpo_s:.0f} s: what was written since then would be lost",
        f"RTO      {done.rto_s:.1f} s to read, verify and open it",
        f"files    {done.files}, {done.sampled} read whole ({size(done.read_bytes)}); changed since {done.changed}, moved since {done.moved}",
        *(f"lost     {item}" for item in done.lost),
        *(f"damage   {item}" for item in done.damage),
        "the backup can be restored" if done.ok else "a restore would not bring everything back",
    ]
    show(options, done.document(), "\n".join(lines))
    return 0 if done.ok else 1


def upgrade(options: Namespace) -> int:
    if options.backup is not None:
        backup.prepare_target(options.backup, create=options.create)
    done = upgrading.upgrade(options.volume.absolute(), options.backup)
    document = {"before": done.before, "after": done.after, "backup": str(done.backup) if done.backup else None}
    text = (
        f"{options.volume} has format {done.after} already"
        if done.before == done.after
        else f"{options.volume} went from format {done.before} to {done.after}"
        + (f"; as it was before it is in {done.backup}" if done.backup else "; the backup is that of the first try")
    )
    return show(options, document, text)
