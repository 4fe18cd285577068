"""Many adapters on one machine: our server and plain vLLM with the same ones, a load test's sweep each.

Makes adapters of random weights for the tiny base, each so strong that it has a voice of its own, starts the
servers one after the other, runs `vllm-lora loadtest --sweep adapters=... --check` against each, compares the
two, and writes figures and the picture to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from benchmarks.models import make_random_adapter
from benchmarks.report import RESULTS, ROOT, result_name, tell
from serve.machine import describe_machine
from serve.process import ServerProcess

PLAIN_VLLM = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
RANK = 8
STRENGTH = 64.0  # times the random delta
SLOTS = 8
BOTH = (
    "--served-model-name",
    "tiny-base",
    "--max-lora-rank",
    "32",
    "--max-loras",
    str(SLOTS),
    "--enforce-eager",
)
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
}


def make_adapters(folder: Path, base: Path, count: int) -> list[Path]:
    """`count` adapters that answer each in its own way, made once."""
    made = []
    for number in range(count):
        adapter = folder / f"id-{number:02}"
        if not (adapter / "strong").exists():
            shutil.rmtree(adapter, ignore_errors=True)
            make_random_adapter(adapter, base, RANK, seed=number)
            strengthen(adapter / "adapter_model.safetensors")
            (adapter / "strong").touch()
        made.append(adapter)
    return made


def strengthen(weights: Path) -> None:
    """Multiply the adapter's delta by `STRENGTH`."""
    tensors = {name: tensor * STRENGTH**0.5 for name, tensor in load_file(weights).items()}
    weights.unlink()  # it is mapped: what is read must not be written over
    save_file(tensors, weights)


def servers_of(base: Path, adapters: Sequence[Path], work: Path) -> dict[str, ServerProcess]:
    """Both servers, not started yet: `vllm-lora` and `plain vLLM`, each with every adapter in memory."""
    ours = [str(base), "--adapters", str(adapters[0].parent), "--state-dir", str(work / "state")]
    plain = ["--model", str(base), "--host", "127.0.0.1", "--enable-lora"]
    plain += ["--max-cpu-loras", str(len(adapters))]
    plain += ["--lora-modules", *(f"{adapter.name}={adapter}" for adapter in adapters)]
    return {
        "vllm-lora": ServerProcess([*ours, *BOTH], work / "ours.log", QUIET),
        "plain vLLM": ServerProcess(
            [*plain, *BOTH],
            work / "plain.log",
            {**QUIET, "VLLM_PLUGINS": ""},
            command=PLAIN_VLLM,
            ready_path="/health",
        ),
    }


def loadtest(*arguments: str) -> int:
    """`vllm-lora loadtest`, as a user calls it; its exit code."""
    command = [sys.executable, "-P", "-m", "vllm_lora_ext", "loadtest", *arguments]
    print("$ vllm-lora loadtest", *arguments, file=sys.stderr)
    return subprocess.run(command, check=False).returncode


def summary_of(folder: Path) -> dict[str, Any]:
    """What is kept of a sweep: the figures of each level, without single requests."""
    body = json.loads((folder / "results.json").read_text())
    runs = []
    for run in body["runs"]:
        figures, check = run["figures"], run["check"]
        runs.append(
            {
                "adapters": run["adapters"],
                "whole": figures["whole"],
                "base": figures["base"],
                "cold_ttft": (figures["cold"] or {}).get("ttft"),
                "warm_ttft": (figures["warm"] or {}).get("ttft"),
                "fairness": figures["fairness"],
                "client": run["client_cost"],
                "client_bound": run["client_bound"],
                "counters": run.get("counters"),
                "answers": {
                    "compared": check["compared"],
                    "same": check["same"],
                    "changed": len(check["changed"]),
                    "wrong_identity": len(check["wrong"]),
                    "wrong_by_model": _count(verdict["model"] for verdict in check["wrong"]),
                },
            }
        )
    return {"saturation": body.get("saturation"), "runs": runs, "notes": body["notes"]}


def main(argv: Sequence[str]) -> None:
    """Run both, compare, write; the last line is the JSON."""
    parser = argparse.ArgumentParser(prog="bench_serving", description=__doc__, allow_abbrev=False)
    parser.add_argument("--base", type=Path, default=Path(".cache/tiny-base"))
    parser.add_argument("--adapters", default="1,2,4,8,16", help="numbers of adapters")
    parser.add_argument("--duration", default="8", help="seconds of load at each")
    parser.add_argument("--max-concurrency", default="16")
    parser.add_argument("--work-dir", type=Path, default=Path(".cache/benchmarks/serving"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    work = args.work_dir.resolve()
    subprocess.run(
        [sys.executable, str(ROOT / "examples/tiny_base/make.py"), "--output-dir", str(args.base)], check=True
    )
    count = max(map(int, args.adapters.split(",")))
    adapters = make_adapters(work / f"adapters-{count}", args.base.resolve(), count)
    for name in ("vllm-lora", "plain vLLM", "both"):  # what an earlier call left is no result of this one
        shutil.rmtree(work / name, ignore_errors=True)
    flags = ["--sweep", f"adapters={args.adapters}", "--duration", args.duration, "--check", "--prometheus"]
    flags += ["--max-concurrency", args.max_concurrency, "--overwrite"]
    codes = {}
    for name, server in servers_of(args.base.resolve(), adapters, work).items():
        print(f"starting {name}", file=sys.stderr)
        with server:
            codes[name] = loadtest("--url", server.url, *flags, "--output", str(work / name))
    loadtest(
        "--compare", *(str(work / name) for name in codes), "--output", str(work / "both"), "--overwrite"
    )
    machine = describe_machine()
    settings = {"rank": RANK, "slots": SLOTS, "levels": args.adapters, "duration_s": float(args.duration)}
    report = {
        "benchmark": "serving",
        **machine,
        **settings,
        "max_concurrency": int(args.max_concurrency),
        "exit_codes": codes,
        "servers": {name: summary_of(work / name) for name in codes},
        "comparison": json.loads((work / "both" / "comparison.json").read_text())["comparison"],
    }
    place = args.results / f"{result_name(machine, 'serving')}.json"
    tell(report, place)
    shutil.copyfile(work / "both" / "comparison.png", place.with_suffix(".png"))


def _count(names: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return counts


if __name__ == "__main__":
    main(sys.argv[1:])
