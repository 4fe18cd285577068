"""Names that vLLM's own resolvers know: they come in by the same door as all others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serve import elsewhere as elsewhere_module
from serve.admin import Admin, NoFolders
from serve.elsewhere import Elsewhere
from tests.conftest import lora_tensors
from tests.unit.serve.front_side import RULES, Shop, nothing_is_held

MakeAdapter = Callable[..., Path]


class Resolver:
    """vLLM's `LoRAResolver`: knows folders by name, and notes who was asked for."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders, self.asked = folders, list[tuple[str, str]]()
        self.error: Exception | None = None

    async def resolve_lora(self, base: str, name: str) -> Any:
        self.asked.append((base, name))
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        folder = self.folders.get(name)
        return None if folder is None else SimpleNamespace(lora_name=name, lora_path=str(folder))


@pytest.fixture
def shop(tmp_path: Path, make_adapter: MakeAdapter) -> Shop:
    return Shop(tmp_path / "state", make_adapter)


def elsewhere_of(shop: Shop, *resolvers: Resolver) -> Elsewhere:
    admin = Admin(shop.live, shop.manager, NoFolders())
    return Elsewhere(resolvers, "the/base", admin, RULES.base_names)


def test_what_is_found_is_published_like_all_others(shop: Shop) -> None:
    async def work() -> None:
        empty, full = Resolver({}), Resolver({"far": shop.folder(16)})
        found = elsewhere_of(shop, empty, full)
        assert await asyncio.gather(*(found.find("far") for _ in range(5))) == [True] * 5
        assert len(full.asked) == 1
        assert full.asked[0] == ("the/base", "far")
        version = shop.live.resolve("far")
        assert version is not None and shop.engine.loads == [version.model]
        assert nothing_is_held(shop.manager)

    asyncio.run(work())


def test_a_name_that_nobody_has_is_asked_for_now_and_then_only(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        now = 100.0
        monkeypatch.setattr(elsewhere_module.time, "monotonic", lambda: now)
        resolver = Resolver({})
        found = elsewhere_of(shop, resolver)
        for _ in range(5):
            assert not await found.find("nobody")
        assert len(resolver.asked) == 1
        now += 11.0
        assert not await found.find("nobody")
        assert len(resolver.asked) == 2
        for number in range(2000):
            await found.find(f"nobody-{number}")
        assert len(found._asked) <= 1024

    asyncio.run(work())


@pytest.mark.parametrize("name", ["../../etc", "/etc", "a@b", "base", "", "a\0b", "x" * 100])
def test_a_name_that_is_none_is_not_looked_for(name: str, shop: Shop) -> None:
    resolver = Resolver({})
    assert not asyncio.run(elsewhere_of(shop, resolver).find(name))
    assert resolver.asked == []


def test_what_is_refused_and_what_fails_is_not_found(shop: Shop) -> None:
    async def work() -> None:
        bad = Resolver({"bad": shop.make_adapter("bad", tensors=lora_tensors(rank=4))})
        broken = Resolver({})
        broken.error = RuntimeError("no network")
        found = elsewhere_of(shop, broken, bad)
        assert not await found.find("bad")
        assert shop.catalog.names() == [] and shop.catalog.store.digests() == set()

    asyncio.run(work())
