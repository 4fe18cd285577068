"""How sure a difference is: bootstrap intervals (Efron 1979) of ratios. Pure and seeded.

Values of one request, or of one moment, hang together; so blocks are resampled, never single values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 1000
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Ratio:
    """`value` is second over first; `low` and `high` hold it with 95 % confidence."""

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether 1 lies outside."""
        return self.low > 1 or self.high < 1

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


Blocks = Sequence[Sequence[float]]


def percentile_ratio(first: Blocks, second: Blocks, share: float, paired: bool = False) -> Ratio | None:
    """The ratio of a percentile of two samples of blocks; None if one is empty.

    With `paired` block i of both belongs together (two windows of one round) and is resampled as one.
    """
    samples = [_Sample(blocks) for blocks in (first, second)]
    if not all(sample.values.size for sample in samples):
        return None
    whole = [sample.percentile(np.ones(sample.blocks), share) for sample in samples]
    if whole[0] <= 0:
        return None
    chance = np.random.default_rng(0)
    ratios = []
    for _ in range(_RESAMPLES):
        picks = [np.bincount(chance.integers(n, size=n), minlength=n) for n in (len(first), len(second))]
        if paired:
            picks[1] = picks[0]
        one, two = (sample.percentile(pick, share) for sample, pick in zip(samples, picks, strict=True))
        if one > 0 and np.isfinite(two):
            ratios.append(two / one)
    return _with_interval(whole[1] / whole[0], ratios)


class _Sample:
    """Values of blocks in order, so that a percentile of resampled blocks is one pass over weights."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = len(blocks)
        owners = np.repeat(np.arange(self.blocks), [len(block) for block in blocks])
        values = np.asarray([value for block in blocks for value in block], float)
        order = np.argsort(values, kind="stable")
        self.values, self._owners = values[order], owners[order]

    def percentile(self, times: np.ndarray, share: float) -> float:
        """Nearest rank, when block i counts `times[i]` times; not a number of nothing."""
        reached = np.cumsum(times[self._owners])
        if not reached.size or reached[-1] == 0:
            return float("nan")
        return float(self.values[np.searchsorted(reached, share * reached[-1] * (1 - 1e-12))])


def rate_ratio(first: Sequence[float], second: Sequence[float]) -> Ratio | None:
    """The ratio of two means of counts per equal stretch of time."""
    one, two = np.asarray(first, float), np.asarray(second, float)
    if not one.size or not two.size or one.mean() <= 0:
        return None
    chance = np.random.default_rng(0)
    picks = [chance.choice(values, size=(_RESAMPLES, values.size)).mean(axis=1) for values in (one, two)]
    return _with_interval(two.mean() / one.mean(), picks[1][picks[0] > 0] / picks[0][picks[0] > 0])


def _with_interval(value: float, ratios: Sequence[float] | np.ndarray) -> Ratio | None:
    if not len(ratios):
        return None
    low, high = np.quantile(ratios, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return Ratio(float(value), float(low), float(high))
