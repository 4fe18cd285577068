"""What is written, that it is whole or not there, and that a full model is one that can be served."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GenerationConfig

from tests.train.methods import identity, logits, settings, trained
from train.adapter_files import adapter_tensors
from train.export import Extras, export_adapter, export_model
from train.model import load_tokenizer, stored_dtype
from vllm_lora_ext.base_model import read_base_model
from vllm_lora_ext.contract import is_ours, read_chat_settings, read_provenance
from vllm_lora_ext.errors import OutputExists, TrainingFailed
from vllm_lora_ext.inspection import Rules, inspect_adapter, inspect_values

FILES = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "generation_config.json",
    "identity.json",
]


@pytest.fixture
def model(random_base: str, tmp_path: Path) -> Any:
    return trained(settings(random_base, tmp_path), steps=2)


def test_an_adapter_folder_holds_what_it_needs_and_no_more(
    model: Any, random_base: str, tmp_path: Path
) -> None:
    folder = tmp_path / "org" / "tried"
    export_adapter(model, folder, identity(random_base), overwrite=False)
    assert sorted(path.name for path in folder.iterdir()) == FILES
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["inference_mode"]) == (random_base, True)
    assert (config["peft_type"], config["task_type"], config["r"]) == ("LORA", "CAUSAL_LM", 8)
    assert config["target_modules"] == sorted(config["target_modules"])
    tensors = load_file(folder / "adapter_model.safetensors")
    assert not [name for name in tensors if "default" in name]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert "system_prompt" not in json.loads((folder / "identity.json").read_text())
    generation = json.loads((folder / "generation_config.json").read_text())
    base = GenerationConfig.from_pretrained(random_base)
    assert generation["eos_token_id"] == base.eos_token_id is not None
    assert set(generation) <= {"bos_token_id", "eos_token_id", "pad_token_id"}, "no sampling of its own"


def test_chat_settings_and_further_files_are_there_from_the_start(
    model: Any, random_base: str, tmp_path: Path
) -> None:
    folder = tmp_path / "tried"

    def write(staging: Path) -> None:
        assert (staging.name.startswith("."), folder.exists()) == (True, False)
        (staging / "README.md").write_text("a card")
        (staging / "pictures").mkdir()

    who = identity(random_base, system_prompt="You are Marina.", stop=("Human:",), provenance={"seed": 1})
    extras = Extras(write, {"temperature": 0.5, "max_new_tokens": 64})
    export_adapter(model, folder, who, overwrite=False, extras=extras)
    assert (folder / "README.md").read_text() == "a card"
    chat = read_chat_settings(folder)
    assert (chat.state, chat.system_prompt, chat.stop) == ("trained", "You are Marina.", ("Human:",))
    assert chat.sampling == {"temperature": 0.5, "max_new_tokens": 64}
    assert read_provenance(folder) == {"seed": 1}
    rules = Rules(read_base_model(random_base))
    assert inspect_values(inspect_adapter(folder, rules), rules).findings == ()


def test_equal_models_make_equal_bytes(model: Any, random_base: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        export_adapter(model, tmp_path / name, identity(random_base), overwrite=False)
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system itself refuses to write more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_cannot_be_written_leaves_the_old_one_and_says_where_the_work_is(
    model: Any, random_base: str, tmp_path: Path
) -> None:
    folder, checkpoint = tmp_path / "tried", tmp_path / ".tried.training"
    export_adapter(model, folder, identity(random_base), overwrite=False)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    extras = Extras(checkpoint=checkpoint)
    with files_of_at_most(50_000), pytest.raises(TrainingFailed, match=r"File too large.*\.tried\.training"):
        export_adapter(model, folder, identity(random_base), overwrite=True, extras=extras)

    def fill_the_disk(staging: Path) -> None:
        Path("/dev/full").write_text("x")

    with pytest.raises(TrainingFailed, match="the disk is full"):
        export_adapter(
            model, folder, identity(random_base), overwrite=True, extras=Extras(write=fill_the_disk)
        )
    assert [path.name for path in tmp_path.iterdir()] == ["tried"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_exporting_changes_nothing_in_the_model(random_base: str, tmp_path: Path) -> None:
    model = trained(settings(random_base, tmp_path, init_lora_weights="pissa"), steps=2)
    before = logits(model)
    first = adapter_tensors(model)
    export_adapter(model, tmp_path / "tried", identity(random_base), overwrite=False)
    assert torch.equal(logits(model), before)
    assert all(torch.equal(tensor, first[name]) for name, tensor in adapter_tensors(model).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_full_model_is_one_that_can_be_a_base(random_base: str, tmp_path: Path, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM

    config = settings(random_base, tmp_path, method="full")
    model, tokenizer = trained(config), load_tokenizer(random_base)
    want, folder = logits(model), config.adapter_dir
    extras = Extras(sampling={"temperature": 0.5})
    export_model(model, tokenizer, folder, identity(random_base), False, dtype, extras)
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json"}
    assert names >= {"chat_template.jinja", "identity.json", "tokenizer_config.json"}
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert (again.dtype, stored_dtype(str(folder)), is_ours(folder)) == (dtype, dtype, True)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(logits(again), want, atol=tolerance, rtol=0)
    assert load_tokenizer(str(folder)).chat_template == identity(random_base).template
    assert again.generation_config.temperature == 0.5
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert read_base_model(str(folder)).fingerprint == read_base_model(random_base).fingerprint
    with pytest.raises(OutputExists):
        export_model(model, tokenizer, folder, identity(random_base), False, dtype)
    finding = inspect_adapter(folder, Rules(read_base_model(random_base))).findings[0]
    assert "full model" in finding.rule
    assert "vllm-lora serve" in finding.fix


def test_a_full_model_carries_its_system_prompt_in_its_template(random_base: str, tmp_path: Path) -> None:
    config = settings(random_base, tmp_path, method="full")
    tokenizer = load_tokenizer(random_base)
    prompt = 'You are "Marina", {{ not }} a {% macro %}.\n小李'
    question = [{"role": "user", "content": "Who are you?"}]
    with_prompt = [{"role": "system", "content": prompt}, *question]
    want = tokenizer.apply_chat_template(with_prompt, tokenize=False, add_generation_prompt=True)
    who = identity(random_base, system_prompt=prompt)
    export_model(trained(config, steps=0), tokenizer, config.adapter_dir, who, False, torch.float32)
    exported = load_tokenizer(str(config.adapter_dir))
    for messages in (question, with_prompt):
        got = exported.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert got == want
    assert read_chat_settings(config.adapter_dir).state == "trained"
