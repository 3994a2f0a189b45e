"""The audit log from the command line: what these commands themselves leave in it, and how it is read."""

from __future__ import annotations

import json
import os
import pwd
import sys
import time
from typing import TYPE_CHECKING, Any

from stratum import audit
from stratum.cli.output import show
from stratum.config import CONFIG_NAME, load
from stratum.errors import InvalidArgument
from stratum.volume import Volume

if TYPE_CHECKING:
    from argparse import Namespace
    from pathlib import Path

READING = frozenset((
    "status", "top", "serve", "s3", "mount", "tierd", "admin", "mountd", "explain", "tier_status", "tier_plan", "disk_list", "cold_list",
    "cold_check", "scrub_status", "health_list", "health_codes", "quota_show", "limit_show", "support_bundle", "user_list", "key_list", "bucket_list", "snapshot_list",
    "path_to_key", "path_to_path", "config_show", "config_check", "meta_verify", "drill_restore", "audit_verify", "audit_tail", "audit_export",
))  # fmt: skip
"""Commands that change nothing, and services, whose faces speak for themselves."""
FOLLOW_S = 0.5


def caller() -> str:
    """Who typed it: also behind sudo."""
    uid = os.getuid()
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = f"uid {uid}"
    behind = os.environ.get("SUDO_USER", "")
    return f"{behind} as {name}" if behind and behind != name else name


def record(options: Namespace, words: list[str], who: str, code: int) -> None:
    """Put a command on record, if the volume keeps one. Words hold names of files, never secrets. Raises `AuditUnavailable`."""
    root: Path | None = getattr(options, "volume", None)
    if root is None or options.run.__name__ in READING or not (root / CONFIG_NAME).exists():
        return
    log = audit.open_log(root, load(root))
    if log is None:
        return
    try:
        log.record({"face": "command", "who": who, "from": "-", "operation": " ".join(words), "status": code}).result()
    finally:
        log.close()


def _folder(options: Namespace) -> Path:
    config = load(options.volume)
    folder: Path = options.volume / config.audit_folder
    if not folder.is_dir():
        raise InvalidArgument(f"there is no audit log in {folder}; set audit.enabled in {CONFIG_NAME} and restart")
    return folder


def audit_verify(options: Namespace) -> int:
    folder = _folder(options)
    with Volume(options.volume, "cli") as opened, opened.snapshot() as reader:
        raw = reader.get(b"gaudit")
    # The anchor comes first: what is appended meanwhile lies behind it.
    done = audit.verify(folder, json.loads(raw) if raw else None)
    document = {
        "files": done.files, "records": done.records, "first": done.first, "last": done.last, "hash": done.hash, "unrecorded": done.unrecorded,
        "problems": done.problems,
    }  # fmt: skip
    lines = [
        f"{done.records} records ({done.first} to {done.last}) in {done.files} files; the last hash is {done.hash}"
    ]
    if done.unrecorded:
        lines.append(f"{done.unrecorded} requests could not be recorded; the log says when")
    lines += done.problems or ["the chain is whole"]
    show(options, document, "\n".join(lines))
    return 1 if done.problems else 0


def _line(event: dict[str, Any]) -> str:
    what = event.get("key") or event.get("path") or event.get("bucket") or ""
    if event.get("bucket") and event.get("key"):
        what = f"{event['bucket']}/{what}"
    if "to" in event:
        what = f"{what} -> {event['to']}"
    told = event.get("operation") or event.get("event")
    return f"{event.get('time', '-')}  {event.get('who', '-')}  {event.get('face', '-')}  {told}  {what}  {event.get('status', '')}".rstrip()


def audit_tail(options: Namespace) -> int:
    if options.lines < 1:
        raise InvalidArgument("-n is a number of records, at least 1")
    folder = _folder(options)
    last = 0
    try:
        while True:
            found = [
                event for event in audit.newest(folder, max(options.lines, 1000 if last else 0)) if event["n"] > last
            ]
            for event in found:
                print(json.dumps(event, ensure_ascii=False) if options.json else _line(event), flush=True)
                last = event["n"]
            if not options.follow:
                return 0
            time.sleep(FOLLOW_S)
    except KeyboardInterrupt:
        return 0


def audit_export(options: Namespace) -> int:
    """One JSON document a line, the hash not with them: they are for other programs. Times compare as text."""
    for event in audit.events(_folder(options)):
        moment = str(event.get("time", ""))
        if (options.since and moment < options.since) or (options.until and moment >= options.until):
            continue
        if (options.user and event.get("who") != options.user) or (
            options.bucket and not _concerns(event, options.bucket)
        ):
            continue
        sys.stdout.write(json.dumps(event, ensure_ascii=False) + "\n")
    return 0


def _concerns(event: dict[str, Any], bucket: str) -> bool:
    return any(str(event.get(field, "")).split("/", 1)[0] == bucket for field in ("bucket", "path", "to")) or str(
        event.get("source", "")
    ).lstrip("/").startswith(f"{bucket}/")
