"""Fixtures. A test fails if it leaves an error in a log it did not declare."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from stratum.volume import Volume
from tests.support import make_volume, need_fuse, serving, stop_forgotten, unseal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support import Server


@pytest.fixture(autouse=True)
def _nothing_left_running() -> Iterator[None]:
    yield
    stop_forgotten()


def pytest_sessionfinish(session: pytest.Session) -> None:
    factory: pytest.TempPathFactory | None = getattr(session.config, "_tmp_path_factory", None)
    if factory is not None:
        unseal(factory.getbasetemp())


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Volume]:
    """A fresh volume with the bucket `bucket`, open in this process."""
    make_volume(tmp_path / "volume")
    with Volume(tmp_path / "volume", "test") as volume:
        yield volume


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A served volume without a mount, shared by a module."""
    with serving(tmp_path_factory.mktemp("served")) as running:
        yield running


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A served and mounted volume, shared by a module."""
    need_fuse()
    with serving(tmp_path_factory.mktemp("mounted"), mount=True) as running:
        yield running
