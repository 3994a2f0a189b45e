"""The bundle for whoever helps: useful, and without anything that names what is stored or who stored it."""

from __future__ import annotations

import json
import tarfile
from typing import TYPE_CHECKING

import pytest

from stratum.support import Redactor
from tests.support import serving, stratum

if TYPE_CHECKING:
    from pathlib import Path


def test_a_bundle_has_the_facts_and_none_of_the_names(tmp_path: Path) -> None:
    with serving(
        tmp_path, settings={"alerts": {"webhook": "http://127.0.0.1:9/hook-secret", "email_to": ["boss@corp.example"]}}
    ) as server:
        facts = json.loads(
            stratum(
                "user",
                "add",
                server.root,
                "ada.lovelace",
                "--display-name",
                "Ada L",
                "--email",
                "ada@example.org",
                "--json",
            ).stdout
        )
        client = server.client(facts["access_key"], facts["secret_key"])
        client.create_bucket(Bucket="merger-plans")
        client.put_object(Bucket="merger-plans", Key="acquire/zebra corp.txt", Body=b"the secret content")
        client.get_object(Bucket="merger-plans", Key="acquire/zebra corp.txt")["Body"].read()
        preview = stratum("support", "bundle", server.root, "--preview", "--log", server.log).stdout
        bundle = tmp_path / "bundle.tar.gz"
        stratum("support", "bundle", server.root, bundle, "--log", server.log)
        stratum("support", "bundle", server.root, bundle, expect=6)
        stratum("support", "bundle", server.root, expect=6)
    assert bundle.stat().st_mode & 0o777 == 0o600
    with tarfile.open(bundle) as archive:
        texts = {}
        for entry in archive:
            file = archive.extractfile(entry)
            assert file is not None
            texts[entry.name] = file.read().decode()
    for text in (preview, *texts.values()):
        for hidden in (
            facts["access_key"], facts["secret_key"], server.access_key, server.secret_key, "merger", "zebra", "acquire", "lovelace", "Ada L", "ada@",
            "secret content", "hook-secret", "corp.example",
        ):  # fmt: skip
            assert hidden not in text
    joined = "\n".join(texts.values())
    assert "operation=PutObject status=200" in joined
    assert "bucket-1" in joined
    assert 'stratum_s3_requests_total{operation="PutObject"' in texts["stratum-support/metrics.txt"]
    assert json.loads(texts["stratum-support/versions.json"])["packages"]["lmdb"]
    assert json.loads(texts["stratum-support/status.json"])["health"] == "ok"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("path=/photos/a/b.jpg status=200", "path=/bucket-1/(7 characters) status=200"),
        ('path="/photos/with space and \\" quote" x=1', "path=/bucket-1/(23 characters) x=1"),
        ("path=/unknown/x", "path=/.../(1 characters)"),
        ("path=/photos", "path=/bucket-1"),
        ('{bucket="photos"} photos-2 photosynthesis', '{bucket="bucket-1"} bucket-2 photosynthesis'),
        ("write to bob@example.org", "write to address"),
    ],
)
def test_redaction(text: str, shown: str) -> None:
    assert Redactor({"bucket": ["photos", "photos-2"], "user": [""]})(text) == shown
