"""What a victim feels is measured against quiet windows of the same run."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serve.loadtest.known_server import KnownAnswer
from serve.loadtest.popularity import make_popularity
from serve.loadtest.victim import AskOthers, LoadOthers, VictimPlan, run_victim
from serve.loadtest.workload import Workload
from tests.loadtest.conftest import Serve

WORKLOAD = Workload(make_popularity(["marina"], None, "uniform"))


def plan(url: str, rounds: int = 2) -> VictimPlan:
    return VictimPlan(
        url, "marina", lambda index: WORKLOAD.ask(index, "marina", index), {}, 3, rounds, 0.5, timeout_s=10.0
    )


def test_the_others_are_asked_in_turn_only_while_they_disturb(serve: Serve) -> None:
    asked: list[tuple[str, int]] = []

    def answer(body: Mapping[str, Any]) -> KnownAnswer:
        asked.append((body["model"], body["max_tokens"]))
        return KnownAnswer(("word ",) * body["max_tokens"], 0.01, 0.01)

    report = run_victim(plan(serve(answer).url), AskOthers(["xiaoli", "otto"]))
    others = [model for model, _ in asked if model != "marina"]
    assert set(others) == {"xiaoli", "otto"}
    assert all(one != other for one, other in itertools.pairwise(others))
    assert [window.disturbed for window in report.windows] == [False, True] * 2
    assert len(others) == sum(len(window.disturbances_s) for window in report.windows if window.disturbed)
    assert any(model == "marina" and tokens == 1 for model, tokens in asked), "the quiet windows ask as well"
    assert report.intervals > 100 and report.errors == 0 and report.p50 and not report.failures


def test_a_server_that_cannot_load_ends_it_with_the_reason(serve: Serve, tmp_path: Path) -> None:
    server = serve()
    report = run_victim(plan(server.url, rounds=5), LoadOthers(server.url, [tmp_path]))
    assert len(report.windows) == 2
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in report.failures[0]
