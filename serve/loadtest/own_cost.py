"""What the load test's own client costs, the most it can do, and whether a run asked more of it.

The limit is found against a server whose delays are known (200 ms to the first chunk, 20 ms for each of 16):
the highest rate, Poisson arrivals, at which the client's p50 and p99 of TTFT, ITL, TPOT and E2EL are
within 5 % of what that server did by its own clock, and at which requests leave when they are due (p99
within 5 % of the E2EL).
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

from serve.loadtest.arrivals import arrival_times, constant_rate
from serve.loadtest.client import LoadPlan
from serve.loadtest.known_server import read_stamps
from serve.loadtest.popularity import make_popularity
from serve.loadtest.processes import run_load
from serve.loadtest.records import INTERRUPTED, Clock, RequestRecord, RunRecord, ShareCost
from serve.loadtest.stats import METRICS, percentile, values_of
from serve.loadtest.workload import Workload

FIRST_S, GAP_S, CHUNKS = 0.2, 0.02, 16
MAY_ADD = 0.05
MAY_STAND_STILL = 0.1  # of a run
_E2EL_S = FIRST_S + GAP_S * (CHUNKS - 1)
BUSY = 0.3  # of a core; below that no client was ever at its limit on an idle machine
_REMEMBERED_S = 30 * 24 * 3600.0
_LEVEL_S = 3.0  # seconds of arrivals at each rate
_FIRST_RATE = 50.0
_LEAST, _MOST = 1.0, 3200.0
_STEP = 1.2  # the limit is known to this factor
_LATE_MS = 50.0  # on cores that a server shares, a request leaves a little late now and then
_CLIENT_CLOCK_MS = 10.0  # an idle event loop is up to 4 ms late (p99)
_LONG_PAUSE_S = 0.5  # shorter ones cost a run little
_TRIES = 2  # a machine that others use stumbles now and then


@dataclass(frozen=True)
class OwnCost:
    """The client in one run: shares of a core per process, times in milliseconds.

    `delay_*` is how long anything that was due in a client process waited; with the kernel's clock it
    is in no figure. `lag_p99_ms` is how much later than due requests were begun (None in a closed loop).
    """

    processes: int
    clock: Clock
    cpu_ms_per_request: float
    busiest_share: float
    delay_p50_ms: float
    delay_p99_ms: float
    lag_p99_ms: float | None


@dataclass(frozen=True)
class ClientLimit:
    """The highest rate of 16-chunk streams that leaves figures right, and how busy a process is then."""

    rate_per_s: float
    busiest_share: float
    processes: int
    bound_by: str


@dataclass(frozen=True)
class Level:
    """One rate that was tried: what the client added, as shares of what the server did."""

    rate_per_s: float
    added: dict[str, float]
    lag_p99_ms: float
    busiest_share: float
    sent_all: bool

    @property
    def broken(self) -> str:
        """The first rule that this rate breaks, or nothing."""
        if not self.sent_all:
            return "not every request was answered"
        if self.lag_p99_ms > MAY_ADD * _E2EL_S * 1e3:
            return f"requests left {self.lag_p99_ms:.0f} ms late (p99)"
        worst = max(self.added, key=lambda figure: abs(self.added[figure]))
        return f"{worst} {self.added[worst]:+.1%}" if abs(self.added[worst]) >= MAY_ADD else ""

    def __str__(self) -> str:
        added = max(self.added.values(), default=0.0)
        verdict = f": too much ({self.broken})" if self.broken else ""
        return (
            f"{self.rate_per_s:.0f} requests/s: adds {added:+.1%} at most, leaves {self.lag_p99_ms:.1f} ms "
            f"late (p99), {self.busiest_share:.0%} of a core{verdict}"
        )


def own_cost(run: RunRecord) -> OwnCost:
    """What the client spent in a run."""
    delays = [delay for cost in run.costs for delay in cost.delays_s] or [0.0]
    lags = [lag for record in run.records if (lag := record.lag_s) is not None]
    return OwnCost(
        processes=len(run.costs),
        clock=_clock(run.costs),
        cpu_ms_per_request=1e3 * sum(cost.cpu_s for cost in run.costs) / max(1, len(run.records)),
        busiest_share=max((cost.cpu_s / cost.wall_s for cost in run.costs if cost.wall_s), default=0.0),
        delay_p50_ms=1e3 * percentile(delays, 0.5),
        delay_p99_ms=1e3 * percentile(delays, 0.99),
        lag_p99_ms=1e3 * percentile(lags, 0.99) if lags else None,
    )


def client_bound(run: RunRecord, cost: OwnCost, limit: ClientLimit | None, capped: bool) -> list[str]:
    """Why the figures of a run say more about its client than about the server; empty if they do not.

    `capped`: --max-concurrency held requests back, so that leaving late is not the client's doing.
    """
    reasons = []
    good = [record for record in run.records if record.error is None]
    e2el = percentile([record.e2el_s for record in good], 0.5) if good else 0.0
    allowed_ms = max(_LATE_MS, MAY_ADD * e2el * 1e3)
    if cost.lag_p99_ms is not None and not capped and cost.lag_p99_ms > allowed_ms:
        reasons.append(f"requests left {cost.lag_p99_ms:.0f} ms later than they were due (p99)")
    allowed = 0.9 if limit is None or limit.busiest_share < BUSY else limit.busiest_share
    if cost.busiest_share > allowed:
        reasons.append(
            f"a client process used {cost.busiest_share:.0%} of a core, its limit is {allowed:.0%}"
        )
    still_s = max((_stood_still_s(share, e2el) for share in run.costs), default=0.0)
    wall_s = max((share.wall_s for share in run.costs), default=0.0)
    if good and still_s > MAY_STAND_STILL * wall_s:
        what = f"the client stood still for {still_s:.1f} s of {wall_s:.1f} s"
        reasons.append(f"{what}, each time longer than a request takes: it is too busy, or gets no processor")
    ttft = values_of(run.records, "ttft")
    waited_ms = max(_CLIENT_CLOCK_MS, MAY_ADD * percentile(ttft, 0.99) * 1e3) if ttft else math.inf
    if cost.clock == "client" and cost.delay_p99_ms > waited_ms:
        reasons.append(
            f"what was due in the client waited {cost.delay_p99_ms:.1f} ms (p99), and its own clock saw it"
        )
    return reasons


def _stood_still_s(share: ShareCost, e2el_s: float) -> float:
    """Seconds of pauses that were longer than a request takes, and long at that."""
    return sum(delay for delay in share.delays_s if delay > max(e2el_s, _LONG_PAUSE_S))


def try_rate(url: str, rate_per_s: float, processes: int) -> Level:
    """Ask the known server at one rate."""
    requests = round(rate_per_s * _LEVEL_S)
    arrivals = arrival_times(constant_rate(rate_per_s), requests, burstiness=1.0, seed=0)
    workload = Workload(make_popularity(["known"], None, "uniform"), arrivals=arrivals)
    run = run_load(LoadPlan(url, workload, requests, timeout_s=30.0, keep_text=True), processes)
    if run.ended_early == INTERRUPTED:
        raise KeyboardInterrupt
    good = [record for record in run.records if record.error is None]
    server = [as_the_server_saw(record) for record in good]
    added = {}
    for metric in METRICS if good else ():
        ours, true = values_of(good, metric), values_of(server, metric)
        for name, share in (("p50", 0.5), ("p99", 0.99)):
            added[f"{metric.upper()} {name}"] = percentile(ours, share) / percentile(true, share) - 1
    cost = own_cost(run)
    return Level(rate_per_s, added, cost.lag_p99_ms or 0.0, cost.busiest_share, len(good) == requests)


def find_limit(processes: int, on_level: Callable[[Level], None] = lambda level: None) -> ClientLimit:
    """The client's limit on this machine, in about half a minute."""
    with known_server() as url:

        def best_of_tries(rate: float) -> Level:
            for _ in range(_TRIES):
                level = try_rate(url, rate, processes)
                on_level(level)
                if not level.broken:
                    break
            return level

        held: Level | None = None
        broken: Level | None = None
        rate = _FIRST_RATE
        while _LEAST <= rate <= _MOST:
            level = best_of_tries(rate)
            held, broken = (held, level) if level.broken else (level, broken)
            if held is None:
                rate /= 2
            elif broken is None:
                rate *= 2
            elif broken.rate_per_s > held.rate_per_s * _STEP:
                rate = (held.rate_per_s * broken.rate_per_s) ** 0.5
            else:
                break
    bound_by = broken.broken if broken is not None else f"nothing yet at {_MOST:.0f} requests/s"
    if held is None:
        return ClientLimit(0.0, 0.0, processes, bound_by)
    return ClientLimit(held.rate_per_s, held.busiest_share, processes, bound_by)


def remembered_limit(processes: int) -> ClientLimit | None:
    """What was found in the last 30 days on this machine, with the same client."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        noted = json.loads(_cache_file().read_text())[_key(processes)]
        if 0 <= time.time() - noted.pop("found_at") < _REMEMBERED_S:
            return ClientLimit(**noted)
    return None


def remember_limit(limit: ClientLimit) -> None:
    """Keep it for later runs; a cache that cannot be written is done without.

    A limit at which the client was hardly busy is the doing of others on the machine, and is forgotten.
    """
    if limit.busiest_share < BUSY:
        return
    path = _cache_file()
    known: dict[str, object] = {}
    with suppress(OSError, ValueError):
        known = dict(json.loads(path.read_text()))
    known[_key(limit.processes)] = {**asdict(limit), "found_at": time.time()}
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.write_text(json.dumps(known, indent=2))
        beside.replace(path)


@contextmanager
def known_server(answers: Sequence[tuple[float, float, int]] = ((FIRST_S, GAP_S, CHUNKS),)) -> Iterator[str]:
    """The URL of a server with known delays, in a process of its own; `answers` as its program takes them."""
    code = (
        "from vllm_lora_ext.packages import claim_packages; claim_packages(); "
        "from serve.loadtest.known_server import main; main()"
    )
    arguments = [sys.executable, "-P", "-c", code, json.dumps(answers)]
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.stdin.close()


def as_the_server_saw(record: RequestRecord) -> RequestRecord:
    """The same request by the known server's clock, out of the stamps in its answer."""
    arrived_s, written = read_stamps(record.text)
    return replace(record, sent_s=arrived_s, chunks_s=tuple(written), done_s=written[-1])


def _clock(costs: Sequence[ShareCost]) -> Clock:
    return "kernel" if costs and all(cost.clock == "kernel" for cost in costs) else "client"


def _cache_file() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "vllm-lora" / "client-limits.json"


def _key(processes: int) -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    python = ".".join(map(str, sys.version_info[:2]))
    return f"{processes} processes, {cores} cores, Python {python}, openai {version('openai')}"
