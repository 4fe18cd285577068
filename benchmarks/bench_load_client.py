"""What the load test's own client adds to the figures, against a server whose delays are known.

1. How far reported percentiles are from the known delays (many different ones), at a low rate.
2. What the client adds at rising rates, by the kernel's clock and by its own.
3. The highest rate at which it adds less than 5 %, with one client process and with two.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.report import tell
from serve.loadtest.arrivals import arrival_times, constant_rate
from serve.loadtest.client import LoadPlan
from serve.loadtest.own_cost import find_limit, known_server, try_rate
from serve.loadtest.popularity import make_popularity
from serve.loadtest.processes import run_load
from serve.loadtest.stats import METRICS, percentile, values_of
from serve.loadtest.workload import Workload
from serve.machine import describe_machine

# seconds to the first chunk, between chunks, chunks; with 15 of them no percentile lies between two
DELAYS = [(0.1 + 0.02 * number, 0.03 + 0.004 * number, 16) for number in range(15)]
SHARES = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))


def accuracy(requests: int, rate_per_s: float) -> dict[str, dict[str, float]]:
    """Metric and percentile -> reported over known, minus 1."""
    arrivals = arrival_times(constant_rate(rate_per_s), requests, burstiness=1.0, seed=0)
    workload = Workload(make_popularity(["known"], None, "uniform"), arrivals=arrivals)
    with known_server(DELAYS) as url:
        run = run_load(LoadPlan(url, workload, requests))
    known = {
        "ttft": [first for first, _, _ in DELAYS],
        "itl": [gap for _, gap, chunks in DELAYS for _ in range(chunks - 1)],
        "tpot": [gap for _, gap, _ in DELAYS],
        "e2el": [first + gap * (chunks - 1) for first, gap, chunks in DELAYS],
    }
    return {
        metric: {
            name: percentile(values_of(run.records, metric), share) / percentile(known[metric], share) - 1
            for name, share in SHARES
        }
        for metric in METRICS
    }


def added(rates: Sequence[float], clock: str) -> list[dict[str, Any]]:
    """What one process adds at each rate, by the kernel's clock or by its own."""
    reaches = mock.patch("serve.loadtest.client.kernel_clock_reaches", lambda url: clock == "kernel")
    with known_server() as url, reaches:
        levels = [try_rate(url, rate, 1) for rate in rates]
    return [{"clock": clock, **dataclasses.asdict(level), "broken": level.broken} for level in levels]


def main(argv: Sequence[str]) -> None:
    """Measure all, print it, and, last, one JSON line."""
    parser = argparse.ArgumentParser(prog="bench_load_client", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--requests", type=int, default=450, help="of the first part; a multiple of 15")
    parser.add_argument("--json-out", type=Path)
    args = parser.parse_args(argv)
    off = accuracy(args.requests, 20.0)
    for metric, shares in off.items():
        print(metric, {name: f"{value:+.2%}" for name, value in shares.items()}, file=sys.stderr)
    levels = [level for clock in ("kernel", "client") for level in added((10, 25, 50, 100), clock)]
    limits = [find_limit(n, lambda level: print(f"  {level}", file=sys.stderr)) for n in (1, 2)]
    report = {
        "benchmark": "load_client",
        **describe_machine(),
        "requests": args.requests,
        "reported_over_known_minus_1": off,
        "added": levels,
        "limits": [dataclasses.asdict(limit) for limit in limits],
    }
    tell(report, args.json_out)


if __name__ == "__main__":
    main(sys.argv[1:])
