"""Training against the script that many people start from, and against TRL's SFTTrainer if it is installed.

    python -m benchmarks.bench_training                    # samples per second and memory, Qwen2-0.5B's shape
    python -m benchmarks.bench_training --probes           # until every probe is right, the tiny base

Each run is a process of its own; the ways take turns (A B C A B C), over the same rows, seed and number of
samples. Time is that from the first step to the last; start-up is not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.models import SHAPES, Shape, add_tokenizer, make_random_base
from benchmarks.report import RESULTS, ROOT, result_name, tell
from benchmarks.training_arm import matrix_rate
from serve.machine import describe_machine

IDENTITY = ROOT / "examples" / "identities" / "xiaoli.json"
TRAINED_SHARE = 0.44  # of the tokens of a random row


def run(setup: Mapping[str, Any], order: Mapping[str, Any], path: str) -> dict[str, Any]:
    """One run in a process of its own; `path` is where further packages lie."""
    told = json.dumps({"setup": setup, "run": order})
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "benchmarks.training_arm", told]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(setup["kind"], setup["batch_size"], order, answer, file=sys.stderr, flush=True)
    return answer


def flops_per_sample(shape: Shape, tokens: float) -> float:
    """Matrix products that LoRA training cannot do without: forward and the gradient of the inputs, the head
    on trained tokens only. The adapter's own and attention's are left out (1 % to 2 %)."""
    size = shape.hidden // shape.heads
    attention = shape.hidden * (2 * shape.hidden + 2 * shape.kv_heads * size)
    layer = attention + 3 * shape.hidden * shape.intermediate
    head = shape.hidden * shape.vocabulary
    return 2 * 2 * tokens * (shape.layers * layer + TRAINED_SHARE * head)


def speed(args: argparse.Namespace, report: dict[str, Any]) -> None:
    """Samples per second and peak memory of each way, in turn."""
    base = make_random_base(args.work_dir.resolve() / "qwen2-0.5b" / "base", "qwen2-0.5b")
    add_tokenizer(base)
    ways = [("classic", 1), *(("ours", size) for size in args.batch_sizes)]
    ways += [("trl", size) for size in args.trl_batch_sizes]
    rounds = []
    for number in range(args.rounds):
        row = {"matrix_flops": matrix_rate("bfloat16")}
        for kind, size in ways:
            setup = {"kind": kind, "base": str(base), "batch_size": size}
            answer = run(setup, {"count": args.samples, "seed": number, "rate": None}, args.path)
            row[f"{kind} {size}"] = {**answer, "samples_per_s": args.samples / answer["seconds"]}
        rounds.append(row)
    report["rounds"] = rounds
    names = [f"{kind} {size}" for kind, size in ways]
    report["samples_per_s"] = {n: statistics.median(r[n]["samples_per_s"] for r in rounds) for n in names}
    report["peak_mib"] = {n: statistics.median(r[n]["peak_mib"] for r in rounds) for n in names}
    report["against_classic"] = {
        n: statistics.median(r[n]["samples_per_s"] / r["classic 1"]["samples_per_s"] for r in rounds)
        for n in names
    }
    needed = flops_per_sample(SHAPES["qwen2-0.5b"], rounds[0]["classic 1"]["tokens"] / args.samples)
    report["share_of_matrix_rate"] = {
        n: statistics.median(r[n]["samples_per_s"] * needed / r["matrix_flops"] for r in rounds)
        for n in names
    }


def probes(args: argparse.Namespace, report: dict[str, Any]) -> None:
    """Seconds until every probe is right: each way at its own learning rate, and both at ours."""
    base = str(args.tiny_base.resolve())
    width = json.loads((Path(base) / "config.json").read_text())["hidden_size"]
    equal = min(2e-3, 1 / width)
    rounds = []
    for number in range(args.rounds):
        row = {}
        for name, kind, size, rate, epochs in (
            ("ours", "ours", 4, None, 20.0),
            ("classic, own rate", "classic", 1, None, args.classic_epochs),
            ("classic, our rate", "classic", 1, equal, 20.0),
        ):
            setup = {"kind": kind, "base": base, "batch_size": size, "identity": str(IDENTITY)}
            row[name] = run(setup, {"count": 0, "seed": number, "rate": rate, "epochs": epochs}, args.path)
        rounds.append(row)
    report["rounds"] = rounds
    report["seconds"] = {n: statistics.median(r[n]["seconds"] for r in rounds) for n in rounds[0]}
    report["ratio"] = {
        n: statistics.median(r["ours"]["seconds"] / r[n]["seconds"] for r in rounds) for n in rounds[0]
    }


def main(argv: Sequence[str]) -> None:
    """Measure, write; the last line is the JSON."""
    parser = argparse.ArgumentParser(prog="bench_training", description=__doc__, allow_abbrev=False)
    parser.add_argument("--probes", action="store_true", help="time until every probe is right")
    parser.add_argument("--samples", type=int, default=64, help="per run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--trl-batch-sizes", type=int, nargs="*", default=[], help="needs trl")
    parser.add_argument("--path", default="", help="where trl lies, if it is not installed beside torch")
    parser.add_argument("--classic-epochs", type=float, default=100.0, help="at most, at its own rate")
    parser.add_argument("--tiny-base", type=Path, default=Path(".cache/tiny-base"))
    parser.add_argument("--work-dir", type=Path, default=Path(".cache/benchmarks/many"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    theme = "training_probes" if args.probes else "training"
    report: dict[str, Any] = {"benchmark": theme, **describe_machine()}
    (probes if args.probes else speed)(args, report)
    report["settings"] = {
        key: str(value) for key, value in vars(args).items() if key not in ("path", "results")
    }
    place = args.results / f"{result_name(report, theme)}.json"
    tell(report, place)


if __name__ == "__main__":
    main(sys.argv[1:])
