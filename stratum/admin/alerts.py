"""Tells people when what is wrong changes, without Prometheus: a webhook and e-mail.

Invariants
* What each sink was told is a row of the volume, written after the sink took it: nothing is lost by a restart, and at worst
  told twice.
* A message is the difference between what is wrong now and what the sink was told: whatever happened while it could not be
  reached is in the next one, once. So there is no queue to overflow, and no sink gets more than one message an interval.
* A finding younger than `alerts.settle_s`, or muted, is not told.

Row `galerts`: {"told": {sink: {"CODE thing": since_s}}, "failing": {sink: error}}.
"""

from __future__ import annotations

import json
import smtplib
import socket
import ssl
import threading
import urllib.error
import urllib.request
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from typing import TYPE_CHECKING, Any, Protocol

from stratum import health, metrics, packs
from stratum.admin.app import read_token
from stratum.clocks import come
from stratum.config import parse_listen
from stratum.errors import ConfigInvalid, StratumError
from stratum.log import get_logger
from stratum.schema import pack_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from stratum.config import Config
    from stratum.health import Finding
    from stratum.transaction import MetadataTransaction
    from stratum.volume import Volume

TIMEOUT_S = 10.0
RETRY_S = 30.0
RETRY_S_MAX = 900.0
log = get_logger("alerts")


class Sink(Protocol):
    """Where messages go. `send` raises `OSError` or `StratumError`."""

    name: str

    def send(self, document: Mapping[str, Any]) -> None: ...


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A token must not follow to wherever the answer points."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class Webhook:
    name = "webhook"

    def __init__(self, url: str, token: str) -> None:
        self._url = url
        self._token = token
        self._opener = urllib.request.build_opener(_NoRedirect)

    def send(self, document: Mapping[str, Any]) -> None:
        headers = {"Content-Type": "application/json", "User-Agent": "Stratum"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        request = urllib.request.Request(self._url, json.dumps(document).encode(), headers, method="POST")  # noqa: S310  checked when the configuration was read
        with self._opener.open(request, timeout=TIMEOUT_S) as answer:
            answer.read(65536)


class Email:
    name = "email"

    def __init__(self, config: Config, root: Path) -> None:
        self._host, self._port = parse_listen(config.alerts_smtp, "alerts.smtp")
        self._from, self._to = config.alerts_email_from, config.alerts_email_to
        self._credentials = (
            _credentials(root / config.alerts_smtp_credentials) if config.alerts_smtp_credentials else None
        )

    def send(self, document: Mapping[str, Any]) -> None:
        message = EmailMessage()
        message["From"], message["To"] = self._from, ", ".join(self._to)
        message["Subject"] = f"[{document['health']}] Stratum on {document['host']}: {summary(document)}"
        message["Date"], message["Message-ID"] = formatdate(), make_msgid(domain="stratum.invalid")
        message["Auto-Submitted"] = "auto-generated"
        message.set_content(text_of(document))
        try:
            with smtplib.SMTP(self._host, self._port, timeout=TIMEOUT_S) as server:
                server.ehlo()
                if server.has_extn("starttls"):
                    server.starttls(context=ssl.create_default_context())
                    server.ehlo()
                elif self._credentials:
                    raise ConfigInvalid("the mail server offers no TLS, and a password is not sent without")
                if self._credentials:
                    server.login(*self._credentials)
                server.send_message(message)
        except smtplib.SMTPException as error:
            raise OSError(f"the mail server refused: {error}") from error


def _credentials(path: Path) -> tuple[str, str]:
    try:
        if path.stat().st_mode & 0o077:
            raise ConfigInvalid(f"others may read {path}; chmod 600 {path}")
        pairs = (line.partition("=") for line in path.read_text().splitlines())
    except OSError as error:
        raise ConfigInvalid(f"alerts.smtp_credentials: {path} cannot be read: {error.strerror}") from error
    found = {name.strip(): value.strip() for name, _, value in pairs}
    if not {"user", "password"} <= found.keys():
        raise ConfigInvalid(f"{path} has no lines user = NAME and password = TEXT")
    return found["user"], found["password"]


def summary(document: Mapping[str, Any]) -> str:
    raised, ended = len(document["raised"]), len(document["ended"])
    first = (document["raised"] or document["ended"])[0]["code"]
    return f"{raised} raised, {ended} ended, {first} first"


def text_of(document: Mapping[str, Any]) -> str:
    lines = [f"Volume {document['volume']} on {document['host']}: {document['health']}", ""]
    for title in ("raised", "ended"):
        for item in document[title]:
            lines += [f"{title.upper()}  {item['severity']}  {item['code']}  {item['thing']}", f"    {item['what']}"]
            if title == "raised":
                lines += [f"    next: {item['next']}", f"    runbook: {item['runbook']}"]
    return "\n".join(lines) + "\n"


def sinks_of(config: Config, root: Path) -> list[Sink]:
    """Raises `ConfigInvalid`."""
    found: list[Sink] = []
    if config.alerts_webhook:
        token = read_token(root / config.alerts_webhook_token_file) if config.alerts_webhook_token_file else ""
        found.append(Webhook(config.alerts_webhook, token))
    if config.alerts_email_to:
        found.append(Email(config, root))
    return found


class Alerts:
    """`consider` never blocks: each sink has a thread while it is being told."""

    def __init__(self, volume: Volume, sinks: list[Sink]) -> None:
        self._volume = volume
        self._sinks = sinks
        self._not_before_s: dict[str, float] = {}
        self._pause_s: dict[str, float] = {}
        self._threads: dict[str, threading.Thread] = {}

    def consider(self, findings: list[Finding], now_s: float) -> None:
        config = self._volume.config
        pause_s_max = max(RETRY_S_MAX, config.alerts_interval_s_min)
        settled = {
            item.key: item
            for item in findings
            if not item.muted_until_s and come(item.since_s + config.alerts_settle_s, now_s, config.alerts_settle_s)
        }
        young = {item.key for item in findings} - settled.keys()
        with self._volume.snapshot() as reader:
            told = packs.setting(reader, "alerts").get("told", {})
        for sink in self._sinks:
            before = dict(told.get(sink.name, {}))
            raised = [item for key, item in settled.items() if key not in before]
            # What is muted, or came back a moment ago, has not ended.
            ended = {key: since for key, since in before.items() if key not in settled and key not in young}
            thread = self._threads.get(sink.name)
            if (
                not (raised or ended)
                or not come(self._not_before_s.get(sink.name, 0.0), now_s, pause_s_max)
                or (thread is not None and thread.is_alive())
            ):
                continue
            after = {key: since for key, since in before.items() if key not in ended}
            after |= {item.key: item.since_s for item in raised}
            document = self._document(findings, raised, ended, now_s)
            thread = threading.Thread(target=self._tell, args=(sink, document, after, now_s), daemon=True)
            self._threads[sink.name] = thread
            thread.start()

    def settle(self) -> None:
        """Wait until everybody has been told."""
        for thread in self._threads.values():
            thread.join(2 * TIMEOUT_S)

    def _document(
        self, findings: list[Finding], raised: list[Finding], ended: dict[str, float], now_s: float
    ) -> dict[str, Any]:
        root = self._volume.root
        gone = []
        for key, since_s in ended.items():
            code, _, thing = key.partition(" ")
            if code in health.CODES:
                item = health.Finding(code, thing, health.CODES[code].meaning, float(since_s))
                gone.append(item.document(root))
        return {
            "volume": str(root), "instance": self._volume.instance, "host": socket.gethostname(), "time_s": round(now_s, 3),
            "health": health.worst(findings).name.lower(), "raised": [item.document(root) for item in raised], "ended": gone,
        }  # fmt: skip

    def _tell(self, sink: Sink, document: dict[str, Any], after: dict[str, float], now_s: float) -> None:
        try:
            sink.send(document)
        except (OSError, StratumError) as failure:
            error = str(failure)
            pause_s = min(self._pause_s.get(sink.name, RETRY_S / 2) * 2, RETRY_S_MAX)
            self._pause_s[sink.name] = pause_s
            self._not_before_s[sink.name] = now_s + pause_s
            log.warning("alert_not_sent", sink=sink.name, error=error, again_s=pause_s)
            metrics.ALERTS.add(sink.name, "failed")
        else:
            error = ""
            self._pause_s.pop(sink.name, None)
            self._not_before_s[sink.name] = now_s + self._volume.config.alerts_interval_s_min
            log.info("alert_sent", sink=sink.name, raised=len(document["raised"]), ended=len(document["ended"]))
            metrics.ALERTS.add(sink.name, "sent")

        def note(tx: MetadataTransaction) -> None:
            row = packs.setting(tx, "alerts")
            told, failing = row.get("told", {}), row.get("failing", {})
            failing.pop(sink.name, None)
            if error:
                failing[sink.name] = error
            else:
                told[sink.name] = after
            tx.put(b"galerts", pack_json({"told": told, "failing": failing}))

        try:
            self._volume.mutate(note, frees=True)
        except StratumError as failure:
            log.warning("alert_not_noted", sink=sink.name, error=failure.message)
