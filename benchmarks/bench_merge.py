"""`vllm-lora merge` against PEFT's merge_and_unload + save_pretrained, on a base of Qwen2-0.5B's shape.

    python -m benchmarks.bench_merge [--pairs N] [--json-out FILE]

Both in processes of their own, in turns, with the order changed from pair to pair; the base is in the page
cache, and what the one before wrote is on the disk. PEFT's arm is what its documentation shows: the base in
its own dtype, the adapter, merge, save. Ours also tests that every number is finite, makes a SHA-256 of what
it writes, and waits until it is on the disk (fsync), which PEFT's does not. The check afterwards is left out.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.models import MODULES, make_random_adapter, make_random_base
from benchmarks.report import tell
from serve.machine import describe_machine
from vllm_lora_ext.files import RegularFile
from vllm_lora_ext.tensor_file import read_header

RANK = 16
ARMS = ("ours", "peft")


def merge_ours(base: Path, adapter: Path, out: Path) -> None:
    """What `vllm-lora merge --no-check` does."""
    from train.merge import merge

    merge(adapter, str(base), out)


def merge_peft(base: Path, adapter: Path, out: Path) -> None:
    """What PEFT's documentation shows."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(out)


def run_arm(arm: str, base: Path, adapter: Path, out: Path) -> None:
    """In the child: merge, and print how long it took without and with imports, and the most memory."""
    started = time.monotonic()
    import torch

    needed = ("train.merge",) if arm == "ours" else ("peft", "transformers.models.qwen2.modeling_qwen2")
    for name in needed:
        importlib.import_module(name)
    torch.ones(8, 8) @ torch.ones(8, 8)
    imported = time.monotonic()
    {"ours": merge_ours, "peft": merge_peft}[arm](base, adapter, out)
    status = Path("/proc/self/status").read_text(encoding="utf-8")  # VmHWM, unlike ru_maxrss, is ours alone
    peak_kib = int(status.split("VmHWM:")[1].split()[0])
    spent = {"work_s": time.monotonic() - imported, "imports_s": imported - started}
    print(json.dumps({**spent, "peak_mib": peak_kib / 1024}))


def measure(arm: str, base: Path, adapter: Path, out: Path, threads: int | None) -> dict[str, float]:
    """One merge in a process of its own; `wall_s` is from its start to its end."""
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    os.sync()
    command = [
        sys.executable,
        "-m",
        "benchmarks.bench_merge",
        "--arm",
        arm,
        str(base),
        str(adapter),
        str(out),
    ]
    started = time.monotonic()
    done = subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    wall_s = time.monotonic() - started
    return {"wall_s": wall_s, **json.loads(done.stdout.splitlines()[-1])}


def share_rounded_once(base: Path, adapter: Path, merged: Path) -> float:
    """The share of merged numbers that are the exact sum, in float64, rounded to bfloat16; of one layer."""
    import torch
    from safetensors import safe_open

    equal = count = 0
    files = (folder / "model.safetensors" for folder in (base, merged))
    with (
        safe_open(next(files), "pt") as before,
        safe_open(next(files), "pt") as after,
        safe_open(adapter / "adapter_model.safetensors", "pt") as lora,
    ):
        for module in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"):
            name = f"model.layers.0.{module}"
            a, b = (lora.get_tensor(f"base_model.model.{name}.lora_{side}.weight").double() for side in "AB")
            exact = (before.get_tensor(f"{name}.weight").double() + b @ a).to(torch.bfloat16)
            equal += int((after.get_tensor(f"{name}.weight") == exact).sum())
            count += exact.numel()
    return equal / count


def largest_tensor_bytes(base: Path) -> int:
    """Of the base."""
    with RegularFile(base / "model.safetensors") as file:
        return max(place.size for place in read_header(file))


def summary(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians per arm, and the ratios of each pair, whose spread is the noise."""
    report: dict[str, Any] = {}
    for arm in ARMS:
        keys = runs[arm][0]
        report[arm] = {key: round(statistics.median(run[key] for run in runs[arm]), 3) for key in keys}
        report[arm]["all_wall_s"] = [round(run["wall_s"], 2) for run in runs[arm]]
        report[arm]["all_work_s"] = [round(run["work_s"], 2) for run in runs[arm]]
    for key in ("wall_s", "work_s"):
        ratios = [theirs[key] / ours[key] for ours, theirs in zip(runs["ours"], runs["peft"], strict=True)]
        report[f"peft_over_ours_{key}"] = [round(ratio, 2) for ratio in ratios]
    return report


def main() -> None:
    """Pairs in turns, and how each rounds; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of torch in both (default: its own, one per core)")
    parser.add_argument("--json-out", type=Path)
    parser.add_argument("--arm", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        arm, *paths = args.arm
        run_arm(arm, *map(Path, paths))
        return
    cache = Path(".cache") / "benchmarks"
    base = make_random_base(cache / "qwen2-0.5b", "qwen2-0.5b")
    adapter = make_random_adapter(cache / f"merge-rank-{RANK}", base, RANK, 0, MODULES)
    runs: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    report: dict[str, Any] = {
        "benchmark": "merge",
        **describe_machine(),
        "rank": RANK,
        "pairs": args.pairs,
        "threads": args.threads,
    }
    report["load_before"] = round(os.getloadavg()[0], 2)
    with tempfile.TemporaryDirectory(dir=cache, prefix="merge-") as folder:
        for number in range(args.pairs):
            for arm in ARMS if number % 2 == 0 else ARMS[::-1]:
                out = Path(folder) / arm
                shutil.rmtree(out, ignore_errors=True)
                runs[arm].append(measure(arm, base, adapter, out, args.threads))
                print(number, arm, runs[arm][-1], file=sys.stderr, flush=True)
        shares = {arm: share_rounded_once(base, adapter, Path(folder) / arm) for arm in ARMS}
    report["load_after"] = round(os.getloadavg()[0], 2)
    report |= summary(runs)
    report["share_rounded_once"] = {arm: round(share, 5) for arm, share in shares.items()}
    largest = largest_tensor_bytes(base)
    report["largest_tensor_mib"] = round(largest / (1 << 20), 1)
    report["memory_limit_mib"] = round(2 * largest / (1 << 20) + 1024, 1)
    tell(report, args.json_out)


if __name__ == "__main__":
    main()
