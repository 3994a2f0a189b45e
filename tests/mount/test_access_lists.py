"""Access control lists and S3: what the other face must not open."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Any

import pytest

from stratum.access_lists import GROUP, MASK, OTHERS, OWNER, OWNING_GROUP, Entry, pack

if TYPE_CHECKING:
    from pathlib import Path

NOBODY = 0xFFFFFFFF
ACCESS = "system.posix_acl_access"
LIST = pack(
    [
        Entry(OWNER, 6, NOBODY),
        Entry(OWNING_GROUP, 0, NOBODY),
        Entry(GROUP, 6, 2002),
        Entry(MASK, 6, NOBODY),
        Entry(OTHERS, 0, NOBODY),
    ]
)


def test_an_overwrite_through_s3_keeps_the_list(home: Path, s3: Any) -> None:
    """Without it the mode alone would give the owning group what was the mask."""
    file = home / "secret"
    file.write_bytes(b"before")
    os.setxattr(file, ACCESS, LIST)
    assert stat.S_IMODE(file.stat().st_mode) == 0o660
    s3.put_object(Bucket=home.name, Key="secret", Body=b"after")
    assert file.read_bytes() == b"after"
    assert stat.S_IMODE(file.stat().st_mode) == 0o660
    assert os.getxattr(file, ACCESS) == LIST


def test_symlinks_have_no_lists(home: Path) -> None:
    link = home / "link"
    link.symlink_to("nowhere")
    with pytest.raises(OSError, match="not supported"):
        os.setxattr(link, ACCESS, LIST, follow_symlinks=False)
