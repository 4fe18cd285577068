"""Figures from timestamps. Pure. Definitions as in vLLM's own benchmark:

TTFT: sent -> first chunk. TPOT: (last chunk - first chunk) / (output tokens - 1),
undefined for one token. E2EL: sent -> done.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from serve.loadtest.client import RequestRecord


@dataclass(frozen=True)
class Percentiles:
    """Milliseconds."""

    p50_ms: float
    p99_ms: float


@dataclass(frozen=True)
class Summary:
    """One row of the report: a model, or the whole run. None where nothing could be measured."""

    name: str
    completed: int
    errors: dict[str, int]
    ttft: Percentiles | None
    tpot: Percentiles | None
    e2el: Percentiles | None
    output_tokens_per_s: float
    requests_per_s: float


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest-rank percentile; `share` between 0 and 1."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def summarise(name: str, records: Sequence[RequestRecord], wall_s: float) -> Summary:
    """Figures of some records over the wall clock of the whole run."""
    good = [record for record in records if record.error is None]
    return Summary(
        name=name,
        completed=len(good),
        errors=dict(Counter(record.error for record in records if record.error)),
        ttft=_percentiles([r.chunks_s[0] - r.sent_s for r in good if r.chunks_s]),
        tpot=_percentiles(
            [
                (r.chunks_s[-1] - r.chunks_s[0]) / (r.output_tokens - 1)
                for r in good
                if r.output_tokens > 1 and r.chunks_s
            ]
        ),
        e2el=_percentiles([r.done_s - r.sent_s for r in good]),
        output_tokens_per_s=sum(r.output_tokens for r in good) / wall_s,
        requests_per_s=len(good) / wall_s,
    )


def summarise_run(records: Sequence[RequestRecord]) -> list[Summary]:
    """A summary per model, by name, then one of everything."""
    if not records:
        return []
    wall = max(r.done_s for r in records) - min(r.sent_s for r in records)
    names = sorted({record.model for record in records})
    rows = [summarise(name, [r for r in records if r.model == name], wall) for name in names]
    return [*rows, summarise("all", records, wall)]


def _percentiles(seconds: Sequence[float]) -> Percentiles | None:
    if not seconds:
        return None
    return Percentiles(statistics.median(seconds) * 1e3, percentile(seconds, 0.99) * 1e3)
