"""The mount helper for real: a daemon without root in a mount namespace of its own, and what the helper refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from stratum import mountd
from stratum.errors import UnfinishedMount
from stratum.mount_table import mount_at
from stratum.mountd import MountHelper, Refused
from tests.support import make_volume, need_fuse, unseal

if TYPE_CHECKING:
    from collections.abc import Iterator

NOBODY = 65534

# Everything is imported before the rights are given up: the checkout need not be readable for everybody.
WITHOUT_ROOT = """
import ctypes, os, signal, sys
from pathlib import Path
import stratum.cli.main, stratum.fuse.daemon, stratum.housekeeping, stratum.processes, stratum.mountd, stratum.notify
import stratum.cli.commands, stratum.volume, tests.support, encodings.unicode_escape, encodings.latin_1
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x00020000) == 0
assert libc.mount(None, b"/", None, 0x80000 | 0x4000, None) == 0  # MS_SLAVE | MS_REC, as ProtectSystem= does
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # no new privileges
libc.prctl(4, 1, 0, 0, 0)  # dumpable again, for /proc/self
try:
    os.open("/dev/fuse", os.O_RDWR)
    libc.mount(b"x", b"/mnt", b"tmpfs", 0, None) == 0 and sys.exit("this process may still mount")
except PermissionError:
    pass
"""
MOUNT = WITHOUT_ROOT + "input()\nsys.exit(stratum.cli.main.main(sys.argv[1:]))\n"
PUT = (
    WITHOUT_ROOT
    + """
sys.stdin.read()
with stratum.volume.Volume(Path(sys.argv[1]), "test") as opened:
    tests.support.put(opened, sys.argv[2], sys.argv[3].encode())
"""
)


def without_root(code: str, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip


class Place:
    """A folder that nobody's processes reach, with a volume of theirs and a helper."""

    def __init__(self, keep: str = "30s") -> None:
        self.root = Path(tempfile.mkdtemp(prefix="stratum-mountd-", dir="/var/tmp"))
        self.root.chmod(0o755)
        make_volume(self.root / "volume")
        self.socket = self.root / "run" / "mountd.sock"
        self.mounts = self.root / "mnt"
        self.mountpoint = self.mounts / "data"
        self.mountpoint.mkdir(parents=True)
        # systemd makes / shared, so that mounts of the host reach units with a namespace of their own; here only this is.
        subprocess.run(["mount", "--bind", self.mounts, self.mounts], check=True)
        subprocess.run(["mount", "--make-shared", self.mounts], check=True)
        path = self.root / "volume" / "stratum.toml"
        path.write_text(
            path.read_text()
            .replace('helper = ""', f'helper = "{self.socket}"')
            .replace('path = ""', f'path = "{self.mountpoint}"')
        )
        for name in [self.root / "volume", *(self.root / "volume").rglob("*"), self.mountpoint]:
            os.chown(name, NOBODY, NOBODY)
        self.helper = self.start_helper(keep)

    def start_helper(self, keep: str) -> subprocess.Popen[bytes]:
        self.socket.unlink(missing_ok=True)
        helper = subprocess.Popen(
            [sys.executable, "-m", "stratum.cli.main", "mountd", "--socket", self.socket, "--user", str(NOBODY), "--root", self.mounts, "--keep", keep]
        )  # fmt: skip
        deadline = time.monotonic() + 20
        while not self.socket.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return helper

    def mount(self, *words: str) -> subprocess.Popen[str]:
        return self.begin(self.prepare(*words))

    def prepare(self, *words: str) -> subprocess.Popen[str]:
        """A process that mounts when it is told to: one that is started by somebody who has files open on the mount closes them first, and would wait for itself."""
        return without_root(MOUNT, "mount", str(self.root / "volume"), *words, "--json")

    def begin(self, process: subprocess.Popen[str]) -> subprocess.Popen[str]:
        assert process.stdin
        assert process.stdout
        process.stdin.write("\n")
        process.stdin.close()
        assert json.loads(process.stdout.readline())["ready"] is True
        return process

    def is_mounted(self) -> bool:
        return mount_at(str(self.mountpoint)) is not None

    def close(self) -> None:
        while self.is_mounted():
            subprocess.run(["umount", "--lazy", self.mountpoint])
        self.helper.terminate()
        assert self.helper.wait(20) == 0
        subprocess.run(["umount", self.mounts], check=True)
        unseal(self.root)
        shutil.rmtree(self.root)


@pytest.fixture
def place() -> Iterator[Place]:
    need_fuse()
    made = Place()
    yield made
    made.close()


def end(process: subprocess.Popen[str], code: int = 0) -> None:
    """With SIGINT, which leaves nothing mounted."""
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == code
    assert process.stdout
    process.stdout.close()


def test_a_daemon_without_root_mounts_for_the_host(place: Place) -> None:
    process = place.mount()
    assert os.stat(f"/proc/{process.pid}").st_uid == NOBODY
    status = Path(f"/proc/{process.pid}/status").read_text()
    assert "CapEff:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status
    assert os.readlink(f"/proc/{process.pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt")
    here = place.mountpoint / "bucket"
    (here / "a").write_bytes(b"seen by the host")
    assert (here / "a").read_bytes() == b"seen by the host"
    (here / "d").mkdir()
    os.chown(here / "a", 1234, 5678)
    assert (here / "a").stat().st_uid == 1234
    line = mount_at(str(place.mountpoint))
    assert line
    assert line.is_stratum
    assert f"{place.root}/volume {place.mountpoint} fuse.stratum" in Path("/proc/self/mounts").read_text()
    assert {"allow_other", "default_permissions", f"user_id={NOBODY}"} <= line.options
    end(process)
    assert not place.is_mounted()
    process = place.mount(str(place.mountpoint), "--read-only")
    assert (here / "a").read_bytes() == b"seen by the host"
    with pytest.raises(OSError, match="Read-only"):
        (here / "b").touch()
    end(process)


def test_a_mount_is_named_by_its_volume_if_that_says_nothing_else() -> None:
    assert mountd.source_name("/srv/stratum/volume-1") == "/srv/stratum/volume-1"
    for other in (None, 7, "", "volume", "/with space", "/a,b", "/a\\b", "/line\nbreak", "/" + "x" * 2000):
        assert mountd.source_name(other) == "stratum"


def test_after_a_kill_the_stale_mount_is_replaced(place: Place) -> None:
    process = place.mount()
    (place.mountpoint / "bucket" / "a").write_bytes(b"x")
    process.kill()
    process.wait()
    assert process.stdout
    process.stdout.close()
    assert place.is_mounted()
    process = place.mount()
    assert (place.mountpoint / "bucket" / "a").read_bytes() == b"x"
    end(process)


def test_a_mount_that_stands_still_is_fenced_by_a_writer_without_root(place: Place) -> None:
    process = place.mount()
    (place.mountpoint / "bucket" / "a").write_bytes(b"old")
    assert (place.mountpoint / "bucket" / "a").read_bytes() == b"old"
    os.kill(process.pid, signal.SIGSTOP)
    writer = without_root(PUT, str(place.root / "volume"), "a", "new")
    assert writer.stdin
    writer.stdin.close()
    assert writer.wait(60) == 0
    assert writer.stdout
    writer.stdout.close()
    with pytest.raises(
        OSError, match="not connected"
    ):  # a dead mount is in its place, and nothing lands in the folder beneath
        (place.mountpoint / "bucket" / "a").write_bytes(b"lost")
    assert process.wait(10) == -signal.SIGKILL
    assert process.stdout
    process.stdout.close()
    process = place.mount()
    assert (place.mountpoint / "bucket" / "a").read_bytes() == b"new"
    end(process)


def refusal(helper: MountHelper, document: Any, uid: int = NOBODY) -> str:
    with pytest.raises(Refused) as caught:
        helper.answer(document, uid, uid)
    return str(caught.value)


def test_what_the_helper_refuses(tmp_path: Path) -> None:
    mounts = tmp_path / "mnt"
    (mounts / "open").mkdir(parents=True)
    (mounts / "open").chmod(0o777)
    (mounts / "foreign").mkdir()
    os.chown(mounts / "foreign", 1000, 1000)
    (mounts / "link").symlink_to("/etc")
    (mounts / "file").touch()
    helper = MountHelper(NOBODY, [mounts])

    def mount(path: Path | str) -> dict[str, Any]:
        return {"action": "mount", "path": str(path)}

    assert "not the user" in refusal(helper, mount(mounts / "open"), uid=1000)
    for path in (
        "/etc",
        str(mounts),
        f"{mounts}/../etc",
        f"{mounts}//open",
        "open",
        f"{mounts}x/open",
        "",
        f"{mounts}/a\0b",
        f"{mounts}/.",
    ):
        text = refusal(helper, mount(path))
        assert "not below" in text or "not an absolute path" in text, path
    assert "cannot be reached" in refusal(helper, mount(mounts / "link"))
    assert "cannot be reached" in refusal(helper, mount(mounts / "link" / "ssh"))
    assert "cannot be reached" in refusal(helper, mount(mounts / "file"))
    assert "cannot be reached" in refusal(helper, mount(mounts / "none"))
    assert "must belong" in refusal(helper, mount(mounts / "open"))
    assert "must belong" in refusal(helper, mount(mounts / "foreign"))
    documents: tuple[Any, ...] = (
        None,
        [],
        {},
        {"action": "mount"},
        {"path": 5, "action": "mount"},
        {"action": "exec", "path": str(mounts / "open")},
    )
    for document in documents:
        refusal(helper, document)
    assert helper.answer({"action": "detach", "path": str(mounts / "open")}, NOBODY, NOBODY) == ({"ok": True}, ())


def test_it_detaches_only_what_it_mounted_for_who_asks(tmp_path: Path) -> None:
    (tmp_path / "mnt" / "other").mkdir(parents=True)
    helper = MountHelper(NOBODY, [tmp_path / "mnt"])
    subprocess.run(["mount", "-t", "tmpfs", "none", tmp_path / "mnt" / "other"], check=True)
    try:
        asked = {"action": "detach", "path": str(tmp_path / "mnt" / "other")}
        assert "not yours" in refusal(helper, asked)
        assert "mounted at" in refusal(helper, {**asked, "action": "mount"})
    finally:
        subprocess.run(["umount", tmp_path / "mnt" / "other"], check=True)


def test_a_broken_client_breaks_nothing(place: Place) -> None:
    for junk in (b"{", b"\xff" * 100, b"[]", b"x" * 8000):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(str(place.socket))
            connection.send(junk)
            assert "error" in json.loads(connection.recv(8192))
    assert place.helper.poll() is None
    with pytest.raises(UnfinishedMount, match="not below"):
        mountd.ask_mount(place.socket, Path("/etc"), "", read_only=False)
    with pytest.raises(UnfinishedMount, match="does not answer"):
        mountd.ask_mount(place.root / "nothing", place.mountpoint, "", read_only=False)
