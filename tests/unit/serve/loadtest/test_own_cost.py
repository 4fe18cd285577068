"""The client knows its limit, and says when a run went beyond it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from serve.loadtest import own_cost as module
from serve.loadtest.own_cost import (
    ClientLimit,
    Level,
    client_bound,
    find_limit,
    own_cost,
    remember_limit,
    remembered_limit,
)
from serve.loadtest.records import Clock, RunRecord, ShareCost
from tests.unit.serve.loadtest.conftest import record


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this machine remembers is none of the tests'."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


LIMIT = ClientLimit(100.0, 0.7, 1, "requests left 30 ms late (p99)")


def run_of(
    busy: float = 0.2,
    lag_s: float | None = 0.001,
    clock: Clock = "kernel",
    delay: float = 0,
    delays: tuple[float, ...] = (),
) -> RunRecord:
    due = None if lag_s is None else 0.0
    records = tuple(record(due_s=due, begun_s=lag_s or 0.0) for _ in range(10))
    return RunRecord(records, (ShareCost(busy * 10, 10.0, delays or (delay,) * 20, clock),), 10)


def reasons(run: RunRecord, limit: ClientLimit | None = LIMIT, capped: bool = False) -> str:
    return "; ".join(client_bound(run, own_cost(run), limit, capped))


def test_a_run_within_the_limit_is_not_marked() -> None:
    assert reasons(run_of()) == ""
    assert reasons(run_of(lag_s=None)) == ""


def test_a_client_busier_than_its_limit_is_marked() -> None:
    assert "used 80% of a core, its limit is 70%" in reasons(run_of(busy=0.8))
    assert "limit is 90%" in reasons(run_of(busy=0.95), limit=None)


def test_a_rate_that_the_client_cannot_keep_is_marked_unless_it_was_held_back() -> None:
    assert "left 500 ms later than they were due" in reasons(run_of(lag_s=0.5))
    assert reasons(run_of(lag_s=0.5), capped=True) == ""


def test_by_its_own_clock_a_client_that_waits_is_marked() -> None:
    assert "what was due in the client waited" in reasons(run_of(clock="client", delay=0.05))
    assert reasons(run_of(clock="client", delay=0.005)) == "", "an idle loop is late by that"
    assert reasons(run_of(clock="kernel", delay=0.05)) == ""


def test_a_client_that_stands_still_is_marked_whatever_clock_it_has() -> None:
    assert "stood still for 6.0 s of 10.0 s" in reasons(run_of(delays=(0.01,) * 500 + (6.0,)))
    assert reasons(run_of(delays=(0.3,) * 20)) == "", "shorter than a request: nothing was missed"


def test_the_cost_is_told_per_request() -> None:
    cost = own_cost(run_of(busy=0.2))
    assert (cost.cpu_ms_per_request, cost.busiest_share) == (pytest.approx(200), pytest.approx(0.2))
    assert cost.lag_p99_ms == pytest.approx(1)
    assert own_cost(run_of(lag_s=None)).lag_p99_ms is None


def test_a_rate_is_too_much_by_what_it_adds_or_by_being_late() -> None:
    level = Level(50, {"TTFT p50": 0.01, "ITL p99": 0.04}, 3.0, 0.3, sent_all=True)
    assert level.broken == ""
    assert "ITL p99 +6.0%" in replace(level, added={"ITL p99": 0.06}).broken
    assert "ITL p50 -9.0%" in replace(level, added={"ITL p50": -0.09}).broken
    assert "late" in replace(level, lag_p99_ms=40.0).broken
    assert "answered" in replace(level, sent_all=False).broken


@pytest.mark.parametrize("capacity", [3.0, 70.0, 400.0])
def test_the_limit_is_found_from_both_sides(monkeypatch: pytest.MonkeyPatch, capacity: float) -> None:
    def tried(url: str, rate: float, processes: int) -> Level:
        return Level(rate, {"ITL p99": 0.01 if rate <= capacity else 0.5}, 1.0, rate / 200, sent_all=True)

    monkeypatch.setattr(module, "try_rate", tried)
    limit = find_limit(1)
    assert limit.rate_per_s <= capacity <= limit.rate_per_s * 1.2
    assert limit.busiest_share == pytest.approx(limit.rate_per_s / 200)
    assert limit.bound_by == "ITL p99 +50.0%"


def test_a_limit_is_remembered_for_as_many_processes() -> None:
    assert remembered_limit(1) is None
    remember_limit(LIMIT)
    remember_limit(replace(LIMIT, processes=2, rate_per_s=180.0))
    assert remembered_limit(1) == LIMIT
    assert remembered_limit(2) == replace(LIMIT, processes=2, rate_per_s=180.0)


def test_a_limit_that_others_on_the_machine_made_is_not_remembered_nor_used() -> None:
    disturbed = ClientLimit(10.0, 0.12, 1, "requests left 221 ms late (p99)")
    remember_limit(disturbed)
    assert remembered_limit(1) is None
    assert reasons(run_of(busy=0.5), limit=disturbed) == ""


def test_a_limit_is_forgotten_after_a_month() -> None:
    remember_limit(LIMIT)
    path = module._cache_file()
    noted = json.loads(path.read_text())
    noted[module._key(1)]["found_at"] -= 40 * 24 * 3600
    path.write_text(json.dumps(noted))
    assert remembered_limit(1) is None


def test_a_damaged_memory_is_no_memory() -> None:
    remember_limit(LIMIT)
    path = module._cache_file()
    for text in ("{", json.dumps({module._key(1): {"rate": 1}}), "[]"):
        path.write_text(text)
        assert remembered_limit(1) is None
    remember_limit(LIMIT)
    assert remembered_limit(1) == LIMIT
