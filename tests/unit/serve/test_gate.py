"""The gate under a simulated clock and engine: nobody starves, nothing is lost, no room is overrun."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import defaultdict
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve.gate import Command, Gate, Limits, Load, QueueFull, Start, Unload

NAMES = ("a", "b", "c", "d", "e")


@dataclass
class Engine:
    """Plays the engine and the clock: loads take `load_s`, requests what they are given."""

    gate: Gate
    load_s: float = 0.0
    now: float = 0.0
    seconds: dict[int, float] = field(default_factory=dict)  # of each request in the engine
    started: dict[int, float] = field(default_factory=dict)
    memory: set[str] = field(default_factory=set)
    running: dict[str | None, int] = field(default_factory=lambda: defaultdict(int))
    tickets: int = 0
    _events: list[tuple[float, int, str, object]] = field(default_factory=list)
    _number: int = 0

    def ask(self, adapter: str | None, seconds: float = 1.0) -> int:
        self.tickets += 1
        self.seconds[self.tickets] = seconds
        self.do(self.gate.arrive(adapter, self.tickets, self.now))
        return self.tickets

    def do(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, Load):
                assert command.adapter not in self.memory
                self.memory.add(command.adapter)
                self._at(self.now + self.load_s, "loaded", command.adapter)
            elif isinstance(command, Unload):
                assert not self.running[command.adapter], "its requests are still in the engine"
                self._at(self.now, "unloaded", command.adapter)
            elif isinstance(command, Start):
                assert command.adapter is None or command.adapter in self.memory
                assert command.ticket not in self.started, "it was started before"
                self.started[command.ticket] = self.now
                self.running[command.adapter] += 1
                self._at(self.now + self.seconds[command.ticket], "finish", command.adapter)
        assert len(self.memory) <= self.gate.limits.cached
        assert sum(count > 0 for name, count in self.running.items() if name) <= self.gate.limits.slots
        assert sum(self.running.values()) <= self.gate.limits.running

    def run(self, until: float = 1e9) -> None:
        """Let time pass, to the next turn's end or event, while there is one."""
        while True:
            tick = self.gate.next_tick(self.now)
            event = self._events[0][0] if self._events else None
            due = min((at for at in (tick, event) if at is not None), default=None)
            if due is None or due > until:
                self.now = max(self.now, until if due is not None else self.now)
                return
            self.now = due
            if event == due:
                _, _, what, adapter = heapq.heappop(self._events)
                if what == "finish":
                    self.running[adapter] -= 1  # type: ignore[index]
                if what == "unloaded":
                    self.memory.discard(str(adapter))
                self.do(getattr(self.gate, what)(adapter, self.now))
            else:
                self.do(self.gate.tick(self.now))

    def _at(self, when: float, what: str, adapter: object) -> None:
        self._number += 1
        heapq.heappush(self._events, (when, self._number, what, adapter))


def make(
    slots: int = 1, cached: int = 4, running: int = 8, load_s: float = 0.0, turn_s: float = 2.0
) -> Engine:
    return Engine(Gate(Limits(slots, cached, running, 256, 1024, turn_s)), load_s)


def test_alone_nobody_waits() -> None:
    engine = make(slots=1, running=100)
    tickets = [engine.ask("a") for _ in range(50)]
    engine.run(until=0.0)
    assert all(engine.started[ticket] == 0.0 for ticket in tickets)


@pytest.mark.parametrize("cached", [1, 2])
@pytest.mark.parametrize("longest", [0.5, 3.0])
def test_an_idle_adapter_starts_within_one_turn_and_the_longest_running_request(
    cached: int, longest: float
) -> None:
    engine = make(slots=1, cached=cached, running=4)
    chance = random.Random(0)
    for _ in range(200):
        engine.ask("busy", chance.uniform(0.1, longest))
    engine.run(until=1.0)
    asked = engine.now
    ticket = engine.ask("idle", 0.1)
    engine.run(until=60.0)
    assert engine.started[ticket] - asked <= 2.0 + longest


def test_a_turn_that_is_over_gives_way_at_once() -> None:
    engine = make(slots=1, running=1)
    for _ in range(20):
        engine.ask("busy", 1.0)
    engine.run(until=10.5)
    ticket = engine.ask("idle")
    engine.run(until=20.0)
    assert engine.started[ticket] == 11.0, "as soon as what runs has finished"


def test_every_waiting_adapter_has_a_turn_before_any_has_a_second() -> None:
    engine = make(slots=1, cached=5, running=2)
    for name in NAMES:
        for _ in range(40):
            engine.ask(name, 0.5)
    engine.run()
    turns = []
    for ticket in sorted(engine.started, key=lambda ticket: engine.started[ticket]):
        name = NAMES[(ticket - 1) // 40]
        if not turns or turns[-1] != name:
            turns.append(name)
    assert turns[:10] == [*NAMES, *NAMES]


def test_a_slow_load_holds_up_nobody_else() -> None:
    engine = make(slots=1, cached=2, running=2, load_s=0.0)
    for _ in range(30):
        engine.ask("a", 0.5)
    engine.run(until=0.1)
    engine.load_s = 10.0
    slow = engine.ask("b", 0.5)
    engine.run()
    times = sorted(start for ticket, start in engine.started.items() if ticket != slow)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert max(gaps) <= 0.5 + 0.5, "a drained turn at most"
    assert engine.started[slow] <= 10.0 + 0.1 + 2.0 + 0.5


def test_the_base_is_not_kept_waiting_by_adapters() -> None:
    engine = make(slots=1, running=2)
    for _ in range(50):
        engine.ask("a", 1.0)
    ticket = engine.ask(None, 1.0)
    engine.run()
    assert engine.started[ticket] <= 1.0


def test_what_is_least_recently_used_leaves() -> None:
    engine = make(slots=1, cached=2)
    for name in ("a", "b", "a", "c"):
        engine.ask(name, 0.1)
        engine.run()
    assert engine.memory == {"a", "c"}


def test_a_queue_is_bounded_and_says_when_to_come_back() -> None:
    gate = Gate(Limits(1, 1, 1, queue_per_adapter=2, queue_total=3, turn_s=2.0))
    engine = Engine(gate)
    for _ in range(3):
        engine.ask("a", 9.0)
        engine.run(until=0.0)
    with pytest.raises(QueueFull, match="this model") as full:
        gate.check("a")
    assert full.value.retry_after_s >= 2
    engine.ask("b")
    with pytest.raises(QueueFull, match="this server"):
        gate.check("c")
    engine.run()
    gate.check("a")


def test_a_load_that_fails_ends_its_own_requests_only() -> None:
    gate = Gate(Limits(1, 2, 4))
    first = gate.arrive("bad", 1, 0.0)
    assert first == [Load("bad")]
    assert gate.arrive("good", 2, 0.0) == [Load("good")]
    assert gate.loaded("good", 0.0) == [Start(2, "good")]
    assert gate.load_failed("bad", 0.0) == ([1], [])
    assert gate.arrive("bad", 3, 0.0) == [Load("bad")], "the next request tries again"


def test_a_retired_adapter_leaves_after_its_last_request() -> None:
    engine = make(slots=1, cached=2)
    engine.ask("a", 5.0)
    engine.run(until=1.0)
    engine.do(engine.gate.retire("a", engine.now))
    assert engine.memory == {"a"}, "its request is still running"
    engine.run()
    assert engine.memory == set()
    assert engine.gate.in_memory() == []


def test_what_nobody_asked_for_takes_nobodys_place_and_leaves_first() -> None:
    engine = make(slots=1, cached=3)
    engine.ask("a", 0.1)
    engine.run()
    for name in ("b", "c", "a"):
        engine.do(engine.gate.preload(name))
        engine.run()
    assert engine.memory == {"a", "b"}, "as many places as there are slots stay free"
    for name in ("d", "e"):
        engine.ask(name, 0.1)
        engine.run()
    assert engine.memory == {"a", "d", "e"}


def test_a_request_finds_what_is_being_loaded_for_nobody() -> None:
    engine = make(slots=1, cached=2, load_s=1.0)
    engine.do(engine.gate.preload("a"))
    ticket = engine.ask("a", 0.1)
    engine.run()
    assert engine.started[ticket] == 1.0


def test_nothing_is_kept_of_adapters_that_are_nowhere() -> None:
    engine = make(slots=1, cached=1)
    for number in range(100):
        engine.ask(f"adapter-{number}", 0.01)
    engine.run()
    assert len(engine.gate._lines) == 1


class AnyTraffic(RuleBasedStateMachine):
    """Whatever comes in whatever order, every request starts once or is told, and limits hold."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate(Limits(2, 3, 4, 1000, 1000, 2.0))
        self.now = 0.0
        self.number = 0
        self.waiting: dict[int, str | None] = {}
        self.running: list[str | None] = []
        self.loading: list[str] = []
        self.leaving: list[str] = []
        self.memory: set[str] = set()

    def do(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, Start):
                assert self.waiting.pop(command.ticket) == command.adapter
                assert command.adapter is None or command.adapter in self.memory
                self.running.append(command.adapter)
            elif isinstance(command, Load):
                assert command.adapter not in [*self.memory, *self.loading, *self.leaving]
                self.loading.append(command.adapter)
            else:
                assert command.adapter not in self.running
                self.memory.remove(command.adapter)
                self.leaving.append(command.adapter)

    @rule(adapter=st.sampled_from([None, *NAMES]))
    def ask(self, adapter: str | None) -> None:
        self.number += 1
        self.waiting[self.number] = adapter
        self.do(self.gate.arrive(adapter, self.number, self.now))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.waiting)))
        self.do(self.gate.leave(self.waiting.pop(ticket), ticket, self.now))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(self.running) - 1))
        self.do(self.gate.finish(self.running.pop(place), self.now))

    @precondition(lambda self: self.loading)
    @rule(works=st.booleans())
    def end_load(self, works: bool) -> None:
        adapter = self.loading.pop(0)
        if works:
            self.memory.add(adapter)
            self.do(self.gate.loaded(adapter, self.now))
            return
        tickets, commands = self.gate.load_failed(adapter, self.now)
        assert all(self.waiting.pop(ticket) == adapter for ticket in tickets)
        assert adapter not in self.waiting.values(), "all of its requests are told"
        self.do(commands)

    @precondition(lambda self: self.leaving)
    @rule()
    def end_unload(self) -> None:
        self.do(self.gate.unloaded(self.leaving.pop(0), self.now))

    @rule(adapter=st.sampled_from(NAMES))
    def retire(self, adapter: str) -> None:
        self.do(self.gate.retire(adapter, self.now))

    @rule(adapter=st.sampled_from(NAMES))
    def preload(self, adapter: str) -> None:
        self.do(self.gate.preload(adapter))

    @rule(seconds=st.floats(0.1, 3.0))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.do(self.gate.tick(self.now))

    @invariant()
    def limits_hold(self) -> None:
        limits = self.gate.limits
        assert len({name for name in self.running if name}) <= limits.slots
        assert len(self.memory) + len(self.loading) + len(self.leaving) <= limits.cached
        assert len(self.running) <= limits.running
        assert (self.gate.running, self.gate.waiting) == (len(self.running), len(self.waiting))
        assert set(self.gate.in_memory()) == {*self.memory, *self.loading, *self.leaving}

    def teardown(self) -> None:
        """Once the engine does its part, everybody who waits is served."""
        for _ in range(10_000):
            if self.loading:
                self.end_load(works=True)
            elif self.leaving:
                self.end_unload()
            elif self.running:
                self.do(self.gate.finish(self.running.pop(0), self.now))
            elif self.waiting:
                before = (self.now, len(self.waiting))
                self.now = self.gate.next_tick(self.now) or self.now
                self.do(self.gate.tick(self.now))
                assert self.running or self.loading or self.leaving or before != (self.now, len(self.waiting))
            else:
                return
        raise AssertionError("somebody waits for ever")


AnyTraffic.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestAnyTraffic = AnyTraffic.TestCase
