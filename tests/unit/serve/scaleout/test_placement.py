"""Routing: where requests go, and that no version lies on more replicas than it may."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.scaleout.placement import Placement, Rules, Width, choose, order_of, spread

REPLICAS = tuple(f"r{number:02}" for number in range(16))
IDLE = dict.fromkeys(REPLICAS, 0)

loads_of = st.dictionaries(st.sampled_from(REPLICAS), st.integers(0, 50), min_size=1)
versions = st.text("0123456789abcdef", min_size=4, max_size=12)
rules_of = st.builds(
    Rules, most=st.integers(0, 20), slack=st.floats(1.0, 3.0), calm=st.integers(1, 12), cool_s=st.just(60.0)
)


def test_an_idle_fleet_keeps_a_version_in_one_place() -> None:
    placement = Placement(Rules())
    chosen = {placement.route("3f2a", IDLE, now)[0] for now in range(100)}
    assert len(chosen) == 1
    assert placement.widths() == {}


def test_a_full_replica_makes_the_version_grow_and_rest_makes_it_shrink() -> None:
    placement, loads = Placement(Rules(calm=2, cool_s=10.0)), dict(IDLE)
    first, second = order_of("3f2a", tuple(sorted(REPLICAS)))[:2]
    loads[first] = 2
    assert placement.route("3f2a", loads, 0.0) == (second, first)
    assert placement.widths() == {"3f2a": 2}
    assert placement.route("3f2a", IDLE, 5.0)[0] == first
    assert placement.widths() == {"3f2a": 2}, "it shrinks at once, and would grow again with the next wave"
    assert placement.route("3f2a", IDLE, 10.5)[0] == first
    assert placement.widths() == {}


def test_a_version_that_nobody_asks_for_is_forgotten() -> None:
    placement = Placement(Rules(calm=1, cool_s=10.0))
    placement.route("3f2a", IDLE | {order_of("3f2a", REPLICAS)[0]: 9}, 0.0)
    assert placement.widths()
    placement.sweep(5.0)
    assert placement.widths()
    placement.sweep(10.0)
    assert not placement.widths()


def test_beyond_the_most_it_takes_the_least_loaded_of_its_own() -> None:
    placement, loads = Placement(Rules(most=2, calm=1, slack=1.0)), dict(IDLE)
    first, second = order_of("3f2a", tuple(sorted(REPLICAS)))[:2]
    loads |= {first: 9, second: 8}
    for now in range(20):
        assert set(placement.route("3f2a", loads, now)) <= {first, second}
    assert placement.route("3f2a", loads, 21.0)[0] == second


def test_the_base_is_everywhere() -> None:
    placement = Placement(Rules())
    assert {placement.route(None, IDLE, 0.0)[0] for _ in REPLICAS} == set(REPLICAS)
    assert spread({"a": 2, "b": 0, "c": 1}, 5) == ("b", "c", "a")


def test_nothing_is_chosen_of_nothing() -> None:
    assert Placement(Rules()).route("3f2a", {}, 0.0) == ()
    assert Placement(Rules()).route(None, {}, 0.0) == ()


def test_versions_spread_over_the_replicas() -> None:
    names = [f"{number:012x}" for number in range(4000)]
    counts = Counter(order_of(name, REPLICAS)[0] for name in names)
    assert max(counts.values()) < 1.3 * 4000 / len(REPLICAS)


def test_a_replica_that_goes_moves_only_what_it_had() -> None:
    names, gone = [f"{number:012x}" for number in range(500)], REPLICAS[3]
    left = tuple(replica for replica in REPLICAS if replica != gone)
    for name in names:
        before = [replica for replica in order_of(name, REPLICAS) if replica != gone]
        assert list(order_of(name, left)) == before


@given(version=versions, loads=loads_of, count=st.integers(1, 20), rules=rules_of, now=st.floats(0, 1e6))
def test_a_choice_is_within_its_bounds(
    version: str, loads: dict[str, int], count: int, rules: Rules, now: float
) -> None:
    choice = choose(version, loads, Width(count, now), now, rules)
    assert 1 <= choice.width.count <= rules.most_of(len(loads)) <= len(loads)
    assert len(choice.ranked) == len(set(choice.ranked)) == choice.width.count
    assert set(choice.ranked) == set(order_of(version, tuple(sorted(loads)))[: choice.width.count])
    assert choice.width.count <= min(count, rules.most_of(len(loads))) + 1, "it grows by one at a time"
    assert choice == choose(version, dict(reversed(loads.items())), Width(count, now), now, rules)


@given(version=versions, loads=loads_of, rules=rules_of)
def test_none_that_is_full_is_chosen_while_another_of_its_own_is_not(
    version: str, loads: dict[str, int], rules: Rules
) -> None:
    bound = max(rules.calm, rules.slack * (sum(loads.values()) + 1) / len(loads))
    choice = choose(version, loads, Width(len(loads), 0.0), 0.0, rules)
    if any(loads[replica] < bound for replica in choice.ranked):
        assert loads[choice.ranked[0]] < bound
    else:
        assert loads[choice.ranked[0]] == min(loads[replica] for replica in choice.ranked)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1 << 30), share=st.sampled_from([0.05, 0.3, 0.6]))
def test_a_hot_version_grows_to_what_it_needs_and_no_replica_gets_hot(seed: int, share: float) -> None:
    """480 requests are always under way on 16 replicas; one version has `share` of them."""
    chance, placement = random.Random(seed), Placement(Rules(most=16, calm=4))
    running: list[str] = []
    loads: Counter[str] = Counter(dict.fromkeys(REPLICAS, 0))
    for step in range(4000):
        version = "hot" if chance.random() < share else f"cold{chance.randrange(2000)}"
        replica = placement.route(version, loads, step * 0.01)[0]
        bound = max(4, 1.25 * (sum(loads.values()) + 1) / 16)
        own = order_of(version, tuple(sorted(REPLICAS)))[: placement.widths().get(version, 1)]
        assert loads[replica] < bound or all(loads[other] >= bound for other in own)
        running.append(replica)
        loads[replica] += 1
        if len(running) > 480:
            loads[running.pop(chance.randrange(480))] -= 1
    # Over the bound goes only what finds all its replicas full (above), growing by one a request. How
    # far that adds up is no promise: at most 39 in 400 runs with other seeds, 40 in one of hypothesis.
    assert max(loads.values()) <= 1.25 * 480 / 16 + 4
    needed = share * 16
    assert placement.widths().get("hot", 1) <= max(8, 3 * needed)


@pytest.mark.parametrize(("replicas", "most", "expected"), [(1, 0, 1), (2, 0, 2), (64, 0, 32), (4, 9, 4)])
def test_the_most_follows_the_fleet(replicas: int, most: int, expected: int) -> None:
    assert Rules(most=most).most_of(replicas) == expected
