"""A volume with a warm and a cold tier, in this process."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
from moto.server import ThreadedMotoServer

from stratum import boundaries, buckets, cold_admin, packs, volume
from stratum.identity import Identities
from stratum.tier_rows import ColdRow
from stratum.tiering.pressure import Gauge, Usage
from stratum.volume import Volume
from tests.support import BUCKET

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from stratum.schema import Inode


def make_tiered(root: Path, *, code: str = "2+1", disks: int = 3, remote: bool = True, **changed: Any) -> Path:
    """A volume with disks `root/d0`... and a directory `root/archive` as its remote."""
    settings = {"volume.ec": code, "cold.delete_after_s": 0.0, "scrub.period_s": 0.0}
    settings.update({name.replace("__", "."): value for name, value in changed.items()})
    volume.create(root / "volume", settings)
    with Volume(root / "volume", "test") as opened:
        user, _, _ = Identities(opened).add_user("admin", admin=True)
        opened.mutate(lambda tx: buckets.create(tx, BUCKET, user.user_id))
        for number in range(disks):
            opened.warm.add(root / f"d{number}", create=True)
        if remote:
            (root / "archive").mkdir()
            cold_admin.add(opened, "archive", directory_row(root / "archive"))
    return root / "volume"


def directory_row(path: Path, **changed: Any) -> ColdRow:
    row = ColdRow("directory", str(path), "", "", "", "", "", "", 0, 0)
    for name, value in changed.items():
        setattr(row, name, value)
    return row


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """The endpoint of moto's server; every test uses buckets of its own."""
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def tiered(tmp_path: Path) -> Iterator[Volume]:
    """2+1 shards on three disks, and a directory as the remote."""
    with Volume(make_tiered(tmp_path), "test") as opened:
        yield opened


@contextlib.contextmanager
def at_boundary(action: Callable[[str], None]) -> Iterator[None]:
    """Call `action` at every boundary inside the block."""
    boundaries.hook = action
    try:
        yield
    finally:
        boundaries.hook = None


def gauge_of(opened: Volume, percents: list[float]) -> Gauge:
    """A disk whose fullness is the last of a list."""

    def measure(folder: Path) -> Usage:
        return Usage(str(folder), 1_000_000, int(10_000 * percents[-1]), percents[-1], 1.0)

    return Gauge(opened.segments.folders, opened.config, measure)


def where(opened: Volume, inode: Inode | int) -> list[str]:
    """The tiers with copies of a file's first extent, hottest first."""
    number = inode if isinstance(inode, int) else inode.number
    with opened.snapshot() as reader:
        extent = reader.slices(number)[0].extent
        row, _ = reader.extent(extent)
        return (["hot"] if packs.is_hot(row) else []) + [tier.name.lower() for tier in packs.copies(reader, extent)]
