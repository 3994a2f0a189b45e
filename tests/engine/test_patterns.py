"""Every regular expression is linear, and so is every parser of a stranger's header: one request must not hold up a worker."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
AREAS = ("stratum", "fuse", "s3", "tiering", "cold_backends")
METHODS = ("match", "fullmatch", "search", "sub", "subn", "split", "findall", "finditer")
MADE_AT_RUN_TIME = {"stratum/support.py"}
"""Words of the administrator, escaped, one or the other."""
HANG_S = 60


def sources() -> list[Path]:
    files = {path.resolve() for area in AREAS for path in (ROOT / area).rglob("*.py")}
    assert len(files) > 100
    return sorted(files)


def _value(node: ast.expr) -> Any:
    """A constant, or flags of `re`; raises ValueError for anything that is made at run time."""
    if any(isinstance(part, ast.Name) and part.id != "re" for part in ast.walk(node)):
        raise ValueError
    return eval(compile(ast.Expression(node), "pattern", "eval"), {"re": re})


def patterns() -> list[tuple[str, str, bool, int, list[str]]]:
    """(where, pattern, whether of bytes, flags, methods called on it) of the whole tree."""
    found = []
    for path in sources():
        tree = ast.parse(path.read_text())
        where = str(path.relative_to(ROOT))
        used: dict[str, set[str]] = {}
        names: dict[int, str] = {}
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and node.attr in METHODS
                and isinstance(node.value, ast.Name | ast.Attribute)
            ):
                name = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
                used.setdefault(name, set()).add(node.attr)
            elif isinstance(node, ast.Assign):
                target = node.targets[0]
                name = target.id if isinstance(target, ast.Name) else getattr(target, "attr", "")
                names |= {id(inner): name for inner in ast.walk(node.value)}
        for node in ast.walk(tree):
            if not (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
            ):
                continue
            if node.func.value.id != "re" or node.func.attr not in {"compile", *METHODS}:
                continue
            flags_at = 1 if node.func.attr == "compile" else 3 if node.func.attr.startswith("sub") else 2
            flag_nodes = [*node.args[flags_at:], *(word.value for word in node.keywords if word.arg == "flags")]
            try:
                pattern, flags = _value(node.args[0]), int(_value(flag_nodes[0])) if flag_nodes else 0
            except ValueError:
                assert where in MADE_AT_RUN_TIME, f"{where}:{node.lineno}: a pattern this test cannot read"
                continue
            methods = (
                [node.func.attr]
                if node.func.attr != "compile"
                else sorted(used.get(names.get(id(node), ""), METHODS[:3]))
            )
            text = pattern if isinstance(pattern, str) else pattern.decode("latin-1")
            found.append((f"{where}:{node.lineno}", text, isinstance(pattern, bytes), flags, methods))
    return found


def times(rows: list[tuple[str, str, bool, int, list[str]]]) -> tuple[int, str]:
    """What `pattern_times` says of them; -1 if it had to be killed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.pattern_times"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        told, _ = process.communicate(json.dumps(rows), timeout=HANG_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return -1, process.communicate()[0]
    return process.returncode, told


def test_every_pattern_is_linear() -> None:
    rows = patterns()
    assert len(rows) > 15
    code, told = times(rows)
    assert code == 0, told[-2000:]


@pytest.mark.parametrize(
    ("pattern", "method"),
    [
        (r"[a-z0-9](?:[a-z0-9-]|\.(?![.-])|(?<!\.)-){1,61}[a-z0-9]", "fullmatch"),
        (r"AWS4-HMAC-SHA256\s+(.*?)[,\s]*", "fullmatch"),
        (r"\s*bytes\s*=\s*(\d*)\s*-\s*(\d*)\s*", "fullmatch"),
        (r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+", "search"),
        (r"(a+)+b", "match"),
    ],
)
def test_the_test_finds_patterns_that_are_not(pattern: str, method: str) -> None:
    assert times([("here", pattern, False, 0, [method])])[0] != 0


def test_numbers_and_dates_of_clients_are_read_in_one_place() -> None:
    """`isdigit`, `int` and the parsers of dates disagree about what one is."""
    for path in (ROOT / "s3").glob("*.py"):
        if path.name not in {"numerals.py", "dates.py"}:
            text = path.read_text()
            for word in ("isdigit", "isdecimal", "isnumeric", "parsedate", "strptime", "fromisoformat"):
                assert word not in text, (
                    f"{path.name} uses {word}; stratum.s3.numerals and dates read numbers and dates"
                )


PARSERS = """
import signal, sys
from stratum import iso_dates, preconditions, tags
from stratum.errors import StratumError
from stratum.s3 import auth, dates, framing, numerals, ranges, signatures

def slow(*_):
    sys.exit(1)

signal.signal(signal.SIGVTALRM, slow)
parsers = {
    "authorization": lambda text: auth._parse_authorization(text, "us-east-1"),
    "range": lambda text: ranges.parse(text, 100), "copy range": lambda text: ranges.parse_copy(text, 100),
    "http date": dates.http, "stamp": dates.stamp, "iso date": iso_dates.seconds, "date": dates.any_form,
    "number": numerals.whole, "position": lambda text: numerals.are_digits(text) and numerals.clamped(text),
    "etags": lambda text: preconditions.etag_listed(text, "e"), "tags": tags.parse_header,
    "query": lambda text: signatures.canonical_query(signatures.split_query(text)), "value": signatures.canonical_value,
    "target": lambda text: framing.split_target("GET", text.encode("latin-1")),
    "coding": lambda text: framing.check_fields("1.1", [(b"host", b"h"), (b"transfer-encoding", text.encode("latin-1"))]),
    "host": lambda text: framing.check_fields("1.1", [(b"host", text.encode("latin-1"))]),
}
for name, parse in parsers.items():
    for start in ("", "AWS4-HMAC-SHA256 ", "AWS4-HMAC-SHA256 Credential=", "bytes=", "bytes=0-", "Sun, ", "http://", '"', "["):
        for unit in (",", ", ", " ", "\\t", "-", "9", "0", "\\xb2", "=", ";", "/", "%", "%41", "&", "a=b&", '"', "\\\\", "W/", '"e",', "x", "Credential=", ":", "."):
            print(name, repr(start), repr(unit), flush=True)
            signal.setitimer(signal.ITIMER_VIRTUAL, 0.25)
            try:
                parse(start + unit * (16384 // len(unit)))
            except StratumError:
                pass
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
"""


def test_every_parser_of_a_header_is_linear() -> None:
    """And raises nothing but what S3 has a code for."""
    done = subprocess.run([sys.executable, "-c", PARSERS], capture_output=True, text=True, timeout=HANG_S, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr[-2000:]
