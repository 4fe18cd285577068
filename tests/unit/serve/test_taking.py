"""Adapters that lie there at the start are taken beside the server, once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from serve.config import ServeConfig
from serve.taking import FirstIntake, taking
from serve.watch import FolderWatch
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
    items = inbox.scan(find_sources([str(folder)]))
    intake = FirstIntake(inbox, items)
    assert intake.pending() == {"a": "it is being admitted"}
    assert intake.incomplete() == {}
    intake.run()
    assert intake.pending() == {}
    assert inbox.catalog.names() == ["a"]
    assert FirstIntake(inbox, inbox.scan(find_sources([str(folder)]))).pending() == {}


def test_without_watching_a_folder_is_imported_once(inbox: Inbox, make_adapter: MakeAdapter) -> None:
    folder = make_adapter("a").parent
    with taking(inbox, inbox.scan(find_sources([str(folder)])), config(False, str(folder))) as intake:
        assert isinstance(intake, FirstIntake)
        wait_for(lambda: inbox.catalog.names() == ["a"])
        make_adapter("b")
    assert inbox.catalog.names() == ["a"]
    assert not is_taking()


def test_a_watched_folder_is_followed_until_the_server_ends(inbox: Inbox, make_adapter: MakeAdapter) -> None:
    folder = make_adapter("a").parent
    items = inbox.scan(find_sources([str(folder)]))
    with taking(inbox, items, config(True, str(folder))) as intake:
        assert isinstance(intake, FolderWatch)
        wait_for(lambda: inbox.catalog.names() == ["a"])
    assert not is_taking()


def test_without_adapters_nothing_is_watched(inbox: Inbox) -> None:
    with taking(inbox, [], config(True)) as intake:
        assert isinstance(intake, FirstIntake)
