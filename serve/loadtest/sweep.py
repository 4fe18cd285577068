"""One run per level, and where the server is saturated, found between the levels and beyond them."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from serve.loadtest.records import RequestRecord
from vllm_lora_ext.errors import BadSetting

What = Literal["adapters", "rate", "concurrency"]
KEEPS_UP = 0.95  # of the offered rate
GAINS = 1.05  # twice the concurrency that gains less has nothing left to gain
LOSES = 0.90  # of the usual throughput with fewer adapters
_MORE_LEVELS = 4  # to bracket and to narrow
_CLOSE = 1.2  # the point is known to this factor


@dataclass(frozen=True)
class Sweep:
    """`levels` in rising order: numbers of adapters, requests per second, or requests in flight."""

    what: What
    levels: tuple[float, ...]


@dataclass(frozen=True)
class Point:
    """One level's outcome. `kept_up` is `keeping_up`'s; `client_bound` that it says nothing of the server."""

    level: float
    output_tokens_per_s: float
    errors: int = 0
    kept_up: float = 1.0
    client_bound: bool = False


@dataclass(frozen=True)
class Saturation:
    """`holds` is the highest level that the server holds, `breaks` the lowest that it does not (or None).

    `unknown_from` is the level from which on nothing is known, and `why`: the client was the limit, or it
    ended there.
    """

    what: What
    holds: float | None
    breaks: float | None
    unknown_from: float | None = None
    why: str = ""

    def __str__(self) -> str:
        unit = {"adapters": "adapters", "rate": "requests/s", "concurrency": "requests in flight"}[self.what]
        beyond = (
            f"; nothing is known at {self.unknown_from:g}: {self.why}"
            if self.unknown_from is not None
            else ""
        )
        if self.breaks is None:
            held = "nothing was held" if self.holds is None else f"{self.holds:g} {unit} are held"
            return f"{'not found' if beyond else 'not saturated'}: {held}{beyond}"
        if self.holds is None:
            return f"saturated at {self.breaks:g} {unit} already{beyond}"
        return f"saturated between {self.holds:g} and {self.breaks:g} {unit}{beyond}"


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
    whole = "" if what == "rate" else "whole "
    if not all(0 < number < math.inf and (what == "rate" or not number % 1) for number in numbers):
        raise BadSetting(f"--sweep {text}", f"its levels are not {whole}numbers above 0", fix)
    return Sweep(what, numbers)  # type: ignore[arg-type]


def keeping_up(records: Sequence[RequestRecord]) -> float:
    """The rate at which answers come over that at which requests are due, at the most; 1: no queue grows.

    A queue that grows makes each request wait longer than the one before: the slope of the time from due
    to done, over when it was due, is offered rate / served rate - 1. It is taken by least squares over the
    last four fifths of the requests, less two standard errors, so that answers of different lengths
    are no queue.
    """
    points = sorted(
        (record.due_s, record.done_s - record.due_s) for record in records if record.due_s is not None
    )
    points = points[len(points) // 5 :]
    if len(points) < 4:
        return 1.0
    due, waited = [x for x, _ in points], [y for _, y in points]
    mean_due, mean_waited = statistics.fmean(due), statistics.fmean(waited)
    spread = sum((moment - mean_due) ** 2 for moment in due)
    if spread == 0:
        return 1.0
    slope = sum((x - mean_due) * (y - mean_waited) for x, y in points) / spread
    rest = sum((y - mean_waited - slope * (x - mean_due)) ** 2 for x, y in points)
    error = math.sqrt(rest / (len(points) - 2) / spread)
    growth: float = max(0.0, slope - 2 * error)
    return 1 / (1 + growth)


def saturation_of(what: What, points: Sequence[Point]) -> Saturation:
    """The saturation that some points show: from which level on none is held any more.

    A level with failed requests is not held. A rate is held if no queue grows; a number of adapters if
    the throughput is within 10 % of the median with fewer; a concurrency if it brings 5 % more than the
    best below it for each doubling. A level that dips while higher ones are held is noise. Of levels from
    one on where the client was the limit nothing is known.
    """
    points = sorted(points, key=lambda point: point.level)
    known = list(itertools.takewhile(lambda point: not point.client_bound, points))
    held = [place for place, point in enumerate(known) if _is_held(what, point, known[:place])]
    first_broken = held[-1] + 1 if held else 0
    holds = known[held[-1]].level if held else None
    if first_broken < len(known):
        return Saturation(what, holds, known[first_broken].level)
    if len(known) < len(points):
        return Saturation(what, holds, None, points[len(known)].level, "the client was the limit")
    return Saturation(what, holds, None)


def _is_held(what: What, point: Point, below: Sequence[Point]) -> bool:
    if point.errors or not point.output_tokens_per_s:
        return False
    if what == "rate":
        return point.kept_up >= KEEPS_UP
    if not below:
        return True
    if what == "adapters":
        usual = statistics.median(other.output_tokens_per_s for other in below)
        return point.output_tokens_per_s >= LOSES * usual
    best = max(below, key=lambda other: other.output_tokens_per_s)
    needed: float = best.output_tokens_per_s * GAINS ** math.log2(point.level / best.level)
    return point.output_tokens_per_s >= needed


def next_level(saturation: Saturation, most: float | None) -> float | None:
    """The level that would tell more: beyond the last one, or between the two; None if there is none.

    `most` is the highest level there can be (adapters that exist).
    """
    if saturation.unknown_from is not None:
        return None
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
        if (point := measure(level)) is None:
            return _ended(sweep.what, points, level)
        points.append(point)
    for _ in range(_MORE_LEVELS):
        further = next_level(saturation_of(sweep.what, points), most)
        if further is None:
            break
        if (point := measure(further)) is None:
            return _ended(sweep.what, points, further)
        points.append(point)
    return saturation_of(sweep.what, points)


def _ended(what: What, points: Sequence[Point], level: float) -> Saturation:
    found = saturation_of(what, points)
    if found.breaks is not None or found.unknown_from is not None:
        return found
    return Saturation(what, found.holds, None, level, "it ended there")
