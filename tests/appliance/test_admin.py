"""The admin listener: health, metrics, who may ask; and alerts to a webhook and a mail server of our own."""

from __future__ import annotations

import http.client
import http.server
import json
import os
import socketserver
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from stratum import counting, health, metrics
from stratum.admin.alerts import Alerts, sinks_of
from stratum.config import load
from stratum.errors import ConfigInvalid
from stratum.health import Finding
from stratum.schema import pack_json
from stratum.volume import Volume
from tests.appliance.test_health import certificate, change_settings
from tests.support import Server, make_volume, need_fuse, serving, stratum

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def ask(
    address: str, path: str, *, headers: dict[str, str] | None = None, method: str = "GET", context: Any = None
) -> tuple[int, str]:
    scheme, _, host = address.partition("://")
    if scheme == "https":
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(host, timeout=10, context=context)
    else:
        connection = http.client.HTTPConnection(host, timeout=10)
    connection.request(method, path, headers=headers or {})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def scrape(server: Server) -> dict[str, dict[frozenset[tuple[str, str]], float]]:
    """Name to labels to value, read by Prometheus's own parser."""
    status, text = ask(server.admin, "/metrics")
    assert status == 200
    found: dict[str, dict[frozenset[tuple[str, str]], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    return found


def value(found: dict[str, dict[frozenset[tuple[str, str]], float]], name: str, **labels: str) -> float:
    return sum(number for has, number in found.get(name, {}).items() if labels.items() <= dict(has).items())


def test_every_request_answered_before_a_scrape_is_in_it(server: Server) -> None:
    """From any worker, whichever connection; counted before the answer's last byte is sent."""
    server.client().create_bucket(Bucket="counted")
    before = scrape(server)

    def work(number: int) -> None:
        client = server.client()
        for turn in range(5):
            client.put_object(Bucket="counted", Key=f"{number}/{turn}", Body=b"x" * 100)
            client.get_object(Bucket="counted", Key=f"{number}/{turn}")["Body"].read()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    with pytest.raises(Exception, match="404"):
        server.client().head_object(Bucket="counted", Key="none")
    after = scrape(server)

    def grown(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    assert grown("stratum_s3_requests_total", operation="PutObject", status="2xx") == 40
    assert grown("stratum_s3_requests_total", operation="GetObject", status="2xx") == 40
    assert grown("stratum_s3_requests_total", operation="HeadObject", status="4xx") == 1
    assert grown("stratum_s3_requests_total") == 81
    assert grown("stratum_s3_request_seconds_count", operation="PutObject") == 40
    assert grown("stratum_s3_received_bytes_total") >= 4000
    assert grown("stratum_s3_sent_bytes_total") >= 4000
    assert grown("stratum_mutations_total") >= 40
    assert value(after, "stratum_bucket_objects", bucket="counted") == 40
    assert value(after, "stratum_bucket_bytes", bucket="counted") == 4000
    assert value(after, "stratum_processes", role="s3-worker") == 2
    assert value(after, "stratum_s3_requests_in_flight") == 0


def test_a_worker_that_dies_takes_no_count_with_it(tmp_path: Path) -> None:
    with serving(tmp_path, allow_errors=True) as server:
        for _ in range(20):
            server.raw("GET", "/")
        before = value(scrape(server), "stratum_s3_requests_total", operation="ListBuckets")
        for process in server.processes():
            if process["role"] == "s3":
                os.kill(process["pid"], 9)
        deadline = time.monotonic() + 20
        while value(scrape(server), "stratum_process_restarts_total") < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        while value(scrape(server), "stratum_processes", role="s3-worker") < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        server.raw("GET", "/")
        assert value(scrape(server), "stratum_s3_requests_total", operation="ListBuckets") == before + 1


def test_the_mount_is_counted_and_ready_says_when_a_face_is_away(tmp_path: Path) -> None:
    need_fuse()
    with serving(tmp_path, mount=True) as server:
        assert server.mount
        (server.mount / "files").mkdir()
        (server.mount / "files" / "a").write_bytes(b"x" * 1000)
        assert (server.mount / "files" / "a").read_bytes() == b"x" * 1000
        found = scrape(server)
        assert value(found, "stratum_fuse_requests_total", operation="mkdir", result="ok") == 1
        assert value(found, "stratum_fuse_requests_total", operation="create", result="ok") == 1
        assert value(found, "stratum_fuse_requests_total", operation="open", result="ok") == 1
        assert value(found, "stratum_fuse_requests_total", operation="flush", result="ok") == 1, "of the one that wrote"
        assert value(found, "stratum_fuse_written_bytes_total") == 1000
        assert value(found, "stratum_fuse_request_seconds_count", operation="mkdir") == 1
        status, text = ask(server.admin, "/health/ready")
        assert (status, json.loads(text)) == (200, {"ready": True, "s3": True, "mount": True})
        assert ask(server.admin, "/health/live") == (200, "live\n")
        mount = next(process["pid"] for process in server.processes() if process["role"] == "mount")
        os.kill(mount, 19)
        try:
            status, text = ask(server.admin, "/health/ready")
            assert (status, json.loads(text)["mount"]) == (503, False)
        finally:
            os.kill(mount, 18)


def test_the_listener_reads_only_and_answers_to_loopback_names(server: Server) -> None:
    assert ask(server.admin, "/nothing")[0] == 404
    assert ask(server.admin, "/metrics", method="POST")[0] == 405
    for host, status in (
        ("evil.example", 421),
        ("evil.example:80", 421),
        ("localhost:1", 200),
        ("[::1]:9", 200),
        ("", 421),
    ):
        assert ask(server.admin, "/health/live", headers={"Host": host})[0] == status, host
    status, text = ask(server.admin, "/health")
    assert (status, json.loads(text)["health"]) == (200, "ok")
    connection = http.client.HTTPConnection(server.admin.partition("//")[2], timeout=10)
    connection.request("HEAD", "/metrics")
    assert connection.getresponse().read() == b""
    connection.close()


def test_every_metric_has_help_and_the_series_are_bounded(server: Server) -> None:
    _, text = ask(server.admin, "/metrics")
    families = {family.name: family for family in text_string_to_metric_families(text)}
    declared = {metric.name.removesuffix("_total") for metric in metrics.COUNTED} | set(metrics.GATHERED)
    assert set(families) <= declared
    assert {metric.name.removesuffix("_total") for metric in metrics.COUNTED} <= set(families)
    assert all(family.documentation for family in families.values())
    assert sum(len(family.samples) for family in families.values()) < 2000
    assert all(name.startswith("stratum_") for name in declared)


def test_elsewhere_a_token_is_needed(tmp_path: Path) -> None:
    server = Server(tmp_path)
    port = server.admin.rpartition(":")[2]
    server.configure({"admin": {"listen": f"0.0.0.0:{port}"}})
    assert "admin.token_file" in stratum("config", "check", server.root, expect=3).stderr
    server.configure({"admin": {"token_file": str(tmp_path / "token")}})
    (tmp_path / "token").write_text("short\n")
    (tmp_path / "token").chmod(0o600)
    assert "shorter than" in stratum("admin", server.root, expect=3).stderr
    (tmp_path / "token").write_text("t" * 32 + "\n")
    (tmp_path / "token").chmod(0o644)
    assert "chmod 600" in stratum("admin", server.root, expect=3).stderr
    (tmp_path / "token").chmod(0o600)
    server.start()
    try:
        for headers, status in (
            ({}, 401), ({"Authorization": "Bearer " + "x" * 32}, 401), ({"Authorization": "Basic " + "t" * 32}, 401),
            ({"Authorization": "Bearer " + "t" * 32}, 200),
        ):  # fmt: skip
            for path in ("/metrics", "/health/live", "/health/ready", "/health"):
                assert ask(server.admin, path, headers=headers)[0] == status, (headers, path)
    finally:
        assert server.stop() == 0


def test_or_a_certificate(tmp_path: Path) -> None:
    make_volume(tmp_path / "volume")
    root = tmp_path / "volume"
    certificate(root / "own.pem", 30)
    certificate(tmp_path / "client.pem", 30)
    text = (
        (root / "stratum.toml")
        .read_text()
        .replace("[admin]\n", '[admin]\nclient_ca = "%s"\n' % (tmp_path / "client.pem"), 1)
    )
    head, mark, tail = text.partition("[admin]")
    section, rest_mark, rest = tail.partition("\n[alerts]")
    section = "\n".join(
        line
        for at, line in enumerate(section.splitlines())
        if at < 2 or not line.startswith(("client_ca", "tls_", "listen"))
    )
    free = Server(tmp_path / "other").admin.rpartition(":")[2]
    section += f'\nlisten = "127.0.0.1:{free}"\ntls_certificate = "own.pem"\ntls_key = "own.key"\n'
    (root / "stratum.toml").write_text(head + mark + section + rest_mark + rest)
    import subprocess
    import sys

    process = subprocess.Popen(
        [sys.executable, "-m", "stratum.cli.main", "admin", str(root)], stderr=subprocess.DEVNULL
    )
    try:
        known = ssl.create_default_context(cafile=str(root / "own.pem"))
        known.load_cert_chain(tmp_path / "client.pem", tmp_path / "client.key")
        unknown = ssl.create_default_context(cafile=str(root / "own.pem"))
        address = f"https://localhost:{free}"
        deadline = time.monotonic() + 20
        while True:
            try:
                assert ask(address, "/health/live", context=known) == (200, "live\n")
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        with pytest.raises((OSError, http.client.HTTPException)):
            ask(address, "/health/live", context=unknown)
    finally:
        process.terminate()
        assert process.wait(20) == 0


# -- alerts -------------------------------------------------------------------------------------------------------------


class Sinks:
    """A webhook and a mail server on loopback. `refuse`: what they do for a while."""

    def __init__(self) -> None:
        self.posts: list[dict[str, Any]] = []
        self.tokens: list[str | None] = []
        self.mails: list[str] = []
        self.refuse = False
        sinks = self

        class Hook(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if not sinks.refuse:
                    sinks.posts.append(json.loads(body))
                    sinks.tokens.append(self.headers["Authorization"])
                self.send_response(503 if sinks.refuse else 204)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        class Mail(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                self.wfile.write(b"220 here\r\n")
                text: list[str] | None = None
                for raw in self.rfile:
                    line = raw.decode().rstrip("\r\n")
                    if text is not None:
                        if line == ".":
                            sinks.mails.append("\n".join(text))
                            text = None
                            self.wfile.write(b"250 taken\r\n")
                        else:
                            text.append(line)
                    elif line.upper() == "DATA":
                        text = []
                        self.wfile.write(b"354 go on\r\n")
                    elif line.upper() == "QUIT":
                        self.wfile.write(b"221 bye\r\n")
                        return
                    else:
                        self.wfile.write(
                            b"451 later\r\n" if sinks.refuse and line.upper().startswith("MAIL") else b"250 fine\r\n"
                        )

        self.servers = [
            http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hook),
            socketserver.ThreadingTCPServer(("127.0.0.1", 0), Mail),
        ]
        for server in self.servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def settings(self) -> dict[str, str]:
        hook, mail = (server.server_address[1] for server in self.servers)
        return {
            "webhook": f'"http://127.0.0.1:{hook}/hook"', "smtp": f'"127.0.0.1:{mail}"', "email_to": '["op@example.org"]', "settle_s": "10.0",
            "interval_s_min": "60.0",
        }  # fmt: skip


@pytest.fixture
def sinks() -> Iterator[Sinks]:
    made = Sinks()
    yield made
    made.close()


class Clocked:
    """Alerts of a volume whose findings the test chooses."""

    def __init__(self, volume: Volume) -> None:
        self.volume = volume
        self.alerts = Alerts(volume, sinks_of(volume.config, volume.root))

    def at(self, now_s: float, *findings: Finding) -> None:
        self.alerts.consider(list(findings), now_s)
        self.alerts.settle()


def test_alerts_tell_what_changed_once_and_survive_a_restart(tmp_path: Path, sinks: Sinks) -> None:
    make_volume(tmp_path / "volume")
    (tmp_path / "token").write_text("a-token-of-sixteen-characters\n")
    (tmp_path / "token").chmod(0o600)
    change_settings(tmp_path / "volume", **sinks.settings(), webhook_token_file=f'"{tmp_path / "token"}"')
    full = Finding("STR-DISK-FULL", "/disk", "0 bytes are free", since_s=1000.0)
    near = Finding("STR-QUOTA-NEAR", "bucket b", "95 of 100 bytes", since_s=1020.0)
    with Volume(tmp_path / "volume", "test") as volume:
        watched = Clocked(volume)
        watched.at(1005.0, full)
        assert sinks.posts == [], "younger than settle_s"
        watched.at(1011.0, full)
        watched.at(1013.0, full)
        assert len(sinks.posts) == len(sinks.mails) == 1
        post = sinks.posts[0]
        assert (post["health"], [item["code"] for item in post["raised"]], post["ended"]) == (
            "error",
            ["STR-DISK-FULL"],
            [],
        )
        assert sinks.tokens == ["Bearer a-token-of-sixteen-characters"]
        assert "STR-DISK-FULL" in sinks.mails[0]
        assert "Subject: [error] Stratum on" in sinks.mails[0]
        assert "To: op@example.org" in sinks.mails[0]
        watched.at(1040.0, full, near)
        assert len(sinks.posts) == 1, "one message an interval at most"
        watched.at(1080.0, near)
        assert [item["code"] for item in sinks.posts[1]["raised"]] == ["STR-QUOTA-NEAR"]
        assert [item["code"] for item in sinks.posts[1]["ended"]] == ["STR-DISK-FULL"]
    with Volume(tmp_path / "volume", "test") as volume:
        Clocked(volume).at(2000.0, near)
        assert len(sinks.posts) == len(sinks.mails) == 2, "it was told before the restart"
        Clocked(volume).at(3000.0)
        assert [item["thing"] for item in sinks.posts[2]["ended"]] == ["bucket b"]


def test_an_alert_that_was_not_taken_is_tried_again_and_is_itself_a_finding(tmp_path: Path, sinks: Sinks) -> None:
    make_volume(tmp_path / "volume")
    change_settings(tmp_path / "volume", **sinks.settings())
    full = Finding("STR-DISK-FULL", "/disk", "0 bytes are free", since_s=1000.0)
    sinks.refuse = True
    with Volume(tmp_path / "volume", "test") as volume:
        watched = Clocked(volume)
        watched.at(1020.0, full)
        assert {(item.code, item.thing) for item in health.examine(volume)} == {
            ("STR-ALERTS-FAILING", "webhook"),
            ("STR-ALERTS-FAILING", "email"),
        }
        sinks.refuse = False
        watched.at(1030.0, full)
        assert sinks.posts == [], "it pauses after a failure"
        watched.at(1051.0, full)
        assert len(sinks.posts) == len(sinks.mails) == 1
        assert health.examine(volume) == []


def test_a_clock_that_is_set_back_keeps_no_alert_back(tmp_path: Path, sinks: Sinks) -> None:
    make_volume(tmp_path / "volume")
    change_settings(tmp_path / "volume", **sinks.settings())
    with Volume(tmp_path / "volume", "test") as volume:
        watched = Clocked(volume)
        full = Finding("STR-DISK-FULL", "/disk", "0 bytes are free", since_s=1_000_000.0)
        watched.at(1_000_020.0, full)
        assert len(sinks.posts) == 1
        high = Finding("STR-DISK-HIGH", "hot tier", "high", since_s=1_000_021.0)
        watched.at(1000.0, full, high)
        assert len(sinks.posts) == 2, "neither the pause between alerts nor the time to settle lasts until the old date"


def test_what_is_muted_or_comes_and_goes_is_not_told(tmp_path: Path, sinks: Sinks) -> None:
    make_volume(tmp_path / "volume")
    change_settings(tmp_path / "volume", **sinks.settings())
    with Volume(tmp_path / "volume", "test") as volume:
        watched = Clocked(volume)
        watched.at(1020.0, Finding("STR-DISK-FULL", "/disk", "full", since_s=1000.0, muted_until_s=9000.0))
        for second in range(1020, 1100, 10):
            watched.at(float(second), Finding("STR-DISK-HIGH", "hot tier", "high", since_s=float(second - 5)))
        assert sinks.posts == []


def test_settings_of_alerts_are_checked(tmp_path: Path) -> None:
    make_volume(tmp_path / "volume")
    change_settings(tmp_path / "volume", webhook='"ftp://example.org"')
    with pytest.raises(ConfigInvalid, match="http"):
        load(tmp_path / "volume")
    change_settings(tmp_path / "volume", webhook='""', email_to='["a@b"]', smtp_credentials=f'"{tmp_path / "none"}"')
    with pytest.raises(ConfigInvalid, match="cannot be read"):
        sinks_of(load(tmp_path / "volume"), tmp_path)


def test_the_watch_raises_and_ends_codes_of_a_served_volume(tmp_path: Path, sinks: Sinks) -> None:
    """End to end: something goes wrong, the webhook hears of it, the metric shows it; it ends, the webhook hears that."""
    server = Server(tmp_path)
    change_settings(
        server.root,
        **{**sinks.settings(), "settle_s": "0.0", "interval_s_min": "0.0", "email_to": "[]"},
        period_s="3600.0",
    )
    server.start()
    try:
        with Volume(server.root, "test") as volume:
            volume.mutate(
                lambda tx: tx.put(b"gscrub", pack_json({"state": "done", "ended_s": time.time(), "unhealed": ["b/k"]})),
                frees=True,
            )
            deadline = time.monotonic() + 20
            while not sinks.posts:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert sinks.posts[0]["raised"][0]["code"] == "STR-SCRUB-UNHEALED"
            assert (
                value(scrape(server), "stratum_health", code="STR-SCRUB-UNHEALED", severity="error", muted="false") == 1
            )
            assert json.loads(ask(server.admin, "/health")[1])["findings"][0]["since_s"] > time.time() - 60
            volume.mutate(
                lambda tx: tx.put(b"gscrub", pack_json({"state": "done", "ended_s": time.time()})), frees=True
            )
            while not sinks.posts[-1]["ended"]:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert value(scrape(server), "stratum_alerts_total", sink="webhook", result="sent") == 2
    finally:
        assert server.stop() == 0


def test_top_shows_rates(server: Server) -> None:
    done = threading.Event()

    def load_it() -> None:
        while not done.is_set():
            server.raw("GET", "/")

    thread = threading.Thread(target=load_it)
    thread.start()
    try:
        frame = json.loads(stratum("top", server.root, "--once", "--interval", "0.5", "--json").stdout)
        text = stratum("top", server.root, "--once", "--interval", "0.2").stdout
    finally:
        done.set()
        thread.join()
    assert frame["s3_per_s"] > 10
    assert frame["operations"][0]["operation"] == "ListBuckets"
    assert {process["role"] for process in frame["processes"]} >= {"s3-worker", "tierd", "admin", "supervisor"}
    assert "ListBuckets" in text
    assert counting.FOLDER == "metrics"
