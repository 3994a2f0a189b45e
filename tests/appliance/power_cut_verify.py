"""Looks at what a power cut left. In a process of its own: a store that was not synced can end whoever maps it.

python -m tests.appliance.power_cut_verify VOLUME SEED      possible versions of each key as JSON on standard input
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from stratum import fsck, housekeeping, leaks
from stratum.errors import StratumError
from stratum.identity import Identities
from stratum.volume import Volume
from tests.appliance.power_cut_load import content
from tests.support import get


class Damage(AssertionError):
    """What must not happen after a cut."""


def verify(root: Path, possible: dict[str, set[int]], seed: int) -> int:
    if not (root / "stratum.toml").exists():
        raise Damage(f"seed {seed}: the volume is gone")
    try:
        with Volume(root, "verify") as opened:
            findings = fsck.check(opened)
            if findings:
                raise Damage(f"seed {seed}: {findings[:3]}")
            identities = Identities(opened)
            with opened.snapshot() as reader:
                if not all(
                    identities.credential(reader, row["access_key"]).secret_key for row in identities.access_keys()
                ):
                    raise Damage(f"seed {seed}: a secret is gone")
            for key, versions in possible.items():
                try:
                    data = get(opened, key)
                except StratumError as error:
                    if "does not exist" not in error.message:
                        raise Damage(f"seed {seed}: {key}: {error.message}") from error
                    found = -1
                else:
                    found = int(data[:40].split()[1]) if data else 0
                    if data and data != content(key, found):
                        raise Damage(f"seed {seed}: {key} holds bytes that were never written together")
                made_empty = found == 0 and key.startswith(("f", "g")) and versions != {max(versions)}
                if found not in versions and not made_empty:
                    raise Damage(f"seed {seed}: {key} is at {found}, possible were {sorted(versions)}")
            housekeeping.run_once(opened)
            leaks.collect(opened, apply=True)
            if leaks.collect(opened) or fsck.check(opened):
                raise Damage(f"seed {seed}: not clean after recovery")
    except (StratumError, OSError) as error:
        raise Damage(f"seed {seed}: the volume does not open: {error}") from error
    return len(possible)


def main() -> None:
    possible = {key: set(versions) for key, versions in json.load(sys.stdin).items()}
    try:
        print(verify(Path(sys.argv[1]), possible, int(sys.argv[2])))
    except Damage as damage:
        sys.exit(str(damage))


if __name__ == "__main__":
    main()
