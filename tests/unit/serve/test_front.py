"""The middleware as clients meet it: who gets in, by which name, and that nothing is held afterwards."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from serve import front as front_module
from serve.front import Desk, Front
from serve.gate import Limits
from serve.keys import Keys
from serve.manager import AdapterFailed
from serve.metrics import Metrics
from serve.routes import Routes
from tests.unit.serve.front_side import Answer, Shop, ask, nothing_is_held, spin
from vllm_lora_ext.contract import stops_of_model

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


class Vllm:
    """Stands for vLLM's app: notes what it is asked, takes a turn for it, and answers its `model`.

    `until` holds its answers up, `between` is awaited before the turn, as a tokenizer is.
    """

    def __init__(self, shop: Shop) -> None:
        self.shop = shop
        self.until: asyncio.Event | None = None
        self.between: Callable[[], Coroutine[Any, Any, None]] = spin
        self.bodies: list[dict[str, Any]] = []
        self.scopes: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        body = json.loads((await receive())["body"] or b"{}")
        self.bodies.append(body)
        model = body.get("model")
        await self.between()
        async with self.shop.manager.turn(model if "@" in str(model) else None):
            if self.until is not None:
                await self.until.wait()
        answer = json.dumps({"model": model}).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-theirs", b"1")]})
        await send({"type": "http.response.body", "body": answer})


class Stand:
    """A front with a shop behind it; `get` and `post` ask it."""

    def __init__(self, shop: Shop, **more: Any) -> None:
        self.shop, self.vllm = shop, Vllm(shop)
        self.registry = CollectorRegistry()
        parts = {"routes": Routes(), "keys": Keys([], [], loopback=True), **more}
        self.desk = Desk(
            metrics=Metrics(registry=self.registry),
            started_at=0,
            live=shop.live,
            manager=shop.manager,
            **parts,
        )
        self.front = Front(self.vllm, self.desk)

    async def post(self, body: object, path: str = CHAT, **more: Any) -> Answer:
        return await ask(self.front, "POST", path, body, **more)

    def refused(self, reason: str) -> float | None:
        return self.registry.get_sample_value("vllm_lora_refusals_total", {"reason": reason})


@pytest.fixture
def shop(tmp_path: Path, make_adapter: Callable[..., Path]) -> Shop:
    return Shop(tmp_path / "state", make_adapter)


@pytest.fixture
def stand(shop: Shop) -> Stand:
    return Stand(shop)


@pytest.mark.parametrize("name", ["a", "小李", "org/name"])
def test_an_answer_names_the_version_that_gave_it(name: str, stand: Stand) -> None:
    version = stand.shop.publish(name).live[:12]
    answer = asyncio.run(stand.post({"model": name, "messages": HI}))
    assert answer.status == 200
    assert answer.json["model"] == f"{name}@{version}"
    assert answer.headers["x-adapter-version"] == version, "names may be Chinese, headers may not"
    assert answer.headers["x-theirs"] == "1"
    assert nothing_is_held(stand.shop.manager)


def test_the_body_is_sent_on_with_its_new_length(stand: Stand) -> None:
    stand.shop.publish("a")
    sent = {"model": "a", "messages": HI, "seed": 7}
    asyncio.run(stand.post(sent, headers={"Content-Length": "17", "Transfer-Encoding": "chunked"}))
    (scope,), (body,) = stand.vllm.scopes, stand.vllm.bodies
    assert body == {**sent, "model": body["model"]}
    headers = [(name, value) for name, value in scope["headers"] if name not in (b"content-type", b"host")]
    assert headers == [(b"content-length", str(len(json.dumps(body))).encode())]


def test_the_base_is_asked_with_exactly_what_the_client_sent(stand: Stand) -> None:
    raw = b'{ "model":"base", "temperature": 0.10, "messages": [] }'
    answer = asyncio.run(stand.post(raw))
    assert answer.status == 200
    assert "x-adapter-version" not in answer.headers
    assert stand.vllm.bodies == [json.loads(raw)]


def test_a_merged_model_is_asked_with_the_stops_that_it_keeps(stand: Stand, tmp_path: Path) -> None:
    (tmp_path / "identity.json").write_text('{"stop": ["END"]}')
    stand.desk.base_stop = stops_of_model(str(tmp_path))
    for more in ({}, {"stop": ["mine"]}):
        asyncio.run(stand.post({"model": "base", "messages": HI, **more}))
    assert [body["stop"] for body in stand.vllm.bodies] == [["END"], ["mine"]]
    assert all(body["messages"] == HI for body in stand.vllm.bodies)
    (tmp_path / "identity.json").write_text("no json")
    assert stops_of_model(str(tmp_path)) == stops_of_model("org/model") == ()


def test_what_the_adapter_wants_is_put_in(stand: Stand) -> None:
    wants = {"system_prompt": "You are a.", "stop": ["END"]}
    stand.shop.publish("a", identity__json=json.dumps(wants))
    asyncio.run(stand.post({"model": "a", "messages": HI}))
    (body,) = stand.vllm.bodies
    assert body["messages"][0] == {"role": "system", "content": "You are a."}
    assert body["stop"] == ["END"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"no json", 400, "invalid_json"),
        (b"{} trailing", 400, "invalid_json"),
        ("caf\xe9".encode("latin-1"), 400, "invalid_json"),
        ({"messages": HI}, 400, "model_required"),
        ({"model": None}, 400, "model_required"),
        ({"model": ""}, 400, "model_required"),
        ({"model": 7}, 400, "invalid_value"),
        ({"model": ["a"]}, 400, "invalid_value"),
        ({"model": "x" * (1 << 20)}, 400, "invalid_value"),
        ({"model": "nobody"}, 404, "model_not_found"),
        ({"model": "../a"}, 404, "model_not_found"),
        ({"model": "/etc/passwd"}, 404, "model_not_found"),
        ({"model": "a@0000000000"}, 404, "model_not_found"),
        ({"model": "a", "chat_template": "{{ x }}"}, 400, "unsupported_parameter"),
        ({"model": "a", "chat_template_kwargs": {"chat_template": "x"}}, 400, "unsupported_parameter"),
        ({"model": "base", "chat_template": "{{ x }}"}, 400, "unsupported_parameter"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_with_a_request_is_told_on_every_route(
    body: object, status: int, code: str, stand: Stand
) -> None:
    stand.shop.publish("a")
    for number, path in enumerate((CHAT, "/v1/messages", "/tokenize"), 1):
        answer = asyncio.run(stand.post(body, path))
        assert (answer.status, answer.error["code"]) == (status, code)
        assert str(stand.shop.catalog.state_dir.parent) not in answer.body.decode()
        assert stand.vllm.bodies == []
        assert stand.refused(code) == number
        assert nothing_is_held(stand.shop.manager)


def test_while_an_adapter_is_taken_and_while_the_server_starts(stand: Stand) -> None:
    async def work() -> None:
        stand.shop.pending["new"] = "it is being admitted"
        answer = await stand.post({"model": "new"})
        assert (answer.status, answer.error["code"]) == (503, "adapter_loading")
        assert int(answer.headers["retry-after"]) >= 1
        stand.desk.live = None
        answer = await stand.post({"model": "base"})
        assert (answer.status, answer.error["code"]) == (503, "starting")
        assert int(answer.headers["retry-after"]) >= 1

    asyncio.run(work())


@pytest.mark.parametrize("limit", ["this model", "this server"])
def test_full_queues_say_when_to_come_back(
    limit: str, tmp_path: Path, make_adapter: Callable[..., Path]
) -> None:
    async def work() -> None:
        by_one = limit == "this model"
        limits = Limits(1, 2, 1, queue_per_adapter=2 if by_one else 99, queue_total=99 if by_one else 2)
        shop = Shop(tmp_path / "state", make_adapter, limits)
        shop.publish("a", 16), shop.publish("b", 32)
        stand = Stand(shop)
        stand.vllm.until = asyncio.Event()
        tasks = []
        for _ in range(3):
            tasks.append(asyncio.create_task(stand.post({"model": "a"})))
            await spin(100)
        assert (shop.manager.gate.running, shop.manager.gate.waiting) == (1, 2)
        answer = await stand.post({"model": "a"})
        assert (answer.status, answer.error["code"]) == (429, "queue_full")
        assert limit in answer.error["message"]
        assert int(answer.headers["retry-after"]) >= 1
        other = asyncio.create_task(stand.post({"model": "b"}))
        await spin(100)
        assert other.done() is not by_one, "the others' queues are not full"
        stand.vllm.until.set()
        assert {done.status for done in await asyncio.gather(*tasks)} == {200}
        assert (await other).status == (200 if by_one else 429)
        assert (await stand.post({"model": "a"})).status == 200
        assert nothing_is_held(shop.manager)

    asyncio.run(work())


def test_a_burst_that_comes_before_the_first_of_it_waits_finds_full_queues_too(
    tmp_path: Path, make_adapter: Callable[..., Path]
) -> None:
    async def work() -> None:
        shop = Shop(tmp_path / "state", make_adapter, Limits(1, 2, 2, queue_per_adapter=5, queue_total=10))
        shop.publish("a")
        stand = Stand(shop)
        tokenized = asyncio.Event()

        async def between() -> None:
            await tokenized.wait()

        stand.vllm.between = between
        tasks = [asyncio.create_task(stand.post({"model": "a"})) for _ in range(50)]
        bases = [asyncio.create_task(stand.post({"model": "base"})) for _ in range(50)]
        await spin(200)
        tokenized.set()
        statuses = [answer.status for answer in await asyncio.gather(*tasks, *bases)]
        assert statuses[:50].count(200) == 2 + 5
        assert statuses.count(200) == 2 + 10
        assert set(statuses) == {200, 429}
        assert nothing_is_held(shop.manager)

    asyncio.run(work())


@pytest.mark.parametrize("moment", ["tokenizing", "waiting", "running"])
def test_a_client_that_leaves_holds_nothing(moment: str, stand: Stand) -> None:
    async def work() -> None:
        shop = stand.shop
        shop.publish("a")
        if moment == "waiting":
            shop.manager.gate.limits = replace(shop.manager.gate.limits, running=0)
        stand.vllm.until = asyncio.Event()
        if moment == "tokenizing":
            stand.vllm.between = asyncio.Event().wait  # type: ignore[assignment]
        task = asyncio.create_task(stand.post({"model": "a"}))
        await spin(100)
        assert shop.manager._leases
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        assert nothing_is_held(shop.manager)

    asyncio.run(work())


def test_a_client_that_leaves_while_it_sends_is_not_answered(stand: Stand) -> None:
    async def half() -> AsyncIterator[bytes]:
        yield b'{"model": '
        raise ConnectionError

    answer = asyncio.run(stand.post(b"", pieces=half()))
    assert answer.status == 0
    assert stand.vllm.scopes == []


def test_a_body_that_is_too_large_or_does_not_come(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    async def for_ever() -> AsyncIterator[bytes]:
        while True:
            yield b" " * 1000

    async def slowly() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(60)

    monkeypatch.setattr(front_module, "_MAX_BODY_BYTES", 1 << 20)
    monkeypatch.setattr(front_module, "_BODY_DEADLINE_S", 0.05)
    answer = asyncio.run(stand.post(b"", pieces=for_ever()))
    assert (answer.status, answer.error["code"]) == (413, "request_too_large")
    answer = asyncio.run(stand.post(b"", pieces=slowly()))
    assert (answer.status, answer.error["code"]) == (408, "request_timeout")


def test_a_body_in_pieces_is_one_body(stand: Stand) -> None:
    async def bytewise() -> AsyncIterator[bytes]:
        for byte in b'{"model": "base"}':
            yield bytes([byte])

    assert asyncio.run(stand.post(b"", pieces=bytewise())).json == {"model": "base"}


def test_who_runs_ends_on_the_version_that_he_began_with(stand: Stand) -> None:
    """R21, and the same for a version that is replaced."""

    async def work() -> None:
        shop = stand.shop
        first = shop.publish("a", 16).live[:12]
        stand.vllm.until = asyncio.Event()
        task = asyncio.create_task(stand.post({"model": "a"}))
        await spin(100)
        second = shop.publish("a", 32).live[:12]
        shop.live.refresh()
        later = asyncio.create_task(stand.post({"model": "a"}))
        await spin(100)
        shop.catalog.remove(["a"])
        shop.live.refresh()
        shop.catalog.collect()
        assert (await stand.post({"model": "a"})).error["code"] == "model_not_found"
        assert shop.engine.unloads == []
        stand.vllm.until.set()
        assert (await task).json["model"] == f"a@{first}"
        assert (await later).json["model"] == f"a@{second}"
        await spin()
        assert sorted(shop.engine.unloads) == sorted([f"a@{first}", f"a@{second}"])
        assert nothing_is_held(shop.manager)

    asyncio.run(work())


def test_a_pinned_version_and_a_split_by_user(stand: Stand) -> None:
    async def work() -> None:
        shop = stand.shop
        first, second = shop.publish("a", 16).live, shop.publish("a", 32).live
        pinned = await stand.post({"model": f"a@{first[:12]}"})
        assert pinned.headers["x-adapter-version"] == first[:12]
        shop.catalog.set_traffic("a", {first: 50, second: 50})
        for body in ({"user": "u1"}, {"metadata": {"user_id": "u2"}}):
            answers = [await stand.post({"model": "a", **body}, "/v1/messages") for _ in range(10)]
            assert len({answer.headers["x-adapter-version"] for answer in answers}) == 1
        versions = {(await stand.post({"model": "a"})).headers["x-adapter-version"] for _ in range(60)}
        assert versions == {first[:12], second[:12]}

    asyncio.run(work())


@pytest.mark.parametrize("stated", [True, 1, "true"])
def test_a_response_in_the_background_keeps_its_lease_until_it_ends(stated: object, stand: Stand) -> None:
    async def work() -> None:
        stand.shop.publish("a")
        ends = asyncio.Event()
        tasks: list[asyncio.Task[Any]] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            model = json.loads((await receive())["body"])["model"]

            async def goes_on() -> None:
                await spin(50)
                async with stand.shop.manager.turn(model):
                    await ends.wait()

            tasks.append(asyncio.create_task(goes_on()))
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        stand.front = Front(app, stand.desk)
        stand.desk.background = lambda: tasks
        body = {"model": "a", "input": "hi", "background": stated}
        assert (await stand.post(body, "/v1/responses")).status == 200
        assert stand.shop.manager._leases
        stand.shop.catalog.remove(["a"])
        stand.shop.live.refresh()
        stand.shop.catalog.collect()
        await spin(200)
        assert stand.shop.manager.gate.running == 1, "it goes on though its name is gone"
        ends.set()
        await tasks[0]
        await spin()
        assert nothing_is_held(stand.shop.manager)

    asyncio.run(work())


def test_a_version_that_vanishes_from_the_store_is_told(stand: Stand) -> None:
    async def work() -> None:
        digest = stand.shop.publish("a").live
        assert (await stand.post({"model": "a"})).status == 200
        stand.shop.manager.retire(f"a@{digest[:12]}")  # one that is in memory would go on
        await spin()
        folder = stand.shop.catalog.store.root / digest
        folder.chmod(0o755)
        folder.rename(stand.shop.catalog.store.root / "away")
        answer = await stand.post({"model": "a"})
        assert answer.status >= 400
        assert str(stand.shop.catalog.state_dir) not in answer.error["message"]
        assert nothing_is_held(stand.shop.manager)

    asyncio.run(work())


def test_a_load_that_fails_ends_its_requests_and_is_tried_again_after_a_while(stand: Stand) -> None:
    async def work() -> None:
        shop, engine = stand.shop, stand.shop.engine
        model = f"a@{shop.publish('a').live[:12]}"
        engine.failing[model] = "no room"
        first = [stand.post({"model": "a"}) for _ in range(5)]
        for outcome in await asyncio.gather(*first, return_exceptions=True):
            assert isinstance(outcome, AdapterFailed)
        answer = await stand.post({"model": "a"})
        assert (answer.status, answer.error["code"]) == (404, "model_not_found")
        assert "no room" in answer.error["message"]
        assert engine.loads == [model], "nobody tried it again"
        engine.failing.clear()
        shop.now += 31.0
        assert (await stand.post({"model": "a"})).status == 200
        assert engine.loads == [model, model]
        assert nothing_is_held(shop.manager)

    asyncio.run(work())


def test_many_adapters_at_once_are_served_or_told_to_come_back(stand: Stand) -> None:
    """R19: each waits for a slot, and no more of them than the queue holds."""

    async def work() -> None:
        entry = stand.shop.publish("a-0")
        with stand.shop.catalog.together():
            for number in range(1, 60):
                stand.shop.catalog.publish(f"a-{number}", entry.live_version)
        answers = await asyncio.gather(*(stand.post({"model": f"a-{number}"}) for number in range(60)))
        statuses = [answer.status for answer in answers]
        limits = stand.shop.manager.gate.limits
        assert statuses.count(200) >= limits.queue_total and set(statuses) <= {200, 429}
        assert all("retry-after" in answer.headers for answer in answers if answer.status == 429)
        assert len(stand.shop.engine.memory) <= limits.cached
        assert nothing_is_held(stand.shop.manager)

    asyncio.run(work())


def test_a_name_that_is_found_elsewhere(stand: Stand) -> None:
    async def work() -> None:
        asked = []

        async def find(name: str) -> bool:
            asked.append(name)
            if name == "far":
                stand.shop.publish("far")
            return name == "far"

        stand.desk.find = find
        assert (await stand.post({"model": "far"})).status == 200
        assert (await stand.post({"model": "nobody"})).status == 404
        assert (await stand.post({"model": 7})).status == 400
        assert asked == ["far", "nobody"]

    asyncio.run(work())


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("POST", "/invocations", 404, "route_closed"),
        ("POST", "/adapters", 404, "route_closed"),
        ("POST", "/pause", 404, "route_closed"),
        ("POST", "//v1/chat/completions", 404, "route_closed"),
        ("POST", "/v1/..;/v1/chat/completions", 404, "route_closed"),
        ("POST", "/v1/chat/completions/", 404, "route_closed"),
        ("GET", CHAT, 405, "method_not_allowed"),
    ],
)
def test_what_is_not_listed_is_closed(method: str, path: str, status: int, code: str, stand: Stand) -> None:
    answer = asyncio.run(ask(stand.front, method, path, {"model": "base"}))
    assert (answer.status, answer.error["code"]) == (status, code)
    if status == 404:
        assert "--allow-route" in answer.error["message"]
    assert stand.vllm.scopes == []


def test_keys_are_asked_for_before_anything_else(shop: Shop) -> None:
    async def work() -> None:
        stand = Stand(shop, keys=Keys(["api"], ["admin"], loopback=True))
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic api"},
            [(b"authorization", b"Bearer api"), (b"authorization", b"Bearer admin")],
        ):
            answer = await stand.post(b"no json", headers=headers)
            assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
        key = {"Authorization": "Bearer api"}
        assert (await stand.post({"model": "base"}, headers=key)).status == 200
        answer = await ask(stand.front, "PUT", "/v1/adapters/a?key=admin", headers=key)
        assert (answer.status, answer.error["code"]) == (403, "admin_key_required")
        assert (await ask(stand.front, "GET", "/health")).status == 200

    asyncio.run(work())


def test_web_sockets_are_closed_and_the_lifespan_is_vllms(stand: Stand) -> None:
    async def work() -> None:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        await stand.front({"type": "websocket", "path": "/v1/realtime"}, None, send)  # type: ignore[arg-type]
        assert sent == [{"type": "websocket.close", "code": 1008}]
        seen: list[str] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            seen.append(scope["type"])

        await Front(app, stand.desk)({"type": "lifespan"}, None, None)  # type: ignore[arg-type]
        assert seen == ["lifespan"]

    asyncio.run(work())


def test_metrics_are_read_beside_the_event_loop_by_either_path(stand: Stand) -> None:
    async def work() -> None:
        for path in ("/metrics", "/metrics/"):
            await ask(stand.front, "GET", path)
        assert {scope["path"] for scope in stand.vllm.scopes} == {"/metrics"}

    asyncio.run(work())
