"""Arrivals follow the process that was asked for."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise

import pytest

from serve.loadtest.arrivals import Ramp, arrival_times, constant_rate

MANY = 20_000


def gaps(burstiness: float, seed: int = 0) -> list[float]:
    times = arrival_times(constant_rate(10), MANY, burstiness, seed)
    return [after - before for before, after in pairwise([0.0, *times])]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_intervals_have_the_rate_and_the_spread_of_the_asked_gamma(burstiness: float) -> None:
    intervals = gaps(burstiness)
    assert statistics.fmean(intervals) == pytest.approx(0.1)
    spread = statistics.pstdev(intervals) / statistics.fmean(intervals)
    assert spread == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)


def test_a_poisson_process_has_exponential_intervals() -> None:
    ordered = sorted(gaps(1.0))
    for share in (0.1, 0.5, 0.9, 0.99):
        assert ordered[int(share * MANY)] == pytest.approx(-0.1 * math.log(1 - share), rel=0.08)


def test_infinite_burstiness_is_a_constant_rate() -> None:
    assert arrival_times(constant_rate(4), 4, math.inf, 0) == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_the_same_seed_gives_the_same_arrivals() -> None:
    assert gaps(1.0, seed=7) == gaps(1.0, seed=7) != gaps(1.0, seed=8)


@pytest.mark.parametrize("strategy", ["linear", "exponential"])
@pytest.mark.parametrize(("start", "end"), [(2.0, 20.0), (20.0, 2.0), (5.0, 5.0)])
def test_a_ramp_goes_from_its_start_to_its_end(strategy: str, start: float, end: float) -> None:
    ramp = Ramp(strategy, start, end)  # type: ignore[arg-type]
    times = arrival_times(ramp, MANY, math.inf, 0)
    assert times[-1] == pytest.approx(ramp.duration_s(MANY))
    rates = [1 / (after - before) for before, after in pairwise(times)]
    assert rates[0] == pytest.approx(start, rel=0.05)
    assert rates[-1] == pytest.approx(end, rel=0.05)
    middle = (start + end) / 2 if strategy == "linear" else math.sqrt(start * end)
    half = ramp.duration_s(MANY) / 2
    at_half = sum(half - 1 < time <= half + 1 for time in times) / 2
    assert at_half == pytest.approx(middle, rel=0.1)
