"""The command line as such: which word is the volume, what a number may be, what JSON looks like."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from stratum.cli import output, words
from stratum.cli.main import build_parser
from stratum.errors import InvalidArgument, TooManyRequests
from stratum.limits import Limit, Limiter, everything, put
from stratum.schema import pack_json, unpack_json
from stratum.volume import Volume
from tests.support import make_volume, stratum

if TYPE_CHECKING:
    from collections.abc import Iterator

NOT_NUMBERS = ["nan", "inf", "-inf", "-1", "1e400", "0x10", "", " 5", "5 ", "1_000", "²", "٣", "9" * 5000, "NaN"]


def leaves(
    parser: argparse.ArgumentParser, path: tuple[str, ...] = ()
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield " ".join(path), parser
    for action in below:
        for name, child in action.choices.items():
            yield from leaves(child, (*path, name))


COMMANDS = dict(leaves(build_parser()))


def word_for(action: argparse.Action) -> str:
    if action.choices:
        return str(next(iter(action.choices)))
    return (
        "/elsewhere" if action.type is Path else "7" if callable(action.type) and action.type is not str else "photos"
    )


def positionals(parser: argparse.ArgumentParser, *, optional: bool) -> list[argparse.Action]:
    found = [action for action in parser._actions if not action.option_strings]
    return [action for action in found if action.dest != "volume" and (optional or action.nargs is None)]


@pytest.fixture
def volumes(tmp_path: Path) -> tuple[Path, Path]:
    made = tmp_path / "one", tmp_path / "two"
    for root in made:
        root.mkdir()
        (root / "stratum.toml").write_text("")
    return made


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("name", COMMANDS)
def test_the_volume_is_the_right_word(
    name: str, volumes: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, *, optional: bool
) -> None:
    """Of every command there is, with the variable and without, with the fewest and with the most words."""
    parser = COMMANDS[name]
    if not any(action.dest == "volume" for action in parser._actions):
        return
    actions = positionals(parser, optional=optional)
    given = [word_for(action) for action in actions]
    needed = [
        word
        for action in parser._actions
        if action.option_strings and action.required
        for word in (action.option_strings[0], "24h" if action.dest == "duration" else "x")
    ]
    command = name.split()
    one, two = volumes

    def check(line: list[str], volume: Path) -> None:
        options = words.read(build_parser, line)
        assert options.volume == volume, line
        for action, word in zip(actions, given, strict=True):
            assert str(getattr(options, action.dest)) == word, line

    monkeypatch.delenv("STRATUM_VOLUME", raising=False)
    check([*command, str(one), *given, *needed], one)
    monkeypatch.setenv("STRATUM_VOLUME", str(two))
    check([*command, str(one), *given, *needed], one)
    if name not in {"init", "rebuild", "meta restore"}:
        check([*command, *given, *needed], two)
        check([*command, *needed, *given, "--json"], two)
    else:
        with pytest.raises(words.WrongUse):
            words.read(build_parser, [*command, *given, *needed])


def test_a_name_is_never_taken_for_the_volume(volumes: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Although a folder of that name is a volume."""
    monkeypatch.chdir(volumes[0].parent)
    monkeypatch.setenv("STRATUM_VOLUME", str(volumes[1]))
    options = words.read(build_parser, ["snapshot", "create", "one", "daily"])
    assert (options.volume, options.path, options.name) == (volumes[1], "one", "daily")
    options = words.read(build_parser, ["snapshot", "create", "./one", "daily"])
    assert (options.volume, options.path, options.name) == (Path("one"), "daily", None)


def numeric(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if action.type is not None and action.type not in {Path, str} and action.metavar not in {"on|off", "ADDR"}:
            yield action


def test_every_number_has_a_range() -> None:
    count = 0
    for name, parser in COMMANDS.items():
        for action in numeric(parser):
            assert action.type not in {int, float}, f"{name} {action.dest} takes nan, or more than there is"
            assert callable(action.type)
            count += 1
            for text in NOT_NUMBERS:
                if text == "" and action.dest in {"since", "until"}:
                    continue
                with pytest.raises(argparse.ArgumentTypeError, match="write for instance"):
                    action.type(text)
    assert count > 20


@pytest.mark.parametrize("text", ["ada", "@example.org", "ada@", "a b@example.org", "ada@example.org\nBcc: x", "a@b@c"])
def test_an_address_is_one(tmp_path: Path, text: str) -> None:
    assert "e-mail address" in stratum("user", "add", tmp_path, "ada", "--email", text, expect=2).stderr


def test_wrong_use_is_told_as_json(tmp_path: Path) -> None:
    for line in (["limit", "set", tmp_path, "--requests-per-s", "nan"], ["no-such"], ["disk", "add", tmp_path], []):
        done = stratum(*line, "--json", expect=2)
        told = json.loads(done.stdout)
        assert (told["error"], told["code"], told["schema"]) == ("WrongUse", 2, "stratum.error/1")
        assert told["message"] in done.stderr
        assert stratum(*line, expect=2).stdout == ""


def test_what_is_no_number_is_null_in_json() -> None:
    text = output.to_json(
        {"a": math.nan, "b": [math.inf, {"c": -math.inf}], "d": 1.5, "name": os.fsdecode(b"\xff")}, "x"
    )
    text.encode()
    told = json.loads(text, parse_constant=pytest.fail)
    assert told == {"schema": "stratum.x/1", "a": None, "b": [None, {"c": None}], "d": 1.5, "name": "\udcff"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        pack_json({"a": math.nan})
    assert unpack_json(b'{"a": NaN, "b": -Infinity}') == {"a": 0.0, "b": 0.0}


def test_moments_and_sizes_have_one_form() -> None:
    told = output.canonical(
        {"created_ns": 1_700_000_000_000_000_000, "since_s": 0.0, "age_s": 7.0, "rows": [{"until_s": 5}]}
    )
    assert told == {
        "created_at": "2023-11-14T22:13:20Z",
        "since_at": None,
        "age_s": 7.0,
        "rows": [{"until_at": "1970-01-01T00:00:05Z"}],
    }
    assert [output.size(number) for number in (0, 1023, 1024, 5 << 30)] == ["0 B", "1023 B", "1.0 KiB", "5.0 GiB"]


def test_every_document_names_its_schema(tmp_path: Path) -> None:
    root = tmp_path / "v"
    made = json.loads(stratum("init", root, "--json").stdout)
    assert made["schema"] == "stratum.init/1"
    stratum("bucket", "create", root, "photos")
    for name, parser in COMMANDS.items():
        if positionals(parser, optional=False) or not re.search(r" (list|show|status|check|codes)$|^status$", name):
            continue
        done = stratum(*name.split(), root, "--json", expect=None)
        told: dict[str, Any] = json.loads(done.stdout, parse_constant=pytest.fail)
        assert told["schema"] == f"stratum.{name.replace(' ', '.')}/1"
        named = json.dumps(told)
        assert not re.search(r'"[a-z_]+_ns"', named), name
    (bucket,) = json.loads(stratum("bucket", "list", root, "--json").stdout)["buckets"]
    assert bucket["owner"]["name"] == "admin"


def test_a_limit_that_is_none_stops_nobody(tmp_path: Path) -> None:
    """Rows of an older program hold what was accepted then."""
    root = tmp_path / "v"
    make_volume(root)
    with Volume(root, "test") as opened:
        raw = b'{"buckets": {"bucket": [NaN, 1e-300]}, "users": {"u": [-3, 1e308], "w": [0.00000001, "x"]}}'
        opened.mutate(lambda tx: tx.put(b"glimits", raw))
        limiter = Limiter(opened.meta)
        with opened.snapshot() as reader:
            for user in ("u", "w"):
                with suppress(TooManyRequests):  # what the first one sent is owed
                    pace = limiter.admit(reader, user, "bucket")
                    assert pace is not None
                    pace.sent(1 << 40)
            assert all(math.isfinite(limit.requests_per_s + limit.bytes_per_s) for _, _, limit in everything(reader))
        for wrong in (Limit(math.nan), Limit(0, math.inf), Limit(-1, 5), Limit(1e-9), Limit(0, 1e300)):
            with pytest.raises(InvalidArgument):
                opened.mutate(partial(put, kind="buckets", name="bucket", limit=wrong))
    told = json.loads(stratum("limit", "show", root, "--json").stdout, parse_constant=pytest.fail)
    assert {row["requests_per_s"] for row in told["limits"]} == {0.0, 0.001}
