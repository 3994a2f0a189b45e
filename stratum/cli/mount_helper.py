"""`mount.stratum`: what mount(8) calls for a line of fstab. `/srv/vol /mnt/s stratum _netdev,nofail 0 0`.

    mount.stratum VOLUME DIR [-sfnv] [-N NAMESPACE] [-t TYPE] [-o OPTIONS]

Exit codes are those of mount(8): 0 mounted, 1 wrong usage, 32 it could not be mounted.
"""

from __future__ import annotations

import getopt
import sys
from typing import TYPE_CHECKING

from stratum.cli import main as command_line

if TYPE_CHECKING:
    from collections.abc import Sequence

USAGE, FAILED = 1, 32
_OF_MOUNT = {
    "rw", "auto", "noauto", "defaults", "nofail", "_netdev", "user", "nouser", "users", "owner", "group",
    "suid", "nosuid", "dev", "nodev", "exec", "noexec", "async", "atime", "noatime", "diratime", "nodiratime", "relatime",
    "norelatime", "strictatime", "nostrictatime", "lazytime", "nolazytime",
}  # fmt: skip
"""Of mount(8) and its fstab: not ours. That a mount is nosuid and nodev in any case says docs/operations/install.md."""


class _Usage(Exception):
    pass


def translate(arguments: Sequence[str]) -> list[str] | None:
    """The words of `stratum mount`; None if nothing is to be done. Raises `_Usage`."""
    try:
        flags, places = getopt.gnu_getopt(list(arguments), "sfnvN:t:o:")
    except getopt.GetoptError as error:
        raise _Usage(str(error)) from None
    if len(places) != 2:
        raise _Usage("mount.stratum VOLUME DIR [-o OPTIONS]")
    words = ["mount", *places, "--background"]
    sloppy = any(flag == "-s" for flag, _ in flags)
    for option in (option for flag, value in flags if flag == "-o" for option in value.split(",") if option):
        name, _, value = option.partition("=")
        if option == "ro":
            words.append("--read-only")
        elif option in {"over", "shared", "shared_without_locks"}:
            words.append("--" + option.replace("_", "-"))
        elif name == "bucket" and value:
            words += ["--bucket", value]
        elif not (option in _OF_MOUNT or name.startswith(("x-", "X-", "comment")) or sloppy):
            raise _Usage(f"unknown option {option!r}; there are ro, over, bucket=NAME, shared and shared_without_locks")
    return None if any(flag == "-f" for flag, _ in flags) else words


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        words = translate(sys.argv[1:] if arguments is None else arguments)
    except _Usage as error:
        print(f"mount.stratum: {error}", file=sys.stderr)
        return USAGE
    return FAILED if words is not None and command_line.main(words) else 0


def entry() -> None:
    sys.exit(main())


if __name__ == "__main__":
    entry()
