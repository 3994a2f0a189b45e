"""Dashboards and alert rules: what they name exists, the rules do what they say, and a real Prometheus answers every query."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from stratum import metrics
from stratum.health import CODES
from tests.support import need_fuse, serving

DEPLOY = Path(__file__).parents[2] / "deploy"
_SUFFIXES = re.compile(r"_(bucket|sum|count)$")


def builder() -> Any:
    spec = importlib.util.spec_from_file_location("dashboards", DEPLOY / "grafana" / "build.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["dashboards"] = module
    spec.loader.exec_module(module)
    return module


def queries() -> list[tuple[str, str]]:
    """(where it stands, query) of every panel."""
    found = []
    for path in sorted((DEPLOY / "grafana").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            found += [(f"{path.stem}: {panel['title']}", target["expr"]) for target in panel["targets"]]
    return found


def need(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        assert not os.environ.get("CI"), f"{program} is missing"
        pytest.skip(f"{program} is not installed")
    return found


def test_the_dashboards_are_what_the_builder_writes() -> None:
    module = builder()
    assert sorted(path.stem for path in (DEPLOY / "grafana").glob("*.json")) == sorted(module.DASHBOARDS)
    for name in module.DASHBOARDS:
        assert (DEPLOY / "grafana" / f"{name}.json").read_text() == module.text_of(name), "run deploy/grafana/build.py"
        panels = json.loads(module.text_of(name))["panels"]
        assert len({panel["id"] for panel in panels}) == len(panels)


def test_every_metric_that_is_named_exists_and_every_metric_is_shown() -> None:
    kinds = {metric.name: metric.kind for metric in metrics.COUNTED}
    known = set(kinds) | set(metrics.GATHERED)
    rules = (DEPLOY / "prometheus" / "alerts.yml").read_text()
    named = set()
    for where, text in [*queries(), ("rules", rules)]:
        for word in re.findall(r"\bstratum_\w+", text):
            base = _SUFFIXES.sub("", word)
            assert word in known or kinds.get(base) == "histogram", f"{where} names {word}"
            named.add(word if word in known else base)
    hidden = known - named - {"stratum_build_info", "stratum_buckets", "stratum_disk_free_inodes", "stratum_alerts_total",
                              "stratum_processes", "stratum_scrub_finished_timestamp_seconds"}  # fmt: skip
    assert not hidden, "no panel and no rule shows these"


def test_every_rule_says_where_to_read_on() -> None:
    text = (DEPLOY / "prometheus" / "alerts.yml").read_text()
    root = DEPLOY.parent
    for target in re.findall(r"runbook: (\S+)", text):
        path, _, anchor = target.strip('"').partition("#")
        assert (root / path).is_file(), target
        assert not anchor or anchor.upper() in CODES, target
    tested = set(re.findall(r"alertname: (\w+)", (DEPLOY / "prometheus" / "alerts_test.yml").read_text()))
    assert set(re.findall(r"- alert: (\w+)", text)) == tested


def test_the_rules_fire_when_they_should() -> None:
    done = subprocess.run(
        [need("promtool"), "test", "rules", "alerts_test.yml"],
        cwd=DEPLOY / "prometheus",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run(
        [need("promtool"), "check", "config", "stratum.yml"], cwd=DEPLOY / "prometheus", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.soak
def test_a_real_prometheus_answers_the_query_of_every_panel(tmp_path: Path) -> None:
    program = need("prometheus")
    need_fuse()
    with serving(tmp_path, mount=True) as server:
        assert server.mount
        client = server.client()
        client.create_bucket(Bucket="seen")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        config = f"global: {{scrape_interval: 1s}}\nscrape_configs:\n- job_name: stratum\n  static_configs:\n  - targets: ['{server.admin.partition('//')[2]}']\n"
        (tmp_path / "prometheus.yml").write_text(config)
        process = subprocess.Popen(
            [program, f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'data'}", f"--web.listen-address=127.0.0.1:{port}"],
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            for turn in range(12):
                client.put_object(Bucket="seen", Key=f"{turn}", Body=b"x" * (1 << 20))
                (server.mount / "seen" / f"{turn}").read_bytes()
                time.sleep(1)
            empty = []
            for where, query in queries():
                text = query.replace("$instance", ".*").replace("$__rate_interval", "5s").replace("[6h]", "[10s]")
                url = f"http://127.0.0.1:{port}/api/v1/query?" + urllib.parse.urlencode({"query": text})
                with urllib.request.urlopen(url, timeout=10) as answer:
                    document = json.loads(answer.read())
                assert document["status"] == "success", where
                if not document["data"]["result"]:
                    empty.append(where)
        finally:
            process.terminate()
            process.wait(20)
    # There was no second tier, no remote and nothing wrong: these have nothing to show.
    assert set(empty) <= {
        "overview: Health codes", "tiers: Packs", "tiers: Disks of the warm tier", "tiers: Answers of remotes",
    }, empty  # fmt: skip
