"""A software bill of materials: what an environment holds, as CycloneDX 1.5 JSON (cyclonedx.org/docs/1.5/json)."""

from __future__ import annotations

import importlib.metadata
import os
import re
import uuid
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

OURS = "stratum-storage"


def _name(distribution: importlib.metadata.Distribution) -> str:
    """Normalised as package URLs want it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()


def _licenses(distribution: importlib.metadata.Distribution) -> list[dict[str, Any]]:
    told = distribution.metadata.json
    text = str(told.get("license_expression") or told.get("license") or "")
    if not text or len(text) > 80 or "\n" in text:
        found = [line.rpartition(" :: ")[2] for line in told.get("classifier", []) if line.startswith("License ::")]
        text = ", ".join(found)
    return [{"license": {"name": text}}] if text else []


def _component(distribution: importlib.metadata.Distribution) -> dict[str, Any]:
    name, version = _name(distribution), distribution.version
    url = f"pkg:pypi/{name}@{version}"
    return {
        "type": "application" if name == OURS else "library", "bom-ref": url, "name": name, "version": version, "purl": url,
        "licenses": _licenses(distribution),
    }  # fmt: skip


def document(home: Path, version: str) -> dict[str, Any]:
    """Of the virtual environment at `home`, whose program is ours."""
    folders = [str(path) for path in home.glob("lib/python3*/site-packages")]
    found = sorted(importlib.metadata.distributions(path=folders), key=_name)
    components = {_name(item): _component(item) for item in found}
    depends = [
        {
            "ref": components[_name(item)]["bom-ref"],
            "dependsOn": sorted(
                {
                    components[wanted]["bom-ref"]
                    for line in item.requires or ()
                    if (wanted := re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", line, maxsplit=1)[0]).lower())
                    in components
                }
            ),
        }
        for item in found
    ]
    moment = datetime.fromtimestamp(int(os.environ.get("SOURCE_DATE_EPOCH", "0")), UTC)
    program = components.pop(OURS)
    serial = uuid.uuid5(uuid.NAMESPACE_URL, f"{program['purl']} {version} {moment}")
    return {
        "bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1,
        "serialNumber": f"urn:uuid:{serial}",
        "metadata": {"timestamp": moment.isoformat(), "component": {**program, "version": version}},
        "components": list(components.values()), "dependencies": depends,
    }  # fmt: skip
