"""Who lies where, and why: a pure function of recorded evidence.

Rules in the order they are asked; the first that speaks wins, and its name is in every record:

    pin             a hint of the user is in force
    asked           lifecycle rule, storage class or `tier move` wants the file there
    repeated-read   read often enough since it left: back to the hot tier, if there is room
    idle-cold       unused for `cold_after_s`: eligible for the cold tier
    idle-warm       unused for `idle_s`: eligible for the warm tier
    stay            nothing speaks for a move

In the mode "strict" eligible files move. In the mode "pressure" they are copied ahead, and leave when a disk fills.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stratum.tier_rows import Tier

if TYPE_CHECKING:
    from stratum.config import Config

LEVELS = ("ok", "low", "high", "emergency")


@dataclass(slots=True, frozen=True)
class Settings:
    """The part of the configuration that decides."""

    strict: bool
    idle_s: float
    cold_after_s: float
    promote_reads: int
    promote_window_s: float
    residence_s_min: float

    @classmethod
    def of(cls, config: Config) -> Settings:
        return cls(
            config.tiering_mode == "strict", config.tiering_idle_s, config.tiering_cold_after_s, config.tiering_promote_reads,
            config.tiering_promote_window_s, config.tiering_residence_s_min,
        )  # fmt: skip


@dataclass(slots=True, frozen=True)
class Facts:
    """What is known of one file. `moved_ago_s` is None for one that never moved; `asked` is where a rule or user wants it."""

    tier: Tier
    size: int
    idle_s: float
    reads_recent: int
    reads: int
    average_fast: float
    average_slow: float
    moved_ago_s: float | None = None
    pin: Tier | None = None
    pin_source: str = ""
    asked: Tier | None = None
    asked_by: str = ""


@dataclass(slots=True, frozen=True)
class Surroundings:
    """`level` is how full the hot disks are; `warm` and `cold` whether those tiers can take data now."""

    level: str
    warm: bool
    cold: bool


@dataclass(slots=True)
class Decision:
    """`target` is where the file goes now, `copy_to` where it is copied ahead; None: not at all."""

    target: Tier | None
    copy_to: Tier | None
    rule: str
    next: str
    inputs: dict[str, Any] = field(default_factory=dict)


def decide(facts: Facts, settings: Settings, around: Surroundings) -> Decision:
    """See the module."""
    inputs = {
        "tier": facts.tier.name.lower(), "size": facts.size, "idle_s": round(facts.idle_s), "reads_recent": facts.reads_recent,
        "reads": facts.reads, "average_fast": round(facts.average_fast, 3), "average_slow": round(facts.average_slow, 3),
        "hot_disks": around.level, "warm_takes": around.warm, "cold_takes": around.cold, "mode": "strict" if settings.strict else "pressure",
    }  # fmt: skip
    if facts.pin is not None:
        inputs["pin"] = facts.pin.name.lower()
        inputs["pin_source"] = facts.pin_source
        target = _reachable(facts.pin, facts.tier, around)
        return Decision(target, None, "pin", f"nothing while the priority of its {facts.pin_source} holds", inputs)
    if facts.asked is not None:
        inputs["asked"] = facts.asked.name.lower()
        inputs["asked_by"] = facts.asked_by
        target = _reachable(facts.asked, facts.tier, around)
        return Decision(target, None, "asked", f"{facts.asked_by} has it go to {facts.asked.name.lower()}", inputs)
    if facts.tier != Tier.HOT:
        return _upward(facts, settings, around, inputs)
    return _downward(facts, settings, around, inputs)


def _reachable(wanted: Tier, now: Tier, around: Surroundings) -> Tier | None:
    """Where a file that should be in `wanted` can go."""
    if wanted == now:
        return None
    if wanted == Tier.HOT:
        return None if around.level == "emergency" else Tier.HOT
    return wanted if (around.warm if wanted == Tier.WARM else around.cold) else None


def _upward(facts: Facts, settings: Settings, around: Surroundings, inputs: dict[str, Any]) -> Decision:
    window_h = settings.promote_window_s / 3600
    if facts.reads_recent >= settings.promote_reads:
        if around.level in {"high", "emergency"}:
            return Decision(None, None, "repeated-read", "it comes back when the hot disks have room again", inputs)
        return Decision(Tier.HOT, None, "repeated-read", "it goes to the hot tier now", inputs)
    onward = f"{settings.promote_reads} reads within {window_h:g} h bring it back to the hot tier"
    if facts.tier == Tier.WARM and facts.idle_s >= settings.cold_after_s and around.cold:
        if settings.strict:
            return Decision(Tier.COLD, None, "idle-cold", onward, inputs)
        return Decision(
            None, Tier.COLD, "idle-cold", f"it leaves for the cold tier when the warm disks fill; {onward}", inputs
        )
    return Decision(None, None, "stay", onward, inputs)


def _downward(facts: Facts, settings: Settings, around: Surroundings, inputs: dict[str, Any]) -> Decision:
    if facts.idle_s >= settings.cold_after_s and around.cold:
        rule, target = "idle-cold", Tier.COLD
    elif facts.idle_s >= settings.idle_s and around.warm:
        rule, target = "idle-warm", Tier.WARM
    elif facts.idle_s >= settings.idle_s and around.cold and not settings.strict:
        rule, target = "idle-cold", Tier.COLD  # a volume without a warm tier copies ahead to the cold one
    else:
        left_s = settings.idle_s - facts.idle_s
        text = (
            f"without access it may leave in {left_s:.0f} s"
            if left_s > 0
            else "it may leave when a colder tier can take it"
        )
        return Decision(None, None, "stay", f"{text}, or sooner when a hot disk fills", inputs)
    if settings.strict and facts.moved_ago_s is not None and facts.moved_ago_s < settings.residence_s_min:
        left_s = settings.residence_s_min - facts.moved_ago_s
        return Decision(None, target, rule, f"it came back lately and stays {left_s:.0f} s more", inputs)
    if settings.strict:
        return Decision(target, None, rule, f"it goes to the {target.name.lower()} tier now", inputs)
    return Decision(None, target, rule, "it leaves when a hot disk fills; any access keeps it", inputs)


def relief_order(candidates: list[tuple[int, Facts]]) -> list[int]:
    """Files in the order they leave a full disk: the least use per byte first."""

    def score(item: tuple[int, Facts]) -> tuple[float, float]:
        facts = item[1]
        use = facts.average_slow * 0.5 ** (facts.idle_s / (7 * 86400.0))
        return use / max(facts.size, 1), -facts.idle_s

    return [number for number, _ in sorted(candidates, key=score)]
