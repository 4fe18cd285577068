"""What a running server's streams feel: arrival times of their tokens, and windows of time laid over them."""

from __future__ import annotations

import asyncio
import bisect
import itertools
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import httpx
import openai

from serve.client import make_async_client

TIMEOUT_S = 600.0
PROMPT_TOKENS = 32
TICK_S = 0.01


@dataclass(frozen=True)
class Window:
    """From the start of a load, or of as long a quiet time, to a first token; monotonic seconds."""

    start: float
    first_token: float
    load_s: float

    def gaps_ms(self, gaps: Sequence[tuple[float, float]]) -> list[float]:
        """Milliseconds of the gaps that touch the window; `gaps` stand in order of their ends."""
        first = bisect.bisect_right(gaps, self.start, key=lambda gap: gap[1])
        return [(after - before) * 1e3 for before, after in gaps[first:] if before < self.first_token]


@dataclass
class Streams:
    """Requests that stream all the time, each started again as it ends.

    `gaps` are (previous token's arrival, next token's arrival) of all streams,
    within a request only: the time to a first token is no gap. `ticks` are the same of a clock in
    this process that should tick every `TICK_S`: what is long there is the client's doing.
    """

    url: str
    vocabulary: int
    output_tokens: int
    gaps: list[tuple[float, float]] = field(default_factory=list)
    ticks: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.client = make_async_client(self.url, TIMEOUT_S)
        self.control = httpx.AsyncClient(base_url=self.url, timeout=TIMEOUT_S, trust_env=False)
        self._chance = random.Random(0)

    async def __aenter__(self) -> Streams:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()
        await self.control.aclose()

    async def run_forever(self, model: str, first_output_tokens: int) -> None:
        """One stream; its first request is shorter or longer, so that not all streams end at once."""
        for length in itertools.chain([first_output_tokens], itertools.repeat(self.output_tokens)):
            arrivals = self._request(model, length)
            previous = await anext(arrivals)
            async for now in arrivals:
                self.gaps.append((previous, now))
                previous = now

    async def tick_forever(self) -> None:
        """Fill `ticks`."""
        previous = time.monotonic()
        while True:
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            self.ticks.append((previous, now))
            previous = now

    async def first_token(self, model: str) -> float:
        """Arrival of the only token of a short request."""
        arrivals = [now async for now in self._request(model, 1)]
        return arrivals[0]

    async def load_window(self, name: str, folder: str) -> Window:
        """Load an adapter and ask it for one token.

        Raises:
            RuntimeError: the server refuses it.
        """
        start = time.monotonic()
        answer = await self.control.post(
            "/v1/load_lora_adapter", json={"lora_name": name, "lora_path": folder}
        )
        load_s = time.monotonic() - start
        if answer.status_code != httpx.codes.OK:
            raise RuntimeError(f"{name} was not loaded: HTTP {answer.status_code} {answer.text}")
        return Window(start, await self.first_token(name), load_s)

    async def quiet_window(self, loaded: str, load_s: float) -> Window:
        """As long as a load took, nothing is loaded; then a loaded adapter is asked for one token."""
        start = time.monotonic()
        await asyncio.sleep(load_s)
        return Window(start, await self.first_token(loaded), load_s)

    async def _request(self, model: str, output_tokens: int) -> AsyncIterator[float]:
        prompt = self._chance.choices(range(1, self.vocabulary), k=PROMPT_TOKENS)
        stream: openai.AsyncStream[openai.types.Completion] = await self.client.completions.create(
            model=model,
            prompt=prompt,
            max_tokens=output_tokens,
            temperature=0.0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        async for chunk in stream:
            if chunk.choices:
                yield time.monotonic()
