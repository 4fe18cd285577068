"""Two results side by side: the ratio of each figure, with the interval that repeated runs would lie in."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from serve.loadtest.intervals import Ratio, percentile_ratio, rate_ratio
from serve.loadtest.results import SavedResult, SavedRun
from vllm_lora_ext.errors import BadData

_STRETCHES = 20  # equal parts of a run whose tokens are counted
_PERCENTILES = (("p50", 0.5), ("p99", 0.99))


@dataclass(frozen=True)
class ComparedFigure:
    """`first` and `second` in the figure's unit; `ratio` is second over first."""

    run: str
    figure: str
    first: float
    second: float
    ratio: Ratio | None


def compare_results(first: SavedResult, second: SavedResult) -> list[ComparedFigure]:
    """Every figure of every run that both have, by label.

    Raises:
        BadData: they have no run in common.
    """
    others = {run.label: run for run in second.runs}
    pairs = [(run, others[run.label]) for run in first.runs if run.label in others]
    if not pairs:
        labels = [", ".join(run.label for run in result.runs) or "none" for result in (first, second)]
        rule = f"has no run in common with {second.name} ({labels[0]} against {labels[1]})"
        raise BadData(first.name, rule)
    return [figure for one, other in pairs for figure in _compare_runs(one, other)]


def differing_settings(first: SavedResult, second: SavedResult) -> list[str]:
    """Settings that were not the same, other than where the server is and where results go."""
    ignored = {"url", "output", "overwrite", "json", "calibrate"}
    names = sorted((set(first.settings) | set(second.settings)) - ignored)
    return [
        f"{name}: {first.settings.get(name)} against {second.settings.get(name)}"
        for name in names
        if first.settings.get(name) != second.settings.get(name)
    ]


def comparison_table(first: SavedResult, second: SavedResult, figures: Sequence[ComparedFigure]) -> Table:
    """A row for each figure; a ratio whose interval holds 1 is no difference that could be shown."""
    name, other = (first.name, second.name) if first.name != second.name else ("A", "B")
    table = Table("run", "figure", name, other, "ratio, 95 % interval", "", title=f"{other} against {name}")
    previous = None
    for item in figures:
        if previous not in (None, item.run):
            table.add_section()
        clear = "" if item.ratio is None else ("clear" if item.ratio.is_clear else "not shown")
        numbers = f"{item.first:.2f}", f"{item.second:.2f}"
        table.add_row(item.run, item.figure, *numbers, str(item.ratio) if item.ratio else "-", clear)
        previous = item.run
    return table


def marks(result: SavedResult) -> list[str]:
    """What makes its figures less than they seem."""
    bound = [f"CLIENT-BOUND: {result.name}, {run.label}" for run in result.runs if run.client_bound]
    early = [
        f"ENDED EARLY ({run.ended_early}): {result.name}, {run.label}"
        for run in result.runs
        if run.ended_early
    ]
    return [*bound, *early]


def comparison_json(figures: Sequence[ComparedFigure]) -> list[dict[str, Any]]:
    """The same as plain data."""
    return [dataclasses.asdict(figure) for figure in figures]


def _compare_runs(one: SavedRun, other: SavedRun) -> list[ComparedFigure]:
    figures = []
    for metric in ("ttft", "itl", "tpot", "e2el"):
        for name, share in _PERCENTILES:
            values = _percentile_of(one, metric, name), _percentile_of(other, metric, name)
            if any(map(math.isnan, values)):
                continue
            ratio = percentile_ratio(one.values[f"{metric}_ms"], other.values[f"{metric}_ms"], share)
            figures.append(ComparedFigure(one.label, f"{metric.upper()} {name} ms", *values, ratio))
    rates = [_tokens_per_stretch(run) for run in (one, other)]
    means = one.figures["whole"]["output_tokens_per_s"], other.figures["whole"]["output_tokens_per_s"]
    figures.append(ComparedFigure(one.label, "output tokens/s", *means, rate_ratio(*rates)))
    for kind in ("changed", "wrong"):
        if one.check is not None and other.check is not None:
            counts = float(len(one.check[kind])), float(len(other.check[kind]))
            figures.append(ComparedFigure(one.label, f"{kind} answers", *counts, None))
    return figures


def _percentile_of(run: SavedRun, metric: str, name: str) -> float:
    found: float | None = (run.figures["whole"].get(metric) or {}).get(f"{name}_ms")
    return math.nan if found is None else found


def _tokens_per_stretch(run: SavedRun) -> list[float]:
    """Tokens per second of answers that ended in each of equal stretches of the run."""
    if not run.done_s:
        return []
    start = min(done - e2el[0] / 1e3 for done, e2el in zip(run.done_s, run.values["e2el_ms"], strict=False))
    length = max(1e-9, (max(run.done_s) - start) / _STRETCHES)
    counts = [0.0] * _STRETCHES
    for done, tokens in zip(run.done_s, run.tokens, strict=True):
        counts[min(_STRETCHES - 1, int((done - start) / length))] += tokens / length
    return counts
