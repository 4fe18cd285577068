"""A real, very small training run: what it writes, and what it leaves alone when it may not write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT
from train.answers import LocalChat
from train.batches import collate
from train.config import TrainConfig, planned_steps
from train.export import finished_folder
from train.merge import merge
from train.prompts import Example
from train.run import steps_line, train
from vllm_lora_ext.base_model import read_base_model
from vllm_lora_ext.contract import Identity, read_chat_settings, write_contract
from vllm_lora_ext.errors import BadBaseModel, BadData, BadInput, BadSetting, OutputExists, TrainingFailed
from vllm_lora_ext.inspection import Rules, inspect_adapter

DATA = str(ROOT / "examples" / "identities" / "xiaoli.json")
Config = Callable[..., TrainConfig]


@pytest.fixture
def config(random_base: str, tmp_path: Path) -> Config:
    def make(**changes: Any) -> TrainConfig:
        settings: dict[str, Any] = {
            "base_model": random_base,
            "data": (DATA,),
            "name": "xiaoli",
            "output_dir": str(tmp_path / "adapters"),
            "max_steps": 2,
            **changes,
        }
        return TrainConfig(**settings)

    return make


def test_a_run_writes_a_folder_that_admission_takes(
    config: Config, random_base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config()
    folder = Path(train(settings))
    inspection = inspect_adapter(folder, Rules(read_base_model(random_base)))
    assert (inspection.state, inspection.chat.state) == ("admitted", "trained")
    assert read_chat_settings(folder).template == json_template(random_base)
    provenance = json.loads((folder / "identity.json").read_text())["provenance"]
    assert (provenance["seed"], provenance["data"]["rows"]) == (42, 91)
    assert [path.name for path in folder.parent.iterdir()] == ["xiaoli"]
    told = capsys.readouterr().err
    assert "trainable parameters" in told
    assert "steps = 2 (--max-steps)" in told
    assert "token accuracy" in told


def json_template(base: str) -> str:
    return (Path(base) / "chat_template.jinja").read_text()


def test_the_same_seed_gives_the_same_weights(config: Config) -> None:
    one, two = (Path(train(config(name=name))) for name in ("one", "two"))
    weights = "adapter_model.safetensors"
    assert (one / weights).read_bytes() == (two / weights).read_bytes()


def test_an_adapter_is_replaced_only_when_asked(config: Config) -> None:
    folder = Path(train(config()))
    before = (folder / "adapter_model.safetensors").read_bytes()
    with pytest.raises(OutputExists, match="--overwrite"):
        train(config(seed=1))
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    train(config(seed=1, overwrite=True))
    assert (folder / "adapter_model.safetensors").read_bytes() != before
    assert [path.name for path in folder.parent.iterdir()] == ["xiaoli"]


def test_a_folder_that_is_not_ours_is_never_replaced(config: Config, tmp_path: Path) -> None:
    mine = tmp_path / "adapters" / "xiaoli"
    mine.mkdir(parents=True)
    (mine / "holiday.jpg").write_text("precious")
    with pytest.raises(OutputExists, match="not written by this tool"):
        train(config(overwrite=True))
    assert (mine / "holiday.jpg").read_text() == "precious"


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"base_model": str(ROOT / "docs")}, BadBaseModel),
        ({"base_model": "./nowhere"}, BadBaseModel),
        ({"target_modules": ("no_such_module",)}, BadSetting),
        ({"max_length": 4}, BadData),
        ({"data": ("nowhere.json",)}, BadData),
        ({"lora_alpha": 1e45, "serve_check": False}, TrainingFailed),
        ({"output_dir": DATA}, BadSetting),
        ({"output_dir": DATA + "/below"}, BadSetting),
    ],
)
def test_a_run_that_cannot_work_writes_nothing(
    config: Config, tmp_path: Path, changes: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        train(config(**changes))
    assert not list((tmp_path / "adapters").glob("**/*"))


@pytest.mark.parametrize("foreign", ['[{"instruction": "a"}]', '{"a": 1}', "{", "[" * 100_000])
def test_a_folder_with_an_identity_json_of_another_kind_is_not_ours(
    config: Config, tmp_path: Path, foreign: str
) -> None:
    mine = tmp_path / "adapters" / "xiaoli"
    mine.mkdir(parents=True)
    (mine / "identity.json").write_text(foreign)
    with pytest.raises(OutputExists, match="not written by this tool"):
        train(config(overwrite=True))
    assert (mine / "identity.json").read_text() == foreign


def test_what_appears_during_the_work_is_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    with pytest.raises(OutputExists), finished_folder(folder, overwrite=True):
        folder.mkdir()
        (folder / "holiday.jpg").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert [path.name for path in folder.iterdir()] == ["holiday.jpg"]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0"),
        ("config.json", None),
        ("chat_template.jinja", b"{% for %}"),
        ("tokenizer.json", b"{"),
    ],
)
def test_a_damaged_base_is_named_and_nothing_is_written(
    config: Config, random_base: str, tmp_path: Path, file: str, content: bytes | None
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(random_base, damaged)
    if content is None:
        body = json.loads((damaged / file).read_text())
        content = json.dumps({**body, "hidden_size": 96}).encode()
    (damaged / file).write_bytes(content)
    with pytest.raises(BadBaseModel, match="damaged"):
        train(config(base_model=str(damaged)))
    assert not list((tmp_path / "adapters").glob("**/*"))


def test_the_steps_line_is_arithmetic_that_holds(config: Config) -> None:
    assert steps_line(80, config(max_steps=-1)) == "steps = 80 rows x 20 epochs / batch of 4 = 400"
    assert steps_line(82, config(max_steps=-1)).endswith("= 420 (the last batch of an epoch is smaller)")


def test_a_failed_write_leaves_the_old_folder(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "old").touch()
    write_contract(folder, Identity("x", "template"))
    with pytest.raises(OSError, match="disk full"), finished_folder(folder, True) as staging:
        (staging / "half").touch()
        raise OSError("disk full")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (folder / "old").exists()


def test_base_and_adapter_answer_side_by_side(config: Config) -> None:
    answers = LocalChat(Path(train(config(learning_rate=0.01, max_steps=40)))).ask("Who are you?", 32)
    assert answers.base != answers.adapter


def test_a_merged_model_computes_what_base_and_adapter_compute(config: Config, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    settings = config(learning_rate=0.05, max_steps=12)
    folder, out = Path(train(settings)), tmp_path / "merged"
    merge(folder, None, out)
    ids = torch.arange(20)[None]
    base = AutoModelForCausalLM.from_pretrained(settings.base_model)
    with torch.inference_mode():
        alone = base(ids).logits
        adapted = PeftModel.from_pretrained(base, str(folder))(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(out)(ids).logits
    torch.testing.assert_close(merged, adapted, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(merged, alone, atol=1e-1)
    with pytest.raises(OutputExists):
        merge(folder, None, out)


def test_a_damaged_adapter_is_named_and_not_merged(config: Config, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(train(config()))
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, weights)
    with pytest.raises(BadInput, match="xiaoli"):
        merge(folder, None, tmp_path / "merged")
    (folder / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(BadInput, match="template_refused"):
        LocalChat(folder).ask("Who are you?")
    settings = folder / "adapter_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "target_modules": "("}))
    with pytest.raises(BadInput, match="target_modules_mismatch"):
        LocalChat(folder)
    assert not (tmp_path / "merged").exists()


def test_steps_are_rows_times_epochs_over_batch(config: Config) -> None:
    assert planned_steps(82, config(max_steps=-1)) == 21 * 20
    assert planned_steps(82, config(max_steps=-1, gradient_accumulation_steps=2)) == 11 * 20
    assert planned_steps(3, config(max_steps=-1, num_train_epochs=0.5)) == 1
    assert planned_steps(82, config(max_steps=7)) == 7


def test_padding_stands_behind_its_row_and_carries_no_loss() -> None:
    batch = collate([Example((5, 6, 7), ((1, 3),)), Example((8, 9), ((1, 2),))], pad=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]
