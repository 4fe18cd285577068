"""The checker finds each kind of violation in a history that has one, and none in a sound one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.history.checker import check
from tests.history.recorder import Recorder, read_events
from tests.history.report import table

Events = list[dict[str, Any]]
OLD, NEW, FOREIGN = "a" * 12, "b" * 12, "c" * 12
WORDS = {OLD: [1, 2], NEW: [3, 4], FOREIGN: [5, 6]}
GONE: dict[str, Any] = {"live": None, "traffic": {}, "versions": [], "history": []}


def state(live: str, *history: str) -> dict[str, Any]:
    """A state after publishing `history`."""
    published = history or (live,)
    return {
        "live": live,
        "traffic": {},
        "versions": sorted(set(published)),
        "history": [["publish", version] for version in published],
    }


def change(start: float, end: float, after: Any, **more: Any) -> dict[str, Any]:
    expected = {key: after[key] for key in ("live", "traffic")} if after else None
    fields = {"kind": "change", "name": "lee", "what": "put", "start": start, "end": end}
    return {**fields, "expected": expected, "after": after, **more}


def seen(at: float, what: Any) -> dict[str, Any]:
    return {"kind": "state", "name": "lee", "state": what, "start": at, "end": at + 0.1}


def request(number: int, start: float, by: str | None, **more: Any) -> Events:
    """A request and how it ended; by default it is answered well, `by` a version or the base."""
    name = None if by is None else "lee"
    tokens = [7, 8] if by is None else [WORDS[by][0]] * 2
    model = "base" if by is None else f"lee@{by}"
    sent = {"kind": "sent", "id": number, "start": start, "model": name or "base", "name": name}
    sent |= {"pin": None, "route": "chat", "prompt": 0, "max_tokens": 2, "stream": True, "user": None}
    end = {"kind": "ended", "id": number, "end": start + 0.5, "first": start + 0.1, "outcome": "answer"}
    end |= {"tokens": tokens, "finish": ["length"], "model": model, "version": by}
    sent |= {key: more.pop(key) for key in list(more) if key in sent and key != "model"}
    return [sent, end | more]


def refusal(number: int, start: float, status: int, code: str, **more: Any) -> Events:
    told = {"outcome": "refused", "status": status, "code": code, "retry_after": None, "tokens": []}
    return request(number, start, OLD, **{**told, "version": None, "model": None, "first": None, **more})


def sound() -> Events:
    """A version is replaced, the traffic split, the server killed, and the name removed."""
    split = {OLD: 40, NEW: 60}
    before_split = state(NEW, OLD, NEW)
    history = [*before_split["history"], ["traffic", NEW]]
    after_split = before_split | {"traffic": split, "history": history}
    return [
        {"kind": "base", "route": "chat", "prompt": 0, "tokens": [7, 8, 9]},
        *({"kind": "version", "version": key, "name": "lee", "tokens": WORDS[key]} for key in (OLD, NEW)),
        {"kind": "version", "version": FOREIGN, "name": "wang", "tokens": WORDS[FOREIGN]},
        seen(0, state(OLD)),
        *request(1, 0.5, OLD),
        *request(2, 1.0, None),
        change(2.0, 3.0, state(NEW, OLD, NEW), status=200, wanted=200),
        *request(3, 2.1, OLD),  # either, while it is not acknowledged
        *request(4, 2.1, NEW),
        *request(5, 3.5, NEW),
        *request(6, 3.5, OLD, pin=OLD),
        *request(7, 3.6, NEW, outcome="cancelled", tokens=[4], finish=[]),
        change(4.0, 4.5, after_split, expected={"live": NEW, "traffic": split}),
        *request(8, 5.0, OLD, user="ann"),
        *request(9, 5.0, NEW, user="ben"),
        *request(10, 5.1, OLD, user="ann"),
        *request(11, 5.9, OLD, outcome="broken", tokens=[1], finish=[], first=None, version=None),
        {"kind": "outage", "start": 6.0, "end": 8.0},
        seen(8.0, after_split),
        change(9.0, 10.0, GONE, expected={"live": None, "traffic": {}}),
        *refusal(12, 9.5, 404, "model_not_found"),
        *refusal(13, 9.9, 404, "model_not_found", pin=OLD),
        *refusal(14, 10.5, 429, "queue_full", retry_after="1"),
        change(11.0, 13.0, state(OLD), complete=11.5),
        *refusal(15, 11.2, 503, "adapter_loading", retry_after="1"),
        *request(16, 13.5, OLD),
        {"kind": "rest", "running": 0, "waiting": 0},
        seen(14.0, state(OLD)),
    ]


def rules(events: Events) -> set[str]:
    return {violation.rule for violation in check(events)}


def test_a_sound_history_has_no_violation() -> None:
    assert check(sound()) == []


@pytest.mark.parametrize(
    ("rule", "wrong"),
    [
        ("hang", request(99, 3.5, NEW, outcome="hang")),
        ("cut", request(99, 3.5, NEW, outcome="cut")),
        ("broken", request(99, 3.4, NEW, outcome="broken")),
        ("stream_error", request(99, 3.5, NEW, outcome="stream_error", status=None, code="500")),
        ("incomplete", request(99, 3.5, NEW, tokens=[3])),
        ("incomplete", request(99, 3.5, NEW, finish=["length", "length"])),
        ("base_changed", request(99, 3.5, None, tokens=[7, 7])),
        ("base_changed", request(99, 3.5, None, outcome="cancelled", tokens=[8])),
        ("wrong_stamp", request(99, 3.5, None, version=NEW)),
        ("wrong_stamp", request(99, 3.5, NEW, model="lee")),
        ("wrong_stamp", request(99, 3.5, NEW, model=f"lee@{NEW}, lee@{OLD}")),
        ("wrong_stamp", request(99, 3.5, NEW, version=None)),
        ("wrong_version", request(99, 3.5, NEW, tokens=[3, 1])),
        ("wrong_version", request(99, 3.5, NEW, outcome="cancelled", tokens=[1])),
        ("not_live", request(99, 3.5, OLD)),
        ("not_live", request(99, 1.0, NEW)),
        ("not_live", request(99, 10.5, OLD)),
        ("not_live", request(99, 3.5, OLD, pin=NEW)),
        ("not_live", request(99, 13.5, NEW, pin=NEW)),
        ("refused", refusal(99, 3.2, 404, "model_not_found")),
        ("refused", refusal(99, 3.2, 404, "model_not_found", pin=OLD)),
        ("refused", refusal(99, 10.2, 503, "adapter_loading", retry_after="1")),
        ("refused", refusal(99, 11.2, 503, "adapter_loading")),
        ("refused", refusal(99, 3.2, 500, "500")),
        ("refused", refusal(99, 3.2, 429, "queue_full")),
        ("refused", request(99, 3.2, None, outcome="refused", status=404, code="model_not_found")),
        ("not_sticky", request(99, 5.2, NEW, user="ann")),
        ("ended_once", request(99, 3.5, NEW)[:1]),
        ("ended_once", [*request(99, 3.5, NEW), request(99, 3.5, NEW)[1]]),
        ("never_ended", [{"kind": "rest", "running": 0, "waiting": 1}]),
        ("acknowledged_change_lost", [seen(14.2, state(NEW, OLD, NEW))]),
    ],
)
def test_each_violation_is_found(rule: str, wrong: Events) -> None:
    assert rules([*sound(), *wrong]) == {rule}


def test_another_adapter_s_answer_is_found() -> None:
    assert rules([*sound(), *request(99, 3.5, FOREIGN)]) == {"wrong_version", "not_live"}


def replaced(matches: Callable[[dict[str, Any]], bool], **fields: Any) -> Events:
    events = sound()
    place = next(number for number, event in enumerate(events) if matches(event))
    events[place] = events[place] | fields
    return events


def test_a_change_that_the_kill_undid_is_found() -> None:
    before = state(NEW, OLD, NEW)
    for lost in (before, before | {"traffic": {OLD: 40, NEW: 60}}, state(OLD), GONE):
        events = replaced(lambda event: event["kind"] == "state" and event["start"] == 8.0, state=lost)
        assert "acknowledged_change_lost" in rules(events)


def test_a_change_that_the_kill_broke_off_may_have_been_made_or_not() -> None:
    events = [event for event in sound() if event.get("start", 0) < 6 and event.get("id", 0) < 11]
    events.append(change(5.8, 6.0, None, expected={"live": FOREIGN, "traffic": {}}))
    before = next(event["after"] for event in events if event.get("start") == 4.0)
    made = state(FOREIGN) | {"history": [*before["history"], ["publish", FOREIGN]]}
    for after in (before, made):
        assert rules([*events, seen(8.0, after)]) == set()
    assert rules([*events, seen(8.0, state(OLD))]) == {"acknowledged_change_lost"}
    late = [*events, seen(8.0, before), seen(9.0, made)]
    assert rules(late) == {"acknowledged_change_lost"}, "it came later, by itself"


def test_a_folder_s_change_on_its_way_may_show_after_the_kill() -> None:
    events = [event for event in sound() if event.get("start", 0) < 4 and event.get("id", 0) < 8]
    after = state(FOREIGN, OLD, NEW, FOREIGN)
    pending = change(5.0, 30.0, after, complete=5.0)
    outage = {"kind": "outage", "start": 6.0, "end": 28.0}
    for found in (after, state(NEW, OLD, NEW)):
        assert rules([*events, outage, seen(28.0, found), pending]) == set()
    assert rules([*events, outage, seen(28.0, state(OLD)), pending]) >= {"acknowledged_change_lost"}


def test_a_folder_s_change_that_comes_too_late_is_found() -> None:
    late = change(15.0, 60.0, state(NEW, OLD, NEW), complete=15.0)
    assert rules([*sound(), late]) == {"folder_late"}


def test_an_acknowledgement_that_says_something_else_is_found() -> None:
    is_put = {"start": 2.0}
    for wrong in ({"status": 409}, {"expected": {"live": FOREIGN, "traffic": {}}}):
        events = replaced(
            lambda event: event["kind"] == "change" and event["start"] == is_put["start"], **wrong
        )
        assert rules(events) == {"wrong_acknowledgement"}


def test_what_nobody_did_is_found() -> None:
    after = state(NEW, OLD, FOREIGN, NEW)
    events = replaced(lambda event: event["kind"] == "change" and event["start"] == 2.0, after=after)
    assert "changed_by_nobody" in rules(events)


def test_a_history_is_written_and_read_and_told(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "history.jsonl")
    for event in sound():
        recorder.write(**json.loads(json.dumps(event)))
    recorder.close()
    assert (recorder.number(), recorder.number()) == (1, 2)
    events = list(read_events(tmp_path / "history.jsonl"))
    assert check(events) == []
    told = table(events)
    assert "2 refused: 404 model_not_found" in told and "1 broken" in told and "4 put" in told
