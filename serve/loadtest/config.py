"""What `vllm-lora loadtest` is told. Flags are named as those of `vllm bench serve` and SGLang's."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from serve.loadtest.arrivals import Ramp, RampStrategy, constant_rate
from serve.loadtest.check import QUESTIONS
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
    victim_publish: tuple[Path, ...]
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
    parser = make_parser()
    args = parser.parse_args(list(argv))
    stated = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    _refuse_idle_flags(args, stated)
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
        victim_publish=tuple(args.victim_publish or ()),
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
        rule = "needs both --ramp-up-start-rps and --ramp-up-end-rps, and no --request-rate"
        raise BadSetting("a ramp", rule)
    if not 1e-6 < ends[0] / ends[1] < 1e6:
        raise BadSetting("a ramp", "may change the rate by a factor of a million at most")
    strategy: RampStrategy = args.ramp_up_strategy or "linear"
    return Ramp(strategy, *ends)


# What a victim's run has no use for.
_LOAD = {
    "num_prompts", "duration", "request_rate", "burstiness", "max_concurrency", "trace", "trace_speed",
    "ramp_up_strategy", "ramp_up_start_rps", "ramp_up_end_rps", "lora_request_distribution", "warmup",
    "lora_zipf_alpha", "lora_weights", "base_share", "check", "check_prompts", "check_max_gap", "goodput",
    "prometheus", "sweep", "client_processes", "lora_slots",
}  # fmt: skip
_VICTIM = {"victim_streams", "victim_rounds", "victim_window", "victim_load", "victim_publish"}
_OUTPUT = {"output", "overwrite", "json"}


def _refuse_idle_flags(args: argparse.Namespace, stated: set[str]) -> None:
    """A flag that would do nothing is a misunderstanding, and is told."""
    everything = set(vars(args))
    alone = {  # what is stated -> what may stand beside it
        "compare": _OUTPUT,
        "calibrate": {"client_processes", "json", "url"},
        "victim": everything - _LOAD - {"dry_run"},
        "dry_run": everything - {"output", "overwrite", "sweep", "prometheus", "goodput"},
    }
    for name, beside in alone.items():
        if name in stated and (idle := stated - beside - {name}):
            raise BadSetting(_flag(min(idle)), f"does nothing with {_flag(name)}", "Leave one of them out.")
    needs = {
        **dict.fromkeys(_VICTIM, "victim"),
        "check_prompts": "check",
        "check_max_gap": "check",
        "overwrite": "output",
        "trace_speed": "trace",
        "lora_weights": "lora_request_distribution",
        "lora_zipf_alpha": "lora_request_distribution",
    }
    for name in sorted(stated & set(needs)):
        if needs[name] not in stated:
            raise BadSetting(_flag(name), f"does nothing without {_flag(needs[name])}")
    made_up = "input_len" in stated and (args.dataset_path or args.trace or args.check)
    if made_up:
        raise BadSetting(
            "--input-len", "is of made-up prompts, and these come from elsewhere", "Leave it out."
        )
    is_open = args.request_rate or args.ramp_up_start_rps or (args.sweep or "").startswith("rate")
    if "burstiness" in stated and not is_open:
        raise BadSetting("--burstiness", "does nothing without --request-rate, a ramp or --sweep rate=")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _require_sense(args: argparse.Namespace, ramp: Ramp | None, sweep: Sweep | None) -> None:
    if args.num_prompts and args.duration:
        raise BadSetting("--duration", "does not go with --num-prompts", "State one of them.")
    if args.request_rate == math.inf and args.duration:
        raise BadSetting("--duration", "has no meaning when all requests come at once", "Say --num-prompts.")
    if ramp is not None and args.duration and args.duration / ramp.duration_s(1) < 1:
        raise BadSetting("--duration", f"no request arrives within {args.duration:g} s at this rate")
    if args.check and args.check_prompts > len(QUESTIONS) and args.dataset_path is None:
        rule = f"there are {len(QUESTIONS)} questions"
        raise BadSetting(f"--check-prompts {args.check_prompts}", rule, "Bring more with --dataset-path.")
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
    if args.lora_weights and args.lora_request_distribution != "weights":
        raise BadSetting("--lora-weights", "needs --lora-request-distribution weights")
    if args.lora_request_distribution == "weights" and not args.lora_weights:
        raise BadSetting("--lora-request-distribution weights", "needs --lora-weights NAME=W ...")
