"""Figures follow from the timestamps alone."""

from __future__ import annotations

import pytest

from serve.loadtest.records import RequestRecord
from serve.loadtest.stats import (
    Percentiles,
    fairness_of,
    figures_of,
    jain_index,
    percentile,
    percentiles,
    split_cold,
    summarise,
)
from tests.unit.serve.loadtest.conftest import record


def test_percentiles_are_values_that_occurred() -> None:
    assert percentile([4, 1, 3, 2], 0.5) == 2
    assert percentile(list(range(1, 101)), 0.99) == 99
    assert percentile([7], 0.99) == 7
    assert percentiles([value / 1000 for value in range(1, 101)]) == Percentiles(50, 90, 99, 100)
    assert percentiles([]) is None


def test_figures_follow_from_the_timestamps() -> None:
    records = [
        record("a", 0.0, (0.2, 0.3, 0.4), 0.5),
        record("a", 0.0, (0.4, 0.5, 0.7), 1.0),
        record("b", 0.0, (), 2.0, error="HTTP 500"),
    ]
    figures = figures_of(records, base=None)
    first, second = figures.models
    assert first.ttft and first.itl and first.tpot and first.e2el
    assert (first.ttft.p50_ms, first.ttft.p99_ms) == (pytest.approx(200), pytest.approx(400))
    assert (first.itl.p50_ms, first.itl.p99_ms) == (pytest.approx(100), pytest.approx(200))
    assert (first.tpot.p50_ms, first.tpot.p99_ms) == (pytest.approx(100), pytest.approx(150))
    assert first.e2el.p99_ms == pytest.approx(1000)
    assert first.output_tokens_per_s == pytest.approx(3)
    assert (second.completed, second.errors, second.ttft) == (0, {"HTTP 500": 1}, None)
    whole = figures.whole
    assert (whole.name, whole.requests, whole.completed, whole.requests_per_s) == (
        "all",
        3,
        2,
        pytest.approx(1),
    )


def test_one_token_has_no_time_per_token() -> None:
    row = summarise("a", [record(chunks_s=(0.1,))], 1.0)
    assert row.tpot is None and row.itl is None and row.ttft is not None


def test_several_tokens_in_a_chunk_count_by_usage() -> None:
    row = summarise("a", [record(chunks_s=(0.1, 0.5), output_tokens=9)], 1.0)
    assert row.tpot and row.tpot.p50_ms == pytest.approx(50)
    assert row.itl and row.itl.p50_ms == pytest.approx(400)


def test_nothing_asked_is_nothing_reported() -> None:
    figures = figures_of([], base="base")
    assert figures.models == () and figures.whole.completed == 0 and figures.base_share is None


def test_goodput_counts_requests_within_every_target() -> None:
    records = [record(chunks_s=(0.2, 0.3)), record(chunks_s=(0.2, 0.9)), record(chunks_s=(0.8, 0.9))]
    row = summarise("a", records, 2.0, {"ttft": 500, "tpot": 200})
    assert row.goodput_per_s == pytest.approx(0.5)
    assert summarise("a", records, 2.0).goodput_per_s is None


def test_an_adapter_is_cold_when_it_is_asked_first_and_when_others_took_its_slot() -> None:
    asked = [record(name, number) for number, name in enumerate(["a", "b", "base", "a", "c", "b", "a"])]

    def names(records: list[RequestRecord]) -> str:
        return "".join(item.model for item in records)

    assert [names(some) for some in split_cold(asked, "base", None)] == ["abc", "aba"]
    assert [names(some) for some in split_cold(asked, "base", 2)] == ["abcba", "a"]
    assert [names(some) for some in split_cold(asked, "base", 2, ["c", "b", "a"])] == ["cba", "aba"]


def test_a_warm_up_makes_warm_and_is_not_in_the_figures() -> None:
    figures = figures_of([record("a", 5.0, (5.1,))], "base", warmup=[record("a", 0.0, (3.0,))])
    assert figures.cold and figures.cold.ttft and figures.cold.ttft.p50_ms == pytest.approx(3000)
    assert figures.warm and figures.warm.requests == 1
    assert figures.whole.requests == 1 and figures.cold_in_load == 0


def test_fairness_is_of_the_service_and_not_of_the_demand() -> None:
    alike = {"a": [record("a")] * 9, "b": [record("b")]}
    fair = fairness_of(alike)
    assert fair and fair.jain_index == pytest.approx(1.0) and fair.worst_to_median == pytest.approx(1.0)
    slow = {**alike, "c": [record("c", chunks_s=(2.0, 3.0, 4.0))]}
    unfair = fairness_of(slow)
    assert unfair and unfair.worst == "c" and unfair.worst_to_median == pytest.approx(10)
    assert unfair.jain_index < 0.8
    assert fairness_of({"a": [record("a")]}) is None


def test_an_adapter_that_is_never_answered_is_unfairness_itself() -> None:
    starved = {"a": [record("a")], "b": [record("b")], "c": [record("c", chunks_s=(), error="timeout")] * 9}
    fair = fairness_of(starved)
    assert fair and fair.unanswered == ("c",) and fair.jain_index == pytest.approx(2 / 3)


def test_jain_index_goes_from_one_down_to_one_of_n() -> None:
    assert jain_index([3, 3, 3]) == pytest.approx(1)
    assert jain_index([1, 0, 0, 0]) == pytest.approx(0.25)


def test_the_share_of_the_base_against_the_adapters() -> None:
    figures = figures_of([record("base", chunks_s=(0.1,)), record("a"), record("b"), record("b")], "base")
    assert figures.base_share and figures.base_share.requests_percent == pytest.approx(25)
    assert figures.base_share.output_tokens_percent == pytest.approx(10)
    assert figures.base and figures.base.requests == 1 and figures.adapters and figures.adapters.requests == 3
