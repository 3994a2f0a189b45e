"""A byte on the disk changes: nobody is ever given it."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest
from botocore.exceptions import BotoCoreError, ClientError

from tests.support import need_fuse, serving, stratum

if TYPE_CHECKING:
    from pathlib import Path

DATA = os.urandom(5_000_000)


def flip(root: Path, offset: int) -> None:
    """Change one byte of the one data file."""
    (name,) = (root / "hot").glob("*/*/*.segment")
    with name.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes((byte[0] ^ 0xFF,)))


def test_wrong_bytes_are_never_served(tmp_path: Path) -> None:
    need_fuse()
    with serving(tmp_path, mount=True, allow_errors=True) as server:
        client = server.client()
        client.create_bucket(Bucket="damage")
        client.put_object(Bucket="damage", Key="k", Body=DATA)
        flip(server.root, 3_000_000)
        with pytest.raises(BotoCoreError, match="Connection broken"):
            client.get_object(Bucket="damage", Key="k")["Body"].read()
        good = client.get_object(Bucket="damage", Key="k", Range="bytes=0-999999")["Body"].read()
        assert good == DATA[:1_000_000]
        with pytest.raises(ClientError) as caught:
            client.get_object(Bucket="damage", Key="k", Range="bytes=2999990-3000010")
        assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 500
        assert server.mount is not None
        with pytest.raises(OSError, match="Input/output error"):
            (server.mount / "damage" / "k").read_bytes()
        with (server.mount / "damage" / "k").open("rb") as file:
            assert file.read(100_000) == DATA[:100_000]
        found = json.loads(stratum("fsck", server.root, "--json", expect=1).stdout)["findings"]
        assert [finding["kind"] for finding in found] == ["damaged-extent"]
        client.put_object(Bucket="damage", Key="k", Body=b"replaced")
        assert client.get_object(Bucket="damage", Key="k")["Body"].read() == b"replaced"
        assert "damage_found" in server.log.read_text()
