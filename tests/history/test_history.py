"""No request ever gets what it should not, whatever operators do, and no change is lost."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from tests.history.checker import check
from tests.history.driver import Driver, Plan
from tests.history.recorder import read_events
from tests.history.report import table

pytest.importorskip("vllm", reason="vLLM is not installed: real-engine tests need Linux and an extra")

REQUESTS = int(os.environ.get("HISTORY_REQUESTS", "300"))
SEED = int(os.environ.get("HISTORY_SEED", "0"))
PLAN = (
    Plan(REQUESTS, adapters=50, kills=3, seed=SEED)
    if REQUESTS >= 1000
    else Plan(REQUESTS, adapters=12, clients=8, pause_s=0.5, seed=SEED)
)


def test_the_history_of_a_server_under_changes_and_a_kill(tmp_path: Path) -> None:
    driver = Driver(PLAN, tmp_path)
    asyncio.run(driver.run())
    events = list(read_events(driver.history))
    print(table(events))
    violations = check(events)
    assert not violations, f"{driver.history}:\n" + "\n".join(
        f"{violation.rule}: {violation.text}" for violation in violations[:50]
    )
