"""`vllm-lora loadtest`, or `python -m serve.loadtest`: a closed loop against a running server."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
from collections.abc import Sequence

import httpx
import openai
from rich.table import Table
from tqdm import tqdm

from serve.client import make_client, server_url
from serve.flags import at_least
from serve.loadtest.client import run_closed_loop
from serve.loadtest.stats import Percentiles, Summary, summarise_run
from serve.loadtest.workload import plan_requests
from serve.screen import screen
from vllm_lora_ext.errors import ServerFailed, ServerUnreachable
from vllm_lora_ext.exit_codes import run_command


def served_models(url: str) -> list[str]:
    """Names from `/v1/models`: the base first, then the adapters.

    Raises:
        ServerUnreachable, ServerFailed: there is no server, or it refuses.
    """
    try:
        return [model.id for model in make_client(url).models.list()]
    except openai.APIConnectionError as error:
        fix = "Start one with `vllm-lora serve`, or give --url."
        raise ServerUnreachable(url, "no server answers", fix) from error
    except openai.APIStatusError as error:
        raise ServerFailed(url, f"answers HTTP {error.status_code}", "Is OPENAI_API_KEY set?") from error
    except (openai.OpenAIError, httpx.HTTPError, ValueError, AttributeError) as error:
        rule = f"the answer cannot be read ({type(error).__name__})"
        raise ServerFailed(url, rule, "Is it an OpenAI-compatible server?") from error


def report_table(summaries: Sequence[Summary], title: str) -> Table:
    """One row per model, the whole run last. Times in milliseconds."""
    table = Table(
        "model", "done", "errors", "TTFT p50", "p99", "TPOT p50", "p99", "E2EL p50", "p99",
        "tok/s", "req/s", title=title,
    )  # fmt: skip
    for item in summaries:
        cells = [cell for value in (item.ttft, item.tpot, item.e2el) for cell in _cells(value)]
        errors = ", ".join(f"{count} x {kind}" for kind, count in item.errors.items()) or "0"
        rates = f"{item.output_tokens_per_s:.1f}", f"{item.requests_per_s:.2f}"
        table.add_row(item.name, str(item.completed), errors, *cells, *rates)
    return table


def _cells(value: Percentiles | None) -> tuple[str, str]:
    return (f"{value.p50_ms:.1f}", f"{value.p99_ms:.1f}") if value else ("-", "-")


def main(argv: Sequence[str]) -> int:
    """Run the load and print the report; 1 when a request failed."""
    parser = argparse.ArgumentParser(
        prog="vllm-lora loadtest",
        description="Closed loop: so many requests in flight, all models in turn.",
        allow_abbrev=False,
    )
    parser.add_argument("--url", default=server_url())
    parser.add_argument("--models", nargs="+", metavar="NAME", help="default: all that are served")
    parser.add_argument("--num-requests", type=at_least(1), default=64)
    parser.add_argument("--max-concurrency", type=at_least(1), default=8)
    parser.add_argument("--prompt-words", type=at_least(1), default=16)
    parser.add_argument("--max-tokens", type=at_least(1), default=32)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one request")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    args = parser.parse_args(argv)
    models = args.models or served_models(args.url)
    requests = plan_requests(models, args.num_requests, args.prompt_words, args.max_tokens, args.seed)
    with tqdm(total=len(requests), desc="load test", unit="req") as bar:

        def on_done() -> None:
            bar.update()

        run = run_closed_loop(
            args.url,
            requests,
            args.max_concurrency,
            args.timeout,
            on_done,
        )
        summaries = summarise_run(asyncio.run(run))
    if args.json:
        print(json.dumps([dataclasses.asdict(item) for item in summaries], indent=2))
    else:
        title = (
            f"{args.num_requests} requests, {args.max_concurrency} in flight, "
            f"{args.prompt_words} words in, {args.max_tokens} tokens out"
        )
        screen(stderr=False).print(report_table(summaries, title))
    return 0 if summaries[-1].completed == args.num_requests else 1


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
