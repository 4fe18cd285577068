"""The manager: the only owner of what is in the engine's memory, and of who may use it.

A request takes a lease on its version when it is accepted, and a turn before it enters the engine. While a
version is leased or in memory the store keeps it; while it has requests in the engine it stays in memory.
The decisions are the gate's; here are the futures, the timer and the calls of the engine.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from serve.gate import Adapter, Command, Gate, Limits, Load, Start
from serve.metrics import Metrics
from serve.served import ServedVersion
from vllm_lora_ext.errors import VllmLoraError
from vllm_lora_ext.store import AdapterStore

logger = logging.getLogger("vllm.vllm_lora")

_LONGEST_DISMISSAL_S = 10.0


class AdapterEngine(Protocol):
    """What the manager asks of an engine. A handle is whatever the engine calls a loaded adapter."""

    def announce(self, version: ServedVersion) -> None:
        """Requests for `version.model` may come from now on."""

    def withdraw(self, version: ServedVersion) -> None:
        """No request for it will come."""

    async def load(self, version: ServedVersion) -> Any:
        """Bring it into memory; its handle. Raises whatever stands against it."""

    async def place(self, handle: Any) -> None:
        """Its first request is about to come: give it a slot, in pieces that hold up nobody."""

    async def unload(self, handle: Any) -> None:
        """Take it out of memory."""


class AdapterFailed(VllmLoraError):
    """The engine could not load the adapter."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"adapter {name}", f"could not be loaded: {reason}", "Publish it again.", name)


@dataclass
class _Lease:
    version: ServedVersion
    held: ExitStack
    count: int = 0
    retired: bool = False  # and nobody has accepted a request for it since


@dataclass
class Use:
    """What was made of an adapter since the server started."""

    requests: int = 0
    last_used: str | None = None
    load_seconds: float | None = None


class Manager:
    """See the module. To be used from one event loop."""

    def __init__(
        self,
        engine: AdapterEngine,
        store: AdapterStore | None,
        limits: Limits,
        metrics: Metrics,
        failed: Callable[[ServedVersion, str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.gate = Gate(limits)
        self._engine, self._store, self._metrics, self._failed = engine, store, metrics, failed
        self._clock = clock
        self._leases: dict[str, _Lease] = {}
        self._handles: dict[str, Any] = {}
        self._placing: dict[str, asyncio.Future[None]] = {}  # of those with requests in the engine
        self._uses: dict[str, Use] = {}
        self._starts: dict[int, asyncio.Future[None]] = {}  # of requests that wait
        self._numbers = itertools.count(1)
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._last_asked: float | None = None

    # Leases.

    def hold(self, version: ServedVersion) -> None:
        """Keep a version for a request, until `release`.

        Raises:
            VersionMissing, VersionDamaged: the store does not have it.
        """
        lease = self._leases.get(version.model)
        if lease is None:
            assert self._store is not None, "there are no versions without a store"
            held = ExitStack()
            held.enter_context(self._store.lease(version.version.digest))
            lease = self._leases[version.model] = _Lease(version, held)
            self._engine.announce(version)
        lease.count += 1
        lease.retired = False

    def release(self, model: str) -> None:
        """One request less."""
        lease = self._leases[model]
        lease.count -= 1
        if not lease.count and lease.retired:  # what was accepted before may have loaded it since
            self._do(self.gate.retire(model, self._clock()))
        self._let_go(model)

    def _let_go(self, model: str) -> None:
        """The store may forget a version that nobody holds and that is not in memory."""
        lease = self._leases.get(model)
        if lease is not None and not lease.count and self.gate.state_of(model) == "stored":
            del self._leases[model]
            self._engine.withdraw(lease.version)
            lease.held.close()

    # Turns.

    @asynccontextmanager
    async def turn(self, model: Adapter, counts: bool = True) -> AsyncIterator[Any]:
        """A place in the engine for one request of a leased version, or of the base; its handle.

        `counts` is off for what no client asked for.

        Raises:
            AdapterFailed: it could not be loaded.
        """
        if model is not None:
            self._hold_again(model)
        number = next(self._numbers)
        start = self._starts[number] = asyncio.get_running_loop().create_future()
        try:
            self._do(self.gate.arrive(model, number, self._clock()))
            await start
            if counts:
                self._last_asked = self._clock()
                self._note_use(model)
            yield None if model is None else await self._placed(model)
        finally:
            self._last_asked = self._clock() if counts else self._last_asked
            if self._starts.pop(number, None) is not None:
                self._do(self.gate.leave(model, number, self._clock()))
            elif not start.cancelled() and start.exception() is None:
                self._do(self.gate.finish(model, self._clock()))
            if model is not None:
                if not self.gate.counts(model)[0] and (placing := self._placing.pop(model, None)):
                    placing.cancel()
                self.release(model)

    async def _placed(self, model: str) -> Any:
        """The handle of a loaded adapter, once it has a slot: the first that start wait for that together."""
        handle = self._handles[model]
        if model not in self._placing:
            self._placing[model] = asyncio.ensure_future(self._engine.place(handle))
        placing = self._placing[model]
        try:
            await asyncio.shield(placing)
        except Exception as error:
            if self._placing.get(model) is placing:
                del self._placing[model]  # for the next to try again
            raise AdapterFailed(model, str(error)) from error
        return handle

    def _hold_again(self, model: str) -> None:
        if model not in self._leases:
            raise AdapterFailed(model, "nobody has accepted a request for it")
        self._leases[model].count += 1

    def retire(self, model: str) -> None:
        """No new request will ask for this version: it leaves the memory after its last one."""
        if model in self._leases:
            self._leases[model].retired = True
        self._do(self.gate.retire(model, self._clock()))

    async def dismiss(self, model: str) -> None:
        """As `retire`, and wait a while until it has left, so that the store may forget it."""
        self.retire(model)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_LONGEST_DISMISSAL_S)

    async def warm_up(self, versions: Sequence[ServedVersion]) -> list[str]:
        """Load versions before anybody asks; the models of those that could not be."""
        failed = []
        for version in versions:
            try:
                await self.prove(version)
            except VllmLoraError as error:
                logger.error("Adapter %s was not loaded: %s", version.name, error)
                failed.append(version.model)
        return failed

    async def prove(self, version: ServedVersion) -> None:
        """The engine can load this version; it stays in memory while there is room.

        Raises:
            AdapterFailed, VersionMissing, VersionDamaged: it cannot.
        """
        self.hold(version)
        try:
            async with self.turn(version.model, counts=False):
                pass
        finally:
            self.release(version.model)

    @property
    def is_resting(self) -> bool:
        """Nothing is asked for, nothing is on its way, and there is room to spare."""
        gate = self.gate
        return not (gate.running or gate.waiting or self._tasks) and gate.has_room_to_spare

    @property
    def quiet_seconds(self) -> float:
        """How long no client has asked for anything, from the first look on; 0 while something runs."""
        now = self._clock()
        if self._last_asked is None or self.gate.running or self.gate.waiting:
            self._last_asked = now
        return now - self._last_asked

    async def preload(self, version: ServedVersion) -> bool:
        """Bring a version into memory before anybody asks; False if now is not the time for it.

        It is as long as the manager `is_resting`: a load takes time from requests.

        Raises:
            VersionMissing, VersionDamaged: the store does not have it.
        """
        if not self.is_resting:
            return False
        self.hold(version)
        try:
            self._do(self.gate.preload(version.model))
            if self._tasks:
                await asyncio.wait(self._tasks)
        finally:
            self.release(version.model)
        return True

    def use_of(self, name: str) -> Use:
        """What was made of an adapter, over all its versions."""
        return self._uses.get(name) or Use()

    def memory(self) -> tuple[int, int]:
        """How many adapters have a slot, and how many are in memory."""
        return len(self.gate.holders()), len(self.gate.in_memory())

    def _note_use(self, model: Adapter) -> None:
        if model is not None:
            use = self._uses.setdefault(self._leases[model].version.name, Use())
            use.requests += 1
            use.last_used = datetime.now(UTC).isoformat(timespec="seconds")

    def forget_use(self, name: str) -> None:
        """The name is gone."""
        self._uses.pop(name, None)

    # What the gate says.

    def _do(self, commands: Sequence[Command]) -> None:
        ready = deque(commands)
        while ready:
            command = ready.popleft()
            if isinstance(command, Start):
                start = self._starts.pop(command.ticket)
                if start.cancelled():  # its client has left in this very moment
                    ready += self.gate.finish(command.adapter, self._clock())
                else:
                    start.set_result(None)
            elif isinstance(command, Load):
                self._begin(self._load(command.adapter))
            else:
                self._begin(self._unload(command.adapter))
        self._set_timer()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = self._clock()
        if (tick := self.gate.next_tick(now)) is not None:
            self._timer = asyncio.get_running_loop().call_later(tick - now, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._do(self.gate.tick(self._clock()))

    async def _load(self, model: str) -> None:
        lease = self._leases.get(model)
        started = self._clock()
        if lease is None:  # everybody who asked has left meanwhile
            self._end_load(model, "nobody asks for it any more")
            return
        lease.count += 1
        try:
            self._handles[model] = await self._engine.load(lease.version)
        except Exception as error:  # whatever it is, it is this adapter's
            self._metrics.load_failed()
            self._failed(lease.version, str(error))
            self._end_load(model, str(error))
        else:
            seconds = self._clock() - started
            self._metrics.loaded(seconds)
            self._uses.setdefault(lease.version.name, Use()).load_seconds = seconds
            self._do(self.gate.loaded(model, self._clock()))
        finally:
            self.release(model)

    def _end_load(self, model: str, reason: str) -> None:
        tickets, commands = self.gate.load_failed(model, self._clock())
        for number in tickets:
            start = self._starts.pop(number)
            if not start.cancelled():
                start.set_exception(AdapterFailed(model, reason))
        self._do(commands)

    async def _unload(self, model: str) -> None:
        try:
            await self._engine.unload(self._handles.pop(model))
            self._metrics.evicted()
        except Exception:  # the engine is dead; what remains of it is not ours to tidy
            logger.exception("Adapter %s could not be taken out of memory", model)
        self._do(self.gate.unloaded(model, self._clock()))
        self._let_go(model)
