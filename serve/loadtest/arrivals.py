"""When requests arrive in an open loop. Pure and seeded.

Intervals are drawn with mean 1 and laid over time by the wished rate, so a ramp is the same process
on a stretched clock. Names and meaning of the settings are those of `vllm bench serve`.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass
from typing import Literal

RampStrategy = Literal["linear", "exponential"]


@dataclass(frozen=True)
class Ramp:
    """The rate goes from `start_per_s` to `end_per_s` requests per second over the whole run."""

    strategy: RampStrategy
    start_per_s: float
    end_per_s: float

    def duration_s(self, requests: float) -> float:
        """Seconds in which so many requests arrive; 0 at an infinite rate."""
        return requests / self._mean_per_s()

    def time_of(self, number: float, requests: float) -> float:
        """Seconds after which `number` of `requests` have arrived: the inverse of the rate's integral."""
        duration = self.duration_s(requests)
        if math.isclose(self.start_per_s, self.end_per_s):
            return number / self.start_per_s
        if self.strategy == "linear":
            slope = (self.end_per_s - self.start_per_s) / duration
            return (math.sqrt(self.start_per_s**2 + 2 * slope * number) - self.start_per_s) / slope
        growth = math.log(self.end_per_s / self.start_per_s) / duration
        return math.log1p(number * growth / self.start_per_s) / growth

    def _mean_per_s(self) -> float:
        if self.strategy == "linear" or math.isclose(self.start_per_s, self.end_per_s):
            return (self.start_per_s + self.end_per_s) / 2
        return (self.end_per_s - self.start_per_s) / math.log(self.end_per_s / self.start_per_s)


def arrival_times(ramp: Ramp, requests: int, burstiness: float, seed: int) -> list[float]:
    """Seconds of `requests` arrivals, the last one where the rate says it is due.

    `burstiness` is the shape of a gamma distribution of the intervals: 1 is a Poisson process, less comes
    in bursts, more is more even, infinity is constant. The standard deviation of an interval is
    1 / sqrt(burstiness) of its mean. The draws are scaled to end at the last request's due time,
    so that the offered rate is the wished one in short runs too.
    """
    if math.isinf(burstiness):
        numbers = [float(i) for i in range(1, requests + 1)]
    else:
        chance = random.Random(f"{seed}/arrivals")
        steps = (chance.gammavariate(burstiness, 1 / burstiness) for _ in range(requests))
        numbers = list(itertools.accumulate(steps))
        scale = requests / numbers[-1] if numbers and numbers[-1] > 0 else 1.0
        numbers = [number * scale for number in numbers]
    return [ramp.time_of(number, requests) for number in numbers]


def constant_rate(per_s: float) -> Ramp:
    """No ramp."""
    return Ramp("linear", per_s, per_s)
