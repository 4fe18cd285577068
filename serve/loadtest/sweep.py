"""One run per level, and where the server is saturated, found between the levels and beyond them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from serve.loadtest.records import RequestRecord
from vllm_lora_ext.errors import BadSetting

What = Literal["adapters", "rate", "concurrency"]
KEEPS_UP = 0.95  # of the offered rate
GAINS = 1.05  # more concurrency that gains less has nothing left to gain
LOSES = 0.90  # of the throughput with fewer adapters
_MORE_LEVELS = 4  # to bracket and to narrow
_CLOSE = 1.2  # the point is known to this factor


@dataclass(frozen=True)
class Sweep:
    """`levels` in rising order: numbers of adapters, requests per second, or requests in flight."""

    what: What
    levels: tuple[float, ...]


@dataclass(frozen=True)
class Point:
    """One level's outcome: `offered_per_s` is None in a closed loop."""

    level: float
    output_tokens_per_s: float
    errors: int
    offered_per_s: float | None = None
    kept_up: float | None = None


@dataclass(frozen=True)
class Saturation:
    """`holds` is the highest level that the server holds, `breaks` the lowest that it does not (or None)."""

    what: What
    holds: float | None
    breaks: float | None

    def __str__(self) -> str:
        unit = {"adapters": "adapters", "rate": "requests/s", "concurrency": "requests in flight"}[self.what]
        if self.breaks is None:
            return (
                f"not saturated: {self.holds:g} {unit} are held"
                if self.holds is not None
                else "nothing was measured"
            )
        if self.holds is None:
            return f"saturated at {self.breaks:g} {unit} already"
        return f"saturated between {self.holds:g} and {self.breaks:g} {unit}"


def parse_sweep(text: str) -> Sweep:
    """`adapters=1,8,64`, `rate=0.5,1,2` or `concurrency=1,8`.

    Raises:
        BadSetting: another form.
    """
    what, _, levels = text.partition("=")
    fix = "Write adapters=1,8,64, rate=1,2,4 or concurrency=1,8,64."
    if what not in ("adapters", "rate", "concurrency"):
        raise BadSetting(f"--sweep {text}", "is none of adapters, rate, concurrency", fix)
    try:
        numbers = tuple(sorted({float(level) for level in levels.split(",")}))
    except ValueError:
        numbers = (0.0,)
    if numbers[0] <= 0 or (what != "rate" and any(number % 1 for number in numbers)):
        raise BadSetting(f"--sweep {text}", "its levels are not numbers above 0", fix)
    return Sweep(what, numbers)  # type: ignore[arg-type]


def keeping_up(records: Sequence[RequestRecord]) -> float:
    """The rate at which answers came over the rate at which requests were due: 1 when no queue grows.

    Both are taken over the middle 90 % of the events, so that neither the first answer nor the last counts.
    """
    if len(records) < 3:
        return 1.0
    due = sorted(record.sent_s if record.due_s is None else record.due_s for record in records)
    done = sorted(record.done_s for record in records)
    cut = len(records) // 20
    first, last = cut, len(records) - 1 - cut
    return min(1.0, (due[last] - due[first]) / max(1e-9, done[last] - done[first]))


def saturation_of(what: What, points: Sequence[Point]) -> Saturation:
    """The saturation that some points show.

    A rate is held if no queue grows and no request fails. A number of adapters is held if the throughput
    is within 10 % of the best with fewer. A concurrency is held if it brings 5 % more than the one below it.
    """
    points = sorted(points, key=lambda point: point.level)
    holds, best = None, 0.0
    for point in points:
        if what == "rate":
            good = (point.kept_up or 0.0) >= KEEPS_UP and point.errors == 0
        elif what == "adapters":
            good = point.output_tokens_per_s >= LOSES * best
        else:
            good = point.output_tokens_per_s >= GAINS * best
        if not good:
            return Saturation(what, holds, point.level)
        holds, best = point.level, max(best, point.output_tokens_per_s)
    return Saturation(what, holds, None)


def next_level(saturation: Saturation, most: float | None) -> float | None:
    """The level that would tell more: beyond the last one, or between the two; None if there is none.

    `most` is the highest level there can be (adapters that exist).
    """
    if saturation.breaks is None:
        further = 2 * (saturation.holds or 1.0)
        if most is not None:
            further = min(further, most)
        return further if saturation.holds is None or further > saturation.holds else None
    if saturation.holds is None:
        lower = saturation.breaks / 2
        return lower if saturation.what == "rate" else float(int(lower)) or None
    if saturation.breaks <= saturation.holds * _CLOSE:
        return None
    between = math.sqrt(saturation.holds * saturation.breaks)
    if saturation.what == "rate":
        return between
    between = float(round(between))
    return between if saturation.holds < between < saturation.breaks else None


def run_sweep(
    sweep: Sweep, measure: Callable[[float], Point | None], most: float | None = None
) -> Saturation:
    """Measure the stated levels, then up to four more that narrow the point of saturation.

    `measure` runs one level; None from it ends the sweep (interrupted, the server is gone).
    """
    points: list[Point] = []
    for level in sweep.levels:
        point = measure(level)
        if point is None:
            return saturation_of(sweep.what, points)
        points.append(point)
    for _ in range(_MORE_LEVELS):
        level_or_none = next_level(saturation_of(sweep.what, points), most)
        if level_or_none is None or (point := measure(level_or_none)) is None:
            break
        points.append(point)
    return saturation_of(sweep.what, points)
