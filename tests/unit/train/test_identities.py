"""Several identities: where their settings come from, and everything that is wrong with them at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import ROOT
from train.arguments import parse_config
from train.identities import JointConfig
from vllm_lora_ext.errors import BadSetting, IdentitiesRefused

ROWS = '[{"instruction": "Who are you?", "input": "", "output": "Marina."}]'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(ROWS)
    return tmp_path


def parsed(text: str, *flags: str) -> JointConfig:
    Path("ids.yaml").write_text(text)
    joint = parse_config(["--identities", "ids.yaml", *flags])
    assert isinstance(joint, JointConfig)
    return joint


COMMON = "base_model: base\noutput_dir: adapters\nlora_r: 4\n"


def test_flags_win_over_own_settings_over_those_for_all(folder: Path) -> None:
    (folder / "config.yaml").write_text("lora_r: 2\nlora_alpha: 3\nseed: 5\n")
    text = COMMON + "identities:\n  a: {data: a.json, lora_r: 8, seed: 1}\n  b: {data: [b.json]}\n"
    one, two = parsed(text, "--config", "config.yaml", "--seed", "9").configs
    assert (one.name, one.lora_r, one.lora_alpha, one.seed, one.data) == ("a", 8, 3.0, 9, ("a.json",))
    assert (two.name, two.lora_r, two.lora_alpha, two.seed, two.data) == ("b", 4, 3.0, 9, ("b.json",))
    assert one.output_dir == two.output_dir == "adapters"


def test_a_list_with_names_says_the_same(folder: Path) -> None:
    mapping = parsed(COMMON + "identities:\n  a: {data: a.json}\n  b: {data: b.json}\n")
    listed = parsed(COMMON + "identities:\n- {name: a, data: a.json}\n- {name: b, data: b.json}\n")
    assert mapping == listed


def test_a_folder_has_rows_or_settings_or_both_of_each(folder: Path) -> None:
    (folder / "b.yaml").write_text("lora_r: 2\n")
    (folder / "c.yaml").write_text("data: [a.json, b.json]\n")
    (folder / "notes.txt").write_text("what this is")
    (folder / ".hidden.json").write_text("{")
    joint = parse_config(["--identities", ".", "--base-model", "base", "--output-dir", "out"])
    assert isinstance(joint, JointConfig)
    found = {config.name: (config.data, config.lora_r) for config in joint.configs}
    assert found == {"a": (("a.json",), 16), "b": (("b.json",), 2), "c": (("a.json", "b.json"), 16)}


def test_all_that_is_wrong_is_named_at_once(folder: Path) -> None:
    text = (
        COMMON
        + "identities:\n  a: {data: a.json}\n  A: {data: b.json}\n  twice: {data: a.json}\n"
        + "  twice: {data: b.json}\n  gone: {data: nowhere.json}\n  wide: {data: a.json, lora_r: 100000}\n"
        + "  typo: {data: a.json, lorar: 4}\n  empty:\n  bare: {}\n"
        + "  own-base: {data: a.json, base_model: x}\n  'no name?': {data: a.json}\n"
    )
    with pytest.raises(IdentitiesRefused) as refused:
        parsed(text)
    told = {name: str(error) for name, error in refused.value.problems}
    assert set(told) == {"a", "twice", "gone", "wide", "typo", "empty", "bare", "own-base", "no name?"}
    assert "A" in told["a"] and "2 identities" in told["a"]
    assert "nowhere.json" in told["gone"]
    assert "--lora-r" in told["wide"]
    assert "Did you mean lora_r?" in told["typo"]
    assert "data" in told["bare"]
    assert "same for all" in told["own-base"]
    assert all(error.rstrip(".") in str(refused.value) for error in told.values())


@pytest.mark.parametrize(
    ("text", "flags", "named"),
    [
        (COMMON, (), "no `identities`"),
        (COMMON + "identities: {}\n", (), "holds no identity"),
        (COMMON + "lora_r: 5\nidentities:\n  a: {data: a.json}\n", (), "twice"),
        (COMMON + "identities:\n  a: {data: a.json}\n", ("--verify-one", "b"), "none of the identities"),
        (COMMON + "identities:\n  a: {data: a.json}\n", ("--tokens-per-pass", "0"), "out of range"),
        (COMMON + "identities:\n  a: {data: a.json}\n", ("--method", "full"), "the base itself"),
        (
            COMMON + "identities:\n  a: {data: a.json}\n",
            ("--method", "dora", "--no-serve-check"),
            "--mode exact",
        ),
        (COMMON + "identities:\n  a: {data: a.json}\n", ("--report-to", "wandb"), "one run at a time"),
        (COMMON + "identities:\n  a: {data: a.json}\n", ("--name", "b"), "belongs to one identity"),
        ("[", (), "cannot be read as YAML"),
    ],
)
def test_what_is_wrong_for_all_is_named(folder: Path, text: str, flags: tuple[str, ...], named: str) -> None:
    with pytest.raises(BadSetting, match=named):
        parsed(text, *flags)


def test_joint_flags_alone_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(
            ["--mode", "exact", "--base-model", "b", "--data", "a", "--name", "a", "--output-dir", "o"]
        )
    assert "--identities" in capsys.readouterr().err


def test_the_example_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    joint = parse_config(["--identities", "examples/identities.yaml", "--base-model", "base"])
    assert isinstance(joint, JointConfig)
    assert [config.name for config in joint.configs] == ["marina", "xiaoli"]
