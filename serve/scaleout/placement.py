"""Which replica a request goes to, and on how many replicas a version lies. Pure: no clock, no Ray.

Every version has an order of the replicas, by rendezvous hashing of its digest: a replica that comes or
goes moves only the versions that it takes or had. A version lies on the first `width` of its order. A
request goes to the first of them that has room, so one version stays where it is while it can. Room ends at
a little over the mean of all replicas (consistent hashing with bounded loads, Mirrokni et al., SODA 2018),
but never below what an engine runs side by side anyway. When all `width` are full, the version grows by one;
when its last replica was not needed for a while, it shrinks by one. So neither does one replica get hot, nor
do adapters wander, and routers that know nothing of each other agree on all but the width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache


@dataclass(frozen=True)
class Rules:
    """`most`: replicas per version at most, 0 for half of all and two at least; `slack`: over the mean load.

    `calm`: requests that a replica runs side by side without harm; `cool_s`: as long the last replica of a
    version has to be idle of it before it shrinks.
    """

    most: int = 0
    slack: float = 1.25
    calm: int = 8
    cool_s: float = 60.0

    def most_of(self, replicas: int) -> int:
        """On how many of so many replicas a version may lie."""
        return max(1, min(replicas, self.most or max(2, replicas // 2)))


@dataclass(frozen=True)
class Width:
    """On how many replicas a version lies, and when the last of them was needed (seconds)."""

    count: int = 1
    needed_at: float = 0.0


@dataclass(frozen=True)
class Choice:
    """Where a request goes: `ranked`, the best first, and nowhere else; the version's width from now on."""

    ranked: tuple[str, ...]
    width: Width


@lru_cache(maxsize=16384)
def order_of(version: str, replicas: tuple[str, ...]) -> tuple[str, ...]:
    """All replicas, in the order in which they take this version."""
    return tuple(sorted(replicas, key=lambda replica: _weight(version, replica)))


def _weight(version: str, replica: str) -> bytes:
    return hashlib.blake2b(f"{version}\0{replica}".encode(), digest_size=16).digest()


def spread(loads: Mapping[str, int], number: int) -> tuple[str, ...]:
    """For the base, which is everywhere: the least loaded first, equal ones in turn by `number`."""
    names = sorted(loads)
    turn = number % len(names) if names else 0
    return tuple(sorted(names[turn:] + names[:turn], key=loads.__getitem__))


def choose(version: str, loads: Mapping[str, int], width: Width, now: float, rules: Rules) -> Choice:
    """Where a request for `version` goes; `loads` are the ongoing requests of each live replica.

    Every live replica has to be in `loads`, and there has to be one. `now` only ever grows.
    """
    order = order_of(version, tuple(sorted(loads)))
    most = rules.most_of(len(order))
    count = min(width.count, most)
    width = _cooled(replace(width, count=count), now, rules)
    bound = max(rules.calm, rules.slack * (sum(loads.values()) + 1) / len(order))
    there = order[: width.count]
    position = next((at for at, replica in enumerate(there) if loads[replica] < bound), None)
    if position is None and width.count < most:
        width = Width(width.count + 1, now)
        newest = order[width.count - 1]
        if loads[newest] < bound:
            position = width.count - 1
        there = order[: width.count]
    if position is None:  # all are full, and more it may not have
        ranked = tuple(sorted(there, key=loads.__getitem__))
        return Choice(ranked, replace(width, needed_at=now))
    if position == width.count - 1:
        width = replace(width, needed_at=now)
    best = there[position]
    rest = sorted((replica for replica in there if replica != best), key=loads.__getitem__)
    return Choice((best, *rest), width)


def _cooled(width: Width, now: float, rules: Rules) -> Width:
    """One replica less for every `cool_s` in which the last one was not needed."""
    steps = int(max(0.0, now - width.needed_at) // rules.cool_s)
    if width.count == 1 or not steps:
        return width
    return Width(max(1, width.count - steps), now)


class Placement:
    """The widths of all versions that lie on more than one replica, as one router knows them."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self._widths: dict[str, Width] = {}
        self._number = 0

    def route(self, version: str | None, loads: Mapping[str, int], now: float) -> tuple[str, ...]:
        """The replicas that a request may go to, the best first; None is the base. Empty without replicas."""
        if not loads:
            return ()
        if version is None:
            self._number += 1
            return spread(loads, self._number)
        choice = choose(version, loads, self._widths.get(version, Width(needed_at=now)), now, self.rules)
        if choice.width.count > 1:
            self._widths[version] = choice.width
        else:
            self._widths.pop(version, None)
        return choice.ranked

    def sweep(self, now: float) -> None:
        """Forget widths of versions that nobody has asked for in long."""
        for version, width in list(self._widths.items()):
            cooled = _cooled(width, now, self.rules)
            if cooled.count == 1:
                del self._widths[version]

    def widths(self) -> dict[str, int]:
        """The versions that lie on more than one replica, with how many."""
        return {version: width.count for version, width in self._widths.items()}
