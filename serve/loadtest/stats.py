"""Figures from timestamps. Pure. Definitions as in vLLM's own benchmark:

TTFT: sent -> first chunk. ITL: between chunks. TPOT: (last chunk - first chunk) / (output tokens - 1),
undefined for one token. E2EL: sent -> last chunk. Rates are over the wall clock of the run.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from serve.loadtest.records import RequestRecord

Goodput = Mapping[str, float]  # metric -> milliseconds it may take
METRICS: Mapping[str, Callable[[RequestRecord], Sequence[float]]] = {
    "ttft": lambda record: [] if record.ttft_s is None else [record.ttft_s],
    "itl": lambda record: record.itl_s,
    "tpot": lambda record: [] if record.tpot_s is None else [record.tpot_s],
    "e2el": lambda record: [record.e2el_s],
}
SHARES = (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Percentiles:
    """Milliseconds, over `count` values."""

    p50_ms: float
    p90_ms: float
    p99_ms: float
    count: int


@dataclass(frozen=True)
class Summary:
    """One row of the report: a model, a group of models, or the whole run. None where nothing was measured.

    `goodput_per_s` are the requests per second that met every stated target.
    """

    name: str
    requests: int
    completed: int
    errors: Mapping[str, int]
    ttft: Percentiles | None
    itl: Percentiles | None
    tpot: Percentiles | None
    e2el: Percentiles | None
    prompt_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    requests_per_s: float
    goodput_per_s: float | None = None


@dataclass(frozen=True)
class Fairness:
    """How alike adapters are served, whatever their share of the requests.

    `jain_index` is over each adapter's output tokens per second of its requests' time: 1 when all are alike,
    1/n when one gets all (Jain, Chiu, Hawe 1984). The worst adapter is the one with the highest median
    TTFT; `worst_to_median` is that over the median adapter's. An adapter that was asked and never answered
    counts with no speed at all; the times are those of the others.
    """

    adapters: int
    jain_index: float
    worst: str
    worst_ttft_ms: float
    median_ttft_ms: float
    unanswered: tuple[str, ...] = ()

    @property
    def worst_to_median(self) -> float:
        """1 when the worst adapter is served like the others."""
        return self.worst_ttft_ms / self.median_ttft_ms if self.median_ttft_ms else math.nan


@dataclass(frozen=True)
class Share:
    """The base model's percentage of requests and of output tokens; the rest is the adapters'."""

    requests_percent: float
    output_tokens_percent: float


@dataclass(frozen=True)
class Figures:
    """All figures of a run. `cold`: the adapter had to be fetched, as far as a client can tell.

    The warm-up's requests are among the cold ones; `cold_in_load` are those that are not.
    """

    whole: Summary
    models: tuple[Summary, ...]
    base: Summary | None
    adapters: Summary | None
    cold: Summary | None
    cold_in_load: int
    warm: Summary | None
    fairness: Fairness | None
    base_share: Share | None


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest-rank percentile; `share` between 0 and 1."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def percentiles(seconds: Sequence[float]) -> Percentiles | None:
    """p50, p90 and p99 in milliseconds; None of nothing."""
    if not seconds:
        return None
    ordered = sorted(seconds)
    p50, p90, p99 = (percentile(ordered, share) * 1e3 for share in SHARES)
    return Percentiles(p50, p90, p99, len(ordered))


def values_of(records: Sequence[RequestRecord], metric: str) -> list[float]:
    """Seconds of one of `METRICS`, over the requests that were answered."""
    return [value for record in records if record.error is None for value in METRICS[metric](record)]


def summarise(
    name: str, records: Sequence[RequestRecord], wall_s: float, goodput: Goodput | None = None
) -> Summary:
    """Figures of some records over the wall clock of the whole run."""
    good = [record for record in records if record.error is None]
    wall_s = wall_s or math.inf
    return Summary(
        name=name,
        requests=len(records),
        completed=len(good),
        errors=dict(Counter(record.error for record in records if record.error)),
        **{metric: percentiles(values_of(good, metric)) for metric in METRICS},
        prompt_tokens=sum(record.prompt_tokens for record in good),
        output_tokens=sum(record.output_tokens for record in good),
        output_tokens_per_s=sum(record.output_tokens for record in good) / wall_s,
        requests_per_s=len(good) / wall_s,
        goodput_per_s=sum(_is_good(record, goodput) for record in good) / wall_s if goodput else None,
    )


def figures_of(
    records: Sequence[RequestRecord],
    base: str | None,
    warmup: Sequence[RequestRecord] = (),
    slots: int | None = None,
    goodput: Goodput | None = None,
    asked_before: Sequence[str] = (),
) -> Figures:
    """All figures of a run.

    The warm-up's requests count for the times of cold ones only, not for rates. `asked_before` are the
    models that were asked before the warm-up, the last one last.
    """
    wall = wall_s(records)

    def summary(name: str, some: Sequence[RequestRecord]) -> Summary | None:
        return summarise(name, some, wall, goodput) if some else None

    names = sorted({record.model for record in records})
    by_model = {name: [record for record in records if record.model == name] for name in names}
    models = tuple(summarise(name, by_model[name], wall, goodput) for name in names)
    of_base = by_model.get(base or "", [])
    of_adapters = [record for record in records if record.model != base]
    cold, warm = split_cold([*warmup, *records], base, slots, asked_before)
    of_warmup = set(map(id, warmup))
    cold_in_load = sum(id(record) not in of_warmup for record in cold)
    whole = summarise("all", records, wall, goodput)
    return Figures(
        whole=whole,
        models=models,
        base=summary(f"base model ({base})", of_base) if base else None,
        adapters=summary("adapters", of_adapters),
        cold=summary("cold", cold),
        cold_in_load=cold_in_load,
        warm=summary("warm", [record for record in warm if id(record) not in of_warmup]),
        fairness=fairness_of({name: own for name, own in by_model.items() if name != base}),
        base_share=_share_of(of_base, records) if base else None,
    )


def wall_s(records: Sequence[RequestRecord]) -> float:
    """From the first request to the last answer."""
    if not records:
        return 0.0
    return max(record.done_s for record in records) - min(record.sent_s for record in records)


def split_cold(
    records: Sequence[RequestRecord], base: str | None, slots: int | None, asked_before: Sequence[str] = ()
) -> tuple[list[RequestRecord], list[RequestRecord]]:
    """Requests of adapters, cold and warm; `asked_before` are models in the order in which they were asked.

    A request is cold if its adapter is not among the `slots` adapters that were asked last: what a server
    that evicts the least recently used one has to fetch. Without `slots` only an adapter's first one is.
    """
    recent: OrderedDict[str, None] = OrderedDict()

    def ask(model: str) -> bool:
        there = model in recent
        recent[model] = None
        recent.move_to_end(model)
        if slots is not None and len(recent) > slots:
            recent.popitem(last=False)
        return there

    for model in asked_before:
        if model != base:
            ask(model)
    cold: list[RequestRecord] = []
    warm: list[RequestRecord] = []
    for record in records:
        if record.model != base:
            (warm if ask(record.model) else cold).append(record)
    return cold, warm


def fairness_of(by_adapter: Mapping[str, Sequence[RequestRecord]]) -> Fairness | None:
    """Fairness between adapters; None with fewer than two of them, or no answer at all."""
    speeds: list[float] = []
    ttft: dict[str, float] = {}
    unanswered: list[str] = []
    for name, records in by_adapter.items():
        good = [record for record in records if record.error is None]
        first = values_of(good, "ttft")
        spent = sum(record.e2el_s for record in good)
        if first and spent > 0:
            speeds.append(sum(record.output_tokens for record in good) / spent)
            ttft[name] = percentile(first, 0.5) * 1e3
        elif not good:
            speeds.append(0.0)
            unanswered.append(name)
    if len(speeds) < 2 or not ttft:
        return None
    worst = max(ttft, key=lambda name: ttft[name])
    median = percentile(list(ttft.values()), 0.5)
    return Fairness(len(speeds), jain_index(speeds), worst, ttft[worst], median, tuple(unanswered))


def jain_index(values: Sequence[float]) -> float:
    """(sum x)^2 / (n sum x^2), between 1/n and 1."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def _is_good(record: RequestRecord, goodput: Goodput) -> bool:
    """A metric that a request does not have (TPOT of one token) is met."""
    return all(max(METRICS[metric](record), default=0.0) * 1e3 <= limit for metric, limit in goodput.items())


def _share_of(of_base: Sequence[RequestRecord], records: Sequence[RequestRecord]) -> Share | None:
    if not records:
        return None
    tokens = sum(record.output_tokens for record in records)
    return Share(
        100 * len(of_base) / len(records),
        100 * sum(record.output_tokens for record in of_base) / tokens if tokens else 0.0,
    )
