"""`fsck` and `gc`: is the volume whole, and what of it does nothing refer to."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from stratum import fsck as checker
from stratum import leaks, store_repair
from stratum.cli.output import show, size
from stratum.cli.progress import Progress
from stratum.volume import Volume

if TYPE_CHECKING:
    from argparse import Namespace

    from stratum.fsck import Finding
    from stratum.store_repair import Repaired


def fsck(options: Namespace) -> int:
    repaired: Repaired | None = None
    damage = store_repair.examine(options.volume)
    if damage is not None:
        found = checker.Finding("damaged-store", f"meta/{damage.file} at byte {damage.at}", damage.fault)
        if not options.repair:
            return _report(options, [found], None)
        repaired = store_repair.repair(options.volume)
    if repaired is not None:
        found.what, found.repaired = f"{damage.fault if damage else ''}; {repaired.what}", True
    with Volume(options.volume, "fsck") as opened, Progress("reading every stored byte") as progress:
        if repaired is not None and not repaired.certain:
            _adopt(opened)
        findings = checker.check(opened, repair=options.repair, seen=progress.at)
    return _report(options, [found, *findings] if repaired is not None else findings, repaired)


def _adopt(opened: Volume) -> None:
    """What lost commits had moved to other tiers lies there alone, as after a restored backup."""
    from stratum.tiering.adopt import adopt
    from stratum.tiering.mover import exclusive

    with exclusive(opened):
        adopt(opened)


def _report(options: Namespace, findings: list[Finding], repaired: Repaired | None) -> int:
    left = [finding for finding in findings if not finding.repaired]
    code = 1 if left else 2 if findings else 0
    document: dict[str, Any] = {"findings": [asdict(finding) for finding in findings], "code": code}
    lines = [
        f"{finding.kind}: {finding.thing}: {finding.what}{' (repaired)' if finding.repaired else ''}"
        for finding in findings
    ]
    if repaired is not None:
        document |= {"lost": repaired.lost, "certain": repaired.certain, "aside": str(repaired.aside)}
        lines += [f"lost: {text}" for text in repaired.lost]
        lines.append(f"what was there lies in {repaired.aside}; remove it when all is well")
    lines.append(
        "clean"
        if not findings
        else f"{len(findings)} finding(s), {len(findings) - len(left)} repaired"
        + ("" if options.repair else "; --repair repairs")
    )
    show(options, document, "\n".join(lines))
    return code


def gc(options: Namespace) -> int:
    with Volume(options.volume, "gc") as opened:
        found = leaks.collect(opened, apply=options.apply)
    document = {
        "leaked_objects": len(found),
        "leaked_bytes": sum(leak.size for leak in found),
        "applied": options.apply,
    }
    text = f"{document['leaked_objects']} leaked, {size(document['leaked_bytes'])}" + (
        " removed" if options.apply else "; --apply removes them"
    )
    return show(options, document, text)
