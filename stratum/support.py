"""A bundle for whoever helps: what the volume and its machine are like, without what is stored and who stored it.

Names of buckets, users, mail addresses and access keys become `bucket-1`, `user-2`, ... the same in every file; below a bucket a path becomes
its length. Settings that name secrets or places to send to are left out. Nothing that is not in `gather` gets in, and `stratum support
bundle --preview` prints all of it.
"""

from __future__ import annotations

import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import time
from importlib import metadata
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from stratum import __version__, buckets, cold, damaged_objects, health, packs, status
from stratum.admin.gather import Gatherer
from stratum.errors import InvalidArgument
from stratum.identity import Identities
from stratum.volume import Volume
from stratum.warm_disks import disks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LOG_LINES = 5000
ASKED_S_MAX = 20.0
HIDDEN_SETTINGS = re.compile(
    r"^(\s*(?:webhook|webhook_token_file|email_to|email_from|smtp|smtp_credentials|token_file|domain)\s*=\s*).*$",
    re.MULTILINE,
)
_PATH = re.compile(r"\b(path|source|key)=(\"(?:[^\"\\]|\\.)*\"|\S+)")
_MAIL = re.compile(r"(?<![\w.+-])[\w.+-]++@[\w-]++(?:\.[\w-]++)+")
_KEY = re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b")


class Redactor:
    """Puts one placeholder for each name. `texts` have longest names first, so that `a` in `ab` is not mistaken."""

    def __init__(self, names: dict[str, list[str]]) -> None:
        self._known: dict[str, str] = {}
        for kind, found in names.items():
            for number, name in enumerate((name for name in found if name), 1):
                for written in {name, quote(name), json.dumps(name)[1:-1]}:
                    self._known.setdefault(written, f"{kind}-{number}")
        words = sorted(self._known, key=len, reverse=True)
        self._names = re.compile(r"(?<![\w.-])(?:" + "|".join(map(re.escape, words)) + r")(?![\w-])") if words else None

    def __call__(self, text: str) -> str:
        text = _PATH.sub(self._path, text)
        if self._names is not None:
            text = self._names.sub(lambda match: self._known[match[0]], text)
        return _KEY.sub("access-key", _MAIL.sub("address", text))

    def _path(self, match: re.Match[str]) -> str:
        """`path=/bucket/what/ever` keeps the bucket, which becomes its placeholder."""
        value = match[2].strip('"')
        _, slash, below = value.lstrip("/").partition("/")
        bucket = value.lstrip("/").partition("/")[0]
        return f"{match[1]}=/{self._known.get(bucket, '...')}{f'/({len(below)} characters)' if slash and below else ''}"


def _names(volume: Volume) -> dict[str, list[str]]:
    identities = Identities(volume)
    users = identities.users()
    with volume.snapshot() as reader:
        names = [name for name, _ in buckets.scan(reader)]
        remotes = cold.rows(reader)
        noted = packs.setting(reader, "health")
        damaged = [path for item in damaged_objects.unhealed(reader)[0] for path in item.paths]
    damaged += [key.partition(" ")[2] for key in noted if key.startswith("STR-DATA-DAMAGED ")]
    return {
        "bucket": names,
        "user": [name for user in users for name in (user.name, user.display_name, user.email, user.user_id)],
        "access-key": [str(row["access_key"]) for row in identities.access_keys()],
        "remote-bucket": [row.bucket for row in remotes.values()],
        "remote-prefix": [row.prefix.strip("/") for row in remotes.values()],
        "remote-endpoint": [row.endpoint for row in remotes.values()],
        "host": [platform.node()],
        "damaged-object": damaged,
    }


def _asked(*words: str) -> str:
    """What a program prints, or why it does not."""
    found = shutil.which(words[0])
    if found is None:
        return f"{words[0]} is not installed\n"
    try:
        done = subprocess.run(
            [found, *words[1:]], capture_output=True, text=True, errors="replace", timeout=ASKED_S_MAX, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{' '.join(words)}: {error}\n"
    return done.stdout + done.stderr


def _versions() -> dict[str, Any]:
    packages = {item.metadata["Name"]: item.version for item in metadata.distributions()}
    return {
        "stratum": __version__, "python": sys.version, "kernel": platform.release(), "system": platform.platform(), "processors": os.cpu_count(),
        "packages": dict(sorted(packages.items(), key=lambda item: str(item[0]).lower())),
    }  # fmt: skip


def _settings(volume: Volume) -> str:
    return HIDDEN_SETTINGS.sub(r'\1"(left out)"', (volume.root / "stratum.toml").read_text())


def _tiers(volume: Volume) -> dict[str, Any]:
    with volume.snapshot() as reader:
        kept = ("state", "device", "added_s")
        return {
            "disks": {number: {name: getattr(row, name, None) for name in kept} for number, row in disks(reader).items()},
            "remotes": [
                {"kind": row.kind, "state": row.state, "can": row.can, "encrypted": bool(row.encryption_key), "storage_class": row.storage_class}
                for row in cold.rows(reader).values()
            ],
            "settings": {
                key[1:].decode(): json.loads(raw) for key, raw in reader.scan_prefix(b"g") if key[1:] in {b"tierd", b"scrub", b"backup", b"health", b"muted"}
            },
        }  # fmt: skip


def gather(root: Path, log: Path | None = None) -> dict[str, str]:
    """Everything that goes into a bundle, by name, already redacted. Raises what opening the volume raises."""
    facts, _ = status.status(root)
    with Volume(root, "support") as volume:
        redact = Redactor(_names(volume))
        gatherer = Gatherer(volume)
        gatherer.findings = health.examine(volume)
        folders = [str(volume.meta), *map(str, volume.segments.folders)]
        sources: dict[str, Callable[[], str]] = {
            "versions.json": lambda: json.dumps(_versions(), indent=1),
            "status.json": lambda: json.dumps(facts, indent=1, default=str),
            "metrics.txt": gatherer.exposition,
            "stratum.toml": lambda: _settings(volume),
            "tiers.json": lambda: json.dumps(_tiers(volume), indent=1, default=str),
            "disks.txt": lambda: _asked("df", "-hT", *folders) + _asked("df", "-i", *folders),
            "units.txt": lambda: _asked("systemctl", "--no-pager", "--full", "status", "stratum*"),
            "log.txt": lambda: _tail(log) if log is not None else _asked("journalctl", "--no-pager", "-o", "short-iso", "-n", str(LOG_LINES), "-u", "stratum*"),
        }  # fmt: skip
        found = {}
        for name, source in sources.items():
            try:
                text = source()
            except Exception as error:  # noqa: BLE001  what is broken is what the bundle is about
                text = f"could not be had: {type(error).__name__}: {error}\n"
            found[name] = redact(text)
    return found


def _tail(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_LINES * 400))
            return "\n".join(file.read().decode("utf-8", "replace").splitlines()[-LOG_LINES:]) + "\n"
    except OSError as error:
        raise InvalidArgument(f"the log {log} cannot be read: {error.strerror}") from error


def write(found: dict[str, str], target: Path) -> int:
    """Make the bundle; its size. Raises `InvalidArgument` if the file exists."""
    try:
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise InvalidArgument(f"{target} exists; name a new file") from None
    with open(fd, "wb") as raw:  # noqa: PTH123  a descriptor: the mode counts from the first byte on
        with tarfile.open(fileobj=raw, mode="w:gz") as archive:
            for name, text in found.items():
                data = text.encode()
                entry = tarfile.TarInfo(f"stratum-support/{name}")
                entry.size, entry.mode, entry.mtime = len(data), 0o600, int(time.time())
                archive.addfile(entry, io.BytesIO(data))
        return raw.tell()
