"""Which objects a lifecycle rule moves."""

from __future__ import annotations

import pytest

from stratum import lifecycle
from stratum.lifecycle import Filter, Rule, Transition, When

SMALL, LARGE = 128 * 1024 - 1, 128 * 1024


@pytest.mark.parametrize(
    ("minimum", "limits", "storage_class", "moved"),
    [
        ("", Filter(), "GLACIER", (True, True)),
        ("all_storage_classes_128K", Filter(), "GLACIER", (False, True)),
        ("all_storage_classes_128K", Filter(), "STANDARD_IA", (False, True)),
        ("all_storage_classes_128K", Filter(size_greater=1), "GLACIER", (True, True)),
        ("varies_by_storage_class", Filter(), "GLACIER", (True, True)),
        ("varies_by_storage_class", Filter(), "STANDARD_IA", (False, True)),
        ("varies_by_storage_class", Filter(size_less=1 << 30), "STANDARD_IA", (True, True)),
    ],
)
def test_small_objects_stay_where_the_configuration_says_so(
    minimum: str, limits: Filter, storage_class: str, moved: tuple[bool, bool]
) -> None:
    move = Transition(When(days=1), storage_class)
    rules = [Rule("r", enabled=True, filter=limits, transitions=(move,), transition_minimum=minimum)]
    assert lifecycle.unpack(lifecycle.pack(rules)) == rules
    found = [lifecycle.transition(rules, b"k", size, {}, 0.0, 10 * lifecycle.DAY_S, 0.0) for size in (SMALL, LARGE)]
    assert tuple(one is not None for one in found) == moved


def test_rules_of_before_the_minimum_are_read() -> None:
    rule = Rule("r", enabled=True, transitions=(Transition(When(days=1), "GLACIER"),))
    packed = lifecycle.pack([rule]).replace(b',"transition_minimum":""', b"")
    assert b"transition_minimum" not in packed
    assert lifecycle.unpack(packed) == [rule]
