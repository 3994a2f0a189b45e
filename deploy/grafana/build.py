"""Writes the four dashboards beside this file: `python deploy/grafana/build.py`. A test fails if they are not what it writes.

A dashboard is a list of rows, a row a list of panels: title, unit (Grafana's name of it), and queries with their legends.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCE = {"type": "prometheus", "uid": "${source}"}
SCHEMA_VERSION = 39
WIDTH = 24


@dataclass(frozen=True)
class Panel:
    """`kind` is Grafana's panel type."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    kind: str = "timeseries"
    note: str = ""


def rate(metric: str, by: str, where: str = "") -> str:
    inside = ",".join(filter(None, ('instance=~"$instance"', where)))
    return f"sum by ({by}) (rate({metric}{{{inside}}}[$__rate_interval]))"


def quantile(share: float, metric: str, by: str = "", where: str = "") -> str:
    return f"histogram_quantile({share}, {rate(metric + '_bucket', ', '.join(filter(None, ('le', by))), where)})"


def now(metric: str, where: str = "", by: str = "") -> str:
    inside = ",".join(filter(None, ('instance=~"$instance"', where)))
    return f"sum by ({by}) ({metric}{{{inside}}})" if by else f"{metric}{{{inside}}}"


def number(title: str, unit: str, query: str, note: str = "") -> Panel:
    return Panel(title, unit, ((query, ""),), "stat", note)


OVERVIEW = (
    (
        Panel("Health codes", "none", ((now("stratum_health"), "{{code}} {{severity}} muted={{muted}}"),), "table",
              "What stratum status lists; docs/operations/health.md says what to do."),
        number("Objects", "short", f"sum({now('stratum_objects')})"),
        number("Bytes", "bytes", f"sum({now('stratum_logical_bytes')})"),
        number("Full in", "s", 'min(clamp_min(stratum_disk_free_bytes{instance=~"$instance",tier="hot"} / clamp_min(-deriv(stratum_disk_free_bytes{instance=~"$instance",tier="hot"}[6h]), 0.001), 0))',
               "At the rate of the last six hours."),
    ),
    (
        Panel("Requests", "reqps", ((rate("stratum_s3_requests_total", "status"), "s3 {{status}}"), (rate("stratum_fuse_requests_total", "result"), "mount {{result}}"))),
        Panel("Slowest hundredth", "s", ((quantile(0.99, "stratum_s3_request_seconds"), "s3"), (quantile(0.99, "stratum_fuse_request_seconds"), "mount"))),
        Panel("Bytes", "Bps", (
            (rate("stratum_s3_received_bytes_total", "instance"), "s3 in"), (rate("stratum_s3_sent_bytes_total", "instance"), "s3 out"),
            (rate("stratum_fuse_written_bytes_total", "instance"), "mount written"), (rate("stratum_fuse_read_bytes_total", "instance"), "mount read"),
        )),
    ),
    (
        Panel("Disks in use", "percentunit", ((f"1 - {now('stratum_disk_free_bytes')} / {now('stratum_disk_total_bytes')}", "{{tier}} {{disk}}"),)),
        Panel("Commits", "s", ((quantile(0.5, "stratum_commit_seconds"), "median"), (quantile(0.99, "stratum_commit_seconds"), "slowest hundredth"), (quantile(0.99, "stratum_data_sync_seconds"), "sync of data, slowest hundredth"))),
        Panel("Metadata", "bytes", ((now("stratum_metadata_bytes"), "used"),)),
    ),
    (
        Panel("Memory", "bytes", ((now("stratum_process_memory_bytes"), "{{role}}"),)),
        Panel("Open descriptors", "short", ((now("stratum_process_open_descriptors"), "{{role}}"),)),
        Panel("Silence of processes", "s", ((now("stratum_process_silent_seconds"), "{{role}}"),)),
        Panel("Restarts and fenced mounts", "short", (('increase(stratum_process_restarts_total{instance=~"$instance"}[1h])', "restarts"), ('increase(stratum_mounts_fenced_total{instance=~"$instance"}[1h])', "fenced"))),
        Panel("Audit records", "short", (('rate(stratum_audit_records_total{instance=~"$instance"}[5m])', "written"), ('rate(stratum_audit_dropped_total{instance=~"$instance"}[5m])', "missing"))),
    ),
)  # fmt: skip

TIERS = (
    (
        Panel("Bytes by tier", "bytes", ((now("stratum_tier_bytes"), "{{tier}}"),)),
        Panel("Moved", "Bps", ((rate("stratum_moved_bytes_total", "to"), "to {{to}}"),)),
        Panel("Files moved", "ops", ((rate("stratum_moves_total", "to, result"), "to {{to}} {{result}}"),)),
    ),
    (
        Panel("Pressure", "none", ((now("stratum_pressure_level"), "0 ok, 1 low, 2 high, 3 emergency"),)),
        Panel("Queues", "short", ((now("stratum_move_queue"), "moves"), (now("stratum_repair_queue"), "repairs"), (now("stratum_reclaim_queue"), "reclaim"), (now("stratum_clone_queue"), "directories of clones"))),
        Panel("Packs", "short", ((now("stratum_packs"), "{{tier}} {{state}}"),)),
    ),
    (
        Panel("Disks of the warm tier", "none", ((now("stratum_disk_up"), "{{disk}}"),)),
        Panel("Repairs", "ops", ((rate("stratum_heals_total", "result"), "{{result}}"), (rate("stratum_damage_found_total", "by, result"), "damage found by {{by}}: {{result}}"))),
        Panel("Scrub", "bytes", ((now("stratum_scrub_checked_bytes"), "checked in this pass"),)),
        Panel("Damage", "short", ((now("stratum_scrub_damaged"), "found"), (now("stratum_scrub_unhealed"), "not healed"), (now("stratum_damaged"), "without a good copy"), (now("stratum_scrub_running"), "a pass is under way"))),
    ),
    (
        Panel("Requests to remotes", "reqps", ((rate("stratum_cold_requests_total", "operation, result"), "{{operation}} {{result}}"),)),
        Panel("Answers of remotes", "s", ((quantile(0.5, "stratum_cold_request_seconds"), "median"), (quantile(0.99, "stratum_cold_request_seconds"), "slowest hundredth"))),
        Panel("Bytes of remotes", "Bps", ((rate("stratum_cold_sent_bytes_total", "instance"), "sent"), (rate("stratum_cold_received_bytes_total", "instance"), "received"))),
        Panel("Remotes left alone", "short", ((now("stratum_cold_breakers_open"), "processes"),)),
    ),
)  # fmt: skip

S3 = (
    (
        Panel("Requests by operation", "reqps", ((rate("stratum_s3_requests_total", "operation"), "{{operation}}"),)),
        Panel("Requests by status", "reqps", ((rate("stratum_s3_requests_total", "status"), "{{status}}"),)),
        Panel("Failures by operation", "reqps", ((rate("stratum_s3_requests_total", "operation", 'status="5xx"'), "{{operation}}"),)),
    ),
    (
        Panel("Median by operation", "s", ((quantile(0.5, "stratum_s3_request_seconds", "operation"), "{{operation}}"),)),
        Panel("Slowest hundredth by operation", "s", ((quantile(0.99, "stratum_s3_request_seconds", "operation"), "{{operation}}"),)),
        Panel("Until mounts have forgotten", "s", ((quantile(0.5, "stratum_invalidation_seconds"), "median"), (quantile(0.99, "stratum_invalidation_seconds"), "slowest hundredth"))),
    ),
    (
        Panel("Bodies", "Bps", ((rate("stratum_s3_received_bytes_total", "instance"), "in"), (rate("stratum_s3_sent_bytes_total", "instance"), "out"))),
        Panel("Refused by limits", "reqps", ((rate("stratum_s3_limited_total", "kind"), "{{kind}}"),)),
        Panel("In flight", "short", ((now("stratum_s3_requests_in_flight"), "requests"), (now("stratum_s3_connections"), "connections"))),
        Panel("Largest buckets", "bytes", ((f"topk(10, {now('stratum_bucket_bytes')})", "{{bucket}}"),)),
        Panel("Objects of buckets", "short", ((f"topk(10, {now('stratum_bucket_objects')})", "{{bucket}}"),)),
    ),
)  # fmt: skip

MOUNT = (
    (
        Panel("Requests by operation", "reqps", ((rate("stratum_fuse_requests_total", "operation"), "{{operation}}"),)),
        Panel("Errors", "reqps", ((rate("stratum_fuse_requests_total", "operation", 'result="error"'), "{{operation}}"),), note="What POSIX calls an error: a name that is not there, a full disk."),
        Panel("Faults", "reqps", ((rate("stratum_fuse_requests_total", "operation", 'result="fault"'), "{{operation}}"),), note="Answered with EIO: never right."),
    ),
    (
        Panel("Median by operation", "s", ((quantile(0.5, "stratum_fuse_request_seconds", "operation"), "{{operation}}"),)),
        Panel("Slowest hundredth by operation", "s", ((quantile(0.99, "stratum_fuse_request_seconds", "operation"), "{{operation}}"),)),
    ),
    (
        Panel("Bytes", "Bps", ((rate("stratum_fuse_read_bytes_total", "instance"), "read"), (rate("stratum_fuse_written_bytes_total", "instance"), "written"))),
        Panel("Changes of metadata", "ops", ((rate("stratum_mutations_total", "instance"), "changes"), (rate("stratum_commit_seconds_count", "instance"), "commits"))),
        Panel("Changes not yet forgotten", "short", ((now("stratum_changes_unread"), "changes"),)),
    ),
)  # fmt: skip

DASHBOARDS = {"overview": ("Stratum: overview", OVERVIEW), "tiers": ("Stratum: tiers", TIERS), "s3": ("Stratum: S3", S3), "mount": ("Stratum: mount", MOUNT)}  # fmt: skip


def panel_document(panel: Panel, number: int, x: int, y: int, width: int) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + at), "expr": query, "legendFormat": legend, "datasource": SOURCE, "instant": panel.kind != "timeseries", "range": panel.kind == "timeseries"}
        for at, (query, legend) in enumerate(panel.queries)
    ]  # fmt: skip
    return {
        "id": number, "type": panel.kind, "title": panel.title, "description": panel.note, "datasource": SOURCE, "targets": targets,
        "gridPos": {"x": x, "y": y, "w": width, "h": 8}, "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []}, "options": {},
    }  # fmt: skip


def dashboard(name: str) -> dict[str, Any]:
    title, rows = DASHBOARDS[name]
    panels: list[dict[str, Any]] = []
    for at, row in enumerate(rows):
        width = WIDTH // len(row)
        panels += [
            panel_document(panel, len(panels) + place + 1, place * width, at * 8, width)
            for place, panel in enumerate(row)
        ]
    chosen = {"name": "source", "type": "datasource", "query": "prometheus", "label": "Prometheus"}
    instance = {
        "name": "instance", "type": "query", "datasource": SOURCE, "query": "label_values(stratum_build_info, instance)", "refresh": 2, "multi": True,
        "includeAll": True, "allValue": ".*", "label": "Instance",
    }  # fmt: skip
    return {
        "uid": f"stratum-{name}", "title": title, "tags": ["stratum"], "schemaVersion": SCHEMA_VERSION, "timezone": "browser", "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"}, "editable": True, "templating": {"list": [chosen, instance]}, "panels": panels,
        "links": [{"title": "Stratum", "type": "dashboards", "tags": ["stratum"], "asDropdown": True}],
    }  # fmt: skip


def text_of(name: str) -> str:
    return json.dumps(dashboard(name), indent=1) + "\n"


def main() -> None:
    for name in DASHBOARDS:
        (Path(__file__).parent / f"{name}.json").write_text(text_of(name))


if __name__ == "__main__":
    main()
