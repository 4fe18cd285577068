"""What one adapter's streams feel while others are loaded and evicted.

Quiet and disturbed windows take turns. In a disturbed one the others are asked for one token each, in
turn, or loaded and unloaded by vLLM's API, or published as versions of one name; in a quiet one the victim
is asked for one token as often, so that what differs is the loading and not the asking.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import itertools
import math
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx2
import openai

from serve.admin_client import ServerAdapters
from serve.client import uses_proxy
from serve.loadtest.client import Exchange, load_client
from serve.loadtest.intervals import Ratio, percentile_ratio
from serve.loadtest.records import INTERRUPTED, RequestRecord
from serve.loadtest.stats import percentile
from serve.loadtest.workload import PlannedRequest
from vllm_lora_ext.chat_override import AS_IT_IS
from vllm_lora_ext.errors import ServerFailed, VllmLoraError
from vllm_lora_ext.sources import AdapterSource

_LOAD_TIMEOUT_S = 600.0
_PACE_S = 0.25  # between two disturbances
_SETTLE_S = 0.5  # between two windows


@dataclass(frozen=True)
class VictimPlan:
    """`requests` are the victim's, one after the other in each of `streams`; a window lasts `window_s`."""

    url: str
    victim: str
    requests: Callable[[int], PlannedRequest]
    sampling: dict[str, Any]
    streams: int
    rounds: int
    window_s: float
    timeout_s: float


@dataclass(frozen=True)
class Window:
    """Seconds after the start; `disturbances_s` are how long each took."""

    disturbed: bool
    start_s: float
    end_s: float
    disturbances_s: tuple[float, ...]


@dataclass(frozen=True)
class VictimReport:
    """Milliseconds between the victim's tokens, and their change by being disturbed."""

    victim: str
    quiet_p50_ms: float
    quiet_p99_ms: float
    disturbed_p50_ms: float
    disturbed_p99_ms: float
    p50: Ratio | None
    p99: Ratio | None
    intervals: int
    windows: tuple[Window, ...]
    window_p99_ms: tuple[float, ...]
    how: str
    errors: int
    failures: tuple[str, ...] = ()


class Disturbance(Protocol):
    """Something that makes the server load another adapter. `how` says it in words."""

    how: str

    async def __call__(self, client: openai.AsyncOpenAI) -> None:
        """Do it once.

        Raises:
            ServerFailed: the server refuses.
        """


class AskOthers:
    """Asks the others for one token each, in turn: those that are not in memory are loaded."""

    def __init__(self, others: Sequence[str]) -> None:
        self.how = f"{_counted(len(others), 'other adapter')} asked in turn"
        self._turn = itertools.cycle(others)

    async def __call__(self, client: openai.AsyncOpenAI) -> None:
        """Ask the next one."""
        await ask_one_token(client, next(self._turn))


class LoadOthers:
    """Loads folders by `/v1/load_lora_adapter`, asks each for one token, and unloads it."""

    def __init__(self, url: str, folders: Sequence[Path]) -> None:
        self.how = f"{_counted(len(folders), 'folder')} loaded and unloaded in turn"
        self._root = url.rstrip("/").removesuffix("/v1")
        self._trust_env = uses_proxy(url)
        self._turn = itertools.cycle(folders)

    async def __call__(self, client: openai.AsyncOpenAI) -> None:
        """Load, ask and unload the next one."""
        name = f"loadtest-{uuid.uuid4().hex[:12]}"
        await self._post(client, "load_lora_adapter", name, str(next(self._turn).resolve()))
        try:
            await ask_one_token(client, name)
        finally:
            await self._post(client, "unload_lora_adapter", name)

    async def _post(
        self, client: openai.AsyncOpenAI, what: str, name: str, folder: str | None = None
    ) -> None:
        body = {"lora_name": name} if folder is None else {"lora_name": name, "lora_path": folder}
        async with httpx2.AsyncClient(timeout=_LOAD_TIMEOUT_S, trust_env=self._trust_env) as control:
            answer = await control.post(f"{self._root}/v1/{what}", json=body, headers=client.auth_headers)
        if answer.status_code == httpx2.codes.NOT_FOUND:
            fix = "vLLM has it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1."
            raise ServerFailed(f"/v1/{what}", "is not there", fix)
        if answer.status_code != httpx2.codes.OK:
            raise ServerFailed(f"/v1/{what}", f"answers HTTP {answer.status_code}: {answer.text[:200]}")


class PublishOthers:
    """Publishes folders in turn as versions of one name, and asks each for one token: a swap each time."""

    def __init__(self, url: str, folders: Sequence[Path]) -> None:
        self.how = f"{_counted(len(folders), 'folder')} published in turn as versions of one name"
        self._adapters = ServerAdapters(url, os.environ.get("VLLM_LORA_ADMIN_KEY"))
        self._name = f"loadtest-{uuid.uuid4().hex[:12]}"
        self._turn = itertools.cycle(folders)
        atexit.register(self._remove)

    async def __call__(self, client: openai.AsyncOpenAI) -> None:
        """Publish and ask the next one."""
        source = AdapterSource(self._name, str(next(self._turn).resolve()))
        try:
            await asyncio.to_thread(self._adapters.publish, source, True, AS_IT_IS)
        except VllmLoraError as error:
            raise ServerFailed(str(source.path), f"cannot be published: {error}") from error
        await ask_one_token(client, self._name)

    def _remove(self) -> None:
        with contextlib.suppress(VllmLoraError):
            self._adapters.remove([self._name])


async def ask_one_token(client: openai.AsyncOpenAI, model: str) -> None:
    """One short question.

    Raises:
        ServerFailed: it is not answered.
    """
    request = PlannedRequest(0, model, ({"role": "user", "content": "Hello"},), 0, 1)
    exchange = Exchange(request, 0.0, keep_text=False)
    await exchange.run(client, {"temperature": 0.0, "extra_body": {}}, timeout_s=_LOAD_TIMEOUT_S)
    record = exchange.record()
    if record.error is not None and record.error != "no answer":  # one token may be no text
        raise ServerFailed(model, f"{record.error} {record.detail}".strip())


def run_victim(
    plan: VictimPlan, disturbance: Disturbance, on_window: Callable[[], None] = lambda: None
) -> VictimReport:
    """Stream, disturb, and compare."""
    records, windows, failures = asyncio.run(_observe(plan, disturbance, on_window))
    return report_of(plan.victim, records, windows, disturbance.how, failures)


def report_of(
    victim: str,
    records: Sequence[RequestRecord],
    windows: Sequence[Window],
    how: str,
    failures: Sequence[str] = (),
) -> VictimReport:
    """The figures of what was observed; the interval comes from resampling rounds. Pure."""
    gaps = sorted(_gaps(records))
    within = [_within(gaps, window) for window in windows]
    quiet = [own for window, own in zip(windows, within, strict=True) if not window.disturbed]
    disturbed = [own for window, own in zip(windows, within, strict=True) if window.disturbed]
    rounds = min(len(quiet), len(disturbed))
    quiet, disturbed = quiet[:rounds], disturbed[:rounds]
    quiet_all, disturbed_all = ([gap for window in side for gap in window] for side in (quiet, disturbed))
    return VictimReport(
        victim=victim,
        quiet_p50_ms=_percentile_ms(quiet_all, 0.5),
        quiet_p99_ms=_percentile_ms(quiet_all, 0.99),
        disturbed_p50_ms=_percentile_ms(disturbed_all, 0.5),
        disturbed_p99_ms=_percentile_ms(disturbed_all, 0.99),
        p50=percentile_ratio(quiet, disturbed, 0.5, paired=True),
        p99=percentile_ratio(quiet, disturbed, 0.99, paired=True),
        intervals=len(quiet_all) + len(disturbed_all),
        windows=tuple(windows),
        window_p99_ms=tuple(_percentile_ms(own, 0.99) for own in within),
        how=how,
        errors=sum(record.error is not None for record in records),
        failures=tuple(failures),
    )


async def _observe(
    plan: VictimPlan, disturbance: Disturbance, on_window: Callable[[], None]
) -> tuple[list[RequestRecord], list[Window], list[str]]:
    records: list[RequestRecord] = []
    windows: list[Window] = []
    failures: list[str] = []
    start = time.monotonic()
    async with load_client(plan.url, plan.timeout_s) as (client, _):
        numbers = itertools.count()
        stopped = asyncio.Event()
        streams = [
            asyncio.create_task(_stream(plan, client, numbers, start, records, stopped))
            for _ in range(plan.streams)
        ]
        try:
            await asyncio.sleep(2 * _SETTLE_S)
            for disturbed in [False, True] * plan.rounds:
                window = await _window(plan, client, disturbance if disturbed else None, start, failures)
                windows.append(window)
                on_window()
                if failures:
                    break
                await asyncio.sleep(_SETTLE_S)
        except asyncio.CancelledError:  # Ctrl+C: the windows that are whole are kept
            failures.append(INTERRUPTED)
            if (task := asyncio.current_task()) is not None:
                task.uncancel()
        finally:
            stopped.set()
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
    return records, windows, failures


async def _window(
    plan: VictimPlan,
    client: openai.AsyncOpenAI,
    disturbance: Disturbance | None,
    start: float,
    failures: list[str],
) -> Window:
    began = time.monotonic()
    took = []
    while (now := time.monotonic()) < began + plan.window_s:
        try:
            if disturbance is not None:
                await disturbance(client)
            else:
                await ask_one_token(client, plan.victim)
        except (ServerFailed, httpx2.HTTPError) as error:
            failures.append(str(error))
            break
        took.append(time.monotonic() - now)
        await asyncio.sleep(max(0.0, now + _PACE_S - time.monotonic()))
    return Window(disturbance is not None, began - start, time.monotonic() - start, tuple(took))


async def _stream(
    plan: VictimPlan,
    client: openai.AsyncOpenAI,
    numbers: Iterator[int],
    start: float,
    records: list[RequestRecord],
    stopped: asyncio.Event,
) -> None:
    while not stopped.is_set():
        exchange = Exchange(plan.requests(next(numbers)), start, keep_text=False)
        try:
            await exchange.run(client, plan.sampling, plan.timeout_s)
        except asyncio.CancelledError:  # cut off at the end is no error, and its chunks count
            cut = exchange.record()
            records.append(RequestRecord(cut.index, cut.model, cut.sent_s, cut.chunks_s))
            raise
        records.append(exchange.record())
        if records[-1].error is not None:
            await asyncio.sleep(_PACE_S)


def _gaps(records: Iterable[RequestRecord]) -> Iterator[tuple[float, float]]:
    for record in records:
        yield from zip(record.chunks_s, record.chunks_s[1:], strict=False)


def _within(gaps: Sequence[tuple[float, float]], window: Window) -> list[float]:
    """Intervals that touch the window, in seconds."""
    return [after - before for before, after in gaps if after > window.start_s and before < window.end_s]


def _percentile_ms(seconds: Sequence[float], share: float) -> float:
    return 1e3 * percentile(seconds, share) if seconds else math.nan


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
