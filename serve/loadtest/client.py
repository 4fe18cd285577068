"""Sends planned requests with the official async client and takes timestamps, nothing else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import httpx
import openai

from serve.client import make_async_client
from serve.loadtest.workload import PlannedRequest


@dataclass(frozen=True)
class RequestRecord:
    """Times in seconds on one monotonic clock; `chunks_s` are the arrivals of the chunks that carry text."""

    model: str
    sent_s: float
    chunks_s: tuple[float, ...]
    done_s: float
    output_tokens: int
    error: str | None = None


async def send(client: openai.AsyncOpenAI, request: PlannedRequest) -> RequestRecord:
    """One streamed chat request; an error becomes part of the record."""
    sent, chunks, tokens = time.monotonic(), [], 0
    error = None
    try:
        stream = await client.chat.completions.create(
            model=request.model,
            messages=[{"role": "user", "content": request.prompt}],
            max_tokens=request.max_tokens,
            temperature=0.0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        async for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                chunks.append(time.monotonic())
            if chunk.usage:
                tokens = chunk.usage.completion_tokens
    except openai.APIStatusError as failure:
        error = f"HTTP {failure.status_code}"
    except (openai.OpenAIError, httpx.HTTPError, ValueError) as failure:  # also an unreadable answer
        error = type(failure).__name__
    if error is None and not tokens:
        error = "no answer"
    return RequestRecord(request.model, sent, tuple(chunks), time.monotonic(), tokens, error)


async def run_closed_loop(
    url: str,
    requests: Sequence[PlannedRequest],
    max_concurrency: int,
    timeout_s: float,
    on_done: Callable[[], None],
) -> list[RequestRecord]:
    """Keep `max_concurrency` requests in flight until all are done; `on_done` after each."""
    client = make_async_client(url, timeout_s)
    queue: Iterator[PlannedRequest] = iter(requests)
    records: list[RequestRecord] = []

    async def user() -> None:
        for request in queue:  # one iterator, shared by all users
            records.append(await send(client, request))
            on_done()

    async with client, asyncio.TaskGroup() as group:
        for _ in range(max_concurrency):
            group.create_task(user())
    return records
