"""A server that was told to stop: what was accepted ends, new ones go elsewhere, the engine goes last."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serve.drain import Drain
from serve.endpoint import readiness
from serve.openai_errors import ApiError
from serve.vllm_engine import drain_before_shutdown
from tests.unit.serve.front_side import Shop, ask, nothing_is_held, run_simulated, spin
from tests.unit.serve.test_front import HI, Stand


class Engine:
    """Stands for vLLM's client of the engine: notes when it is shut down, and what had ended by then."""

    def __init__(self, drain: Drain) -> None:
        self.drain = drain
        self.shutdowns: list[tuple[float | None, int]] = []

    def shutdown(self, timeout: float | None = None) -> None:
        self.shutdowns.append((timeout, self.drain.accepted))

    async def check_health(self) -> None:
        """It is well."""


async def in_a_thread(work: Callable[[], None]) -> None:
    """As vLLM calls it when a signal has come."""
    await asyncio.get_running_loop().run_in_executor(None, work)


@pytest.fixture
def stand(tmp_path: Path, make_adapter: Callable[..., Path]) -> Stand:
    return Stand(Shop(tmp_path / "state", make_adapter))


def test_what_was_accepted_ends_and_what_comes_is_sent_elsewhere(stand: Stand) -> None:
    async def work() -> None:
        for name in ("a", "b", "c"):  # two of them fit the slots: the third waits for its turn
            stand.shop.publish(name)
        stand.vllm.until = asyncio.Event()
        accepted = [asyncio.create_task(stand.post({"model": name, "messages": HI})) for name in "abc"]
        await spin()
        engine: Any = Engine(stand.desk.drain)
        state: Any = SimpleNamespace(engine_client=engine)
        assert (await readiness(state, stand.desk))[0] == 200
        drain_before_shutdown(engine, stand.desk.drain, asyncio.get_running_loop())
        stopping = asyncio.create_task(in_a_thread(lambda: engine.shutdown(timeout=60)))
        while not stand.desk.drain.stopping:
            await asyncio.sleep(0.01)

        status, body = await readiness(state, stand.desk)
        assert (status, body["status"], body["requests"]) == (503, "stopping", 3)
        for method, path in (("POST", "/v1/chat/completions"), ("DELETE", "/v1/adapters/a")):
            answer = await ask(stand.front, method, path, {"model": "a", "messages": HI})
            assert (answer.status, answer.error["code"]) == (503, "stopping")
            assert answer.headers["retry-after"] == "1"
            assert answer.headers["connection"] == "close", "or the client would come back to this server"
        assert stand.refused("stopping") == 2
        assert engine.shutdowns == [], "it is still needed"

        stand.vllm.until.set()
        assert [answer.status for answer in await asyncio.gather(*accepted)] == [200, 200, 200]
        await stopping
        ((left, running),) = engine.shutdowns
        assert running == 0 and left is not None and 0 < left <= 60
        assert nothing_is_held(stand.shop.manager)
        engine.shutdown(timeout=60)  # vLLM's second call, in the event loop
        assert engine.shutdowns[-1][1] == 0

    asyncio.run(work())


def test_the_time_is_shared_with_the_engine_and_none_is_added(stand: Stand) -> None:
    async def work() -> None:
        engine: Any = Engine(stand.desk.drain)
        drain_before_shutdown(engine, stand.desk.drain, asyncio.get_running_loop())
        with stand.desk.drain.request():
            await in_a_thread(lambda: engine.shutdown(timeout=0.05))
            await in_a_thread(lambda: engine.shutdown(timeout=0))  # what runs is aborted
            engine.shutdown(timeout=60)  # in the event loop nothing could end meanwhile
        assert [running for _, running in engine.shutdowns] == [1, 1, 1]
        assert engine.shutdowns[0][0] == engine.shutdowns[1][0] == 0

    asyncio.run(work())


def test_an_engine_that_is_shut_down_before_or_after_the_loop_is_not_waited_for() -> None:
    drain = Drain()
    engine: Any = Engine(drain)
    loop = asyncio.new_event_loop()
    drain_before_shutdown(engine, drain, loop)
    with drain.request():
        engine.shutdown(timeout=60)
        loop.close()
        engine.shutdown()
    assert [timeout for timeout, _ in engine.shutdowns][1:] == [None]
    assert len(engine.shutdowns) == 2


def test_waiting_ends_with_the_last_request_or_with_the_time() -> None:
    async def work() -> None:
        drain = Drain()
        drain.check()
        first, second = drain.request(), drain.request()
        first.__enter__()
        second.__enter__()
        loop = asyncio.get_running_loop()
        stop = asyncio.create_task(drain.stop(100.0))
        await asyncio.sleep(10)
        first.__exit__(None, None, None)
        await asyncio.sleep(10)
        assert not stop.done()
        second.__exit__(None, None, None)
        await stop
        assert loop.time() == 20
        with drain.request():
            await drain.stop(100.0)
        assert loop.time() == 120
        with pytest.raises(ApiError, match="stopping"):
            drain.check()

    run_simulated(work())
