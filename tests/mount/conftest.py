"""What the mount tests share."""

from __future__ import annotations

import shutil
import uuid
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support import Server


@pytest.fixture
def s3(mounted: Server) -> Any:
    return mounted.client()


@pytest.fixture
def home(mounted: Server) -> Iterator[Path]:
    """A bucket as a directory."""
    assert mounted.mount is not None
    path = mounted.mount / f"m-{uuid.uuid4().hex[:10]}"
    path.mkdir()
    yield path
    client = mounted.client()
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=path.name):
        for item in page.get("Contents", []):
            client.delete_object(Bucket=path.name, Key=item["Key"])
    shutil.rmtree(path)
