"""The point of saturation is found, whatever levels were stated."""

from __future__ import annotations

import pytest

from serve.loadtest.sweep import Point, Sweep, keeping_up, parse_sweep, run_sweep, saturation_of
from tests.unit.serve.loadtest.conftest import record
from vllm_lora_ext.errors import BadSetting

CAPACITY = 10.0  # requests/s that the simulated server answers
SLOTS = 24  # adapters after which it slows down


def at_rate(rate: float) -> Point:
    return Point(rate, min(rate, CAPACITY) * 32, 0, rate, min(1.0, CAPACITY / rate))


def with_adapters(count: float) -> Point:
    return Point(count, 1000.0 if count <= SLOTS else 600.0, 0)


def in_flight(count: float) -> Point:
    return Point(count, 100 * count / (1 + count / 16), 0)


@pytest.mark.parametrize("levels", [(1.0, 2.0, 4.0), (4.0, 64.0), (40.0, 80.0)])
def test_a_rate_that_is_too_high_is_found_from_above_and_from_below(levels: tuple[float, ...]) -> None:
    found = run_sweep(Sweep("rate", levels), at_rate)
    assert found.holds is not None and found.breaks is not None
    assert found.holds <= CAPACITY < found.breaks <= found.holds * 2


def test_the_number_of_adapters_is_found_and_stays_a_number_that_there_is() -> None:
    tried: list[float] = []

    def measure(count: float) -> Point:
        tried.append(count)
        return with_adapters(count)

    found = run_sweep(Sweep("adapters", (1, 8, 64)), measure, most=100)
    assert found.holds is not None and found.breaks is not None and found.holds <= SLOTS < found.breaks
    assert all(count % 1 == 0 and count <= 100 for count in tried)


def test_a_server_that_is_not_saturated_is_asked_for_more_up_to_what_there_is() -> None:
    found = run_sweep(Sweep("adapters", (1, 4)), with_adapters, most=12)
    assert (found.holds, found.breaks) == (12, None) and "not saturated" in str(found)


def test_concurrency_is_saturated_when_more_brings_no_more() -> None:
    found = run_sweep(Sweep("concurrency", (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)), in_flight)
    assert found.holds is not None and 64 <= found.holds <= 512


def test_a_rate_with_failed_requests_is_not_held() -> None:
    points = [Point(1, 32, 0, 1, 1.0), Point(2, 64, 3, 2, 1.0)]
    assert saturation_of("rate", points).breaks == 2


def test_a_run_that_was_cut_off_ends_the_sweep_with_what_there_is() -> None:
    answers = iter([at_rate(1), None])
    found = run_sweep(Sweep("rate", (1, 2, 4)), lambda level: next(answers))
    assert (found.holds, found.breaks) == (1, None)


def test_keeping_up_compares_when_answers_came_with_when_requests_were_due() -> None:
    steady = [record(due_s=number / 10, sent_s=number / 10, done_s=number / 10 + 3) for number in range(100)]
    assert keeping_up(steady) == pytest.approx(1.0)
    slow = [record(due_s=number / 10, sent_s=number / 10, done_s=number / 5 + 3) for number in range(100)]
    assert keeping_up(slow) == pytest.approx(0.5)
    late = [record(due_s=number / 10, sent_s=number / 5, done_s=number / 5 + 3) for number in range(100)]
    assert keeping_up(late) == pytest.approx(0.5)


@pytest.mark.parametrize("text", ["adapters", "adapters=", "adapters=1.5", "rate=0", "rate=a", "speed=1"])
def test_a_sweep_in_another_form_is_refused_with_the_form(text: str) -> None:
    with pytest.raises(BadSetting, match=r"adapters=1,8,64"):
        parse_sweep(text)


def test_levels_are_taken_in_order_and_once() -> None:
    assert parse_sweep("rate=4,0.5,4") == Sweep("rate", (0.5, 4.0))
