"""The gateway over engines that are faked: what is tried again, what goes out, what a lost stream says.

The fake is a handle of Ray Serve as the gateway uses it: `forward.remote(request)` gives an asynchronous
iterator of pieces that can be cancelled, and may raise one of Ray's errors in the middle.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'vllm-lora[ray]'")
pytest.importorskip("starlette", reason="it comes with Ray")

from ray.exceptions import ActorDiedError
from starlette.responses import StreamingResponse

from serve.openai_errors import ApiError
from serve.scaleout.forwarding import Forwarded, Head, Lost
from serve.scaleout.gateway import Gateway

WHOLE = Head(
    200, (("content-type", "application/json"), ("x-adapter-version", "3f2a"), ("date", "then")), "r1"
)
STREAM = Head(200, (("content-type", "text/event-stream"),), "r1")
REQUEST = Forwarded("POST", "/v1/completions", (), b"{}", version="3f2a")
DIED, GONE = ActorDiedError(), Lost("r1", "gone")


class FakeAnswer:
    def __init__(self, pieces: Sequence[Any]) -> None:
        self._pieces, self.cancelled = list(pieces), False

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        if not self._pieces:
            raise StopAsyncIteration
        piece = self._pieces.pop(0)
        if isinstance(piece, Exception):
            raise piece
        return piece

    def cancel(self) -> None:
        self.cancelled = True


class FakeEngine:
    """`answers` are what one call after the other gives."""

    def __init__(self, *answers: Sequence[Any]) -> None:
        self.forward, self.asked = self, list[Forwarded]()
        self.given = [FakeAnswer(pieces) for pieces in answers]

    def remote(self, request: Forwarded) -> FakeAnswer:
        self.asked.append(request)
        return self.given[len(self.asked) - 1]


def forward(*answers: Sequence[Any]) -> tuple[FakeEngine, int, bytes, dict[str, str]]:
    """Status, body and headers that a client gets."""
    gateway = object.__new__(Gateway)
    engine = gateway._engine = FakeEngine(*answers)

    async def work() -> tuple[int, bytes, dict[str, str]]:
        response = await gateway._forward(REQUEST)
        headers = {name.decode(): value.decode() for name, value in response.raw_headers}
        if isinstance(response, StreamingResponse):
            return response.status_code, b"".join([bytes(p) async for p in response.body_iterator]), headers
        return response.status_code, bytes(response.body), headers

    return engine, *asyncio.run(work())


def test_an_answer_goes_out_as_it_came() -> None:
    engine, status, body, headers = forward([WHOLE, b'{"a"', b": 1}"])
    assert (status, body) == (200, b'{"a": 1}')
    assert headers["x-adapter-version"] == "3f2a"
    assert headers["x-replica"] == "r1"
    assert "date" not in headers
    assert headers["content-length"] == "8"
    assert engine.asked == [REQUEST]


def test_an_answer_without_a_body_is_one() -> None:
    assert forward([Head(200, (), "r1")])[1:3] == (200, b"")


@pytest.mark.parametrize(
    "lost",
    [[Lost("r1", "gone")], [DIED], [WHOLE, DIED], [WHOLE, b'{"a"', Lost("r1", "gone")], [STREAM, DIED], []],
)
def test_what_had_not_begun_is_sent_elsewhere_once(lost: list[Any]) -> None:
    engine, status, body, _ = forward(lost, [WHOLE, b"{}"])
    assert (status, body) == (200, b"{}")
    assert [request.version for request in engine.asked] == ["3f2a", "3f2a"]
    assert engine.asked[1].avoid == ("r1" if GONE in lost else "")


def test_twice_lost_is_told() -> None:
    with pytest.raises(ApiError) as refused:
        forward([DIED], [Lost("r2", "gone"), WHOLE])
    assert (refused.value.status, refused.value.code) == (502, "replica_lost")


@pytest.mark.parametrize("lost", [DIED, GONE])
def test_a_stream_that_had_begun_ends_with_an_error_event(lost: Any) -> None:
    engine, status, body, _ = forward([STREAM, b"data: {}\n\n", lost])
    first, second, third, rest = body.decode().split("\n\n")
    assert (status, first, third, rest) == (200, "data: {}", "data: [DONE]", "")
    assert json.loads(second.removeprefix("data: "))["error"]["code"] == "replica_lost"
    assert len(engine.asked) == 1


def test_a_client_that_goes_away_ends_its_request() -> None:
    gateway = object.__new__(Gateway)
    engine = gateway._engine = FakeEngine([STREAM, b"data: 1\n\n", b"data: 2\n\n"])

    async def work() -> None:
        response = await gateway._forward(REQUEST)
        assert isinstance(response, StreamingResponse)
        pieces = response.body_iterator
        assert await anext(pieces) == b"data: 1\n\n"
        assert not engine.given[0].cancelled
        await pieces.aclose()  # type: ignore[attr-defined]

    asyncio.run(work())
    assert engine.given[0].cancelled
