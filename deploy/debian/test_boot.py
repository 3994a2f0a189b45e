"""`make boot-test`: the package under a real systemd: start, mount, crash, upgrade, back up, stop, and again after a reboot."""

from __future__ import annotations

import json
import socket
import sys
import time
from typing import TYPE_CHECKING

from deploy.debian import machine
from deploy.debian.machine import Failed, Machine
from deploy.debian.test_package import AS_USER, VOLUME, WORK, install, install_needs

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PARTS = ("stratum-s3", "stratum-tierd", "stratum-admin")
MOUNT = "stratum-mount@mnt-data.service"
CLIENT = """
import boto3, sys
s3 = boto3.client("s3", endpoint_url="{endpoint}", aws_access_key_id="{access_key}", aws_secret_access_key="{secret_key}", region_name="us-east-1")
{code}
"""


def free_listen() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


class Appliance:
    """A booted machine with the package, and what its volume told."""

    def __init__(self, inside: Machine, first: Path, second: Path) -> None:
        self.inside = inside
        self.run = inside.run
        self.until = inside.until
        self._first, self._second = first, second
        self._facts: dict[str, str] = {}

    def s3(self, code: str) -> str:
        script = CLIENT.format(code=code, **self._facts)
        (self.inside.root / "root" / "client.py").write_text(script)
        return self.run("/usr/lib/stratum/bin/python3 -I /root/client.py").strip()

    def install_and_boot(self) -> None:
        install_needs(self.inside)
        install(self.inside, self._first)
        made = self.run(
            f"{AS_USER} stratum init {VOLUME} --s3-listen {free_listen()} --admin-listen {free_listen()} --json && mkdir -p /mnt/data /mnt/fstab"
        )
        self._facts = json.loads(made)
        self.inside.boot()
        self.run("systemd-tmpfiles --create stratum.conf")

    def start(self) -> None:
        """`enable --now` returns; every part is ready, not only started, and runs as the service's user."""
        self.run("systemctl enable --now stratum.target")
        for part in PARTS:
            self.until(f"systemctl is-active {part}")
            pid = self.run(f"systemctl show -p MainPID --value {part}").strip()
            if self.run(f"stat -c %U /proc/{pid}").strip() != "stratum":
                raise Failed(f"{part} does not run as stratum")
        self.until(f"stratum status {VOLUME}", 40)
        self.s3("s3.create_bucket(Bucket='photos'); s3.put_object(Bucket='photos', Key='a/b', Body=b'x' * 100000)")

    def mount(self) -> None:
        """A private mount namespace, no rights, and yet the host sees the mount."""
        self.run(f"systemctl enable --now {MOUNT}")
        self.run("findmnt -t fuse.stratum /mnt/data && test $(stat -c %s /mnt/data/photos/a/b) = 100000")
        self.run("seq 1000 > /mnt/data/photos/from-mount")
        if self.s3("print(s3.head_object(Bucket='photos', Key='from-mount')['ContentLength'])") != "3893":
            raise Failed("S3 does not see what the mount wrote")

    def crash(self) -> None:
        """Killed parts come back by themselves, the mount on its mountpoint."""
        for unit in (*(f"{part}.service" for part in PARTS), MOUNT):
            before = self.run(f"systemctl show -p MainPID --value {unit}").strip()
            self.run(f"systemctl kill -s KILL --kill-who=main {unit}")
            self.until(f"test $(systemctl show -p MainPID --value {unit}) != {before} && systemctl is-active {unit}")
        self.until("seq 1000 | cmp - /mnt/data/photos/from-mount")
        self.s3("assert s3.get_object(Bucket='photos', Key='a/b')['Body'].read() == b'x' * 100000")

    def watchdog(self) -> None:
        """A part whose loop stands still is restarted."""
        unit = "stratum-s3.service"
        before = self.run(f"systemctl show -p MainPID --value {unit}").strip()
        self.run(f"systemctl kill -s STOP --kill-who=main {unit}")
        self.until(f"test $(systemctl show -p MainPID --value {unit}) != {before} && systemctl is-active {unit}", 150)

    def upgrade(self) -> None:
        """Every part runs the new program; the mount is not unmounted, and who has a file open on it goes on."""
        pids = {part: self.run(f"systemctl show -p MainPID --value {part}").strip() for part in PARTS}
        mount = self.run(f"systemctl show -p MainPID --value {MOUNT}").strip()
        self.run(
            "(exec 3>>/mnt/data/photos/appended; while test ! -e /tmp/end; do echo line >&3 && echo line >> /tmp/lines || touch /tmp/failed; "
            "sleep 0.05; done; touch /tmp/ended) >/dev/null 2>&1 </dev/null &"
        )
        install(self.inside, self._second)
        for part, before in pids.items():
            self.until(f"systemctl is-active {part} && test $(systemctl show -p MainPID --value {part}) != {before}")
        self.until(f"grep -qz STRATUM_TAKEOVER /proc/{mount}/environ && systemctl is-active {MOUNT}")
        self.run("touch /tmp/end")
        self.until("test -e /tmp/ended && test ! -e /tmp/failed && cmp /tmp/lines /mnt/data/photos/appended")
        self.until("seq 1000 | cmp - /mnt/data/photos/from-mount")
        self.until(f"stratum status {VOLUME}", 40)

    def restart(self) -> None:
        """A mount that is restarted stays: who has a file open goes on. One that is stopped for good is unmounted at once."""
        before = self.run(f"systemctl show -p MainPID --value {MOUNT}").strip()
        device = self.run("stat -c %d /mnt/data").strip()
        self.run(
            "rm -f /tmp/end /tmp/ended; (exec 3>>/mnt/data/photos/restarted; echo first >&3; while test ! -e /tmp/end; do sleep 0.05; done; "
            "echo last >&3 && touch /tmp/ended) >/dev/null 2>&1 </dev/null &"
        )
        self.until("grep -q first /mnt/data/photos/restarted")
        self.run(f"systemctl restart {MOUNT} && test $(systemctl show -p MainPID --value {MOUNT}) != {before}")
        self.run(f"test $(stat -c %d /mnt/data) = {device} && touch /tmp/end")
        self.until("test -e /tmp/ended && test $(grep -c . /mnt/data/photos/restarted) = 2")
        self.run(f"systemctl stop {MOUNT} && ! grep ' /mnt/data ' /proc/self/mounts && systemctl start {MOUNT}")
        self.until("seq 1000 | cmp - /mnt/data/photos/from-mount")

    def timers(self) -> None:
        """What the timers start succeeds."""
        self.run("systemctl start stratum-meta-backup.service stratum-scrub.service")
        self.run(f"{AS_USER} stratum drill restore {VOLUME} /var/lib/stratum/backups")
        self.run("systemctl list-timers --all | grep -q stratum-meta-backup.timer")

    def fstab(self) -> None:
        """A line of fstab, read only beside the writable mount."""
        self.run(
            f"echo '{VOLUME} /mnt/fstab stratum ro,bucket=photos,_netdev,nofail,x-systemd.requires=stratum-mountd.socket 0 0' >> /etc/fstab"
        )
        self.run("systemctl daemon-reload && systemctl start mnt-fstab.mount && seq 1000 | cmp - /mnt/fstab/from-mount")
        self.run("! touch /mnt/fstab/x 2>/dev/null && umount /mnt/fstab")

    def reboot(self) -> None:
        """Everything stops in time and comes back by itself, the fstab line and the mount too."""
        self.inside.power_off()
        self.inside.boot()
        for unit in (*PARTS, MOUNT):
            self.until(f"systemctl is-active {unit}")
        self.until("seq 1000 | cmp - /mnt/data/photos/from-mount")
        self.until("seq 1000 | cmp - /mnt/fstab/from-mount")
        self.s3("assert s3.get_object(Bucket='photos', Key='a/b')['Body'].read() == b'x' * 100000")

    def stop(self) -> None:
        """Stopping the target stops all of it and leaves a clean volume."""
        self.run("umount /mnt/fstab && systemctl stop stratum.target")
        for unit in (*PARTS, MOUNT):
            self.until(f"test $(systemctl is-active {unit}) = inactive")
        self.until("! grep fuse.stratum /proc/self/mounts >&2")
        self.run(f'stratum fsck {VOLUME} && test -z "$(find {VOLUME} ! -user stratum)"')
        errors = self.run("journalctl --boot --no-pager -u 'stratum*' | grep -E ' ERROR |Traceback' || true")
        if errors:
            raise Failed(f"unexpected lines in the journal:\n{errors}")


def main() -> int:
    began, done, failure = time.monotonic(), 0, None
    WORK.mkdir(parents=True, exist_ok=True)
    try:
        first, second = machine.packages(WORK)
        with machine.fresh(WORK, "booted") as inside:
            it = Appliance(inside, first, second)
            steps: list[Callable[[], None]] = [
                it.install_and_boot, it.start, it.mount, it.crash, it.watchdog, it.upgrade, it.restart, it.timers, it.fstab, it.reboot, it.stop,
            ]  # fmt: skip
            for step in steps:
                try:
                    step()
                except Failed as error:
                    log = inside.run("journalctl --no-pager -n 60 -u 'stratum*' -u 'mnt*'", expect=None)
                    raise Failed(f"{step.__name__}: {error}\n{log}") from error
                done += 1
    except Failed as error:
        failure = error
    return machine.report("boot-test", done, began, failure)


if __name__ == "__main__":
    sys.exit(main())
