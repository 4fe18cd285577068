"""Rows are split, weighed and given a system message: seeded, and nothing lost."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from train.rows import Message, Row, split_rows, weigh_rows, with_system

ROWS = [replace(Row.of(f"{source} {i}", "", "x", ""), source=source) for source in (0, 1) for i in range(10)]


def test_the_same_seed_holds_out_the_same_rows() -> None:
    rows = [Row.of(str(i), "", "x", f"row {i}") for i in range(50)]
    training, held = split_rows(rows, 0.1, seed=1)
    assert (len(training), len(held)) == (45, 5)
    assert sorted([*training, *held], key=rows.index) == rows
    assert split_rows(rows, 0.1, seed=1) == (training, held)
    assert split_rows(rows, 0.1, seed=2)[1] != held


def test_a_single_row_is_trained_on() -> None:
    row = Row.of("a", "", "b", "row 1")
    assert split_rows([row], 0.9, seed=0) == ([row], [])


def test_no_weights_change_nothing() -> None:
    assert weigh_rows(ROWS, (), seed=1) == ROWS == weigh_rows(ROWS, (1.0, 1.0), seed=1)


def test_a_weight_of_a_half_is_a_seeded_half() -> None:
    weighed = weigh_rows(ROWS, (2.0, 0.5), seed=1)
    counts = Counter(weighed)
    assert [counts[row] for row in ROWS[:10]] == [2] * 10
    assert sorted(counts[row] for row in ROWS[10:]) == [0] * 5 + [1] * 5
    assert weigh_rows(ROWS, (2.0, 0.5), seed=1) == weighed != weigh_rows(ROWS, (2.0, 0.5), seed=2)


@given(weights=st.tuples(*[st.floats(0.001, 20)] * 2), seed=st.integers(0, 99))
def test_each_file_is_seen_as_often_as_its_weight(weights: tuple[float, float], seed: int) -> None:
    weighed = weigh_rows(ROWS, weights, seed)
    for source, weight in enumerate(weights):
        counts = Counter(row for row in weighed if row.source == source)
        assert sum(counts.values()) == max(1, round(10 * weight))
        assert max(counts.values()) - min(counts[row] for row in ROWS if row.source == source) <= 1


def test_a_system_message_stands_in_front_of_rows_that_have_none() -> None:
    own = replace(ROWS[0], messages=(Message("system", "Be rude."), *ROWS[0].messages))
    first, second = with_system([ROWS[0], own], "Be kind.")
    assert first.messages == (Message("system", "Be kind."), *ROWS[0].messages)
    assert second == own
    assert with_system([own], None) == [own]
