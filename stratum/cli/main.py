"""`stratum COMMAND`: parse, run, print. Every command has --json and --help; nothing ever prompts."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stratum import __version__, filling, notify
from stratum.cli import audit_commands as auditing
from stratum.cli import backup_commands as saving
from stratum.cli import check_commands, commands, disk_commands, tier_commands
from stratum.cli import operate_commands as operate
from stratum.cli import words as command_words
from stratum.cli.exit_codes import COULD_NOT_RUN, TABLE, USAGE
from stratum.cli.output import to_json
from stratum.cli.values import address, duration, moment, number, octal, whole
from stratum.cli.words import Parser
from stratum.errors import StillFilling, StratumError
from stratum.kept_mounts import KEEP_S
from stratum.limits import RATES
from stratum.mountd import SOCKET
from stratum.processes import become_owner
from stratum.volume import Volume

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_EPILOG = (
    "exit codes: 0 done, 1 the answer is no (fsck: damage left), 2 wrong usage (fsck: damage repaired), 3 could not run, "
    "4 not found, 5 exists already, 6 refused, 7 no space, 70 a disk failed"
)

TARGET = "a folder, or a new file whose name ends in .tar.gz"


class _Parser(Parser):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("epilog", _EPILOG)
        super().__init__(*args, **kwargs)


def _init_arguments(made: argparse.ArgumentParser) -> None:
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
    made.add_argument(
        "--warm", metavar="DIR", type=Path, action="append", help="a disk of the warm tier; give at least K+M of them"
    )
    _create_argument(made, "--hot and --warm")
    made.add_argument("--ec", metavar="K+M", help="shards of the warm tier: any M of its disks may be lost")


def _create_argument(made: argparse.ArgumentParser, which: str) -> None:
    made.add_argument(
        "--create",
        action="store_true",
        help=f"make {which} if not there; else that is refused: its disk may not be mounted",
    )


def _over_argument(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--over", action="store_true", help="although the mountpoint is not empty: what lies in it is hidden"
    )


def _filled_argument(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--wait",
        action="store_true",
        help="until its rows are all there; else a directory is filled in when it is asked for, and in the background",
    )


def _remote_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("--endpoint", metavar="URL", help="of the S3 service; without it AWS")
    made.add_argument("--bucket", metavar="B")
    made.add_argument("--directory", metavar="DIR", type=Path, help="a directory instead of a bucket")
    made.add_argument("--prefix", metavar="P", default="", help="below which everything lies")
    made.add_argument("--region", metavar="R", default="")
    made.add_argument(
        "--credentials",
        metavar="FILE",
        type=Path,
        help="access_key and secret_key; only its owner may read it (else: the AWS chain)",
    )
    made.add_argument(
        "--encryption-key",
        metavar="FILE",
        type=Path,
        help="64 hexadecimal digits; everything is encrypted with it before it leaves",
    )


def _wait_argument(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--wait", action="store_true", help="return when nothing is left on the disk; exit 1 if something has to stay"
    )


def _sweep_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("--older-than", metavar="TIME", type=duration, default="7d", help="like 90m, 24h or 30d (7d)")
    made.add_argument(
        "--apply",
        action="store_true",
        help="remove it; after a `meta restore` that is also what moved there since the backup",
    )


def _tier_parsers(sub: Any, command: Any, group: Any) -> None:
    made = command(
        sub, "rebuild", "make a volume anew from its remote", tier_commands.rebuild_volume, volume_default=False
    )
    made.add_argument("--from-cold", metavar="NAME", required=True, help="what the remote is to be called")
    _init_arguments(made)
    _remote_arguments(made)
    made = command(sub, "explain", "why an object is where it is, and what would move it", tier_commands.explain)
    made.add_argument("key", metavar="BUCKET/KEY")
    tiers = group("tier", "move data between the tiers")
    command(tiers, "status", "what lies where, and what waits", tier_commands.tier_status)
    made = command(tiers, "plan", "what would move if nothing were used", tier_commands.tier_plan)
    made.add_argument("--horizon", metavar="TIME", type=duration, default="24h", help="like 90m, 24h or 30d (24h)")
    made = command(tiers, "move", "bring an object to a tier", tier_commands.tier_move)
    made.add_argument("key", metavar="BUCKET/KEY")
    made.add_argument("tier", choices=("hot", "warm", "cold"))
    made.add_argument(
        "--wait", action="store_true", help="return when it is there and its source is freed; exit 1 if it cannot"
    )
    made = command(tiers, "drain", "empty a tier", tier_commands.tier_drain)
    made.add_argument("tier", choices=("warm", "cold"))
    made.add_argument("--cancel", action="store_true")
    command(tiers, "pause", "hold background moves", tier_commands.tier_pause)
    command(tiers, "resume", "go on with background moves", tier_commands.tier_resume)
    disks = group("disk", "disks of the warm tier")
    command(disks, "list", "disks, and what is being rebuilt", disk_commands.disk_list)
    made = command(disks, "add", "add an empty folder", disk_commands.disk_add)
    made.add_argument("path", metavar="DIR", type=Path)
    _create_argument(made, "the folder")
    made = command(disks, "remove", "empty a disk, then forget it", disk_commands.disk_remove)
    made.add_argument("path", metavar="DIR", type=Path)
    made.add_argument("--force", action="store_true", help="although fewer disks than shards are left")
    _wait_argument(made)
    made = command(disks, "replace", "rebuild a disk's shards on another one", disk_commands.disk_replace)
    made.add_argument("path", metavar="OLD", type=Path)
    made.add_argument("new", metavar="NEW", type=Path)
    _create_argument(made, "the new folder")
    _wait_argument(made)
    made = command(
        disks, "sweep", "find shards that nothing refers to; remove them with --apply", disk_commands.disk_sweep
    )
    made.add_argument("path", metavar="DIR", type=Path)
    _sweep_arguments(made)
    remotes = group("cold", "remotes of the cold tier")
    made = command(remotes, "add", "probe a remote and use it", tier_commands.cold_add)
    made.add_argument("name", metavar="NAME")
    _remote_arguments(made)
    made.add_argument("--create-bucket", action="store_true")
    made.add_argument("--storage-class", metavar="CLASS", default="", help="of the objects in the remote")
    command(remotes, "list", "remotes and what they hold", tier_commands.cold_list)
    made = command(remotes, "check", "ask for every object", tier_commands.cold_check)
    made.add_argument("name", metavar="NAME", nargs="?")
    made.add_argument("--read", action="store_true", help="read every byte: that may cost money")
    made.add_argument(
        "--restore-marker",
        action="store_true",
        help="put back the marker of NAME, which it has lost, before anything else",
    )
    made = command(
        remotes,
        "sweep",
        "find what lies in a remote and nothing refers to; remove it with --apply",
        tier_commands.cold_sweep,
    )
    made.add_argument("name", metavar="NAME")
    _sweep_arguments(made)
    command(remotes, "remove", "forget an empty remote", tier_commands.cold_remove).add_argument("name", metavar="NAME")
    made = command(remotes, "drain", "empty a remote", tier_commands.cold_drain)
    made.add_argument("name", metavar="NAME")
    made.add_argument("--cancel", action="store_true")
    scrub = group("scrub", "check every stored byte, and heal")
    made = command(scrub, "start", "begin a pass, or go on with a paused one", disk_commands.scrub_start)
    made.add_argument(
        "--wait", action="store_true", help="return when it is done; exit 1 if something could not be healed"
    )
    command(scrub, "status", "how far it is", disk_commands.scrub_status)
    for name, text in (("pause", "hold the pass"), ("resume", "go on with it")):
        command(scrub, name, text, disk_commands.scrub_set).set_defaults(action=name)
    command(scrub, "speed", "how fast it reads", disk_commands.scrub_speed).add_argument(
        "bytes_per_s", metavar="BYTES_PER_S", type=whole(1, 1 << 50, example="52428800")
    )


def _operate_parsers(sub: Any, command: Any, group: Any) -> None:
    command(
        sub, "status", "health, capacity, objects and processes; the exit code is the worst severity", operate.status
    )
    made = command(sub, "top", "what is going on, live", operate.top)
    made.add_argument(
        "--interval", metavar="SECONDS", type=number(0.1, 3600, example="2"), default=2.0, help="between two frames (2)"
    )
    made.add_argument("--once", action="store_true", help="print one frame and end")
    made = command(sub, "admin", "serve health and metrics, and send alerts, alone", operate.admin)
    made.add_argument("--supervised", action="store_true", help=argparse.SUPPRESS)
    made = sub.add_parser(
        "mountd", help="mount for a daemon without root", description="mount for a daemon without root"
    )
    made.add_argument("--socket", metavar="PATH", type=Path, default=SOCKET)
    made.add_argument("--user", metavar="NAME", default="stratum", help="who may ask (stratum)")
    made.add_argument("--root", metavar="DIR", type=Path, action="append", required=True, help="mounts lie below it")
    made.add_argument(
        "--keep",
        metavar="TIME",
        type=duration,
        default=f"{KEEP_S:.0f}s",
        help=f"how long a mount waits for a daemon that restarts ({KEEP_S:.0f}s); 0s: it ends with it",
    )
    made.set_defaults(run=operate.mountd, json=False, volume=None)
    codes = group("health", "what is wrong, and what is muted")
    command(codes, "list", "what is wrong now; the exit code is the worst severity", operate.health_list)
    command(codes, "codes", "every code there is", operate.health_codes)
    command(
        codes, "damaged", "the objects whose bytes are damaged, with no good copy; exits with 1 if there are any", operate.health_damaged
    )  # fmt: skip
    made = command(codes, "mute", "keep a code out of exit codes and alerts for a while", operate.health_mute)
    made.add_argument("code", metavar="CODE")
    made.add_argument("--for", metavar="TIME", type=duration, dest="duration", required=True, help="like 30m, 4h or 2d")
    command(codes, "unmute", "hear a code again", operate.health_unmute).add_argument("code", metavar="CODE")
    records = group("audit", "who did what")
    command(records, "verify", "whether the chain of records is whole", auditing.audit_verify)
    made = command(records, "tail", "the newest records", auditing.audit_tail)
    made.add_argument(
        "-n", dest="lines", metavar="N", type=whole(1, 1_000_000, example="20"), default=20, help="so many (20)"
    )
    made.add_argument("--follow", action="store_true", help="go on until interrupted")
    made = command(records, "export", "records as JSON, one a line", auditing.audit_export)
    made.add_argument(
        "--since", metavar="TIME", type=moment, default="", help="like 2026-11-24 or 2026-11-24T12:00:00Z, in UTC"
    )
    made.add_argument("--until", metavar="TIME", type=moment, default="")
    made.add_argument("--user", metavar="NAME", default="")
    made.add_argument("--bucket", metavar="B", default="")
    saved = group("meta", "save the metadata, and bring it back")
    made = command(saved, "backup", "write a verified backup while the volume is served", saving.meta_backup)
    made.add_argument("target", metavar="TARGET", type=Path, help=TARGET)
    made.add_argument(
        "--keep",
        metavar="N",
        type=whole(0, 100_000, example="14"),
        help="leave the newest N of this volume in the folder, and in the remote",
    )
    made.add_argument("--to-cold", metavar="NAME", default="", help="send it to this remote too")
    _create_argument(made, "the folder of the backup")
    made.add_argument("--unencrypted", action="store_true", help="although the remote is not encrypted")
    made = saved.add_parser("fetch", help="bring the newest backup back from a bucket alone", epilog=_EPILOG)
    made.add_argument("target", metavar="TARGET", type=Path, help=TARGET)
    _create_argument(made, "the folder")
    _remote_arguments(made)
    made.add_argument("--json", action="store_true", help="print one JSON document")
    made.set_defaults(run=saving.meta_fetch, volume=None)
    made = command(
        saved, "restore", "make a backup the metadata of a volume", saving.meta_restore, volume_default=False
    )
    made.add_argument("file", metavar="FILE", type=Path)
    made.add_argument(
        "--adopt-data",
        action="store_true",
        help="a new volume takes the data folders over: the old one is gone for good",
    )
    made.add_argument(
        "--metadata-only",
        action="store_true",
        help="do not look for what was moved to another tier since the backup",
    )
    made = saved.add_parser("verify", help="read a backup back", description="read a backup back", epilog=_EPILOG)
    made.add_argument("file", metavar="FILE", type=Path)
    made.add_argument("--json", action="store_true", help="print one JSON document")
    made.set_defaults(run=saving.meta_verify, volume=None)
    made = command(sub, "upgrade", "bring a volume of an older version to the format of this one", saving.upgrade)
    made.add_argument("--backup", metavar="DIR", type=Path, help="where a backup of it is written first")
    _create_argument(made, "the folder of the backup")
    drills = group("drill", "prove that what is for a bad day works")
    made = command(drills, "restore", "restore a backup aside, check it, print RPO and RTO", saving.drill_restore)
    made.add_argument("source", metavar="SOURCE", type=Path, help="a backup, or a folder of them: the newest")
    made.add_argument(
        "--sample",
        metavar="N",
        type=whole(0, 1_000_000_000, example="200"),
        default=200,
        help="files to read whole (200)",
    )
    made.add_argument("--scratch", metavar="DIR", type=Path, help="where the restored metadata lies meanwhile")
    made.add_argument("--seed", metavar="N", type=whole(example="7"), help="choose the same files again")
    limit = group("limit", "how many requests and bytes a second S3 takes from a user or for a bucket")
    made = command(limit, "set", "set or remove a limit", operate.limit_set)
    made.add_argument("--bucket", metavar="B")
    made.add_argument("--user", metavar="U")
    made.add_argument("--anonymous", action="store_true", help="everybody without a key, together")
    made.add_argument(
        "--requests-per-s",
        metavar="N",
        type=number(*RATES["requests"], example="100"),
        help="more are refused with 503 SlowDown",
    )
    made.add_argument(
        "--bytes-per-s",
        metavar="N",
        type=number(*RATES["bytes"], example="10000000"),
        help="bodies are slowed down to it",
    )
    made.add_argument("--remove", action="store_true", help="no limit any more")
    command(limit, "show", "limits", operate.limit_show)
    helped = group("support", "what somebody needs to help you")
    made = command(
        helped, "bundle", "facts about the volume and the machine, without names and contents", operate.support_bundle
    )
    made.add_argument("target", metavar="FILE", type=Path, nargs="?", help="a new file, .tar.gz")
    made.add_argument("--preview", action="store_true", help="print what would be in it, and write nothing")
    made.add_argument(
        "--log", metavar="FILE", type=Path, help="a log of the service, if it does not log to the journal"
    )
    quota = group("quota", "how much a bucket, or all buckets of a user, may hold")
    for name, text, run in (
        ("set", "set or remove a quota", operate.quota_set),
        ("show", "quotas, and what is used of them", operate.quota_show),
    ):
        made = command(quota, name, text, run)
        made.add_argument("--bucket", metavar="B")
        made.add_argument("--user", metavar="U")
        if name == "set":
            made.add_argument("--bytes", metavar="N", type=whole(1, example="10737418240"))
            made.add_argument("--objects", metavar="N", type=whole(1, example="1000000"))
            made.add_argument("--remove", action="store_true", help="no limit any more")


def _on_off(text: str) -> bool:
    if text not in {"on", "off"}:
        raise argparse.ArgumentTypeError("on or off")
    return text == "on"


def build_parser(*, volume: Path | None = None) -> argparse.ArgumentParser:
    """With a `volume` the commands that work on one take no VOLUME among their words: it is this one."""
    parser = _Parser(
        prog="stratum", description="One volume that is a POSIX filesystem and an S3 endpoint at the same moment."
    )
    parser.add_argument("--version", action="version", version=f"stratum {__version__}")
    sub = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(
        group: Any, name: str, text: str, run: Callable[[argparse.Namespace], int], *, volume_default: bool = True
    ) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = group.add_parser(name, help=text, description=text, epilog=_EPILOG)
        if volume is None or not volume_default:
            made.add_argument("volume", metavar="VOLUME", type=Path)
        else:
            made.set_defaults(volume=volume)
        made.add_argument("--json", action="store_true", help="print one JSON document")
        made.set_defaults(run=run, schema=made.prog.partition(" ")[2].replace(" ", "."))
        return made

    def group(name: str, text: str) -> Any:
        made = sub.add_parser(name, help=text, description=text, epilog=_EPILOG)
        return made.add_subparsers(metavar="ACTION", required=True)

    made = command(sub, "init", "make a volume in an empty or new directory", commands.init, volume_default=False)
    _init_arguments(made)
    made = command(sub, "serve", "serve the S3 endpoint and the mount until SIGTERM", commands.serve)
    _over_argument(made)
    for name, text, run in (
        ("s3", "serve the S3 endpoint alone", commands.s3),
        ("mount", "serve the mount alone", commands.mount),
    ):
        made = command(sub, name, text, run)
        made.add_argument("--supervised", action="store_true", help=argparse.SUPPRESS)
        if name == "mount":
            _over_argument(made)
            made.add_argument(
                "directory", metavar="DIR", type=Path, nargs="?", help="mountpoint (mount.path of the configuration)"
            )
            made.add_argument(
                "--read-only", action="store_true", help="may stand beside the writable mount, any number of times"
            )
            made.add_argument(
                "--background", action="store_true", help="return when it is mounted; the log goes to syslog"
            )
            made.add_argument("--bucket", metavar="NAME", default="", help="mount one bucket instead of all")
            made.add_argument(
                "--renew",
                action="store_true",
                help="have the running mount at DIR go on in the program that is installed now; files stay open",
            )
            made.add_argument(
                "--release",
                action="store_true",
                help="let the folder DIR be written to again, where nothing is mounted",
            )
            made.add_argument(
                "--shared",
                action="store_true",
                help="allow other writable mounts of the same tree that say so too; they share locks, and cache no names",
            )
            made.add_argument(
                "--shared-without-locks",
                action="store_true",
                help="allow other writable mounts of the same tree that say so too; locks do not reach across, and names are not cached",
            )
    _operate_parsers(sub, command, group)
    made = command(sub, "fsck", "check the volume, and repair it with --repair", check_commands.fsck)
    made.add_argument("--repair", action="store_true")
    made = command(sub, "gc", "find bytes nothing refers to, and remove them with --apply", check_commands.gc)
    made.add_argument("--apply", action="store_true")

    made = command(sub, "tierd", "move, heal and expire data, alone", tier_commands.tierd)
    made.add_argument("--supervised", action="store_true", help=argparse.SUPPRESS)

    users = group("user", "manage users")
    made = command(users, "add", "add a user; shows an access key once", commands.user_add)
    made.add_argument("name", metavar="NAME")
    made.add_argument("--display-name", metavar="TEXT", default="")
    made.add_argument("--email", metavar="ADDR", type=address, default="")
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
    _filled_argument(made)
    snapshots = group("snapshot", "read-only states of a bucket or directory")
    made = command(
        snapshots, "create", "keep the present state; it becomes a read-only bucket", commands.snapshot_create
    )
    made.add_argument("path", metavar="PATH", help="BUCKET or BUCKET/DIRECTORY")
    made.add_argument("name", metavar="NAME", nargs="?", help="(the time, in UTC)")
    _filled_argument(made)
    made = command(snapshots, "list", "list snapshots", commands.snapshot_list)
    made.add_argument("path", metavar="PATH", nargs="?", help="only those of BUCKET or BUCKET/DIRECTORY")
    made = command(snapshots, "remove", "remove a snapshot", commands.snapshot_remove)
    made.add_argument("path", metavar="PATH", help="what it is a snapshot of")
    made.add_argument("name", metavar="NAME")
    _tier_parsers(sub, command, group)
    bucket = group("bucket", "manage buckets")
    made = command(bucket, "create", "make a bucket", commands.bucket_create)
    made.add_argument("name", metavar="NAME")
    made.add_argument("--owner", metavar="USER", help="(the first administrator)")
    command(bucket, "list", "list buckets", commands.bucket_list)
    command(bucket, "remove", "remove an empty bucket", commands.bucket_remove).add_argument("name", metavar="NAME")
    made = command(bucket, "set", "change settings of a bucket", commands.bucket_set)
    made.add_argument("name", metavar="NAME")
    made.add_argument("--anonymous", choices=("none", "read", "read-write"), help="what unsigned requests may do")
    made.add_argument("--audit-reads", type=_on_off, metavar="on|off", help="put reads of it on record, too")
    made.add_argument(
        "--uid", metavar="N", type=whole(0, (1 << 32) - 2, example="1000"), help="owner of files that S3 makes"
    )
    made.add_argument(
        "--gid", metavar="N", type=whole(0, (1 << 32) - 2, example="1000"), help="group of files that S3 makes"
    )
    made.add_argument("--file-mode", metavar="MODE", type=octal(), help="mode of files that S3 makes (octal)")
    made.add_argument("--dir-mode", metavar="MODE", type=octal(), help="mode of directories that S3 makes (octal)")
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
    words = list(sys.argv[1:] if arguments is None else arguments)
    sys.stdout.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]  # names are bytes, and go out as they are
    try:
        options = command_words.read(build_parser, words)
    except command_words.WrongUse as error:
        if command_words.wants_json(words):
            print(to_json({"error": "WrongUse", "message": error.message, "code": USAGE}, "error"))
        command_words.told(error)
        return USAGE
    who = auditing.caller()
    try:
        become_owner(options.volume)
        code = _run(options)
        auditing.record(options, words, who, code)
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


def _run(options: argparse.Namespace) -> int:
    try:
        code = _run_patiently(options)
    except StratumError as error:
        return _report(options, type(error).__name__, error.message, TABLE.get(type(error), COULD_NOT_RUN))
    return code


def _run_patiently(options: argparse.Namespace) -> int:
    """Commands look things up before they change or print anything: what a young clone has not got yet is filled in between."""
    for attempt in range(filling.PATIENCE):
        try:
            code: int = options.run(options)
        except StillFilling as error:
            with Volume(options.volume, "cli") as opened:
                filling.provide(opened, error, attempt)
        else:
            return code
    return COULD_NOT_RUN


def _report(options: argparse.Namespace, kind: str, message: str, code: int) -> int:
    if getattr(options, "json", False):
        print(to_json({"error": kind, "message": message, "code": code}, "error"))
    print(f"stratum: {message}", file=sys.stderr)
    notify.send(STATUS=message)  # for `systemctl status`, and for `serve`, whose part this may be
    return code


def entry() -> None:
    sys.exit(main())


if __name__ == "__main__":
    entry()
