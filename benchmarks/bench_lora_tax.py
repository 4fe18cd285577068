"""What LoRA costs: the same requests on engines without LoRA, with vLLM's LoRA and with ours.

    python -m benchmarks.bench_lora_tax

Each arm is an engine in a process of its own. All are alive at the same time and
run in turn, one at a time, so that a machine that gets slower slows all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.models import SHAPES, make_random_adapter, make_random_base
from benchmarks.report import tell
from serve.machine import describe_machine

PLUGIN = "vllm_lora"
MAX_LORAS = 8
MIXED_RANKS = (8, 16, 32, 64, 8, 16, 32, 64)
LOADS = ("base", "one", "eight", "mixed")
WORKLOADS = {
    "prefill": {"prompts": 8, "prompt_tokens": 256, "output_tokens": 1},
    "decode": {"prompts": 16, "prompt_tokens": 32, "output_tokens": 64},
}
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
START_TIMEOUT_S = 1200.0
RUN_TIMEOUT_S = 1200.0
STOP_TIMEOUT_S = 20.0
IDLE_CORES = 0.05  # vLLM's workers spin for a second after their last step
IDLE_TIMEOUT_S = 15.0


@dataclass(frozen=True)
class ArmKind:
    """How one arm differs from the others; `plugins` is the value of VLLM_PLUGINS."""

    lora: bool
    plugins: str
    eager: bool = False


ARMS = {
    "none": ArmKind(lora=False, plugins=""),
    "stock": ArmKind(lora=True, plugins=""),
    "ours": ArmKind(lora=True, plugins=PLUGIN),
    "ours-eager": ArmKind(lora=True, plugins=PLUGIN, eager=True),
}


class ArmProcess:
    """One arm's process: ready on entry, gone with its whole group on exit."""

    def __init__(self, name: str, setup: dict[str, Any], log: Path) -> None:
        self.name = name
        self._setup = setup
        self._log = log
        self.has_precedence = False
        self._group: list[psutil.Process] = []
        self._answers: IO[str]
        self._process: subprocess.Popen[str]

    def __enter__(self) -> ArmProcess:
        read_end, write_end = os.pipe()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.arm", str(write_end)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                pass_fds=(write_end,),
                env={**os.environ, **ENVIRONMENT, "VLLM_PLUGINS": ARMS[self.name].plugins},
                start_new_session=True,
            )
        os.close(write_end)
        self._answers = os.fdopen(read_end)
        try:
            self.has_precedence = self._ask(self._setup, START_TIMEOUT_S)["has_precedence"]
            leader = psutil.Process(self._process.pid)
            self._group = [leader, *leader.children(recursive=True)]
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def measure(self, load: str, workload: str, seed: int) -> float:
        """Seconds that the requests took in the child."""
        request = {"load": load, "seed": seed, **WORKLOADS[workload]}
        seconds: float = self._ask(request, RUN_TIMEOUT_S)["seconds"]
        return seconds

    def cpu_s(self) -> float:
        """Processor time that the arm's processes have used so far, in seconds."""
        times = [process.cpu_times() for process in self._group]
        return sum(time.user + time.system for time in times)

    def stop(self) -> None:
        """End by itself, so that vLLM removes its shared memory; what is left is killed."""
        with contextlib.suppress(BrokenPipeError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._answers.close()

    def _ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its end is told below
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        in_time, _, _ = select.select([self._answers], [], [], timeout_s)
        line = self._answers.readline() if in_time else ""
        if not line:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-30:])
            raise RuntimeError(
                f"arm {self.name} {'ended' if in_time else 'gave no answer'}; its log ends:\n{tail}"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass
class Cell:
    """One arm under one load and workload: seconds per round."""

    arm: str
    load: str
    workload: str
    seconds: list[float] = field(default_factory=list)

    def report(self, without_lora: Sequence[float]) -> dict[str, Any]:
        """Figures; the ratio is the median over the rounds of this arm's time by that of `none`."""
        ratios = [own / none for own, none in zip(self.seconds, without_lora, strict=False)]
        return {
            "arm": self.arm,
            "load": self.load,
            "workload": self.workload,
            "median_s": round(statistics.median(self.seconds), 4),
            "seconds": [round(value, 4) for value in self.seconds],
            "ratio": round(statistics.median(ratios), 3) if ratios else None,
            "ratios": [round(value, 3) for value in ratios],
        }


def wait_until_idle(arms: Sequence[ArmProcess]) -> None:
    """Wait until no arm uses the processor.

    Raises:
        RuntimeError: an arm never rests, so that it would disturb the others.
    """
    deadline = time.monotonic() + IDLE_TIMEOUT_S
    while time.monotonic() < deadline:
        started, before = time.monotonic(), sum(arm.cpu_s() for arm in arms)
        time.sleep(0.25)
        if sum(arm.cpu_s() for arm in arms) - before < IDLE_CORES * (time.monotonic() - started):
            return
    raise RuntimeError(f"the engines were not idle after {IDLE_TIMEOUT_S:.0f} s without a request")


@dataclass
class Disturbance:
    """Who else used the processor while an arm ran: the waiting arms, and whatever else the machine does."""

    arms: Sequence[ArmProcess]
    wall_s: float = 0.0
    waiting_s: float = 0.0
    elsewhere_s: float = 0.0

    @contextlib.contextmanager
    def watch(self, running: ArmProcess) -> Iterator[None]:
        """Count while `running` runs."""
        waiting = [arm for arm in self.arms if arm is not running]

        def read() -> tuple[float, float, float, float]:
            busy = psutil.cpu_times()
            mine = sum(arm.cpu_s() for arm in waiting)
            return time.monotonic(), mine, running.cpu_s(), busy.user + busy.nice + busy.system

        before = read()
        yield
        wall_s, waiting_s, own_s, busy_s = (new - old for old, new in zip(before, read(), strict=True))
        self.wall_s += wall_s
        self.waiting_s += waiting_s
        self.elsewhere_s += busy_s - own_s - waiting_s

    def report(self) -> dict[str, float]:
        """Cores, on average over all runs."""
        return {
            "cores_used_by_waiting_arms": round(self.waiting_s / self.wall_s, 3),
            "cores_used_elsewhere": round(self.elsewhere_s / self.wall_s, 3),
        }


def run_rounds(
    arms: Sequence[ArmProcess], loads: Sequence[str], rounds: int
) -> tuple[list[Cell], Disturbance]:
    """All cells in turn, every other round backwards, after one round that does not count."""
    cells = [
        (arm, Cell(arm.name, load, workload))
        for workload in WORKLOADS
        for load in loads
        for arm in arms
        if load == "base" or ARMS[arm.name].lora
    ]
    disturbance = Disturbance(arms)
    every_s = 0.5 if sys.stderr.isatty() else 30.0  # a log file gets few lines
    with tqdm(total=(rounds + 1) * len(cells), desc="runs", mininterval=every_s) as bar:
        for number in range(rounds + 1):
            for arm, cell in cells if number % 2 else reversed(cells):
                wait_until_idle(arms)
                with disturbance.watch(arm):
                    seconds = arm.measure(cell.load, cell.workload, seed=number)
                if number:
                    cell.seconds.append(seconds)
                bar.update()
    return [cell for _, cell in cells], disturbance


def make_loads(base: Path, names: Sequence[str]) -> dict[str, list[tuple[int, str]]]:
    """The adapters of each load as (id, folder), made where they are missing."""
    adapters = base.parent / "adapters"

    def folders(first_id: int, ranks: Sequence[int]) -> list[tuple[int, str]]:
        return [
            (i, str(make_random_adapter(adapters / f"r{rank}-{i}", base, rank, seed=i)))
            for i, rank in enumerate(ranks, start=first_id)
        ]

    loads: dict[str, list[tuple[int, str]]] = {}
    if "base" in names:
        loads["base"] = []
    if "one" in names:
        loads["one"] = folders(1, [8])
    if "eight" in names:
        loads["eight"] = folders(1, [8] * MAX_LORAS)
    if "mixed" in names:
        loads["mixed"] = folders(1 + MAX_LORAS, MIXED_RANKS)
    return loads


def engine_settings(name: str, base: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for one arm."""
    settings = {
        "model": str(base),
        "dtype": args.dtype,
        "enforce_eager": args.eager or ARMS[name].eager,
        "enable_prefix_caching": False,
        "max_model_len": 1024,
        "max_num_batched_tokens": 2048,
    }
    if ARMS[name].lora:
        settings |= {
            "enable_lora": True,
            "max_loras": MAX_LORAS,
            "max_cpu_loras": 2 * MAX_LORAS,
            "max_lora_rank": args.max_lora_rank,
        }
    return settings


def report_table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """One row per cell."""
    table = Table("workload", "load", "arm", "median s", "min", "max", "ratio to none", title=title)
    for row in rows:
        seconds = [f"{value:.3f}" for value in (row["median_s"], min(row["seconds"]), max(row["seconds"]))]
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
        table.add_row(row["workload"], row["load"], row["arm"], *seconds, ratio)
    return table


def read_args(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, with lists for --arms and --loads."""
    parser = argparse.ArgumentParser(
        prog="bench_lora_tax", description="What LoRA costs.", allow_abbrev=False
    )
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-0.5b")
    parser.add_argument("--rounds", type=int, default=5, help="after one that does not count")
    parser.add_argument("--arms", default="none,stock,ours", help=f"of {','.join(ARMS)}")
    parser.add_argument("--loads", default=",".join(LOADS), help=f"of {','.join(LOADS)}")
    parser.add_argument("--work-dir", type=Path, default=Path(".cache/benchmarks"))
    parser.add_argument("--json-out", type=Path, help="also write the JSON line to this file")
    parser.add_argument("--max-lora-rank", type=int, default=max(MIXED_RANKS))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", action="store_true", help="no arm compiles: quick, for a test")
    args = parser.parse_args(argv)
    args.arms, args.loads = args.arms.split(","), args.loads.split(",")
    if args.rounds < 1 or not set(args.arms) <= set(ARMS) or not set(args.loads) <= set(LOADS):
        parser.error("an arm or a load is unknown, or there is no round")
    if "mixed" in args.loads and args.max_lora_rank < max(MIXED_RANKS):
        parser.error(f"the load `mixed` needs --max-lora-rank {max(MIXED_RANKS)}")
    return args


def main(argv: Sequence[str]) -> None:
    """Run all arms, print the table and, last, one JSON line."""
    args = read_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    work_dir = args.work_dir.resolve() / args.shape
    base = make_random_base(work_dir / "base", args.shape)
    loads = make_loads(base, args.loads)
    with contextlib.ExitStack() as stack:
        arms = []
        for name in args.arms:
            print(f"starting {name}", file=sys.stderr)
            setup = {
                "engine": engine_settings(name, base, args),
                "loads": loads if ARMS[name].lora else {"base": []},
                "vocabulary": SHAPES[args.shape].vocabulary,
            }
            arms.append(stack.enter_context(ArmProcess(name, setup, work_dir / f"{name}.log")))
        cells, disturbance = run_rounds(arms, list(loads), args.rounds)
    without_lora = {cell.workload: cell.seconds for cell in cells if cell.arm == "none"}
    rows = [cell.report(without_lora.get(cell.workload, ())) for cell in cells]
    settings = {
        **describe_machine(),
        **{name: getattr(args, name) for name in ("shape", "rounds", "dtype", "max_lora_rank", "eager")},
        "max_loras": MAX_LORAS,
        "workloads": WORKLOADS,
        "timers_have_precedence": all(arm.has_precedence for arm in arms),
        **disturbance.report(),
    }
    Console(width=100).print(report_table(rows, f"{args.shape}, {args.dtype}, {settings['cores']} cores"))
    tell({"benchmark": "lora_tax", "settings": settings, "cells": rows}, args.json_out)


if __name__ == "__main__":
    main(sys.argv[1:])
