"""Every architecture that admission claims to know is the one that transformers builds from that config."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import BASE_CONFIG
from vllm_lora_ext.architectures import DECODERS, INNER_DECODERS, WRAPPERS
from vllm_lora_ext.base_model import BaseModel, read_base_model
from vllm_lora_ext.errors import BadBaseModel

Shapes = dict[str, tuple[int, int]]

# Four heads of 16 are not the hidden size, and the keys' width is neither.
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 72,
}
HEAD_DIM, TOKENS = {"head_dim": 16}, {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# transformers cannot build these from a config without head_dim; whoever has one states it.
NEEDS_HEAD_DIM = ("ministral", "hunyuan_v1_dense", "nemotron")
SMALL_TOWER = {"num_hidden_layers": 1, "depth": 1}
ENCODINGS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
}


def real_linears(config: Mapping[str, Any], is_wrapper: bool = False) -> Shapes:
    """The linear modules of the model that transformers builds; on meta, so no weight is made."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    body = copy.deepcopy({name: value for name, value in config.items() if name != "model_type"})
    built = AutoConfig.for_model(config["model_type"], **body, **({} if is_wrapper else TOKENS))
    maker = AutoModelForImageTextToText if is_wrapper else AutoModelForCausalLM
    with torch.device("meta"):
        model = maker.from_config(built)
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def compare(base: BaseModel, real: Shapes) -> None:
    """All that is real is judged as it is or called unjudged, and nothing that we judge is made up."""
    ours = base.module_shapes()
    assert ours is not None
    for name, shape in real.items():
        assert ours.get(name, shape) == shape, name
        assert (name in ours) != base.is_unjudged(name), name
    stem = next(name for name in real if name in ours).partition(".layers.")[0]
    assert {name for name in ours if name.startswith(f"{stem}.layers.")} <= set(real)


def text_config(name: str) -> dict[str, Any]:
    """A small config of a decoder as it stands inside another."""
    is_derived = name in INNER_DECODERS and INNER_DECODERS[name].is_head_dim_derived
    return {"model_type": name, **SIZES, **({} if is_derived else HEAD_DIM), **TOKENS}


def wrapped(name: str, decoder: str, **text: Any) -> dict[str, Any]:
    inner = {**text_config(decoder), **text}
    return {"model_type": name, "text_config": inner, "vision_config": dict(SMALL_TOWER)}


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_is_as_transformers_builds_it(name: str) -> None:
    config = {"model_type": name, **SIZES, **HEAD_DIM}
    real, base = real_linears(config), BaseModel("x", config)
    compare(base, real)
    if DECODERS[name].experts is None:
        assert base.module_shapes() == {name: shape for name, shape in real.items() if ".layers." in name}


@pytest.mark.parametrize("name", [name for name in DECODERS if name not in NEEDS_HEAD_DIM])
def test_numbers_that_a_config_leaves_out_are_those_of_transformers(name: str) -> None:
    config = {"model_type": name, **SIZES}
    del config["num_key_value_heads"]
    compare(BaseModel("x", config), real_linears(config))


@pytest.mark.parametrize("name", {**DECODERS, **INNER_DECODERS})
def test_defaults_are_those_of_transformers(name: str) -> None:
    from transformers import CONFIG_MAPPING

    decoder, real = {**DECODERS, **INNER_DECODERS}[name], CONFIG_MAPPING[name]
    assert (decoder.hidden, decoder.mlp) == (real.hidden_size, real.intermediate_size)
    assert (decoder.layers, decoder.heads) == (real.num_hidden_layers, real.num_attention_heads)
    assert decoder.kv_heads == real.num_key_value_heads
    assert decoder.head_dim == getattr(real, "head_dim", None)
    assert decoder.vocab in (None, real.vocab_size)
    if decoder.has_dense_layers:
        assert (real.num_experts, real.decoder_sparse_step) == (decoder.experts, 1)
        assert not real.mlp_only_layers


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize(
    "change", [{"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}, {"num_experts": 0}, {"num_experts": 4}]
)
def test_a_mixture_with_ordinary_layers(name: str, change: dict[str, Any]) -> None:
    config = {"model_type": name, **SIZES, **HEAD_DIM, **change}
    real, base = real_linears(config), BaseModel("x", config)
    compare(base, real)
    ordinary = {name for name in real if name.endswith("mlp.down_proj")}
    assert ordinary == {name for name in base.module_shapes() or {} if name.endswith("mlp.down_proj")}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_vision_language_model_is_as_transformers_builds_it(name: str) -> None:
    config = wrapped(name, WRAPPERS[name].decoder)
    real, base = real_linears(config, is_wrapper=True), BaseModel("x", config)
    compare(base, real)
    ours = base.module_shapes() or {}
    stems = {module.partition(".layers.")[0] for module in ours}
    assert stems == set(WRAPPERS[name].stems)
    assert len({len([m for m in ours if m.startswith(f"{stem}.layers.")]) for stem in stems}) == 1


@pytest.mark.parametrize("decoder", ["qwen2", "gemma2", "phi3", "qwen3_moe", "mixtral"])
def test_some_wrappers_take_any_decoder(decoder: str) -> None:
    config = wrapped("llava", decoder)
    compare(BaseModel("x", config), real_linears(config, is_wrapper=True))


@pytest.mark.parametrize("name", [name for name, wrapper in WRAPPERS.items() if wrapper.may_be_flat])
def test_an_older_config_has_the_sizes_at_the_top(name: str) -> None:
    config = {"model_type": name, **SIZES, **TOKENS, "vision_config": dict(SMALL_TOWER)}
    compare(BaseModel("x", config), real_linears(config, is_wrapper=True))
    assert BaseModel("x", {"model_type": name}).module_shapes() is None


def test_a_decoder_inside_may_leave_out_what_is_usual() -> None:
    """As google/gemma-3-4b-it and llava-hf/llava-1.5-7b-hf do."""
    gemma = BaseModel(
        "x", {"model_type": "gemma3", "text_config": {"hidden_size": 48, "num_hidden_layers": 1}}
    )
    shapes = gemma.module_shapes() or {}
    assert shapes["language_model.model.layers.0.self_attn.q_proj"] == (8 * 256, 48)
    assert shapes["model.language_model.layers.0.mlp.up_proj"] == (9216, 48)
    llava = BaseModel("x", {"model_type": "llava", "text_config": {"model_type": "llama"}}).module_shapes()
    assert llava and llava["model.language_model.layers.31.mlp.down_proj"] == (4096, 11008)


@pytest.mark.parametrize("encoding", ENCODINGS.values(), ids=list(ENCODINGS))
@pytest.mark.parametrize(
    "config", [BASE_CONFIG, wrapped("qwen2_5_vl", "qwen2_5_vl_text")], ids=["text", "vision"]
)
def test_quantisation_changes_nothing(config: dict[str, Any], encoding: dict[str, Any]) -> None:
    quantised = BaseModel("x", {**config, "quantization_config": encoding})
    assert quantised.module_shapes() == BaseModel("x", config).module_shapes()
    assert quantised.fingerprint == BaseModel("x", config).fingerprint
    larger = wrapped("qwen2_5_vl", "qwen2_5_vl_text", hidden_size=96)
    assert quantised.fingerprint != BaseModel("x", larger).fingerprint


def test_names_lead_to_the_decoder_of_a_vision_language_model_as_vllm_maps_them() -> None:
    """`model.layers` is a name where vLLM maps it, else it would be served without effect."""
    for name in ("qwen2_vl", "qwen2_5_vl", "mistral3"):
        shapes = BaseModel("x", wrapped(name, WRAPPERS[name].decoder)).module_shapes() or {}
        assert "model.layers.0.self_attn.q_proj" in shapes
    for name in ("gemma3", "llava", "qwen3_vl"):
        base = BaseModel("x", wrapped(name, WRAPPERS[name].decoder))
        assert "model.layers.0.self_attn.q_proj" not in (base.module_shapes() or {})
        assert not base.is_unjudged("model.layers.0.self_attn.q_proj")


def test_what_is_not_judged() -> None:
    mixture = BaseModel("x", {"model_type": "qwen3_moe", **SIZES, "mlp_only_layers": [0]})
    for module in ("mlp.experts.3.gate_proj", "mlp.experts", "mlp.gate", "block_sparse_moe.experts.0.w1"):
        assert mixture.is_unjudged(f"model.layers.1.{module}")
        assert not mixture.is_unjudged(f"model.layers.0.{module}")  # an ordinary layer has none
        assert not mixture.is_unjudged(f"model.layers.3.{module}")  # there are three layers
    assert not mixture.is_unjudged("model.layers.1.mlpx.gate")
    assert not mixture.is_unjudged("model.layers.1.self_attn.q_proj")  # judged
    vision = BaseModel("x", wrapped("qwen2_5_vl", "qwen2_5_vl_text"))
    for module in ("visual.blocks.0.attn.qkv", "model.visual.merger.mlp.0", "lm_head"):
        assert vision.is_unjudged(module)
    assert not vision.is_unjudged("model.language_model.layers.0.mlp.experts")
    assert not vision.is_unjudged("transformer.h.0.attn.c_attn")
    assert not BaseModel("x", {"model_type": "mamba"}).is_unjudged("lm_head")
    plain = BaseModel("x", BASE_CONFIG)
    assert plain.is_unjudged("lm_head") and plain.is_unjudged("model.embed_tokens")
    assert not plain.is_unjudged("lm_head.0") and not plain.is_unjudged("model.layers.0.mlp.experts")


def test_the_vocabulary_has_its_shape() -> None:
    shape = (512, 64)
    assert BaseModel("x", BASE_CONFIG).vocabulary_shapes() == {"model.embed_tokens": shape, "lm_head": shape}
    assert BaseModel("x", {**BASE_CONFIG, "vocab_size": None}).vocabulary_shapes() == {}
    assert BaseModel("x", {"model_type": "mamba", "vocab_size": 512}).vocabulary_shapes() == {}
    wrapper = BaseModel("x", wrapped("gemma3", "gemma3_text")).vocabulary_shapes()
    assert wrapper["model.language_model.embed_tokens"] == (72, 48)
    assert wrapper["lm_head"] == wrapper["language_model.lm_head"] == (72, 48)


def damaged() -> Iterator[dict[str, Any]]:
    for key in SIZES:
        if key != "vocab_size":
            for value in ("64", 64.0, True, [], {}, 0, -1, 10**9, 10**400):
                yield {key: value}
    yield from ({"head_dim": 0}, {"head_dim": "16"}, {"model_type": ["qwen2"]})
    yield from (
        {"hidden_size": None},
        {"num_hidden_layers": None},
        {"per_layer_config": {"0": {"head_dim": 8}}},
    )


@pytest.mark.parametrize("change", list(damaged()), ids=lambda change: str(change)[:40])
def test_a_damaged_number_gives_nothing(change: dict[str, Any]) -> None:
    assert BaseModel("x", {"model_type": "qwen2", **SIZES, **change}).module_shapes() is None
    inner = wrapped("gemma3", "gemma3_text", **{k: v for k, v in change.items() if k != "model_type"})
    assert "model_type" in change or BaseModel("x", inner).module_shapes() is None


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gemma3"},
        {"model_type": "gemma3", "text_config": [1]},
        {"model_type": "llava", "text_config": {"model_type": ["llama"]}},
        {"model_type": "llava", "text_config": {"model_type": "mamba"}},
        {"model_type": "qwen3_moe", **SIZES, "mlp_only_layers": "0"},
        {"model_type": "qwen3_moe", **SIZES, "decoder_sparse_step": 0},
        {"model_type": "mixtral", "intermediate_size": None},
        {"model_type": "qwen2_vl", **SIZES, "head_dim": 16},
        {"model_type": "qwen2_vl_text", **SIZES},
    ],
)
def test_a_damaged_structure_gives_nothing(config: dict[str, Any]) -> None:
    assert BaseModel("x", config).module_shapes() is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
KEYS = (*SIZES, "head_dim", "num_experts", "mlp_only_layers", "decoder_sparse_step", "text_config")
TYPES = ("qwen2", "qwen3_moe", "mixtral", "phi3", "gemma3", "qwen2_vl", "llava")


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(TYPES), st.dictionaries(st.sampled_from(KEYS), JSON))
def test_no_config_raises(name: str, change: dict[str, Any]) -> None:
    base = BaseModel("x", {"model_type": name, **SIZES, **change})
    assert base.module_shapes() is None or base.module_shapes()
    assert base.is_unjudged("lm_head") == (base.module_shapes() is not None)
    assert base.vocabulary_shapes() is not None
    assert base.fingerprint


def test_a_config_that_is_no_file_or_endless_does_not_hang(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    os.mkfifo(path)
    with pytest.raises(BadBaseModel):
        read_base_model(str(tmp_path))
    path.unlink()
    with path.open("wb") as file:
        file.truncate((16 << 20) + 1)
    with pytest.raises(BadBaseModel, match="at most"):
        read_base_model(str(tmp_path))


def test_offline_asks_the_cache_and_nobody_else(monkeypatch: pytest.MonkeyPatch, base_folder: Path) -> None:
    import huggingface_hub

    asked: list[dict[str, Any]] = []

    def download(name: str, file: str, **named: Any) -> str:
        asked.append(named)
        return str(base_folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert read_base_model("org/model", offline=True).config == BASE_CONFIG
    assert asked == [{"local_files_only": True}]
    assert read_base_model(str(base_folder), offline=True).config == BASE_CONFIG
    assert len(asked) == 1


def test_offline_without_a_cached_model_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BadBaseModel, match="local cache"):
        read_base_model("nobody/nothing-at-all", offline=True)
