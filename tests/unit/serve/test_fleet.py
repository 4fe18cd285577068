"""Finding adapters: folders, single ones, name=path; the base that they agree on; and how they are shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from serve.fleet import FleetRow, agreed_base_model, default_state_dir, fleet_rows, fleet_table
from vllm_lora_ext.base_model import read_base_model
from vllm_lora_ext.catalog import Catalog
from vllm_lora_ext.errors import BadSetting
from vllm_lora_ext.inbox import Inbox
from vllm_lora_ext.inspection import Rules
from vllm_lora_ext.publishing import publish
from vllm_lora_ext.sources import AdapterSource, find_sources
from vllm_lora_ext.spec import EngineLimits

MakeAdapter = Callable[..., Path]


def names(sources: list[AdapterSource]) -> list[str]:
    return [source.name for source in sources]


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(tmp_path / "state")


def judged(
    sources: list[AdapterSource], base_folder: Path, catalog: Catalog, *base_names: str, max_rank: int = 512
) -> dict[tuple[str, str], FleetRow]:
    """Rows by name and state."""
    rules = Rules(read_base_model(str(base_folder)), base_names)
    items = Inbox(catalog, rules).scan(sources)
    rows = fleet_rows(items, catalog, Rules(rules.base, base_names, EngineLimits(max_rank)))
    return {(row.name, row.state): row for row in rows}


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


def test_what_has_to_be_fetched_is_shown(base_folder: Path, catalog: Catalog) -> None:
    assert list(judged([AdapterSource("x", "hf://org/adapter")], base_folder, catalog)) == [
        ("x", "fetched next")
    ]


def test_a_folder_that_is_no_adapter_is_refused_not_skipped(
    make_adapter: MakeAdapter, tmp_path: Path, base_folder: Path, catalog: Catalog
) -> None:
    make_adapter("good")
    (tmp_path / "adapters" / "empty").mkdir()
    sources = find_sources([str(tmp_path / "adapters")])
    assert set(judged(sources, base_folder, catalog)) == {("empty", "refused"), ("good", "admitted")}


def test_of_two_adapters_with_one_name_the_first_is_served(
    make_adapter: MakeAdapter, base_folder: Path, catalog: Catalog
) -> None:
    one, two = make_adapter("one"), make_adapter("two")
    rows = judged(find_sources([f"x={one}", f"x={two}"]), base_folder, catalog)
    assert set(rows) == {("x", "admitted"), ("x", "refused")}
    assert [finding.code for finding in rows["x", "refused"].findings] == ["adapter_exists"]


def test_an_adapter_may_not_take_the_bases_name(
    make_adapter: MakeAdapter, base_folder: Path, catalog: Catalog
) -> None:
    sources = find_sources([f"base={make_adapter()}"])
    (row,) = judged(sources, base_folder, catalog, "base", "other").values()
    assert [finding.code for finding in row.findings] == ["adapter_name_reserved"]
    assert set(judged(sources, base_folder, catalog, "served-as")) == {("base", "admitted")}


def test_what_is_published_is_judged_by_the_servers_limits_and_base(
    make_adapter: MakeAdapter, base_folder: Path, catalog: Catalog
) -> None:
    rules = Rules(read_base_model(str(base_folder)))
    publish(AdapterSource("x", str(make_adapter())), catalog, rules)
    assert set(judged([], base_folder, catalog)) == {("x", "admitted")}
    (row,) = judged([], base_folder, catalog, max_rank=4).values()
    assert row.is_refused and "--max-lora-rank 8" in row.findings[0].fix
    config = (base_folder / "config.json").read_text().replace('"hidden_size": 64', '"hidden_size": 32')
    (base_folder / "config.json").write_text(config)
    (row,) = judged([], base_folder, catalog).values()
    assert row.is_refused and row.findings[0].code == "shape_mismatch"


def test_a_refused_change_is_shown_beside_the_version_that_serves(
    make_adapter: MakeAdapter, base_folder: Path, catalog: Catalog
) -> None:
    folder = make_adapter("x")
    rules, sources = Rules(read_base_model(str(base_folder))), find_sources([str(folder)])
    inbox = Inbox(catalog, rules)
    inbox.take_all(inbox.scan(sources))
    (folder / "adapter_config.json").write_text("{")
    rows = judged(sources, base_folder, catalog)
    assert set(rows) == {("x", "admitted"), ("x", "refused")}
    table = fleet_table(list(rows.values()))
    assert [column.header for column in table.columns][:3] == ["adapter", "version", "rank"]
    assert table.row_count == 2


def test_the_state_folder_follows_from_the_real_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "adapters").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "adapters")
    found = default_state_dir([str(tmp_path / "adapters")])
    assert found.parent == tmp_path / "state" / "vllm-lora" and len(found.name) == 12
    assert default_state_dir([str(tmp_path / "link")]) == found
    assert default_state_dir([str(tmp_path)]) != found


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
    endless = make_adapter("endless")
    (endless / "adapter_config.json").write_text("[" * 100_000)
    folders = [endless, make_adapter("good")]
    assert agreed_base_model(find_sources(list(map(str, folders)))) == str(base_folder)


def test_without_any_name_the_flag_is_asked_for() -> None:
    with pytest.raises(BadSetting, match="--base-model"):
        agreed_base_model([])
    assert agreed_base_model([], remembered="org/base") == "org/base"
