"""Adapters are published, shown, rolled back, split and removed while the server serves."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from serve import admin as admin_module
from serve.admin import Admin, NoFolders
from serve.admin_routes import CHAT_HEADER, attach_routes
from serve.front import Desk, Front
from serve.keys import Keys
from serve.metrics import Metrics
from serve.routes import Routes
from tests.conftest import lora_tensors
from tests.unit.serve.front_side import LIMITS, Answer, Shop, ask, nothing_is_held, spin
from vllm_lora_ext.archive import pack
from vllm_lora_ext.errors import AdapterRefused, StateLocked, StoreFailed
from vllm_lora_ext.records import FolderRecord
from vllm_lora_ext.spec import Finding

pytest.importorskip("fastapi")

MakeAdapter = Callable[..., Path]
NAMES = ("a", "小李", "org/name")


class Folders(NoFolders):
    """Watched folders of which two are not whole."""

    def pending(self) -> Mapping[str, str]:
        return {"new": "it is being admitted", "a": "it is being looked at"}

    def incomplete(self) -> Mapping[str, str]:
        return {"half": "adapter_model.safetensors has 3 of 10 bytes"}


class Server:
    """Our routes behind our front, with a shop behind them; no engine and no socket."""

    def __init__(self, tmp_path: Path, make_adapter: MakeAdapter, folders: Any = None) -> None:
        from fastapi import FastAPI

        self.tmp_path = tmp_path
        self.shop = Shop(tmp_path / "state", make_adapter)
        self.root = tmp_path / "adapters"
        self.root.mkdir(exist_ok=True)
        self.admin = Admin(self.shop.live, self.shop.manager, folders or NoFolders(), [self.root])
        self.desk = Desk(
            Routes(), Keys([], [], loopback=True), Metrics(registry=CollectorRegistry()), started_at=7
        )
        self.desk.live, self.desk.manager, self.desk.admin = self.shop.live, self.shop.manager, self.admin
        self.desk.max_model_len = 4096
        app = FastAPI()
        app.add_middleware(Front, desk=self.desk)
        attach_routes(app, self.desk, self.readiness)
        self.app = app

    async def readiness(self) -> tuple[int, Any]:
        return 503, {"status": "starting"}

    async def ask(self, method: str, path: str, body: object = b"", **more: Any) -> Answer:
        answer = await ask(self.app, method, path, body, **more)
        if answer.status >= 400:
            assert str(self.tmp_path) not in answer.body.decode(), "a path of this machine"
            assert answer.error["message"]
        return answer

    async def publish(self, name: str, folder: Path, query: str = "", **headers: str) -> Answer:
        pieces = more_at_once(pack(folder))
        return await self.ask("PUT", f"/v1/adapters/{name}{query}", pieces=pieces, headers=headers)

    def nothing_is_left(self) -> bool:
        """No upload, no version that no name has, no lease, no place in the engine's memory."""
        store = self.shop.catalog.store
        names = {version.digest for entry in self.shop.catalog.entries() for version in entry.versions}
        hidden = list(store.root.glob(".*")) if store.root.is_dir() else []
        incoming = list(self.shop.catalog.incoming.glob("*"))
        return not incoming and not hidden and store.digests() == names and nothing_is_held(self.shop.manager)


async def more_at_once(pieces: Any) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


@pytest.fixture
def server(tmp_path: Path, make_adapter: MakeAdapter) -> Server:
    return Server(tmp_path, make_adapter)


def bad_folder(server: Server) -> Path:
    """An adapter that no rule lets in: its tensors have another rank than its config says."""
    return server.shop.make_adapter("bad", tensors=lora_tensors(rank=4))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_published_is_served_at_once(name: str, server: Server) -> None:
    async def work() -> None:
        answer = await server.publish(name, server.shop.folder(16))
        assert answer.status == 200
        adapter = answer.json
        assert adapter["id"] == name and adapter["rank"] == 8
        assert adapter["state"] == "slot", "it is loaded before it is live"
        assert adapter["requests"] == 0, "and nobody has asked for it"
        assert server.shop.engine.loads == [f"{name}@{adapter['version']}"]
        served = server.shop.live.resolve(name)
        assert served is not None and served.version.digest == adapter["digest"]
        assert served.version.source == "upload", "the folder it was unpacked into says nothing"
        shown = await server.ask("GET", f"/v1/adapters/{name}")
        assert shown.json["versions"][0]["live"] is True
        assert [event["what"] for event in shown.json["history"]] == ["publish"]
        assert server.nothing_is_left()

    asyncio.run(work())


def test_another_content_under_the_same_name_has_to_be_meant(server: Server) -> None:
    async def work() -> None:
        first, second = server.shop.folder(16), server.shop.folder(32)
        live = (await server.publish("a", first)).json["version"]
        answer = await server.publish("a", second)
        assert (answer.status, answer.error["code"]) == (409, "adapter_exists")
        assert "--replace" in answer.error["message"]
        assert (await server.ask("GET", "/v1/adapters/a")).json["version"] == live
        await spin()
        assert list(server.shop.engine.memory.values()) == [f"a@{live}"], "what is not live is not kept"
        assert server.nothing_is_left()
        assert (await server.publish("a", first)).json["version"] == live
        replaced = (await server.publish("a", second, "?replace=true")).json["version"]
        assert replaced != live
        await spin()
        assert list(server.shop.engine.memory.values()) == [f"a@{replaced}"], "the old one leaves"

    asyncio.run(work())


def test_an_adapter_that_is_refused_changes_nothing(server: Server) -> None:
    async def work() -> None:
        live = (await server.publish("a", server.shop.folder(16))).json["version"]
        answer = await server.publish("a", bad_folder(server), "?replace=true")
        assert (answer.status, answer.error["code"]) == (422, "adapter_refused")
        findings = answer.error["findings"]
        assert "rank_mismatch" in {finding["code"] for finding in findings}
        assert answer.error["param"] == findings[0]["item"]
        assert (await server.ask("GET", "/v1/adapters/a")).json["version"] == live
        assert server.nothing_is_left()

    asyncio.run(work())


def test_an_adapter_that_the_engine_cannot_load_leaves_the_old_version_live(server: Server) -> None:
    async def work() -> None:
        engine = server.shop.engine
        live = (await server.publish("a", server.shop.folder(16))).json["version"]
        folder = server.shop.folder(32)
        version = (await server.publish("other", folder)).json["version"]
        engine.failing[f"a@{version}"] = "no module for it"
        answer = await server.publish("a", folder, "?replace=true")
        assert (answer.status, answer.error["code"]) == (500, "adapter_failed")
        assert "no module for it" in answer.error["message"]
        served = server.shop.live.resolve("a")
        assert served is not None and served.version.short == live
        assert server.nothing_is_left()
        engine.failing.clear()
        assert (await server.publish("a", folder, "?replace=true")).json["version"] == version
        served = server.shop.live.resolve("a")
        assert served is not None and served.version.short == version, "the failure is over"

    asyncio.run(work())


def test_an_upload_that_breaks_off_leaves_nothing(server: Server) -> None:
    async def work() -> None:
        whole = b"".join(pack(server.shop.folder(16)))

        async def breaks_off() -> AsyncIterator[bytes]:
            for start in range(0, len(whole) // 2, 4096):
                yield whole[start : start + 4096]
            raise ConnectionError

        await ask(server.app, "PUT", "/v1/adapters/a", pieces=breaks_off())
        assert server.shop.catalog.names() == []
        assert server.nothing_is_left()

    asyncio.run(work())


@pytest.mark.parametrize(
    ("archive", "told"),
    [
        (lambda whole: whole[: len(whole) // 2], "ends in the middle"),
        (lambda whole: b"", "ends in the middle"),
        (lambda whole: bytes(10240), "holds no file"),
        (lambda whole: b"PK\x03\x04" + whole, "no tar archive"),
        (lambda whole: whole + whole, "goes on behind its end"),
        (lambda whole: whole.replace(b"adapter_config.json", b"../../../etc/passwd"), "damaged"),
    ],
)
def test_what_is_no_archive_of_an_adapter_is_told(
    archive: Callable[[bytes], bytes], told: str, server: Server
) -> None:
    async def work() -> None:
        whole = b"".join(pack(server.shop.folder(16)))
        answer = await server.ask("PUT", "/v1/adapters/a", archive(whole))
        assert (answer.status, answer.error["code"]) == (400, "invalid_value")
        assert told in answer.error["message"]
        assert server.nothing_is_left()

    asyncio.run(work())


def test_an_archive_has_a_limit(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_module, "_MAX_ARCHIVE_BYTES", 10_000)
    answer = asyncio.run(server.publish("a", server.shop.folder(16)))
    assert answer.status == 400 and "there is room for" in answer.error["message"]
    assert server.nothing_is_left()


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("..", "adapter_name_invalid"),
        ("../x", "adapter_name_invalid"),
        ("a//b", "adapter_name_invalid"),
        ("a\0b", "adapter_name_invalid"),
        ("x" * 65, "adapter_name_invalid"),
        ("a%2e%2e", "adapter_name_invalid"),
        ("‮evil", "adapter_name_invalid"),
        ("a@b", "adapter_name_reserved"),
        ("base", "adapter_name_reserved"),
        ("image", "adapter_name_reserved"),
    ],
)
def test_a_name_that_is_none(name: str, code: str, server: Server) -> None:
    answer = asyncio.run(server.publish(name, server.shop.folder(16)))
    assert (answer.status, answer.error["code"]) == (400, code)
    assert answer.error["message"].isprintable()
    assert not server.shop.catalog.incoming.exists(), "nothing was read"


def test_a_full_disk_is_told_without_its_path(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise StoreFailed(str(server.shop.catalog.state_dir), OSError(errno.ENOSPC, "No space left"))

    async def work() -> None:
        folder = server.shop.folder(16)
        with monkeypatch.context() as patch:
            patch.setattr(server.shop.catalog, "publish", full)
            answer = await server.publish("a", folder)
        assert (answer.status, answer.error["code"]) == (507, "store_failed")
        assert "disk is full" in answer.error["message"]
        await spin()
        assert server.shop.engine.memory == {}
        assert server.nothing_is_left()
        server.shop.catalog.incoming.rmdir()
        server.shop.catalog.incoming.write_text("is no folder")
        assert (await server.publish("a", folder)).status == 507

    asyncio.run(work())


def test_a_catalog_that_another_process_has_is_told_without_its_path(server: Server) -> None:
    async def work() -> None:
        await server.publish("a", server.shop.folder(16))
        server.shop.catalog.close()
        answer = await server.ask("DELETE", "/v1/adapters/a")
        assert (answer.status, answer.error["code"]) == (503, "state_locked")

    asyncio.run(work())
    with pytest.raises(StateLocked):
        server.shop.catalog.remove(["a"])


@pytest.mark.parametrize("as_ascii", [True, False])
def test_chat_settings_are_stated_beside_the_archive(as_ascii: bool, server: Server) -> None:
    async def work() -> None:
        stated = {"system_prompt": "你是小李。", "stop": ["END"]}
        header = json.dumps(stated, ensure_ascii=as_ascii).encode().decode("latin-1")
        answer = await server.publish("a", server.shop.folder(16), **{CHAT_HEADER: header})
        assert answer.status == 200
        chat = (await server.ask("GET", "/v1/adapters/a")).json["chat"]
        assert chat["system_prompt"] == "你是小李。" and chat["stop"] == ["END"]

    asyncio.run(work())


@pytest.mark.parametrize(
    "stated", ["no json", "[1]", '{"unknown": 1}', '{"stop": "END"}', '{"stop": NaN}', "\xff"]
)
def test_chat_settings_that_are_none(stated: str, server: Server) -> None:
    answer = asyncio.run(server.publish("a", server.shop.folder(16), **{CHAT_HEADER: stated}))
    assert answer.status == 400
    assert server.shop.catalog.names() == []


@pytest.mark.parametrize("name", NAMES)
def test_rollback_split_and_removal(name: str, server: Server) -> None:
    async def work() -> None:
        first = (await server.publish(name, server.shop.folder(16))).json["version"]
        second = (await server.publish(name, server.shop.folder(32), "?replace=true")).json["version"]
        path = f"/v1/adapters/{name}"
        assert (await server.ask("POST", f"{path}/rollback")).json["version"] == first
        assert (await server.ask("POST", f"{path}/rollback", {"to": second[:6]})).json["version"] == second
        split = {first: 30, second: 70}
        assert (await server.ask("PUT", f"{path}/traffic", {"traffic": split})).json["traffic"] == split
        assert (await server.ask("PUT", f"{path}/traffic", {"traffic": {}})).json["traffic"] == {}
        gone = await server.ask("DELETE", path)
        assert gone.json == {"id": name, "object": "adapter", "deleted": True}
        assert (await server.ask("GET", path)).error["code"] == "adapter_unknown"
        await spin()
        assert server.shop.engine.memory == {}
        assert server.nothing_is_left()

    asyncio.run(work())


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/v1/adapters/b", b"", 404),
        ("DELETE", "/v1/adapters/b", b"", 404),
        ("POST", "/v1/adapters/b/rollback", b"", 404),
        ("PUT", "/v1/adapters/b/traffic", {"traffic": {}}, 404),
        ("POST", "/v1/adapters/a/rollback", b"", 404),  # there is none before
        ("POST", "/v1/adapters/a/rollback", {"to": "0000"}, 404),
        ("POST", "/v1/adapters/a/rollback", {"to": 7}, 400),
        ("POST", "/v1/adapters/a/rollback", b"no json", 400),
        ("PUT", "/v1/adapters/a/traffic", b"", 400),
        ("PUT", "/v1/adapters/a/traffic", {"traffic": {"0000": 100}}, 404),
        ("PUT", "/v1/adapters/a/traffic", {"traffic": {"LIVE": 99}}, 400),
        ("PUT", "/v1/adapters/a/traffic", {"traffic": {"LIVE": "100"}}, 400),
        ("PUT", "/v1/adapters/a/traffic", {"traffic": {"LIVE": True}}, 400),
        ("PUT", "/v1/adapters/a/traffic", {"traffic": [["LIVE", 100]]}, 400),
        ("POST", "/v1/adapters/a/rollback", b" " * ((1 << 20) + 1), 413),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_cannot_be_done_is_told(method: str, path: str, body: Any, status: int, server: Server) -> None:
    async def work() -> None:
        live = server.shop.publish("a").live[:12]
        sent = body if isinstance(body, bytes) else json.dumps(body).replace("LIVE", live).encode()
        answer = await server.ask(method, path, sent)
        assert answer.status == status
        entry = server.shop.catalog.entry("a")
        assert entry.live[:12] == live and entry.traffic == {}

    asyncio.run(work())


def test_one_list_says_where_every_name_is(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    async def work() -> None:
        server = Server(tmp_path, make_adapter, Folders())
        shop = server.shop
        shop.manager.gate.limits = LIMITS.__class__(1, 2, 8)
        no = Finding("rank_too_large", "r", "rank 999", "Smaller.")
        shop.catalog.note_folders(
            {
                "bad=/x/bad": FolderRecord(None, (), "bad", (no,)),
                "b=/x/b": FolderRecord("d", (), "b", (no,)),
            }
        )
        for name, alpha in (("a", 16), ("b", 32), ("c", 64)):
            shop.publish(name, alpha)
        for name in ("a", "b"):
            version = shop.live.resolve(name)
            assert version is not None
            await shop.manager.prove(version)
        rows = (await server.ask("GET", "/v1/adapters")).json["data"]
        states = {row["id"]: row["state"] for row in rows}
        assert states == {
            "a": "cached",
            "b": "slot",
            "c": "stored",
            "bad": "refused",
            "half": "incomplete",
            "new": "loading",
        }
        assert [row["id"] for row in rows] == sorted(states)
        findings = {row["id"]: [item["code"] for item in row["findings"]] for row in rows}
        assert findings["b"] == ["rank_too_large"], "its folder was refused, and what was taken is served"
        assert findings["half"] and findings["new"]
        for name in ("half", "new", "bad", "b"):
            shown = (await server.ask("GET", f"/v1/adapters/{name}")).json
            assert shown["state"] == states[name] and "versions" in shown

    asyncio.run(work())


def test_requests_are_shown_where_they_are(server: Server) -> None:
    async def work() -> None:
        shop = server.shop
        shop.publish("a")
        version = shop.live.resolve("a")
        assert version is not None
        shop.manager.hold(version)
        async with shop.manager.turn(version.model):
            row = (await server.ask("GET", "/v1/adapters/a")).json
            assert (row["running"], row["waiting"], row["requests"]) == (1, 0, 1)
            assert row["last_used"] and row["load_seconds"] >= 0
            assert row["versions"][0]["resident"] is True
        shop.manager.release(version.model)
        assert (await server.ask("GET", "/v1/adapters/a")).json["running"] == 0

    asyncio.run(work())


def test_models_are_listed_whether_they_are_in_memory_or_not(server: Server) -> None:
    async def work() -> None:
        for name in NAMES:
            server.shop.publish(name)
        answer = await server.ask("GET", "/v1/models")
        cards = {card["id"]: card for card in answer.json["data"]}
        assert set(cards) == {"base", "base-too", *NAMES}
        version = server.shop.catalog.entry("a").live[:12]
        assert cards["a"] == {
            "id": "a",
            "object": "model",
            "created": 7,
            "owned_by": "vllm-lora",
            "root": f"a@{version}",
            "parent": "base",
            "max_model_len": 4096,
            "version": version,
        }
        assert cards["base"]["parent"] is None and "version" not in cards["base"]
        assert str(server.tmp_path) not in answer.body.decode()
        for model in ("base", *NAMES, f"小李@{version}"):
            for path in (model, quote(model, safe="")):  # a proxy may have encoded it once more
                shown = (await server.ask("GET", f"/v1/models/{path}")).json
                assert shown["object"] == "model"
                assert shown["root"] == (model if model == "base" else f"{model.partition('@')[0]}@{version}")
        missing = await server.ask("GET", "/v1/models/xiao")
        assert (missing.status, missing.error["code"]) == (404, "model_not_found")

    asyncio.run(work())


def test_before_the_engine_is_up_and_without_adapters(server: Server) -> None:
    async def work() -> None:
        answer = await ask(server.app, "GET", "/ready")
        assert (answer.status, answer.json) == (503, {"status": "starting"})
        server.desk.admin = None
        answer = await server.ask("GET", "/v1/adapters")
        assert (answer.status, answer.error["code"]) == (404, "no_adapters")
        server.desk.live = None
        for path in ("/v1/adapters", "/v1/models", "/v1/models/a"):
            answer = await server.ask("GET", path)
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")

    asyncio.run(work())


def load(name: object, path: object, **more: object) -> dict[str, object]:
    return {"lora_name": name, "lora_path": path, **more}


def test_vllms_own_routes_load_and_unload(server: Server) -> None:
    async def work() -> None:
        folder = server.shop.folder(16)
        answer = await server.ask("POST", "/v1/load_lora_adapter", load("a", str(folder)))
        assert (answer.status, answer.body) == (200, b"Success: LoRA adapter 'a' added successfully.")
        first = server.shop.catalog.entry("a").live
        other = load("a", str(server.shop.folder(32)))
        answer = await server.ask("POST", "/v1/load_lora_adapter", other)
        assert answer.status == 400 and "already been loaded" in answer.error["message"]
        assert server.shop.catalog.entry("a").live == first
        assert (
            await server.ask("POST", "/v1/load_lora_adapter", {**other, "load_inplace": True})
        ).status == 200
        assert server.shop.catalog.entry("a").live != first
        answer = await server.ask("POST", "/v1/unload_lora_adapter", {"lora_name": "a"})
        assert (answer.status, answer.body) == (200, b"Success: LoRA adapter 'a' removed successfully.")
        answer = await server.ask("POST", "/v1/unload_lora_adapter", {"lora_name": "a"})
        assert answer.status == 404
        assert server.nothing_is_left()

    asyncio.run(work())


def test_a_path_outside_the_adapters_folder_is_never_opened(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        outside = server.tmp_path / "adapters-not"  # a name that only looks as if it lay within
        server.shop.folder(16).rename(outside)
        (server.root / "link").symlink_to(outside)
        (server.root / "loop").symlink_to(server.root / "loop")
        monkeypatch.chdir(server.tmp_path)
        paths = [
            str(outside),
            f"{server.root}/../adapters-not",
            f"{server.root}/link",
            f"{server.root}/link/.",
            "adapters/link",
            "adapters-not",
            "adapters/../adapters-not",
            str(server.root),
            f"{server.root}/x/..",
            "/etc",
            "/",
            "~",
            f"file://{outside}",
            "hf://org/name",
            "org/name",
            f"{server.root}/\0",
            f"{server.root}/loop",
            "x" * 5000,
        ]
        opened: list[str] = []

        def admit(folder: Path, *_: Any, **__: Any) -> Any:
            opened.append(str(folder))
            raise AdapterRefused("a", [])

        monkeypatch.setattr(admin_module, "admit", admit)
        for path in paths:
            answer = await server.ask("POST", "/v1/load_lora_adapter", load("a", path))
            assert answer.status in (400, 404), path
        assert set(opened) <= {f"{server.root}/loop"}, "which is within, and leads nowhere"

    asyncio.run(work())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no json",
        {"lora_name": "a"},
        load("a", None),
        load(7, "x"),
        load("", "x"),
        load("../a", "x"),
        load("base", "x"),
        load("a", ["x"]),
    ],
    ids=str,
)
def test_what_vllms_routes_cannot_do_is_told(body: object, server: Server) -> None:
    answer = asyncio.run(server.ask("POST", "/v1/load_lora_adapter", body))
    assert answer.status == 400


def test_a_refused_adapter_is_a_bad_request_to_vllms_clients(server: Server) -> None:
    async def work() -> None:
        answer = await server.ask("POST", "/v1/load_lora_adapter", load("a", str(bad_folder(server))))
        assert (answer.status, answer.error["code"]) == (400, "adapter_refused")
        empty = server.root / "empty"
        empty.mkdir()
        assert (await server.ask("POST", "/v1/load_lora_adapter", load("a", str(empty)))).status == 400
        missing = load("a", f"{server.root}/nowhere")
        assert (await server.ask("POST", "/v1/load_lora_adapter", missing)).status in (400, 404)
        assert server.nothing_is_left()

    asyncio.run(work())


def test_publishing_and_removing_at_once_ends_with_one_of_both(server: Server) -> None:
    async def work() -> None:
        folders = [server.shop.folder(alpha) for alpha in (16, 32, 64)]
        answers = await asyncio.gather(
            *(server.publish("a", folder, "?replace=true") for folder in folders),
            *(server.ask("DELETE", "/v1/adapters/a") for _ in range(2)),
        )
        assert {answer.status for answer in answers} <= {200, 404}
        for name in server.shop.catalog.names():
            assert server.shop.live.resolve(name)
        await spin()
        assert server.nothing_is_left()

    asyncio.run(work())


def test_an_adapter_of_another_dtype_or_shape_is_refused_by_its_own_name(server: Server) -> None:
    tensors = {name: tensor.astype(np.int32) for name, tensor in lora_tensors().items()}
    folder = server.shop.make_adapter("ints", tensors=tensors)
    os.utime(folder, (1, 1))
    answer = asyncio.run(server.publish("小李", folder))
    assert answer.status == 422
    assert answer.error["message"].startswith("小李: refused")
