"""The text that Prometheus scrapes (exposition format 0.0.4): shared counters, and gauges read from the volume."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

import psutil

from stratum import __version__, buckets, counting, damage, frozen, health, metrics, packs, warm_disks
from stratum.counting import number_text
from stratum.schema import SegmentRow
from stratum.tier_rows import VALID, Tier

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stratum.tier_rows import DiskRow
    from stratum.volume import Volume

BUCKETS_MAX = 100
"""How many buckets have series of their own."""
ROWS_COUNTED_MAX = 100_000
SCANNED_AFTER_S = 15.0
"""What needs a scan of whole tables is counted at most this often."""
LEVELS = {"ok": 0, "low": 1, "high": 2, "emergency": 3}
Labels = dict[str, str]
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


class _Text:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def head(self, name: str, kind: str, text: str) -> None:
        self.lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]

    def sample(self, name: str, labels: Iterable[tuple[str, str]], value: float) -> None:
        inside = ",".join(f'{label}="{text.translate(_ESCAPES)}"' for label, text in labels)
        self.lines.append(f"{name}{{{inside}}} {number_text(value)}" if inside else f"{name} {number_text(value)}")


class Gatherer:
    """One a process. `findings` are those of the last look."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._lock = threading.Lock()
        self._scanned_s = -SCANNED_AFTER_S
        self._scanned: list[tuple[str, Labels, float]] = []
        self.findings: list[health.Finding] = []

    def exposition(self) -> str:
        """Everything, now. Safe from any thread."""
        with self._lock:
            text = _Text()
            words, processes = counting.read_all(self._volume.meta / counting.FOLDER)
            for metric in metrics.COUNTED:
                text.head(metric.name, metric.kind, metric.help)
                for sample in metric.samples(words):
                    text.sample(metric.name + sample.suffix, sample.labels, sample.value)
            rows: dict[str, list[tuple[Labels, float]]] = {}
            for name, labels, value in [*self._cheap(), *self._of_processes(processes), *self._scans()]:
                rows.setdefault(name, []).append((labels, value))
            assert rows.keys() <= metrics.GATHERED.keys(), "a gauge is missing in metrics.GATHERED"
            for name, help_text in metrics.GATHERED.items():
                if name in rows:
                    text.head(name, "gauge", help_text)
                    for labels, value in rows[name]:
                        text.sample(name, labels.items(), value)
            return "\n".join(text.lines) + "\n"

    def _cheap(self) -> list[tuple[str, Labels, float]]:
        volume = self._volume
        found: list[tuple[str, Labels, float]] = [("stratum_build_info", {"version": __version__}, 1)]
        with volume.snapshot() as reader:
            usage = [(name, *reader.usage_of(row.inode)) for name, row in buckets.scan(reader)]
            tierd, scrub = packs.setting(reader, "tierd"), packs.setting(reader, "scrub")
            backup = packs.setting(reader, "backup")
            disks = {number: row for number, row in warm_disks.disks(reader).items() if row.state != "replaced"}
            found += [
                ("stratum_repair_queue", {}, len(reader.first_rows(b"h", b"i", ROWS_COUNTED_MAX))),
                ("stratum_damaged", {}, sum(1 for _, _, row in damage.scan(reader) if not row.heals)),
                ("stratum_move_queue", {}, len(reader.first_rows(b"m", b"n", ROWS_COUNTED_MAX))),
                ("stratum_reclaim_queue", {}, len(reader.first_rows(b"F", b"G", ROWS_COUNTED_MAX))),
                ("stratum_clone_queue", {}, frozen.directories_waiting(reader)),
                ("stratum_changes_unread", {}, len(reader.first_rows(b"L", b"M", ROWS_COUNTED_MAX))),
            ]
        usage.sort(key=lambda item: -item[2])
        for name, objects, size in usage[:BUCKETS_MAX]:
            found += [
                ("stratum_bucket_bytes", {"bucket": name}, size),
                ("stratum_bucket_objects", {"bucket": name}, objects),
            ]
        if len(usage) > BUCKETS_MAX:
            rest = usage[BUCKETS_MAX:]
            found += [
                ("stratum_bucket_bytes", {"bucket": "(other)"}, sum(item[2] for item in rest)),
                ("stratum_bucket_objects", {"bucket": "(other)"}, sum(item[1] for item in rest)),
            ]
        found += [
            ("stratum_buckets", {}, len(usage)),
            ("stratum_objects", {}, sum(item[1] for item in usage)),
            ("stratum_logical_bytes", {}, sum(item[2] for item in usage)),
            ("stratum_metadata_bytes", {}, volume.store.used_bytes()),
            ("stratum_pressure_level", {}, LEVELS.get(str(tierd.get("level", "ok")), 0)),
            ("stratum_scrub_running", {}, scrub.get("state") == "running"),
            ("stratum_scrub_checked_bytes", {}, scrub.get("read_bytes", 0)),
            ("stratum_scrub_damaged", {}, scrub.get("found", 0)),
            ("stratum_scrub_unhealed", {}, len(scrub.get("unhealed", []))),
            ("stratum_scrub_finished_timestamp_seconds", {}, scrub.get("ended_s", 0)),
        ]
        if backup:
            found.append(("stratum_backup_timestamp_seconds", {}, backup["at_s"]))
        for folder, tier in [(volume.meta, "metadata"), *((hot, "hot") for hot in volume.segments.folders)]:
            found += self._disk(str(folder), tier)
        for number, row in disks.items():
            up = self._present(number, row)
            found.append(("stratum_disk_up", {"disk": row.path}, up))
            if up:
                found += self._disk(row.path, "warm")
        raised = {
            (item.code, item.severity.name.lower(), str(bool(item.muted_until_s)).lower()) for item in self.findings
        }
        found += [
            ("stratum_health", {"code": code, "severity": severity, "muted": muted}, 1)
            for code, severity, muted in sorted(raised)
        ]
        return found

    def _present(self, number: int, row: DiskRow) -> bool:
        try:
            return health.probe(lambda: self._volume.warm.is_present(number, row))
        except TimeoutError:
            return False

    @staticmethod
    def _disk(path: str, tier: str) -> list[tuple[str, Labels, float]]:
        try:
            stat = health.probe(lambda: os.statvfs(path))
        except (OSError, TimeoutError):
            return []
        labels = {"disk": path, "tier": tier}
        return [
            ("stratum_disk_total_bytes", labels, stat.f_blocks * stat.f_frsize),
            ("stratum_disk_free_bytes", labels, stat.f_bavail * stat.f_frsize),
            ("stratum_disk_free_inodes", labels, stat.f_favail),
        ]

    @staticmethod
    def _of_processes(living: list[counting.Process]) -> list[tuple[str, Labels, float]]:
        found: list[tuple[str, Labels, float]] = []
        for role in sorted({process.role for process in living}):
            here = [process for process in living if process.role == role]
            labels = {"role": role}
            memory = descriptors = 0
            for process in here:
                try:
                    known = psutil.Process(process.pid)
                    memory += known.memory_full_info().pss
                    descriptors += known.num_fds()
                except psutil.Error:
                    continue
            found += [
                ("stratum_processes", labels, len(here)),
                ("stratum_process_silent_seconds", labels, max(process.silent_s for process in here)),
                ("stratum_process_memory_bytes", labels, memory),
                ("stratum_process_open_descriptors", labels, descriptors),
            ]
        return found

    def _scans(self) -> list[tuple[str, Labels, float]]:
        if time.monotonic() - self._scanned_s < SCANNED_AFTER_S:
            return self._scanned
        volume = self._volume
        bytes_in = dict.fromkeys(Tier, 0)
        count: dict[tuple[str, str], int] = {}
        with volume.snapshot() as reader:
            for _, row in packs.scan(reader):
                tier, state = Tier(row.tier).name.lower(), row.state
                count[tier, state] = count.get((tier, state), 0) + 1
                if state == VALID:
                    bytes_in[Tier(row.tier)] += row.live_bytes
            for _, raw in reader.scan(b"G", b"H"):
                bytes_in[Tier.HOT] += SegmentRow.unpack(raw).live_bytes
        self._scanned = []
        self._scanned += [("stratum_tier_bytes", {"tier": tier.name.lower()}, size) for tier, size in bytes_in.items()]
        self._scanned += [
            ("stratum_packs", {"tier": tier, "state": state}, number) for (tier, state), number in sorted(count.items())
        ]
        self._scanned_s = time.monotonic()
        return self._scanned
