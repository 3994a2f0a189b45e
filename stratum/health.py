"""What can be wrong with a volume: a finite list of codes, each with a severity, a next command and a section of the runbook.

Invariants
* `examine` finds facts and changes nothing; whoever watches (`stratum admin`) notes since when each is so.
* A finding is its code and the thing it is about. A mute hides a code from exit codes and alerts, never from the list.
* A disk that hangs holds nobody up: it is asked in a thread of its own, for `PROBE_S_MAX`.

Rows: `ghealth` {"CODE thing": since_s}, `gmuted` {CODE: until_s}.
"""

from __future__ import annotations

import enum
import os
import re
import shlex
import threading
import time
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from stratum import (
    cold,
    counting,
    damaged_objects,
    metrics,
    mount_table,
    packs,
    places,
    quotas,
    remote_trouble,
    warm_disks,
)
from stratum.errors import InvalidArgument
from stratum.mount_rows import mount_rows
from stratum.schema import pack_json, unpack_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from stratum.transaction import InodeReader, MetadataTransaction
    from stratum.volume import Volume

T = TypeVar("T")
PROBE_S_MAX = 2.0
SILENT_S_MAX = {"s3-worker": 30.0, "mount": 30.0, "s3-master": 30.0, "tierd": 900.0}
"""How long a process may go without a beat. One step of the tiering daemon may move hundreds of megabytes to a slow remote."""
CERTIFICATE_WARNING_S = 21 * 86400.0
BACKUP_AGE_S_MAX = 26 * 3600.0
SCRUB_LATE = 1.5
"""Of its period; a pass takes a while after it was due."""
INODES_FREE_PERCENT_MIN = 5.0
METADATA_WARNING_SHARE = 0.75
QUOTA_WARNING_SHARE = 0.9
STARTING_S = 15.0
DAMAGED_SHOWN_MAX = 10
SERVED = ("supervisor", "s3-master", "s3", "mount", "tierd")


class Severity(enum.IntEnum):
    """The exit code of `stratum status`, in the convention of Nagios plugins."""

    OK = 0
    WARNING = 1
    ERROR = 2


@dataclass(slots=True, frozen=True)
class Code:
    """`next` is a command. VOLUME stands in it for the volume's path, THING for what the finding is about, PLACE for what else it knows;
    NEW is for the reader to replace.
    """

    name: str
    severity: Severity
    meaning: str
    next: str


RUNBOOKS = (Path(__file__).resolve().parent.parent / "docs/operations", Path("/usr/share/doc/stratum/operations"))
"""Of a source tree, and of the package."""
BACKUPS = "/var/lib/stratum/backups"
_WORDS = re.compile(r"VOLUME|THING|PLACE")


@cache
def runbooks() -> Path:
    """The folder of the runbooks that are installed here."""
    return next((folder for folder in RUNBOOKS if (folder / "health.md").is_file()), RUNBOOKS[-1])


_W, _E = Severity.WARNING, Severity.ERROR
CODES = {
    code.name: code
    for code in (
        Code("STR-DISK-FULL", _E, "a disk is full down to the reserve: only deletes are accepted", "stratum bucket list VOLUME"),
        Code("STR-DISK-EMERGENCY", _E, "a hot disk is above its emergency mark", "stratum tier status VOLUME"),
        Code("STR-DISK-HIGH", _W, "a hot disk is above its high mark, and data is being moved off it", "stratum tier status VOLUME"),
        Code("STR-DISK-SILENT", _E, "a disk does not answer", "dmesg --level err,warn"),
        Code("STR-DISK-INODES", _W, "a disk has few inodes left", "df -i THING"),
        Code("STR-METADATA-FULL", _E, "the metadata store has reached its size: only deletes are accepted", "stratum config show VOLUME"),
        Code("STR-METADATA-HIGH", _W, "the metadata store nears its size", "stratum config show VOLUME"),
        Code("STR-S3-DOWN", _E, "the S3 endpoint does not answer", "journalctl -u stratum-s3"),
        Code("STR-MOUNT-DOWN", _E, "the mount is not up", "journalctl -u 'stratum-mount@*'"),
        Code("STR-MOUNT-HIDES", _W, "files lie in the folder beneath the mount, where nobody sees them", "stratum mount VOLUME THING --release"),
        Code("STR-PROCESS-DIED", _W, "a process died, and what it left is being recovered", "stratum status VOLUME"),
        Code("STR-PROCESS-SILENT", _E, "a process lives, but its loop does not go round", "stratum status VOLUME"),
        Code("STR-TIERD-FAILING", _W, "the tiering daemon cannot do a part of its work", "stratum tier status VOLUME"),
        Code("STR-WARM-DISK-MISSING", _W, "a disk of the warm tier is missing", "stratum disk replace VOLUME THING NEW"),
        Code("STR-WARM-UNREADABLE", _E, "more disks of the warm tier are missing than its code can do without", "stratum disk list VOLUME"),
        Code("STR-WARM-ONE-DEVICE", _W, "two disks of the warm tier lie on one device", "stratum disk replace VOLUME THING NEW"),
        Code("STR-WARM-DEGRADED", _W, "packs of the warm tier wait to be repaired", "stratum disk list VOLUME"),
        Code("STR-WARM-UNREPAIRABLE", _E, "packs of the warm tier cannot be repaired", "stratum fsck VOLUME"),
        Code("STR-COLD-FAILING", _W, "a remote of the cold tier fails and is left alone for a while", "stratum cold check VOLUME"),
        Code("STR-COLD-GONE", _E, "the bucket or directory of a remote is not there", "stratum cold check VOLUME"),
        Code("STR-COLD-DENIED", _E, "a remote does not take the volume's credentials", "stratum cold check VOLUME"),
        Code("STR-COLD-UNREACHABLE", _W, "a remote does not answer", "stratum cold check VOLUME"),
        Code("STR-COLD-NO-MARKER", _E, "a remote has lost the marker that says whose it is: nothing is written there", "stratum cold check VOLUME"),
        Code("STR-COLD-FOREIGN", _E, "a remote belongs to another volume: nothing is written there", "stratum cold check VOLUME"),
        Code("STR-COLD-SUPERSEDED", _E, "a rebuilt volume has taken a remote over: nothing is written there", "stratum cold check VOLUME"),
        Code("STR-DATA-DAMAGED", _E, "stored bytes are damaged and no copy of them is good", "stratum health damaged VOLUME"),
        Code("STR-SCRUB-UNHEALED", _E, "the scrub found damage that it could not heal", "stratum scrub status VOLUME"),
        Code("STR-SCRUB-OVERDUE", _W, "no pass of the scrub has ended within its period", "stratum scrub start VOLUME"),
        Code("STR-BACKUP-OLD", _W, "the metadata was not backed up for longer than a day", "stratum meta backup VOLUME PLACE"),
        Code("STR-CERTIFICATE-EXPIRES", _W, "a TLS certificate expires within three weeks", "openssl x509 -noout -enddate -in THING"),
        Code("STR-CERTIFICATE-EXPIRED", _E, "a TLS certificate has expired, or cannot be read", "openssl x509 -noout -enddate -in THING"),
        Code("STR-QUOTA-NEAR", _W, "a quota is nearly used up", "stratum quota show VOLUME"),
        Code("STR-AUDIT-FAILING", _E, "the audit log cannot be written", "stratum audit verify VOLUME"),
        Code("STR-ALERTS-FAILING", _W, "alerts cannot be delivered", "stratum config show VOLUME"),
    )
}  # fmt: skip


@dataclass(slots=True, frozen=True)
class Finding:
    """`since_s` 0: nobody has watched it yet. `muted_until_s` 0: not muted."""

    code: str
    thing: str
    what: str
    since_s: float = 0.0
    muted_until_s: float = 0.0
    place: str = ""
    """For the command that comes next, where `thing` does not say it."""

    @property
    def severity(self) -> Severity:
        return CODES[self.code].severity

    @property
    def key(self) -> str:
        return f"{self.code} {self.thing}"

    def document(self, root: Path) -> dict[str, Any]:
        told = asdict(self)
        place = told.pop("place")
        words = {"VOLUME": str(root), "THING": self.thing, "PLACE": place or BACKUPS}
        command = _WORDS.sub(lambda found: shlex.quote(words[found[0]]), CODES[self.code].next)
        return {
            **told, "severity": self.severity.name.lower(), "meaning": CODES[self.code].meaning, "next": command,
            "runbook": f"{runbooks()}/health.md#{self.code.lower()}",
        }  # fmt: skip


def probe(function: Callable[[], T], seconds: float = PROBE_S_MAX) -> T:
    """What `function` returns or raises. Raises `TimeoutError` when it takes longer; its thread is left behind then."""
    box: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            box.append(function())
        except BaseException as error:  # noqa: BLE001  it is raised where it was asked for
            failure.append(error)

    thread = threading.Thread(target=run, name="probe", daemon=True)
    thread.start()
    thread.join(seconds)
    if failure:
        raise failure[0]
    if not box:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return box[0]


def examine(volume: Volume) -> list[Finding]:
    """Everything that is wrong now, the worst first, with what is known of since when and until when it is muted."""
    found = [
        *_disks(volume), *_processes(volume), *_tiers(volume), *_damage(volume), *_certificates(volume), *_limits(volume), *_beneath(volume),
    ]  # fmt: skip
    return sorted(
        with_notes(volume, _without_echoes(volume, found)), key=lambda item: (-item.severity, item.code, item.thing)
    )


def with_notes(volume: Volume, findings: list[Finding]) -> list[Finding]:
    """The same findings with what was noted of them since."""
    with volume.snapshot() as reader:
        since, muted = packs.setting(reader, "health"), mutes(reader)
    return [
        replace(item, since_s=float(since.get(item.key, 0)), muted_until_s=muted.get(item.code, 0.0))
        for item in findings
    ]


def worst(findings: Iterable[Finding]) -> Severity:
    """Of what is not muted."""
    return max((item.severity for item in findings if not item.muted_until_s), default=Severity.OK)


def note(volume: Volume, findings: list[Finding], now_s: float) -> tuple[list[Finding], list[Finding]]:
    """Write down since when each is so: (what is new, what has ended)."""
    with volume.snapshot() as reader:
        before = packs.setting(reader, "health")
    keys = {item.key for item in findings}
    after = {key: before.get(key, round(now_s, 3)) for key in sorted(keys)}
    if after != before:
        volume.mutate(lambda tx: tx.put(b"ghealth", pack_json(after)), frees=True)
    began = [replace(item, since_s=now_s) for item in findings if item.key not in before]
    ended = [
        Finding(code, thing, CODES[code].meaning, float(since))
        for key, since in before.items()
        if key not in keys and (code := key.partition(" ")[0]) in CODES and (thing := key.partition(" ")[2])
    ]
    return began, ended


# -- mutes --------------------------------------------------------------------------------------------------------------


def mutes(reader: InodeReader) -> dict[str, float]:
    """The codes that are muted now, and until when."""
    now_s = time.time()
    return {code: float(until) for code, until in packs.setting(reader, "muted").items() if until > now_s}


def mute(volume: Volume, code: str, seconds: float) -> float:
    """Until when. 0 seconds unmute. Raises `InvalidArgument` for a code that does not exist."""
    if code not in CODES:
        raise InvalidArgument(f"{code!r} is no health code; `stratum health codes` lists them")
    until_s = time.time() + seconds if seconds else 0.0

    def put(tx: MetadataTransaction) -> None:
        now = mutes(tx)
        now.pop(code, None)
        if until_s:
            now[code] = until_s
        tx.put(b"gmuted", pack_json(now))

    volume.mutate(put, frees=True)
    return until_s


# -- what is looked at --------------------------------------------------------------------------------------------------


def _without_echoes(volume: Volume, found: list[Finding]) -> list[Finding]:
    """One code for one file system: a disk that is full is above its marks as well."""
    full = {place for item in found if item.code == "STR-DISK-FULL" for place in item.place.splitlines()}
    if not full.issuperset(map(str, volume.segments.folders)):
        return found
    return [item for item in found if item.code not in {"STR-DISK-HIGH", "STR-DISK-EMERGENCY"}]


def _file_systems(volume: Volume) -> tuple[list[tuple[list[Path], os.statvfs_result]], list[Finding]]:
    """The folders of the volume on each device, and its numbers; and what is wrong with those that do not answer."""
    answering: dict[int, tuple[list[Path], os.statvfs_result]] = {}
    silent = []
    for folder in dict.fromkeys((volume.meta, *volume.segments.folders)):
        try:
            stat, device = probe(lambda folder=folder: (os.statvfs(folder), folder.stat().st_dev))  # type: ignore[misc]  # bound now
        except (OSError, TimeoutError) as error:
            silent.append(Finding("STR-DISK-SILENT", str(folder), f"it says nothing: {error}"))
            continue
        answering.setdefault(device, ([], stat))[0].append(folder)
    return list(answering.values()), silent


def _disks(volume: Volume) -> Iterator[Finding]:
    wanted = volume.config.volume_free_bytes_min
    answering, silent = _file_systems(volume)
    yield from silent
    for folders, stat in answering:
        folder, others = folders[0], "".join(f"; {other} lies there, too" for other in folders[1:])
        free = stat.f_bavail * stat.f_frsize
        least = min(wanted, stat.f_blocks * stat.f_frsize // 50) if volume.relief.possible() else wanted
        if free < least:
            yield Finding(
                "STR-DISK-FULL",
                str(folder),
                f"{free} bytes are free, {least} are the reserve: only deletes are accepted{others}",
                place="\n".join(map(str, folders)),
            )
        if stat.f_files and stat.f_favail * 100 < stat.f_files * INODES_FREE_PERCENT_MIN:
            yield Finding("STR-DISK-INODES", str(folder), f"{stat.f_favail} of {stat.f_files} inodes are free{others}")
    share = volume.store.used_bytes() / volume.config.metadata_map_bytes
    if share >= METADATA_WARNING_SHARE:
        code = "STR-METADATA-FULL" if share >= 0.9 else "STR-METADATA-HIGH"
        yield Finding(code, str(volume.meta), f"{share:.0%} of metadata.map_bytes are used")


def _processes(volume: Volume) -> Iterator[Finding]:
    from stratum.status import endpoint_answers, mount_answers, sessions

    config = volume.config
    rows = [row for row in sessions(volume) if row["role"] in SERVED]
    roles = {row["role"] for row in rows if row["state"] == "running"}
    dead = [row for row in rows if row["state"] == "dead"]
    if not roles:
        return
    for row in dead:
        who = (
            f"process {row['pid']} died"
            if row["pid"]
            else "no process went on with a mount that was restarted; it ended"
        )
        yield Finding("STR-PROCESS-DIED", str(row["role"]), f"{who} and is being recovered")
    for process in counting.read_all(volume.meta / counting.FOLDER)[1]:
        limit = SILENT_S_MAX.get(process.role)
        if limit is not None and process.silent_s > limit:
            yield Finding(
                "STR-PROCESS-SILENT", process.role, f"process {process.pid} is silent for {process.silent_s:.0f} s"
            )
    # What has just been started has not answered yet; that is not worth a code.
    young = max(int(row["started_ns"]) for row in rows) / 1e9 > time.time() - STARTING_S
    if young:
        return
    if roles & {"supervisor", "s3-master"} and not endpoint_answers(config):
        yield Finding("STR-S3-DOWN", config.endpoint, "it does not answer; see the log of the process s3")
    if config.mount_path and "supervisor" in roles:
        mountpoint = volume.root / config.mount_path
        try:
            up = probe(lambda: mount_answers(mountpoint))
        except TimeoutError:
            up = False
        if not up:
            yield Finding("STR-MOUNT-DOWN", str(mountpoint), "it does not answer; see the log of the process mount")


def _beneath(volume: Volume) -> Iterator[Finding]:
    """What was written at a mountpoint while nothing was mounted there."""
    with volume.snapshot() as reader:
        hidden = {str(row["mountpoint"]): int(row.get("hides", 0)) for row in mount_rows(reader).values()}
    if volume.config.mount_path:
        mountpoint = places.real(volume.root / volume.config.mount_path)
        if mount_table.mount_at(str(mountpoint)) is None:
            hidden.setdefault(str(mountpoint), places.entries_in(mountpoint))
    for folder, count in hidden.items():
        if count:
            yield Finding("STR-MOUNT-HIDES", folder, f"{count} entries lie in the folder itself, not in the volume")


def _tiers(volume: Volume) -> Iterator[Finding]:
    with volume.snapshot() as reader:
        disks = {number: row for number, row in warm_disks.disks(reader).items() if row.state != "replaced"}
        waiting = [unpack_json(raw) for _, raw in reader.scan_prefix(b"h")]
        tierd, scrub = packs.setting(reader, "tierd"), packs.setting(reader, "scrub")
        backup = packs.setting(reader, "backup")
        remotes, known = packs.setting(reader, "remotes"), cold.rows(reader)
    yield from _warm(volume, disks, waiting)
    level, troubles = tierd.get("level"), dict(tierd.get("troubles", {}))
    if level in {"high", "emergency"}:
        used = ", ".join(f"{disk['path']} {disk['used_percent']} %" for disk in tierd.get("disks", []))
        stuck = f"; {troubles.pop('relief')}" if "relief" in troubles else ""
        yield Finding(f"STR-DISK-{level.upper()}", "hot tier", f"above the {level} mark: {used}{stuck}")
    for step, why in troubles.items():
        yield Finding("STR-TIERD-FAILING", str(step), str(why))
    if _gauge(volume, metrics.AUDIT_FAILING):
        what = (
            "requests are refused" if volume.config.audit_full == "block" else "what happens meanwhile is only counted"
        )
        yield Finding("STR-AUDIT-FAILING", volume.config.audit_folder, f"the audit log cannot be written: {what}")
    breakers = _gauge(volume, metrics.COLD_BREAKERS)
    if breakers:
        yield Finding("STR-COLD-FAILING", "cold tier", f"{breakers} processes have stopped asking a remote for a while")
    for name, told in sorted(remotes.items()):
        if name in known:
            yield Finding(remote_trouble.CODES[remote_trouble.Trouble(told["trouble"])], name, str(told["what"]))
    if scrub.get("unhealed"):
        yield Finding(
            "STR-SCRUB-UNHEALED", "scrub", f"{len(scrub['unhealed'])} things, the first: {scrub['unhealed'][0]}"
        )
    period_s = volume.config.scrub_period_s
    ended_s = max(float(scrub.get("ended_s", 0)), (volume.meta / "seal.key").stat().st_mtime)
    if period_s and disks and time.time() - ended_s > period_s * SCRUB_LATE:
        yield Finding("STR-SCRUB-OVERDUE", "scrub", f"the last pass ended {_ago(ended_s)}")
    if backup and time.time() - float(backup["at_s"]) > BACKUP_AGE_S_MAX:
        yield Finding(
            "STR-BACKUP-OLD",
            "metadata",
            f"the last backup was made {_ago(float(backup['at_s']))}",
            place=_folder_of(backup),
        )


def _damage(volume: Volume) -> Iterator[Finding]:
    """A few objects by their names, the others by number: a disk that dies must not be a thousand alerts."""
    with volume.snapshot() as reader:
        found, more = damaged_objects.unhealed(reader, DAMAGED_SHOWN_MAX)
    named: dict[str, str] = {}
    for item in found:
        for path in item.paths:
            named.setdefault(path, item.row.what)
    for path, what in list(named.items())[:DAMAGED_SHOWN_MAX]:
        yield Finding("STR-DATA-DAMAGED", path, what)
    if more or len(named) > DAMAGED_SHOWN_MAX:
        yield Finding("STR-DATA-DAMAGED", "(others)", "more objects are damaged; `stratum health damaged` lists them")


def _warm(volume: Volume, disks: dict[int, Any], waiting: list[dict[str, Any]]) -> Iterator[Finding]:
    missing = []
    for number, row in disks.items():
        try:
            present = probe(lambda number=number, row=row: volume.warm.is_present(number, row))  # type: ignore[misc]  # bound now
        except TimeoutError:
            present = False
        if not present:
            missing.append(row.path)
            yield Finding("STR-WARM-DISK-MISSING", row.path, "it is missing; mount it, or `stratum disk replace` it")
    lost_max = int(volume.config.volume_ec.partition("+")[2] or 0)
    if len(missing) > lost_max and disks:
        yield Finding("STR-WARM-UNREADABLE", "warm tier", f"{len(missing)} disks are missing, {lost_max} may be")
    for first, second in warm_disks.same_devices(Path(row.path) for row in disks.values() if row.path not in missing):
        yield Finding("STR-WARM-ONE-DEVICE", str(second), f"it lies on the device of {first}: one failure takes both")
    failing = [str(why["error"]) for why in waiting if why.get("error")]
    if waiting:
        yield Finding("STR-WARM-DEGRADED", "warm tier", f"{len(waiting)} packs wait to be repaired")
    if failing:
        yield Finding("STR-WARM-UNREPAIRABLE", "warm tier", f"{len(failing)} packs cannot be repaired: {failing[0]}")


def _gauge(volume: Volume, metric: counting.Metric) -> int:
    """The sum over all processes."""
    words, _ = counting.read_all(volume.meta / counting.FOLDER)
    return round(sum(sample.value for sample in metric.samples(words)))


def _certificates(volume: Volume) -> Iterator[Finding]:
    for name in {volume.config.s3_tls_certificate, volume.config.admin_tls_certificate} - {""}:
        path = volume.root / name
        try:
            left_s = certificate_end_s(path) - time.time()
        except (OSError, ValueError) as error:
            yield Finding("STR-CERTIFICATE-EXPIRED", str(path), f"it cannot be read: {error}")
            continue
        if left_s < CERTIFICATE_WARNING_S:
            code = "STR-CERTIFICATE-EXPIRED" if left_s < 0 else "STR-CERTIFICATE-EXPIRES"
            yield Finding(code, str(path), f"{left_s / 86400:.1f} days are left")


def certificate_end_s(path: Path) -> float:
    """When the first certificate of a PEM file ends. Raises `OSError` or `ValueError`."""
    from cryptography import x509

    return x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc.timestamp()


def _limits(volume: Volume) -> Iterator[Finding]:
    with volume.snapshot() as reader:
        near = list(quotas.near(reader, QUOTA_WARNING_SHARE))
        alerts = packs.setting(reader, "alerts")
    for thing, what in near:
        yield Finding("STR-QUOTA-NEAR", thing, what)
    for sink, error in sorted(alerts.get("failing", {}).items()):
        yield Finding("STR-ALERTS-FAILING", sink, str(error))


def _folder_of(backup: dict[str, Any]) -> str:
    return str(Path(str(backup["path"])).parent) if backup.get("path") else ""


def _ago(then_s: float) -> str:
    hours = max(0.0, time.time() - then_s) / 3600
    return f"{hours:.0f} hours ago" if hours < 72 else f"{hours / 24:.0f} days ago"
