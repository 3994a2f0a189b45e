"""From the words of a command line to options: which word is the volume, and how a wrong use is told.

Where $STRATUM_VOLUME is set, a command may leave VOLUME out. Both readings are tried: with the first word as the volume, and without a
volume among the words. Where both fit, the first word is the volume only if it is a path (absolute, or begins with . ) of a folder that
is a volume; names of buckets, users and remotes never are.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from stratum.config import CONFIG_NAME

if TYPE_CHECKING:
    from collections.abc import Callable

VARIABLE = "STRATUM_VOLUME"


class WrongUse(Exception):
    """What argparse says of words that it cannot read, and the usage of the command."""

    def __init__(self, message: str, usage: str, prog: str) -> None:
        super().__init__(message)
        self.message, self.usage, self.prog = message, usage, prog


class Parser(argparse.ArgumentParser):
    """Raises where argparse would end the process."""

    def error(self, message: str) -> NoReturn:
        raise WrongUse(message, self.format_usage(), self.prog)


def read(build: Callable[..., argparse.ArgumentParser], words: list[str]) -> argparse.Namespace:
    """Raises `WrongUse`."""
    named = os.environ.get(VARIABLE, "")
    if not named:
        return build().parse_args(words)
    short: argparse.Namespace | None = None
    refused: WrongUse | None = None
    try:
        short = build(volume=Path(named)).parse_args(words)
    except WrongUse as error:
        refused = error
    try:
        full = build().parse_args(words)
    except WrongUse:
        if short is None:
            assert refused is not None, "it was read or refused"
            raise refused from None
        return short
    return full if short is None or _is_volume(full.volume, words) else short


def _is_volume(path: Path | None, words: list[str]) -> bool:
    """Whether a word that could be another argument is a volume's path."""
    if path is None or not any(word.startswith(("/", "./", "../")) and Path(word) == path for word in words):
        return False
    return (path / CONFIG_NAME).is_file()


def wants_json(words: list[str]) -> bool:
    return "--json" in (words[: words.index("--")] if "--" in words else words)


def told(error: WrongUse) -> None:
    sys.stderr.write(f"{error.usage}{error.prog}: error: {error.message}\n")
