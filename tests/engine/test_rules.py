"""Rules about the code itself: layers, tables, packages, configuration."""

from __future__ import annotations

import ast
import pkgutil
import re
import tomllib
from pathlib import Path

import pytest

import stratum
from stratum import config, errors
from stratum.cli import exit_codes
from stratum.errors import ConfigInvalid, StratumError
from stratum.fuse import errors as fuse_errors
from stratum.s3 import errors as s3_errors

ROOT = Path(__file__).resolve().parents[2]
AREAS = ("fuse", "s3", "tiering", "cold_backends")
FORBIDDEN = {
    "fuse": ("stratum.s3", "stratum.tiering", "stratum.cli"),
    "s3": ("stratum.fuse", "stratum.cli"),
    "tiering": ("stratum.fuse", "stratum.s3", "stratum.cli"),
    "cold_backends": ("stratum.fuse", "stratum.s3", "stratum.tiering", "stratum.cli"),
    "stratum": ("stratum.fuse", "stratum.s3", "stratum.tiering"),
}
PARSERS = ("signatures.py", "chunked.py", "xml.py", "ranges.py", "errors.py", "access.py")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("area", FORBIDDEN)
def test_layers(area: str) -> None:
    """A lower layer never names an upper one; the command line stands at the very top."""
    for path in (ROOT / area).rglob("*.py"):
        if area == "stratum" and (
            any(part in AREAS for part in path.relative_to(ROOT).parts[1:]) or "cli" in path.parts
        ):
            continue
        wrong = {
            name
            for name in imports(path)
            for forbidden in FORBIDDEN[area]
            if name == forbidden or name.startswith(forbidden + ".")
        }
        assert not wrong, f"{path} imports {wrong}"


@pytest.mark.parametrize("name", PARSERS)
def test_parsers_know_no_web_framework(name: str) -> None:
    assert not any(module.startswith(("werkzeug", "uvicorn", "httptools")) for module in imports(ROOT / "s3" / name))


def subclasses(root: type[StratumError]) -> set[type[StratumError]]:
    return {root} | {found for child in root.__subclasses__() for found in subclasses(child)}


def test_every_error_has_a_row_in_each_table() -> None:
    engine = {error for error in subclasses(StratumError) if error.__module__ == errors.__name__}
    assert set(s3_errors.TABLE) == engine
    assert set(fuse_errors.TABLE) == engine
    assert set(exit_codes.TABLE) == engine
    assert set(s3_errors.TABLE.values()) <= set(s3_errors.STATUS)


def test_semantics_names_its_tests() -> None:
    """Every section says which tests hold it true, and they exist."""
    text = (ROOT / "SEMANTICS.md").read_text()
    statements = re.findall(r"^- .*$", text, flags=re.MULTILINE)
    assert len(statements) > 60
    for statement in statements:
        found = re.search(r"\[([^]]+)\]$", statement)
        assert found, f"no test is named by: {statement}"
        for name in found.group(1).split(", "):
            file, _, function = name.partition("::")
            source = (ROOT / "tests" / file).read_text()
            assert re.search(rf"^(def|class) {function}\b|^{function} = ", source, re.MULTILINE), f"there is no {name}"
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        prose = [line for line in section.splitlines()[1:] if line and not line.startswith(("- ", "|"))]
        assert prose == [], f"a sentence that is no statement has no test: {prose[0]}"


def test_the_package_list_and_the_links_are_true() -> None:
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(document["tool"]["setuptools"]["packages"])
    found = {"stratum"} | {
        module.name for module in pkgutil.walk_packages(stratum.__path__, "stratum.") if module.ispkg
    }
    assert listed == found
    for area in AREAS:
        assert (ROOT / "stratum" / area).is_symlink()
        assert (ROOT / "stratum" / area).resolve() == ROOT / area


def test_an_area_has_one_identity() -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("s3", ROOT / "s3" / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=r"stratum\.s3"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_no_file_is_too_long_to_hold_in_mind() -> None:
    long = {
        str(path.relative_to(ROOT)): count
        for area in ("stratum", *AREAS, "tests", "bench")
        for path in (ROOT / area).rglob("*.py")
        if (count := len(path.read_text().splitlines())) > 700
    }
    assert not long


def test_the_rendered_configuration_reads_back() -> None:
    assert config.parse(config.render({}), "x").as_dict() == config.parse("", "x").as_dict()
    changed = config.parse(config.render({"s3.listen": "127.0.0.1:9", "mount.path": '/a "b"\\c'}), "x")
    assert (changed.s3_listen, changed.mount_path) == ("127.0.0.1:9", '/a "b"\\c')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[s3]\nworkerz = 1", "did you mean 'workers'"),
        ("[s4]\n", "did you mean 's3'"),
        ("[s3]\nworkers = 'two'", "not of type int"),
        ("[s3]\nworkers = 0", "from 1 to 128"),
        ("[s3]\nworkers = true", "not of type int"),
        ("[s3]\nlisten = 'nowhere'", "not HOST:PORT"),
        ("[s3]\ntls_key = 'x'", "go together"),
        ("[volume]\ndurability = 'relaxed'", "not one of strict"),
        ("[volume]\nhot = []", "at least one folder"),
        ("[s3\n", "not TOML"),
    ],
)
def test_a_wrong_configuration_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ConfigInvalid, match=message):
        config.parse(text, "stratum.toml")
