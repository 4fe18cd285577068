"""Adapters are taken beside the server: what lies there at the start, and then what comes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from serve.config import ServeConfig
from serve.taking import Taking, taking
from tests.unit.serve.front_side import RULES
from vllm_lora_ext.catalog import Catalog
from vllm_lora_ext.inbox import Inbox
from vllm_lora_ext.sources import find_sources

MakeAdapter = Callable[..., Path]


def config(watch: bool, *adapters: str) -> ServeConfig:
    return ServeConfig(adapters, (), None, False, None, 10, frozenset(), watch, {}, {})


def wait_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 10.0
    while not what():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.01)


def is_taking() -> bool:
    return any(thread.name == "adapter-inbox" for thread in threading.enumerate())


@pytest.fixture
def inbox(tmp_path: Path) -> Inbox:
    return Inbox(Catalog(tmp_path / "state"), RULES)


def test_what_is_there_is_taken_and_pending_until_then(inbox: Inbox, make_adapter: MakeAdapter) -> None:
    folder = make_adapter("a").parent
    work = Taking(inbox, inbox.scan(find_sources([str(folder)])), None)
    assert work.pending() == {"a": "it is being admitted"}
    assert work.incomplete() == {}
    work.run()
    assert work.pending() == {}
    assert inbox.catalog.names() == ["a"]
    assert Taking(inbox, inbox.scan(find_sources([str(folder)])), None).pending() == {}


def test_without_watching_a_folder_is_imported_once(inbox: Inbox, make_adapter: MakeAdapter) -> None:
    folder = make_adapter("a").parent
    (make_adapter("half") / "adapter_model.safetensors").unlink()
    items = inbox.scan(find_sources([str(folder)]))
    with taking(inbox, items, config(False, str(folder))) as work:
        wait_for(lambda: not work.pending())
        make_adapter("b")
    assert inbox.catalog.names() == ["a"]
    refused = [record.name for record in inbox.catalog.folders().values() if record.findings]
    assert refused == ["half"], "nobody would look at it again"
    assert not is_taking()


def test_a_watched_folder_is_followed_until_the_server_ends(inbox: Inbox, make_adapter: MakeAdapter) -> None:
    folder = make_adapter("a").parent
    half = make_adapter("half")
    weights = half / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    items = inbox.scan(find_sources([str(folder)]))
    with taking(inbox, items, config(True, str(folder))) as work:
        wait_for(lambda: "a" in inbox.catalog.names())
        wait_for(lambda: "half" in work.pending())
        assert inbox.catalog.names() == ["a"]
        weights.write_bytes(whole)
        wait_for(lambda: "half" in inbox.catalog.names())
    assert not is_taking()


def test_a_server_that_ends_at_once_leaves_no_watch_behind(inbox: Inbox, make_adapter: MakeAdapter) -> None:
    folder = make_adapter("a").parent
    with taking(inbox, inbox.scan(find_sources([str(folder)])), config(True, str(folder))):
        pass
    assert not is_taking()


def test_without_adapters_nothing_is_watched(inbox: Inbox) -> None:
    with taking(inbox, [], config(True)) as work:
        wait_for(lambda: not is_taking())
        assert work.pending() == work.incomplete() == {}
