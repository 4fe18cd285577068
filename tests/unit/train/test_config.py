"""Settings: flags over the file over the defaults, and a clear no to what makes no sense."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import ROOT
from train.arguments import parse_config
from train.config import ALL_PROJECTIONS, TrainConfig, default_learning_rate
from vllm_lora_ext.errors import BadSetting

NEEDED = ["--base-model", "base", "--data", "id.json", "--name", "xiaoli", "--output-dir", "adapters"]


def test_only_the_needed_flags_are_needed() -> None:
    config = parse_config(NEEDED)
    assert config == TrainConfig("base", ("id.json",), "xiaoli", "adapters")
    assert config.adapter_dir == Path("adapters/xiaoli")
    assert (config.max_length, config.validation_split) == (256, 0.1)
    assert config.target_modules == ALL_PROJECTIONS


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lora_r: 4\nlearning-rate: 5e-5\ndata: id.json\ntarget_modules: [q_proj]\n")
    config = parse_config([*NEEDED, "--config", str(file), "--lora-r", "2", "--no-overwrite"])
    assert (config.lora_r, config.learning_rate) == (2, 5e-5)
    assert config.target_modules == ("q_proj",)


def test_the_classic_script_value_for_value() -> None:
    config = parse_config([*NEEDED, "--config", str(ROOT / "examples" / "classic.yaml")])
    assert config == TrainConfig(
        base_model="base",
        data=("id.json",),
        name="xiaoli",
        output_dir="adapters",
        prompt_template="Human: {instruction}\n{input}\n\nAssistant: ",
        target_modules=("q_proj", "k_proj", "v_proj"),
        lora_r=8,
        lora_alpha=8.0,
        learning_rate=5e-5,
        lr_scheduler_type="linear",
        warmup_ratio=0.0,
        per_device_train_batch_size=1,
        num_train_epochs=10.0,
        max_length=256,
    )


@pytest.mark.parametrize(
    "content",
    [
        "rank: 8",
        "lora_r: eight",
        "lora_r: 8.5",
        "lr_scheduler_type: square",
        "[",
        "- a",
        "data: 3",
        "overwrite: 1",
    ],
)
def test_a_file_with_a_wrong_setting_names_it(tmp_path: Path, content: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(BadSetting, match=r"run\.yaml"):
        parse_config([*NEEDED, "--config", str(file)])


@pytest.mark.parametrize(
    "flags",
    [
        ["--lora-r", "0"],
        ["--learning-rate", "-1"],
        ["--validation-split", "1"],
        ["--num-train-epochs", "0"],
        ["--max-length", "1"],
        ["--num-train-epochs", "inf"],
        ["--max-steps", "-5"],
        ["--lora-r", "100000"],
        ["--lora-alpha", "nan"],
        ["--seed", "-1"],
        ["--weight-decay", "-1"],
        ["--max-grad-norm", "-1"],
        ["--name", "../escape"],
        ["--name", "text"],
    ],
)
def test_values_out_of_range_name_the_flag(flags: list[str]) -> None:
    with pytest.raises(BadSetting, match=flags[0]):
        parse_config([*NEEDED, *flags])


def test_what_is_missing_is_listed_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_config(["--name", "xiaoli"])
    assert ended.value.code == 2
    assert "--base-model, --data, --output-dir" in capsys.readouterr().err


def test_flags_are_not_guessed_from_their_beginning() -> None:
    with pytest.raises(SystemExit):
        parse_config([*NEEDED, "--learning", "0.1"])


def test_a_wider_base_gets_a_smaller_learning_rate() -> None:
    rates = [default_learning_rate(width) for width in (64, 256, 896, 4096)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == rates[1] == 2e-3


def test_a_base_folder_is_noted_by_its_full_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse_config(NEEDED).base_path == str(tmp_path / "base")
    assert TrainConfig("org/model", ("a",), "x", "o").base_path == "org/model"


def test_a_printed_config_is_a_file_that_gives_the_same_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*NEEDED, "--lora-r", "4", "--probe", "Who are you?=小李", "--data-weights", "2"]
    with pytest.raises(SystemExit) as ended:
        parse_config([*flags, "--print-config"])
    file = tmp_path / "run.yaml"
    file.write_text(capsys.readouterr().out)
    assert ended.value.code == 0
    assert parse_config(["--config", str(file)]) == parse_config(flags)


def test_an_unknown_key_is_answered_with_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lora_rank: 8\nreport_to: [none]\n")
    with pytest.raises(BadSetting, match=r"lora_rank: is no setting\. Did you mean lora_r"):
        parse_config([*NEEDED, "--config", str(file)])
    file.write_text("report_to: [tensorbord]\n")
    with pytest.raises(BadSetting, match="Did you mean tensorboard"):
        parse_config([*NEEDED, "--config", str(file)])
