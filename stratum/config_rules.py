"""What a value of `stratum.toml` may be: for every key a range or a form, and how keys go together. Nothing here looks at a disk but `missing`."""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from stratum.erasure import parse_code
from stratum.errors import ConfigInvalid
from stratum.tier_rows import READS_REMEMBERED

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from stratum.config import Config

AGE_S_MAX = 36525 * 86400.0
"""A hundred years."""
BYTES_MAX = 1 << 60
RANGES: dict[str, tuple[float, float]] = {
    "volume.free_bytes_min": (0, BYTES_MAX),
    "metadata.map_bytes": (1 << 28, 1 << 46),
    "metadata.readers_max": (64, 65536),
    "s3.workers": (1, 128),
    "s3.threads": (1, 256),
    "s3.connections_per_address_max": (0, 1_000_000),
    "s3.idle_s_max": (0.1, 86400.0),
    "s3.clock_skew_s_max": (0, 604800),
    "s3.object_bytes_max": (1, BYTES_MAX),
    "mount.dirty_bytes_max": (1 << 20, 1 << 36),
    "mount.acknowledge_s_max": (0.1, 3600.0),
    "alerts.settle_s": (0.0, 86400.0),
    "alerts.interval_s_min": (0.0, 2592000.0),
    "tiering.idle_s": (0.0, AGE_S_MAX),
    "tiering.cold_after_s": (0.0, AGE_S_MAX),
    "tiering.low_percent": (0.001, 100.0),
    "tiering.high_percent": (0.001, 100.0),
    "tiering.emergency_percent": (0.001, 100.0),
    "tiering.promote_reads": (1, READS_REMEMBERED),
    "tiering.promote_window_s": (0.0, AGE_S_MAX),
    "tiering.residence_s_min": (0.0, AGE_S_MAX),
    "tiering.interval_s": (0.05, 3600.0),
    "tiering.busy_share": (0.01, 1.0),
    "tiering.moved_bytes_per_s_max": (0, BYTES_MAX),
    "cold.recall_s_max": (0.1, 86400.0),
    "cold.recalls": (1, 4096),
    "cold.cache_bytes_max": (4 << 20, BYTES_MAX),
    "cold.delete_after_s": (0.0, AGE_S_MAX),
    "cold.request_s_max": (0.1, 3600.0),
    "cold.bytes_per_s_max": (0, BYTES_MAX),
    "cold.requests_per_s_max": (0, 1_000_000),
    "scrub.period_s": (0.0, AGE_S_MAX),
    "scrub.bytes_per_s_max": (1 << 20, BYTES_MAX),
    "lifecycle.debug_day_s": (0.0, 86400.0),
    "audit.rotate_bytes": (65536, 1 << 40),
    "audit.keep_days": (1, 36525),
}
CHOICES = {
    "volume.durability": ("strict",),
    "tiering.mode": ("pressure", "strict"),
    "audit.full": ("block", "drop"),
    "log.format": ("human", "json"),
    "log.level": ("debug", "info", "warning", "error"),
}
_ADDRESS = re.compile(r"[^@\s\"<>(),:;\\\x00-\x1f\x7f]{1,64}@[^@\s\"<>(),:;\\\x00-\x1f\x7f]{1,255}")
_LABEL = re.compile(r"[a-zA-Z0-9_-]{1,63}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def is_address(text: str) -> bool:
    """What a mail server can be given; whether somebody reads it, only a message tells."""
    return len(text) <= 254 and _ADDRESS.fullmatch(text) is not None


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_host(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return len(text) <= 253 and all(_LABEL.fullmatch(label) for label in text.split("."))
    return True


def parse_listen(text: str, key: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    number = int(port) if port.isascii() and port.isdigit() and len(port) <= 5 else 65536
    if not colon or not _is_host(bare) or number > 65535:
        raise ConfigInvalid(f"{key} = {text!r} is not HOST:PORT; write for instance 127.0.0.1:9000 or [::1]:9000")
    return bare, number


# -- the form of texts --------------------------------------------------------------------------------------------------


def _listen(text: str) -> str:
    try:
        parse_listen(text, "")
    except ConfigInvalid:
        return "HOST:PORT, for instance 127.0.0.1:9000"
    return ""


def _mail_server(text: str) -> str:
    return _listen(text) or ("" if not text.endswith(":0") else "HOST:PORT with the port of the mail server")


def _absolute(text: str) -> str:
    return (
        "" if not text or text.startswith("/") else f"an absolute path, for instance /srv/{text.lstrip('./') or 'data'}"
    )


def _any_path(_: str) -> str:
    return ""


def _folder(text: str) -> str:
    return "" if text else "the path of a folder"


def _region(text: str) -> str:
    return "" if _LABEL.fullmatch(text) else "a region: letters, digits and -, for instance us-east-1"


def _domain(text: str) -> str:
    return "" if not text or _is_host(text) else "a domain name, for instance s3.example.org"


def _address(text: str) -> str:
    return "" if is_address(text) else "an e-mail address, for instance ada@example.org"


def _bucket(text: str) -> str:
    return "" if not text or ("/" not in text and len(text) <= 255) else "the name of a bucket"


def _webhook(text: str) -> str:
    wanted = "an http:// or https:// URL"
    if not text:
        return ""
    try:
        parts = urlsplit(text)
        fine = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fine = False
    return "" if fine else wanted


def _proxy(text: str) -> str:
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        return "no address and no network; an address or a network, for instance 10.0.0.0/8"
    return ""


def _code(text: str) -> str:
    try:
        parse_code(text or "2+1")
    except ValueError as error:
        return f"K+M: {error}"
    return ""


FORMS: dict[str, Callable[[str], str]] = {
    "volume.hot": _folder,
    "volume.ec": _code,
    "s3.listen": _listen,
    "s3.region": _region,
    "s3.domain": _domain,
    "s3.tls_certificate": _any_path,
    "s3.tls_key": _any_path,
    "s3.trusted_proxies": _proxy,
    "admin.listen": _listen,
    "admin.token_file": _any_path,
    "admin.tls_certificate": _any_path,
    "admin.tls_key": _any_path,
    "admin.client_ca": _any_path,
    "alerts.webhook": _webhook,
    "alerts.webhook_token_file": _any_path,
    "alerts.email_to": _address,
    "alerts.email_from": _address,
    "alerts.smtp": _mail_server,
    "alerts.smtp_credentials": _any_path,
    "mount.path": _absolute,
    "mount.helper": _absolute,
    "mount.bucket": _bucket,
    "audit.folder": _folder,
}
"""Of every text, and of each text of a list: what it must be instead; empty if it is."""


def checked(key: str, value: Any, default: Any, where: str) -> Any:
    """The value in the type of its default. Raises `ConfigInvalid`, which names key, value, what is allowed and the default."""
    wanted = type(default)
    fits = type(value) is wanted or (wanted is float and type(value) is int)
    if not fits or (wanted is list and not all(isinstance(item, str) for item in value)):
        raise ConfigInvalid(
            f"{where}: {key} = {value!r:.80} is not of type {wanted.__name__}; the default is {default!r}"
        )
    if key in CHOICES and value not in CHOICES[key]:
        raise ConfigInvalid(f"{where}: {key} = {value!r:.80} is not one of {', '.join(CHOICES[key])}")
    if key in RANGES:
        least, most = RANGES[key]
        if not least <= value <= most:  # NaN is neither
            raise ConfigInvalid(
                f"{where}: {key} = {value!r:.80} is outside its range, from {least} to {most}; the default is {default!r}"
            )
    for text in value if wanted is list else [value] if wanted is str else []:
        _check_text(key, text, default, where)
    if key == "volume.hot" and (not value or len(set(value)) != len(value)):
        raise ConfigInvalid(f"{where}: {key} = {value!r} needs at least one folder, each of them once")
    return float(value) if wanted is float else value


def _check_text(key: str, text: str, default: Any, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigInvalid(f"{where}: {key} = {text!r:.80} is no UTF-8; give it a name that is") from None
    if _CONTROL.search(text):
        raise ConfigInvalid(f"{where}: {key} = {text!r:.80} holds control characters")
    instead = FORMS[key](text) if key in FORMS else ""
    if instead:
        raise ConfigInvalid(f"{where}: {key} = {text!r:.80} is not {instead}; the default is {default!r}")


# -- how they go together -----------------------------------------------------------------------------------------------


def check_together(config: Config, where: str) -> None:
    """Raises `ConfigInvalid`."""
    for section, certificate, key in (
        ("s3", config.s3_tls_certificate, config.s3_tls_key),
        ("admin", config.admin_tls_certificate, config.admin_tls_key),
    ):
        if bool(certificate) != bool(key):
            raise ConfigInvalid(
                f"{where}: {section}.tls_certificate and {section}.tls_key go together; set both or neither"
            )
    marks = (config.tiering_low_percent, config.tiering_high_percent, config.tiering_emergency_percent)
    if not 0 < marks[0] < marks[1] < marks[2] <= 100:
        raise ConfigInvalid(
            f"{where}: tiering.low_percent, high_percent and emergency_percent must rise, between 0 and 100; they are {marks}"
        )
    if config.admin_client_ca and not config.admin_tls_certificate:
        raise ConfigInvalid(f"{where}: admin.client_ca needs admin.tls_certificate and admin.tls_key")
    host, _ = parse_listen(config.admin_listen, "admin.listen")
    if not is_loopback(host) and not (config.admin_token_file or config.admin_client_ca):
        raise ConfigInvalid(
            f"{where}: admin.listen = {config.admin_listen!r} can be reached from elsewhere; set admin.token_file or admin.client_ca"
        )
    _check_listeners(config, where)


def _check_listeners(config: Config, where: str) -> None:
    first = parse_listen(config.s3_listen, "s3.listen")
    second = parse_listen(config.admin_listen, "admin.listen")
    everywhere = {"0.0.0.0", "::"}  # noqa: S104  compared, not bound
    if first[1] and first[1] == second[1] and (first[0] == second[0] or everywhere & {first[0], second[0]}):
        raise ConfigInvalid(
            f"{where}: s3.listen = {config.s3_listen!r} and admin.listen = {config.admin_listen!r} are one address; "
            "give one of them another port"
        )


# -- what must be there -------------------------------------------------------------------------------------------------

FILES = (
    "s3.tls_certificate", "s3.tls_key", "admin.token_file", "admin.tls_certificate", "admin.tls_key", "admin.client_ca",
    "alerts.webhook_token_file", "alerts.smtp_credentials",
)  # fmt: skip


def missing(root: Path, config: Config) -> list[str]:
    """What the configuration names and is not there, or is not what it must be; one sentence each."""
    found = []
    for key in FILES:
        name = getattr(config, key.replace(".", "_"))
        if name and not (root / name).is_file():
            found.append(f"{key} = {name!r}: there is no such file")
    for name in config.volume_hot:
        if not (root / name).is_dir():
            found.append(
                f"volume.hot = {name!r}: there is no such folder; mount its disk, or make it, empty, if the disk is a new one"
            )
    return found
