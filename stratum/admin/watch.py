"""Looks at the volume's health every few seconds, notes since when what is wrong, and hands it to the alerts."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from stratum import counting, health
from stratum.admin.gather import Gatherer
from stratum.errors import StratumError
from stratum.log import get_logger
from stratum.status import endpoint_answers, mount_answers

if TYPE_CHECKING:
    from stratum.admin.alerts import Alerts
    from stratum.volume import Volume

INTERVAL_S = 2.0
log = get_logger("admin")


class Watch:
    """`look` is one round; `run` goes on until `stop`."""

    def __init__(self, volume: Volume, alerts: Alerts) -> None:
        self._volume = volume
        self._alerts = alerts
        self._ending = threading.Event()
        self.gatherer = Gatherer(volume)
        self._thread = threading.Thread(target=self.run, name="watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ending.set()
        self._thread.join(10)

    def run(self) -> None:
        while not self._ending.is_set():
            try:
                self.look(time.time())
            except (StratumError, OSError) as error:
                log.warning("watch_failed", error=getattr(error, "message", str(error)))
            except Exception:
                log.exception("watch_failed")
            self._ending.wait(INTERVAL_S)

    def look(self, now_s: float) -> None:
        findings = health.examine(self._volume)
        began, ended = health.note(self._volume, findings, now_s)
        for item in began:
            log.warning("health_code_raised", code=item.code, thing=item.thing, what=item.what)
        for item in ended:
            log.info("health_code_ended", code=item.code, thing=item.thing)
        self.gatherer.findings = health.with_notes(self._volume, findings)
        counting.beat()
        self._alerts.consider(self.gatherer.findings, now_s)

    def report(self) -> dict[str, Any]:
        findings = self.gatherer.findings
        root = self._volume.root
        return {
            "health": health.worst(findings).name.lower(),
            "findings": [item.document(root) for item in findings],
        }

    def readiness(self) -> dict[str, Any]:
        """Whether every face answers now."""
        config = self._volume.config
        parts = {"s3": endpoint_answers(config)}
        if config.mount_path:
            mountpoint = self._volume.root / config.mount_path
            try:
                parts["mount"] = health.probe(lambda: mount_answers(mountpoint))
            except TimeoutError:
                parts["mount"] = False
        return {"ready": all(parts.values()), **parts}
