"""What S3 clients are told: S3's own words first, and nothing of the server's inside."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from stratum import errors as engine
from stratum.config import SETTINGS
from stratum.s3.errors import _TELLING, STATUS, TABLE, S3Error, code_of, message_of
from stratum.s3.wording import WORDING, worded

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent.parent
FACES_ENGINE = (
    "buckets",
    "checksums",
    "hints",
    "limits",
    "lifecycle",
    "multipart",
    "objects",
    "preconditions",
    "quotas",
    "tags",
    "tree",
)
"""Modules whose errors a request can meet."""
INSIDE = (
    "`",
    "--",
    "stratum ",
    "stratum.toml",
    "/etc/",
    "/var/",
    *(f"{setting.section}.{setting.name}" for setting in SETTINGS),
)


def literal(node: ast.expr) -> str:
    """The constant beginning of a message, and what is constant in it."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return str(node.value) if isinstance(node, ast.Constant) else ""


def raised(path: Path) -> Iterator[tuple[int, ast.Call, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            yield node.lineno, node, name


def test_every_code_has_its_words() -> None:
    assert set(STATUS) <= set(WORDING)
    assert set(TABLE.values()) <= set(WORDING)


def test_a_detail_stands_behind_the_words() -> None:
    assert worded("NoSuchKey") == "The specified key does not exist."
    assert worded("InvalidTag", "one too many") == "The tag provided was not a valid tag. (one too many)"
    assert worded("InvalidRequest", "Value for x-amz-checksum-md5 header is invalid.").startswith("Value for")


@pytest.mark.parametrize("kind", [found for found in TABLE if found is not engine.StratumError])
def test_no_error_of_the_engine_tells_of_the_inside(kind: type[engine.StratumError]) -> None:
    secret = "run `stratum fsck` on /srv/hot, or set cold.recall_s_max"
    arguments: dict[str, Any] = {
        name: (b"k" if name == "key" else 1 if name in {"retry_s", "key_bytes", "directory", "mtime_ns"} else secret)
        for name, parameter in inspect.signature(kind.__init__).parameters.items()
        if name != "self" and parameter.kind in {parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY}
    }
    error = kind(**arguments)
    told = message_of(error)
    assert told.startswith(WORDING[code_of(error)])
    assert secret not in told
    assert not any(mark in told for mark in INSIDE), told


def test_messages_of_the_endpoint_name_nothing_of_the_server() -> None:
    wrong = []
    for path in sorted((ROOT / "s3").glob("*.py")):
        for line, call, name in raised(path):
            if name != "S3Error" or len(call.args) < 2:
                continue
            message = literal(call.args[1])
            if any(mark in message for mark in INSIDE):
                wrong.append(f"{path.name}:{line}: {message}")
    assert not wrong, "\n".join(wrong)


def test_messages_of_the_engine_that_clients_see_name_nothing_of_the_server() -> None:
    telling = {kind.__name__ for kind in _TELLING}
    wrong = [
        f"{name}.py:{line}: {message}"
        for name in FACES_ENGINE
        for line, call, kind in raised(ROOT / "stratum" / f"{name}.py")
        if kind in telling and call.args and any(mark in (message := literal(call.args[0])) for mark in INSIDE)
    ]
    assert not wrong, "\n".join(wrong)


def test_an_error_of_the_endpoint_says_its_words() -> None:
    for code in STATUS:
        assert S3Error(code).message == WORDING[code]
        assert S3Error(code, "why").message == f"{WORDING[code]} (why)"
