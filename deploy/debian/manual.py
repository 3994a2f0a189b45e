"""Manual pages, made from the command line itself so that they cannot lie."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from stratum.cli.main import build_parser

if TYPE_CHECKING:
    from collections.abc import Iterator

_MOUNT = r""".TH MOUNT.STRATUM 8 "" "stratum {version}" "System administration"
.SH NAME
mount.stratum \- mount a Stratum volume
.SH SYNOPSIS
.B mount \-t stratum
.I VOLUME DIR
.RB [ \-o
.IR OPTIONS ]
.SH DESCRIPTION
Called by
.BR mount (8),
also for a line of
.IR /etc/fstab :
.PP
.nf
/srv/stratum/volume /mnt/data stratum _netdev,nofail 0 0
.fi
.PP
It returns when the mount answers. The daemon goes on as the owner of the volume, logs to syslog, and ends with
.BR umount (8).
A volume that does not belong to root is mounted through stratum\-mountd.socket.
.SH OPTIONS
.TP
.B ro
read only; may stand beside a writable mount, any number of times
.TP
.BI bucket= NAME
mount one bucket instead of all
.TP
.B shared_without_locks
allow other writable mounts of the same tree that say so too
.SH EXIT STATUS
0 mounted, 1 wrong usage, 32 it could not be mounted.
.SH SEE ALSO
.BR stratum (1)
"""


def _escaped(text: str) -> str:
    return text.replace("\\", r"\e").replace("-", r"\-").replace("'", r"\(aq")


def _line(text: str) -> str:
    escaped = _escaped(text)
    return r"\&" + escaped if escaped.startswith((".", r"\(aq")) else escaped


def _leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield parser
    for action in below:
        for child in action.choices.values():
            yield from _leaves(child)


def _stratum(version: str) -> str:
    parser = build_parser()
    lines = [f'.TH STRATUM 1 "" "stratum {_escaped(version)}" "User commands"', ".SH NAME"]
    lines += [r"stratum \- one volume that is a POSIX file system and an S3 endpoint", ".SH SYNOPSIS"]
    lines += [".B stratum", ".I COMMAND VOLUME", "[options]", ".SH DESCRIPTION", _line(parser.description or "")]
    lines += ["Without VOLUME commands take $STRATUM_VOLUME. Every command has \\-\\-help.", ".SH COMMANDS"]
    for leaf in _leaves(parser):
        lines += [".TP", f".B {_line(leaf.prog)}", _line(leaf.description or "")]
        for action in leaf._actions:
            if action.help in {None, argparse.SUPPRESS} or action.dest in {"help", "json"}:
                continue
            words = ", ".join(action.option_strings) or str(action.metavar)
            value = f" {action.metavar}" if action.option_strings and action.metavar else ""
            lines += [".RS", ".TP", f".B {_line(words + value)}", _line(str(action.help)), ".RE"]
    lines += [".SH EXIT STATUS", _line((parser.epilog or "").removeprefix("exit codes: ") + "."), ".SH SEE ALSO"]
    lines += ["/usr/share/doc/stratum/operations", ""]
    return "\n".join(lines)


def pages(version: str) -> dict[str, str]:
    """Sources by name, like `stratum.1`."""
    return {"stratum.1": _stratum(version), "mount.stratum.8": _MOUNT.replace("{version}", _escaped(version))}
