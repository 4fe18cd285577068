"""The gate: whose request enters the engine next, and which adapters are in its memory. Pure.

At most `slots` distinct adapters have requests in the engine. When others wait, an adapter that has a slot
keeps it for a turn: until its queue is empty, or for `turn_s` at most. Then what it has in the engine
finishes, and the slot goes to the adapter that has waited longest. So none starves, and vLLM's own
scheduler never has to skip a request whose adapter has no slot. What is in memory and not needed
leaves, least recently used first, when another adapter needs the room.

Events go in, with the time; commands come out. Nothing here waits, loads or knows vLLM.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

Adapter = str | None  # None is the base, which needs neither slot nor room


@dataclass(frozen=True)
class Limits:
    """`slots` and `cached` count adapters (vLLM's --max-loras, --max-cpu-loras), the others requests."""

    slots: int
    cached: int
    running: int
    queue_per_adapter: int = 256
    queue_total: int = 1024
    turn_s: float = 2.0


@dataclass(frozen=True)
class Start:
    """Let this request enter the engine."""

    ticket: int
    adapter: Adapter


@dataclass(frozen=True)
class Load:
    """Bring the adapter into memory; answer with `loaded` or `load_failed`."""

    adapter: str


@dataclass(frozen=True)
class Unload:
    """Take the adapter out of memory; answer with `unloaded`."""

    adapter: str


Command = Start | Load | Unload


class QueueFull(Exception):
    """No more requests can wait; `retry_after_s` is when it is worth another try."""

    def __init__(self, what: str, limit: int, retry_after_s: int) -> None:
        self.what, self.limit, self.retry_after_s = what, limit, retry_after_s
        super().__init__(f"{limit} requests wait for {what}, which is the most")


Place = Literal["stored", "loading", "cached", "leaving"]


@dataclass(eq=False)
class _Line:
    """One adapter's requests, and where the adapter itself is."""

    adapter: Adapter
    place: Place = "stored"
    queue: deque[int] = field(default_factory=deque)
    running: int = 0
    number: int = 0  # while it waits for a slot: who waits longer has the smaller one
    turn_began: float | None = None  # while it has a slot
    closing: bool = False  # its turn is over; what runs finishes
    used: float = -math.inf

    @property
    def is_idle(self) -> bool:
        return not self.queue and not self.running


class Gate:
    """See the module. Every event returns what is to be done now; `tick` at `next_tick` does the rest."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.running = self.waiting = 0  # requests
        self._base = _Line(None, place="cached")
        self._lines: dict[str, _Line] = {}  # of adapters that are asked for, or not on the disk only
        self._waiting: dict[str, _Line] = {}  # for a slot, the longest first
        self._holders: deque[_Line] = deque([self._base])  # those that may start requests, in turn
        self._places: Counter[Place] = Counter()
        self._retired: set[str] = set()  # nobody will ask for them again
        self._numbers = 0

    # What happens.

    def check(self, adapter: Adapter, accepted: int = 0, accepted_in_all: int = 0) -> None:
        """Whether one more request of this adapter may wait.

        `accepted` are its requests that have not ended, and those of all. They need not be here yet: while
        the first of a burst is made ready, all the others come.

        Raises:
            QueueFull: too many wait already.
        """
        limits = self.limits
        waiting = max(self.counts(adapter)[1], accepted - limits.running)
        if waiting >= limits.queue_per_adapter:
            raise QueueFull("this model", limits.queue_per_adapter, self._retry_after())
        if max(self.waiting, accepted_in_all - limits.running) >= limits.queue_total:
            raise QueueFull("this server", limits.queue_total, self._retry_after())

    def arrive(self, adapter: Adapter, ticket: int, now: float) -> list[Command]:
        """A request is there."""
        line = self._base if adapter is None else self._lines.setdefault(adapter, _Line(adapter))
        line.queue.append(ticket)
        self.waiting += 1
        if adapter is not None:
            self._retired.discard(adapter)
            if line.turn_began is None and adapter not in self._waiting:
                self._wait(line)
        return self.tick(now)

    def leave(self, adapter: Adapter, ticket: int, now: float) -> list[Command]:
        """A request that waited will not come."""
        line = self._line(adapter)
        line.queue.remove(ticket)
        self.waiting -= 1
        if not line.queue and adapter is not None:
            self._waiting.pop(adapter, None)
        return self._settled(line, now)

    def finish(self, adapter: Adapter, now: float) -> list[Command]:
        """A request has left the engine."""
        line = self._line(adapter)
        line.running -= 1
        self.running -= 1
        line.used = now
        return self._settled(line, now)

    def loaded(self, adapter: str, now: float) -> list[Command]:
        """A `Load` is done."""
        line = self._lines[adapter]
        self._move(line, "cached")
        if line.queue:  # one that nobody asked for is the first to leave
            line.used = now
        return self.tick(now)

    def load_failed(self, adapter: str, now: float) -> tuple[list[int], list[Command]]:
        """A `Load` came to nothing: the requests that waited for it and end here, and what is to be done."""
        line = self._lines[adapter]
        tickets = list(line.queue)
        self.waiting -= len(tickets)
        line.queue.clear()
        self._waiting.pop(adapter, None)
        self._move(line, "stored")
        return tickets, self._settled(line, now)

    def unloaded(self, adapter: str, now: float) -> list[Command]:
        """An `Unload` is done."""
        line = self._lines[adapter]
        self._move(line, "stored")
        return self._settled(line, now)

    def retire(self, adapter: str, now: float) -> list[Command]:
        """Nobody will ask for it again: it leaves as soon as its last request has."""
        if adapter not in self._lines:
            return []
        self._retired.add(adapter)
        return self.tick(now)

    def preload(self, adapter: str) -> list[Command]:
        """Bring it into memory though nobody asks, where that takes no place that a request may soon want."""
        line = self._lines.get(adapter)
        if not self.has_room_to_spare or (line is not None and line.place != "stored"):
            return []
        line = self._lines.setdefault(adapter, _Line(adapter))
        self._move(line, "loading")
        return [Load(adapter)]

    # What follows from it.

    def tick(self, now: float) -> list[Command]:
        """What is to be done at this time."""
        self._end_turns(now)
        commands: list[Command] = list(self._unload_retired())
        commands += self._load_waiting()  # before slots are given, or one that is to leave would get one
        self._grant_slots(now)
        commands += self._start_requests(now)
        return commands

    def next_tick(self, now: float) -> float | None:
        """When a turn ends that somebody waits for; None when only an event can change anything."""
        if not self._waiting:
            return None
        turns = [line.turn_began for line in self._holders if line.turn_began is not None]
        ends = [began + self.limits.turn_s for began in turns]
        return min((end for end in ends if end > now), default=None)

    # What others may look at.

    def state_of(self, adapter: str) -> str:
        """`slot`, `cached` or `stored`: with a slot in the engine, in its memory, or on the disk only."""
        line = self._lines.get(adapter)
        if line is None or line.place in ("stored", "loading"):
            return "stored"
        return "slot" if line.turn_began is not None else "cached"

    @property
    def has_room_to_spare(self) -> bool:
        """Whether the memory has more free places than there are slots."""
        return self._occupied() + self.limits.slots < self.limits.cached

    def counts(self, adapter: Adapter) -> tuple[int, int]:
        """Requests of an adapter in the engine, and waiting."""
        line = self._base if adapter is None else self._lines.get(adapter)
        return (0, 0) if line is None else (line.running, len(line.queue))

    def in_memory(self) -> list[str]:
        """Adapters that are in the engine's memory, or on their way in or out."""
        return [adapter for adapter, line in self._lines.items() if line.place != "stored"]

    def holders(self) -> list[str]:
        """Adapters that have a slot."""
        return [line.adapter for line in self._holders if line.adapter is not None]

    def _retry_after(self) -> int:
        """Seconds: a rotation over all that wait, one turn each."""
        turns = math.ceil((1 + len(self._waiting)) / max(1, self.limits.slots))
        return max(1, math.ceil(turns * self.limits.turn_s))

    def _line(self, adapter: Adapter) -> _Line:
        return self._base if adapter is None else self._lines[adapter]

    def _wait(self, line: _Line) -> None:
        self._numbers += 1
        line.number = self._numbers
        self._waiting[line.adapter or ""] = line

    def _move(self, line: _Line, place: Place) -> None:
        self._places[line.place] -= 1
        line.place = place
        self._places[place] += 1

    def _occupied(self) -> int:
        """Places of the memory that are taken."""
        return self._places["loading"] + self._places["cached"] + self._places["leaving"]

    def _settled(self, line: _Line, now: float) -> list[Command]:
        """A tick; afterwards nothing is kept of an adapter that is nowhere."""
        commands = self.tick(now)
        if line.place == "stored" and line.is_idle and line.adapter is not None:
            self._lines.pop(line.adapter, None)
            self._retired.discard(line.adapter)
        return commands

    def _end_turns(self, now: float) -> None:
        """End as many turns as adapters wait for, those that began first, once they may end."""
        holders = [line for line in self._holders if line is not self._base]
        wanted = len(self._waiting) - (self.limits.slots - len(holders))
        holders.sort(key=lambda line: (not line.closing, not line.is_idle, line.turn_began))
        for line in holders:
            over = not line.queue or now - (line.turn_began or 0.0) >= self.limits.turn_s
            line.closing = wanted > 0 and (line.closing or over)
            if line.closing:
                wanted -= 1
                if not line.running:
                    self._take_slot(line)

    def _take_slot(self, line: _Line) -> None:
        self._holders.remove(line)
        line.turn_began, line.closing = None, False
        if line.queue:
            self._wait(line)

    def _grant_slots(self, now: float) -> None:
        """To those that have waited longest and are in memory."""
        free = self.limits.slots - (len(self._holders) - 1)
        if free <= 0:
            return
        ready = [line for line in self._waiting.values() if line.place == "cached"]
        for line in ready[:free]:
            del self._waiting[line.adapter or ""]
            line.turn_began = line.used = now
            self._holders.append(line)

    def _start_requests(self, now: float) -> Iterator[Start]:
        """One request of each in turn, while the engine takes more."""
        passed = 0
        while passed < len(self._holders) and self.running < self.limits.running:
            line = self._holders[0]
            self._holders.rotate(-1)
            if line.closing or not line.queue:
                passed += 1
                continue
            passed = 0
            line.running += 1
            line.used = now
            self.running += 1
            self.waiting -= 1
            yield Start(line.queue.popleft(), line.adapter)

    def _unload_retired(self) -> Iterator[Unload]:
        for adapter in list(self._retired):
            line = self._lines[adapter]
            if line.is_idle and line.place == "cached":
                yield self._unload(line)

    def _load_waiting(self) -> Iterator[Command]:
        """Load what waits and is not in memory, the longest first; unload what must give way."""
        room = self.limits.cached - self._occupied()
        coming = room + self._places["leaving"]
        for line in [line for line in self._waiting.values() if line.place == "stored"]:
            if room > 0:
                room, coming = room - 1, coming - 1
                self._move(line, "loading")
                yield Load(line.adapter or "")
            elif coming > 0:
                coming -= 1
            elif (victim := self._victim(line)) is not None:
                yield self._unload(victim)
            else:
                return

    def _victim(self, newcomer: _Line) -> _Line | None:
        """What leaves for `newcomer`: what nobody asks for, the least recently used; else who waits less."""
        free = [line for line in self._lines.values() if line.place == "cached" and not line.running]
        unused = [line for line in free if not line.queue]
        if unused:
            return min(unused, key=lambda line: line.used)
        later = [line for line in free if line.turn_began is None and line.number > newcomer.number]
        return max(later, key=lambda line: line.number, default=None)

    def _unload(self, line: _Line) -> Unload:
        if line.turn_began is not None:
            self._take_slot(line)
        self._move(line, "leaving")
        return Unload(line.adapter or "")
