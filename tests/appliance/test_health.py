"""Health codes: each from a real cause, what is noted of them, mutes, exit codes, and the runbook."""

from __future__ import annotations

import datetime as dt
import json
import os
import re
import shlex
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from stratum import buckets, health, quotas, warm_disks
from stratum.cli.main import build_parser
from stratum.errors import InvalidArgument
from stratum.health import CODES, Severity
from stratum.quotas import Quota
from stratum.schema import pack_json
from stratum.volume import Volume
from tests.support import BUCKET, make_volume, put, serving, stratum
from tests.tiers.conftest import make_tiered

if TYPE_CHECKING:
    from stratum.transaction import MetadataTransaction

DOCS = Path(__file__).parents[2] / "docs" / "operations"


def codes(volume: Volume) -> set[str]:
    return {item.code for item in health.examine(volume)}


def change_settings(root: Path, **settings: str) -> None:
    path = root / "stratum.toml"
    text = path.read_text()
    for name, value in settings.items():
        text, count = re.subn(rf"^{name} = .*$", f"{name} = {value}", text, flags=re.MULTILINE)
        assert count, name
    path.write_text(text)


def certificate(path: Path, days: float) -> None:
    """Of ourselves, ending in so many days."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    built = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now - dt.timedelta(days=90))
        .not_valid_after(now + dt.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    path.write_bytes(built.public_bytes(serialization.Encoding.PEM))
    path.with_suffix(".key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def test_every_code_has_its_section_in_the_runbook_and_no_section_is_left_over() -> None:
    sections = re.findall(r"^## (\S+)$", (DOCS / "health.md").read_text(), flags=re.MULTILINE)
    assert sections == list(CODES), "the runbook has the codes in the order of the table"
    assert all(re.fullmatch(r"STR(-[A-Z0-9]+)+", code) for code in CODES)
    for name, section in zip(
        sections, re.split(r"^## .*$", (DOCS / "health.md").read_text(), flags=re.MULTILINE)[1:], strict=True
    ):
        assert section.strip().startswith(f"{CODES[name].severity.name.title()}. "), name


def test_a_fresh_volume_is_healthy(opened: Volume) -> None:
    assert health.examine(opened) == []
    assert health.worst([]) == Severity.OK


def test_codes_of_the_volume_itself(tmp_path: Path) -> None:
    make_volume(tmp_path / "volume")
    root = tmp_path / "volume"
    certificate(root / "soon.pem", 5)
    certificate(root / "ended.pem", -1)
    change_settings(root, free_bytes_min=str(1 << 60), tls_certificate='"soon.pem"', tls_key='"soon.key"')
    with Volume(root, "test") as volume:
        assert codes(volume) == {"STR-DISK-FULL", "STR-CERTIFICATE-EXPIRES"}
    change_settings(root, free_bytes_min="0", tls_certificate='"ended.pem"', tls_key='"ended.key"')
    with Volume(root, "test") as volume:
        put(volume, "a", b"x" * 95)

        def prepare(tx: MetadataTransaction) -> None:
            quotas.set_bucket(tx, buckets.get(tx, BUCKET).inode, Quota(bytes=100))
            tx.put(b"gbackup", pack_json({"at_s": time.time() - 27 * 3600}))
            tx.put(b"galerts", pack_json({"failing": {"webhook": "refused"}}))
            tx.put(
                b"gtierd",
                pack_json(
                    {
                        "level": "emergency",
                        "disks": [{"path": "/d", "used_percent": 96}],
                        "troubles": {"lifecycle": "no rules today", "relief": "nothing can leave"},
                    }
                ),
            )
            tx.put(b"gscrub", pack_json({"state": "done", "unhealed": ["a/b"]}))

        volume.mutate(prepare, frees=True)
        assert codes(volume) == {
            "STR-CERTIFICATE-EXPIRED", "STR-QUOTA-NEAR", "STR-BACKUP-OLD", "STR-ALERTS-FAILING", "STR-DISK-EMERGENCY", "STR-TIERD-FAILING",
            "STR-SCRUB-UNHEALED",
        }  # fmt: skip
        findings = health.examine(volume)
        whats = {(item.code, item.thing): item.what for item in findings}
        assert whats["STR-TIERD-FAILING", "lifecycle"] == "no rules today"
        assert whats["STR-DISK-EMERGENCY", "hot tier"].endswith("; nothing can leave"), "one trouble, told once"
        assert [item.severity for item in findings] == sorted((item.severity for item in findings), reverse=True)
        volume.mutate(lambda tx: tx.put(b"gtierd", pack_json({"level": "high"})), frees=True)
        assert "STR-DISK-HIGH" in codes(volume)
        (root / "ended.pem").unlink()
        assert "STR-CERTIFICATE-EXPIRED" in codes(volume), "a file that cannot be read is no certificate"
        volume.segments.folders[0].rename(tmp_path / "gone")
        try:
            assert "STR-DISK-SILENT" in codes(volume)
        finally:
            (tmp_path / "gone").rename(volume.segments.folders[0])


def test_one_full_disk_is_one_code_and_next_is_a_command(tmp_path: Path) -> None:
    root = tmp_path / "a volume; true"
    make_volume(root)
    change_settings(root, free_bytes_min=str(1 << 60))
    with Volume(root, "test") as volume:
        emergency = {"level": "emergency", "disks": [{"path": str(root / "hot"), "used_percent": 99}]}
        volume.mutate(lambda tx: tx.put(b"gtierd", pack_json(emergency)), frees=True)
        found = health.examine(volume)
        assert [(item.code, item.thing) for item in found] == [("STR-DISK-FULL", str(root / "meta"))]
        assert f"{root / 'hot'} lies there, too" in found[0].what
    told = found[0].document(root)
    assert shlex.split(told["next"]) == ["stratum", "bucket", "list", str(root)]
    assert "place" not in told
    runbook, _, section = told["runbook"].partition("#")
    assert Path(runbook).is_absolute()
    assert f"## {section.upper()}\n" in Path(runbook).read_text()


def test_next_names_what_it_is_about(tmp_path: Path) -> None:
    root, disk = tmp_path / "v", "/srv/disk 1"
    for code, words, place in (
        ("STR-WARM-DISK-MISSING", ["stratum", "disk", "replace", str(root), disk, "NEW"], ""),
        ("STR-CERTIFICATE-EXPIRED", ["openssl", "x509", "-noout", "-enddate", "-in", disk], ""),
        ("STR-BACKUP-OLD", ["stratum", "meta", "backup", str(root), "/back ups"], "/back ups"),
        ("STR-BACKUP-OLD", ["stratum", "meta", "backup", str(root), "/var/lib/stratum/backups"], ""),
    ):
        assert shlex.split(health.Finding(code, disk, "x", place=place).document(root)["next"]) == words
    for known in CODES.values():
        words = known.next.split()
        if words[0] == "stratum":
            parsed = build_parser().parse_args([word.replace("STR-", "x") for word in words[1:]])
            assert str(parsed.volume) == "VOLUME", "every command that is named exists"


def test_codes_of_the_warm_tier(tmp_path: Path) -> None:
    with Volume(make_tiered(tmp_path, scrub__period_s=3600.0), "test") as volume:
        assert codes(volume) == {"STR-WARM-ONE-DEVICE"}, "the disks of the test are folders beside each other"
        with volume.snapshot() as reader:
            paths = [Path(row.path) for row in warm_disks.disks(reader).values()]
        shutil.move(paths[0], tmp_path / "away")
        assert codes(volume) == {"STR-WARM-ONE-DEVICE", "STR-WARM-DISK-MISSING"}
        for number, path in enumerate(paths[1:]):
            shutil.move(path, tmp_path / f"away{number}")
        assert codes(volume) == {"STR-WARM-DISK-MISSING", "STR-WARM-UNREADABLE"}
        queued = b"h" + (7).to_bytes(8, "big")
        volume.mutate(lambda tx: tx.put(queued, pack_json({"why": "test"})), frees=True)
        assert "STR-WARM-DEGRADED" in codes(volume)
        volume.mutate(
            lambda tx: tx.put(b"h" + (7).to_bytes(8, "big"), pack_json({"why": "test", "error": "no room"})), frees=True
        )
        assert "STR-WARM-UNREPAIRABLE" in codes(volume)
        os.utime(volume.meta / "seal.key", (1, 1))
        assert "STR-SCRUB-OVERDUE" in codes(volume)


def test_a_disk_that_hangs_holds_nobody_up() -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        health.probe(lambda: time.sleep(5), 0.1)
    assert time.monotonic() - began < 3
    with pytest.raises(OSError, match="No such file"):
        health.probe(lambda: os.statvfs("/nowhere"), 1.0)


def test_since_when_is_noted_once_and_the_end_is_told(opened: Volume) -> None:
    opened.mutate(lambda tx: tx.put(b"gtierd", pack_json({"level": "high"})), frees=True)
    began, ended = health.note(opened, health.examine(opened), 1000.0)
    assert [(item.code, item.since_s) for item in began] == [("STR-DISK-HIGH", 1000.0)]
    assert ended == []
    began, ended = health.note(opened, health.examine(opened), 2000.0)
    assert (began, ended) == ([], [])
    assert [item.since_s for item in health.examine(opened)] == [1000.0]
    opened.mutate(lambda tx: tx.delete(b"gtierd"), frees=True)
    began, ended = health.note(opened, health.examine(opened), 3000.0)
    assert began == []
    assert [(item.code, item.thing, item.since_s) for item in ended] == [("STR-DISK-HIGH", "hot tier", 1000.0)]


def test_a_mute_hides_from_the_exit_code_only(tmp_path: Path) -> None:
    make_volume(tmp_path / "volume")
    root = tmp_path / "volume"
    with Volume(root, "test") as volume:
        volume.mutate(lambda tx: tx.put(b"gtierd", pack_json({"level": "high"})), frees=True)
        with pytest.raises(InvalidArgument, match="no health code"):
            health.mute(volume, "STR-NOTHING", 60)
    assert "STR-DISK-HIGH" in stratum("status", root, expect=1).stdout
    stratum("health", "list", root, expect=1)
    stratum("health", "mute", root, "STR-DISK-HIGH", "--for", "4h")
    listed = json.loads(stratum("health", "list", root, "--json").stdout)
    assert listed["health"] == "ok"
    assert listed["findings"][0]["code"] == "STR-DISK-HIGH"
    assert listed["findings"][0]["muted_until_at"] > time.strftime("%Y-%m-%dT%H", time.gmtime(time.time() + 3 * 3600))
    stratum("health", "mute", root, "STR-DISK-HIGH", "--for", "soon", expect=2)
    stratum("health", "unmute", root, "STR-DISK-HIGH")
    with Volume(root, "test") as volume:
        volume.mutate(lambda tx: tx.put(b"gtierd", pack_json({"level": "emergency"})), frees=True)
    found = json.loads(stratum("status", root, "--json", expect=2).stdout)
    assert found["health"] == "error"
    assert found["findings"][0]["next"] == f"stratum tier status {root}"
    assert len(json.loads(stratum("health", "codes", root, "--json").stdout)["codes"]) == len(CODES)


def test_codes_of_the_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    with serving(tmp_path, allow_errors=True) as server:
        worker = next(process for process in server.processes() if process["role"] == "s3-master")
        with Volume(server.root, "test") as volume:
            assert codes(volume) == set()
            monkeypatch.setattr(health, "STARTING_S", 0.0)
            stopped = [process["pid"] for process in server.processes() if process["role"].startswith("s3")]
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
            try:
                assert "STR-S3-DOWN" in codes(volume)
                limits = dict(health.SILENT_S_MAX)
                health.SILENT_S_MAX["s3-master"] = 0.5
                time.sleep(1.0)
                assert "STR-PROCESS-SILENT" in codes(volume)
            finally:
                health.SILENT_S_MAX.update(limits)
                for pid in stopped:
                    os.kill(pid, signal.SIGCONT)
            assert worker["pid"] in stopped
