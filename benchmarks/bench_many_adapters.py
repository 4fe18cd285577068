"""A thousand adapters in the folder against eight: start, memory and throughput of `vllm-lora serve`.

The same server is asked for all of them and for eight of them in turn (A B A B), with the same requests in
all but the adapter: popularity is Zipf, so with many adapters most requests want one that has no slot.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.bench_front import INPUT_TOKENS, OUTPUT_TOKENS, RANK, SLOTS, TEMPLATE
from benchmarks.bench_serving import QUIET
from benchmarks.models import add_tokenizer, make_random_adapter, make_random_base
from benchmarks.report import RESULTS, result_name, tell
from serve.admin_client import ServerAdapters
from serve.machine import describe_machine
from serve.process import ServerProcess

FEW = 8


def server_of(base: Path, adapters: Path, state: Path, log: Path, *flags: str) -> ServerProcess:
    """A server over a folder, not started yet."""
    template = log.with_name("template.jinja")
    template.write_text(TEMPLATE)
    arguments = ["--base-model", str(base), "--adapters", str(adapters), "--state-dir", str(state)]
    arguments += ["--served-model-name", "base", "--max-loras", str(SLOTS), "--max-lora-rank", "32"]
    arguments += ["--chat-template", str(template), "--max-num-seqs", "32", "--max-model-len", "512", *flags]
    return ServerProcess(arguments, log, QUIET, ready_timeout_s=900)


def started(server: ServerProcess) -> float:
    """Seconds from start to ready; the server runs then."""
    began = time.monotonic()
    server.__enter__()
    return time.monotonic() - began


def memory_mib(server: ServerProcess) -> int:
    """What the server and all that it started hold, shared pages once."""
    family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    return sum(process.memory_full_info().uss for process in family) >> 20


def wait_for_all(server: ServerProcess, count: int) -> float:
    """Seconds until the server serves `count` adapters."""
    began = time.monotonic()
    adapters = ServerAdapters(server.url)
    while sum(row["version"] is not None for row in adapters.list()) < count:
        time.sleep(0.5)
    return time.monotonic() - began


def in_memory(server: ServerProcess) -> int:
    """How many adapters the server has in its memory."""
    return sum(row["state"] in ("slot", "cached") for row in ServerAdapters(server.url).list())


def wait_until_loaded(server: ServerProcess) -> float:
    """Seconds until the server loads no more ahead."""
    began, before = time.monotonic(), -1
    while (now := in_memory(server)) > before:
        before, last = now, time.monotonic()
        time.sleep(5.0)
    return last - began


def measure(
    url: str, models: Sequence[str], requests: int, concurrency: int, seed: int, tokens: int = OUTPUT_TOKENS
) -> dict[str, Any]:
    """One run of the load test."""
    command = [sys.executable, "-P", "-m", "vllm_lora_ext", "loadtest", "--url", url, "--json"]
    command += ["--models", *models, "--input-len", str(INPUT_TOKENS), "--output-len", str(tokens)]
    command += ["--lora-request-distribution", "skewed", "--lora-zipf-alpha", "1.0", "--seed", str(seed)]
    command += ["--num-prompts", str(requests), "--max-concurrency", str(concurrency)]
    command += ["--warmup", "0"]  # a request to each of a thousand would take the longest; cold ones count
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.stdout:
        raise SystemExit(done.stderr)
    (run,) = json.loads(done.stdout)["runs"]
    whole = run["figures"]["whole"]
    asked = [row for row in run["figures"]["models"] if row["completed"]]
    return {
        "tokens_per_s": whole["output_tokens_per_s"],
        "ttft_p50_ms": whole["ttft"]["p50_ms"],
        "ttft_p99_ms": whole["ttft"]["p99_ms"],
        "adapters_asked": len(asked),
        "errors": whole["errors"],
        "client_bound": run["client_bound"],
    }


def compare(server: ServerProcess, names: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """Rounds of many and few in turn, at each concurrency; the memory after each round."""
    report: dict[str, Any] = {}
    if (
        args.warm_requests
    ):  # what was asked for before is in memory, as it is on a server that has run a while
        measure(server.url, list(names), args.warm_requests, max(args.concurrency), 0, 1)
    for concurrency in args.concurrency:
        rows = []
        for number in range(args.rounds):
            arms = {"many": list(names), "few": list(names[:FEW])}
            order = list(arms) if number % 2 == 0 else list(arms)[::-1]
            row = {
                arm: measure(server.url, arms[arm], args.requests, concurrency, 100 * concurrency + number)
                for arm in order
            }
            rows.append({**row, "memory_mib": memory_mib(server)})
            print(concurrency, number, rows[-1], file=sys.stderr)
        ratios = [row["many"]["tokens_per_s"] / row["few"]["tokens_per_s"] for row in rows]
        report[str(concurrency)] = {"rounds": rows, "throughput_ratio": statistics.median(ratios)}
    return report


def measure_starts(server: Callable[[int], ServerProcess], many: int, pairs: int) -> dict[str, Any]:
    """The first start, which takes all adapters, and then pairs of starts with none and with many."""
    first = server(many)
    report: dict[str, Any] = {"first_start_s": started(first)}
    report["all_served_after_ready_s"] = wait_for_all(first, many)
    first.stop()
    starts = []
    for _ in range(pairs):
        row: dict[str, Any] = {}
        for arm, count in (("none", 0), ("many", many)):
            running = server(count)
            row[arm] = {"ready_s": started(running), "memory_mib": memory_mib(running)}
            running.stop()
        starts.append(row)
        print(row, file=sys.stderr)
    longer = [row["many"]["ready_s"] - row["none"]["ready_s"] for row in starts]
    return report | {"starts": starts, "longer_start_s": statistics.median(longer)}


def make_all(folder: Path, base: Path, count: int) -> list[str]:
    """Names of `count` adapters, made once."""
    return [make_random_adapter(folder / f"id-{n:04}", base, RANK, n).name for n in range(count)]


def main(argv: Sequence[str]) -> None:
    """Start with none and with many, load, compare, write; the last line is the JSON."""
    parser = argparse.ArgumentParser(prog="bench_many_adapters", description=__doc__, allow_abbrev=False)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--shape", default="qwen2-0.5b")
    parser.add_argument("--requests", type=int, default=64, help="per run")
    parser.add_argument("--rounds", type=int, default=3, help="pairs per concurrency")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--warm-requests", type=int, default=500, help="asked before, of one token each")
    parser.add_argument("--starts", type=int, default=2, help="pairs of starts; 0: only load")
    parser.add_argument("--preload", action="store_true", help="let the server load ahead, and wait for that")
    parser.add_argument("--max-cpu-loras", help="default: what the server infers")
    parser.add_argument("--work-dir", type=Path, default=Path(".cache/benchmarks/many"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    work = args.work_dir.resolve() / args.shape
    base = make_random_base(work / "base", args.shape)
    add_tokenizer(base)
    names = make_all(work / f"adapters-{args.adapters}", base, args.adapters)
    (work / "none").mkdir(exist_ok=True)
    flags = ["--max-cpu-loras", args.max_cpu_loras] if args.max_cpu_loras else []
    flags += ["--preload"] if args.preload else []

    def server(count: int) -> ServerProcess:
        folder, state = (f"adapters-{count}", "state") if count else ("none", "state-none")
        return server_of(base, work / folder, work / state, work / f"server-{count}.log", *flags)

    report: dict[str, Any] = {"benchmark": "many_adapters", **describe_machine()}
    if args.starts:
        shutil.rmtree(work / "state", ignore_errors=True)
        report |= measure_starts(server, args.adapters, args.starts)
    with server(args.adapters) as running:
        if args.preload:
            report["preloaded_after_s"] = wait_until_loaded(running)
        report["load"] = compare(running, names, args)
        report["in_memory_at_the_end"] = in_memory(running)
    report |= {"adapters": args.adapters, "shape": args.shape, "rank": RANK, "slots": SLOTS, "few": FEW}
    report |= {"requests": args.requests, "input_tokens": INPUT_TOKENS, "output_tokens": OUTPUT_TOKENS}
    report["warm_requests"] = args.warm_requests
    place = args.results / f"{result_name(report, 'many_adapters')}.json"
    tell(report, place)


if __name__ == "__main__":
    main(sys.argv[1:])
