"""`make deb-test`: lintian, then install, use, upgrade, remove, reinstall and purge in a bare Debian 12."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from deploy.debian import machine
from deploy.debian.machine import Failed, Machine

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "machines"
VOLUME = "/srv/stratum/volume"
AS_USER = "runuser -u stratum --"


def lint(package: Path) -> None:
    done = subprocess.run(
        ["lintian", "--fail-on", "error,warning", "--allow-root", package], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Failed(f"lintian:\n{done.stdout}{done.stderr}")


def install(inside: Machine, package: Path) -> None:
    shutil.copyfile(package, inside.root / "root" / "stratum.deb")
    inside.run(
        "apt-get update -qq && apt-get install -y -qq --no-install-recommends /root/stratum.deb && rm /root/stratum.deb"
    )


def nothing_by_default(inside: Machine) -> None:
    """The user and empty folders; no volume, no key, nothing enabled."""
    inside.run(
        'id stratum && test -d /srv/stratum && test -z "$(ls -A /srv/stratum)" && test -z "$(ls -A /etc/stratum/credentials)"'
    )
    inside.run("! ls /etc/systemd/system/*.wants/stratum* /etc/systemd/system/*/stratum* 2>/dev/null")
    modes = inside.run("stat -c '%a %U' /srv/stratum /var/lib/stratum/backups /etc/stratum/credentials").split("\n")
    if modes[:3] != ["750 stratum", "700 stratum", "700 root"]:
        raise Failed(f"modes and owners: {modes}")
    inside.run("stratum --version && stratum --help | grep -q rebuild && mount.stratum -f a b")
    inside.run("test -s /usr/share/doc/stratum/sbom.cdx.json && test -s /usr/share/stratum/prometheus/alerts.yml")


def make_and_fill(inside: Machine) -> None:
    made = json.loads(inside.run(f"{AS_USER} stratum init {VOLUME} --json"))
    if len(made["secret_key"]) < 32:
        raise Failed(f"init gave no key: {made}")
    inside.run(f"stratum bucket create {VOLUME} photos")
    inside.run(
        "mkdir -p /mnt/data && (setsid stratum mountd --root /mnt >/dev/null 2>/tmp/mountd.log </dev/null & echo $! > /tmp/mountd.pid)"
    )
    inside.until("test -S /run/stratum/mountd.sock", 20)
    inside.run(f"echo '{VOLUME} /mnt/data stratum _netdev,nofail 0 0' >> /etc/fstab && mount /mnt/data")
    inside.run(
        "mkdir /mnt/data/photos/2026 && seq 100000 > /mnt/data/photos/2026/list && sync /mnt/data/photos/2026/list"
    )
    inside.run("grep -q ' /mnt/data fuse.stratum rw,nosuid,nodev' /proc/self/mounts && umount /mnt/data")
    inside.until(f'test -z "$(ls -A {VOLUME}/meta/sessions)"', 20)


def still_there(inside: Machine) -> None:
    inside.run(f"stratum fsck {VOLUME} && mount /mnt/data")
    inside.run("seq 100000 | cmp - /mnt/data/photos/2026/list && umount /mnt/data")
    inside.run(f'test -z "$(find {VOLUME} ! -user stratum)"')
    inside.run(f"{AS_USER} stratum meta backup {VOLUME} /var/lib/stratum/backups --keep 3")
    inside.run(f"{AS_USER} stratum drill restore {VOLUME} /var/lib/stratum/backups")


def main() -> int:
    began, steps, failure = time.monotonic(), 0, None
    WORK.mkdir(parents=True, exist_ok=True)
    try:
        first, second = machine.packages(WORK)
        lint(first)
        with machine.fresh(WORK, "package") as inside:
            install_needs(inside)
            before = inside.files()
            for step in (
                lambda: install(inside, first),
                lambda: nothing_by_default(inside),
                lambda: make_and_fill(inside),
                lambda: still_there(inside),
                lambda: install(inside, second),
                lambda: still_there(inside),
                lambda: inside.run(
                    "apt-get remove -y -qq stratum && test ! -e /usr/lib/stratum && test -e /etc/stratum/stratum.env"
                ),
                lambda: install(inside, first),
                lambda: still_there(inside),
                lambda: inside.run(
                    "kill $(cat /tmp/mountd.pid); apt-get purge -y -qq stratum && test ! -e /etc/stratum && id stratum"
                ),
                lambda: clean(inside, before),
            ):
                step()
                steps += 1
    except Failed as error:
        failure = error
    return machine.report("deb-test", steps, began, failure)


def install_needs(inside: Machine) -> None:
    """What the package depends on, so that what is left behind later is the package's own."""
    inside.run("apt-get update -qq && apt-get install -y -qq --no-install-recommends fuse3 libfuse3-3 python3")


def clean(inside: Machine, before: set[str]) -> None:
    """Only data is left behind."""
    kept = ("/srv/stratum/volume/", "/var/lib/stratum/backups/")
    changed = {
        "/etc/fstab",
        "/etc/passwd",
        "/etc/group",
        "/etc/shadow",
        "/etc/gshadow",
        "/etc/passwd-",
        "/etc/group-",
        "/etc/shadow-",
        "/etc/gshadow-",
        "/etc/.pwd.lock",
    }
    left = {name for name in inside.files() - before if not name.startswith(kept)} - changed
    if left:
        raise Failed(f"left behind: {sorted(left)[:20]}")
    inside.run(f"test -s {VOLUME}/meta/data.mdb && test -s {VOLUME}/stratum.toml")


if __name__ == "__main__":
    sys.exit(main())
