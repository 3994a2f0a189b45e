"""`stratum mountd`: the only part that needs root. It opens /dev/fuse, mounts, and hands the descriptor to an unprivileged daemon.

A unit with a private mount namespace cannot mount for the host, and one without new privileges cannot use fusermount3. So this
small process does the mount in the host's namespace and passes the descriptor over a socket (SCM_RIGHTS, unix(7)).

Invariants
* It serves one user (and root), named when it started; the kernel says who asks (SO_PEERCRED).
* It mounts on directories below the roots named when it started and nowhere else. Every component is opened without
  following symbolic links, and what is mounted on is that descriptor, so nobody can exchange the path meanwhile.
* The directory belongs to root or to who asks; nothing is mounted there. Every mount is nosuid and nodev.
* It replaces, detaches and keeps only mounts of type fuse.stratum that were made for the caller, which the kernel's table says.

Protocol: SOCK_SEQPACKET, one JSON document a packet.
{"action": "mount", "path", "source", "read_only", "replaces"} is answered {"ok": true, "mount_id"} with a descriptor. `replaces` is the
device of a stale mount there, whose place the new one takes; 0: none. The folder is made immutable, so that nothing lands in it while nothing is mounted.
{"action": "detach", "path", "mount_id", "device", "cover"} ends that mount and its connection; `cover` leaves a dead one in its place. Ids are the helper's:
a caller in another mount namespace sees others, and names a mount that it did not make by its device. Both 0: whichever is there.
{"action": "release", "path"} lets the folder be written to again. Both are answered {"ok": true}.
{"action": "keep", "path"} comes with the descriptors of a daemon that ends (`kept_mounts.py`) and is answered {"ok": true},
{"action": "claim", "path"} with {"ok": true} and those descriptors, or none if nothing is kept.
All are answered {"error": text} if they cannot be.
"""

from __future__ import annotations

import array
import json
import os
import pwd
import re
import selectors
import signal
import socket
import stat
import struct
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stratum import mounting, notify
from stratum.errors import ConfigInvalid, UnfinishedMount
from stratum.kept_mounts import DESCRIPTORS, KEEP_S, KeptMounts
from stratum.log import get_logger
from stratum.mount_table import mount_at

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stratum.config import Config

REQUEST_BYTES_MAX = 8192
CONNECTIONS_MAX = 64
IDLE_S_MAX = 30.0
_CREDENTIALS = struct.Struct("3i")
log = get_logger("mountd")


class Refused(Exception):
    """What is asked for is not allowed, or failed; the text goes to who asked."""


def source_name(volume: object) -> str:
    """What df(1) shows as the file system, and mount(8) compares with fstab: the volume's path, if it is a plain one."""
    plain = isinstance(volume, str) and re.fullmatch(r"/[A-Za-z0-9._/@:+=-]{1,1000}", volume)
    return str(volume) if plain else "stratum"


class MountHelper:
    """`user` may ask; mounts lie below `roots`. Those of daemons that restart are kept for `keep_s`."""

    def __init__(self, user: int, roots: Sequence[Path], keep_s: float = KEEP_S) -> None:
        self._user = user
        self._roots = [os.path.normpath(root) for root in roots]
        self.kept = KeptMounts(keep_s, self._give_up)

    def answer(
        self, document: Any, uid: int, gid: int, given: Sequence[int] = ()
    ) -> tuple[dict[str, Any], Sequence[int]]:
        """The answer, and descriptors that go with it. Those `given` stay the caller's. Raises `Refused`."""
        if uid not in {0, self._user}:
            raise Refused("you are not the user this helper serves")
        if not isinstance(document, dict) or not isinstance(document.get("path"), str):
            raise Refused("a request is a JSON object with an action and a path")
        path = document["path"]
        match document.get("action"):
            case "mount":
                fresh = self._mount(path, uid, gid, document)
                return {"ok": True, "mount_id": fresh.id}, (fresh.connection,)
            case "detach":
                named = _number(document, "mount_id"), _number(document, "device")
                self._detach(path, uid, *named, covers=gid if document.get("cover") else None)
                return {"ok": True}, ()
            case "release":
                self._release(path, uid)
                return {"ok": True}, ()
            case "keep":
                self._keep(path, uid, given)
                return {"ok": True}, ()
            case "claim":
                return {"ok": True}, self._claim(path, uid)
        raise Refused("the actions are mount, detach, release, keep and claim")

    def _check(self, path: str) -> None:
        if not path.startswith("/") or os.path.normpath(path) != path or "\0" in path:
            raise Refused(f"{path!r} is not an absolute path without . and ..")
        if not any(path.startswith(root.rstrip("/") + "/") for root in self._roots):
            raise Refused(f"{path!r} is not below {', '.join(self._roots)}")

    def _open(self, path: str, uid: int) -> int:
        """A descriptor of the directory itself, reached without symbolic links."""
        at = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for name in path.strip("/").split("/"):
                following = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
                os.close(at)
                at = following
            owner = os.fstat(at)
        except OSError as error:
            os.close(at)
            raise Refused(f"{path!r} cannot be reached: {error.strerror}; make the directory first") from None
        if owner.st_uid not in {0, uid} or stat.S_IMODE(owner.st_mode) & 0o002:
            os.close(at)
            raise Refused(f"{path!r} must belong to root or to you, and not be writable by everybody")
        return at

    def _mount(self, path: str, uid: int, gid: int, document: dict[str, Any]) -> mounting.Fresh:
        self._check(path)
        stale, read_only = _number(document, "replaces"), document.get("read_only") is True
        if self._is_mounted_for(path, uid) and not stale:
            raise Refused(f"something is mounted at {path!r} already")
        try:
            fresh = mounting.make(source_name(document.get("source")), uid, gid, read_only=read_only)
            try:
                if stale:
                    mounting.replace(fresh, path, _id_there(path, 0, stale))
                else:
                    self._put(fresh, path, uid)
            except BaseException:
                os.close(fresh.connection)
                raise
            finally:
                fresh.close()
        except UnfinishedMount as error:
            raise Refused(error.message) from None
        except OSError as error:
            raise Refused(f"mount of {path!r} failed: {error.strerror}") from None
        line = mount_at(path)
        if line is not None:
            mounting.tune(line.minor)
        log.info("mounted", path=path, uid=uid, read_only=read_only)
        return fresh

    def _put(self, fresh: mounting.Fresh, path: str, uid: int) -> None:
        place = self._open(path, uid)
        try:
            _seal(place, path)
            mounting.put(fresh, place)
        finally:
            os.close(place)

    def _release(self, path: str, uid: int) -> None:
        self._check(path)
        if mount_at(path) is not None:
            raise Refused(f"something is mounted at {path!r}; end it first")
        place = self._open(path, uid)
        try:
            why = _seal(place, path, sealed=False)
        finally:
            os.close(place)
        if why:
            raise Refused(f"{path!r} cannot be released: {why}")

    def _is_mounted_for(self, path: str, uid: int) -> bool:
        """Raises `Refused` if something else is."""
        self._check(path)
        line = mount_at(path)
        if line is None:
            return False
        if not line.is_stratum or (uid != 0 and f"user_id={uid}" not in line.options):
            raise Refused(f"what is mounted at {path!r} is not yours")
        return True

    def _detach(self, path: str, uid: int, number: int = 0, device: int = 0, *, covers: int | None = None) -> None:
        """`covers`: the group of a dead mount to leave in its place."""
        if self._is_mounted_for(path, uid):
            try:
                number = _id_there(path, number, device)
                done = mounting.detach(path, number) if covers is None else mounting.cover(path, number, uid, covers)
            except OSError as error:
                raise Refused(f"detaching {path!r} failed: {error.strerror}") from None
            if not done:  # what is kept is another one's by now
                return
            log.info("detached", path=path, uid=uid, covered=covers is not None)
        self.kept.drop(path)

    def _keep(self, path: str, uid: int, given: Sequence[int]) -> None:
        if len(given) != DESCRIPTORS:
            raise Refused(f"a mount is kept by {DESCRIPTORS} descriptors, not {len(given)}")
        if not self._is_mounted_for(path, uid):
            raise Refused(f"nothing is mounted at {path!r}")
        held = [os.dup(number) for number in given]
        if not self.kept.keep(path, uid, held):
            _close(held)
            raise Refused(
                f"{path!r} cannot be kept: one is already, too many are, or this helper was told to keep none"
            )
        log.info("kept", path=path, uid=uid)

    def _claim(self, path: str, uid: int) -> Sequence[int]:
        if not self._is_mounted_for(path, uid):
            self.kept.drop(path)
        found = self.kept.claim(path, uid)
        if found:
            log.info("claimed", path=path, uid=uid)
        return found

    def _give_up(self, path: str) -> None:
        """Nobody came back for a mount that is kept."""
        log.warning("not_claimed", path=path)
        try:
            self._detach(path, 0)
        except Refused as refused:
            log.warning("not_detached", path=path, why=str(refused))

    def serve_one(self, connection: socket.socket) -> None:
        """All requests of one connection."""
        connection.settimeout(IDLE_S_MAX)
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, uid, gid = _CREDENTIALS.unpack(raw)
        with connection:
            while True:
                request, given = _received(connection)
                if not request:
                    _close(given)
                    return
                descriptors: Sequence[int] = ()
                try:
                    found, descriptors = self.answer(_decoded(request), uid, gid, given)
                except Refused as refused:
                    log.warning("refused", uid=uid, why=str(refused))
                    found = {"error": str(refused)}
                finally:
                    _close(given)
                try:
                    _send(connection, found, descriptors)
                finally:
                    _close(descriptors)  # if they never arrived, the last close ends the mount


def _number(document: dict[str, Any], key: str) -> int:
    value = document.get(key, 0)
    if not isinstance(value, int) or value < 0:
        raise Refused(f"{key} is the id of a mount, or 0")
    return value


def _id_there(path: str, number: int, device: int) -> int:
    """The id of what is mounted at a path, if it is what is meant; else 0."""
    with mounting.top(path) as now:
        if now is None or (number and now.id != number) or (not number and device not in {0, now.line.minor}):
            return 0
        return now.id


def _seal(place: int, path: str, *, sealed: bool = True) -> str:
    """Of a folder that is held by an O_PATH descriptor, which knows no ioctl(2). Why it cannot be done, which is logged, too."""
    folder = os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        why = mounting.seal(folder, sealed=sealed)
    finally:
        os.close(folder)
    if why:
        log.warning("folder_not_sealed", path=path, why=why)
    return why


def _close(descriptors: Sequence[int]) -> None:
    for number in descriptors:
        os.close(number)


def _send(connection: socket.socket, document: dict[str, Any], descriptors: Sequence[int]) -> None:
    extra = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    connection.sendmsg([json.dumps(document).encode()], extra)


def _received(connection: socket.socket) -> tuple[bytes, Sequence[int]]:
    """A packet, and the descriptors that came with it (those above DESCRIPTORS the kernel has closed)."""
    raw, extra, _, _ = connection.recvmsg(
        REQUEST_BYTES_MAX, socket.CMSG_SPACE(DESCRIPTORS * array.array("i").itemsize), socket.MSG_CMSG_CLOEXEC
    )
    numbers = array.array("i")
    for level, kind, data in extra:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
    return raw, numbers


def _decoded(request: bytes) -> Any:
    try:
        return json.loads(request)
    except ValueError:
        raise Refused("the request is not JSON") from None


def _listener(path: Path) -> socket.socket:
    """The socket systemd passed, or one of our own."""
    if os.environ.get("LISTEN_PID") == str(os.getpid()) and os.environ.get("LISTEN_FDS") == "1":
        return socket.socket(fileno=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # Everybody may connect, as with systemd's socket the group may: who asks is checked at each request.
    listener.bind(str(path))
    path.chmod(0o666)
    listener.listen(16)
    return listener


def serve(path: Path, user: str, roots: Sequence[Path], keep_s: float) -> None:
    """Until SIGTERM. Raises `ConfigInvalid`."""
    try:
        uid = int(user) if user.isdigit() else pwd.getpwnam(user).pw_uid
    except KeyError:
        raise ConfigInvalid(f"there is no user {user!r}") from None
    if not roots or any(not root.is_absolute() or root == Path("/") for root in roots):
        raise ConfigInvalid("name at least one absolute directory, and not /, below which mounts may lie")
    helper = MountHelper(uid, roots, keep_s)
    listener = _listener(path)
    places = threading.BoundedSemaphore(CONNECTIONS_MAX)
    # The socket may be systemd's, which goes on listening for the next start: it is neither shut down nor removed.
    ending, end = socket.socketpair()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: end.send(b"1"))
    notify.send(READY=1, STATUS=f"mounting below {', '.join(map(str, roots))}")

    def work(connection: socket.socket) -> None:
        try:
            helper.serve_one(connection)
        except OSError as error:
            log.info("connection_ended", error=str(error))
        except Exception:
            log.exception("request_failed")
        finally:
            places.release()

    with listener, ending, end, selectors.DefaultSelector() as waiting:
        listener.setblocking(False)
        for readable in (listener, ending):
            waiting.register(readable, selectors.EVENT_READ)
        while all(key.fileobj is not ending for key, _ in waiting.select()):
            try:
                connection, _ = listener.accept()
            except OSError:  # who asked has gone away meanwhile
                continue
            if not places.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=work, args=(connection,), daemon=True).start()
    helper.kept.end()


SOCKET = Path("/run/stratum/mountd.sock")


def helper_of(root: Path, config: Config) -> Path | None:
    """Whom to ask for mounts of a volume: the setting, or the usual place if this process could not mount by itself."""
    if config.mount_helper:
        return root / config.mount_helper
    return SOCKET if os.geteuid() != 0 and SOCKET.exists() else None


# -- the other side -----------------------------------------------------------------------------------------------------


def _asked(
    helper: Path, document: dict[str, Any], descriptors: Sequence[int] = ()
) -> tuple[dict[str, Any], Sequence[int]]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(IDLE_S_MAX)
        try:
            connection.connect(str(helper))
            _send(connection, document, descriptors)
            raw, numbers = _received(connection)
        except OSError as error:
            raise UnfinishedMount(
                f"the mount helper at {helper} does not answer ({error}); systemctl status stratum-mountd"
            ) from error
    found: dict[str, Any] = json.loads(raw or b'{"error": "it ended"}')
    if "error" in found:
        _close(numbers)
        raise UnfinishedMount(f"the mount helper refuses: {found['error']}")
    return found, numbers


def ask_mount(helper: Path, mountpoint: Path, source: str, *, read_only: bool, replaces: int = 0) -> tuple[int, int]:
    """(a descriptor of a fresh mount, its id). Raises `UnfinishedMount`."""
    asked = {
        "action": "mount", "path": str(mountpoint), "source": source, "read_only": read_only, "replaces": replaces
    }  # fmt: skip
    answer, descriptors = _asked(helper, asked)
    if len(descriptors) != 1:
        raise UnfinishedMount(f"the mount helper at {helper} sent no descriptor")
    return descriptors[0], int(answer.get("mount_id", 0))


def ask_detach(
    helper: Path, mountpoint: Path | str, mount_id: int = 0, device: int = 0, *, cover: bool = False
) -> None:
    """Raises `UnfinishedMount`."""
    asked = {"action": "detach", "path": str(mountpoint), "mount_id": mount_id, "device": device, "cover": cover}
    _asked(helper, asked)


def ask_release(helper: Path, mountpoint: Path) -> None:
    """Raises `UnfinishedMount`."""
    _asked(helper, {"action": "release", "path": str(mountpoint)})


def ask_keep(helper: Path, mountpoint: Path, connection: int, lock: int, told: int) -> None:
    """Have the helper hold the mount until the next daemon claims it. Raises `UnfinishedMount`."""
    _asked(helper, {"action": "keep", "path": str(mountpoint)}, (connection, lock, told))


def ask_claim(helper: Path, mountpoint: Path) -> Sequence[int]:
    """What `ask_keep` gave away, in that order, or nothing. Raises `UnfinishedMount`."""
    _, descriptors = _asked(helper, {"action": "claim", "path": str(mountpoint)})
    return descriptors
