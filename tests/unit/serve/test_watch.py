"""Folders that change while the server runs; time is given, except where real events are waited for."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from serve import watch as watch_module
from serve.watch import FolderWatch
from tests.conftest import BASE_CONFIG
from vllm_lora_ext import inbox as inbox_module
from vllm_lora_ext.base_model import BaseModel
from vllm_lora_ext.catalog import Catalog
from vllm_lora_ext.errors import StoreFailed
from vllm_lora_ext.inbox import Inbox
from vllm_lora_ext.inspection import Rules
from vllm_lora_ext.sources import AdapterSource

MakeAdapter = Callable[..., Path]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
RULES = Rules(BaseModel("base", BASE_CONFIG))


class Watched:
    """A folder of adapters, its catalog, and a watch whose clock stands still between the looks."""

    def __init__(self, tmp_path: Path, *values: str, modules: tuple[AdapterSource, ...] = ()) -> None:
        self.folder, self.now = tmp_path / "adapters", 1000.0
        self.folder.mkdir(exist_ok=True)
        self.catalog = Catalog(tmp_path / "state")
        self.values, self.modules = values or (str(self.folder),), modules
        self.start()

    def start(self) -> None:
        self.watch = FolderWatch(
            self.values, self.modules, Inbox(self.catalog, RULES), poll=True, clock=lambda: self.now
        )

    def look(self, after: float = 0.0) -> list[str]:
        self.now += after
        self.watch.look()
        return self.catalog.names()

    def settle(self) -> list[str]:
        """Let the quiet time pass."""
        self.look()
        return self.look(0.5)


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    made = Watched(tmp_path)
    yield made
    made.catalog.close()


@pytest.fixture
def make_whole(make_adapter: MakeAdapter, tmp_path: Path) -> MakeAdapter:
    """As `make_adapter`, somewhere else: to be copied or moved."""

    def make(name: str = "whole", **config: object) -> Path:
        return make_adapter(f"../whole/{name}", **config).resolve()

    return make


def test_a_folder_is_taken_once_it_is_quiet(watched: Watched, make_adapter: MakeAdapter) -> None:
    folder = make_adapter("小李")
    assert watched.look() == []
    assert watched.watch.pending() == {"小李": "is being looked at"}
    assert watched.look(0.4) == []
    os.utime(folder / WEIGHTS, (1, 1))
    assert watched.look(0.1) == [], "it was written to"
    assert watched.look(0.4) == []
    assert watched.look(0.1) == ["小李"]
    assert watched.look() == ["小李"] and watched.watch.pending() == {}


def test_what_was_there_before_is_not_waited_for(watched: Watched, make_adapter: MakeAdapter) -> None:
    make_adapter("a"), make_adapter("bad", use_dora=True)
    watched.settle()
    revision = watched.catalog.revision
    watched.start()
    assert watched.look() == ["a"]
    assert watched.watch.pending() == {} and watched.catalog.revision == revision


@pytest.mark.parametrize("first", [CONFIG, WEIGHTS])
def test_a_copy_in_steps(first: str, watched: Watched, make_whole: MakeAdapter) -> None:
    whole, folder = make_whole(), watched.folder / "a"
    folder.mkdir()
    assert watched.settle() == []
    for name in (first, WEIGHTS if first == CONFIG else CONFIG):
        data = (whole / name).read_bytes()
        for size in (0, 5, len(data) - 1):
            (folder / name).write_bytes(data[:size])
            assert watched.settle() == [] and watched.look(0.5) == []
            assert set(watched.watch.pending()) == {"a"}
        (folder / name).write_bytes(data)
    assert watched.settle() == ["a"]
    assert not watched.catalog.entry("a").live_version.findings and len(watched.catalog.folders()) == 1


def test_an_incomplete_folder_is_told_after_30_seconds(watched: Watched, make_adapter: MakeAdapter) -> None:
    folder = make_adapter("org/a")
    weights = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(weights[:-10])
    told = f"{WEIGHTS} has {len(weights) - 10} bytes, its header states {len(weights)}"
    watched.look()
    (folder / WEIGHTS).write_bytes(weights[:-10])  # it is still incomplete since it first was
    watched.look(29)
    assert watched.watch.pending() == {"org/a": told} and watched.watch.incomplete() == {}
    watched.look(1)
    assert watched.watch.incomplete() == {"org/a": told}
    (folder / WEIGHTS).write_bytes(weights)
    assert watched.settle() == ["org/a"] and watched.watch.incomplete() == {}
    (folder / WEIGHTS).unlink()
    watched.look(100)
    assert watched.watch.incomplete() == {}, "it begins anew"


def test_a_change_is_a_new_version_and_half_of_it_touches_nothing(
    watched: Watched, make_adapter: MakeAdapter, make_whole: MakeAdapter
) -> None:
    folder, other = make_adapter("a"), make_whole(lora_alpha=4)
    watched.settle()
    first = watched.catalog.entry("a").live
    for name in (WEIGHTS, CONFIG):
        (folder / name).unlink()
        assert watched.settle() == ["a"] and watched.look(60) == ["a"]
        shutil.copy(other / name, folder)
    assert watched.catalog.entry("a").live == first
    watched.settle()
    assert watched.catalog.entry("a").live != first
    assert len(watched.catalog.entry("a").versions) == 2


def test_a_folder_that_is_replaced_by_a_rename_is_there_all_the_time(
    watched: Watched, make_adapter: MakeAdapter, make_whole: MakeAdapter, tmp_path: Path
) -> None:
    folder, other = make_adapter("a"), make_whole(lora_alpha=4)
    watched.settle()
    first = watched.catalog.entry("a").live
    folder.rename(tmp_path / "old")
    assert watched.look() == ["a"] and watched.look(0.4) == ["a"]
    other.rename(folder)
    assert watched.look() == ["a"] and watched.look(0.4) == ["a"]
    assert watched.catalog.entry("a").live == first
    assert watched.look(0.1) == ["a"] and watched.catalog.entry("a").live != first


def test_a_folder_that_is_removed_retires_and_is_new_when_it_comes_back(
    watched: Watched, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    folder = make_adapter("org/a")
    make_adapter("b", lora_alpha=4)
    watched.settle()
    shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(folder)
    assert watched.settle() == ["b"]
    assert watched.watch.pending().keys() == {"org"}
    shutil.copytree(tmp_path / "copy", folder)
    assert watched.settle() == ["b", "org/a"] and watched.look() and watched.watch.pending() == {}


def test_a_folder_that_was_emptied_keeps_its_name_until_it_goes(
    watched: Watched, make_adapter: MakeAdapter
) -> None:
    folder = make_adapter("org/a")
    make_adapter("org/b", lora_alpha=4)
    watched.settle()
    for file in folder.iterdir():
        file.unlink()
    assert watched.settle() == ["org/a", "org/b"] and watched.look(60) == ["org/a", "org/b"]
    assert watched.watch.pending() == {"org/a": f"{CONFIG} is not there"}
    folder.rmdir()
    assert watched.settle() == ["org/b"] and watched.watch.pending() == {}


def test_an_adapter_that_becomes_a_folder_of_adapters_retires(
    watched: Watched, make_adapter: MakeAdapter, make_whole: MakeAdapter
) -> None:
    folder = make_adapter("a")
    watched.settle()
    shutil.rmtree(folder)
    shutil.copytree(make_whole(lora_alpha=4), folder / "inner")
    assert watched.settle() == ["a/inner"]


def test_a_stray_file_among_the_adapters_retires_nobody(watched: Watched, make_adapter: MakeAdapter) -> None:
    shutil.copy(make_adapter("a") / CONFIG, watched.folder.parent)
    watched.settle()
    shutil.move(watched.folder.parent / CONFIG, watched.folder)
    assert watched.settle() == ["a"] and watched.look(60) == ["a"]
    assert watched.watch.pending() == {"adapters": f"{WEIGHTS} is not there"}
    (watched.folder / CONFIG).unlink()
    assert watched.settle() == ["a"] and watched.watch.pending() == {}


def test_a_folder_of_adapters_that_disappears_retires_nobody(
    watched: Watched, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    make_adapter("a")
    watched.settle()
    watched.folder.rename(tmp_path / "away")
    assert watched.settle() == ["a"] and watched.look(60) == ["a"]
    (tmp_path / "away").rename(watched.folder)
    make_adapter("b", lora_alpha=4)
    assert watched.settle() == ["a", "b"]
    shutil.rmtree(watched.folder / "a")
    assert watched.settle() == ["b"]


def test_where_one_place_is_away_the_others_are_taken(
    make_adapter: MakeAdapter, make_whole: MakeAdapter, tmp_path: Path
) -> None:
    (tmp_path / "more").mkdir()
    watched = Watched(tmp_path, str(tmp_path / "adapters"), str(tmp_path / "more"))
    make_adapter("a")
    make_whole("b", lora_alpha=4).rename(tmp_path / "more" / "b")
    c = make_whole("c", lora_alpha=5)
    assert watched.settle() == ["a", "b"]
    watched.folder.rename(tmp_path / "away")
    c.rename(tmp_path / "more" / "c")
    shutil.rmtree(tmp_path / "more" / "b")
    assert watched.settle() == ["a", "b", "c"], "nothing retires until all can be listed"
    (tmp_path / "away").rename(watched.folder)
    assert watched.settle() == ["a", "c"]


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs a second file system")
def test_a_disk_that_is_not_mounted_is_no_empty_folder(
    make_adapter: MakeAdapter, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    watched = Watched(tmp_path, str(tmp_path / "mount"))
    mount = tmp_path / "mount"
    mount.symlink_to(watched.folder)
    if Path("/dev/shm").stat().st_dev == watched.folder.stat().st_dev:
        pytest.skip("one file system")
    make_adapter("a")
    assert watched.settle() == ["a"]
    empty = Path("/dev/shm") / f"vllm-lora-{os.getpid()}"
    empty.mkdir()
    try:
        mount.unlink()
        mount.symlink_to(empty)
        assert watched.settle() == ["a"] and watched.look(60) == ["a"]
    finally:
        empty.rmdir()


def test_an_adapter_that_is_named_retires_with_its_folder(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    folder = make_adapter("a")
    watched = Watched(tmp_path, f"x={folder}")
    assert watched.settle() == ["x"]
    shutil.rmtree(folder)
    assert watched.settle() == []


def test_a_module_is_followed_and_never_retires(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    folder = make_adapter("m")
    module = AdapterSource("m", str(folder))
    (tmp_path / "more").mkdir()
    watched = Watched(tmp_path, str(tmp_path / "more"), modules=(module,))
    assert watched.settle() == ["m"]
    first = watched.catalog.entry("m").live
    shutil.rmtree(folder)
    assert watched.settle() == ["m"]
    make_adapter("m", lora_alpha=4)
    watched.settle()
    assert watched.catalog.entry("m").live != first


def test_what_a_link_leads_to_is_looked_at(watched: Watched, make_whole: MakeAdapter) -> None:
    first, second = make_whole("1"), make_whole("2", lora_alpha=4)
    link = watched.folder / "a"
    link.symlink_to(first)
    watched.settle()
    live = watched.catalog.entry("a").live
    (watched.folder / "new").symlink_to(second)
    (watched.folder / "new").rename(link)
    watched.settle()
    assert watched.catalog.entry("a").live != live
    shutil.copy(first / CONFIG, second)
    watched.settle()
    assert watched.catalog.entry("a").live == live, "the target was written to"
    assert watched.catalog.names() == ["a"]


def test_a_copy_by_rsync_over_an_adapter_is_one_new_version(
    watched: Watched, make_adapter: MakeAdapter, make_whole: MakeAdapter
) -> None:
    folder, other = make_adapter("a"), make_whole(lora_alpha=4)
    watched.settle()
    for name in (CONFIG, WEIGHTS):
        partial = folder / f".{name}.Ab12Cd"
        shutil.copy(other / name, partial)
        if name == CONFIG:
            partial.rename(folder / name)
            continue
        assert watched.settle() == ["a"] and watched.look(10) == ["a"]
        assert len(watched.catalog.entry("a").versions) == 1
        partial.rename(folder / name)
    watched.settle()
    assert len(watched.catalog.entry("a").versions) == 2


def test_whatever_one_folder_is_the_others_are_taken(watched: Watched, make_adapter: MakeAdapter) -> None:
    os.mkdir(os.fsencode(watched.folder) + b"/\xff")  # noqa: PTH102  no text can name it
    (watched.folder / "loop").symlink_to("loop")
    (watched.folder / "file").touch()
    os.mkfifo(watched.folder / "pipe")
    make_adapter("checkpoint-5"), make_adapter(".hidden")
    (make_adapter("@bad") / CONFIG).write_text("[]")
    make_adapter("good", lora_alpha=4)
    assert watched.settle() == ["good"]
    watched.look()
    assert watched.watch.pending() == {"\\xff": f"{CONFIG} is not there"}


def test_a_flaw_stops_neither_the_others_nor_the_watch(
    watched: Watched, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter("a"), make_adapter("b", lora_alpha=4)
    upstream = watch_module.Folder.look

    def look(self: watch_module.Folder, *rest: object) -> None:
        if self.source.name == "a":
            raise RuntimeError("a flaw of ours")
        upstream(self, *rest)  # type: ignore[arg-type]

    def failing(self: Catalog, *rest: object, **named: object) -> None:
        raise StoreFailed("catalog.json", OSError(28, "No space left on device"))

    with monkeypatch.context() as patch:
        patch.setattr(watch_module.Folder, "look", look)
        assert watched.settle() == ["b"]
    assert watched.look(30) == ["b"] and watched.look(0.5) == ["a", "b"]
    with monkeypatch.context() as patch:
        patch.setattr(Catalog, "remove", failing)
        shutil.rmtree(watched.folder / "a")
        make_adapter("c", lora_alpha=5)
        assert watched.settle() == ["a", "b", "c"]
    assert watched.look() == ["b", "c"]


def test_a_refusal_whose_cause_lies_elsewhere_is_tried_again_but_not_at_every_look(
    watched: Watched, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[float] = []
    upstream = inbox_module.admit

    def admit(path: Path, *rest: object) -> object:
        tried.append(watched.now - 1000)
        if len(tried) < 4:
            raise RuntimeError("passing")
        return upstream(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(inbox_module, "admit", admit)
    make_adapter("a")
    while "a" not in watched.look(0.5) and watched.now < 2000:
        assert watched.now < 1002 or watched.watch.pending() == {}, "a refused one is not pending"
    assert tried == [1.0, 31.5, 92.0, 212.5]


def test_of_two_with_one_name_the_first_stays_and_the_other_follows(
    watched: Watched, make_adapter: MakeAdapter
) -> None:
    first = make_adapter("x")
    assert watched.settle() == ["x"]
    shutil.copytree(first, watched.folder / "X")
    assert watched.settle() == ["x"], "though its content is the same and it comes first by name"
    shutil.rmtree(first)
    watched.settle()
    assert watched.look() == ["X"]


def test_a_url_is_fetched_once(tmp_path: Path) -> None:
    watched = Watched(tmp_path, "remote=memory://nowhere", str(tmp_path / "adapters"))
    assert watched.look() == [] and watched.watch.pending() == {}


def test_what_is_being_admitted_is_pending_and_keeps_nobody_waiting(
    watched: Watched, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, upstream = threading.Event(), inbox_module.admit

    def admit(path: Path, *rest: object) -> object:
        assert path.name != "slow" or slow.wait(30)
        return upstream(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(inbox_module, "admit", admit)
    make_adapter("slow")
    with running(FolderWatch(watched.values, (), Inbox(watched.catalog, RULES))) as watch:
        until(lambda: watch.pending() == {"slow": "is being admitted"})
        make_adapter("fast", lora_alpha=4)
        until(lambda: watched.catalog.names() == ["fast"])
        assert watch.pending()["slow"] == "is being admitted"
        slow.set()
        until(lambda: watched.catalog.names() == ["fast", "slow"] and watch.pending() == {})


def test_real_events_through_everything_that_happens_to_a_folder(
    watched: Watched, make_adapter: MakeAdapter, make_whole: MakeAdapter, tmp_path: Path
) -> None:
    make_adapter("old")
    names, stop = watched.catalog.names, threading.Event()

    def flood() -> None:
        for number in itertools.count():
            with contextlib.suppress(OSError):
                (watched.folder / f"{number % 50}.txt").write_text("x")
            if stop.wait(0.001):
                return

    writer = threading.Thread(target=flood)
    with running(FolderWatch(watched.values, (), Inbox(watched.catalog, RULES))):
        until(lambda: names() == ["old"])
        os.mkdir(os.fsencode(watched.folder) + b"/\xff")  # noqa: PTH102  ends watchfiles' own loop
        writer.start()
        watched.folder.rename(tmp_path / "away")
        shutil.copytree(make_whole(lora_alpha=4), watched.folder / "org" / "小李")
        until(lambda: names() == ["org/小李"])
        stop.set()
        writer.join()


def test_where_no_changes_are_told_folders_are_looked_at(
    watched: Watched, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*paths: object, **settings: object) -> Iterator[set[object]]:
        raise OSError(28, "OS file watch limit reached")

    monkeypatch.setattr(watch_module, "watch", full)
    with running(FolderWatch(watched.values, (), Inbox(watched.catalog, RULES))):
        make_adapter("a")
        until(lambda: watched.catalog.names() == ["a"])


class running:  # noqa: N801  reads as a verb
    """A watch in its thread, for the time of the block."""

    def __init__(self, watch: FolderWatch) -> None:
        self.watch, self.thread = watch, threading.Thread(target=watch.run)

    def __enter__(self) -> FolderWatch:
        self.thread.start()
        return self.watch

    def __exit__(self, *reason: object) -> None:
        self.watch.stop()
        self.thread.join(30)
        assert not self.thread.is_alive()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
