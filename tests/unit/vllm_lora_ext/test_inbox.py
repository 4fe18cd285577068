"""Folders and the catalog: what is new is taken, what was said by command is never undone by a folder."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest

from tests.conftest import BASE_CONFIG, lora_tensors
from vllm_lora_ext import catalog as catalog_module
from vllm_lora_ext import files
from vllm_lora_ext import inbox as inbox_module
from vllm_lora_ext.base_model import BaseModel
from vllm_lora_ext.catalog import Catalog
from vllm_lora_ext.errors import BadSetting
from vllm_lora_ext.inbox import Inbox, Item
from vllm_lora_ext.inspection import Inspection, Rules
from vllm_lora_ext.publishing import publish
from vllm_lora_ext.records import State
from vllm_lora_ext.sources import AdapterSource, find_sources, name_and_place, stated_module
from vllm_lora_ext.state_file import Saved

MakeAdapter = Callable[..., Path]
RULES = Rules(BaseModel("base", BASE_CONFIG))


class Fleet:
    """An adapters folder and its catalog; `restart` is what a server does when it starts."""

    def __init__(self, folder: Path, state_dir: Path, rules: Rules = RULES) -> None:
        self.folder, self.state_dir, self.rules = folder, state_dir, rules
        folder.mkdir(exist_ok=True)
        self.catalog = Catalog(state_dir)
        self.inspections: dict[str, Inspection] = {}

    def restart(self, rules: Rules | None = None) -> list[Item]:
        self.catalog.close()
        self.catalog = Catalog(self.state_dir)
        inbox = Inbox(self.catalog, rules or self.rules)
        items = inbox.scan(find_sources([str(self.folder)]))
        inbox.take_all(
            items, lambda item, inspection: self.inspections.update({item.source.name: inspection})
        )
        return items

    def live(self, name: str) -> str:
        return self.catalog.entry(name).live


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path / "adapters", tmp_path / "state")


def rewrite(folder: Path, rank: int = 8) -> None:
    """Other weights in the same place, as a training run leaves them."""
    from safetensors.numpy import save_file

    chance = np.random.default_rng(1)
    weights = {name: chance.normal(size=value.shape) for name, value in lora_tensors(rank).items()}
    save_file(
        {name: value.astype(np.float32) for name, value in weights.items()},
        folder / "adapter_model.safetensors",
    )


def test_a_folder_is_taken_once(fleet: Fleet, make_adapter: MakeAdapter) -> None:
    make_adapter("a"), make_adapter("b", lora_alpha=4)
    assert [item.is_pending for item in fleet.restart()] == [True, True]
    revision = fleet.catalog.revision
    assert fleet.catalog.names() == ["a", "b"]
    assert [item.is_pending for item in fleet.restart()] == [False, False]
    assert fleet.catalog.revision == revision, "a restart changes nothing"


def test_a_restart_reads_no_weights(
    fleet: Fleet, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter("a")
    fleet.restart()
    opened: list[str] = []
    upstream = files.RegularFile.__init__

    def watched(self: files.RegularFile, path: Path, follow_links: bool = True) -> None:
        opened.append(path.name)
        upstream(self, path, follow_links)

    monkeypatch.setattr(files.RegularFile, "__init__", watched)
    fleet.restart()
    assert set(opened) <= {"catalog.json"}


def test_a_changed_folder_becomes_a_new_version(fleet: Fleet, make_adapter: MakeAdapter) -> None:
    folder = make_adapter("a")
    fleet.restart()
    first = fleet.live("a")
    rewrite(folder)
    fleet.restart()
    assert fleet.live("a") != first
    assert len(fleet.catalog.entry("a").versions) == 2


def test_a_folder_that_was_only_touched_or_copied_again_does_not(
    fleet: Fleet, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    folder = make_adapter("a")
    fleet.restart()
    entry = fleet.catalog.entry("a")
    shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "copy", folder)
    os.utime(folder / "adapter_model.safetensors", (1, 1))
    fleet.restart()
    assert fleet.catalog.entry("a") == entry
    assert not any(item.is_pending for item in fleet.restart()), "its new times are remembered"


def test_no_restart_undoes_a_rollback_or_a_removal(fleet: Fleet, make_adapter: MakeAdapter) -> None:
    folder = make_adapter("a")
    make_adapter("b", lora_alpha=4)
    fleet.restart()
    first = fleet.live("a")
    rewrite(folder)
    fleet.restart()
    fleet.catalog.rollback("a")
    fleet.catalog.remove(["b"])
    fleet.restart()
    assert fleet.live("a") == first and fleet.catalog.names() == ["a"]
    rewrite(fleet.folder / "b")
    fleet.restart()
    assert fleet.catalog.names() == ["a", "b"], "a change in the folder is news"


def test_a_folder_that_is_gone_retires_its_name_and_only_that(
    fleet: Fleet, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    folder = make_adapter("a")
    fleet.restart()
    publish(AdapterSource("by-command", str(folder)), fleet.catalog, RULES)
    shutil.move(folder, tmp_path / "away")
    fleet.restart()
    assert fleet.catalog.names() == ["by-command"]
    shutil.move(tmp_path / "away", folder)
    fleet.restart()
    assert fleet.catalog.names() == ["a", "by-command"], "it came back, so it is new"


def test_a_folder_never_overrides_a_command(fleet: Fleet, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    folder = make_adapter("a")
    fleet.restart()
    other = make_adapter("other", lora_alpha=4)
    shutil.move(other, tmp_path / "other")
    entry, _ = publish(AdapterSource("a", str(tmp_path / "other")), fleet.catalog, RULES, replace=True)
    rewrite(folder)
    fleet.restart()
    assert fleet.live("a") == entry.live
    assert [finding.code for finding in fleet.inspections["a"].findings] == ["adapter_exists"]
    shutil.rmtree(folder)
    fleet.restart()
    assert fleet.live("a") == entry.live, "it does not belong to the folder any more"


def test_a_bad_change_is_refused_and_the_old_version_serves_on(
    fleet: Fleet, make_adapter: MakeAdapter
) -> None:
    folder = make_adapter("a")
    fleet.restart()
    first = fleet.live("a")
    weights = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(weights[:-10])
    fleet.restart()
    assert fleet.live("a") == first
    assert [finding.code for finding in fleet.inspections["a"].findings] == ["weights_corrupt"]
    (item,) = fleet.restart()
    assert not item.is_pending and item.record and item.record.findings, "it is not read again and again"
    (folder / "adapter_model.safetensors").write_bytes(weights)
    fleet.restart()
    assert len(fleet.catalog.entry("a").versions) == 1


def test_a_refusal_is_looked_at_again_under_other_rules(fleet: Fleet, make_adapter: MakeAdapter) -> None:
    make_adapter("a", use_dora=True)
    fleet.restart()
    assert fleet.catalog.names() == []
    fleet.restart(Rules(RULES.base, allow=frozenset(["feature_unsupported"])))
    assert fleet.catalog.names() == ["a"]


def test_two_folders_with_one_name(make_adapter: MakeAdapter, fleet: Fleet) -> None:
    one, two = make_adapter("one"), make_adapter("two", lora_alpha=4)
    inbox = Inbox(fleet.catalog, RULES)
    items = inbox.scan(find_sources([f"x={one}", f"X={two}", f"x={one}"]))
    assert [item.source.path for item in items] == [str(one), str(two)]
    inbox.take_all(items)
    assert fleet.catalog.names() == ["x"]


def test_when_the_source_breaks_nothing_that_serves_is_touched(
    fleet: Fleet, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_adapter("a")
    fleet.restart()
    first = fleet.live("a")
    rewrite(folder)

    def broken_disk(file: int, target: memoryview) -> int:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        inbox = Inbox(fleet.catalog, RULES)
        items = inbox.scan(find_sources([str(fleet.folder)]))
        patch.setattr(files, "read_chunk", broken_disk)
        inbox.take_all(items)
    assert fleet.live("a") == first and fleet.catalog.store.verify(first)
    assert list(fleet.catalog.store.root.iterdir()) == [fleet.catalog.store.root / first]


def test_what_is_written_after_the_look_is_news(fleet: Fleet, make_adapter: MakeAdapter) -> None:
    """Between judging a folder and noting it somebody may replace it."""
    folder = make_adapter("a")
    inbox = Inbox(fleet.catalog, RULES)
    items = inbox.scan(find_sources([str(fleet.folder)]))
    outcomes = [outcome for some in inbox._outcomes(items) for outcome in some]
    rewrite(folder)
    assert inbox._publish_all(outcomes, None)
    first = fleet.live("a")
    (item,) = fleet.restart()
    assert item.is_pending and fleet.live("a") != first


@pytest.mark.parametrize("cause", ["twin", "crowd", "checksum", "command"])
def test_a_refusal_whose_cause_lies_elsewhere_is_looked_at_again(
    cause: str, fleet: Fleet, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    folder = make_adapter("b")
    if cause == "twin":
        shutil.copytree(make_adapter("other/x"), fleet.folder / "A")
        shutil.copytree(folder, fleet.folder / "a")
        undo = [lambda: shutil.rmtree(fleet.folder / "A")]
    elif cause == "crowd":
        for number in range(10_001):
            (folder / str(number)).touch()
        undo = [lambda: [path.unlink() for path in folder.iterdir() if path.name.isdigit()]]
    elif cause == "checksum":
        (folder / "identity.json").write_text('{"files": {"chat_template.jinja": "0"}}')
        undo = [lambda: (folder / "identity.json").unlink()]
    else:
        publish(AdapterSource("B", str(folder)), fleet.catalog, RULES)
        undo = [lambda: fleet.catalog.remove(["B"])]
    name = "a" if cause == "twin" else "b"
    fleet.restart()
    assert name not in fleet.catalog.names()
    for step in undo:
        step()
    fleet.restart()
    assert name in fleet.catalog.names()


def test_whatever_one_folder_does_the_others_are_taken(
    fleet: Fleet, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, name in enumerate(("a", "look", "admit", "z"), start=1):
        make_adapter(name, lora_alpha=number)
    os.mkdir(os.fsencode(fleet.folder) + b"/\xff")  # noqa: PTH102  no text can name it
    (fleet.folder / "\x1b[31mred").mkdir()
    look, take = inbox_module.inspect_adapter, inbox_module.admit

    def failing(upstream: Callable[..., object], bad: str) -> Callable[..., object]:
        def call(path: Path, *rest: object, **named: object) -> object:
            if path.name == bad:
                raise RuntimeError("a flaw of ours")
            return upstream(path, *rest, **named)

        return call

    monkeypatch.setattr(inbox_module, "inspect_adapter", failing(look, "look"))
    monkeypatch.setattr(inbox_module, "admit", failing(take, "admit"))
    fleet.restart()
    assert fleet.catalog.names() == ["a", "z"]
    assert fleet.inspections["look"].findings[0].code == "internal_error"
    assert fleet.inspections["admit"].findings[0].code == "internal_error"
    monkeypatch.undo()
    fleet.restart()
    assert fleet.catalog.names() == ["a", "admit", "look", "z"]


def test_a_slow_source_keeps_nobody_waiting(
    fleet: Fleet, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes first, and goes on only once a reader sees the other one."""
    make_adapter("a"), make_adapter("b", lora_alpha=4)
    reader, upstream = Catalog(fleet.state_dir, readonly=True), inbox_module.admit

    def admit_slowly(path: Path, *rest: object) -> object:
        deadline = time.monotonic() + 30
        while path.name == "a" and reader.names() != ["b"] and time.monotonic() < deadline:
            time.sleep(0.05)
            reader.refresh()
        return upstream(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(inbox_module, "admit", admit_slowly)
    fleet.restart()
    assert reader.names() == ["b"] and fleet.catalog.names() == ["a", "b"]


def test_when_the_state_cannot_be_saved_it_is_tried_again(
    fleet: Fleet, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter("a"), make_adapter("b", lora_alpha=4)
    monkeypatch.setattr(inbox_module, "_SAVE_EVERY_S", 0.0)
    upstream, failures = catalog_module.write_state, iter([True, False, False])

    def write(folder: Path, revision: int, state: State) -> Saved:
        if next(failures, False):
            raise OSError(28, "No space left on device")
        return upstream(folder, revision, state)

    monkeypatch.setattr(catalog_module, "write_state", write)
    fleet.restart()
    assert fleet.catalog.names() == ["a", "b"]


def test_a_folder_that_cannot_be_listed_retires_nobody(
    fleet: Fleet, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter("a")
    fleet.restart()

    def denied(self: Path) -> object:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", denied)
        with pytest.raises(BadSetting, match="cannot be looked into"):
            find_sources([str(fleet.folder)])
    assert fleet.catalog.names() == ["a"]


def test_the_same_folder_by_another_way_is_the_same(
    fleet: Fleet, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    make_adapter("a")
    fleet.restart()
    fleet.catalog.remove(["a"])
    (tmp_path / "link").symlink_to(fleet.folder)
    inbox = Inbox(fleet.catalog, RULES)
    assert [item.is_pending for item in inbox.scan(find_sources([str(tmp_path / "link")]))] == [False]


def test_a_url_that_failed_is_tried_again(fleet: Fleet, make_adapter: MakeAdapter) -> None:
    source = AdapterSource("remote", "memory://later")
    inbox = Inbox(fleet.catalog, RULES)
    inbox.take_all(inbox.scan([source]))
    assert fleet.catalog.names() == []
    in_memory(make_adapter("a"), "later")
    inbox.take_all(inbox.scan([source]))
    assert fleet.catalog.names() == ["remote"]
    assert [item.is_pending for item in inbox.scan([source])] == [False]


def test_names_of_two_parts_are_folders_of_folders(fleet: Fleet, make_adapter: MakeAdapter) -> None:
    make_adapter("org/one"), make_adapter("org/two", lora_alpha=4), make_adapter("小李", lora_alpha=5)
    shutil.copytree(fleet.folder / "小李", fleet.folder / "小李" / "checkpoint-5")
    fleet.restart()
    shutil.copytree(fleet.folder / "小李", fleet.folder / "a" / "b" / "c")
    fleet.restart()
    assert fleet.catalog.names() == ["a/b/c", "org/one", "org/two", "小李"]


def in_memory(folder: Path, bucket: str) -> str:
    system = fsspec.filesystem("memory")
    for file in folder.iterdir():
        system.pipe(f"/{bucket}/{file.name}", file.read_bytes())
    return f"memory://{bucket}"


def test_an_adapter_can_come_from_a_bucket(fleet: Fleet, make_adapter: MakeAdapter) -> None:
    folder = make_adapter("a")
    local = publish(AdapterSource("local", str(folder)), fleet.catalog, RULES)[0]
    url = in_memory(folder, "bucket-a")
    entry, _ = publish(AdapterSource("remote", url), fleet.catalog, RULES)
    assert entry.live == local.live
    assert entry.live_version.source == url
    assert not list((fleet.state_dir / "incoming").iterdir())


@pytest.mark.parametrize("url", ["memory://nowhere", "nonsense://x/y", "hf://no/such/adapter@main"])
def test_a_url_that_cannot_be_had_is_named(fleet: Fleet, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BadSetting, match=r"x/y|nowhere|such|nonsense"):
        publish(AdapterSource("x", url), fleet.catalog, RULES)
    assert fleet.catalog.names() == [] and not fleet.catalog.store.digests()


def test_vllms_own_module_paths_may_be_hub_ids(tmp_path: Path) -> None:
    assert stated_module("x", "org/adapter", {}).path == "hf://org/adapter"
    assert stated_module("x", str(tmp_path), {}).folder == tmp_path
    assert find_sources(["x=hf://org/adapter@v1"]) == [AdapterSource("x", "hf://org/adapter@v1")]
    assert find_sources(["hf://org/adapter@v1"]) == [AdapterSource("adapter", "hf://org/adapter@v1")]
    assert find_sources(["hf://org/adapter@refs/pr/1"])[0].name == "adapter"


@pytest.mark.parametrize(
    ("value", "place"),
    [("hf://org/x", (None, "hf://org/x")), ("n=s3://b/a", ("n", "s3://b/a")), ("n=/a/b", ("n", "/a/b"))],
)
def test_a_value_says_a_name_and_a_place(value: str, place: tuple[str | None, str]) -> None:
    assert name_and_place(value) == place


def test_a_home_folder_is_a_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "adapters").mkdir()
    assert name_and_place("~/adapters") == (None, str(tmp_path / "adapters"))
