"""What the front side costs: the same engine with our kernels, with our front and with vLLM's own alone.

Both servers run at the same time and are asked in turn (A B A B); one that is not asked does nothing. A pair
in which the load test's client was the limit is left out, and told.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench_serving import PLAIN_VLLM, QUIET
from benchmarks.models import add_tokenizer, make_random_adapter, make_random_base
from benchmarks.report import RESULTS, result_name, tell
from serve.machine import describe_machine
from serve.process import ServerProcess

RANK, SLOTS = 8, 8
INPUT_TOKENS, OUTPUT_TOKENS = 64, 32
TEMPLATE = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
ARMS = ("front", "plain")
_LEVELS = {  # flags of the load test; for TTFT the rest of an answer only takes time
    "throughput": ("--max-concurrency", "8", "--output-len", str(OUTPUT_TOKENS)),
    "ttft": ("--max-concurrency", "1", "--output-len", "2"),
}


def servers_of(base: Path, adapters: Sequence[Path], work: Path, eager: bool) -> dict[str, ServerProcess]:
    """Both servers, not started yet, with every adapter in memory."""
    template = work / "template.jinja"
    template.write_text(TEMPLATE)
    both = ["--served-model-name", "base", "--max-lora-rank", "32", "--max-loras", str(SLOTS)]
    both += ["--max-cpu-loras", str(len(adapters)), "--chat-template", str(template)]
    both += ["--max-num-seqs", "32", "--max-model-len", "512", *(["--enforce-eager"] if eager else [])]
    ours = [str(base), "--adapters", str(adapters[0].parent), "--state-dir", str(work / "state"), *both]
    plain = ["--model", str(base), "--host", "127.0.0.1", "--enable-lora", *both]
    plain += ["--lora-modules", *(f"{adapter.name}={adapter}" for adapter in adapters)]
    return {
        "front": ServerProcess(ours, work / "front.log", QUIET),
        # Without VLLM_PLUGINS our kernels are loaded, and our endpoint is not.
        "plain": ServerProcess(plain, work / "plain.log", QUIET, command=PLAIN_VLLM, ready_path="/health"),
    }


def measure(url: str, models: Sequence[str], flags: Sequence[str]) -> dict[str, Any]:
    """One run of the load test: tokens per second, TTFT p50 in ms, and whether the client was the limit."""
    command = [sys.executable, "-P", "-m", "vllm_lora_ext", "loadtest", "--url", url, "--json"]
    command += [
        "--models",
        *models,
        "--input-len",
        str(INPUT_TOKENS),
        "--output-len",
        str(OUTPUT_TOKENS),
        *flags,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.stdout:
        raise SystemExit(done.stderr)
    (run,) = json.loads(done.stdout)["runs"]
    whole = run["figures"]["whole"]
    return {
        "tokens_per_s": whole["output_tokens_per_s"],
        "ttft_p50_ms": whole["ttft"]["p50_ms"],
        "errors": whole["errors"],
        "client_bound": run["client_bound"],
    }


def compare(
    servers: dict[str, ServerProcess], models: Sequence[str], rounds: int, requests: int
) -> dict[str, Any]:
    """Medians of both, and of the paired ratios and differences."""
    report: dict[str, Any] = {}
    for level, flags in _LEVELS.items():
        rows: list[dict[str, dict[str, Any]]] = []
        for number in range(rounds):
            arms = ARMS if number % 2 == 0 else ARMS[::-1]
            stated = [*flags, "--num-prompts", str(requests), "--seed", str(number)]
            rows.append({arm: measure(servers[arm].url, models, stated) for arm in arms})
            print(level, number, rows[-1], file=sys.stderr)
        good = [row for row in rows if not any(row[arm]["client_bound"] for arm in ARMS)]
        ratios = [row["front"]["tokens_per_s"] / row["plain"]["tokens_per_s"] for row in good]
        extra = [row["front"]["ttft_p50_ms"] - row["plain"]["ttft_p50_ms"] for row in good]
        report[level] = {
            "rounds": rows,
            "rounds_left_out": len(rows) - len(good),
            "tokens_per_s": {
                arm: statistics.median(row[arm]["tokens_per_s"] for row in good) for arm in ARMS
            },
            "ttft_p50_ms": {arm: statistics.median(row[arm]["ttft_p50_ms"] for row in good) for arm in ARMS},
            "throughput_ratio": statistics.median(ratios),
            "extra_ttft_ms": statistics.median(extra),
        }
    return report


def main(argv: Sequence[str]) -> None:
    """Measure each base, write the result; the last line is the JSON."""
    parser = argparse.ArgumentParser(prog="bench_front", description=__doc__, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=6, help="pairs per level")
    parser.add_argument("--requests", type=int, default=32, help="per run")
    parser.add_argument("--work-dir", type=Path, default=Path(".cache/benchmarks/front"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--bases", nargs="+", default=["qwen2-0.5b", "tiny"])
    args = parser.parse_args(argv)
    os.environ.pop("VLLM_PLUGINS", None)
    measured: dict[str, Any] = {}
    for shape in args.bases:
        work = args.work_dir.resolve() / shape
        base = make_random_base(work / "base", shape)
        add_tokenizer(base)
        adapters = [make_random_adapter(work / "adapters" / f"id-{n}", base, RANK, n) for n in range(SLOTS)]
        servers = servers_of(base, adapters, work, eager=shape == "tiny")
        with servers["front"], servers["plain"]:
            names = [adapter.name for adapter in adapters]
            measured[shape] = compare(servers, names, args.rounds, args.requests)
    machine = describe_machine()
    settings = {"rank": RANK, "adapters": SLOTS, "input_tokens": INPUT_TOKENS, "output_tokens": OUTPUT_TOKENS}
    report = {"benchmark": "front", **machine, **settings, "rounds": args.rounds, "bases": measured}
    place = args.results / f"{result_name(machine, 'front')}.json"
    tell(report, place)


if __name__ == "__main__":
    main(sys.argv[1:])
