"""What a victim felt follows from its chunks and the windows alone."""

from __future__ import annotations

import pytest

from serve.loadtest.victim import Window, report_of
from tests.unit.serve.loadtest.conftest import record


def test_a_victim_that_is_slowed_by_others_shows_it_with_an_interval() -> None:
    windows, chunks = [], [0.0]
    for number in range(12):
        disturbed = bool(number % 2)
        start = chunks[-1]
        while chunks[-1] < start + 5:
            chunks.append(chunks[-1] + (0.030 if disturbed else 0.020))
        windows.append(Window(disturbed, start + 1e-9, chunks[-1] - 1e-9, (0.1, 0.1)))
    report = report_of("marina", [record("marina", chunks_s=tuple(chunks))], windows, "others")
    assert report.p50 and report.p50.is_clear and report.p50.value == pytest.approx(1.5)
    assert (report.quiet_p99_ms, report.disturbed_p99_ms) == (pytest.approx(20), pytest.approx(30))
    assert len(report.window_p99_ms) == 12
