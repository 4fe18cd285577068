"""How much loading an adapter disturbs the streams that run meanwhile, on a real server over HTTP.

    python -m benchmarks.bench_load_stall            # vllm-lora serve
    python -m benchmarks.bench_load_stall --stock    # plain vLLM

A load, then a quiet time of the same length in the same server, and so on.
Counted are the gaps between two tokens of the streams of which any part lies
between the start of a load and the first token of the loaded adapter; in the
quiet time the same first token is asked of an adapter that is there already.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import statistics
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.models import SHAPES, add_tokenizer, make_random_adapter, make_random_base, rank_of_size
from benchmarks.report import tell
from benchmarks.streams import Streams, Window
from serve.loadtest.stats import percentile
from serve.machine import describe_machine, take_precedence
from serve.process import ServerProcess
from vllm_lora_ext.errors import ServerFailed
from vllm_lora_ext.intake import admit
from vllm_lora_ext.store import AdapterStore

BASE_NAME = "bench-base"
SMALL_RANK, NUM_SMALL = 8, 4  # the last one answers in quiet times, the others stream
BIG_RANK = 512
THROTTLED_BYTES = 20_000_000
READ_LIMIT_BYTES_PER_S = 1_000_000
KINDS = ("rank512", "throttled")
MIN_GAPS = 500
GAP_S = 2.0  # between two windows
WARM_TOKENS = 20  # gaps before the first window, per stream
PLAIN_VLLM = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
ENVIRONMENT = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


class PlainServer(ServerProcess):
    """Plain vLLM, which has `/health` and not `/ready`."""

    def _wait_until_ready(self) -> None:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + self._ready_timeout_s
        while time.monotonic() < deadline and self._process and self._process.poll() is None:
            with (
                contextlib.suppress(urllib.error.URLError, OSError),
                opener.open(f"{self.url}/health", timeout=5) as answer,
            ):
                self._ready = answer.status == 200
                return
            time.sleep(0.2)
        raise ServerFailed("plain vLLM", "did not become ready", f"Its last lines:\n{self._log_tail()}")


@dataclass(frozen=True)
class Fleet:
    """Folders: the base, the small adapters by name, and what is loaded while they stream, by kind."""

    base: Path
    small: dict[str, Path]
    loaded: dict[str, Path]


@dataclass
class Pairs:
    """Windows of one kind of load, each followed by a quiet one."""

    kind: str
    loads: list[Window] = field(default_factory=list)
    quiet: list[Window] = field(default_factory=list)
    counted: list[int] = field(default_factory=lambda: [0, 0])

    def add(self, load: Window, quiet: Window, gaps: Sequence[tuple[float, float]]) -> None:
        """One more load and its quiet time, which have just ended."""
        self.loads.append(load)
        self.quiet.append(quiet)
        for side, window in enumerate((load, quiet)):
            self.counted[side] += len(window.gaps_ms(gaps))

    def gaps_ms(self, windows: Sequence[Window], gaps: Sequence[tuple[float, float]]) -> list[float]:
        """Milliseconds of all gaps in `windows`."""
        return [gap for window in windows for gap in window.gaps_ms(gaps)]

    def report(self, streams: Streams) -> dict[str, Any]:
        """Figures of both sides in milliseconds, and their ratios."""
        load, quiet = (
            {
                **figures(self.gaps_ms(side, streams.gaps)),
                "client_max_ms": round(max(self.gaps_ms(side, streams.ticks)), 2),
            }
            for side in (self.loads, self.quiet)
        )
        return {
            "kind": self.kind,
            "loads": len(self.loads),
            "load_s": [round(window.load_s, 3) for window in self.loads],
            "to_first_token_s": [round(window.first_token - window.start, 3) for window in self.loads],
            "load": load,
            "quiet": quiet,
            "ratio_p50": round(load["p50_ms"] / quiet["p50_ms"], 3),
            "ratio_p99": round(load["p99_ms"] / quiet["p99_ms"], 3),
        }


def figures(gaps_ms: Sequence[float]) -> dict[str, float]:
    """Number, nearest-rank percentiles and maximum."""
    return {
        "gaps": len(gaps_ms),
        "p50_ms": round(statistics.median(gaps_ms), 2),
        "p99_ms": round(percentile(gaps_ms, 0.99), 2),
        "max_ms": round(max(gaps_ms), 2),
    }


def make_fleet(work_dir: Path, shape: str) -> Fleet:
    """Everything with random weights, made where it is missing."""
    base = make_random_base(work_dir / "base", shape)
    add_tokenizer(base)
    small = {
        f"small-{i}": make_random_adapter(work_dir / "small" / f"small-{i}", base, SMALL_RANK, seed=i)
        for i in range(NUM_SMALL)
    }
    rank = rank_of_size(base, THROTTLED_BYTES, BIG_RANK)
    loaded = {
        "rank512": make_random_adapter(work_dir / "big", base, BIG_RANK, seed=100),
        "throttled": make_random_adapter(work_dir / "throttled", base, rank, seed=101),
    }
    return Fleet(base, small, loaded)


def make_server(fleet: Fleet, args: argparse.Namespace, log: Path) -> ServerProcess:
    """`vllm-lora serve`, or with --stock the same in plain vLLM; not started yet."""
    flags = [
        *("--served-model-name", BASE_NAME, "--dtype", args.dtype),
        *("--max-lora-rank", str(BIG_RANK), "--max-loras", str(NUM_SMALL + 2)),
        *("--max-cpu-loras", str(NUM_SMALL + 4)),
        *("--max-model-len", "2048", "--max-num-batched-tokens", "2048", "--no-enable-prefix-caching"),
        *(["--enforce-eager"] if args.eager else []),
    ]
    if args.stock:
        modules = [f"{name}={folder}" for name, folder in fleet.small.items()]
        flags = ["--model", str(fleet.base), "--host", "127.0.0.1", "--enable-lora", *flags]
        environment = {**ENVIRONMENT, "VLLM_PLUGINS": ""}
        return PlainServer([*flags, "--lora-modules", *modules], log, environment, command=PLAIN_VLLM)
    adapters = str(next(iter(fleet.small.values())).parent)
    environment = {
        **ENVIRONMENT,
        "PYTHONPATH": str(Path(__file__).resolve().parent / "throttle"),
        "BENCH_READ_LIMIT": str(READ_LIMIT_BYTES_PER_S),
        "BENCH_READ_MATCH": version_digest(fleet.loaded["throttled"], args.work_dir),
    }
    flags = ["--adapters", adapters, "--state-dir", str(args.work_dir / "state"), *flags]
    return ServerProcess([str(fleet.base), *flags], log, environment)


def version_digest(adapter: Path, work_dir: Path) -> str:
    """The digest that an adapter's version has in any store, and so in the path that the engine reads."""
    store = AdapterStore(work_dir / "scratch-store")
    digest = admit(adapter, store).version.digest
    store.collect(())
    return digest


@contextlib.asynccontextmanager
async def running_streams(url: str, fleet: Fleet, args: argparse.Namespace) -> AsyncIterator[Streams]:
    """Streams on the base and the small adapters in turn, warm on entry, ended on exit."""
    models = [*list(fleet.small)[:-1], BASE_NAME]
    async with Streams(url, SHAPES[args.shape].vocabulary, args.output_tokens) as streams:
        first_lengths = [args.output_tokens * (i + 1) // args.streams for i in range(args.streams)]
        tasks = [
            asyncio.create_task(streams.run_forever(models[i % len(models)], max(2, length)))
            for i, length in enumerate(first_lengths)
        ]
        tasks.append(asyncio.create_task(streams.tick_forever()))
        try:
            while len(streams.gaps) < WARM_TOKENS * args.streams:
                raise_failure(tasks)
                await asyncio.sleep(0.1)
            yield streams
            raise_failure(tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def raise_failure(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Raise what ended a stream: none ends by itself."""
    for task in tasks:
        if task.done():
            task.result()


async def measure(url: str, fleet: Fleet, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All windows of all kinds; a load and a quiet window that do not count come first."""
    quiet_model = list(fleet.small)[-1]
    async with running_streams(url, fleet, args) as streams:
        await streams.load_window("warm-up", str(fleet.small[quiet_model]))
        await streams.quiet_window(quiet_model, 1.0)
        pairs = [Pairs(kind) for kind in args.kinds]
        for pair in pairs:
            while len(pair.loads) < args.loads or min(pair.counted) < args.min_gaps:
                if len(pair.loads) == args.max_loads:
                    print(f"{pair.kind}: fewer than {args.min_gaps} gaps after --max-loads", file=sys.stderr)
                    break
                name = f"{pair.kind}-{len(pair.loads)}"
                await asyncio.sleep(GAP_S)
                load = await streams.load_window(name, str(fleet.loaded[pair.kind]))
                check_throttle(pair.kind, load, fleet)
                await asyncio.sleep(GAP_S)
                quiet = await streams.quiet_window(quiet_model, load.load_s)
                pair.add(load, quiet, streams.gaps)
                print(f"{name}: loaded in {load.load_s:.2f} s", file=sys.stderr)
        await asyncio.sleep(GAP_S)  # the last gaps end after their window
        return [pair.report(streams) for pair in pairs]


def check_throttle(kind: str, load: Window, fleet: Fleet) -> None:
    """Raises RuntimeError when the slow reader was not slow: then the patch no longer meets our reader."""
    least_s = size_bytes(fleet.loaded[kind]) / READ_LIMIT_BYTES_PER_S
    if kind == "throttled" and load.first_token - load.start < 0.9 * least_s:
        raise RuntimeError(f"read in {load.load_s:.2f} s instead of {least_s:.2f} s: see benchmarks/throttle")


def size_bytes(adapter: Path) -> int:
    """Of an adapter's weights file."""
    return (adapter / "adapter_model.safetensors").stat().st_size


def report_table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """Two rows per kind of load."""
    table = Table(
        "load", "while", "gaps", "p50 ms", "p99 ms", "max ms", "client max ms", "p99 ratio", title=title
    )
    for row in rows:
        for side in ("load", "quiet"):
            cells = [f"{row[side][name]:.1f}" for name in ("p50_ms", "p99_ms", "max_ms", "client_max_ms")]
            ratio = f"{row['ratio_p99']:.2f}" if side == "load" else ""
            table.add_row(row["kind"], side, str(row[side]["gaps"]), *cells, ratio)
    return table


def read_args(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, with a list for --kinds."""
    parser = argparse.ArgumentParser(prog="bench_load_stall", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-0.5b")
    parser.add_argument("--stock", action="store_true", help="plain vLLM; only the kind rank512")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of {','.join(KINDS)}")
    parser.add_argument("--streams", type=int, default=4, help="how many run at once")
    parser.add_argument("--output-tokens", type=int, default=1500, help="of a stream's request")
    parser.add_argument("--loads", type=int, default=5, help="of each kind, at least")
    parser.add_argument("--min-gaps", type=int, default=MIN_GAPS, help="loads are repeated until so many")
    parser.add_argument("--max-loads", type=int, default=200, help="of each kind")
    parser.add_argument("--work-dir", type=Path, default=Path(".cache/benchmarks"))
    parser.add_argument("--json-out", type=Path, help="also write the JSON line to this file")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", action="store_true", help="nothing is compiled: quick, for a test")
    args = parser.parse_args(argv)
    args.kinds = ["rank512"] if args.stock else args.kinds.split(",")
    if not set(args.kinds) <= set(KINDS):
        parser.error(f"--kinds knows {', '.join(KINDS)}")
    return args


def main(argv: Sequence[str]) -> None:
    """Start the server, run all windows, print the table and, last, one JSON line."""
    args = read_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    arm = "stock" if args.stock else "ours"
    work_dir = args.work_dir.resolve() / args.shape
    fleet = make_fleet(work_dir, args.shape)
    with make_server(fleet, args, work_dir / f"server-{arm}.log") as server:
        has_precedence = take_precedence()
        rows = asyncio.run(measure(server.url, fleet, args))
    names = ("shape", "streams", "output_tokens", "dtype", "eager")
    settings = {
        **describe_machine(),
        **{name: getattr(args, name) for name in names},
        "arm": arm,
        "client_has_precedence": has_precedence,
        "max_lora_rank": BIG_RANK,
        "adapter_bytes": {kind: size_bytes(fleet.loaded[kind]) for kind in args.kinds},
        "read_limit_bytes_per_s": READ_LIMIT_BYTES_PER_S,
    }
    Console(width=100).print(report_table(rows, f"{arm}: {args.shape}, {args.streams} streams"))
    tell({"benchmark": "load_stall", "settings": settings, "loads": rows}, args.json_out)


if __name__ == "__main__":
    main(sys.argv[1:])
