"""The part of fsck about access keys: does each secret open with the key they are sealed with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stratum import private
from stratum.errors import StratumError
from stratum.identity import Identities

if TYPE_CHECKING:
    from collections.abc import Callable

    from stratum.transaction import InodeReader
    from stratum.volume import Volume


def check(volume: Volume, reader: InodeReader, found: Callable[[str, str, str], None]) -> None:
    try:
        failing, _ = Identities(volume).unreadable(reader)
    except StratumError as error:
        found("seal-key", f"meta/{private.SEAL_KEY}", error.message)
        return
    for key in failing:
        found(
            "unreadable-secret",
            f"access key {key}",
            "its secret does not open with meta/seal.key; `stratum key create USER` makes another key, and `stratum key revoke` removes this one",
        )
