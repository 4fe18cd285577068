"""What people really have: folders of the known trainers, and adapters that PEFT writes, are all admitted."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from serve.cli import main
from tests.trainer_folders import TEMPLATE, TRAINERS, WITH_OWN_BASE
from vllm_lora_ext.base_model import read_base_model
from vllm_lora_ext.contract import TEMPLATE_FILE
from vllm_lora_ext.inspection import Rules, inspect_adapter
from vllm_lora_ext.intake import admit
from vllm_lora_ext.store import AdapterStore

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "tie_word_embeddings": False,
}
ARCHITECTURES = ("qwen2", "qwen3", "llama", "mistral", "gemma")
ATTENTION, ALL = (
    ["q_proj", "v_proj"],
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
)
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ATTENTION},
    "all": {"target_modules": ALL, "r": 16, "lora_alpha": 24.5},
    "all-linear": {"target_modules": "all-linear", "r": 4},
    "expression": {"target_modules": r".*\.layers\.1\.(self_attn|mlp)\..*_proj"},
    "rslora": {"target_modules": ALL, "use_rslora": True, "lora_alpha": 8},
    "one layer": {"target_modules": ATTENTION, "layers_to_transform": 1},
    "layers by name": {"target_modules": ATTENTION, "layers_to_transform": [0], "layers_pattern": "layers"},
    "patterns": {
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 4, "mlp.up_proj|down_proj": 2, "^model.layers.1.self_attn.k_proj": 1},
        "alpha_pattern": {"layers.0.self_attn.v_proj": 3, "o_proj": 7.5},
    },
    "patterns and rslora": {
        "target_modules": ALL,
        "use_rslora": True,
        "rank_pattern": {"layers.1.mlp.gate_proj": 32},
        "alpha_pattern": {"gate_proj": 1},
    },
    "excluded": {"target_modules": ALL, "exclude_modules": ["layers.0.self_attn.q_proj", "k_proj"]},
    "vocabulary": {"target_modules": [*ATTENTION, "embed_tokens", "lm_head"]},
    "gaussian": {"target_modules": ATTENTION, "init_lora_weights": "gaussian"},
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A tiny random model of one architecture, and its folder."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **SIZES)
    model = AutoModelForCausalLM.from_config(config).eval()
    folder = tmp_path_factory.mktemp(request.param) / "base"
    config.save_pretrained(folder)
    return folder, model


def logits(base: Any, adapter: Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(copy.deepcopy(base), str(adapter)).eval()
    with torch.inference_mode():
        found: torch.Tensor = model(torch.arange(12)[None]).logits
    return found


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_peft_writes_is_admitted_and_its_copy_answers_the_same(
    kind: str, base: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, model = base
    torch.manual_seed(1)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", **CONFIGS[kind]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    admitted = admit(
        tmp_path / "adapter", AdapterStore(tmp_path / "store"), Rules(read_base_model(str(folder)))
    )
    assert admitted.inspection.state == ("unproven" if kind == "vocabulary" else "admitted")
    stored = logits(model, admitted.version.folder)
    assert torch.equal(stored, logits(model, tmp_path / "adapter"))
    assert not torch.allclose(stored, model(torch.arange(12)[None]).logits)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_folder_as_a_trainer_leaves_it_is_admitted(
    trainer: str, base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (base_folder / TEMPLATE_FILE).write_text(TEMPLATE)
    folder = TRAINERS[trainer](tmp_path / trainer, base_folder)
    inspection = inspect_adapter(folder, Rules(read_base_model(str(base_folder))), "x")
    assert inspection.state == "admitted", [str(finding) for finding in inspection.findings]
    assert inspection.chat.state == "unproven", "Trainer and TRL copy the base's template"
    assert main(["validate", str(folder), "--base-model", str(base_folder)]) == 0
    capsys.readouterr()
    files = {path.name for path in admit(folder, AdapterStore(tmp_path / "store")).version.folder.iterdir()}
    assert not any(name.endswith((".pt", ".bin", ".pth")) for name in files), "no pickle is carried along"


@pytest.mark.parametrize("kind", WITH_OWN_BASE)
def test_an_adapter_of_a_special_base_is_admitted(kind: str, tmp_path: Path) -> None:
    folder = WITH_OWN_BASE[kind](tmp_path / "adapter", tmp_path / "base")
    rules = Rules(read_base_model(str(tmp_path / "base")))
    admitted = admit(folder, AdapterStore(tmp_path / "store"), rules)
    assert admitted.inspection.admitted


def test_an_adapter_of_experts_is_left_to_the_engine(tmp_path: Path) -> None:
    from tests.trainer_folders import qwen3_moe_adapter

    folder = qwen3_moe_adapter(tmp_path / "adapter", tmp_path / "base", experts=True)
    inspection = inspect_adapter(folder, Rules(read_base_model(str(tmp_path / "base"))))
    assert inspection.state == "unproven"
    assert "module_unproven" in {finding.code for finding in inspection.findings}
