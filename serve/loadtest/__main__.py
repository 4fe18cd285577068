"""`vllm-lora loadtest`, or `python -m serve.loadtest`: what a server does with many adapters under load."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence

from rich.table import Table

from serve.loadtest import compare, results
from serve.loadtest.config import Comparison, LoadTestConfig, read_config
from serve.loadtest.loadtest import LoadTest, calibrate
from serve.loadtest.page import make_page
from serve.loadtest.pictures import comparison_picture, pictures_of
from serve.loadtest.records import INTERRUPTED
from serve.loadtest.report import (
    EXAMPLES,
    MOST_ROWS,
    bench_command,
    is_loud,
    run_lines,
    run_table,
    sweep_table,
    victim_lines,
    victim_table,
)
from serve.loadtest.results import LoadTestResult, RunResult
from serve.screen import screen
from vllm_lora_ext import exit_codes

Section = tuple[str, Table | None, Sequence[str]]


def main(argv: Sequence[str]) -> int:
    """Measure and report; 1 when a request failed, an answer was wrong, or figures cannot be trusted."""
    config = read_config(argv)
    if config.output is not None:
        results.require_place(config.output, config.overwrite, isinstance(config, Comparison))
    if isinstance(config, Comparison):
        return _compare(config)
    if config.calibrate:
        return _calibrate(config)
    test = LoadTest(config)
    if config.dry_run:
        return _show_schedule(test)
    result = test.run()
    try:
        if config.output is not None:
            with _undisturbed():
                _write(result, test, config)
    finally:  # what was measured is told, whatever became of the folder
        sections = list(_sections(result, test))
        _print(_short(sections) if len(result.runs) > 1 else sections, as_text=not config.json)
        if config.json:
            print(results.json_bytes(results.as_json(result, with_requests=False)).decode(), end="")
    return _exit_code(result, config)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl+C in the second that writing takes would lose what took minutes."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _write(result: LoadTestResult, test: LoadTest, config: LoadTestConfig) -> None:
    """All files; figures without pictures are worth more than pictures without figures."""
    assert config.output is not None
    files = {
        results.RESULTS_FILE: results.json_bytes(results.as_json(result)),
        results.REQUESTS_FILE: results.requests_csv(result),
    }
    settings = {"machine": result.machine, "server": result.server, **result.settings}
    try:
        pictures = pictures_of(result)
        sections = list(_sections(result, test, whole=True))
        page = make_page(f"Load test of {result.settings['url']}", sections, pictures, settings)
        files |= {**pictures, results.PAGE_FILE: page}
    except Exception as error:  # a name that no library draws, say: nothing that was measured is lost for it
        print(f"no pictures: {type(error).__name__}: {error}. Please report it.", file=sys.stderr)
    results.write_folder(config.output, files, config.overwrite)
    shown = results.PAGE_FILE if results.PAGE_FILE in files else results.RESULTS_FILE
    print(f"written: {config.output}/{shown}", file=sys.stderr)


def _sections(result: LoadTestResult, test: LoadTest, whole: bool = False) -> Iterator[Section]:
    """What is shown; `whole` for a page, which holds every row and every example."""
    config = test.config
    if len(result.runs) > 1:
        yield "Sweep", sweep_table(result), [f"saturation: {result.saturation}"]
    for run in result.runs:
        lines = list(run_lines(run, config.check_max_gap, sys.maxsize if whole else EXAMPLES))
        if len(result.runs) == 1 and test.models.base is not None:
            command = bench_command(str(result.settings["url"]), test.models.base, test.models.adapters, run)
            lines.append(f"nearly the same with vLLM's own client: {command}")
        yield run.label, run_table(run, _title(run, config), sys.maxsize if whole else MOST_ROWS), lines
    if result.victim is not None:
        yield f"Victim {result.victim.victim}", victim_table(result.victim), list(victim_lines(result.victim))
    if result.notes:
        yield "Notes", None, list(result.notes)


def _short(sections: Sequence[Section]) -> list[Section]:
    """Of the runs of a sweep only what must not be missed; the rest is on the page."""
    first, *others = sections
    shown: list[Section] = [first]
    for name, _, lines in others:
        kept = lines if name == "Notes" else [f"{name}: {line}" for line in lines if is_loud(line)]
        shown.append((name, None, kept))
    return shown


def _title(run: RunResult, config: LoadTestConfig) -> str:
    in_flight = run.level if run.label.startswith("concurrency=") else config.max_concurrency
    if run.offered_per_s is not None:
        load = f"{run.offered_per_s:.3g} requests/s offered"
    else:
        load = "all at once" if in_flight is None else f"{in_flight:g} in flight"
    whole = run.figures.whole
    done = max(1, whole.completed)
    lengths = f"{whole.prompt_tokens / done:.0f} tokens in, {whole.output_tokens / done:.0f} out"
    return f"{run.label}: {whole.requests} requests, {run.adapters} adapters, {load}, {lengths}"


def _print(sections: Sequence[Section], as_text: bool) -> None:
    """Tables are data on stdout; where JSON is the data, only what people must see goes to stderr."""
    out = screen(stderr=not as_text)
    for _, table, lines in sections:
        if as_text and table is not None:
            out.print(table)
        for line in lines:
            out.print(line)


def _exit_code(result: LoadTestResult, config: LoadTestConfig) -> int:
    victim = result.victim
    early = [note for note in result.notes if note.startswith("ENDED EARLY")]
    interrupted = any(run.ended_early == INTERRUPTED for run in result.runs)
    interrupted = interrupted or (victim is not None and INTERRUPTED in victim.failures)
    if interrupted or any(note.endswith(INTERRUPTED) for note in early):
        return exit_codes.INTERRUPTED
    failed = any(_failed(run, config) for run in result.runs)
    return 1 if failed or early or (victim is not None and (victim.failures or victim.errors)) else 0


def _failed(run: RunResult, config: LoadTestConfig) -> bool:
    check = run.check
    lost = check is not None and config.check_max_gap is not None and check.beyond(config.check_max_gap)
    return bool(
        run.ended_early
        or run.client_bound
        or run.figures.whole.errors
        or (check is not None and check.wrong)
        or lost
        or not all(count.agrees for count in run.counters)
    )


def _calibrate(config: LoadTestConfig) -> int:
    limit = calibrate(config.client_processes)
    if config.json:
        print(json.dumps(dataclasses.asdict(limit), indent=2))
    else:
        screen(stderr=False).print(
            f"{limit.processes} client process(es): up to {limit.rate_per_s:.0f} requests/s of 16 chunks "
            f"add less than 5 % to p50 and p99 of TTFT, ITL, TPOT and E2EL; bound by: {limit.bound_by}"
        )
    return 0 if limit.rate_per_s else 1


def _show_schedule(test: LoadTest) -> int:
    workload = test.workload()
    whole = len(workload.arrivals) if workload.arrivals is not None else test.config.num_prompts
    requests = [workload.request(index) for index in range(20 if whole is None else whole)]
    if test.config.json:
        print(json.dumps([dataclasses.asdict(request) for request in requests], ensure_ascii=False, indent=1))
        return 0
    for request in requests:
        due = "" if request.due_s is None else f"{request.due_s:9.3f} s  "
        text = str(request.messages[-1]["content"])
        print(f"{request.index:5}  {due}{request.model}  {request.max_tokens} tokens  {text[:60]!r}")
    return 0


def _compare(config: Comparison) -> int:
    first, second = results.read_result(config.first), results.read_result(config.second)
    figures = compare.compare_results(first, second)
    table = compare.comparison_table(first, second, figures)
    lines = [f"settings differ: {line}" for line in compare.differing_settings(first, second)]
    lines += [line for result in (first, second) for line in compare.marks(result)]
    body = compare.comparison_json(figures)
    if config.output is not None:
        pictures = {"comparison.png": comparison_picture(first, second)}
        title = f"{second.name} against {first.name}"
        settings: Mapping[str, object] = {"first": first.settings, "second": second.settings}
        page = make_page(title, [(title, table, lines)], pictures, settings)
        comparison = results.json_bytes({"format": results.FORMAT, "comparison": body})
        files = {results.COMPARISON_FILE: comparison, results.PAGE_FILE: page, **pictures}
        results.write_folder(config.output, files, config.overwrite, comparison=True)
        print(f"written: {config.output}/{results.PAGE_FILE}", file=sys.stderr)
    _print([("", table, lines)], as_text=not config.json)
    if config.json:
        print(results.json_bytes(body).decode(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(exit_codes.run_command(main, sys.argv[1:]))
