"""One adapter is kept busy while another is asked once: in which order do the first tokens come?"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import httpx

from tests.stock.pair import KEY, QUESTION, SEQUENCES, Server

KEEPERS = 2 * SEQUENCES  # so some always wait
_PATIENCE_S = 120.0


@dataclass
class Asked:
    """One streamed request."""

    sent: float
    first: float | None = None  # when its first token came


@dataclass
class Rivalry:
    """`busy` are the requests of the adapter that was kept busy, `late` the one of the other."""

    busy: list[Asked] = field(default_factory=list)
    late: Asked = field(default_factory=lambda: Asked(time.monotonic()))
    had_to_stop: bool = False  # `late` had no token yet when the others stopped

    @property
    def overtaken_by(self) -> int:
        """How many were asked after `late` and got their first token before it."""
        return sum(
            one.sent > self.late.sent
            and one.first is not None
            and (self.late.first is None or one.first < self.late.first)
            for one in self.busy
        )


def rivalry(server: Server, busy: str, late: str, at_least_s: float, patience: int) -> Rivalry:
    """Keep `busy` saturated for so long, then ask `late`, and go on until it has its first token.

    After `patience` requests that overtook it the others stop. They are of different lengths, or all would
    end in one step and leave a gap.
    """
    return asyncio.run(_rivalry(server, busy, late, at_least_s, patience))


async def _rivalry(server: Server, busy: str, late: str, at_least_s: float, patience: int) -> Rivalry:
    found, stopped = Rivalry(), asyncio.Event()
    limits = httpx.Limits(max_connections=None)
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(
        base_url=server.url, timeout=_PATIENCE_S, limits=limits, headers=headers
    ) as client:

        async def keep(length: int) -> None:
            while not stopped.is_set():
                found.busy.append(Asked(time.monotonic()))
                await _stream(client, busy, found.busy[-1], length)

        async with asyncio.TaskGroup() as tasks:
            for number in range(KEEPERS):
                tasks.create_task(keep(24 + 5 * number))
            while not any(one.first for one in found.busy):  # from then on it has its slot
                await asyncio.sleep(0.01)
            await asyncio.sleep(at_least_s)
            found.late = Asked(time.monotonic())
            asking = tasks.create_task(_stream(client, late, found.late, 4))
            while not asking.done() and found.late.first is None and found.overtaken_by < patience:
                await asyncio.sleep(0.01)
            found.had_to_stop = found.late.first is None
            stopped.set()
    return found


async def _stream(client: httpx.AsyncClient, model: str, asked: Asked, length: int) -> None:
    body = {"model": model, "prompt": QUESTION, "max_tokens": length, "ignore_eos": True, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if asked.first is None and line.startswith("data: "):
                asked.first = time.monotonic()
