"""One mount, from mount(2) to umount: `stratum mount` runs this."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import pyfuse3
import trio

from stratum import buckets, counting, housekeeping, notify
from stratum.acknowledge import detach
from stratum.errors import StratumError, UnfinishedMount
from stratum.fuse import _negotiate, sharing
from stratum.fuse.invalidation import Follower, Idle
from stratum.fuse.operations import Operations
from stratum.fuse.session import Session
from stratum.log import get_logger
from stratum.mountd import ask_mount, helper_of, mount_at, tune
from stratum.schema import key_u64, pack_json
from stratum.undisturbed import Undisturbed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from stratum.fuse.sharing import Wanted
    from stratum.transaction import MetadataTransaction
    from stratum.volume import Volume

log = get_logger("mount")
REQUESTS_MAX = 500
"""The cap on requests in flight; too low a cap lets slow ones hold up all others (measured: 10 gives 1.7 s)."""


def remove_stale(volume: Volume, mountpoint: Path) -> None:
    """Detach a mount whose daemon is gone, and refuse one that is alive. Raises `UnfinishedMount`."""
    while mount_at(str(mountpoint)) is not None:
        try:
            os.statvfs(mountpoint)
        except OSError:
            log.warning("stale_mount_removed", mountpoint=str(mountpoint))
            detach(volume, str(mountpoint))
            continue
        raise UnfinishedMount(f"{mountpoint} is mounted already; unmount it first: umount {mountpoint}")


def serve(volume: Volume, mountpoint: Path, *, ready: Callable[[], None], wanted: Wanted) -> None:
    """Mount and serve until SIGTERM, SIGINT or umount. Any number of read-only mounts stand beside a writable one.

    Raises `UnfinishedMount`, `NoSuchBucket`, or `Busy` if the tree is mounted for writing already: two writable mounts would
    wait for each other's acknowledgement while the kernel holds the locks those need, unless they cache no names.
    """
    housekeeping.recover(volume)
    sharing.ask(volume, wanted)
    with volume.snapshot() as reader:
        sharing.check(reader, wanted)
        root = buckets.get(reader, wanted.bucket).inode if wanted.bucket else pyfuse3.ROOT_INODE
    remove_stale(volume, mountpoint)
    mountpoint.mkdir(parents=True, exist_ok=True)
    operations = Operations(volume, root=root, shared=wanted.shared, bucket=wanted.bucket)
    helper = helper_of(volume.root, volume.config)
    try:
        if helper is not None:
            descriptor = ask_mount(helper, mountpoint, read_only=wanted.read_only)
            pyfuse3.init(operations, f"/dev/fd/{descriptor}", set(pyfuse3.default_options))
        else:
            options = {"fsname=stratum", "subtype=stratum", "allow_other", "default_permissions"}
            pyfuse3.init(
                operations,
                str(mountpoint),
                set(pyfuse3.default_options) | options | ({"ro"} if wanted.read_only else set()),
            )
    except RuntimeError as error:
        raise UnfinishedMount(
            f"{mountpoint} could not be mounted ({error}); is /dev/fuse there? A volume that does not belong to root is mounted through `stratum mountd`"
        ) from error
    followers: list[Follower] = []
    try:
        trio.run(_main, volume, operations, mountpoint, ready, followers, wanted)
    finally:
        # Until the mount is gone the kernel answers from its cache, so the log is followed and writers wait for us.
        if helper is not None:
            with suppress(UnfinishedMount):
                detach(volume, str(mountpoint))
        pyfuse3.close(unmount=True)
        session = volume.session.id
        try:
            volume.mutate(lambda tx: tx.delete(key_u64(b"T", session)), frees=True)
        except StratumError as error:
            log.warning("mount_row_left", error=str(error))
        for follower in followers:
            follower.stop()


async def _main(
    volume: Volume,
    operations: Operations,
    mountpoint: Path,
    ready: Callable[[], None],
    followers: list[Follower],
    wanted: Wanted,
) -> None:
    token = trio.lowlevel.current_trio_token()
    volume.committer.undisturbed = Undisturbed(token.run_sync_soon)  # RunFinishedError is a RuntimeError
    idle = Idle()
    trio.lowlevel.add_instrument(idle)
    follower = Follower(volume, operations, token, idle)
    followers.append(follower)
    line = mount_at(str(mountpoint))
    if line is None:
        raise UnfinishedMount(f"{mountpoint} vanished while it was being mounted")
    device = line.device
    row = {
        "socket": follower.socket_name,
        "device": device,
        "mountpoint": str(mountpoint),
        "slot": volume.session.slot,
        "read_only": wanted.read_only,
        "bucket": wanted.bucket,
        "shared": wanted.shared,
    }
    session = volume.session.id
    follower.start()

    def register(tx: MetadataTransaction) -> None:
        sharing.check(tx, wanted)
        tx.put(key_u64(b"T", session), pack_json(row))

    await operations.commit(register)
    if helper_of(volume.root, volume.config) is None:
        tune(device)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_until_signal, operations)
            nursery.start_soon(_background, volume, operations)
            if not wanted.read_only:
                nursery.start_soon(sharing.share_when_asked, volume, operations)
            nursery.start_soon(_announce, mountpoint, ready)
            operations.commits.session = Session()
            operations.commits.session.install()
            await pyfuse3.main(min_tasks=1, max_tasks=REQUESTS_MAX)
            await operations.flush_old(everything=True)
            nursery.cancel_scope.cancel()
    finally:
        follower.loop_ended()


async def _announce(mountpoint: Path, ready: Callable[[], None]) -> None:
    """Ready is when the mount answers, not when it was asked for."""
    await trio.to_thread.run_sync(os.statvfs, mountpoint, abandon_on_cancel=True)
    if not _negotiate.keeps_umask_out():
        log.error("umask_comes_first", why="the kernel narrows default access lists by the umask; update it or libfuse")
    ready()


async def _until_signal(operations: Operations) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("mount_ending", signal=signal.Signals(number).name)
            notify.send(STOPPING=1)
            await operations.flush_old(everything=True)
            pyfuse3.terminate()
            return


async def _background(volume: Volume, operations: Operations) -> None:
    watchdog = notify.Watchdog(time.monotonic())
    while True:
        await trio.sleep(0.25)
        counting.beat()
        watchdog.feed(time.monotonic(), healthy=volume.failed is None)
        try:
            await operations.flush_old()
            while await operations.release_orphans():
                pass
        except StratumError as error:
            log.error("background_failed", error=error.message)
        if volume.failed is not None:
            log.error("mount_ending", error=str(volume.failed))
            os._exit(70)
