"""`stratum.toml`: every key, its default and its meaning, in one table. Unknown keys are errors that name the nearest."""

from __future__ import annotations

import difflib
import json
import tomllib
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from stratum import config_rules
from stratum.config_rules import checked, is_loopback, parse_listen
from stratum.errors import ConfigInvalid

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["CONFIG_NAME", "SETTINGS", "Config", "is_loopback", "load", "parse", "parse_listen", "render"]
CONFIG_NAME = "stratum.toml"


@dataclass(slots=True, frozen=True)
class Setting:
    """One key: `section.name`, its type, default and documentation."""

    section: str
    name: str
    default: Any
    help: str

    @property
    def attribute(self) -> str:
        return f"{self.section}_{self.name}"


SETTINGS = (
    Setting("volume", "hot", ["hot"], "folders for data, relative to the volume or absolute"),
    Setting("volume", "ec", "", "shards of the warm tier, K+M: any M disks may be lost; empty: no warm tier"),
    Setting("volume", "durability", "strict", '"strict": acknowledged means on the disk. "relaxed" is not built'),
    Setting(
        "volume", "free_bytes_min", 67108864, "ordinary writes stop when a disk has less free than this; deletes go on"
    ),
    Setting(
        "metadata",
        "map_bytes",
        1099511627776,
        "address space of the metadata store; never change it while a process has the volume open",
    ),
    Setting("metadata", "readers_max", 1024, "reader slots of the metadata store: processes x threads, and slack"),
    Setting("s3", "listen", "127.0.0.1:0", "address of the S3 endpoint; init chooses a free port"),
    Setting("s3", "workers", 2, "worker processes"),
    Setting(
        "s3", "threads", 8, "threads of a worker, for disks and for everything that does not wait in its event loop"
    ),
    Setting(
        "s3", "idle_s_max", 60.0, "how long a client may neither send what it announced nor read what it asked for"
    ),
    Setting(
        "s3",
        "connections_per_address_max",
        1024,
        "connections of one client address (of IPv6 a /64) to each worker; while it has more, each of its requests is 503; 0: no limit; there is none for trusted_proxies",
    ),
    Setting("s3", "region", "us-east-1", "region named in signatures and by GetBucketLocation"),
    Setting("s3", "domain", "", "virtual-host style: BUCKET.domain is that bucket; empty switches it off"),
    Setting("s3", "signature_v2", True, "accept SigV2, which boto3 still presigns with by default"),
    Setting("s3", "clock_skew_s_max", 900, "how far a signed request's date may be off"),
    Setting(
        "s3",
        "trusted_proxies",
        [],
        "addresses and networks of proxies whose Forwarded and X-Forwarded-* headers say how the client reached them",
    ),
    Setting("s3", "tls_certificate", "", "PEM file; with tls_key the endpoint speaks https"),
    Setting("s3", "tls_key", "", "PEM file of the certificate's key"),
    Setting("s3", "object_bytes_max", 5497558138880, "largest object (5 TiB)"),
    Setting("admin", "listen", "127.0.0.1:0", "address of health and metrics; init chooses a free port"),
    Setting(
        "admin",
        "token_file",
        "",
        "what it holds must come as a bearer token; needed where others can reach the address",
    ),
    Setting("admin", "tls_certificate", "", "PEM file; with tls_key the address speaks https"),
    Setting("admin", "tls_key", "", "PEM file of the certificate's key"),
    Setting("admin", "client_ca", "", "PEM file; clients need a certificate from it, and then no token"),
    Setting("alerts", "webhook", "", "URL that is sent a JSON document when what is wrong changes; empty: none"),
    Setting("alerts", "webhook_token_file", "", "what it holds is sent to the webhook as a bearer token"),
    Setting("alerts", "email_to", [], "who gets an e-mail when what is wrong changes"),
    Setting("alerts", "email_from", "stratum@localhost", "the sender of these e-mails"),
    Setting("alerts", "smtp", "127.0.0.1:25", "the mail server; TLS is used where it offers it"),
    Setting(
        "alerts", "smtp_credentials", "", "file of user = NAME and password = TEXT lines; only its owner may read it"
    ),
    Setting("alerts", "settle_s", 15.0, "what is wrong for less than this is not worth an alert"),
    Setting(
        "alerts",
        "interval_s_min",
        60.0,
        "the least time between two messages to one place; what happened meanwhile is in the next",
    ),
    Setting("mount", "path", "", "where `serve` mounts the volume; empty: it does not"),
    Setting(
        "mount",
        "helper",
        "",
        "socket of `stratum mountd`, which mounts for a daemon without root; empty: /run/stratum/mountd.sock, or directly as root",
    ),
    Setting("mount", "bucket", "", "mount this bucket instead of all of them"),
    Setting(
        "mount",
        "shared",
        False,
        "allow other writable mounts of the same tree that say so too; they share locks, and cache no names",
    ),
    Setting(
        "mount",
        "shared_without_locks",
        False,
        "allow other writable mounts of the same tree that say so too; locks do not reach across, and names are not cached",
    ),
    Setting(
        "mount", "dirty_bytes_max", 33554432, "written bytes a mount keeps in memory before they go to a data file"
    ),
    Setting("mount", "acknowledge_s_max", 5.0, "how long a mount may take to forget what changed before it is fenced"),
    Setting(
        "tiering",
        "mode",
        "pressure",
        '"pressure": idle files move when a disk fills; "strict": as soon as they are idle',
    ),
    Setting("tiering", "idle_s", 172800.0, "without access for this long a file may leave the hot tier"),
    Setting("tiering", "cold_after_s", 2592000.0, "without access for this long a file may go to the cold tier"),
    Setting("tiering", "low_percent", 75.0, "of a hot disk in use: relief stops here, and copies ahead begin"),
    Setting("tiering", "high_percent", 85.0, "of a hot disk in use: relief begins"),
    Setting(
        "tiering", "emergency_percent", 95.0, "of a hot disk in use: no promotions, and new data goes to the warm tier"
    ),
    Setting("tiering", "promote_reads", 3, "so many reads within promote_window_s bring a file back to the hot tier"),
    Setting("tiering", "promote_window_s", 86400.0, "see promote_reads"),
    Setting(
        "tiering",
        "residence_s_min",
        3600.0,
        "how long a file that came back to the hot tier stays there, unless a disk fills",
    ),
    Setting("tiering", "interval_s", 2.0, "how often disks are measured and due work is looked for"),
    Setting(
        "tiering",
        "busy_share",
        0.12,
        "of its time that the mover works while users ask for things and no hot disk is above high_percent; 1: all of it",
    ),
    Setting("tiering", "moved_bytes_per_s_max", 0, "bandwidth of background moves; 0: no limit"),
    Setting("cold", "recall_s_max", 30.0, "how long a read waits for a remote before it fails"),
    Setting("cold", "recalls", 64, "reads of a process that may wait for remotes at the same time"),
    Setting("cold", "cache_bytes_max", 268435456, "what was read from remotes is kept up to this size, in the volume"),
    Setting("cold", "delete_after_s", 604800.0, "remote bytes that nothing needs any more are kept this long"),
    Setting("cold", "request_s_max", 20.0, "how long one request to a remote may be silent"),
    Setting("cold", "bytes_per_s_max", 0, "bandwidth to and from each remote; 0: no limit"),
    Setting("cold", "requests_per_s_max", 0, "requests to each remote; 0: no limit"),
    Setting(
        "scrub",
        "period_s",
        1209600.0,
        "a pass over all shards and cold objects takes at most this long; 0: only by hand",
    ),
    Setting("scrub", "bytes_per_s_max", 52428800, "what scrub reads at most"),
    Setting(
        "lifecycle", "debug_day_s", 0.0, "for tests: the length of a day in lifecycle rules and restores; 0: a day"
    ),
    Setting("audit", "enabled", False, "keep a chained log of who did what, through both faces and the command line"),
    Setting("audit", "folder", "audit", "where it lies, relative to the volume or absolute"),
    Setting(
        "audit",
        "full",
        "block",
        'when it cannot be written: "block" refuses what wants a record, "drop" goes on and raises STR-AUDIT-FAILING',
    ),
    Setting("audit", "synced", True, "a record is on the disk before the answer goes out"),
    Setting("audit", "rotate_bytes", 67108864, "size at which a new file is begun"),
    Setting("audit", "keep_days", 365, "files older than this are removed"),
    Setting("log", "format", "human", '"human" or "json"'),
    Setting("log", "level", "info", '"debug", "info", "warning" or "error"'),
)


@dataclass(slots=True, frozen=True)
class Config:
    """The settings of one volume. Attribute names are `section_key`."""

    volume_hot: list[str]
    volume_ec: str
    volume_durability: str
    volume_free_bytes_min: int
    metadata_map_bytes: int
    metadata_readers_max: int
    s3_listen: str
    s3_workers: int
    s3_threads: int
    s3_idle_s_max: float
    s3_connections_per_address_max: int
    s3_region: str
    s3_domain: str
    s3_signature_v2: bool
    s3_clock_skew_s_max: int
    s3_trusted_proxies: list[str]
    s3_tls_certificate: str
    s3_tls_key: str
    s3_object_bytes_max: int
    admin_listen: str
    admin_token_file: str
    admin_tls_certificate: str
    admin_tls_key: str
    admin_client_ca: str
    alerts_webhook: str
    alerts_webhook_token_file: str
    alerts_email_to: list[str]
    alerts_email_from: str
    alerts_smtp: str
    alerts_smtp_credentials: str
    alerts_settle_s: float
    alerts_interval_s_min: float
    mount_path: str
    mount_helper: str
    mount_bucket: str
    mount_shared: bool
    mount_shared_without_locks: bool
    mount_dirty_bytes_max: int
    mount_acknowledge_s_max: float
    tiering_mode: str
    tiering_idle_s: float
    tiering_cold_after_s: float
    tiering_low_percent: float
    tiering_high_percent: float
    tiering_emergency_percent: float
    tiering_promote_reads: int
    tiering_promote_window_s: float
    tiering_residence_s_min: float
    tiering_interval_s: float
    tiering_busy_share: float
    tiering_moved_bytes_per_s_max: int
    cold_recall_s_max: float
    cold_recalls: int
    cold_cache_bytes_max: int
    cold_delete_after_s: float
    cold_request_s_max: float
    cold_bytes_per_s_max: int
    cold_requests_per_s_max: int
    scrub_period_s: float
    scrub_bytes_per_s_max: int
    lifecycle_debug_day_s: float
    audit_enabled: bool
    audit_folder: str
    audit_full: str
    audit_synced: bool
    audit_rotate_bytes: int
    audit_keep_days: int
    log_format: str
    log_level: str

    def as_dict(self) -> dict[str, dict[str, Any]]:
        sections: dict[str, dict[str, Any]] = {}
        for setting in SETTINGS:
            sections.setdefault(setting.section, {})[setting.name] = getattr(self, setting.attribute)
        return sections

    @property
    def scheme(self) -> str:
        return "https" if self.s3_tls_certificate else "http"

    @property
    def endpoint(self) -> str:
        return f"{self.scheme}://{self.s3_listen}"

    @property
    def admin_endpoint(self) -> str:
        return f"{'https' if self.admin_tls_certificate else 'http'}://{self.admin_listen}"


assert {field.name for field in fields(Config)} == {setting.attribute for setting in SETTINGS}


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, 1, 0.4)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sorted(known))}"


def parse(text: str, where: str) -> Config:
    """Raises `ConfigInvalid` for anything that is not exactly a known key of the right type."""
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # of a number of 5,000 digits, or a thousand brackets, too
        raise ConfigInvalid(f"{where} is not TOML: {str(error) or 'it is nested too deeply'}") from error
    known = {(setting.section, setting.name): setting for setting in SETTINGS}
    values = {setting.attribute: setting.default for setting in SETTINGS}
    sections = sorted({setting.section for setting in SETTINGS})
    for section, table in document.items():
        if section not in sections or not isinstance(table, dict):
            raise ConfigInvalid(f"{where}: unknown section [{section}]{_nearest(section, sections)}")
        for name, value in table.items():
            setting = known.get((section, name))
            if setting is None:
                names = [s.name for s in SETTINGS if s.section == section]
                raise ConfigInvalid(f"{where}: unknown key {section}.{name}{_nearest(name, names)}")
            values[setting.attribute] = checked(f"{section}.{name}", value, setting.default, where)
    config = Config(**values)
    config_rules.check_together(config, where)
    return config


def load(volume: Path) -> Config:
    path = volume / CONFIG_NAME
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise ConfigInvalid(
            f"{volume} is not a volume: {CONFIG_NAME} is missing; `stratum init {volume}` makes one"
        ) from error
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigInvalid(f"{path} is not UTF-8: byte {error.start}, in line {line}; save it as UTF-8") from None
    return parse(text, str(path))


def render(changed: dict[str, Any]) -> str:
    """A commented file with every key; `changed` maps `section.key` to a value."""
    unknown = set(changed) - {f"{setting.section}.{setting.name}" for setting in SETTINGS}
    assert not unknown, f"no such settings: {unknown}"
    lines = ["# A Stratum volume. Every key stands here with its default unless init was told otherwise."]
    section = ""
    for setting in SETTINGS:
        if setting.section != section:
            section = setting.section
            lines += ["", f"[{section}]"]
        value = changed.get(f"{section}.{setting.name}", setting.default)
        lines += [f"# {setting.help}", f"{setting.name} = {_toml(value)}"]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return str(value)
