"""`stratum COMMAND`: parse, run, print. Every command has --json and --help; nothing ever prompts."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stratum import __version__
from stratum.cli import commands
from stratum.cli.exit_codes import COULD_NOT_RUN, TABLE
from stratum.errors import StratumError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_EPILOG = (
    "exit codes: 0 done, 1 the answer is no (fsck: damage left), 2 wrong usage (fsck: damage repaired), 3 could not run, "
    "4 not found, 5 exists already, 6 refused, 7 no space, 70 a disk failed"
)


class _Parser(argparse.ArgumentParser):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("epilog", _EPILOG)
        super().__init__(*args, **kwargs)


def _volume_argument(parser: argparse.ArgumentParser, *, default: bool) -> None:
    if default:
        parser.add_argument(
            "volume",
            metavar="VOLUME",
            type=Path,
            nargs="?" if os.environ.get("STRATUM_VOLUME") else None,
            default=Path(os.environ.get("STRATUM_VOLUME", "")),
        )
    else:
        parser.add_argument("volume", metavar="VOLUME", type=Path)
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="stratum", description="One volume that is a POSIX filesystem and an S3 endpoint at the same moment."
    )
    parser.add_argument("--version", action="version", version=f"stratum {__version__}")
    sub = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(
        group: Any, name: str, text: str, run: Callable[[argparse.Namespace], int], *, volume_default: bool = True
    ) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = group.add_parser(name, help=text, description=text, epilog=_EPILOG)
        _volume_argument(made, default=volume_default)
        made.set_defaults(run=run)
        return made

    made = command(sub, "init", "make a volume in an empty or new directory", commands.init, volume_default=False)
    made.add_argument("--s3-listen", metavar="HOST:PORT", help="address of the S3 endpoint (a free port of 127.0.0.1)")
    made.add_argument(
        "--admin-listen", metavar="HOST:PORT", help="address for health and metrics (a free port of 127.0.0.1)"
    )
    made.add_argument("--mount", metavar="DIR", type=Path, help="where `serve` mounts the volume")
    made.add_argument(
        "--hot",
        metavar="DIR",
        type=Path,
        action="append",
        help="a folder for data instead of VOLUME/hot; may be given several times",
    )
    command(sub, "serve", "serve the S3 endpoint and the mount until SIGTERM", commands.serve)
    for name, text, run in (
        ("s3", "serve the S3 endpoint alone", commands.s3),
        ("mount", "serve the mount alone", commands.mount),
    ):
        made = command(sub, name, text, run)
        made.add_argument("--supervised", action="store_true", help=argparse.SUPPRESS)
        if name == "mount":
            made.add_argument(
                "directory", metavar="DIR", type=Path, nargs="?", help="mountpoint (mount.path of the configuration)"
            )
            made.add_argument(
                "--read-only", action="store_true", help="may stand beside the writable mount, any number of times"
            )
            made.add_argument("--bucket", metavar="NAME", default="", help="mount one bucket instead of all")
            made.add_argument(
                "--shared-without-locks",
                action="store_true",
                help="allow other writable mounts of the same tree that say so too; locks do not reach across, and names are not cached",
            )
    command(sub, "status", "capacity, objects, health and processes", commands.status)
    made = command(sub, "fsck", "check the volume, and repair it with --repair", commands.fsck)
    made.add_argument("--repair", action="store_true")
    made = command(sub, "gc", "find bytes nothing refers to, and remove them with --apply", commands.gc)
    made.add_argument("--apply", action="store_true")

    def group(name: str, text: str) -> Any:
        made = sub.add_parser(name, help=text, description=text, epilog=_EPILOG)
        return made.add_subparsers(metavar="ACTION", required=True)

    users = group("user", "manage users")
    made = command(users, "add", "add a user; shows an access key once", commands.user_add)
    made.add_argument("name", metavar="NAME")
    made.add_argument("--display-name", metavar="TEXT", default="")
    made.add_argument("--email", metavar="ADDR", default="")
    made.add_argument("--admin", action="store_true", help="may do everything")
    command(users, "list", "list users", commands.user_list)
    command(users, "remove", "remove a user and its keys", commands.user_remove).add_argument("name", metavar="NAME")
    keys = group("key", "manage access keys")
    command(keys, "create", "make another key for a user; shown once", commands.key_create).add_argument(
        "name", metavar="USER"
    )
    command(keys, "list", "list access keys", commands.key_list)
    command(keys, "revoke", "revoke a key at once", commands.key_revoke).add_argument(
        "access_key", metavar="ACCESS_KEY"
    )
    made = command(sub, "clone", "copy a file, directory or bucket without copying its bytes", commands.clone)
    made.add_argument("source", metavar="SRC", help="BUCKET/... as the mount shows it")
    made.add_argument("target", metavar="DST", help="BUCKET/..., or a new BUCKET; must not exist")
    snapshots = group("snapshot", "read-only states of a bucket or directory")
    made = command(
        snapshots, "create", "keep the present state; it becomes a read-only bucket", commands.snapshot_create
    )
    made.add_argument("path", metavar="PATH", help="BUCKET or BUCKET/DIRECTORY")
    made.add_argument("name", metavar="NAME", nargs="?", help="(the time, in UTC)")
    made = command(snapshots, "list", "list snapshots", commands.snapshot_list)
    made.add_argument("path", metavar="PATH", nargs="?", help="only those of BUCKET or BUCKET/DIRECTORY")
    made = command(snapshots, "remove", "remove a snapshot", commands.snapshot_remove)
    made.add_argument("path", metavar="PATH", help="what it is a snapshot of")
    made.add_argument("name", metavar="NAME")
    bucket = group("bucket", "manage buckets")
    made = command(bucket, "create", "make a bucket", commands.bucket_create)
    made.add_argument("name", metavar="NAME")
    made.add_argument("--owner", metavar="USER", help="(the first administrator)")
    command(bucket, "list", "list buckets", commands.bucket_list)
    command(bucket, "remove", "remove an empty bucket", commands.bucket_remove).add_argument("name", metavar="NAME")
    made = command(bucket, "set", "change settings of a bucket", commands.bucket_set)
    made.add_argument("name", metavar="NAME")
    made.add_argument("--anonymous", choices=("none", "read", "read-write"), help="what unsigned requests may do")
    made.add_argument("--uid", type=int, help="owner of files that S3 makes")
    made.add_argument("--gid", type=int, help="group of files that S3 makes")
    made.add_argument("--file-mode", type=lambda text: int(text, 8), help="mode of files that S3 makes (octal)")
    made.add_argument("--dir-mode", type=lambda text: int(text, 8), help="mode of directories that S3 makes (octal)")
    path = group("path", "translate between keys and paths of the mount")
    made = command(path, "to-key", "the key of a path below the mount's root", commands.path_to_key)
    made.add_argument("text", metavar="PATH", help="BUCKET/..., relative to the mountpoint")
    made = command(path, "to-path", "the path of a key, relative to the mountpoint", commands.path_to_path)
    made.add_argument("text", metavar="BUCKET/KEY")
    config = group("config", "look at the configuration")
    command(config, "show", "print every setting", commands.config_show)
    command(config, "check", "check the file", commands.config_check)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code; errors are printed here and nowhere else."""
    words = _volume_first(list(sys.argv[1:] if arguments is None else arguments))
    options = build_parser().parse_args(words)
    try:
        code: int = options.run(options)
        return code
    except StratumError as error:
        return _report(options, type(error).__name__, error.message, TABLE.get(type(error), COULD_NOT_RUN))
    except BrokenPipeError:
        return COULD_NOT_RUN
    except OSError as error:
        return _report(
            options,
            "OSError",
            f"{error.strerror or error} ({error.filename or options.volume}); check that it exists and that you may use it",
            COULD_NOT_RUN,
        )


_NAMED = {
    ("user", "add"),
    ("user", "remove"),
    ("key", "create"),
    ("key", "revoke"),
    ("bucket", "create"),
    ("bucket", "remove"),
    ("bucket", "set"),
    ("path", "to-key"),
    ("path", "to-path"),
}


def _volume_first(words: list[str]) -> list[str]:
    """With $STRATUM_VOLUME set, `user add NAME` has one positional word: put the volume before it."""
    volume = os.environ.get("STRATUM_VOLUME")
    if not volume or tuple(words[:2]) not in _NAMED:
        return words
    options_with_value = {
        "--display-name",
        "--email",
        "--owner",
        "--anonymous",
        "--uid",
        "--gid",
        "--file-mode",
        "--dir-mode",
    }
    positional = [
        word
        for at, word in enumerate(words[2:], 2)
        if not word.startswith("-") and words[at - 1] not in options_with_value
    ]
    return [*words[:2], volume, *words[2:]] if len(positional) == 1 else words


def _report(options: argparse.Namespace, kind: str, message: str, code: int) -> int:
    if getattr(options, "json", False):
        print(json.dumps({"error": kind, "message": message, "code": code}))
    print(f"stratum: {message}", file=sys.stderr)
    return code


def entry() -> None:
    sys.exit(main())


if __name__ == "__main__":
    entry()
