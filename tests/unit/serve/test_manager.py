"""Leases and turns: who runs keeps what it runs on, who leaves leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serve.gate import Limits
from serve.manager import AdapterFailed, Manager
from serve.served import ServedVersion
from tests.unit.serve.front_side import (
    CountedStore,
    FakeEngine,
    Shop,
    SimulatedLoop,
    a_manager,
    a_version,
    nothing_is_held,
    run_simulated,
    spin,
)
from vllm_lora_ext.errors import VersionMissing

A, B = a_version("a"), a_version("b", "b")
NAMES = ("a", "b", "c")


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def manager(engine: FakeEngine) -> Manager:
    return a_manager(engine, CountedStore(), clock=lambda: asyncio.get_running_loop().time())


async def request(manager: Manager, version: ServedVersion, until: asyncio.Event | None = None) -> object:
    """What the front and the engine make of one request, together."""
    manager.hold(version)
    try:
        async with manager.turn(version.model) as handle:
            if until is not None:
                await until.wait()
            return handle
    finally:
        manager.release(version.model)


async def cancelled(task: asyncio.Task[object]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_a_version_is_loaded_once_however_many_ask(manager: Manager, engine: FakeEngine) -> None:
    async def work() -> None:
        engine.held[A.model] = asyncio.Event()
        tasks = [asyncio.create_task(request(manager, A)) for _ in range(20)]
        await spin()
        engine.held[A.model].set()
        assert set(await asyncio.gather(*tasks)) == {1}
        assert await request(manager, A) == 1
        assert engine.loads == [A.model]
        assert nothing_is_held(manager)

    run_simulated(work())


def test_vllm_knows_a_version_exactly_while_somebody_may_ask_for_it(
    manager: Manager, engine: FakeEngine
) -> None:
    async def work() -> None:
        manager.hold(A)
        manager.hold(A)
        assert engine.announced == [A.model]
        manager.release(A.model)
        assert engine.announced == [A.model]
        manager.release(A.model)
        assert engine.announced == []

    run_simulated(work())


def test_a_request_that_nobody_accepted_gets_no_turn(manager: Manager) -> None:
    async def work() -> None:
        with pytest.raises(AdapterFailed, match="nobody has accepted"):
            async with manager.turn(A.model):
                pass
        assert nothing_is_held(manager)

    run_simulated(work())


def test_the_base_needs_neither_lease_nor_store(engine: FakeEngine) -> None:
    async def work() -> None:
        manager = a_manager(engine, None, Limits(0, 0, 2))
        async with manager.turn(None) as handle:
            assert handle is None
            assert manager.gate.running == 1
        assert nothing_is_held(manager)

    run_simulated(work())


@pytest.mark.parametrize("moment", ["loading", "the start", "waiting"])
def test_a_client_that_leaves_before_its_start_leaves_nothing(
    moment: str, manager: Manager, engine: FakeEngine
) -> None:
    async def work() -> None:
        held = engine.held[A.model] = asyncio.Event()
        manager.gate.limits = Limits(1, 2, 1)
        if moment == "waiting":
            held.set()
            ends = asyncio.Event()
            other = asyncio.create_task(request(manager, A, ends))
            await spin()
        task = asyncio.create_task(request(manager, A))
        await spin()
        if moment == "the start":  # its turn is decided, and it has not heard of it yet
            held.set()
            while not manager.gate.running:
                await asyncio.sleep(0)
        await cancelled(task)
        if moment == "waiting":
            assert (manager.gate.running, manager.gate.waiting) == (1, 0)
            ends.set()
            await other
        held.set()
        await spin()
        assert nothing_is_held(manager)
        assert await request(manager, A) == 1, "what was loaded is used by the next"

    run_simulated(work())


def test_a_client_that_leaves_in_the_very_moment_of_its_start_starts_nothing(manager: Manager) -> None:
    async def work() -> None:
        manager.gate.limits = Limits(1, 2, 1)
        ends = asyncio.Event()
        first = asyncio.create_task(request(manager, A, ends))
        await spin()
        second = asyncio.create_task(request(manager, A))
        third = asyncio.create_task(request(manager, A))
        await spin()
        ends.set()  # gives the place to the second, which has left by then and does not know of it
        await cancelled(second)
        assert await asyncio.gather(first, third) == [1, 1]
        assert nothing_is_held(manager)

    run_simulated(work())


def test_an_adapter_has_its_slot_before_the_first_requests_of_a_burst(
    manager: Manager, engine: FakeEngine
) -> None:
    async def work() -> None:
        ends = asyncio.Event()
        engine.slots_free.clear()
        inside: list[object] = []

        async def one() -> None:
            manager.hold(A)
            try:
                async with manager.turn(A.model) as handle:
                    inside.append(handle)
                    await ends.wait()
            finally:
                manager.release(A.model)

        burst = [asyncio.create_task(one()) for _ in range(4)]
        await spin()
        assert engine.placing == [A.model] and inside == []
        await cancelled(burst.pop(0))  # type: ignore[arg-type]
        assert engine.placing == [A.model] and inside == [], "the others go on waiting for it"
        late = asyncio.create_task(one())
        await spin()
        engine.slots_free.set()
        await spin()
        assert engine.placed == [A.model] and len(inside) == 4
        ends.set()
        await asyncio.gather(*burst, late)
        assert await request(manager, A) == 1
        assert engine.placed == [A.model] * 2, "another may have had the slot meanwhile"
        assert nothing_is_held(manager)

    run_simulated(work())


def test_a_slot_that_could_not_be_given_is_told_to_those_who_waited_for_it(
    manager: Manager, engine: FakeEngine
) -> None:
    async def work() -> None:
        engine.unplaceable.add(A.model)
        burst = [asyncio.create_task(request(manager, A)) for _ in range(20)]
        await spin(5)
        engine.unplaceable.clear()
        for outcome in await asyncio.gather(*burst, return_exceptions=True):
            assert outcome == 1 or isinstance(outcome, AdapterFailed)
        assert await request(manager, A) == 1
        assert nothing_is_held(manager)

    run_simulated(work())


def test_an_adapter_that_nobody_wants_any_more_is_given_no_slot(manager: Manager, engine: FakeEngine) -> None:
    async def work() -> None:
        engine.slots_free.clear()
        burst = [asyncio.create_task(request(manager, A)) for _ in range(3)]
        await spin()
        for task in burst:
            task.cancel()
        await asyncio.gather(*burst, return_exceptions=True)
        manager.retire(A.model)
        await spin()
        engine.slots_free.set()
        await spin()
        assert engine.placed == [] and engine.memory == {}
        assert nothing_is_held(manager)

    run_simulated(work())


def test_a_client_that_leaves_while_it_runs_frees_its_place(manager: Manager) -> None:
    async def work() -> None:
        task = asyncio.create_task(request(manager, A, asyncio.Event()))
        await spin()
        assert manager.gate.counts(A.model) == (1, 0)
        await cancelled(task)
        assert nothing_is_held(manager)

    run_simulated(work())


@pytest.mark.parametrize("when", ["before its turn", "while it loads", "while it runs"])
def test_a_retired_version_leaves_the_memory_after_its_last_request_and_not_before(
    when: str, manager: Manager, engine: FakeEngine
) -> None:
    async def work() -> None:
        held, ends = asyncio.Event(), asyncio.Event()
        engine.held[A.model] = held

        async def accepted() -> None:
            async with manager.turn(A.model):
                await ends.wait()

        manager.hold(A)
        if when == "before its turn":
            manager.retire(A.model)
        task = asyncio.create_task(accepted())
        await spin()
        if when == "while it loads":
            manager.retire(A.model)
        held.set()
        await spin()
        if when == "while it runs":
            manager.retire(A.model)
        await spin()
        assert list(engine.memory.values()) == [A.model], "it is in use"
        manager.release(A.model)
        ends.set()
        await task
        await spin()
        assert engine.unloads == [A.model]
        assert manager.gate.in_memory() == []
        assert nothing_is_held(manager)

    run_simulated(work())


def test_a_version_that_is_asked_for_again_stays(manager: Manager, engine: FakeEngine) -> None:
    """It was rolled back to while its last request was still running."""

    async def work() -> None:
        ends = asyncio.Event()
        task = asyncio.create_task(request(manager, A, ends))
        await spin()
        manager.retire(A.model)
        assert await request(manager, A) == 1
        ends.set()
        await task
        await spin()
        assert engine.unloads == []

    run_simulated(work())


def test_a_failing_load_ends_the_requests_that_waited_for_it_and_no_others(engine: FakeEngine) -> None:
    async def work() -> None:
        told: list[tuple[str, str]] = []
        manager = a_manager(
            engine, CountedStore(), failed=lambda version, why: told.append((version.model, why))
        )
        engine.failing[A.model] = "rank 99 is too large"
        bad = [asyncio.create_task(request(manager, A)) for _ in range(3)]
        good = [asyncio.create_task(request(manager, B)) for _ in range(3)]
        for task in bad:
            with pytest.raises(AdapterFailed, match="rank 99 is too large"):
                await task
        assert await asyncio.gather(*good) == [2, 2, 2]
        assert told == [(A.model, "rank 99 is too large")]
        assert nothing_is_held(manager)
        engine.failing.clear()
        assert await request(manager, A) == 3, "it is tried again when somebody asks"

    run_simulated(work())


def test_a_client_that_leaves_in_the_very_moment_its_load_fails_spoils_it_for_nobody(
    manager: Manager, engine: FakeEngine
) -> None:
    async def work() -> None:
        engine.failing[A.model] = "no"
        engine.held[A.model] = asyncio.Event()
        leaves, stays = (asyncio.create_task(request(manager, A)) for _ in range(2))
        await spin()
        engine.held[A.model].set()
        await cancelled(leaves)
        with pytest.raises(AdapterFailed):
            await asyncio.wait_for(stays, 1.0)
        assert nothing_is_held(manager)

    run_simulated(work())


def test_a_load_whose_clients_have_all_left_is_not_even_begun(manager: Manager, engine: FakeEngine) -> None:
    async def work() -> None:
        task = asyncio.create_task(request(manager, A))
        await asyncio.sleep(0)  # the load is decided, its task has not run
        await cancelled(task)
        await spin()
        assert manager.gate.in_memory() == list(engine.memory.values())
        assert nothing_is_held(manager)
        assert await request(manager, A)

    run_simulated(work())


def test_an_engine_that_cannot_unload_keeps_nobody_waiting(manager: Manager, engine: FakeEngine) -> None:
    async def unload(handle: int) -> None:
        raise RuntimeError("the engine is dead")

    async def work() -> None:
        manager.gate.limits = Limits(1, 1, 4)
        await request(manager, A)
        engine.unload = unload  # type: ignore[method-assign]
        assert await request(manager, B) == 2
        assert nothing_is_held(manager)

    run_simulated(work())


def test_one_slot_goes_round_in_turns(manager: Manager) -> None:
    """An idle adapter starts within a turn and the longest request, however busy the other is."""

    async def work() -> None:
        loop = asyncio.get_running_loop()
        manager.gate.limits = Limits(1, 2, 2, turn_s=2.0)

        async def one(version: ServedVersion, seconds: float) -> float:
            manager.hold(version)
            try:
                async with manager.turn(version.model):
                    began = loop.time()
                    await asyncio.sleep(seconds)
                    return began
            finally:
                manager.release(version.model)

        busy = [asyncio.create_task(one(A, 0.5)) for _ in range(40)]
        await asyncio.sleep(1.1)
        asked = loop.time()
        assert await one(B, 0.1) - asked <= 2.0 + 0.5
        await asyncio.gather(*busy)
        assert nothing_is_held(manager)
        assert manager._timer is None

    run_simulated(work())


def test_what_no_client_asked_for_is_no_request(manager: Manager, engine: FakeEngine) -> None:
    async def work() -> None:
        engine.failing[B.model] = "no"
        assert await manager.warm_up([A, B]) == [B.model]
        assert list(engine.memory.values()) == [A.model]
        assert manager.use_of("a").requests == 0
        assert manager.use_of("a").load_seconds is not None
        await request(manager, A)
        assert manager.use_of("a").requests == 1
        assert manager.use_of("a").last_used is not None
        assert manager.memory() == (1, 1)
        manager.forget_use("a")
        assert manager.use_of("a").requests == 0
        assert nothing_is_held(manager)

    run_simulated(work())


def test_what_is_loaded_ahead_costs_no_request_anything(manager: Manager, engine: FakeEngine) -> None:
    async def work() -> None:
        ends = asyncio.Event()
        task = asyncio.create_task(request(manager, A, ends))
        await spin()
        assert not await manager.preload(B), "somebody is being served"
        ends.set()
        await task
        await spin()
        assert await manager.preload(B)
        assert set(engine.memory.values()) == {A.model, B.model}
        assert manager.use_of("b").requests == 0
        assert nothing_is_held(manager)

    run_simulated(work())


def test_what_cannot_be_loaded_ahead_is_noted_as_any_other(engine: FakeEngine) -> None:
    async def work() -> None:
        failed: list[str] = []
        manager = a_manager(
            engine,
            CountedStore(),
            failed=lambda version, reason: failed.append(version.model),
            clock=asyncio.get_running_loop().time,
        )
        engine.failing[A.model] = "no"
        assert await manager.preload(A)
        assert failed == [A.model] and not engine.memory
        assert nothing_is_held(manager)

    run_simulated(work())


def test_the_store_keeps_a_version_while_a_request_has_it(
    tmp_path: Path, make_adapter: Callable[..., Path]
) -> None:
    async def work() -> None:
        shop = Shop(tmp_path / "state", make_adapter)
        shop.publish("a", 16)
        version = shop.live.resolve("a")
        assert version is not None
        ends = asyncio.Event()
        task = asyncio.create_task(request(shop.manager, version, ends))
        await spin()
        shop.catalog.remove(["a"])
        shop.live.refresh()
        shop.catalog.collect()
        assert shop.catalog.store.has(version.version.digest)
        assert shop.engine.unloads == []
        ends.set()
        assert await task
        await spin()
        assert shop.engine.unloads == [version.model]
        assert shop.catalog.collect() == [version.version.digest]
        with pytest.raises(VersionMissing):
            shop.manager.hold(version)
        assert nothing_is_held(shop.manager)

    asyncio.run(work())


class AnyTraffic(RuleBasedStateMachine):
    """Whatever clients, engine and publishers do in whatever order: at the end nothing is held."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = SimulatedLoop()
        self.engine = FakeEngine()
        self.store = CountedStore()
        self.tasks: dict[asyncio.Task[object], str] = {}
        self.ends: dict[asyncio.Task[object], asyncio.Event] = {}
        self.versions = [a_version(name, name) for name in NAMES]
        for version in self.versions:
            self.engine.held[version.model] = asyncio.Event()
            self.engine.held[version.model].set()

    @initialize(slots=st.integers(1, 2), cached=st.integers(2, 3), running=st.integers(1, 3))
    def begin(self, slots: int, cached: int, running: int) -> None:
        self.manager = a_manager(
            self.engine, self.store, Limits(slots, cached, running), clock=self.loop.time
        )

    def go_on(self, rounds: int) -> None:
        """Let so many things happen; with 0 the next rule comes in the very same moment."""
        if rounds:
            self.loop.run_until_complete(spin(rounds - 1))

    @rule(version=st.integers(0, 2), rounds=st.integers(0, 4))
    def ask(self, version: int, rounds: int) -> None:
        chosen, ends = self.versions[version], asyncio.Event()
        task = self.loop.create_task(request(self.manager, chosen, ends))
        self.tasks[task], self.ends[task] = chosen.model, ends
        self.go_on(rounds)

    @rule(version=st.integers(0, 2), works=st.booleans(), rounds=st.integers(0, 3))
    def end_load(self, version: int, works: bool, rounds: int) -> None:
        model = self.versions[version].model
        if not works:
            self.engine.failing[model] = "no"
        else:
            self.engine.failing.pop(model, None)
        self.engine.held[model].set()
        self.go_on(rounds)

    @rule(version=st.integers(0, 2))
    def loads_are_slow(self, version: int) -> None:
        self.engine.held[self.versions[version].model].clear()

    @rule(free=st.booleans(), fails=st.sets(st.integers(0, 2), max_size=1), rounds=st.integers(0, 2))
    def slots(self, free: bool, fails: set[int], rounds: int) -> None:
        self.engine.unplaceable = {self.versions[version].model for version in fails}
        if free:
            self.engine.slots_free.set()
        else:
            self.engine.slots_free.clear()
        self.go_on(rounds)

    @precondition(lambda self: not all(task.done() for task in self.tasks))
    @rule(data=st.data(), leave=st.lists(st.booleans(), min_size=1, max_size=3), rounds=st.integers(0, 4))
    def end(self, data: st.DataObject, leave: list[bool], rounds: int) -> None:
        """Several in one moment: they end well, or leave."""
        under_way = st.sampled_from([task for task in self.tasks if not task.done()])
        for leaves in leave:
            task = data.draw(under_way)
            if leaves:
                task.cancel()
            else:
                self.ends[task].set()
        self.go_on(rounds)

    @rule(version=st.integers(0, 2), rounds=st.integers(0, 3))
    def retire(self, version: int, rounds: int) -> None:
        async def within_the_loop() -> None:
            self.manager.retire(self.versions[version].model)
            await spin(rounds)

        self.loop.run_until_complete(within_the_loop())

    @rule(version=st.integers(0, 2), rounds=st.integers(0, 3))
    def preload(self, version: int, rounds: int) -> None:
        ahead = self.manager.preload(self.versions[version])
        task: asyncio.Task[object] = self.loop.create_task(ahead)
        self.tasks[task], self.ends[task] = self.versions[version].model, asyncio.Event()
        self.go_on(rounds)

    @rule(seconds=st.floats(0.1, 5.0))
    def pass_time(self, seconds: float) -> None:
        self.loop.run_until_complete(asyncio.sleep(seconds))

    @invariant()
    def leases_and_memory_agree(self) -> None:
        if not hasattr(self, "manager"):
            return
        gate, limits = self.manager.gate, self.manager.gate.limits
        assert len(self.engine.memory) <= limits.cached
        assert len(gate.holders()) <= limits.slots
        running = {model for model in self.engine.announced if gate.counts(model)[0]}
        assert set(self.manager._placing) <= running <= set(self.engine.memory.values())
        assert self.store.leases == len(self.manager._leases) == len(self.engine.announced)
        assert set(self.engine.announced) == set(self.manager._leases)

    def teardown(self) -> None:
        async def work() -> None:
            for held in self.engine.held.values():
                held.set()
            for ends in self.ends.values():
                ends.set()
            self.engine.slots_free.set()
            outcomes = await asyncio.gather(*self.tasks, return_exceptions=True)
            for outcome in outcomes:
                assert isinstance(outcome, int | AdapterFailed | asyncio.CancelledError)
            await spin()
            assert nothing_is_held(self.manager)
            assert not self.manager._tasks and not self.manager._placing
            for version in self.versions:
                self.manager.retire(version.model)
            await spin()
            assert self.engine.memory == {}

        if hasattr(self, "manager"):
            self.loop.run_until_complete(work())
        self.loop.close()


AnyTraffic.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAnyTraffic = AnyTraffic.TestCase
