"""What a person reads on the terminal: tables, and plain words for what went wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich.table import Table

from serve.loadtest.check import CheckReport, Verdict
from serve.loadtest.results import LoadTestResult, RunResult
from serve.loadtest.stats import Percentiles, Summary
from serve.loadtest.victim import VictimReport
from vllm_lora_ext.spec import printable

MOST_ROWS = 24
EXAMPLES = 3
_RATES = slice(12, None)  # the columns of a row that are per second
_NEAR_TIE = 1.0  # nats; rounding in bfloat16 moves a log-probability by tenths


def run_table(run: RunResult, title: str, most_rows: int = MOST_ROWS) -> Table:
    """One row per model, at most so many, then the groups, the whole run last. Times in milliseconds."""
    with_goodput = run.figures.whole.goodput_per_s is not None
    table = Table(
        "model", "done", "errors", "TTFT p50", "p90", "p99", "ITL p50", "p99", "TPOT p50", "p99",
        "E2EL p50", "p99", "tok/s", "req/s", *(["good/s"] if with_goodput else []), title=title,
    )  # fmt: skip
    figures = run.figures
    models = sorted(figures.models, key=lambda item: -item.requests)
    shown = models[:most_rows]
    for item in shown:
        table.add_row(*_cells(item, with_goodput))
    if len(shown) < len(models):
        table.add_row(f"... {len(models) - len(shown)} more (all in --output or --json)")
    table.add_section()
    groups = [figures.base if figures.adapters else None, figures.adapters if figures.base else None]
    for group in (*groups, figures.cold, figures.warm if figures.cold else None, figures.whole):
        if group is not None:
            cells = _cells(group, with_goodput)
            if group is figures.cold:  # the warm-up's among them were not in the run
                cells[_RATES] = ["-"] * len(cells[_RATES])
            table.add_row(*cells)
    return table


def run_lines(run: RunResult, max_gap: float | None = None, examples: int = EXAMPLES) -> Iterator[str]:
    """What the table does not say, most important last. `max_gap` is --check-max-gap."""
    figures = run.figures
    if figures.cold is not None:
        yield (
            "cold: the adapter had to be fetched, as far as a client can tell; "
            f"{figures.cold_in_load} of these requests in the run, the others in the warm-up"
        )
    if (fair := figures.fairness) is not None:
        yield (
            f"fairness over {fair.adapters} adapters: Jain index {fair.jain_index:.3f} of the speed that "
            f"requests get; median TTFT of the worst ({fair.worst}) {fair.worst_ttft_ms:.1f} ms, "
            f"{fair.worst_to_median:.2f} times the median adapter's"
        )
        if fair.unanswered:
            yield f"UNANSWERED: {', '.join(fair.unanswered)}"
    if (share := figures.base_share) is not None and figures.adapters is not None:
        yield (
            f"base model against adapters: {share.requests_percent:.1f} % against "
            f"{100 - share.requests_percent:.1f} % of the requests, {share.output_tokens_percent:.1f} % "
            f"against {100 - share.output_tokens_percent:.1f} % of the output tokens"
        )
    cost = run.cost
    lag = "" if cost.lag_p99_ms is None else f", requests left {cost.lag_p99_ms:.1f} ms late (p99)"
    clock = "the kernel's clock" if cost.clock == "kernel" else "the client's own clock"
    yield (
        f"this client: {cost.cpu_ms_per_request:.1f} ms of CPU per request, busiest process "
        f"{cost.busiest_share:.0%} of a core{lag}; times by {clock}"
    )
    for record_kind, detail in _first_details(run):
        yield f"{record_kind}: {detail}"
    if run.check is not None:
        yield from check_lines(run.check, max_gap, examples)
    for count in run.counters:
        word = "agree" if count.agrees else "DIFFER"
        yield f"counters {word}: {count.what}: server {count.server}, client {count.client}"
    for reason in run.client_bound:
        fix = "these are the client's figures, not the server's. Try --client-processes."
        yield f"CLIENT-BOUND: {reason}; {fix}"
    if run.ended_early:
        planned = "" if run.run.planned is None else f" of {run.run.planned} planned"
        yield f"ENDED EARLY ({run.ended_early}): {figures.whole.requests}{planned} requests were measured"


def is_loud(line: str) -> bool:
    """Whether a line must not be missed: those begin with, or hold, a word in capitals."""
    return line.split(":")[0].split("(")[0].strip().isupper() or " DIFFER" in line


def check_lines(check: CheckReport, max_gap: float | None, examples: int) -> Iterator[str]:
    """What the check found, with both texts of each wrong answer that is shown."""
    known = [verdict.gap for verdict in check.changed if verdict.gap is not None]
    gaps = f", largest gap {max(known):.2f} nats" if known else ""
    yield (
        f"check: {check.compared} answers compared, {check.same} same, {len(check.changed)} changed{gaps}, "
        f"{len(check.wrong)} of a wrong identity"
    )
    for one, other in check.undistinguished[:examples]:
        yield f"check: {one} and {other} answer every question alike: nobody can tell them apart"
    for verdict in sorted(check.changed, key=lambda verdict: -(verdict.gap or 0.0))[:examples]:
        yield f"changed: {_difference(verdict)}"
    limit = _NEAR_TIE if max_gap is None else max_gap
    if beyond := len(check.beyond(limit)):
        word = "changed" if max_gap is None else "CHANGED"
        yield f"{word}: {beyond} of them by more than {limit:g} nats, which is no near tie: ask why"
    for verdict in check.wrong[:examples]:
        yield (
            f"WRONG IDENTITY: request {verdict.index} to {verdict.model} was answered as {verdict.other}: "
            f"{verdict.answer!r}; alone it answers {verdict.alone!r}"
        )
    if len(check.wrong) > examples:
        yield f"WRONG IDENTITY: {len(check.wrong) - examples} more (all in --output or --json)"


def sweep_table(result: LoadTestResult) -> Table:
    """One row per level, side by side."""
    what = result.sweep or "run"
    table = Table(
        what, "done", "errors", "TTFT p50", "p99", "ITL p50", "p99", "TPOT p50", "E2EL p50", "p99",
        "tok/s", "req/s", "Jain", "changed", "wrong", "", title=f"sweep over {what}",
    )  # fmt: skip
    for run in sorted(result.runs, key=lambda run: run.level or 0.0):
        item = run.figures.whole
        fair = run.figures.fairness
        table.add_row(
            f"{run.level:g}",
            str(item.completed),
            _errors(item),
            *_pair(item.ttft),
            *_pair(item.itl),
            _pair(item.tpot)[0],
            *_pair(item.e2el),
            f"{item.output_tokens_per_s:.1f}",
            f"{item.requests_per_s:.2f}",
            f"{fair.jain_index:.3f}" if fair else "-",
            str(len(run.check.changed)) if run.check else "-",
            str(len(run.check.wrong)) if run.check else "-",
            "!" if run.client_bound or run.ended_early else "",
        )
    return table


def victim_table(report: VictimReport) -> Table:
    """The victim's time between tokens, quiet and disturbed."""
    table = Table(
        "between tokens", "quiet", "disturbed", "change, 95 % interval", title=f"victim: {report.victim}"
    )
    rows = (
        ("p50 ms", report.quiet_p50_ms, report.disturbed_p50_ms, report.p50),
        ("p99 ms", report.quiet_p99_ms, report.disturbed_p99_ms, report.p99),
    )
    for name, quiet, disturbed, ratio in rows:
        table.add_row(name, _number(quiet), _number(disturbed), str(ratio) if ratio else "-")
    return table


def victim_lines(report: VictimReport) -> Iterator[str]:
    """How it was disturbed, and what went wrong."""
    took = [seconds for window in report.windows if window.disturbed for seconds in window.disturbances_s]
    mean = f", {1e3 * sum(took) / len(took):.0f} ms each" if took else ""
    yield f"{report.how}: {len(took)} disturbances{mean}, {report.intervals} intervals between tokens"
    if report.errors:
        yield f"the victim's streams: {report.errors} requests failed"
    for failure in report.failures:
        yield f"ENDED EARLY: {failure}"


def bench_command(settings_url: str, base: str, adapters: Sequence[str], run: RunResult) -> str:
    """A `vllm bench serve` call that asks nearly the same, to compare figures with."""
    parts = ["vllm bench serve", f"--base-url {settings_url}", f"--model {base}", "--backend openai-chat"]
    parts += ["--endpoint /v1/chat/completions", f"--num-prompts {run.run.planned or len(run.run.records)}"]
    if run.offered_per_s is not None:
        parts.append(f"--request-rate {run.offered_per_s:g}")
    if adapters:
        parts.append(f"--lora-modules {' '.join(adapters)}")
    return " ".join(parts)


def _cells(item: Summary, with_goodput: bool) -> list[str]:
    cells = [printable(item.name), str(item.completed), _errors(item)]
    ttft = item.ttft
    cells += [_number(ttft.p50_ms), _number(ttft.p90_ms), _number(ttft.p99_ms)] if ttft else ["-"] * 3
    for value in (item.itl, item.tpot, item.e2el):
        cells += _pair(value)
    cells += [f"{item.output_tokens_per_s:.1f}", f"{item.requests_per_s:.2f}"]
    return [*cells, f"{item.goodput_per_s:.2f}"] if with_goodput else cells


def _pair(value: Percentiles | None) -> tuple[str, str]:
    return (_number(value.p50_ms), _number(value.p99_ms)) if value else ("-", "-")


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"


def _errors(item: Summary) -> str:
    return ", ".join(f"{count} x {kind}" for kind, count in item.errors.items()) or "0"


def _first_details(run: RunResult) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for record in run.run.records:
        if record.error and record.detail and record.error not in seen:
            seen.add(record.error)
            yield record.error, printable(record.detail)


def _difference(verdict: Verdict) -> str:
    where = "" if verdict.position is None else f" at token {verdict.position}"
    least = "at least " if verdict.gap_is_least else ""
    gap = "gap not known" if verdict.gap is None else f"gap {least}{verdict.gap:.3f} nats"
    return (
        f"{verdict.model}, request {verdict.index}{where}: {verdict.token!r} for {verdict.expected!r}, {gap}"
    )
