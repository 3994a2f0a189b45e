"""What is missing is named in one line and ends `serve` with exit code 3; trying again would not bring it."""

from __future__ import annotations

import json
import re
import shutil
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from stratum import config, preflight
from stratum.cli.exit_codes import COULD_NOT_RUN
from stratum.errors import UnfinishedMount
from tests.support import Server, need_fuse, serving, stratum

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def taken() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield f"127.0.0.1:{other.getsockname()[1]}"


def refusals(server: Server) -> tuple[str, str]:
    """What `serve` and `config check` say."""
    began = time.monotonic()
    refused = stratum("serve", server.root, expect=COULD_NOT_RUN)
    assert time.monotonic() - began < 60, "it does not try for ever"
    lines = [line for line in refused.stderr.splitlines() if line.startswith("stratum: ")]
    assert len(lines) == 1
    assert "ready" not in refused.stdout
    checked = stratum("config", "check", server.root, expect=None)
    assert checked.returncode != 0
    return lines[0], checked.stderr


@pytest.mark.parametrize("key", ["s3", "admin"])
def test_an_address_that_is_taken_or_does_not_resolve(tmp_path: Path, taken: str, key: str) -> None:
    server = Server(tmp_path)
    server.configure({key: {"listen": taken}})
    for said in refusals(server):
        assert f"cannot listen on {key}.listen = '{taken}': Address already in use" in said
    server.configure({key: {"listen": "127.0.0.9.invalid:9000"}})
    for said in refusals(server):
        assert f"{key}.listen" in said
        assert "invalid" in said


def test_a_certificate_that_is_missing_or_none(tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.configure({"s3": {"tls_certificate": "tls.pem", "tls_key": "tls.key"}})
    for said in refusals(server):
        assert "tls.pem" in said
        assert "there is no such file" in said
    (server.root / "tls.pem").write_text("junk")
    (server.root / "tls.key").write_text("junk")
    assert "do not go together, or are no PEM files" in refusals(server)[0]
    alone = stratum("s3", server.root, expect=COULD_NOT_RUN)
    assert "do not go together" in alone.stderr, "the endpoint alone says so too, and starts no workers"


def test_a_data_folder_that_is_gone(tmp_path: Path) -> None:
    server = Server(tmp_path)
    shutil.rmtree(server.root / "hot")
    assert re.search(r"hot.*there is no such folder", refusals(server)[0])


def test_no_fuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "FUSE_DEVICE", str(tmp_path / "fuse"))
    settings = config.parse(config.render({"mount.path": "/somewhere"}), "x")
    with pytest.raises(UnfinishedMount, match=r"cannot be opened \(No such file or directory\): modprobe fuse"):
        preflight.check_fuse(tmp_path, settings)
    settings = config.parse(config.render({"mount.path": "/somewhere", "mount.helper": str(tmp_path / "none")}), "x")
    with pytest.raises(UnfinishedMount, match=r"helper at .* cannot be reached"):
        preflight.check_fuse(tmp_path, settings)


def test_a_volume_that_is_served_is_in_order(tmp_path: Path) -> None:
    """Its own addresses and mountpoint are not taken for somebody else's."""
    need_fuse()
    with serving(tmp_path, mount=True) as server:
        document: dict[str, Any] = json.loads(stratum("config", "check", server.root, "--json").stdout)
        assert document["ok"] is True


def test_units_do_not_restart_what_cannot_run() -> None:
    for path in (Path(__file__).parents[2] / "systemd").glob("*.service"):
        text = path.read_text()
        assert ("\nRestart=" in text) == ("\nRestartPreventExitStatus=3\n" in text), path.name
