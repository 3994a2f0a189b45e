"""What must be there before a volume can be served. Trying again does not bring it, so it is looked for first, and named.

A part that finds out by itself ends with exit code 3 (`stratum/cli/exit_codes.py`), and whoever started it does not start it again.
"""

from __future__ import annotations

import os
import socket
import ssl
from contextlib import suppress
from typing import TYPE_CHECKING

from stratum import config_rules, mount_table, places
from stratum.config import parse_listen
from stratum.errors import ConfigInvalid, UnfinishedMount
from stratum.mountd import helper_of
from stratum.sockets import listen

if TYPE_CHECKING:
    from pathlib import Path

    from stratum.config import Config

FUSE_DEVICE = "/dev/fuse"


def troubles(root: Path, config: Config, *, served: bool) -> list[str]:
    """One line each. `served`: the addresses and the mountpoint are in use, as they should be."""
    found = [*config_rules.missing(root, config), *_not_writable(root, config)]
    for key, address in (("s3.listen", config.s3_listen), ("admin.listen", config.admin_listen)):
        try:
            if served:
                resolve(address, key)
            else:
                listen(address, key).close()
        except ConfigInvalid as error:
            found.append(error.message)
    for section, certificate, key in (
        ("s3", config.s3_tls_certificate, config.s3_tls_key),
        ("admin", config.admin_tls_certificate, config.admin_tls_key),
    ):
        if certificate and (root / certificate).is_file() and (root / key).is_file():
            with _Noting(found):
                check_certificate(root / certificate, root / key, section)
    if config.mount_path:
        with _Noting(found):
            check_fuse(root, config)
    return found


class _Noting:
    """Note the message of what is refused, and go on."""

    def __init__(self, found: list[str]) -> None:
        self._found = found

    def __enter__(self) -> None:
        return

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> bool:
        if isinstance(error, ConfigInvalid | UnfinishedMount):
            self._found.append(error.message)
            return True
        return False


def _not_writable(root: Path, config: Config) -> list[str]:
    return [
        f"volume.hot: this process may not write into {root / hot}; its owner is the one to serve the volume"
        for hot in config.volume_hot
        if (root / hot).is_dir() and not os.access(root / hot, os.W_OK | os.X_OK)
    ]


def resolve(address: str, key: str) -> None:
    """Raises `ConfigInvalid`."""
    host, port = parse_listen(address, key)
    try:
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigInvalid(f"{key} = {address!r} does not resolve: {error.strerror}; change it") from error


def check_certificate(certificate: Path, key: Path, section: str) -> None:
    """Raises `ConfigInvalid` if nobody could speak TLS with them."""
    for name, path in (("tls_certificate", certificate), ("tls_key", key)):
        if not os.access(path, os.R_OK):
            why = "cannot be read by this process" if path.exists() else "is not there"
            raise ConfigInvalid(f"{section}.{name}: {path} {why}")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError) as error:
        raise ConfigInvalid(
            f"{section}.tls_certificate: {certificate} and {key} do not go together, or are no PEM files ({error})"
        ) from error


def check_fuse(root: Path, config: Config) -> None:
    """Raises `UnfinishedMount` if this process could not mount, nor ask a helper to."""
    helper = helper_of(root, config)
    if helper is not None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asked:
            try:
                asked.connect(str(helper))
            except OSError as error:
                raise UnfinishedMount(
                    f"mount.path: the mount helper at {helper} cannot be reached ({error.strerror}); systemctl status stratum-mountd"
                ) from error
        return
    try:
        os.close(os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise UnfinishedMount(
            f"mount.path: {FUSE_DEVICE} cannot be opened ({error.strerror}): modprobe fuse, give the container the device, or mount through `stratum mountd`"
        ) from error
    mountpoint = places.real(root / config.mount_path)
    with suppress(OSError):
        line = mount_table.mount_at(str(mountpoint))
        if line is not None and not line.is_stratum:
            raise UnfinishedMount(
                f"mount.path: {mountpoint} is the mount of another file system ({line.file_system}); choose another folder"
            )


def refuse(root: Path, config: Config) -> None:
    """Before a volume is served. Raises `ConfigInvalid` with everything that is missing, in one line."""
    found = troubles(root, config, served=False)
    if found:
        raise ConfigInvalid("; ".join(found))
