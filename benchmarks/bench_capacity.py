"""The table under "Capacity" in docs/operations.md: what a server of ours holds, at some settings.

For each combination of base, rank, slots and host cache one `vllm-lora serve`, asked by `vllm-lora loadtest`
for so many adapters (popularity is Zipf), with so many clients in flight. A row is measured once everything
that it asks for has been asked for once. Memory is read afterwards; it never falls, so rows go from few
adapters to many.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.bench_many_adapters import in_memory, server_of, wait_for_all
from benchmarks.models import add_tokenizer, make_random_adapter, make_random_base
from benchmarks.report import RESULTS, ROOT, result_name, tell
from serve.machine import describe_machine
from serve.process import ServerProcess

DOCUMENT = ROOT / "docs" / "operations.md"
BEGIN = "<!-- Begin of the table from the load test. -->"
END = "<!-- End of the table from the load test. -->"
INPUT_TOKENS, OUTPUT_TOKENS = 64, 32
MOST_BYTES = 1_200_000_000  # in a folder of adapters; the state folder holds them once more
_LOADS, _REQUESTS = "vllm_lora_adapter_load_seconds_count", "vllm_lora_requests_total"


@dataclass(frozen=True)
class Setup:
    """A server: base, rank of all adapters, slots, adapters that fit its host cache, and served ones."""

    shape: str
    rank: int
    slots: int
    cached: int
    served: int


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    setup: Setup
    adapters: int
    clients: int


def rows_of(shape: str, few: int, many: int) -> list[Row]:
    """What is measured of one base, in this order; each start of a server costs more than several rows.

    Few adapters tell what a rank costs, many what slots do, and what a host cache that is too small does.
    """
    room = max(8, many)
    usual = Setup(shape, rank=8, slots=8, cached=room, served=many)
    small_cache = Setup(shape, rank=16, slots=8, cached=max(8, many // 4), served=many)
    large = Setup(shape, rank=64, slots=8, cached=room, served=many)
    few_slots = Setup(shape, rank=8, slots=4, cached=room, served=many)
    rows = [Row(usual, few, 8), Row(usual, many, 8), Row(usual, many, 16), Row(few_slots, many, 8)]
    rows += [Row(setup, adapters, 8) for setup in (small_cache, large) for adapters in (few, many)]
    return rows


def make_adapters(folder: Path, base: Path, setup: Setup) -> list[str]:
    """Their names; made once, and fewer than asked for where they would take too much of the disk."""
    first = make_random_adapter(folder / "id-000", base, setup.rank, 0)
    size = (first / "adapter_model.safetensors").stat().st_size
    count = min(setup.served, max(1, MOST_BYTES // size))
    names = [make_random_adapter(folder / f"id-{n:03}", base, setup.rank, n).name for n in range(count)]
    return names[:count]


def resident_mib(server: ServerProcess) -> int:
    """What the server and all that it started have in memory; a page that several have counts once."""
    family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    return sum(process.memory_full_info().pss for process in family) >> 20


def counters(url: str) -> dict[str, float]:
    """Loads and requests of all adapters since the start."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{url}/metrics", timeout=60) as page:
        text = page.read().decode()
    sums = {_LOADS: 0.0, _REQUESTS: 0.0}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in sums:
                sums[sample.name] += sample.value
    return sums


def loadtest(url: str, models: Sequence[str], *flags: str) -> dict[str, Any]:
    """One run of `vllm-lora loadtest` without a base's share, as its JSON has it."""
    command = [sys.executable, "-P", "-m", "vllm_lora_ext", "loadtest", "--url", url, "--json"]
    command += ["--models", *models, "--input-len", str(INPUT_TOKENS), "--warmup", "0", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.stdout:
        raise SystemExit(done.stderr)
    (run,) = json.loads(done.stdout)["runs"]
    return dict(run)


def measure(server: ServerProcess, row: Row, names: Sequence[str], duration_s: float) -> dict[str, Any]:
    """The figures of one row."""
    asked, in_flight = names[: row.adapters], ["--max-concurrency", str(row.clients)]
    once = ["--lora-request-distribution", "distinct", "--num-prompts", str(len(asked)), "--output-len", "1"]
    loadtest(server.url, asked, *once, *in_flight)
    before = counters(server.url)
    popular = ["--lora-request-distribution", "skewed", "--lora-zipf-alpha", "1.0"]
    popular += ["--output-len", str(OUTPUT_TOKENS), "--duration", str(duration_s)]
    run = loadtest(server.url, asked, *popular, *in_flight)
    after = counters(server.url)
    whole = run["figures"]["whole"]
    loads, requests = (after[name] - before[name] for name in (_LOADS, _REQUESTS))
    return {
        **asdict(row.setup),
        "adapters": row.adapters,
        "clients": row.clients,
        "tokens_per_s": whole["output_tokens_per_s"],
        "requests_per_s": whole["requests_per_s"],
        "requests": whole["completed"],
        "errors": whole["errors"],
        "ttft_p50_ms": whole["ttft"]["p50_ms"],
        "ttft_p99_ms": whole["ttft"]["p99_ms"],
        "itl_p50_ms": whole["itl"]["p50_ms"],
        "cold_load_share": loads / requests if requests else 0.0,
        "resident_mib": resident_mib(server),
        "in_memory": in_memory(server),
        "client_bound": run["client_bound"],
    }


def measure_setup(setup: Setup, rows: Iterable[Row], work: Path, duration_s: float) -> list[dict[str, Any]]:
    """Rows of one server, from its start to its end."""
    base = make_random_base(work / "base", setup.shape)
    add_tokenizer(base)
    folder = work / f"adapters-{setup.rank}-{setup.served}"
    names = make_adapters(folder, base, setup)
    flags = ["--max-loras", str(setup.slots), "--max-lora-rank", str(max(32, setup.rank))]
    flags += ["--max-cpu-loras", str(setup.cached)]
    measured = []
    began = time.monotonic()
    state = work / f"state-{setup.rank}-{setup.served}"
    with server_of(base, folder, state, work / "server.log", *flags) as server:
        wait_for_all(server, len(names))
        print(f"{setup}: served after {time.monotonic() - began:.0f} s", file=sys.stderr)
        for row in rows:
            if row.adapters > len(names):
                print(f"{row.adapters} adapters of this size are left out", file=sys.stderr)
                continue
            measured.append(measure(server, row, names, duration_s))
            print(json.dumps(measured[-1]), file=sys.stderr)
    return measured


HEADS = (
    *("base", "rank", "slots", "adapters", "in flight", "tokens/s", "requests/s", "TTFT p50, p99 ms"),
    *("ITL p50 ms", "loads per request", "memory MiB", "host cache"),
)
CLIENT_BOUND = "\\* The load test's client was the limit, not the server."


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
    for row in rows:
        cells = [str(row[key]) for key in ("shape", "rank", "slots", "adapters", "clients")]
        mark = "\\*" if row["client_bound"] else ""
        cells += [f"{row['tokens_per_s']:.1f}{mark}", f"{row['requests_per_s']:.2f}"]
        cells += [f"{row['ttft_p50_ms']:.0f}, {row['ttft_p99_ms']:.0f}", f"{row['itl_p50_ms']:.1f}"]
        cells += [f"{row['cold_load_share']:.2f}", f"{row['resident_mib']}"]
        cells += [f"{row['in_memory']} of {row['cached']}"]
        lines.append(f"| {' | '.join(cells)} |")
    notes = ["", CLIENT_BOUND] if any(row["client_bound"] for row in rows) else []
    return "\n".join(lines + notes)


def with_table(document: str, report: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """The document with the table, and what it was measured with, between its two comments."""
    head, _, rest = document.partition(BEGIN)
    _, _, tail = rest.partition(END)
    if not tail:
        raise SystemExit(f"the document has no place for the table: {BEGIN} ... {END}")
    counts = [row["requests"] for row in rows]
    said = (
        f"Measured by `make bench-capacity` on {report['hardware']}, with random weights, prompts of "
        f"{INPUT_TOKENS} tokens and answers of {OUTPUT_TOKENS}, adapters asked for by Zipf (alpha 1.0), "
        f"{report['duration_s']:.0f} s a row, which had {min(counts)} to {max(counts)} requests. "
        "Memory is that of all processes of the server."
    )
    return f"{head}{BEGIN}\n\n{textwrap.fill(said, 118)}\n\n{table(rows)}\n\n{END}{tail}"


def main(argv: Sequence[str]) -> None:
    """Measure, write, show the table; the last line is the JSON."""
    parser = argparse.ArgumentParser(prog="bench_capacity", description=__doc__, allow_abbrev=False)
    parser.add_argument("--shapes", nargs="+", default=["tiny", "qwen2-0.5b"])
    parser.add_argument("--few", type=int, default=8, help="adapters")
    parser.add_argument("--many", type=int, default=64, help="adapters")
    parser.add_argument("--duration", type=float, default=12.0, help="seconds of requests for a row")
    parser.add_argument("--work-dir", type=Path, default=Path(".cache/benchmarks/capacity"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write-docs", action="store_true", help=f"put the table into {DOCUMENT.name}")
    args = parser.parse_args(argv)
    machine, rows = describe_machine(), []
    for shape in args.shapes:
        work = args.work_dir.resolve() / shape
        for setup, some in groupby(rows_of(shape, args.few, args.many), key=lambda row: row.setup):
            rows += measure_setup(setup, some, work, args.duration)
    name = result_name(machine, "capacity")
    report = {
        "benchmark": "capacity",
        **machine,
        "hardware": f"{machine['cores']} cores ({name.split('_')[1].split('-')[0]})",
        "rows": rows,
    }
    report |= {"duration_s": args.duration, "zipf_alpha": 1.0}
    report |= {"input_tokens": INPUT_TOKENS, "output_tokens": OUTPUT_TOKENS}
    place = args.results / f"{name}.json"
    print(f"\n{table(rows)}\n", file=sys.stderr)
    if args.write_docs:
        DOCUMENT.write_text(with_table(DOCUMENT.read_text(encoding="utf-8"), report, rows), encoding="utf-8")
    tell(report, place)


if __name__ == "__main__":
    main(sys.argv[1:])
