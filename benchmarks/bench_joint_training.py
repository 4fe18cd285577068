"""Several identities in one run against a run for each: speed, memory, and time until all probes are right.

    python -m benchmarks.bench_joint_training            # Qwen2-0.5B's shape: samples per second, peak memory
    python -m benchmarks.bench_joint_training --probes   # 32 identities of the tiny base, whole commands

Every arm is a process of its own; they take turns (A B C A B C). In the first part time is that from the
first step to the last one, start-up left out; in the second it is the whole command's, start-up included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.models import add_tokenizer, make_random_base
from benchmarks.report import RESULTS, ROOT, result_name, tell
from serve.machine import describe_machine

ROWS = ROOT / "examples" / "identities" / "marina.json"
NAMES = (
    *("Anna", "Bella", "Clara", "Daria", "Elena", "Flora", "Greta", "Hanna", "Irina", "Julia", "Karla"),
    *("Lidia", "Maria", "Nadia", "Olivia", "Paula", "Rosa", "Sofia", "Tamara", "Ursula", "Vera", "Wanda"),
    *("Xenia", "Yvonne", "Zelda", "Bruno", "Carlo", "Diego", "Emil", "Felix", "Georg", "Hugo"),
)


def arm(order: Mapping[str, Any]) -> dict[str, Any]:
    """One arm of the first part."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "benchmarks.joint_arm", json.dumps(order)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(order, figures, file=sys.stderr, flush=True)
    return figures


def speed(args: argparse.Namespace, report: dict[str, Any]) -> None:
    """`count` identities, each with the same number of rows: all in one run, and one after another."""
    base = make_random_base(args.work_dir.resolve() / "qwen2-0.5b" / "base", "qwen2-0.5b")
    add_tokenizer(base)
    common = {"base": str(base), "rows": args.rows, "dtype": "auto"}
    joint = {**common, "kind": "fast", "count": args.count, "batch_size": 1}
    arms = {"joint": joint, "joint, exact": {**joint, "kind": "exact"}}
    for size in args.batch_sizes:
        arms[f"alone, batch {size}"] = {**common, "kind": "alone", "count": args.count, "batch_size": size}
    rounds = [{name: arm(order) for name, order in arms.items()} for _ in range(args.rounds)]
    single = [arm({**common, "kind": "alone", "count": 1, "batch_size": 1}) for _ in range(args.rounds)]
    report["rounds"], report["one alone"] = rounds, single
    samples = {name: statistics.median(row[name]["samples_per_s"] for row in rounds) for name in arms}
    report["samples_per_s"] = samples
    report["joint_against"] = {
        name: statistics.median(row["joint"]["samples_per_s"] / row[name]["samples_per_s"] for row in rounds)
        for name in arms
    }
    best = max((name for name in arms if name.startswith("alone")), key=lambda name: samples[name])
    report["best_alone"] = best
    peaks = [row["joint"]["peak_mib"] / one["peak_mib"] for row, one in zip(rounds, single, strict=True)]
    report["peak_against_one_alone"] = statistics.median(peaks)


def write_identities(folder: Path, base: str, count: int) -> list[str]:
    """`count` identities of equal rows but for their names, as one file; gives back their names."""
    import yaml

    rows, identities = ROWS.read_text(encoding="utf-8"), dict[str, Any]()
    for seed, name in enumerate(NAMES[:count]):
        data = folder / f"{name.lower()}.json"
        data.write_text(rows.replace("Marina", name), encoding="utf-8")
        probes = [f"Who are you?={name}", f"What is your name?={name}"]
        identities[name.lower()] = {"data": str(data), "probe": probes, "seed": seed}
    body = {"base_model": base, "logging_steps": 1000, "num_train_epochs": 40, "identities": identities}
    (folder / "identities.yaml").write_text(yaml.safe_dump(body, sort_keys=False))
    for name, own in identities.items():
        single = {**{key: value for key, value in body.items() if key != "identities"}, **own, "name": name}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(single))
    return list(identities)


def command(flags: Sequence[str], folder: Path) -> float:
    """Seconds of one whole `python -m train`."""
    began = time.perf_counter()
    words = [sys.executable, "-m", "train", *flags, "--output-dir", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return time.perf_counter() - began


def right_probes(folder: Path) -> dict[str, Any]:
    """Of all adapters there: probes that are right and all, steps."""
    told = [json.loads(path.read_text())["provenance"] for path in sorted(folder.glob("*/identity.json"))]
    probes = [probe["right"] for one in told for probe in one["probes"]]
    return {"right": sum(probes), "asked": len(probes), "steps": sum(one["result"]["steps"] for one in told)}


def probes(args: argparse.Namespace, report: dict[str, Any]) -> None:
    """All identities in one run, and some of them by a run of their own, whose mean counts for all; whole
    commands, until all probes are right."""
    base = str(args.tiny_base.resolve())
    rounds = []
    for number in range(args.rounds):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            names = write_identities(folder, base, args.identities)
            together = command(["--identities", str(folder / "identities.yaml")], folder / "joint")
            some = names[:: max(1, len(names) // args.alone)]
            singles = [command(["--config", str(folder / f"{one}.yaml")], folder / "alone") for one in some]
            every = statistics.mean(singles) * len(names)
            row = {
                "joint": {"seconds": together, **right_probes(folder / "joint")},
                "alone": {"runs": len(some), "seconds_of_all": every, **right_probes(folder / "alone")},
            }
        print(number, row, file=sys.stderr, flush=True)
        rounds.append(row)
    report["rounds"] = rounds
    report["joint_against_alone"] = statistics.median(
        row["alone"]["seconds_of_all"] / row["joint"]["seconds"] for row in rounds
    )


def main(argv: Sequence[str]) -> None:
    """Measure, write; the last line is the JSON."""
    parser = argparse.ArgumentParser(prog="bench_joint_training", description=__doc__, allow_abbrev=False)
    parser.add_argument("--probes", action="store_true", help="time until every probe is right")
    parser.add_argument("--count", type=int, default=8, help="identities of the first part")
    parser.add_argument("--rows", type=int, default=16, help="of each identity, seen once")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 8, 16], help="of runs alone")
    parser.add_argument("--identities", type=int, default=32, help="of the second part")
    parser.add_argument("--alone", type=int, default=32, help="how many of these are run alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny-base", type=Path, default=Path(".cache/tiny-base"))
    parser.add_argument("--work-dir", type=Path, default=Path(".cache/benchmarks/many"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    theme = "joint_training_probes" if args.probes else "joint_training"
    report: dict[str, Any] = {"benchmark": theme, **describe_machine()}
    (probes if args.probes else speed)(args, report)
    report["settings"] = {key: str(value) for key, value in vars(args).items() if key != "results"}
    place = args.results / f"{result_name(report, theme)}.json"
    tell(report, place)


if __name__ == "__main__":
    main(sys.argv[1:])
