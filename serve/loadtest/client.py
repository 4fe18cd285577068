"""Sends planned requests with the official async client and takes timestamps, nothing else."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2
import openai

from serve.client import make_async_client
from serve.loadtest.arrival_clock import ClockedStream, ClockedTransport, kernel_clock_reaches
from serve.loadtest.records import Clock, RequestRecord, ShareCost
from serve.loadtest.workload import PlannedRequest, Workload

CUT_OFF = "cut off"
NO_CONNECTION = ("no connection", "connection broken")
_GONE_AFTER = 5  # failed connections in a row
_PROBE_TIMEOUT_S = 5.0
_TICK_S = 0.02
_MOST_TOKENS = 1 << 31


@dataclass(frozen=True)
class LoadPlan:
    """What a client process has to know. It ends after `requests`, or `duration_s`, or with the server.

    Without arrivals in the workload `max_concurrency` requests are in flight all the time; with them it is
    a bound, or None. `sampling` goes with each request as it is.
    """

    url: str
    workload: Workload
    requests: int | None
    duration_s: float | None = None
    max_concurrency: int | None = None
    timeout_s: float = 120.0
    sampling: dict[str, Any] = field(default_factory=dict)
    keep_text: bool = False


class Exchange:
    """One request and its streamed answer, as far as they got."""

    def __init__(self, request: PlannedRequest, start_s: float, keep_text: bool) -> None:
        self._request, self._start, self._keep_text = request, start_s, keep_text
        self._begun = self._sent = self._done = time.monotonic()
        self._chunks: list[float] = []
        self._texts: list[str] = []
        self._usage: tuple[int, int] | None = None
        self._answered_by = ""
        self._finished = False
        self._error: str | None = None
        self._detail = ""

    async def run(self, client: openai.AsyncOpenAI, sampling: dict[str, Any], timeout_s: float) -> None:
        """Send it and read the answer; an error becomes part of the record.

        Raises:
            asyncio.CancelledError: as it does; the record says that it was cut off.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._converse(client, sampling)
        except asyncio.CancelledError:
            self._end(CUT_OFF, "")
            raise
        except TimeoutError:
            self._end("timeout", f"no whole answer within {timeout_s:g} s")
        except Exception as error:  # whatever the server answered, the run goes on
            self._end(error_kind(error), error_detail(error))
        else:
            if not self._finished and self._usage is None:
                kind = "cut short" if self._chunks else "no answer"
                self._end(kind, f"the stream ended after {len(self._chunks)} chunks, without a reason")

    def _end(self, error: str, detail: str) -> None:
        self._error, self._detail, self._done = error, detail, time.monotonic()

    async def _converse(self, client: openai.AsyncOpenAI, sampling: dict[str, Any]) -> None:
        self._sent = time.monotonic()
        create: Any = client.chat.completions.create  # its overloads take no mapping of options
        stream: openai.AsyncStream[Any] = await create(
            model=self._request.model,
            messages=self._request.messages,
            max_tokens=self._request.max_tokens,
            stream=True,
            stream_options={"include_usage": True},
            **sampling,
        )
        clocked = stream.response.extensions.get("network_stream")
        clock = clocked if isinstance(clocked, ClockedStream) else None
        if clock is not None:
            self._sent = clock.sent_s
        async for chunk in stream:
            self._done = clock.arrived_s if clock is not None else time.monotonic()
            if chunk.choices and (text := text_of(chunk.choices[0].delta)):
                self._chunks.append(self._done)
                if self._keep_text:
                    self._texts.append(text)
            self._finished = self._finished or any(choice.finish_reason for choice in chunk.choices or ())
            self._usage = _usage_of(chunk) or self._usage
            self._answered_by = self._answered_by or str(chunk.model or "")

    def record(self) -> RequestRecord:
        """What is known of it."""
        prompt_tokens, output_tokens = self._usage or (0, len(self._chunks))
        return RequestRecord(
            index=self._request.index,
            model=self._request.model,
            sent_s=self._sent - self._start,
            chunks_s=tuple(chunk - self._start for chunk in self._chunks),
            done_s=self._done - self._start,
            due_s=self._request.due_s,
            begun_s=self._begun - self._start,
            prompt_number=self._request.prompt_number,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            text="".join(self._texts),
            answered_by=self._answered_by,
            error=self._error,
            detail=self._detail,
        )


class ShareRunner:
    """One process's part of a plan: requests `share`, `share` + `shares`, and so on.

    `on_record` is called for each request as it ends. `stop` ends the run before its time; what is in
    flight then is recorded as cut off. `server_gone` tells that the server no longer took connections.
    """

    def __init__(
        self, plan: LoadPlan, share: int, shares: int, on_record: Callable[[RequestRecord], None]
    ) -> None:
        self._plan, self._share, self._shares = plan, share, shares
        self._on_record = on_record
        self._start = 0.0
        self._failed_in_a_row = 0
        self._time_is_up = False
        self.server_gone = False
        self.stop = asyncio.Event()

    async def run(self, start: Callable[[], Awaitable[float]]) -> ShareCost:
        """Send all of it, and tell what that cost.

        `start` is called when all is prepared, and tells when to start (`time.monotonic`).
        """
        await _prepare_client()
        async with load_client(self._plan.url, self._plan.timeout_s) as (client, clock):
            gc.collect()
            gc.freeze()  # a full collection over what was imported takes longer than a request
            self._start = await start()
            delays: list[float] = []
            ticking = asyncio.create_task(_tick(delays))
            cpu, wall = time.process_time(), time.monotonic()
            try:
                await self._until_stopped(self._send_all(client))
            finally:
                ticking.cancel()
                gc.unfreeze()
            spent = time.process_time() - cpu
            return ShareCost(spent, time.monotonic() - wall, tuple(delays), clock)

    async def _until_stopped(self, work: Any) -> None:
        working, stopping = asyncio.create_task(work), asyncio.create_task(self.stop.wait())
        limit = self._plan.duration_s
        until = None if limit is None else max(0.0, self._start + limit - time.monotonic())
        ends_by_clock = self._plan.workload.arrivals is None and until is not None
        await asyncio.wait(
            {working, stopping},
            timeout=until if ends_by_clock else None,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if not working.done() and not self.stop.is_set():  # time is up: no new ones, let the others finish
            self._time_is_up = True
            await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        if not working.cancelled() and (error := working.exception()) is not None:
            raise error

    def _own(self) -> Iterator[PlannedRequest]:
        index = self._share
        limit = self._plan.requests
        while (limit is None or index < limit) and not self._time_is_up and not self.stop.is_set():
            yield self._plan.workload.request(index)
            index += self._shares

    async def _send_all(self, client: openai.AsyncOpenAI) -> None:
        delay = self._start - time.monotonic()
        await asyncio.sleep(max(0.0, delay))
        send = self._send_open if self._plan.workload.arrivals is not None else self._send_closed
        tasks: set[asyncio.Task[None]] = set()
        try:
            await send(client, tasks)
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _send_open(self, client: openai.AsyncOpenAI, tasks: set[asyncio.Task[None]]) -> None:
        places = asyncio.Semaphore(self._concurrency or 1)
        for request in self._own():
            wait = self._start + (request.due_s or 0.0) - time.monotonic()
            if wait > 0:
                await asyncio.sleep(wait)
            if self._concurrency is not None:
                await places.acquire()
            task = asyncio.create_task(self._one(client, request))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            if self._concurrency is not None:
                task.add_done_callback(lambda _: places.release())
            else:
                await asyncio.sleep(0)  # behind time, the answers must not wait for all that is overdue

    async def _send_closed(self, client: openai.AsyncOpenAI, tasks: set[asyncio.Task[None]]) -> None:
        own = self._own()

        async def user() -> None:
            for request in own:  # one iterator, shared by all users
                await self._one(client, request)

        for _ in range(self._concurrency or 1):
            tasks.add(asyncio.create_task(user()))

    @property
    def _concurrency(self) -> int | None:
        """This share's part of the plan's."""
        whole = self._plan.max_concurrency
        return None if whole is None else len(range(self._share, whole, self._shares))

    async def _one(self, client: openai.AsyncOpenAI, request: PlannedRequest) -> None:
        exchange = Exchange(request, self._start, self._plan.keep_text)
        try:
            await exchange.run(client, self._plan.sampling, self._plan.timeout_s)
        finally:
            self._on_record(exchange.record())
        failed = exchange.record().error in NO_CONNECTION
        self._failed_in_a_row = self._failed_in_a_row + 1 if failed else 0
        if self._failed_in_a_row >= _GONE_AFTER and not self.stop.is_set():
            self._failed_in_a_row = 0
            self.server_gone = not await _answers(client)
            if self.server_gone:
                self.stop.set()


@asynccontextmanager
async def load_client(url: str, timeout_s: float) -> AsyncIterator[tuple[openai.AsyncOpenAI, Clock]]:
    """The official client, by the kernel's clock where there is one."""
    clocked = kernel_clock_reaches(url)
    transport = ClockedTransport() if clocked else None
    async with make_async_client(url, timeout_s, transport) as client:
        yield client, "kernel" if clocked else "client"


async def _prepare_client() -> None:
    """Let the official client do once what it does at its first request only, 20 ms of imports and types."""
    chunk = '{"id": "", "object": "chat.completion.chunk", "created": 0, "model": "", "choices": []}'
    body = f"data: {chunk}\n\ndata: [DONE]\n\n"
    answer = httpx2.Response(200, headers={"content-type": "text/event-stream"}, text=body)
    plan = PlannedRequest(0, "", ({"role": "user", "content": ""},), 0, 1)
    async with make_async_client("http://localhost", 1.0, httpx2.MockTransport(lambda _: answer)) as client:
        await Exchange(plan, 0.0, False).run(client, {"extra_body": {}}, 1.0)


def error_kind(error: Exception) -> str:
    """One of few words for what went wrong, to count by."""
    if isinstance(error, openai.APITimeoutError):
        return "timeout"
    if isinstance(error, openai.APIConnectionError):
        connecting = "Connect" in type(error.__cause__).__name__
        return NO_CONNECTION[0] if connecting else NO_CONNECTION[1]
    if isinstance(error, openai.APIStatusError):
        return f"HTTP {error.status_code}"
    if isinstance(error, openai.APIError):
        return "error in the stream"
    return "unreadable answer"


def error_detail(error: BaseException) -> str:
    """The words of the innermost cause, which for a connection is the system's."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error) or type(error).__name__)[:300]


def _usage_of(chunk: Any) -> tuple[int, int] | None:
    """Tokens of the prompt and of the answer; None where a server tells none, or no numbers."""
    prompt, output = (getattr(chunk.usage, name, None) for name in ("prompt_tokens", "completion_tokens"))
    if (
        type(prompt) is int
        and type(output) is int
        and 0 <= min(prompt, output) <= max(prompt, output) < _MOST_TOKENS
    ):
        return prompt, output
    return None


async def _tick(delays: list[float]) -> None:
    while True:
        due = time.monotonic() + _TICK_S
        await asyncio.sleep(_TICK_S)
        delays.append(max(0.0, time.monotonic() - due))


async def _answers(client: openai.AsyncOpenAI) -> bool:
    """Whether the server takes a connection at all: one broken adapter may break many of them."""
    try:
        await client.with_options(timeout=_PROBE_TIMEOUT_S).models.list()
    except openai.APIStatusError:
        return True
    except (openai.OpenAIError, ValueError):
        return False
    return True


def text_of(said: Any) -> str:
    """What a delta or a message says; a reasoning model's thoughts are output too."""
    more = said.model_extra or {}
    thoughts = more.get("reasoning_content") or more.get("reasoning") or ""
    return f"{thoughts}{said.content or ''}"
