"""Intervals hold what they should, and no more."""

from __future__ import annotations

import random

import pytest

from serve.loadtest.intervals import percentile_ratio, rate_ratio


def blocks(seed: int, scale: float, count: int = 100, size: int = 10) -> list[list[float]]:
    chance = random.Random(seed)
    return [[scale * chance.gauss(20, 2) for _ in range(size)] for _ in range(count)]


def test_the_ratio_of_equal_samples_is_one_and_not_clear() -> None:
    held = 0
    for seed in range(40):
        ratio = percentile_ratio(blocks(seed, 1.0, 40), blocks(seed + 1000, 1.0, 40), 0.5)
        assert ratio is not None
        held += ratio.low <= 1 <= ratio.high
    assert held >= 34  # 38 of 40 are expected


def test_a_real_difference_is_clear() -> None:
    for share in (0.5, 0.99):
        ratio = percentile_ratio(blocks(0, 1.0), blocks(1, 1.3), share)
        assert ratio and ratio.is_clear and ratio.low < 1.3 < ratio.high
        assert ratio.value == pytest.approx(1.3, rel=0.05)


def test_blocks_that_hang_together_widen_the_interval() -> None:
    chance = random.Random(0)
    levels = [chance.gauss(20, 4) for _ in range(60)]
    together = [[level] * 20 for level in levels]
    alone = [[level] for level in levels for _ in range(20)]
    wide, narrow = percentile_ratio(together, together[::-1], 0.5), percentile_ratio(alone, alone[::-1], 0.5)
    assert wide and narrow and wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_pairs_keep_what_both_sides_share_out_of_the_interval() -> None:
    chance = random.Random(1)
    rounds = [chance.uniform(10, 40) for _ in range(12)]
    quiet = [[level + chance.gauss(0, 0.1) for _ in range(50)] for level in rounds]
    disturbed = [[1.1 * value for value in window] for window in quiet]
    paired = percentile_ratio(quiet, disturbed, 0.5, paired=True)
    assert paired and paired.value == pytest.approx(1.1) and paired.high - paired.low < 0.01


def test_nothing_has_no_ratio() -> None:
    assert percentile_ratio([], [[1.0]], 0.5) is None
    assert percentile_ratio([[]], [[1.0]], 0.5) is None
    assert percentile_ratio([[0.0]], [[1.0]], 0.5) is None
    assert rate_ratio([], [1.0]) is None


def test_rates_are_compared_by_stretches() -> None:
    ratio = rate_ratio([10, 11, 9, 10] * 5, [20, 22, 18, 20] * 5)
    assert ratio and ratio.value == pytest.approx(2.0) and ratio.is_clear
