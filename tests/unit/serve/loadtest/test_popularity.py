"""Who is asked follows the distribution that was asked for."""

from __future__ import annotations

from collections import Counter

import pytest

from serve.loadtest.popularity import Popularity, make_popularity
from vllm_lora_ext.errors import BadSetting

ADAPTERS = [f"a{number}" for number in range(10)]
MANY = 20_000
# 99.9 % of chi-square values with that many degrees of freedom lie below
CHI_SQUARE = {9: 27.9, 10: 29.6}


def chi_square(popularity: Popularity) -> float:
    drawn = Counter(popularity.model_of(index, seed=0) for index in range(MANY))
    wanted = {name: share * MANY for name, share in zip(popularity.models, popularity.shares, strict=True)}
    assert set(drawn) <= set(wanted)
    return sum((drawn[name] - count) ** 2 / count for name, count in wanted.items() if count)


def test_uniform_asks_all_alike() -> None:
    popularity = make_popularity(ADAPTERS, None, "uniform")
    assert popularity.shares == pytest.approx([0.1] * 10)
    assert chi_square(popularity) < CHI_SQUARE[9]


@pytest.mark.parametrize("alpha", [0.7, 1.0, 1.5])
def test_skewed_is_zipf(alpha: float) -> None:
    popularity = make_popularity(ADAPTERS, None, "skewed", alpha)
    for rank, share in enumerate(popularity.shares, start=1):
        assert share / popularity.shares[0] == pytest.approx(rank**-alpha)
    assert chi_square(popularity) < CHI_SQUARE[9]


def test_weights_are_as_stated_and_who_is_not_named_gets_nothing() -> None:
    popularity = make_popularity(ADAPTERS[:3], None, "weights", weights={"a0": 3, "a2": 1})
    assert popularity.shares == pytest.approx([0.75, 0.0, 0.25])
    assert "a1" not in {popularity.model_of(index, 0) for index in range(1000)}


def test_distinct_takes_turns() -> None:
    popularity = make_popularity(["a", "b"], "base", "distinct")
    assert [popularity.model_of(index, 0) for index in range(6)] == ["a", "b", "base"] * 2


def test_in_turn_the_base_has_its_share_at_even_distances() -> None:
    popularity = make_popularity(["a", "b"], "base", "distinct", base_share=0.2)
    asked = [popularity.model_of(index, 0) for index in range(10)]
    assert asked == ["a", "b", "a", "b", "base"] * 2


def test_a_share_of_a_base_that_is_not_asked_is_refused() -> None:
    with pytest.raises(BadSetting, match="--base-share"):
        make_popularity(ADAPTERS, None, "uniform", base_share=1.0)


def test_the_base_gets_as_much_as_one_adapter_unless_stated() -> None:
    assert make_popularity(ADAPTERS, "base", "skewed").shares[0] == pytest.approx(1 / 11)
    stated = make_popularity(ADAPTERS, "base", "skewed", base_share=0.4)
    assert stated.models[0] == "base" and stated.shares[0] == pytest.approx(0.4)
    assert chi_square(stated) < CHI_SQUARE[10]
    assert "base" not in make_popularity(ADAPTERS, "base", "uniform", base_share=0.0).models
    assert make_popularity([], "base", "uniform").models == ("base",)


@pytest.mark.parametrize("weights", [{"stranger": 1.0}, {"a0": 0.0}])
def test_weights_without_sense_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(BadSetting, match="--lora-weights"):
        make_popularity(ADAPTERS, None, "weights", weights=weights)


def test_nobody_to_ask_is_refused() -> None:
    with pytest.raises(BadSetting, match="no model"):
        make_popularity([], None, "uniform")
