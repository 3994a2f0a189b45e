"""A bare Debian 12 in a folder, to install the package in: as a chroot, or booted with its own systemd (systemd-nspawn).

Needs root, and debootstrap with a mirror: the one that this machine's own apt uses. Nothing outside the folder is changed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

SUITE = "bookworm"
INCLUDED = "systemd,systemd-sysv,dbus"
BOOT_S_MAX = 120.0


class Failed(Exception):
    """A step did not do what it should; the text has what it printed."""


def mirror() -> str:
    """The first one that apt is told of."""
    folder = Path("/etc/apt")
    for path in (folder / "sources.list", *sorted((folder / "sources.list.d").glob("*"))):
        if not path.is_file() or path.suffix not in {".list", ".sources"}:
            continue
        for line in path.read_text().splitlines():
            found = re.match(r"(?:URIs:|deb(?:\s+\[[^]]*\])?)\s+(\S+)", line)
            if found and "security" not in found[1]:
                return found[1]
    raise Failed("apt has no mirror; write one into /etc/apt/sources.list")


def base(folder: Path) -> Path:
    """A fresh system at `folder`, made once."""
    if not (folder / "etc" / "debian_version").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        words = ["debootstrap", "--variant=minbase", f"--include={INCLUDED}", SUITE, str(folder), mirror()]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            shutil.rmtree(folder, ignore_errors=True)
            raise Failed(f"debootstrap: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return folder


class Machine:
    """One system, thrown away at the end. `run` works in the chroot until it is booted, then inside the booted system."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._booted: subprocess.Popen[bytes] | None = None
        self._leader = 0

    def run(self, command: str, *, expect: int | None = 0) -> str:
        """What a shell command prints. Raises `Failed`."""
        enter = ["nsenter", "--target", str(self._leader), "--all"] if self._booted else ["chroot", str(self.root)]
        clean = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
        proxies = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
        done = subprocess.run(
            [*enter, "/bin/sh", "-ec", command], capture_output=True, text=True, check=False, env={**clean, **proxies}
        )
        if expect is not None and done.returncode != expect:
            raise Failed(
                f"{command}\n  gave {done.returncode}, not {expect}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
            )
        return done.stdout

    def until(self, command: str, seconds: float = 60.0) -> str:
        """Repeat a command until it succeeds. Raises `Failed`."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                return self.run(command)
            except Failed:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def files(self) -> set[str]:
        """What lies there, but for what moves by itself and what the package manager keeps."""
        moving = (
            "/proc/",
            "/sys/",
            "/dev/",
            "/run/",
            "/tmp/",
            "/var/cache/",
            "/var/log/",
            "/var/lib/apt/",
            "/var/lib/dpkg/",
        )
        names = self.run("find / -xdev -not -type d").splitlines()
        return {name for name in names if not name.startswith(moving)}

    def boot(self) -> None:
        """Start its systemd. The network is the host's, so that loopback addresses are."""
        words = [
            "systemd-nspawn",
            "--quiet",
            "--directory",
            str(self.root),
            "--boot",
            "--register=no",
            "--keep-unit",
            "--bind=/dev/fuse",
        ]
        words += [
            "--capability=CAP_SYS_ADMIN",
            "--property=DeviceAllow=/dev/fuse rw",
            "--console=pipe",
            "--resolv-conf=off",
        ]
        self._unmount()
        self._booted = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        children = Path(f"/proc/{self._booted.pid}/task/{self._booted.pid}/children")
        deadline = time.monotonic() + BOOT_S_MAX
        while time.monotonic() < deadline:
            for child in children.read_text().split():
                if Path(f"/proc/{child}/comm").read_text().strip() == "systemd":
                    self._leader = int(child)
            with contextlib.suppress(Failed):
                if self._leader and self.run("systemctl is-system-running", expect=None).strip() in {
                    "running",
                    "degraded",
                }:
                    return
            time.sleep(0.2)
        raise Failed("systemd did not come up")

    def power_off(self) -> None:
        """As the power button does: every unit is stopped."""
        if self._booted is not None:
            self._booted.send_signal(signal.SIGTERM)
            try:
                self._booted.wait(90)
            except subprocess.TimeoutExpired:
                self._booted.kill()
                self._booted.wait()
                raise Failed("it did not shut down within 90 s") from None
            finally:
                self._booted = None

    def mount(self) -> None:
        """What a chroot needs of the host."""
        subprocess.run(["mount", "-t", "proc", "proc", self.root / "proc"], check=True)
        fuse = self.root / "dev" / "fuse"
        if not fuse.exists():
            os.mknod(fuse, 0o20666, os.makedev(10, 229))

    def _unmount(self) -> None:
        subprocess.run(["umount", "--recursive", "--lazy", self.root / "proc"], capture_output=True, check=False)

    def remove(self) -> None:
        with contextlib.suppress(Failed):
            self.power_off()
        self._unmount()
        for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
            place = line.split()[4]
            if place.startswith(f"{self.root}/"):
                subprocess.run(["umount", "--lazy", place], capture_output=True, check=False)
        shutil.rmtree(self.root)


@contextlib.contextmanager
def fresh(folder: Path, name: str) -> Iterator[Machine]:
    """A copy of the base, with this machine's way to the packages."""
    source = base(folder / "base")
    root = folder / name
    if root.exists():
        Machine(root).remove()
    subprocess.run(["cp", "--archive", "--reflink=auto", source, root], check=True)
    machine = Machine(root)
    try:
        (root / "etc/apt/sources.list").unlink()  # debootstrap's
        for part in ("apt.conf.d", "sources.list.d"):
            shutil.copytree(Path("/etc/apt") / part, root / "etc/apt" / part, dirs_exist_ok=True)
        for path in (Path("/etc/apt/sources.list"), Path("/etc/resolv.conf"), Path("/etc/hosts")):
            if path.exists():
                shutil.copyfile(path, root / path.relative_to("/"))
        (root / "etc/hostname").write_text("stratum-test\n")
        machine.mount()
        yield machine
    finally:
        machine.remove()


def packages(folder: Path) -> tuple[Path, Path]:
    """(the package, the same one with a higher version), made if they are not there."""
    subprocess.run([sys.executable, "-m", "deploy.debian.build", "--out", str(folder)], check=True)
    first = max(folder.glob("stratum_*.deb"), key=lambda path: path.stat().st_mtime)
    unpacked = folder / "next"
    shutil.rmtree(unpacked, ignore_errors=True)
    subprocess.run(["dpkg-deb", "--raw-extract", first, unpacked], check=True)
    control = unpacked / "DEBIAN" / "control"
    text = control.read_text()
    version = next(line.partition(" ")[2] for line in text.splitlines() if line.startswith("Version: "))
    control.write_text(text.replace(f"Version: {version}\n", f"Version: {version}+next\n"))
    second = folder / "next.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-Zgzip", "--build", unpacked, second], check=True, stdout=subprocess.DEVNULL
    )
    shutil.rmtree(unpacked)
    return first, second


def report(name: str, steps: int, began: float, failure: Failed | None) -> int:
    """The one summary line."""
    verdict = "FAILED" if failure else "passed"
    if failure:
        print(failure, file=sys.stderr)
    print(f"{name}: {verdict} after {steps} steps, {time.monotonic() - began:.0f} s")
    return 1 if failure else 0
