"""One mount, from mount(2) to umount: `stratum mount` runs this."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import pyfuse3
import trio

from stratum import buckets, counting, housekeeping, mounting, notify, places
from stratum.errors import StratumError, UnfinishedMount
from stratum.fencing import take_away
from stratum.file_locks import LockTable
from stratum.fuse import _negotiate, sharing, takeover
from stratum.fuse.invalidation import Follower, Idle
from stratum.fuse.lock_operations import answering
from stratum.fuse.locks import Locks
from stratum.fuse.operations import Operations
from stratum.fuse.session import Session
from stratum.log import get_logger
from stratum.mount_rows import mount_rows, tell_mount_row
from stratum.mount_table import mount_at, stacked_at
from stratum.mountd import ask_mount, ask_release, helper_of, source_name
from stratum.schema import key_u64, pack_json
from stratum.undisturbed import Undisturbed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from stratum.fuse.sharing import Wanted
    from stratum.fuse.takeover import Handover
    from stratum.transaction import MetadataTransaction
    from stratum.volume import Volume

log = get_logger("mount")
LOOK_S = 0.25
REQUESTS_MAX = 500
"""The cap on requests in flight; too low a cap lets slow ones hold up all others (measured: 10 gives 1.7 s)."""


def stale_at(volume: Volume, mountpoint: Path) -> tuple[int, int]:
    """(id, device) of a mount whose daemon is gone, which the new one is to replace; 0: none. Raises `UnfinishedMount` for anything else there."""
    while True:
        with mounting.top(mountpoint) as now:
            if now is None:
                return 0, 0
            if not now.line.is_stratum:
                raise UnfinishedMount(
                    f"{mountpoint} is the mount of another file system ({now.line.file_system}); choose another folder"
                )
            if not mounting.is_dead(now):
                raise UnfinishedMount(f"{mountpoint} is mounted already; unmount it first: umount {mountpoint}")
            log.warning("stale_mount_found", mountpoint=str(mountpoint))
            row = {"mountpoint": str(mountpoint), "device": now.line.minor}
            if len(stacked_at(str(mountpoint))) == 1:
                return now.id, now.line.minor
        take_away(volume, row, cover=False)  # one is enough to be replaced


def serve(
    volume: Volume,
    mountpoint: Path,
    *,
    ready: Callable[[], None],
    wanted: Wanted,
    taken_over: Handover | None = None,
) -> takeover.Passing | None:
    """Mount and serve until SIGTERM, SIGINT or umount. Any number of read-only mounts stand beside a writable one.

    `taken_over`: what another program has passed on; then nothing is mounted. Returns what is to be passed on: after SIGUSR2, and after
    SIGTERM if the helper keeps the mount for the next process.

    Raises `UnfinishedMount`, `NoSuchBucket`, or `Busy` if the tree is mounted for writing already: two writable mounts would
    wait for each other's acknowledgement while the kernel holds the locks those need, unless they cache no names.
    """
    housekeeping.recover(volume)
    if taken_over is None:
        sharing.ask(volume, wanted)
    with volume.snapshot() as reader:
        if taken_over is None:
            sharing.check(reader, wanted)
        root = buckets.get(reader, wanted.bucket).inode if wanted.bucket else pyfuse3.ROOT_INODE
        shared, locks = wanted.shared, wanted.locks
        if taken_over is not None:
            shared, locks = sharing.what_is_shared(reader, volume.session.id)
    operations = Operations(volume, root=root, shared=shared, bucket=wanted.bucket)
    if locks:
        operations.share_locks(Locks(LockTable(volume.meta, volume.session.id, volume.session.is_dead)))
    helper = helper_of(volume.root, volume.config)
    if taken_over is None:
        if troubles := places.mountpoint_troubles(mountpoint, places.of(volume), over=wanted.over):
            raise UnfinishedMount(troubles[0])
        hides = places.entries_in(mountpoint) if mount_at(str(mountpoint)) is None else 0
        connection, mount_id = mount(volume, mountpoint, helper, read_only=wanted.read_only)
        pyfuse3.init(operations, f"/dev/fd/{connection}", set(pyfuse3.default_options))
    else:
        pyfuse3.init(operations, f"/dev/fd/{taken_over.connection}", set(pyfuse3.default_options))
        mount_id, hides = _id_in_row(volume), 0
    signals = takeover.SignalsLater()
    serving = _Serving(volume, operations, mountpoint, ready, wanted, taken_over, signals, mount_id, hides)
    try:
        trio.run(serving.run)
    finally:
        if serving.handover is None:
            serving.unmount()
        if serving.follower is not None:
            serving.follower.stop()
        if operations.locks is not None:
            operations.locks.close(forget=serving.handover is None)
    if serving.handover is None:
        return None
    return takeover.Passing(serving.handover, signals, wanted.document(volume.root), serving.kept)


def mount(volume: Volume, mountpoint: Path, helper: Path | None, *, read_only: bool) -> tuple[int, int]:
    """(the connection of a new mount at a mountpoint, its id). Raises `UnfinishedMount`."""
    source = source_name(str(volume.root))
    try:
        stale, device = stale_at(volume, mountpoint)
        if not stale:
            mountpoint.mkdir(parents=True, exist_ok=True)
        if helper is not None:
            return ask_mount(helper, mountpoint, source, read_only=read_only, replaces=device)
        fresh = mounting.make(source, os.geteuid(), os.getegid(), read_only=read_only)
        try:
            if stale:
                mounting.replace(fresh, str(mountpoint), stale)
            else:
                _put(fresh, mountpoint)
        except BaseException:
            os.close(fresh.connection)
            raise
        finally:
            fresh.close()
    except OSError as error:
        raise UnfinishedMount(
            f"{mountpoint} could not be mounted ({error.strerror}); is /dev/fuse there? A volume that does not belong to root is mounted through `stratum mountd`"
        ) from error
    return fresh.connection, fresh.id


def _put(fresh: mounting.Fresh, mountpoint: Path) -> None:
    folder = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        why = mounting.seal(folder)
        if why:
            log.warning("folder_not_sealed", mountpoint=str(mountpoint), why=why)
        mounting.put(fresh, folder)
    finally:
        os.close(folder)


def release(helper: Path | None, mountpoint: Path) -> None:
    """Let the folder of a mount that is gone be written to again. Raises `UnfinishedMount`, `OSError`."""
    if helper is not None:
        ask_release(helper, mountpoint)
        return
    if mount_at(str(mountpoint)) is not None:
        raise UnfinishedMount(f"something is mounted at {mountpoint}; unmount it first")
    folder = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        why = mounting.seal(folder, sealed=False)
    finally:
        os.close(folder)
    if why:
        raise UnfinishedMount(f"{mountpoint} cannot be released: {why}; as root: chattr -i {mountpoint}")


def _id_in_row(volume: Volume) -> int:
    """Of a mount that is taken over; 0 if the program that made it did not note it."""
    with volume.snapshot() as reader:
        return int(mount_rows(reader).get(volume.session.id, {}).get("mount_id", 0))


class _Serving:
    """The loop of one mount. `handover` is set when another program is to go on with it, `kept` too if the helper holds it until then."""

    def __init__(
        self,
        volume: Volume,
        operations: Operations,
        mountpoint: Path,
        ready: Callable[[], None],
        wanted: Wanted,
        taken_over: Handover | None,
        signals: takeover.SignalsLater,
        mount_id: int,
        hides: int,
    ) -> None:
        self._hides = hides
        self._volume = volume
        self._mount_id = mount_id
        self._device = 0
        self._operations = operations
        self._mountpoint = mountpoint
        self._ready = ready
        self._wanted = wanted
        self._taken_over = taken_over
        self._signals = signals
        self._row_key = key_u64(b"T", volume.session.id)
        self.follower: Follower | None = None
        self.handover: Handover | None = None
        self.kept: int | None = None

    async def run(self) -> None:
        volume, operations = self._volume, self._operations
        token = trio.lowlevel.current_trio_token()
        volume.committer.undisturbed = Undisturbed(token.run_sync_soon)  # RunFinishedError is a RuntimeError
        idle = Idle()
        trio.lowlevel.add_instrument(idle)
        if self._taken_over is not None:
            takeover.take_over(self._taken_over, operations)
        self.follower = Follower(volume, operations, token, idle)
        line = mount_at(str(self._mountpoint))
        if line is None:
            raise UnfinishedMount(f"{self._mountpoint} vanished while it was being mounted")
        self._device = line.minor
        if self._taken_over is not None:
            self.follower.pause()  # until libfuse knows the session, it tells the kernel nothing (ENOSYS)
        self.follower.start()
        if self._taken_over is None:
            await self._register(self.follower.socket_name)
            if helper_of(volume.root, volume.config) is None:
                mounting.tune(line.minor)
        else:
            still = self.follower.stillness is not None  # the program before this one may not have known of it
            with suppress(StratumError):  # a full disk: then writers wait for answers
                await operations.commit(lambda tx: tell_mount_row(tx, volume.session.id, still=still), frees=True)
        first = self._taken_over.init if self._taken_over is not None else b""
        session = operations.commits.session = Session(first, begun=self.follower.resume)
        session.install(partial(answering, operations))
        if operations.locks is not None:
            session.left = operations.locks.interrupted
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._until_signal, nursery.cancel_scope)
                nursery.start_soon(_background, volume, operations)
                if not self._wanted.read_only:
                    nursery.start_soon(sharing.share_when_asked, volume, operations)
                if operations.locks is not None:
                    nursery.start_soon(operations.locks.run)
                nursery.start_soon(self._announce)
                await pyfuse3.main(min_tasks=1, max_tasks=REQUESTS_MAX)
                await operations.flush_old(everything=True)
                nursery.cancel_scope.cancel()
        finally:
            self.follower.loop_ended()

    async def _register(self, socket_name: str) -> None:
        row = {
            "socket": socket_name,
            **self._place,
            "slot": self._volume.session.slot,
            "read_only": self._wanted.read_only,
            "bucket": self._wanted.bucket,
            "shared": self._wanted.shared,
            "locks": self._wanted.locks,
            "renews": True,
            "hides": self._hides,
            "still": self.follower is not None and self.follower.stillness is not None,
        }

        def register(tx: MetadataTransaction) -> None:
            sharing.check(tx, self._wanted)
            tx.put(self._row_key, pack_json(row))

        await self._operations.commit(register)

    @property
    def _place(self) -> dict[str, Any]:
        return {"mountpoint": str(self._mountpoint), "mount_id": self._mount_id, "device": self._device}

    async def _announce(self) -> None:
        """Ready is when this mount answers at its place, not when it was asked for."""
        await trio.to_thread.run_sync(os.statvfs, self._mountpoint, abandon_on_cancel=True)
        with mounting.top(self._mountpoint) as now:
            if now is None or now.line.minor != self._device:
                raise UnfinishedMount(f"something else was mounted at {self._mountpoint} meanwhile; unmount it first")
        if not _negotiate.keeps_umask_out():
            log.error(
                "umask_comes_first", why="the kernel narrows default access lists by the umask; update it or libfuse"
            )
        if self._taken_over is not None:
            if _negotiate.negotiated()[1] != self._taken_over.wanted:
                raise UnfinishedMount("this program would have agreed on other things with the kernel; mount again")
            log.info("mount_taken_over", mountpoint=str(self._mountpoint))
        self._ready()

    async def _until_signal(self, everything: trio.CancelScope) -> None:
        with trio.open_signal_receiver(*takeover.HANDLED_SIGNALS) as signals:
            self._signals.take()
            async for number in signals:
                if number == signal.SIGUSR2:
                    if await self._hand_over():
                        everything.cancel()
                        return
                    continue
                notify.send(STOPPING=1)
                if number == signal.SIGTERM and await self._leave():
                    everything.cancel()
                    return
                log.info("mount_ending", signal=signal.Signals(number).name)
                await self._operations.flush_old(everything=True)
                pyfuse3.terminate()
                return

    async def _leave(self) -> bool:
        """Whether the helper keeps the mount for the process that comes after this one."""
        helper = helper_of(self._volume.root, self._volume.config)
        if helper is None or await takeover.is_stopped_for_good():
            return False
        assert self.follower is not None, "the loop runs"
        async with self._operations.forgetting:
            why = await takeover.stand_still(self._operations, self.follower)
            if not why:
                try:
                    self.kept = await takeover.keep(self._volume, self._operations, helper, self._mountpoint)
                except StratumError as error:
                    why = error.message
                    takeover.go_on(self._operations, self.follower)
                else:
                    log.info("mount_kept", mountpoint=str(self._mountpoint))
                    self.handover = takeover.prepare(self._volume, self._operations)
                    return True
        log.warning("mount_not_kept", why=why)
        return False

    async def _hand_over(self) -> bool:
        assert self.follower is not None, "the loop runs"
        why = await takeover.why_not_possible(self._volume)
        if not why:
            async with self._operations.forgetting:
                notify.send(RELOADING=1, MONOTONIC_USEC=time.monotonic_ns() // 1000)
                why = await takeover.stand_still(self._operations, self.follower)
                if not why:
                    log.info("mount_passed_on", mountpoint=str(self._mountpoint))
                    self.handover = takeover.prepare(self._volume, self._operations)
                    return True
                notify.send(READY=1)
        log.error("mount_not_passed_on", why=why)
        refused = {"why": why, "at_ns": time.time_ns()}
        session = self._volume.session.id
        try:
            await self._operations.commit(lambda tx: tell_mount_row(tx, session, refused=refused))
        except StratumError as error:
            log.warning("refusal_not_told", error=error.message)
        return False

    def unmount(self) -> None:
        """Until the mount is gone the kernel answers from its cache, so the log is followed and writers wait for us."""
        try:
            take_away(self._volume, self._place, cover=False)
        except (UnfinishedMount, OSError) as error:
            log.error("mount_not_detached", mountpoint=str(self._mountpoint), error=str(error))
        pyfuse3.close(unmount=True)
        try:
            self._volume.mutate(lambda tx: tx.delete(self._row_key), frees=True)
        except StratumError as error:
            log.warning("mount_row_left", error=str(error))


async def _background(volume: Volume, operations: Operations) -> None:
    """What is due by age, in steps that are bounded: between two of them the process says that it lives.

    What was written goes first: however many files lost their names, it is durable as soon as ever.
    """
    watchdog = notify.Watchdog(time.monotonic())

    def sign() -> None:
        counting.beat()
        watchdog.feed(time.monotonic(), healthy=volume.failed is None)

    flushed_s = 0.0
    more = False
    while True:
        await trio.sleep(0 if more else LOOK_S)
        sign()
        try:
            if trio.current_time() - flushed_s >= LOOK_S:
                await operations.flush_old(sign)
                flushed_s = trio.current_time()
            more = await operations.release_orphans()
        except StratumError as error:
            more = False
            log.error("background_failed", error=error.message)
        if volume.failed is not None:
            log.error("mount_ending", error=str(volume.failed))
            os._exit(70)
