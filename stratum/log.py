"""Structured logging: one line an event, `key=value` for people or JSON for machines. Never pass a secret."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

_FORMATS = {"human", "json"}


class StructuredLogger:
    """`log.info("event_name", key=value)`."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(f"stratum.{name}")

    def _emit(self, level: int, event: str, facts: dict[str, Any]) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, event, extra={"facts": facts})

    def debug(self, event: str, **facts: Any) -> None:
        self._emit(logging.DEBUG, event, facts)

    def info(self, event: str, **facts: Any) -> None:
        self._emit(logging.INFO, event, facts)

    def warning(self, event: str, **facts: Any) -> None:
        self._emit(logging.WARNING, event, facts)

    def error(self, event: str, **facts: Any) -> None:
        self._emit(logging.ERROR, event, facts)

    def exception(self, event: str, **facts: Any) -> None:
        """An unexpected exception: one line with its traceback escaped into it."""
        import traceback

        facts["traceback"] = traceback.format_exc()
        self._emit(logging.ERROR, event, facts)


def get_logger(name: str) -> StructuredLogger:
    return StructuredLogger(name)


def _plain(value: Any) -> str:
    text = str(value)
    return json.dumps(text) if not text or any(c in text for c in ' "=\n\r\t') or not text.isprintable() else text


class _Formatter(logging.Formatter):
    def __init__(self, style: str) -> None:
        super().__init__()
        self._json = style == "json"

    def format(self, record: logging.LogRecord) -> str:
        facts: dict[str, Any] = getattr(record, "facts", {})
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        part = record.name.removeprefix("stratum.")
        if self._json:
            return json.dumps(
                {"time": stamp, "level": record.levelname.lower(), "part": part, "event": record.getMessage(), **facts},
                default=str,
                ensure_ascii=False,
            )
        return f"{stamp} {record.levelname:7} {part} {record.getMessage()}" + "".join(
            f" {k}={_plain(v)}" for k, v in facts.items()
        )


def set_up(style: str, level: str) -> None:
    """Send everything below `stratum` to standard error."""
    assert style in _FORMATS, style
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(style))
    root = logging.getLogger("stratum")
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False
