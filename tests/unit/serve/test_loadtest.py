"""The load test: the same seed asks the same, and figures follow from timestamps alone."""

from __future__ import annotations

import pytest

from serve.loadtest.client import RequestRecord
from serve.loadtest.stats import percentile, summarise_run
from serve.loadtest.workload import plan_requests


def test_the_same_seed_gives_the_same_requests() -> None:
    one = plan_requests(["base", "xiaoli"], 10, 16, 32, seed=1)
    assert one == plan_requests(["base", "xiaoli"], 10, 16, 32, seed=1)
    assert one != plan_requests(["base", "xiaoli"], 10, 16, 32, seed=2)


def test_the_models_take_turns_and_no_prompt_repeats() -> None:
    planned = plan_requests(["a", "b", "c"], 9, 16, 32, seed=0)
    assert [request.model for request in planned] == ["a", "b", "c"] * 3
    assert len({request.prompt for request in planned}) == 9


def test_percentiles_are_values_that_occurred() -> None:
    assert percentile([4, 1, 3, 2], 0.5) == 2
    assert percentile(list(range(1, 101)), 0.99) == 99
    assert percentile([7], 0.99) == 7


def test_figures_follow_from_the_timestamps() -> None:
    records = [
        RequestRecord("a", sent_s=0.0, chunks_s=(0.2, 0.3, 0.4), done_s=0.5, output_tokens=3),
        RequestRecord("a", sent_s=0.0, chunks_s=(0.4, 0.5, 0.6), done_s=1.0, output_tokens=3),
        RequestRecord("b", 0.0, (), 2.0, 0, error="HTTP 500"),
    ]
    first, second, whole = summarise_run(records)
    assert first.ttft and first.tpot and first.e2el
    assert first.ttft.p50_ms == pytest.approx(300)
    assert first.tpot.p50_ms == pytest.approx(100)
    assert first.e2el.p99_ms == pytest.approx(1000)
    assert first.output_tokens_per_s == pytest.approx(3)
    assert (second.completed, second.errors, second.ttft) == (0, {"HTTP 500": 1}, None)
    assert (whole.name, whole.completed, whole.requests_per_s) == ("all", 2, pytest.approx(1))


def test_one_token_has_no_time_per_token() -> None:
    (row, _) = summarise_run([RequestRecord("a", 0.0, (0.1,), 0.2, 1)])
    assert row.tpot is None


def test_nothing_asked_is_nothing_reported() -> None:
    assert summarise_run([]) == []
