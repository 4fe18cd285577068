"""Finding adapters: folders, single ones, name=path; and the base that they agree on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from serve.fleet import AdapterSource, agreed_base_model, find_sources, inspect_fleet
from vllm_lora_ext.base_model import read_base_model
from vllm_lora_ext.errors import BadSetting
from vllm_lora_ext.inspection import Inspection
from vllm_lora_ext.spec import EngineLimits

MakeAdapter = Callable[..., Path]


def names(sources: list[AdapterSource]) -> list[str]:
    return [source.name for source in sources]


def judged(sources: list[AdapterSource], base_folder: Path, *base_names: str) -> list[Inspection]:
    base = read_base_model(str(base_folder))
    return inspect_fleet(sources, lambda source: base, EngineLimits(), base_names)


def test_a_folder_of_adapters_is_read_by_name(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    make_adapter("b"), make_adapter("a")
    (tmp_path / "adapters" / ".half.partial").mkdir()
    (tmp_path / "adapters" / "notes.txt").touch()
    assert names(find_sources([str(tmp_path / "adapters")])) == ["a", "b"]


def test_a_single_adapter_and_a_name_of_your_own(make_adapter: MakeAdapter) -> None:
    folder = make_adapter("a")
    assert names(find_sources([str(folder)])) == ["a"]
    assert find_sources([f"mine={folder}"]) == [AdapterSource("mine", str(folder))]


def test_an_absent_folder_is_named(tmp_path: Path) -> None:
    for value in (str(tmp_path / "nowhere"), f"x={tmp_path / 'nowhere'}", "x=org/typo"):
        with pytest.raises(BadSetting, match="no such folder"):
            find_sources([value])


def test_a_link_is_asked_by_its_own_name(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    target = make_adapter("checkpoint-500")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "xiaoli").symlink_to(target)
    assert names(find_sources([str(tmp_path / "links")])) == ["xiaoli"]


def test_a_home_folder_may_be_written_short(
    make_adapter: MakeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_adapter("a")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_sources(["x=~/adapters/a"]) == [AdapterSource("x", str(folder))]
    assert AdapterSource("x", "~/adapters/a").folder == folder


def test_a_hub_id_is_shown_and_left_to_vllm(base_folder: Path) -> None:
    (item,) = judged([AdapterSource("x", "org/adapter")], base_folder)
    assert (item.state, item.admitted) == ("unproven", True)
    assert [finding.code for finding in item.findings] == ["adapter_remote"]


def test_a_folder_that_is_no_adapter_is_refused_not_skipped(
    make_adapter: MakeAdapter, tmp_path: Path, base_folder: Path
) -> None:
    make_adapter("good")
    (tmp_path / "adapters" / "empty").mkdir()
    sources = find_sources([str(tmp_path / "adapters")])
    inspections = judged(sources, base_folder)
    assert {item.name: item.state for item in inspections} == {"empty": "refused", "good": "admitted"}


def test_of_two_adapters_with_one_name_the_first_is_served(
    make_adapter: MakeAdapter, base_folder: Path
) -> None:
    one, two = make_adapter("one"), make_adapter("two")
    sources = find_sources([f"x={one}", f"x={two}"])
    first, second = judged(sources, base_folder)
    assert first.admitted
    assert [finding.code for finding in second.findings] == ["adapter_exists"]


def test_an_adapter_may_not_take_the_bases_name(make_adapter: MakeAdapter, base_folder: Path) -> None:
    sources = find_sources([f"base={make_adapter()}"])
    (item,) = judged(sources, base_folder, "base", "other")
    assert [finding.code for finding in item.findings] == ["adapter_name_reserved"]
    (item,) = judged(sources, base_folder, "served-as")
    assert item.admitted


def test_the_base_is_the_one_that_all_name(
    make_adapter: MakeAdapter, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base_folder.parent)
    folders = [make_adapter("a"), make_adapter("b", base_model_name_or_path="base")]
    assert agreed_base_model(find_sources(list(map(str, folders)))) == str(base_folder)


def test_adapters_that_disagree_are_listed(make_adapter: MakeAdapter) -> None:
    folders = [make_adapter("a", base_model_name_or_path="org/a"), make_adapter("b")]
    with pytest.raises(BadSetting, match=r"org/a \(a\).*\(b\)"):
        agreed_base_model(find_sources(list(map(str, folders))))


def test_an_adapter_that_cannot_be_read_has_no_say(make_adapter: MakeAdapter, base_folder: Path) -> None:
    broken = make_adapter("broken", base_model_name_or_path="org/other")
    (broken / "adapter_model.safetensors").unlink()
    endless = make_adapter("endless")
    (endless / "adapter_config.json").write_text("[" * 100_000)
    folders = [broken, endless, make_adapter("good")]
    assert agreed_base_model(find_sources(list(map(str, folders)))) == str(base_folder)


def test_without_any_name_the_flag_is_asked_for() -> None:
    with pytest.raises(BadSetting, match="--base-model"):
        agreed_base_model([])
