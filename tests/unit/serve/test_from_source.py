"""With --catalog-from-source nobody but the adapters folders decides, neither now nor from before."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from serve.config import ServeConfig
from serve.from_source import changed_by_command, must_follow_source
from serve.keys import Keys
from tests.unit.serve.front_side import RULES, Shop, ask
from tests.unit.serve.test_config import settings
from tests.unit.serve.test_front import Stand
from vllm_lora_ext.catalog import Catalog
from vllm_lora_ext.errors import BadSetting
from vllm_lora_ext.inbox import Inbox
from vllm_lora_ext.publishing import publish
from vllm_lora_ext.sources import AdapterSource, find_sources

MakeAdapter = Callable[..., Path]


def config(*adapters: str, watch: bool = True) -> ServeConfig:
    return ServeConfig(adapters, (), None, False, None, 10, frozenset(), watch, {}, {})


@pytest.fixture
def catalog(tmp_path: Path, make_adapter: MakeAdapter) -> Catalog:
    """As a server's that has taken a folder of two adapters, and one that is refused."""
    folder = make_adapter("a").parent
    make_adapter("b", lora_alpha=32)
    make_adapter("wrong", r="8")
    found = Catalog(tmp_path / "state")
    inbox = Inbox(found, RULES)
    inbox.take_all(inbox.scan(find_sources([str(folder)])))
    assert found.names() == ["a", "b"]
    return found


def test_what_came_from_folders_is_no_change(catalog: Catalog) -> None:
    assert changed_by_command(catalog) == []
    must_follow_source(config("adapters"), catalog)


def test_an_empty_state_is_no_change(tmp_path: Path) -> None:
    must_follow_source(config("adapters"), Catalog(tmp_path / "new"))


def published(catalog: Catalog, folder: Path, name: str) -> None:
    publish(AdapterSource(name, str(folder)), catalog, RULES, replace=True)


@pytest.mark.parametrize("change", ["publish", "replace", "rollback", "traffic", "remove"])
def test_what_came_by_command_is_refused(
    catalog: Catalog, make_adapter: MakeAdapter, tmp_path: Path, change: str
) -> None:
    folder = tmp_path / "adapters"
    if change == "publish":
        published(catalog, folder / "b", "a-other")
    elif change == "replace":
        published(catalog, folder / "b", "a")
    elif change == "remove":
        catalog.remove(["a"])
    else:
        inbox = Inbox(catalog, RULES)
        (folder / "a" / "adapter_config.json").write_text(
            (folder / "a" / "adapter_config.json").read_text().replace('"lora_alpha": 16', '"lora_alpha": 64')
        )
        inbox.take_all(inbox.scan(find_sources([str(folder)])))
        assert changed_by_command(catalog) == []
        first, second = (version.digest for version in catalog.entry("a").versions)
        if change == "rollback":
            catalog.rollback("a")
        else:
            catalog.set_traffic("a", {first: 50, second: 50})
    with pytest.raises(BadSetting, match="came by command: a"):
        must_follow_source(config("adapters"), catalog)


def test_a_folder_that_went_is_no_change(catalog: Catalog, tmp_path: Path) -> None:
    (tmp_path / "adapters" / "a").rename(tmp_path / "elsewhere")
    Inbox(catalog, RULES).scan(find_sources([str(tmp_path / "adapters")]))
    assert catalog.names() == ["b"]
    assert changed_by_command(catalog) == []


@pytest.mark.parametrize("stated", [config(), config("adapters", watch=False)])
def test_there_has_to_be_a_folder_that_is_followed(catalog: Catalog, stated: ServeConfig) -> None:
    with pytest.raises(BadSetting, match="watched"):
        must_follow_source(stated, catalog)


CHANGES = [
    ("PUT", "/v1/adapters/a"),
    ("DELETE", "/v1/adapters/a"),
    ("POST", "/v1/adapters/a/rollback"),
    ("PUT", "/v1/adapters/a/traffic"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
]


@pytest.mark.parametrize(("method", "path"), CHANGES)
@pytest.mark.parametrize("loopback", [True, False])
def test_every_change_is_answered_with_409(
    tmp_path: Path, make_adapter: MakeAdapter, method: str, path: str, loopback: bool
) -> None:
    stand = Stand(Shop(tmp_path / "state", make_adapter), keys=Keys([], [], loopback), from_source=True)
    stand.shop.publish("a")
    answer = asyncio.run(ask(stand.front, method, path, {}))
    assert (answer.status, answer.error["code"]) == (409, "catalog_from_source")
    assert stand.vllm.bodies == [] and stand.shop.catalog.names() == ["a"]


def test_all_else_is_as_it_is(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    stand = Stand(Shop(tmp_path / "state", make_adapter), from_source=True)
    stand.shop.publish("a")
    assert asyncio.run(stand.post({"model": "a", "messages": []})).status == 200
    assert asyncio.run(ask(stand.front, "GET", "/v1/adapters", {})).status == 200


def test_the_flag_reaches_the_front() -> None:
    assert settings("--catalog-from-source").catalog_from_source
    assert not settings("--host", "127.0.0.1").catalog_from_source
