"""Where the secrets of a remote come from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from stratum import cold
from stratum.errors import InvalidArgument
from stratum.tier_rows import ColdRow

if TYPE_CHECKING:
    from pathlib import Path


def row(credentials: str) -> ColdRow:
    return ColdRow("s3", "http://127.0.0.1:1", "bucket", "", "", credentials, "", "", 0, 0)


def test_the_named_file_then_the_service_manager_s_then_the_aws_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named, folder = tmp_path / "named", tmp_path / "credentials"
    folder.mkdir()
    named.write_text('{"access_key": "A", "secret_key": "named"}')
    (folder / "cold_far").write_text("access_key = A\nsecret_key = of the service\n")
    for path in (named, folder / "cold_far"):
        path.chmod(0o600)
    assert cold._credentials("far", row("")) is None
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
    assert cold._credentials("far", row("")) == ("A", "of the service")
    assert cold._credentials("other", row("")) is None
    assert cold._credentials("far", row(str(named))) == ("A", "named")
    (folder / "cold_far").chmod(0o640)
    with pytest.raises(InvalidArgument, match="chmod 600"):
        cold._credentials("far", row(""))
