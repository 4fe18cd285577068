"""The flags of `vllm-lora loadtest`, and the types of their values."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from serve.client import server_url
from serve.flags import at_least
from serve.loadtest.stats import METRICS
from serve.loadtest.workload import Length

DEFAULT_REQUESTS = 64
DEFAULT_CONCURRENCY = 8


def make_parser() -> argparse.ArgumentParser:
    """The flags, in groups."""
    parser = argparse.ArgumentParser(
        prog="vllm-lora loadtest",
        description="How many identities does a server hold, how fast, and does each stay itself? "
        "Works with every server that speaks OpenAI's protocol.",
        allow_abbrev=False,
    )
    parser.add_argument("--url", default=server_url(), help="the server (default: %(default)s)")
    parser.add_argument(
        "--models", nargs="+", metavar="NAME", help="whom to ask, the most popular first; default: all"
    )
    _add_load_flags(parser.add_argument_group("load"))
    _add_popularity_flags(parser.add_argument_group("popularity"))
    _add_prompt_flags(parser.add_argument_group("prompts and answers"))
    _add_client_flags(parser.add_argument_group("the client itself"))
    _add_question_flags(parser.add_argument_group("what is asked of the server"))
    _add_output_flags(parser.add_argument_group("output"))
    return parser


def _add_load_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--num-prompts", "--num-requests", type=at_least(1), metavar="N",
        help=f"requests in all; {DEFAULT_REQUESTS} where nothing else ends the run",
    )  # fmt: skip
    group.add_argument("--duration", type=_positive, metavar="S", help="seconds of requests")
    group.add_argument(
        "--request-rate", type=_positive_or_inf, metavar="R",
        help="open loop: so many requests a second arrive, whatever the server does; inf: all at once",
    )  # fmt: skip
    group.add_argument(
        "--burstiness", type=_positive_or_inf, default=1.0, metavar="B",
        help="of arrivals: 1 Poisson, below 1 in bursts, above 1 more even (gamma), inf constant; "
        "default: 1",
    )  # fmt: skip
    group.add_argument(
        "--ramp-up-strategy", choices=("linear", "exponential"), help="the rate changes over the run"
    )
    group.add_argument("--ramp-up-start-rps", type=_positive, metavar="R", help="rate at the start")
    group.add_argument("--ramp-up-end-rps", type=_positive, metavar="R", help="rate at the end")
    group.add_argument(
        "--max-concurrency", type=at_least(1), metavar="N",
        help=f"closed loop: so many requests in flight ({DEFAULT_CONCURRENCY}); in an open loop a bound",
    )  # fmt: skip
    group.add_argument("--trace", type=Path, metavar="FILE", help="recorded times and lengths (JSONL or CSV)")
    group.add_argument(
        "--trace-speed",
        type=_positive,
        default=1.0,
        metavar="X",
        help="so many times as fast as recorded (default: %(default)s)",
    )
    group.add_argument(
        "--warmup",
        type=at_least(0),
        default=1,
        metavar="N",
        help="requests to each model before (default: %(default)s)",
    )
    group.add_argument(
        "--seed", type=int, default=0, help="the same seed gives the same schedule (default: %(default)s)"
    )


def _add_popularity_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--lora-request-distribution", choices=("uniform", "distinct", "skewed", "weights"),
        default="uniform", help="drawn alike (default), in turn, Zipf, or as --lora-weights says",
    )  # fmt: skip
    group.add_argument(
        "--lora-zipf-alpha", type=_positive, default=1.0, metavar="A",
        help="skewed: the adapter at rank k gets a share like 1 / k^A (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--lora-weights", nargs="+", type=_weight, metavar="NAME=W", help="for weights")
    group.add_argument(
        "--base-share", type=_percent, metavar="PERCENT",
        help="requests to the base model; default: as many as one adapter gets",
    )  # fmt: skip


def _add_prompt_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--input-len",
        type=_length,
        default=Length(16, 16),
        metavar="N|A:B",
        help="tokens of a made-up prompt, about (default: %(default)s)",
    )
    group.add_argument(
        "--output-len",
        "--max-tokens",
        type=_length,
        default=Length(32, 32),
        metavar="N|A:B",
        help="tokens of an answer (default: %(default)s)",
    )
    group.add_argument("--dataset-path", type=Path, metavar="FILE", help="conversations to ask (JSONL)")
    group.add_argument(
        "--ignore-eos", action=argparse.BooleanOptionalAction,
        help="answers of full length (vLLM's extension); default: yes, but not with --check",
    )  # fmt: skip


def _add_client_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--client-processes",
        type=at_least(1),
        default=1,
        metavar="N",
        help="more of them send more (default: %(default)s)",
    )
    group.add_argument(
        "--timeout", type=_positive, default=120.0, metavar="S", help="for one request (default: %(default)s)"
    )
    group.add_argument(
        "--calibrate", action="store_true",
        help="find the highest rate at which this client adds less than 5 %%, and remember it for later runs "
        "(half a minute; needs no server)",
    )  # fmt: skip


def _add_question_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--goodput", nargs="+", type=_target, metavar="METRIC:MS",
        help=f"count requests within all of these; metrics: {', '.join(METRICS)}",
    )  # fmt: skip
    group.add_argument(
        "--check", action="store_true",
        help="compare every answer with what its model answers alone; fails if one is another model's",
    )  # fmt: skip
    group.add_argument(
        "--check-prompts",
        type=at_least(1),
        default=4,
        metavar="N",
        help="different questions (default: %(default)s)",
    )
    group.add_argument(
        "--check-max-gap", type=_positive, metavar="NATS",
        help="fail as well if an answer leaves its own where that was no near tie",
    )  # fmt: skip
    group.add_argument(
        "--lora-slots", type=at_least(1), metavar="N", help="adapters that fit; default: what the server says"
    )
    group.add_argument(
        "--victim", metavar="NAME", help="what its streams feel of others being loaded and evicted"
    )
    group.add_argument(
        "--victim-streams", type=at_least(1), default=4, metavar="N", help="at a time (default: %(default)s)"
    )
    group.add_argument(
        "--victim-rounds",
        type=at_least(2),
        default=8,
        metavar="N",
        help="pairs of quiet and disturbed windows (default: %(default)s)",
    )
    group.add_argument(
        "--victim-window",
        type=_positive,
        default=5.0,
        metavar="S",
        help="length of a window (default: %(default)s)",
    )
    group.add_argument(
        "--victim-load", nargs="+", type=Path, metavar="DIR",
        help="load and unload these folders by vLLM's API; default: ask all other adapters in turn",
    )  # fmt: skip
    group.add_argument(
        "--victim-publish", nargs="+", type=Path, metavar="DIR",
        help="publish these folders in turn as versions of one name: what a swap costs the others "
        "(with the admin key in VLLM_LORA_ADMIN_KEY)",
    )  # fmt: skip
    group.add_argument(
        "--sweep", metavar="WHAT=A,B,...",
        help="a run each for adapters=1,8,64, rate=1,2,4 or concurrency=1,8,64, and the point of saturation",
    )  # fmt: skip
    group.add_argument(
        "--prometheus", action="store_true", help="compare the server's own counters with ours"
    )


def _add_output_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--output", type=Path, metavar="DIR", help="JSON, CSV, pictures and one page of all")
    group.add_argument("--overwrite", action="store_true", help="replace an earlier result in --output")
    group.add_argument("--json", action="store_true", help="print the figures as JSON")
    group.add_argument("--dry-run", action="store_true", help="print the schedule and ask no model")
    group.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("A", "B"),
        help="two results of before, with intervals; runs nothing",
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, is {text!r}") from None


def _positive_or_inf(text: str) -> float:
    number = _number(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, is {text}")
    return number


def _positive(text: str) -> float:
    number = _positive_or_inf(text)
    if math.isinf(number):
        raise argparse.ArgumentTypeError(f"must be a number, is {text}")
    return number


def _percent(text: str) -> float:
    number = _number(text)
    if not 0 <= number <= 100:
        raise argparse.ArgumentTypeError(f"must be from 0 to 100, is {text}")
    return number


def _length(text: str) -> Length:
    least, _, most = text.partition(":")
    if not all(part.isdecimal() and len(part) < 9 for part in (least, most or least)):
        raise argparse.ArgumentTypeError(f"must be N or A:B, is {text!r}")
    length = Length(int(least), int(most or least))
    if not 1 <= length.least <= length.most:
        raise argparse.ArgumentTypeError(f"must be N or A:B with 1 <= A <= B, is {text}")
    return length


def _weight(text: str) -> tuple[str, float]:
    name, _, weight = text.rpartition("=")
    if not name or not 0 <= _number(weight) < math.inf:
        raise argparse.ArgumentTypeError(f"must be NAME=WEIGHT, is {text!r}")
    return name, _number(weight)


def _target(text: str) -> tuple[str, float]:
    metric, _, limit = text.partition(":")
    if metric not in METRICS or not 0 < _number(limit or "0") < math.inf:
        rule = f"must be METRIC:MS with one of {', '.join(METRICS)}"
        raise argparse.ArgumentTypeError(f"{rule}, is {text!r}")
    return metric, _number(limit)
