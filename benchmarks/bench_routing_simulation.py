"""Routing for 64 replicas and 10,000 adapters, by the code that Ray Serve's router runs, on engines that are
simulated; against least-loaded, pure hashing and random routing.

    python -m benchmarks.bench_routing_simulation [--json-out FILE] [--requests N]

The engine is a fake. The protocol that it fakes is that of `serve/manager.py` and `serve/gate.py`:

- it runs at most `running` requests side by side; others wait in the order in which they came;
- it keeps at most `cached` adapters in memory; a request whose adapter is not there has it loaded, one load
  at a time, and requests for one adapter share one load; the least recently used that nobody uses goes;
- a request that runs takes a time that is drawn beforehand (lognormal), whichever replica it goes to.

What it leaves out: batches that slow each other down, slots below `cached`, the prefix cache, the network.
So figures of time say how policies compare, not what a fleet would do. Loads and balance are counts.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import tell
from serve.machine import describe_machine
from serve.scaleout.placement import Placement, Rules, order_of

Route = Callable[[str, Mapping[str, int], float], str]


@dataclass(frozen=True)
class World:
    """What is simulated; times in seconds. `utilisation` is of what all replicas can run."""

    replicas: int = 64
    adapters: int = 10_000
    running: int = 16
    cached: int = 64
    load_s: float = 0.25
    mean_run_s: float = 2.0
    utilisation: float = 0.6
    zipf: float = 1.0
    shift_every_s: float = 0.0  # popularity moves on by a tenth of all adapters; 0: never
    requests: int = 200_000
    warm_up: int = 40_000  # requests that are not counted
    seed: int = 0

    @property
    def rate(self) -> float:
        """Requests per second of the whole fleet."""
        return self.utilisation * self.replicas * self.running / self.mean_run_s


@dataclass(frozen=True)
class Request:
    """One request; `takes_s` once it runs."""

    number: int
    at: float
    adapter: str
    takes_s: float


@dataclass
class Fake:
    """One engine; see the module for what it fakes."""

    world: World
    memory: OrderedDict[str, int]  # adapter -> requests that run or wait with it; the oldest use first
    waiting: deque[Request]
    running: int = 0
    loads: int = 0
    loads_free_at: float = 0.0
    most: int = 0

    def arrive(self, request: Request, now: float) -> float:
        """A request is here; when its adapter is in memory (`now` if it is already)."""
        self.memory[request.adapter] = self.memory.get(request.adapter, 0) + 1
        self.memory.move_to_end(request.adapter)
        return now

    def leave(self, request: Request) -> None:
        """A request has ended."""
        self.running -= 1
        self.memory[request.adapter] -= 1


def requests_of(world: World) -> Iterator[Request]:
    """All requests in order: Poisson arrivals, Zipf popularity, durations of one distribution."""
    chance = np.random.default_rng(world.seed)
    weights = 1.0 / np.arange(1, world.adapters + 1) ** world.zipf
    weights /= weights.sum()
    at = np.cumsum(chance.exponential(1 / world.rate, world.requests))
    ranks = chance.choice(world.adapters, world.requests, p=weights)
    sigma = 0.8
    takes = chance.lognormal(np.log(world.mean_run_s) - sigma**2 / 2, sigma, world.requests)
    for number in range(world.requests):
        moved = int(at[number] // world.shift_every_s) if world.shift_every_s else 0
        adapter = (int(ranks[number]) + moved * world.adapters // 10) % world.adapters
        yield Request(number, float(at[number]), f"{adapter:012x}", float(takes[number]))


def routes(world: World) -> dict[str, Route]:
    """The policies, new ones for each run."""
    names = tuple(f"replica-{number:02}" for number in range(world.replicas))
    chance = random.Random(world.seed)
    placement = Placement(Rules(calm=world.running // 2))
    turn = itertools.count()

    def least_loaded(_: str, loads: Mapping[str, int], __: float) -> str:
        start = next(turn) % len(names)
        return min(names[start:] + names[:start], key=loads.__getitem__)

    def power_of_two(_: str, loads: Mapping[str, int], __: float) -> str:
        return min(chance.sample(names, 2), key=loads.__getitem__)

    return {
        "ours": lambda adapter, loads, now: placement.route(adapter, loads, now)[0],
        "least-loaded": least_loaded,
        "power-of-two": power_of_two,
        "pure-hash": lambda adapter, loads, now: order_of(adapter, names)[0],
        "random": lambda adapter, loads, now: chance.choice(names),
    }


class Simulation:
    """One policy on one stream of requests."""

    def __init__(self, world: World, route: Route) -> None:
        self.world, self._route = world, route
        names = [f"replica-{number:02}" for number in range(world.replicas)]
        self.engines = {name: Fake(world, OrderedDict(), deque()) for name in names}
        self.loads = dict.fromkeys(names, 0)
        self._events: list[tuple[float, int, str, str, Request]] = []
        self._order = itertools.count()
        self._loading: dict[tuple[str, str], list[Request]] = {}
        self.waits: list[float] = []
        self.warm = self.counted = self.counted_loads = 0
        self._area = dict.fromkeys(names, 0.0)
        self._changed = dict.fromkeys(names, 0.0)
        self._counted_from = 0.0
        self._peaks: list[float] = []
        self._places: dict[str, set[str]] = {}

    def run(self) -> dict[str, float]:
        """All requests to their end; the figures."""
        world = self.world
        for request in requests_of(world):
            self._until(request.at)
            if request.number == world.warm_up:
                self._begin_counting(request.at)
            self._arrive(request)
            if request.number >= world.warm_up and request.number % 500 == 0:
                mean = sum(self.loads.values()) / world.replicas
                self._peaks.append(max(self.loads.values()) / max(mean, 1e-9))
            end = request.at
        means = [self._mean(name, end) for name in self.loads]
        self._until(float("inf"))
        mean = sum(means) / len(means)
        waits = np.array(self.waits)
        spread = sorted(len(places) for places in self._places.values())
        return {
            "loads_per_request": self.counted_loads / self.counted,
            "warm_share": self.warm / self.counted,
            "max_over_mean_load": max(means) / mean,
            "max_over_mean_at_a_moment": float(np.mean(self._peaks)),
            "wait_p50_s": float(np.quantile(waits, 0.5)),
            "wait_p99_s": float(np.quantile(waits, 0.99)),
            "replicas_per_adapter_mean": sum(spread) / len(spread),
            "replicas_per_adapter_max": spread[-1],
        }

    def _begin_counting(self, now: float) -> None:
        self._counted_from = now
        for name in self.loads:
            self._area[name], self._changed[name] = 0.0, now

    def _mean(self, name: str, end: float) -> float:
        self._note(name, end)
        return self._area[name] / (end - self._counted_from)

    def _note(self, name: str, now: float) -> None:
        self._area[name] += self.loads[name] * (now - self._changed[name])
        self._changed[name] = now

    def _until(self, at: float) -> None:
        while self._events and self._events[0][0] <= at:
            now, _, kind, name, request = heapq.heappop(self._events)
            if kind == "loaded":
                self._loaded(name, request.adapter, now)
            else:
                self._end(name, request, now)

    def _later(self, at: float, kind: str, name: str, request: Request) -> None:
        heapq.heappush(self._events, (at, next(self._order), kind, name, request))

    def _arrive(self, request: Request) -> None:
        name = self._route(request.adapter, self.loads, request.at)
        engine, counts = self.engines[name], request.number >= self.world.warm_up
        self._note(name, request.at)
        self.loads[name] += 1
        if counts:
            self.counted += 1
            self._places.setdefault(request.adapter, set()).add(name)
        key = (name, request.adapter)
        if key in self._loading:
            self._loading[key].append(request)
            engine.arrive(request, request.at)
            return
        is_warm = request.adapter in engine.memory
        engine.arrive(request, request.at)
        if is_warm:
            self.warm += counts
            engine.waiting.append(request)
            self._start(name, request.at)
            return
        self.counted_loads += counts
        self._make_room(engine)
        engine.loads_free_at = max(engine.loads_free_at, request.at) + self.world.load_s
        self._loading[key] = [request]
        self._later(engine.loads_free_at, "loaded", name, request)

    def _make_room(self, engine: Fake) -> None:
        """More than `cached` stay only while all of them are in use."""
        for adapter in [adapter for adapter, uses in engine.memory.items() if not uses]:
            if len(engine.memory) <= self.world.cached:
                return
            del engine.memory[adapter]

    def _loaded(self, name: str, adapter: str, now: float) -> None:
        self.engines[name].waiting.extend(self._loading.pop((name, adapter)))
        self._start(name, now)

    def _start(self, name: str, now: float) -> None:
        engine = self.engines[name]
        while engine.waiting and engine.running < self.world.running:
            request = engine.waiting.popleft()
            engine.running += 1
            if request.number >= self.world.warm_up:
                self.waits.append(now - request.at)
            self._later(now + request.takes_s, "end", name, request)

    def _end(self, name: str, request: Request, now: float) -> None:
        self._note(name, now)
        self.loads[name] -= 1
        self.engines[name].leave(request)
        self._start(name, now)


def worlds(requests: int) -> dict[str, World]:
    """What is compared."""
    warm_up = requests // 5
    return {
        "zipf 1.0": World(requests=requests, warm_up=warm_up),
        "zipf 1.0, popularity shifts every 60 s": World(
            requests=requests, warm_up=warm_up, shift_every_s=60.0
        ),
        "zipf 1.4 (one adapter has a third)": World(requests=requests, warm_up=warm_up, zipf=1.4),
    }


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json-out", type=Path)
    parser.add_argument("--requests", type=int, default=200_000)
    options = parser.parse_args(argv)
    results: dict[str, Any] = {}
    for label, world in worlds(options.requests).items():
        results[label] = {"world": asdict(world), "rate_per_s": world.rate, "policies": {}}
        for policy in routes(world):
            began = time.monotonic()
            figures = Simulation(world, routes(world)[policy]).run()
            results[label]["policies"][policy] = figures
            shown = "  ".join(f"{name} {value:.3f}" for name, value in figures.items())
            print(f"{label:40} {policy:13} {shown}  [{time.monotonic() - began:.0f} s]", flush=True)
    tell({"machine": describe_machine(), "engine": "simulated", "results": results}, options.json_out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
