"""One run over as many client processes as are wanted: each sends its share, all start at one time.

A child is told its share by a pickle on stdin and gives pickles back on stdout: records as they come,
its cost last. A line on its stdin stops it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from serve.loadtest.client import LoadPlan, ShareRunner
from serve.loadtest.records import INTERRUPTED, RequestRecord, RunRecord, ShareCost

SERVER_GONE = "the server no longer takes connections"
_LEAD_S = 0.05  # from the order to start to the start
_FLUSH_EVERY_S = 0.2
_CHILD = (
    "from vllm_lora_ext.packages import claim_packages; claim_packages(); "
    "from serve.loadtest.processes import child; child()"
)

OnRecord = Callable[[RequestRecord], None]


def run_load(plan: LoadPlan, processes: int = 1, on_record: OnRecord = lambda record: None) -> RunRecord:
    """Send the plan's requests; `on_record` is called in this process for each as it ends.

    Ctrl+C, or a server that takes no more connections, ends the run early: what was measured is kept.
    """
    _allow_many_connections()
    if plan.max_concurrency is not None:
        processes = min(processes, plan.max_concurrency)
    outcome = _Outcome(on_record)
    if processes == 1:
        asyncio.run(_run_here(plan, outcome))
    else:
        _run_in_children(plan, processes, outcome)
    records = tuple(sorted(outcome.records, key=lambda record: record.sent_s))
    return RunRecord(records, tuple(outcome.costs), plan.requests, outcome.ended_early)


def _allow_many_connections() -> None:
    """As many open files as the system lets a process have; the children inherit it."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource  # not on Windows

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@dataclass
class _Outcome:
    on_record: OnRecord
    records: list[RequestRecord] = field(default_factory=list)
    costs: list[ShareCost] = field(default_factory=list)
    ended_early: str | None = None

    def add(self, record: RequestRecord) -> None:
        self.records.append(record)
        self.on_record(record)


async def _run_here(plan: LoadPlan, outcome: _Outcome) -> None:
    runner = ShareRunner(plan, 0, 1, outcome.add)
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        outcome.ended_early = INTERRUPTED
        runner.stop.set()
        loop.remove_signal_handler(signal.SIGINT)  # a second Ctrl+C ends at once

    # only the main thread of a Unix process can; elsewhere Ctrl+C ends the command
    with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
        loop.add_signal_handler(signal.SIGINT, interrupt)

    async def at_once() -> float:
        return time.monotonic() + _LEAD_S

    outcome.costs.append(await runner.run(at_once))
    if runner.server_gone:
        outcome.ended_early = SERVER_GONE


def _run_in_children(plan: LoadPlan, processes: int, outcome: _Outcome) -> None:
    messages: queue.SimpleQueue[tuple[_Child | None, Any]] = queue.SimpleQueue()
    children: list[_Child] = []
    with _interrupts_as_messages(messages):
        try:
            for share in range(processes):
                children.append(_Child(plan, share, processes))
                children[-1].listen(messages)
            _hear_children(children, messages, outcome)
        finally:
            for child in children:
                child.end()


def _hear_children(
    children: list[_Child], messages: queue.SimpleQueue[tuple[_Child | None, Any]], outcome: _Outcome
) -> None:
    running, ready = set(children), 0
    while running:
        child, message = messages.get()
        if child is None:
            _stop(running, outcome, INTERRUPTED)
        elif message == "ready":
            ready += 1
            if ready == len(children):
                start = time.monotonic() + _LEAD_S
                for each in children:
                    each.tell(start)
        elif isinstance(message, list):
            for record in message:
                outcome.add(record)
        elif isinstance(message, _Done):
            outcome.costs.append(message.cost)
            running.discard(child)
            if message.server_gone:
                _stop(running, outcome, SERVER_GONE)
        else:  # the pipe ended without a word
            running.discard(child)
            _stop(running, outcome, f"a client process ended with exit code {child.wait()}")


@contextlib.contextmanager
def _interrupts_as_messages(messages: queue.SimpleQueue[tuple[_Child | None, Any]]) -> Iterator[None]:
    """The first Ctrl+C is a message, a second one ends at once; only the main thread can have it so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def interrupted(*_: Any) -> None:
        messages.put((None, None))
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _stop(children: set[_Child], outcome: _Outcome, why: str) -> None:
    outcome.ended_early = outcome.ended_early or why
    for child in children:
        child.tell("stop")


@dataclass(frozen=True)
class _Done:
    cost: ShareCost
    server_gone: bool


class _Child:
    """A client process, seen from its parent."""

    def __init__(self, plan: LoadPlan, share: int, shares: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl+C in the terminal is the parent's to hear
        )
        self.tell((plan, share, shares))

    def tell(self, message: Any) -> None:
        """Give it one object; one that is gone hears nothing."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            pickle.dump(message, self._process.stdin)
            self._process.stdin.flush()

    def listen(self, messages: queue.SimpleQueue[tuple[_Child | None, Any]]) -> None:
        """Put what it says on `messages`, and None when it ends."""

        def read() -> None:
            assert self._process.stdout is not None
            with contextlib.suppress(EOFError, pickle.UnpicklingError, OSError):
                while True:
                    message = pickle.load(self._process.stdout)
                    messages.put((self, message))
                    if isinstance(message, _Done):
                        return
            messages.put((self, None))

        threading.Thread(target=read, daemon=True).start()

    def wait(self) -> int:
        """Its exit code."""
        return self._process.wait()

    def end(self) -> None:
        """End it, if it has not."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def child() -> None:
    """The program of a client process."""
    orders, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever prints is no answer
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent is gone
        plan, share, shares = pickle.load(orders)
        asyncio.run(_run_share(plan, share, shares, orders, answers))
    os._exit(0)  # the thread that listens for a stop still holds stdin, over which Python would stumble


async def _run_share(plan: LoadPlan, share: int, shares: int, orders: BinaryIO, answers: BinaryIO) -> None:
    def say(message: Any) -> None:
        data = memoryview(pickle.dumps(message))
        while len(data):
            data = data[answers.write(data) :]

    async def start() -> float:
        say("ready")
        told: float | str = await asyncio.to_thread(pickle.load, orders)
        if isinstance(told, str):
            runner.stop.set()
            return time.monotonic()
        threading.Thread(target=hear, daemon=True).start()
        return told

    waiting: list[RequestRecord] = []
    runner = ShareRunner(plan, share, shares, waiting.append)
    loop = asyncio.get_running_loop()

    def hear() -> None:
        with contextlib.suppress(EOFError, OSError, RuntimeError):  # also: the parent or the loop is gone
            pickle.load(orders)
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(runner.stop.set)

    async def flush() -> None:
        while True:
            await asyncio.sleep(_FLUSH_EVERY_S)
            if waiting:
                say(waiting[:])
                waiting.clear()

    flushing = asyncio.create_task(flush())
    try:
        cost = await runner.run(start)
    finally:
        flushing.cancel()
    say(waiting)
    say(_Done(cost, runner.server_gone))
