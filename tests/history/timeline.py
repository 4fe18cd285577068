"""Which states a name may have been in at a time, as far as its clients can know. Pure.

Changes of one name come one after the other. A change takes effect at some moment between its start and
its acknowledgement, so its new state is possible from its start on, and the old one until its end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Event = Mapping[str, Any]
State = Mapping[str, Any]  # live, traffic, versions, history; live None: the name is not there
_HISTORY = 100  # as many events a name keeps
ABSENT: State = {"live": None, "traffic": {}, "versions": [], "history": []}


@dataclass
class Span:
    """A state, and when it was possible."""

    state: State
    since: float
    until: float = math.inf

    def overlaps(self, start: float, end: float) -> bool:
        """Whether it was possible at some moment in between."""
        return self.since <= end and self.until >= start


@dataclass
class Timeline:
    """One name's spans; `flaws` are what the acknowledgements themselves say wrong."""

    spans: list[Span] = field(default_factory=list)
    flaws: list[tuple[str, str]] = field(default_factory=list)

    def possible(self, start: float, end: float) -> list[Span]:
        """The spans that were possible at some moment in between; a name nobody knows is absent."""
        if not self.spans:
            return [Span(ABSENT, -math.inf)]
        return [span for span in self.spans if span.overlaps(start, end)]

    def changing(self, start: float, end: float) -> bool:
        """Whether something was being done to the name in between."""
        return len(self.possible(start, end)) > 1

    def _open(self) -> list[Span]:
        return [span for span in self.spans if span.until == math.inf]

    def _next(self, state: State, since: float, end: float) -> None:
        for span in self._open():
            span.until = end
        self.spans.append(Span(state, since))

    def add_change(self, change: Event) -> None:
        """An operator's change, acknowledged or (without `after`) broken off."""
        after, expected = change["after"], change["expected"]
        if after is None:
            self.spans.append(Span(expected, change["start"]))
            return
        if not agree(after, expected):
            text = f"{change['what']} was acknowledged with {_told(after)}, not {_told(expected)}"
            self.flaws.append(("wrong_acknowledgement", text))
        before = [span.state for span in self._open()]
        if len(before) == 1 and not _follows(after, before[0]):
            text = f"{change['what']} is not all that happened between {_told(before[0])} and {_told(after)}"
            self.flaws.append(("changed_by_nobody", text))
        if change.get("status", change.get("wanted")) != change.get("wanted"):
            text = f"{change['what']} was answered with {change['status']}, not {change['wanted']}"
            self.flaws.append(("wrong_acknowledgement", text))
        self._next(after, change["start"], change["end"])

    def add_state(self, seen: Event, changes: Sequence[Event]) -> None:
        """What the server said of the name when it had started; `changes` are those of this name."""
        state, before = seen["state"], self._open()
        if not self.spans:
            self.spans.append(Span(state, -math.inf))
            return
        if len(before) == 1 and agree(state, before[0].state):  # nothing new, but perhaps more of it
            before[0].state = state
            return
        on_their_way = [
            Span(change["expected"], change["start"])
            for change in changes
            if change["start"] <= seen["end"] and change["end"] >= seen["start"]
        ]
        matching = [span for span in (*before, *on_their_way) if agree(state, span.state)]
        if not matching:
            text = (
                f"a server that was asked says {_told(state)}, not {[_told(span.state) for span in before]}"
            )
            self.flaws.append(("acknowledged_change_lost", text))
        since = min((span.since for span in matching), default=seen["start"])
        self._next(state, since, seen["end"])


def timelines(events: Iterable[Event]) -> dict[str, Timeline]:
    """By name."""
    kept = [event for event in events if event["kind"] in ("change", "state")]
    lines: dict[str, Timeline] = {}
    changes: dict[str, list[Event]] = {}
    for event in kept:
        if event["kind"] == "change":
            changes.setdefault(event["name"], []).append(event)
    for event in kept:
        line = lines.setdefault(event["name"], Timeline())
        if event["kind"] == "change":
            line.add_change(event)
        else:
            line.add_state(event, changes.get(event["name"], ()))
    return lines


def agree(one: State, other: State) -> bool:
    """Whether two states are the same in all that both say."""
    return all(one[key] == other[key] for key in ABSENT if key in one and key in other)


def versions_that_answer(state: State) -> set[str]:
    """The versions that a request by the bare name may get."""
    if state["live"] is None:
        return set()
    split = {version for version, percent in state.get("traffic", {}).items() if percent}
    return split or {state["live"]}


def _follows(after: State, before: State) -> bool:
    """Whether at most one thing happened in between, as far as both tell."""
    if "history" not in after or "history" not in before or None in (after["live"], before["live"]):
        return True
    length = len(before["history"])
    return length >= _HISTORY or (
        after["history"][:length] == before["history"] and len(after["history"]) <= length + 1
    )


def _told(state: State) -> str:
    told = {key: state[key] for key in ("live", "traffic") if key in state}
    return f"{told} with {len(state['history'])} events" if "history" in state else f"{told}"
