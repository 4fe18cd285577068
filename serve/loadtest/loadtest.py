"""A load test from its config to its result: prepare, measure each run, judge it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

from serve.client import require_url, without_password
from serve.loadtest.arrivals import arrival_times, constant_rate
from serve.loadtest.check import QUESTIONS, AloneAnswer, check_answers, record_alone
from serve.loadtest.client import Exchange, LoadPlan, load_client
from serve.loadtest.config import LoadTestConfig
from serve.loadtest.counters import Count, compare_counters, read_counters
from serve.loadtest.datasets import read_conversations, read_trace
from serve.loadtest.own_cost import (
    BUSY,
    ClientLimit,
    OwnCost,
    client_bound,
    find_limit,
    own_cost,
    remember_limit,
    remembered_limit,
)
from serve.loadtest.popularity import Popularity, make_popularity
from serve.loadtest.processes import run_load
from serve.loadtest.progress import load_stage, stage, tell
from serve.loadtest.records import INTERRUPTED, RequestRecord, RunRecord
from serve.loadtest.results import LoadTestResult, RunResult
from serve.loadtest.server_facts import (
    ServedModels,
    adapter_slots,
    chosen_models,
    measure_scale,
    scrape,
    server_version,
)
from serve.loadtest.stats import figures_of
from serve.loadtest.sweep import Point, Saturation, keeping_up, run_sweep
from serve.loadtest.victim import (
    AskOthers,
    Disturbance,
    LoadOthers,
    PublishOthers,
    VictimPlan,
    VictimReport,
    run_victim,
)
from serve.loadtest.workload import Prompt, TokenScale, Workload
from serve.machine import describe_machine
from vllm_lora_ext.errors import AdapterUnknown, BadSetting, VllmLoraError

_SETTLE_S, _SETTLE_TRIES = 0.1, 20  # how long counters may move after a run


class LoadTest:
    """Everything that one call measures, against one server.

    Raises (on construction):
        ServerUnreachable, ServerFailed, AdapterUnknown, BadSetting, BadData: before any load is sent.
    """

    def __init__(self, config: LoadTestConfig) -> None:
        self.config = config
        self._notes: list[str] = []
        require_url(config.url)
        self.models: ServedModels = chosen_models(config.url, config.models, ask=not config.dry_run)
        self.prompts = self._prompts()
        self.scale, takes_ignore_eos = TokenScale(), True
        if not config.dry_run:
            self.scale, takes_ignore_eos = measure_scale(config.url, self.models.names[0])
        if config.ignore_eos and not takes_ignore_eos:
            self._notes.append("the server does not take ignore_eos: answers may be shorter than asked for")
        _require_models(self.models, config, self.prompts)
        extra = {"ignore_eos": True} if config.ignore_eos and takes_ignore_eos else {}
        self.sampling: dict[str, Any] = {"temperature": 0.0, "extra_body": extra}
        self._limit = remembered_limit(config.client_processes)
        self._slots: int | None = config.slots
        self._asked: list[str] = []  # models in the order in which they were asked before the next run
        self._alone: list[AloneAnswer] = []
        self._runs: list[RunResult] = []

    def _prompts(self) -> tuple[Prompt, ...]:
        """Those of a file. Where it names models of which none is asked, it was recorded elsewhere."""
        config = self.config
        if config.trace is not None:
            prompts = read_trace(config.trace, config.trace_speed)
        elif config.dataset is not None:
            prompts = read_conversations(config.dataset)
        else:
            return QUESTIONS[: config.check_prompts] if config.check else ()
        named = {prompt.model for prompt in prompts} - {None}
        if named and not named & set(self.models.names):
            self._notes.append(
                f"none of the models that the file names is asked ({min(map(str, named))}, ...)"
            )
            prompts = [replace(prompt, model=None) for prompt in prompts]
        return tuple(prompts)

    def run(self) -> LoadTestResult:
        """Measure; a server that fails or Ctrl+C in the middle keeps what was measured before."""
        started = datetime.now(UTC).isoformat(timespec="seconds")
        saturation: Saturation | None = None
        victim: VictimReport | None = None
        if self.config.victim is not None:
            victim = self._disturb(self.config.victim)
        elif self.config.sweep is not None:
            saturation = run_sweep(self.config.sweep, self._level, self._most())
        else:
            try:
                self._measure("run", self.workload(), self.config.max_concurrency)
            except KeyboardInterrupt:
                if not self._runs:
                    raise
                self._notes.append(f"ENDED EARLY: {INTERRUPTED}")
        return LoadTestResult(
            settings={**asdict(self.config), "url": without_password(self.config.url)},
            machine=describe_machine(),
            server={
                "url": without_password(self.config.url),
                "base_model": self.models.base,
                "adapters": len(self.models.adapters),
                "adapter_slots": self._slots,
                "version": server_version(self.config.url),
            },
            started=started,
            runs=tuple(self._runs),
            sweep=self.config.sweep.what if self.config.sweep else None,
            saturation=saturation,
            victim=victim,
            limit=self._limit,
            notes=tuple(self._notes),
        )

    def workload(
        self, adapters: int | None = None, rate_per_s: float | None = None, series: str = ""
    ) -> Workload:
        """What is asked: of the first so many adapters, at so many requests a second; None as configured."""
        config = self.config
        asked = self.models.adapters[:adapters]
        weights = {
            name: weight for name, weight in config.weights.items() if adapters is None or name in asked
        }
        base_share = config.base_share
        if base_share is None and adapters is not None and self.models.base is not None:
            assert config.sweep is not None, "levels of adapters are a sweep's"
            base_share = 1 / (
                config.sweep.levels[-1] + 1
            )  # the same at every level, or they are no comparison
        popularity = make_popularity(
            asked, self.models.base, config.distribution, config.zipf_alpha, weights, base_share
        )
        ramp = config.ramp if rate_per_s is None else constant_rate(rate_per_s)
        arrivals: Sequence[float] | None = None
        if config.trace is not None:
            arrivals = [prompt.due_s or 0.0 for prompt in self.prompts[: config.num_prompts]]
        elif ramp is not None:
            count = config.num_prompts or max(1, int((config.duration_s or 0.0) / ramp.duration_s(1)))
            arrivals = arrival_times(ramp, count, config.burstiness, config.seed)
        return Workload(
            popularity=popularity,
            input_length=config.input_length,
            output_length=config.output_length,
            seed=config.seed,
            arrivals=arrivals,
            prompts=self.prompts,
            pool=min(config.check_prompts, len(self.prompts)) if config.check else None,
            series=series,
            scale=self.scale,
        )

    def _most(self) -> float | None:
        """The highest level that makes sense: adapters that there are, requests that are sent."""
        sweep = self.config.sweep
        if sweep is not None and sweep.what == "adapters":
            return float(len(self.models.adapters))
        if sweep is not None and sweep.what == "concurrency" and self.config.num_prompts is not None:
            return float(max(self.config.num_prompts, *sweep.levels))
        return None

    def _level(self, level: float) -> Point | None:
        sweep = self.config.sweep
        assert sweep is not None
        concurrency = int(level) if sweep.what == "concurrency" else self.config.max_concurrency
        label = f"{sweep.what}={level:.4g}"
        workload = self.workload(
            adapters=int(level) if sweep.what == "adapters" else None,
            rate_per_s=level if sweep.what == "rate" else None,
            series=label,
        )
        try:
            result = self._measure(label, workload, concurrency, level)
        except VllmLoraError as error:
            if not self._runs:
                raise
            self._notes.append(f"ENDED EARLY: {label}: {error}")
            return None
        except KeyboardInterrupt:
            if not self._runs:
                raise
            self._notes.append(f"ENDED EARLY: {label}: {INTERRUPTED}")
            return None
        except Exception as error:  # a flaw of ours must not cost the levels before
            if not self._runs:
                raise
            self._notes.append(f"ENDED EARLY: {label}: {type(error).__name__}: {error}. Please report it.")
            return None
        whole = result.figures.whole
        point = Point(
            level,
            whole.output_tokens_per_s,
            errors=whole.requests - whole.completed,
            kept_up=keeping_up([record for record in result.run.records if record.error is None]),
            client_bound=bool(result.client_bound),
        )
        return None if result.ended_early else point

    def _measure(
        self, label: str, workload: Workload, concurrency: int | None, level: float | None = None
    ) -> RunResult:
        config = self.config
        warmup = self._warm_up(workload.popularity, workload)
        asked_before = self._asked[:]
        self._asked += [record.model for record in warmup]
        alone = self._record_alone(workload) if config.check else []
        before = self._still_counters() if config.prometheus else None
        plan = LoadPlan(
            url=config.url,
            workload=workload,
            requests=len(workload.arrivals) if workload.arrivals is not None else config.num_prompts,
            duration_s=config.duration_s,
            max_concurrency=concurrency,
            timeout_s=config.timeout_s,
            sampling=self.sampling,
            keep_text=config.check,
        )
        with load_stage(label, plan.requests) as on_record:
            run = run_load(plan, config.client_processes, on_record)
        self._asked += [record.model for record in run.records]
        result = RunResult(
            label=label,
            run=run,
            warmup=warmup,
            figures=figures_of(
                run.records, self.models.base, warmup, self._slots, config.goodput, asked_before
            ),
            cost=own_cost(run),
            client_bound=(),
            shares=_shares(workload.popularity),
            adapters=sum(name != self.models.base for name in workload.popularity.models),
            level=level,
            offered_per_s=_offered(workload),
            check=check_answers(run.records, alone) if config.check else None,
        )
        self._runs.append(result)  # whatever comes now, this is kept
        counters = self._counted(before, run) if before is not None and not run.ended_early else ()
        at_once = result.offered_per_s is None  # then no request has a moment at which it is due
        reasons = self._client_bound(run, result.cost, at_once or concurrency is not None)
        self._runs[-1] = replace(result, client_bound=tuple(reasons), counters=counters)
        return self._runs[-1]

    def _client_bound(self, run: RunRecord, cost: OwnCost, capped: bool) -> list[str]:
        """Where the client was busy its limit has to be known; it is found then, once for this machine."""
        if self._limit is None and cost.busiest_share > BUSY and not run.ended_early:
            tell("this client was busy: finding its limit, once for this machine (half a minute)")
            self._limit = calibrate(self.config.client_processes)
        return client_bound(run, cost, self._limit, capped)

    def _counted(self, before: dict[str, float], run: RunRecord) -> tuple[Count, ...]:
        """Both sides' counts, once the server's stand still: it counts a moment after the last byte."""
        try:
            for _ in range(_SETTLE_TRIES):
                counts = compare_counters(
                    before, read_counters(self.config.url, scrape(self.config.url)), run.records
                )
                if all(count.agrees for count in counts):
                    break
                time.sleep(_SETTLE_S)
        except VllmLoraError as error:
            self._notes.append(f"ENDED EARLY: no counters after the run: {error}")
            return ()
        return tuple(counts)

    def _still_counters(self) -> dict[str, float]:
        """The counters before a run, once they no longer move."""
        before = read_counters(self.config.url, scrape(self.config.url))
        for _ in range(_SETTLE_TRIES):
            time.sleep(_SETTLE_S)
            now = read_counters(self.config.url, scrape(self.config.url))
            if now == before:
                break
            before = now
        return before

    def _warm_up(self, popularity: Popularity, workload: Workload) -> tuple[RequestRecord, ...]:
        """Ask the models that were not asked before; then the server's slots are known."""
        names = [name for name in popularity.models if name not in self._asked]
        in_turn = [name for name in names for _ in range(self.config.warmup)]
        records: list[RequestRecord] = []
        if in_turn:
            with stage("warm-up", len(in_turn)) as step:
                records = asyncio.run(self._ask_in_turn(in_turn, replace(workload, series="warm-up"), step))
        for record in records:
            if record.error is not None:
                self._notes.append(f"warm-up of {record.model}: {record.error} {record.detail}".rstrip())
        if self._slots is None:
            self._slots = adapter_slots(self.config.url)
        return tuple(records)

    async def _ask_in_turn(self, names: Sequence[str], workload: Workload, step: Any) -> list[RequestRecord]:
        records = []
        start = time.monotonic()
        async with load_client(self.config.url, self.config.timeout_s) as (client, _):
            for index, name in enumerate(names):
                request = replace(workload.ask(index, name, index), model=name)
                exchange = Exchange(request, start, keep_text=False)
                await exchange.run(client, self.sampling, self.config.timeout_s)
                records.append(exchange.record())
                step()
        return records

    def _record_alone(self, workload: Workload) -> list[AloneAnswer]:
        """Of all models, not only of those asked: a server may mix in the weights of any that it holds."""
        if not self._alone:
            names = self.models.all_names
            requests = [workload.ask(number, "") for number in range(workload.pool or 0)]
            with stage("answers alone", len(names) * len(requests)) as step:
                self._alone = record_alone(
                    self.config.url, names, requests, self.sampling, self.config.timeout_s, step
                )
            self._asked += names
        return self._alone

    def _disturb(self, victim: str) -> VictimReport:
        config = self.config
        others = [name for name in self.models.adapters if name != victim]
        disturbance: Disturbance
        if config.victim_load:
            disturbance = LoadOthers(config.url, config.victim_load)
        elif config.victim_publish:
            disturbance = PublishOthers(config.url, config.victim_publish)
        elif len(others) < 2:
            fix = "Serve more adapters, or name folders with --victim-load or --victim-publish."
            raise BadSetting("--victim", f"needs two other adapters, {len(others)} are served", fix)
        else:
            disturbance = AskOthers(others)
        workload = replace(self.workload(), arrivals=None)
        plan = VictimPlan(
            url=config.url,
            victim=victim,
            requests=lambda index: workload.ask(index, victim, index),
            sampling=self.sampling,
            streams=config.victim_streams,
            rounds=config.victim_rounds,
            window_s=config.victim_window_s,
            timeout_s=config.timeout_s,
        )
        with stage(f"victim {victim}", 2 * config.victim_rounds) as step:
            return run_victim(plan, disturbance, step)


def calibrate(processes: int) -> ClientLimit:
    """Find the client's limit on this machine, with a line for each rate that is tried, and remember it."""
    limit = find_limit(processes, lambda level: tell(f"  {level}"))
    remember_limit(limit)
    return limit


def _require_models(models: ServedModels, config: LoadTestConfig, prompts: Sequence[Prompt]) -> None:
    named = {prompt.model for prompt in prompts if prompt.model is not None}
    if config.victim is not None:
        named.add(config.victim)
    if strangers := named - set(models.names):
        source = config.trace or config.dataset
        name = min(strangers)
        item = name if name == config.victim or source is None else f"{source}: model {name}"
        rule, known = "is not among the models that are asked", ", ".join(models.names[:20])
        raise AdapterUnknown(item, rule, f"They are: {known}.", adapter=name)
    sweep = config.sweep
    if sweep is not None and sweep.what == "adapters" and sweep.levels[-1] > len(models.adapters):
        rule = f"asks for {sweep.levels[-1]:g} adapters, {len(models.adapters)} are served"
        raise BadSetting("--sweep adapters=", rule, "Serve more of them, or ask for fewer.")


def _shares(popularity: Popularity) -> dict[str, float]:
    return dict(zip(popularity.models, popularity.shares, strict=True))


def _offered(workload: Workload) -> float | None:
    if not workload.arrivals:
        return None
    return len(workload.arrivals) / workload.arrivals[-1] if workload.arrivals[-1] > 0 else None
