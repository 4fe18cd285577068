"""What a history holds, as a table for people. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import quantiles

from tests.history.timeline import Event


def table(events: Iterable[Event]) -> str:
    """Requests by kind and outcome, changes by kind, and how soon the folder's changes showed."""
    events = list(events)
    sent = {event["id"]: event for event in events if event["kind"] == "sent"}
    ends = [event for event in events if event["kind"] == "ended"]
    outages = [event for event in events if event["kind"] == "outage"]
    changes = [event for event in events if event["kind"] == "change"]
    lines = ["requests"]
    lines += _rows(Counter(_kind(sent[end["id"]]) for end in ends))
    lines += ["outcomes", *_rows(Counter(_outcome(end) for end in ends))]
    lines += ["changes", *_rows(Counter(change["what"] for change in changes))]
    broken_off = sum(change["after"] is None for change in changes)
    lines += [f"  {broken_off:6} of them were broken off by the kill"]
    delays = [
        change["end"] - change["complete"]
        for change in changes
        if change.get("complete") is not None
        and not any(out["start"] <= change["end"] and out["end"] >= change["complete"] for out in outages)
    ]
    lines += _spread("changes in the folder, from complete to seen", delays)
    times = [end["end"] - sent[end["id"]]["start"] for end in ends if end["outcome"] == "answer"]
    lines += _spread("answers took", times)
    return "\n".join(lines)


def _spread(what: str, seconds: Sequence[float]) -> list[str]:
    if len(seconds) < 2:
        return []
    marks = quantiles(seconds, n=100, method="inclusive")
    return [f"{what} (median, 99 %, most): {marks[49]:.2f} {marks[98]:.2f} {max(seconds):.2f} s"]


def _rows(counts: Counter[str]) -> list[str]:
    return [f"  {count:6} {what}" for what, count in sorted(counts.items(), key=lambda row: -row[1])]


def _kind(request: Event) -> str:
    if request["name"] is None:
        model = "base"
    elif request["name"].startswith("nobody"):
        model = "unknown name"
    else:
        model = "name" if request["pin"] is None else "name@digest"
    return f"{model}, {'streamed' if request['stream'] else 'whole'}"


def _outcome(end: Event) -> str:
    if end["outcome"] in ("refused", "stream_error"):
        return f"{end['outcome']}: {end['status']} {end['code']}"
    return str(end["outcome"])
