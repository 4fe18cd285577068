"""What passes between gateway and replica, and what clients hear of a loss."""

from __future__ import annotations

import json

import pytest

from serve.openai_errors import ApiError
from serve.scaleout.changes import Change, change_of
from serve.scaleout.forwarding import Head, error_event, lost_error, passed_on


def test_headers_of_one_connection_stay_there() -> None:
    headers = [
        (b"Host", b"fleet:8000"),
        (b"Connection", b"keep-alive, X-Only-Here"),
        (b"X-Only-Here", b"1"),
        (b"Transfer-Encoding", b"chunked"),
        (b"Authorization", b"Bearer k"),
        (b"X-Chat-Settings", b"{}"),
        (b"accept", b"a"),
        (b"accept", b"b"),
    ]
    assert passed_on(headers) == (
        ("authorization", "Bearer k"),
        ("x-chat-settings", "{}"),
        ("accept", "a"),
        ("accept", "b"),
    )


def test_a_stream_is_told_by_its_type() -> None:
    assert Head(200, (("content-type", "text/event-stream; charset=utf-8"),), "r").is_stream
    assert not Head(200, (("content-type", "application/json"),), "r").is_stream


def test_a_stream_that_has_lost_its_replica_ends_with_an_error_that_clients_read() -> None:
    first, second, rest = error_event("ReadError from its server").decode().split("\n\n")
    body = json.loads(first.removeprefix("data: "))
    assert body["error"]["code"] == "replica_lost"
    assert "ReadError" in body["error"]["message"]
    assert (second, rest) == ("data: [DONE]", "")
    assert lost_error("why").status == 502


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("PUT", "/v1/adapters/xiaoli", Change("publish", "xiaoli")),
        ("PUT", "/v1/adapters/xiaoli/traffic", Change("traffic", "xiaoli")),
        ("POST", "/v1/adapters/xiaoli/rollback", Change("rollback", "xiaoli")),
        ("DELETE", "/v1/adapters/xiaoli", Change("remove", "xiaoli")),
        ("DELETE", "/v1/adapters/a/traffic", Change("remove", "a/traffic")),
        ("PUT", "/v1/adapters/a/b", Change("publish", "a/b")),
    ],
)
def test_a_route_stands_for_a_change(method: str, path: str, expected: Change) -> None:
    assert change_of(method, path) == expected


def test_what_a_change_is_told_is_checked() -> None:
    assert Change("rollback", "a").to_of({}) is None
    assert Change("rollback", "a").to_of({"to": "3f2a"}) == "3f2a"
    assert Change("traffic", "a").percent_of({"traffic": {"3f2a": 100}}) == {"3f2a": 100}
    for change, body in (
        (Change("rollback", "a").to_of, {"to": 3}),
        (Change("rollback", "a").to_of, {"to": ""}),
        (Change("traffic", "a").percent_of, {}),
        (Change("traffic", "a").percent_of, {"traffic": {"3f2a": True}}),
        (Change("traffic", "a").percent_of, {"traffic": {"3f2a": 1.5}}),
    ):
        with pytest.raises(ApiError) as refused:
            change(body)
        assert refused.value.status == 400
    with pytest.raises(ApiError) as closed:
        change_of("POST", "/v1/load_lora_adapter")
    assert closed.value.code == "not_with_replicas"
