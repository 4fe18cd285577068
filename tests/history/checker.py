"""Judges a history: every request ended once, by a version that its name stood for, and nothing was lost.

Pure: events in (see `recorder`), violations out. No violation means that the server kept its word as far
as clients can see.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tests.history.timeline import ABSENT, Event, Timeline, timelines, versions_that_answer

BROKEN = ("broken", "hang", "cut")
BOUND_S = 20.0  # for a change in the folder, on a machine that is loaded and shared


@dataclass(frozen=True)
class Violation:
    """`rule` was broken; `text` says by what."""

    rule: str
    text: str


@dataclass
class _Facts:
    """What a request is judged by."""

    names: dict[str, Timeline]
    base: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    words: dict[str, tuple[str, set[int]]] = field(default_factory=dict)  # version -> its name, its words
    outages: list[tuple[float, float]] = field(default_factory=list)

    def is_out(self, start: float, end: float) -> bool:
        return any(begin <= end and over >= start for begin, over in self.outages)

    def line(self, name: str) -> Timeline:
        return self.names.get(name) or Timeline()


def check(events: Iterable[Event], bound_s: float = BOUND_S) -> list[Violation]:
    """All that is wrong with a history."""
    events = list(events)
    facts = _Facts(timelines(events))
    for event in events:
        if event["kind"] == "base":
            facts.base[event["route"], event["prompt"]] = event["tokens"]
        elif event["kind"] == "version":
            facts.words[event["version"]] = event["name"], set(event["tokens"])
        elif event["kind"] == "outage":
            facts.outages.append((event["start"], event["end"]))
    found = [
        Violation(rule, f"{name}: {text}") for name, line in facts.names.items() for rule, text in line.flaws
    ]
    found += _of_requests(events, facts)
    found += _of_changes(events, facts, bound_s)
    for event in events:
        if event["kind"] == "rest" and (event["running"] or event["waiting"]):
            found.append(Violation("never_ended", f"{event['running']} run, {event['waiting']} wait"))
    return found


def _of_changes(events: Sequence[Event], facts: _Facts, bound_s: float) -> list[Violation]:
    found = []
    for event in events:
        if event["kind"] != "change" or event["after"] is None or event.get("complete") is None:
            continue
        # The clock stands while the server is down.
        late = event["end"] - event["complete"]
        late -= sum(
            max(0.0, min(end, event["end"]) - max(begin, event["complete"])) for begin, end in facts.outages
        )
        if late > bound_s:
            found.append(Violation("folder_late", f"{event['name']}: {event['what']} took {late:.1f} s"))
    return found


def _of_requests(events: Sequence[Event], facts: _Facts) -> list[Violation]:
    sent = {event["id"]: event for event in events if event["kind"] == "sent"}
    ends = [event for event in events if event["kind"] == "ended"]
    counts = Counter(end["id"] for end in ends)
    found = [
        Violation("ended_once", f"request {number} ended {counts[number]} times")
        for number in sent
        if counts[number] != 1
    ]
    for end in ends:
        request = sent[end["id"]]
        found += [
            Violation(rule, f"request {end['id']} to {request['model']}: {text}")
            for rule, text in _judge(request, end, facts)
        ]
    return found + _of_users(sent, ends, facts)


def _judge(request: Event, end: Event, facts: _Facts) -> list[tuple[str, str]]:
    outcome = end["outcome"]
    if outcome in ("answer", "cancelled"):
        return _judge_answer(request, end, facts)
    if facts.is_out(request["start"], end["end"]):
        return []
    if outcome in BROKEN:
        return [(outcome, str(end.get("text")))]
    return [] if _may_refuse(request, end, facts) else [(outcome, f"{end['status']} {end['code']}")]


def _may_refuse(request: Event, end: Event, facts: _Facts) -> bool:
    """Whether there was a moment at which the server may have said so."""
    if end["outcome"] != "refused" or request["name"] is None:
        return False
    window = request["start"], end["end"]
    line = facts.line(request["name"])
    states = [span.state for span in line.possible(*window)]
    if end["status"] == 404 and end["code"] == "model_not_found":
        if request["pin"] is None:
            return any(state["live"] is None for state in states)
        return any(request["pin"] not in state.get("versions", ()) for state in states)
    if end["status"] == 503:
        # It is being looked at, or left at this very moment.
        is_absent = any(state["live"] is None for state in states)
        return bool(end["retry_after"]) and (
            (end["code"] == "adapter_loading" and is_absent and line.changing(*window))
            or (end["code"] == "version_gone" and line.changing(*window))
        )
    return end["status"] == 429 and bool(end["retry_after"])


def _judge_answer(request: Event, end: Event, facts: _Facts) -> list[tuple[str, str]]:
    tokens, is_whole = end["tokens"], end["outcome"] == "answer"
    found = []
    if is_whole and (len(tokens) != request["max_tokens"] or end["finish"] != ["length"]):
        found.append(("incomplete", f"{len(tokens)} of {request['max_tokens']} tokens, {end['finish']}"))
    if request["name"] is None:
        wanted = facts.base[request["route"], request["prompt"]][: len(tokens)]
        if tokens != wanted:
            found.append(("base_changed", f"says {tokens}, not {wanted}"))
        if is_whole and (end["model"] != request["model"] or end["version"] is not None):
            found.append(("wrong_stamp", f"{end['model']} {end['version']}"))
        return found
    version = end["version"]
    if version is None:
        return [*found, ("wrong_stamp", f"{end['model']} {version}")] if is_whole else found
    if end["model"] not in (f"{request['name']}@{version}", None if not is_whole else ""):
        found.append(("wrong_stamp", f"{end['model']} {version}"))
    name, words = facts.words.get(version, (None, set()))
    if name != request["name"] or not set(tokens) <= words:
        found.append(("wrong_version", f"says {tokens}, which is not {version} ({sorted(words)})"))
    if not _could_be(request, end, version, facts):
        found.append(("not_live", f"answered by {version}"))
    return found


def _could_be(request: Event, end: Event, version: str, facts: _Facts) -> bool:
    """Whether the name stood for the version at a moment between sending and the first sign of an answer."""
    states = [
        span.state
        for span in facts.line(request["name"]).possible(request["start"], end["first"] or math.inf)
    ]
    if request["pin"] is not None:
        known = any(version in state.get("versions", (version,)) for state in states)
        return version == request["pin"] and known
    return any(version in versions_that_answer(state) for state in states)


def _of_users(sent: dict[int, Event], ends: Sequence[Event], facts: _Facts) -> list[Violation]:
    """One user keeps to one version while the split stays as it is."""
    found, seen = [], dict[tuple[str, str, int], str]()
    for end in ends:
        request = sent[end["id"]]
        user, name, version = request["user"], request["name"], end.get("version")
        if user is None or name is None or request["pin"] is not None or version is None:
            continue
        spans = facts.line(name).possible(request["start"], end["first"])
        if len(spans) == 1 and seen.setdefault((name, user, id(spans[0])), version) != version:
            text = f"request {end['id']}: user {user} of {name} got {version} beside another"
            found.append(Violation("not_sticky", text))
    return found


__all__ = ["ABSENT", "BOUND_S", "Violation", "check"]
