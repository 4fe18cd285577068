"""The point of saturation is found, whatever levels were stated."""

from __future__ import annotations

import random

import pytest

from serve.loadtest.arrivals import arrival_times, constant_rate
from serve.loadtest.sweep import (
    KEEPS_UP,
    Point,
    Sweep,
    keeping_up,
    parse_sweep,
    run_sweep,
    saturation_of,
)
from tests.unit.serve.loadtest.conftest import record
from vllm_lora_ext.errors import BadSetting

CAPACITY = 10.0  # requests/s that the simulated server answers
SLOTS = 24  # adapters after which it slows down


def at_rate(rate: float) -> Point:
    return Point(rate, min(rate, CAPACITY) * 32, kept_up=min(1.0, CAPACITY / rate))


def with_adapters(count: float) -> Point:
    return Point(count, 1000.0 if count <= SLOTS else 600.0)


def in_flight(count: float) -> Point:
    return Point(count, 100 * count / (1 + count / 16))


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
    points = [Point(1, 32), Point(2, 64, errors=3)]
    assert saturation_of("rate", points).breaks == 2


def test_a_run_that_was_cut_off_ends_the_sweep_with_what_there_is() -> None:
    answers = iter([at_rate(1), None])
    found = run_sweep(Sweep("rate", (1, 2, 4)), lambda level: next(answers))
    assert (found.holds, found.breaks, found.unknown_from) == (1, None, 2)
    assert "nothing is known at 2: it ended there" in str(found)


def test_what_the_client_could_not_send_is_not_held_against_the_server() -> None:
    points = [Point(10, 320), Point(20, 330, kept_up=0.5, client_bound=True), Point(40, 330, kept_up=0.3)]
    found = saturation_of("rate", points)
    assert (found.holds, found.breaks, found.unknown_from) == (10, None, 20)
    assert "the client was the limit" in str(found)


def test_a_level_that_dips_while_higher_ones_are_held_is_noise() -> None:
    points = [Point(1, 1131), Point(2, 815), Point(4, 899), Point(8, 996), Point(16, 400), Point(32, 390)]
    found = saturation_of("adapters", points)
    assert (found.holds, found.breaks) == (8, 16)
    assert saturation_of("adapters", points[:4]).breaks is None


def test_small_steps_of_concurrency_need_small_gains() -> None:
    linear = [Point(count, 10.0 * count) for count in (32, 33, 34)]
    assert saturation_of("concurrency", linear).breaks is None


def test_failed_requests_are_never_held() -> None:
    for what in ("adapters", "concurrency"):
        assert saturation_of(what, [Point(1, 100), Point(2, 300, errors=1)]).breaks == 2


def test_keeping_up_compares_when_answers_came_with_when_requests_were_due() -> None:
    steady = [record(due_s=number / 10, sent_s=number / 10, done_s=number / 10 + 3) for number in range(100)]
    assert keeping_up(steady) == pytest.approx(1.0)
    slow = [record(due_s=number / 10, sent_s=number / 10, done_s=number / 5 + 3) for number in range(100)]
    assert keeping_up(slow) == pytest.approx(0.5)
    late = [record(due_s=number / 10, sent_s=number / 5, done_s=number / 5 + 3) for number in range(100)]
    assert keeping_up(late) == pytest.approx(0.5)


def test_answers_of_different_lengths_are_no_growing_queue() -> None:
    """An infinitely fast server whose answers take 0.5 to 5 s, 10 s of Poisson arrivals."""
    refused = 0
    for seed in range(200):
        chance = random.Random(seed)
        due = arrival_times(constant_rate(4), 40, 1.0, seed)
        answers = [record(due_s=at, sent_s=at, done_s=at + chance.uniform(0.5, 5)) for at in due]
        refused += keeping_up(answers) < KEEPS_UP
    assert refused <= 10


def test_a_queue_that_grows_is_seen_among_answers_of_different_lengths() -> None:
    seen = 0
    for seed in range(100):
        chance = random.Random(seed)
        due = arrival_times(constant_rate(8), 80, 1.0, seed)
        done = [number / 4 + chance.uniform(0.5, 3) for number in range(80)]
        answers = [record(due_s=at, sent_s=at, done_s=end) for at, end in zip(due, done, strict=True)]
        seen += keeping_up(answers) < KEEPS_UP
    assert seen >= 95


@pytest.mark.parametrize(
    "text", ["adapters", "adapters=", "adapters=1.5", "rate=0", "rate=a", "rate=nan", "rate=inf", "speed=1"]
)
def test_a_sweep_in_another_form_is_refused_with_the_form(text: str) -> None:
    with pytest.raises(BadSetting, match=r"adapters=1,8,64"):
        parse_sweep(text)


def test_levels_are_taken_in_order_and_once() -> None:
    assert parse_sweep("rate=4,0.5,4") == Sweep("rate", (0.5, 4.0))
