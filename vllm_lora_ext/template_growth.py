"""How large what a chat template keeps can become: the fields of its namespaces, above all.

A field outlives the run of a loop that sets it, so what is set to itself twice doubles with every message.
The walk tells each thing that is kept here, with what it holds of other kept things, directly or through
variables and macros. Fields are told apart by their names alone: `a.text` and `b.text` count as one. The
parameters of a macro that calls itself are kept things too, from one call to the next.

Things that reach each other through what they hold form a group. A value that is set may hold things of
its own group once in all: then the largest one of the group grows, at each setting, by no more than what
comes from outside of the group, and never by itself. How often one piece of the request is repeated in
all that (`weights`), and to which power of the request it grows (`powers`), is added up along the groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from vllm_lora_ext.template_values import ConstructRefused

MAX_COPIES = 10_000  # of one piece of the request, in one text
MAX_POWER = 3  # of the request's size, in what is kept
MAX_KEPT = 100  # things, so that judging them takes no time
SHORTEN = "Write the text once, and use it once."


@dataclass(frozen=True)
class Setting:
    """One place where `name` is set: what its new value holds, and how often that can happen.

    `copies` and `power` belong to what comes from the request itself; `nested` and `repeats` to the loops
    around the place.
    """

    line: int
    name: str
    holds: Mapping[str, float]
    copies: float
    power: int
    nested: int
    repeats: int


@dataclass
class Growth:
    """What is known of all that is kept; `settle` computes it from the settings told since the last one."""

    settings: list[Setting] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
    powers: dict[str, int] = field(default_factory=dict)

    def settle(self) -> None:
        """Judge all settings together.

        Raises:
            ConstructRefused: something may grow faster than a low power of the request.
        """
        groups = _groups(self.settings)
        by_name: dict[str, list[Setting]] = {}
        for setting in self.settings:
            by_name.setdefault(setting.name, []).append(setting)
        self.weights.clear()
        self.powers.clear()
        for name in by_name:
            self._weigh(name, groups, by_name)
        self.settings = []

    def weight(self, holds: Mapping[str, float]) -> float:
        """How often one piece of the request may stand in what holds these."""
        return sum(count * self.weights.get(name, 1) for name, count in holds.items())

    def power(self, holds: Iterable[str]) -> int:
        """To which power of the request's size what holds these may grow, less one."""
        return max((self.powers.get(name, 0) for name in holds), default=0)

    def _weigh(
        self, name: str, groups: Mapping[str, frozenset[str]], by_name: Mapping[str, list[Setting]]
    ) -> None:
        if name in self.weights or name not in by_name:
            return
        group = groups[name]
        total, largest, power, keeps = 0.0, 0.0, 0, False
        settings = [setting for member in group for setting in by_name[member]]
        for setting in settings:
            outside = {held: count for held, count in setting.holds.items() if held not in group}
            for held in outside:
                self._weigh(held, groups, by_name)
            inside = sum(setting.holds.values()) - sum(outside.values())
            if inside > 1:
                rule = f"sets `{setting.name}` to what holds it twice, or what it is made of"
                raise ConstructRefused(setting.line, rule, SHORTEN)
            keeps = keeps or inside > 0
            added = max(setting.copies, 1) + self.weight(outside)
            total, largest = total + added * setting.repeats, max(largest, added)
        for setting in settings:
            outer = self.power(held for held in setting.holds if held not in group)
            power = max(power, max(setting.power, outer) + (setting.nested if keeps else 0))
        self._limit(settings[0], total if keeps else largest, power)
        for member in group:
            self.weights[member], self.powers[member] = total if keeps else largest, power

    def _limit(self, setting: Setting, weight: float, power: int) -> None:
        if weight > MAX_COPIES:
            rule = f"keeps in `{setting.name}` what repeats the same part more than {MAX_COPIES:,} times"
            raise ConstructRefused(setting.line, rule, SHORTEN)
        if power > MAX_POWER:
            rule = f"keeps in `{setting.name}` what grows with a high power of the request"
            raise ConstructRefused(setting.line, rule, "Collect each text once.")


def _groups(settings: Iterable[Setting]) -> dict[str, frozenset[str]]:
    """For each thing that is set: all that reach it and that it reaches, itself included."""
    held: dict[str, set[str]] = {}
    for setting in settings:
        held.setdefault(setting.name, set()).update(setting.holds)
    if len(held) > MAX_KEPT:
        rule = f"keeps more than {MAX_KEPT} things in namespaces and macros"
        raise ConstructRefused(max(setting.line for setting in settings), rule, "Keep less.")
    reached = {name: _reached(name, held) for name in held}
    return {
        name: frozenset([name, *(other for other in found if name in reached.get(other, ()))])
        for name, found in reached.items()
    }


def _reached(name: str, held: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    todo = [name]
    while todo:
        new = held.get(todo.pop(), set()) - found
        found |= new
        todo += new
    return found
