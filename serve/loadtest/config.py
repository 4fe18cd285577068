"""What `vllm-lora loadtest` is told. Flags are named as those of `vllm bench serve` and SGLang's."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from serve.loadtest.arrivals import Ramp, RampStrategy, constant_rate
from serve.loadtest.flags import DEFAULT_CONCURRENCY, DEFAULT_REQUESTS, make_parser
from serve.loadtest.popularity import Distribution
from serve.loadtest.sweep import Sweep, parse_sweep
from serve.loadtest.workload import Length
from vllm_lora_ext.errors import BadSetting

RATE_SWEEP_S = 10.0  # seconds of requests at each rate


@dataclass(frozen=True)
class LoadTestConfig:
    """All settings of one call. Without a `ramp` and a trace it is a closed loop."""

    url: str
    models: tuple[str, ...]
    num_prompts: int | None
    duration_s: float | None
    ramp: Ramp | None
    burstiness: float
    max_concurrency: int | None
    distribution: Distribution
    zipf_alpha: float
    weights: Mapping[str, float]
    base_share: float | None
    input_length: Length
    output_length: Length
    dataset: Path | None
    trace: Path | None
    trace_speed: float
    ignore_eos: bool
    warmup: int
    seed: int
    timeout_s: float
    client_processes: int
    calibrate: bool
    slots: int | None
    goodput: Mapping[str, float]
    check: bool
    check_prompts: int
    check_max_gap: float | None
    victim: str | None
    victim_streams: int
    victim_rounds: int
    victim_window_s: float
    victim_load: tuple[Path, ...]
    sweep: Sweep | None
    output: Path | None
    overwrite: bool
    prometheus: bool
    json: bool
    dry_run: bool


@dataclass(frozen=True)
class Comparison:
    """`--compare A B`: two results of before, nothing is run."""

    first: Path
    second: Path
    output: Path | None
    overwrite: bool
    json: bool


def read_config(argv: Sequence[str]) -> LoadTestConfig | Comparison:
    """The config that a command line states.

    Raises:
        BadSetting: flags that do not go together.
    """
    args = make_parser().parse_args(list(argv))
    if args.compare:
        first, second = args.compare
        return Comparison(first, second, args.output, args.overwrite, args.json)
    ramp = _ramp_of(args)
    sweep = parse_sweep(args.sweep) if args.sweep else None
    _require_sense(args, ramp, sweep)
    by_rate = sweep is not None and sweep.what == "rate"
    is_open = ramp is not None or args.trace is not None or by_rate
    return LoadTestConfig(
        url=args.url,
        models=tuple(args.models or ()),
        num_prompts=args.num_prompts
        or (None if args.duration or args.trace or by_rate else DEFAULT_REQUESTS),
        duration_s=args.duration or (RATE_SWEEP_S if by_rate and not args.num_prompts else None),
        ramp=ramp,
        burstiness=args.burstiness,
        max_concurrency=args.max_concurrency or (None if is_open else DEFAULT_CONCURRENCY),
        distribution=args.lora_request_distribution,
        zipf_alpha=args.lora_zipf_alpha,
        weights=dict(args.lora_weights or ()),
        base_share=None if args.base_share is None else args.base_share / 100,
        input_length=args.input_len,
        output_length=args.output_len,
        dataset=args.dataset_path,
        trace=args.trace,
        trace_speed=args.trace_speed,
        ignore_eos=not args.check if args.ignore_eos is None else args.ignore_eos,
        warmup=args.warmup,
        seed=args.seed,
        timeout_s=args.timeout,
        client_processes=args.client_processes,
        calibrate=args.calibrate,
        slots=args.lora_slots,
        goodput=dict(args.goodput or ()),
        check=args.check,
        check_prompts=args.check_prompts,
        check_max_gap=args.check_max_gap,
        victim=args.victim,
        victim_streams=args.victim_streams,
        victim_rounds=args.victim_rounds,
        victim_window_s=args.victim_window,
        victim_load=tuple(args.victim_load or ()),
        sweep=sweep,
        output=args.output,
        overwrite=args.overwrite,
        prometheus=args.prometheus,
        json=args.json,
        dry_run=args.dry_run,
    )


def _ramp_of(args: argparse.Namespace) -> Ramp | None:
    ends = (args.ramp_up_start_rps, args.ramp_up_end_rps)
    if args.ramp_up_strategy is None and ends == (None, None):
        return None if args.request_rate is None else constant_rate(args.request_rate)
    if None in ends or args.request_rate is not None:
        rule = "needs --ramp-up-start-rps and --ramp-up-end-rps, and no --request-rate"
        raise BadSetting("--ramp-up-strategy", rule)
    strategy: RampStrategy = args.ramp_up_strategy or "linear"
    return Ramp(strategy, *ends)


def _require_sense(args: argparse.Namespace, ramp: Ramp | None, sweep: Sweep | None) -> None:
    if args.num_prompts and args.duration:
        raise BadSetting("--duration", "does not go with --num-prompts", "State one of them.")
    if ramp is not None and args.duration and args.duration / ramp.duration_s(1) < 1:
        raise BadSetting("--duration", f"no request arrives within {args.duration:g} s at this rate")
    if args.trace is not None and (
        ramp is not None or sweep is not None or args.dataset_path or args.duration
    ):
        raise BadSetting("--trace", "brings its own times and lengths", "Leave the others out.")
    if sweep is not None and sweep.what == "rate" and ramp is not None:
        raise BadSetting("--sweep rate=", "does not go with --request-rate or a ramp", "State one of them.")
    if sweep is not None and sweep.what == "concurrency" and (args.max_concurrency or ramp is not None):
        raise BadSetting("--sweep concurrency=", "does not go with --max-concurrency or a rate")
    if args.check and args.trace is not None:
        raise BadSetting("--check", "does not go with --trace, whose prompts are all different")
    if sweep is not None and args.victim:
        raise BadSetting("--victim", "does not go with --sweep", "Run them one after the other.")
    if args.lora_weights and args.lora_request_distribution != "weights":
        raise BadSetting("--lora-weights", "needs --lora-request-distribution weights")
    if args.lora_request_distribution == "weights" and not args.lora_weights:
        raise BadSetting("--lora-request-distribution weights", "needs --lora-weights NAME=W ...")
