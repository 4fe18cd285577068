"""A base model is what its config says, whatever it is called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import BASE_CONFIG, SHAPES
from vllm_lora_ext.base_model import BaseModel, read_base_model
from vllm_lora_ext.errors import BadBaseModel


def test_shapes_follow_from_the_config(base_folder: Path) -> None:
    shapes = read_base_model(str(base_folder)).module_shapes()
    assert shapes is not None
    assert len(shapes) == 2 * len(SHAPES)
    assert {
        name.removeprefix("model.layers.1."): shape for name, shape in shapes.items() if ".1." in name
    } == SHAPES


def test_shapes_are_those_of_the_real_model() -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(Qwen2Config(**BASE_CONFIG))
    real = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if name.endswith("_proj")
    }
    assert BaseModel("x", BASE_CONFIG).module_shapes() == real


def test_a_head_dim_of_its_own_counts() -> None:
    shapes = BaseModel("x", {**BASE_CONFIG, "model_type": "qwen3", "head_dim": 32}).module_shapes()
    assert shapes is not None
    assert shapes["model.layers.0.self_attn.q_proj"] == (128, 64)
    assert shapes["model.layers.0.self_attn.o_proj"] == (64, 128)


def test_an_unknown_architecture_has_no_shapes() -> None:
    assert BaseModel("x", {"model_type": "mamba"}).module_shapes() is None
    assert BaseModel("x", {"model_type": "qwen2"}).module_shapes() is None


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": ["qwen2"]},
        {"num_key_value_heads": "abc"},
        {"num_attention_heads": 0},
        {"hidden_size": None},
    ],
)
def test_a_config_that_makes_no_sense_has_no_shapes(change: dict[str, object]) -> None:
    assert BaseModel("x", {**BASE_CONFIG, **change}).module_shapes() is None


def test_a_name_that_is_no_path_is_refused() -> None:
    with pytest.raises(BadBaseModel):
        read_base_model("x" * 5000)


def test_a_link_is_served_under_its_own_name(base_folder: Path) -> None:
    (base_folder.parent / "mine").symlink_to(base_folder)
    assert read_base_model(str(base_folder.parent / "mine")).public_name == "mine"


def test_the_fingerprint_ignores_names_and_sees_sizes() -> None:
    one = BaseModel("here", BASE_CONFIG)
    assert one.fingerprint == BaseModel("there", {**BASE_CONFIG, "_name_or_path": "x"}).fingerprint
    assert one.fingerprint != BaseModel("here", {**BASE_CONFIG, "hidden_size": 128}).fingerprint


# What older configs leave out, and what a newer transformers writes in its place.
LEFT_OUT = {
    "llama": {"num_key_value_heads": 4, "head_dim": 16},
    "mistral": {"num_key_value_heads": 8, "head_dim": 16},
    "qwen2": {"num_key_value_heads": 32, "head_dim": 16},
    "mixtral": {"num_key_value_heads": 8, "head_dim": 16},
}


@pytest.mark.parametrize("model_type", LEFT_OUT)
def test_a_config_that_was_saved_again_has_the_same_fingerprint(model_type: str) -> None:
    stated = {**BASE_CONFIG, "model_type": model_type, **LEFT_OUT[model_type]}
    short = {name: value for name, value in stated.items() if name not in LEFT_OUT[model_type]}
    null = {**short, "head_dim": None}
    fingerprint = BaseModel("x", stated).fingerprint
    assert fingerprint == BaseModel("x", short).fingerprint == BaseModel("x", null).fingerprint
    assert fingerprint != BaseModel("x", {**stated, "head_dim": 32}).fingerprint
    assert fingerprint != BaseModel("x", {**stated, "num_key_value_heads": 1}).fingerprint


def test_a_vision_language_config_that_was_saved_again_has_the_same_fingerprint() -> None:
    """As google/gemma-3-4b-it, which leaves out most; and Qwen2-VL, whose numbers were at the top once."""
    short = {"model_type": "gemma3", "text_config": {"hidden_size": 48, "num_hidden_layers": 1}}
    usual = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "intermediate_size": 9216}
    text = {**short["text_config"], **usual, "vocab_size": 262_208, "model_type": "gemma3_text"}  # type: ignore[dict-item]
    assert BaseModel("x", short).fingerprint == BaseModel("x", {**short, "text_config": text}).fingerprint
    numbers = {name: value for name, value in BASE_CONFIG.items() if name != "model_type"}
    flat, nested = {"model_type": "qwen2_vl", **numbers}, {"model_type": "qwen2_vl", "text_config": numbers}
    assert BaseModel("x", flat).fingerprint == BaseModel("x", nested).fingerprint


def test_an_unknown_architecture_has_a_fingerprint_of_its_config() -> None:
    one, other = ({"model_type": "mamba", "hidden_size": size} for size in (64, 128))
    assert BaseModel("x", one).fingerprint == BaseModel("y", {**one, "_name_or_path": "z"}).fingerprint
    assert BaseModel("x", one).fingerprint != BaseModel("x", other).fingerprint


def test_the_public_name_is_never_a_path(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_base_model(str(base_folder)).public_name == "base"
    monkeypatch.chdir(base_folder)
    assert read_base_model(".").public_name == "base"
    assert BaseModel("Qwen/Qwen2-0.5B-Instruct", {}).public_name == "Qwen/Qwen2-0.5B-Instruct"


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(BadBaseModel, match=r"config\.json"):
        read_base_model(str(tmp_path))


def test_a_path_that_is_not_there_is_not_taken_for_a_hub_id() -> None:
    with pytest.raises(BadBaseModel, match="no such folder"):
        read_base_model("./models/nowhere")


def test_a_hub_id_is_read_from_the_cache(monkeypatch: pytest.MonkeyPatch, base_folder: Path) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: str(base_folder / file))
    assert read_base_model("org/model").config == json.loads((base_folder / "config.json").read_text())
