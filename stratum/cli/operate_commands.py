"""Commands of whoever runs the volume: health, quotas, the live view, the admin listener."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from stratum import buckets, counting, damage, damaged_objects, health, limits, metrics, quotas
from stratum import status as state
from stratum.cli.commands import set_up_logs
from stratum.cli.output import schema_of, show, size, table, to_json
from stratum.errors import InvalidArgument
from stratum.identity import Identities
from stratum.limits import Limit
from stratum.quotas import Quota
from stratum.volume import Volume

if TYPE_CHECKING:
    from argparse import Namespace

    from stratum.health import Finding
    from stratum.transaction import MetadataTransaction


def admin(options: Namespace) -> int:
    import signal

    from stratum.admin import server
    from stratum.processes import die_with_parent

    if options.supervised:
        die_with_parent(signal.SIGTERM)
    set_up_logs(options)
    return server.serve(options.volume.absolute())


def mountd(options: Namespace) -> int:
    from stratum import mountd as helper

    helper.serve(options.socket, options.user, options.root, options.keep)
    return 0


# -- health -------------------------------------------------------------------------------------------------------------


def _since(item: Finding) -> str:
    if not item.since_s:
        return "seen now"
    return "since " + time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(item.since_s))


def _health_lines(findings: list[Finding], documents: list[dict[str, Any]]) -> list[str]:
    lines = []
    for item, document in zip(findings, documents, strict=True):
        muted = (
            f", muted until {time.strftime('%H:%M', time.localtime(item.muted_until_s))}" if item.muted_until_s else ""
        )
        lines += [
            f"{item.severity.name:8}{item.code}  {item.thing}  ({_since(item)}{muted})",
            f"        {item.what}",
            f"        next: {document['next']}   runbook: {document['runbook']}",
        ]
    return lines


def status(options: Namespace) -> int:
    facts, findings = state.status(options.volume)
    worst = health.worst(findings)
    lines = [f"health      {facts['health']}", *_health_lines(findings, facts["findings"])]
    lines += [
        f"volume      {facts['volume']}",
        f"endpoint    {facts['endpoint']}",
        f"mount       {facts['mount'] or '(none)'}",
        f"admin       {facts['admin']}",
        f"objects     {facts['objects']} in {facts['buckets']} buckets, {size(facts['bytes'])}",
        f"metadata    {size(facts['metadata_bytes'])}",
        *(
            f"disk        {disk['path']}: {size(disk['free_bytes'])} of {size(disk['total_bytes'])} free"
            for disk in facts["disks"]
        ),
        f"processes   {len(facts['processes'])}",
        table(facts["processes"], ["role", "pid", "state"]),
    ]
    show(options, facts, "\n".join(lines))
    return int(worst)


def health_list(options: Namespace) -> int:
    with Volume(options.volume, "cli") as opened:
        findings = health.examine(opened)
        documents = [item.document(opened.root) for item in findings]
    worst = health.worst(findings)
    document = {"health": worst.name.lower(), "findings": documents}
    show(options, document, "\n".join([f"health      {worst.name.lower()}", *_health_lines(findings, documents)]))
    return int(worst)


def health_codes(options: Namespace) -> int:
    rows = [
        {"code": code.name, "severity": code.severity.name.lower(), "meaning": code.meaning}
        for code in health.CODES.values()
    ]
    return show(options, {"codes": rows}, table(rows, ["code", "severity", "meaning"]))


def health_damaged(options: Namespace) -> int:
    with Volume(options.volume, "cli") as opened, opened.snapshot() as reader:
        found, _ = damaged_objects.unhealed(reader)
        documents = [item.document() for item in found]
        full = sum(1 for _ in damage.scan(reader)) == damage.ROWS_MAX
    lines = [f"{path}: {document['what']}" for document in documents for path in document["objects"]]
    if full:
        lines.append("there may be more: nothing else is noted before some of this is healed or deleted")
    show(options, {"damaged": documents, "complete": not full}, "\n".join(lines) or "nothing that is known of")
    return 1 if documents else 0


def health_mute(options: Namespace) -> int:
    seconds = options.duration
    if not seconds:
        raise InvalidArgument("--for 0 mutes nothing; `stratum health unmute` ends a mute")
    with Volume(options.volume, "cli") as opened:
        until_s = health.mute(opened, options.code, seconds)
    until = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(until_s))
    return show(options, {"muted": options.code, "until_at": until}, f"{options.code} is muted until {until}")


def health_unmute(options: Namespace) -> int:
    with Volume(options.volume, "cli") as opened:
        health.mute(opened, options.code, 0.0)
    return show(options, {"unmuted": options.code}, f"{options.code} is heard again")


# -- quotas -------------------------------------------------------------------------------------------------------------


def quota_set(options: Namespace) -> int:
    if (options.bucket is None) == (options.user is None):
        raise InvalidArgument("name either --bucket or --user")
    if options.remove == (options.bytes is not None or options.objects is not None):
        raise InvalidArgument("give --bytes, --objects or both, or --remove")
    quota = None if options.remove else Quota(options.bytes or 0, options.objects or 0)
    with Volume(options.volume, "cli") as opened:
        identities = Identities(opened)

        def change(tx: MetadataTransaction) -> None:
            if options.bucket is not None:
                quotas.set_bucket(tx, buckets.get(tx, options.bucket).inode, quota)
            else:
                quotas.set_user(tx, identities.find(tx, options.user).user_id, quota)

        opened.mutate(change, frees=True)
    name = f"bucket {options.bucket}" if options.bucket is not None else f"user {options.user}"
    text = (
        f"{name} has no quota"
        if quota is None
        else f"{name}: {size(quota.bytes) if quota.bytes else 'any number of bytes'}, {_limit(quota.objects)} objects"
    )
    return show(
        options, {"bucket": options.bucket, "user": options.user, "quota": asdict(quota) if quota else None}, text
    )


def _limit(number: int) -> str:
    return str(number) if number else "any number of"


def quota_show(options: Namespace) -> int:
    with Volume(options.volume, "cli") as opened, opened.snapshot() as reader:
        rows = [
            {
                "kind": item.kind, "name": item.name, "bytes": item.bytes, "bytes_max": item.quota.bytes, "objects": item.objects,
                "objects_max": item.quota.objects,
            }
            for item in quotas.everything(reader)
            if options.bucket in {None, item.name if item.kind == "bucket" else None}
            and options.user in {None, item.name if item.kind == "user" else None}
        ]  # fmt: skip
    return show(
        options, {"quotas": rows}, table(rows, ["kind", "name", "bytes", "bytes_max", "objects", "objects_max"])
    )


# -- limits -------------------------------------------------------------------------------------------------------------


def limit_set(options: Namespace) -> int:
    if [options.bucket is not None, options.user is not None, options.anonymous].count(True) != 1:
        raise InvalidArgument("name one of --bucket, --user and --anonymous")
    if options.remove == (options.requests_per_s is not None or options.bytes_per_s is not None):
        raise InvalidArgument("give --requests-per-s, --bytes-per-s or both, or --remove")
    limit = None if options.remove else Limit(options.requests_per_s or 0.0, options.bytes_per_s or 0.0)
    with Volume(options.volume, "cli") as opened:
        identities = Identities(opened)

        def change(tx: MetadataTransaction) -> None:
            if options.bucket is not None:
                buckets.get(tx, options.bucket)
                limits.put(tx, "buckets", options.bucket, limit)
            elif options.user is not None:
                limits.put(tx, "users", identities.find(tx, options.user).user_id, limit)
            else:
                limits.put(tx, "anonymous", "", limit)

        opened.mutate(change, frees=True)
    return show(options, {"limit": asdict(limit) if limit else None}, "limit set" if limit else "limit removed")


def limit_show(options: Namespace) -> int:
    with Volume(options.volume, "cli") as opened:
        names = {user.user_id: user.name for user in Identities(opened).users()}
        with opened.snapshot() as reader:
            rows = [
                {"kind": kind, "name": names.get(name, name), **asdict(limit)}
                for kind, name, limit in limits.everything(reader)
            ]
    return show(options, {"limits": rows}, table(rows, ["kind", "name", "requests_per_s", "bytes_per_s"]))


def support_bundle(options: Namespace) -> int:
    from stratum import support

    if (options.target is None) == (not options.preview):
        raise InvalidArgument("name a FILE to write, or --preview to see what would be in it")
    if options.log is not None and not options.log.is_file():
        raise InvalidArgument(f"the log {options.log} is no file")
    found = support.gather(options.volume, options.log)
    if options.preview:
        text = "".join(f"==> {name} <==\n{content.rstrip()}\n\n" for name, content in found.items())
        return show(options, found, text)
    size = support.write(found, options.target)
    document = {
        "bundle": str(options.target),
        "bytes": size,
        "files": {name: len(content) for name, content in found.items()},
    }
    return show(options, document, f"{options.target}: {size} bytes; --preview shows what is in it: {', '.join(found)}")


# -- the live view ------------------------------------------------------------------------------------------------------


class _Rates:
    """What counters grew by between two looks."""

    def __init__(self, opened: Volume) -> None:
        self._folder = opened.meta / counting.FOLDER
        self.words, self.processes = counting.read_all(self._folder)
        self._at_s = time.monotonic()

    def look(self) -> tuple[list[float], list[float], float]:
        before, before_s = self.words, self._at_s
        self.words, self.processes = counting.read_all(self._folder)
        self._at_s = time.monotonic()
        grown = [after - then for after, then in zip(self.words, before, strict=True)]
        return self.words, grown, max(self._at_s - before_s, 1e-6)


def _sum(metric: counting.Metric, words: list[float], suffix: str = "", **labels: str) -> float:
    return sum(
        sample.value
        for sample in metric.samples(words)
        if sample.suffix == suffix and labels.items() <= dict(sample.labels).items()
    )


def _by(metric: counting.Metric, words: list[float], label: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for sample in metric.samples(words):
        if sample.suffix in {"", "_count"} and sample.value:
            name = dict(sample.labels)[label]
            found[name] = found.get(name, 0.0) + sample.value
    return found


def _mean_ms(metric: counting.Metric, words: list[float], **labels: str) -> float:
    count = _sum(metric, words, "_count", **labels)
    return round(_sum(metric, words, "_sum", **labels) / count * 1000, 2) if count else 0.0


def _frame(opened: Volume, rates: _Rates) -> dict[str, Any]:
    words, grown, seconds = rates.look()
    findings = health.examine(opened)

    def per_s(metric: counting.Metric, **labels: str) -> float:
        return round(_sum(metric, grown, **labels) / seconds, 1)

    faces = []
    for face, requests, spread in (
        ("s3", metrics.S3_REQUESTS, metrics.S3_SECONDS),
        ("mount", metrics.FUSE_REQUESTS, metrics.FUSE_SECONDS),
    ):
        for operation, count in sorted(_by(requests, grown, "operation").items(), key=lambda item: -item[1]):
            faces.append(
                {"face": face, "operation": operation, "per_s": round(count / seconds, 1), "mean_ms": _mean_ms(spread, grown, operation=operation)}
            )  # fmt: skip
    return {
        "health": health.worst(findings).name.lower(), "codes": [item.code for item in findings], "seconds": round(seconds, 2),
        "s3_per_s": per_s(metrics.S3_REQUESTS), "s3_errors_per_s": per_s(metrics.S3_REQUESTS, status="5xx"),
        "s3_in_flight": _sum(metrics.S3_IN_FLIGHT, words), "received_bytes_per_s": per_s(metrics.S3_RECEIVED), "sent_bytes_per_s": per_s(metrics.S3_SENT),
        "mount_per_s": per_s(metrics.FUSE_REQUESTS), "read_bytes_per_s": per_s(metrics.FUSE_READ), "written_bytes_per_s": per_s(metrics.FUSE_WRITTEN),
        "commits_per_s": round(_sum(metrics.COMMIT_SECONDS, grown, "_count") / seconds, 1), "commit_mean_ms": _mean_ms(metrics.COMMIT_SECONDS, grown),
        "moved_bytes_per_s": {tier: per_s(metrics.MOVED, to=tier) for tier in metrics.TIERS},
        "processes": [{"role": process.role, "pid": process.pid, "silent_s": round(process.silent_s, 1)} for process in rates.processes],
        "operations": faces,
    }  # fmt: skip


def _frame_text(frame: dict[str, Any]) -> str:
    moved = ", ".join(f"{tier} {size(rate)}/s" for tier, rate in frame["moved_bytes_per_s"].items() if rate)
    lines = [
        f"health  {frame['health']}  {' '.join(frame['codes'])}",
        (
            f"s3      {frame['s3_per_s']}/s, {frame['s3_errors_per_s']} failing/s, {frame['s3_in_flight']:.0f} in flight, "
            f"in {size(frame['received_bytes_per_s'])}/s, out {size(frame['sent_bytes_per_s'])}/s"
        ),
        f"mount   {frame['mount_per_s']}/s, read {size(frame['read_bytes_per_s'])}/s, written {size(frame['written_bytes_per_s'])}/s",
        f"commits {frame['commits_per_s']}/s, {frame['commit_mean_ms']} ms each",
        f"moves   {moved or 'none'}",
        "",
        table(frame["operations"][:20], ["face", "operation", "per_s", "mean_ms"]),
        "",
        table(frame["processes"], ["role", "pid", "silent_s"]),
    ]
    return "\n".join(lines)


def top(options: Namespace) -> int:
    """Every interval a frame, until interrupted; --once prints one."""
    screen = sys.stdout.isatty() and not options.json
    with Volume(options.volume, "cli") as opened:
        rates = _Rates(opened)
        try:
            while True:
                time.sleep(options.interval)
                frame = _frame(opened, rates)
                text = to_json(frame, schema_of(options)) if options.json else _frame_text(frame)
                print(("\x1b[H\x1b[2J" if screen else "") + text, flush=True)
                if options.once:
                    return 0
        except KeyboardInterrupt:
            return 0
