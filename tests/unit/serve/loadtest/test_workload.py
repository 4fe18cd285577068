"""The same seed asks the same of the same, whoever makes which part of the schedule."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from serve.loadtest.arrivals import arrival_times, constant_rate
from serve.loadtest.popularity import make_popularity
from serve.loadtest.workload import Length, Prompt, TokenScale, Workload

MODELS = make_popularity(["a", "b", "c"], "base", "skewed")
WORKLOAD = Workload(MODELS, Length(4, 12), Length(8, 32), seed=5)


def test_the_same_seed_gives_the_same_schedule() -> None:
    first = [WORKLOAD.request(index) for index in range(200)]
    assert first == [replace(WORKLOAD).request(index) for index in range(200)]
    assert first != [replace(WORKLOAD, seed=6).request(index) for index in range(200)]


def test_parts_of_a_schedule_make_the_whole() -> None:
    whole = [WORKLOAD.request(index) for index in range(10)]
    parts = {index: WORKLOAD.request(index) for share in range(3) for index in range(share, 10, 3)}
    assert [parts[index] for index in range(10)] == whole


def test_lengths_are_drawn_evenly_from_their_ranges() -> None:
    requests = [WORKLOAD.request(index) for index in range(5000)]
    words = Counter(len(request.messages[-1]["content"].split()) for request in requests)
    outputs = Counter(request.max_tokens for request in requests)
    assert set(words) == set(range(4, 13)) and set(outputs) == set(range(8, 33))
    for counts in (words, outputs):
        expected = 5000 / len(counts)
        assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())


def test_no_prompt_repeats_unless_they_come_from_a_pool() -> None:
    assert len({WORKLOAD.request(index).messages[-1]["content"] for index in range(100)}) > 95
    pooled = replace(WORKLOAD, pool=3)
    asked = {pooled.request(index).prompt_number: pooled.request(index).messages for index in range(100)}
    assert len(asked) == 3
    assert all(pooled.ask(number, "a").messages == messages for number, messages in asked.items())


def test_another_series_asks_the_same_models_with_other_words() -> None:
    one, other = WORKLOAD.request(3), replace(WORKLOAD, series="rate=2").request(3)
    assert one.model == other.model and one.messages != other.messages


def test_prompts_of_a_file_come_in_turn_and_keep_what_they_state() -> None:
    prompts = [
        Prompt(({"role": "user", "content": "one"},), output_tokens=7, model="b"),
        Prompt(({"role": "user", "content": "two"},)),
    ]
    workload = replace(WORKLOAD, prompts=prompts)
    asked = [workload.request(index) for index in range(4)]
    assert [request.messages[0]["content"] for request in asked] == ["one", "two"] * 2
    assert (asked[0].model, asked[0].max_tokens, asked[2].prompt_number) == ("b", 7, 0)


def test_arrivals_are_those_of_the_schedule() -> None:
    times = arrival_times(constant_rate(5), 10, 1.0, 0)
    workload = replace(WORKLOAD, arrivals=times)
    assert [workload.request(index).due_s for index in range(10)] == times
    assert WORKLOAD.request(0).due_s is None


@pytest.mark.parametrize(("tokens", "words"), [(100, 40), (20, 1), (1, 1)])
def test_a_prompt_of_so_many_tokens_has_the_words_for_it(tokens: int, words: int) -> None:
    assert TokenScale(overhead=20, per_word=2).words_for(tokens) == words
