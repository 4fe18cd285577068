"""What the server counts. All names and units are here, once, under `vllm_lora_`."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, Metric

OTHER = "other"  # the label of every adapter beyond the first `max_adapters`
_PREFIX = "vllm_lora_"
# 1 ms to 10 min. Each adapter has two histograms, so every bound here is two series per adapter.
_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180, 600)


def public_name(name: str) -> str:
    """The name that people gave: the engine's, and that of one version, have `@` and a digest behind it."""
    return name.partition("@")[0]


@dataclass(frozen=True)
class _Series:
    """What is counted for one label, looked up once."""

    label: str
    requests: Counter
    prompt_tokens: Counter
    generation_tokens: Counter
    first_token: Histogram
    latency: Histogram


class Metrics:
    """The counters of one server, for `/metrics`; its methods may be called from any thread.

    The first `max_adapters` names keep a label of their own for good, since one that comes and goes breaks
    rates; the rest share `other`. The base's names always have theirs. A name that is not served must not be
    passed as `adapter`, or clients could use the labels up: that is a `refused`. A `code` or `reason` is one
    of our own words, never a client's.
    """

    def __init__(
        self,
        max_adapters: int = 1000,
        registry: CollectorRegistry = REGISTRY,
        base_names: Collection[str] = (),
    ) -> None:
        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(_PREFIX + name, about, labels, registry=registry)

        def gauge(name: str, about: str, *labels: str) -> Gauge:
            return Gauge(_PREFIX + name, about, labels, registry=registry)

        def histogram(name: str, about: str, *labels: str) -> Histogram:
            return Histogram(_PREFIX + name, about, labels, registry=registry, buckets=_SECONDS)

        self._requests = counter("requests_total", "Requests accepted.", "adapter")
        self._errors = counter("errors_total", "Accepted requests that failed.", "adapter", "code")
        self._prompt_tokens = counter("prompt_tokens_total", "Tokens of prompts.", "adapter")
        self._generation_tokens = counter("generation_tokens_total", "Tokens generated.", "adapter")
        self._first_token = histogram(
            "time_to_first_token_seconds", "From accepting a request to its first token.", "adapter"
        )
        self._latency = histogram(
            "e2e_request_latency_seconds", "From accepting a request to its end.", "adapter"
        )
        self._load = histogram("adapter_load_seconds", "Time to get an adapter into memory.")
        self._load_failures = counter("adapter_load_failures_total", "Adapters that could not be loaded.")
        self._evictions = counter("adapter_evictions_total", "Adapters taken out of memory.")
        self._refusals = counter("refusals_total", "Requests refused before they were accepted.", "reason")
        adapters = gauge("adapters", "Adapters, each counted where it is closest to the engine.", "state")
        self._adapters = {state: adapters.labels(state) for state in ("slot", "cached", "stored")}
        self._refused = gauge("adapters_refused", "Folders whose adapter is refused; its name may be served.")
        self._proof_failed = gauge("adapters_proof_failed", "Adapters that fail their proof on this engine.")
        self._running = gauge("requests_running", "Requests in the engine.")
        self._waiting = gauge("requests_waiting", "Accepted requests that are not in the engine yet.")

        self._lock = threading.Lock()
        self._labels_left = max_adapters
        self._own = {name: self._series(name) for name in base_names}
        self._rest: _Series | None = None

    def started(self, adapter: str) -> None:
        """A request was accepted."""
        self._of(adapter).requests.inc()

    def first_token(self, adapter: str, seconds: float) -> None:
        """A request got its first token, so long after it was accepted."""
        self._of(adapter).first_token.observe(seconds)

    def finished(self, adapter: str, seconds: float) -> None:
        """A request ended well, so long after it was accepted."""
        self._of(adapter).latency.observe(seconds)

    def tokens(self, adapter: str, prompt: int, generation: int) -> None:
        """What a request took, however it ended."""
        series = self._of(adapter)
        series.prompt_tokens.inc(prompt)
        series.generation_tokens.inc(generation)

    def failed(self, adapter: str, code: str) -> None:
        """An accepted request ended with an error."""
        self._errors.labels(self._of(adapter).label, code).inc()

    def loaded(self, seconds: float) -> None:
        """An adapter was brought into memory."""
        self._load.observe(seconds)

    def load_failed(self) -> None:
        """An adapter could not be brought into memory."""
        self._load_failures.inc()

    def evicted(self) -> None:
        """An adapter was taken out of memory."""
        self._evictions.inc()

    def refused(self, reason: str) -> None:
        """A request was answered with an error before it was accepted."""
        self._refusals.labels(reason).inc()

    def adapters(self, slot: int, cached: int, stored: int) -> None:
        """So many adapters are in a slot, in memory without one, and in the store only."""
        for state, number in (("slot", slot), ("cached", cached), ("stored", stored)):
            self._adapters[state].set(number)

    def judged(self, refused: int, proof_failed: int) -> None:
        """So many folders hold an adapter that is refused, and so many adapters failed their proof."""
        self._refused.set(refused)
        self._proof_failed.set(proof_failed)

    def requests(self, running: int, waiting: int) -> None:
        """So many requests are in the engine, and wait in front of it."""
        self._running.set(running)
        self._waiting.set(waiting)

    def _of(self, adapter: str) -> _Series:
        name = public_name(adapter)
        return self._own.get(name) or self._first_of(name)

    def _first_of(self, name: str) -> _Series:
        with self._lock:
            if name in self._own:
                return self._own[name]
            if self._labels_left > 0:
                self._labels_left -= 1
                self._own[name] = self._series(name)
                return self._own[name]
            self._rest = self._rest or self._series(OTHER)
            return self._rest

    def _series(self, label: str) -> _Series:
        return _Series(
            label,
            self._requests.labels(label),
            self._prompt_tokens.labels(label),
            self._generation_tokens.labels(label),
            self._first_token.labels(label),
            self._latency.labels(label),
        )


class OneSeries:
    """Stands for vLLM's gauge `vllm:lora_requests_info`, in its place, as exactly one series.

    vLLM makes a series for every set of adapters that ever ran together, and none ever goes away; gateways
    read which of them is the latest. Here only the latest is there, with public names. It is a collector of
    its own, since a gauge that is cleared and set again has no series in between.
    """

    def __init__(self, gauge: Gauge, registry: CollectorRegistry = REGISTRY) -> None:
        (self._described,) = gauge.describe()
        self._name = self._described.name  # by it vLLM finds what it has to unregister
        self._latest: tuple[dict[str, str], float] | None = None
        registry.unregister(gauge)
        registry.register(self)

    def labels(self, **values: object) -> _OneValue:
        """The series with these values, which takes the place of the one before once it is set."""
        return _OneValue(self, {name: _public_names(str(value)) for name, value in values.items()})

    def clear(self) -> None:
        """Have no series until the next one is set."""
        self._latest = None

    def describe(self) -> Iterable[Metric]:
        """The metric without its series, as prometheus_client asks a collector."""
        return [self._described]

    def collect(self) -> Iterable[Metric]:
        """The metric with its series, as prometheus_client asks a collector."""
        about = self._described
        metric = Metric(about.name, about.documentation, about.type)
        if self._latest is not None:
            metric.add_sample(about.name, *self._latest)
        return [metric]

    def show(self, labels: dict[str, str], value: float) -> None:
        """Put this series in the place of the one before."""
        self._latest = labels, value


@dataclass(frozen=True)
class _OneValue:
    parent: OneSeries
    values: dict[str, str]

    def set(self, value: float) -> None:
        self.parent.show(self.values, float(value))

    def set_to_current_time(self) -> None:
        self.set(time.time())


def _public_names(value: str) -> str:
    return ",".join(dict.fromkeys(map(public_name, value.split(","))))
