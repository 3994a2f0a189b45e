"""What commands print: one JSON document, or text for a person.

A document names its `schema`, like `stratum.bucket.list/1`; the number grows when a field changes its meaning or goes. Moments are ISO 8601
in UTC under names that end in `_at`, durations are seconds under names that end in `_s`. What is no number in JSON is null.
"""

from __future__ import annotations

import json
import math
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argparse import Namespace

SCHEMA_VERSION = 1
MOMENTS_NS = {name: f"{name}_at" for name in ("created", "started", "asked")}
"""What the engine keeps in ns since 1970."""
MOMENTS_S = {f"{name}_s": f"{name}_at" for name in ("since", "muted_until", "until", "added", "began", "ended", "made")}
"""And in seconds since 1970; 0 is never."""


def moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def canonical(value: Any) -> Any:
    """The same with moments as text under their names, and without numbers that JSON has none for."""
    if isinstance(value, dict):
        return dict(_field(str(name), inner) for name, inner in value.items())
    if isinstance(value, list | tuple):
        return [canonical(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _field(name: str, value: Any) -> tuple[str, Any]:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if name.endswith("_ns") and name[:-3] in MOMENTS_NS and number:
        return MOMENTS_NS[name[:-3]], moment(value / 1e9) if value else None
    if name in MOMENTS_S and number:
        return MOMENTS_S[name], moment(value) if value and math.isfinite(value) else None
    return name, canonical(value)


def to_json(document: dict[str, Any], schema: str) -> str:
    """A name that is no UTF-8 is written with escapes, so that it is the same name when it is read back."""
    told = {"schema": f"stratum.{schema}/{SCHEMA_VERSION}", **canonical(document)}
    text = json.dumps(told, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(told, allow_nan=False)
    return text


def schema_of(options: Namespace) -> str:
    return str(getattr(options, "schema", "command"))


def show(options: Namespace, document: dict[str, Any], text: str) -> int:
    print(to_json(document, schema_of(options)) if options.json else text, flush=True)
    return 0


def table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """Columns of sizes are shown as people read them."""
    if not rows:
        return "(none)"
    texts = [[_cell(column, row[column]) for column in columns] for row in map(canonical, rows)]
    heads = [column.removesuffix("_bytes") for column in columns]
    widths = [max(len(text) for text in column) for column in zip(heads, *texts, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in (heads, *texts)
    )


def _cell(column: str, value: Any) -> str:
    sizes = column in {"bytes", "size", "bytes_max"} or column.endswith("_bytes")
    return size(value) if sizes and isinstance(value, int | float) else str(value)


def size(number: float) -> str:
    """Like 12.3 GiB."""
    if abs(number) < 1024:
        return f"{number:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        number /= 1024
        if abs(number) < 1024:
            return f"{number:.1f} {unit}"
    return f"{number / 1024:.1f} PiB"
