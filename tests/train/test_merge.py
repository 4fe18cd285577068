"""Merged models against PEFT's own base + adapter: every kind of LoRA, tied and untied."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from train.merge import merge
from train.merge_adapter import open_adapter
from vllm_lora_ext.base_model import read_base_model
from vllm_lora_ext.errors import BadInput

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": 0,
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 8}, "alpha_pattern": {"k_proj": 32}},
    "dora": {"use_dora": True},
    "dora with rslora": {"use_dora": True, "use_rslora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "embedding saved": {"modules_to_save": ["embed_tokens"]},
    "head saved": {"modules_to_save": ["lm_head"]},
    "norms saved": {"modules_to_save": ["input_layernorm", "norm"]},
    "biases of all": {"bias": "all"},
    "biases of LoRA": {"bias": "lora_only"},
    "bias of B": {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
    "tokens": {"trainable_token_indices": [1, 5, 299]},
    "tokens of both": {"trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [1, 5]}},
    "tied": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
}


def make_base(folder: Path, kind: str, shard: str = "5GB", dtype: torch.dtype = torch.float32) -> str:
    """A random model of this kind, whose biases are not zero."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

    torch.manual_seed(0)
    if kind == "gpt2":
        config: Any = GPT2Config(
            vocab_size=300, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
        )
    elif kind == "llama":
        config = LlamaConfig(**SIZES, tie_word_embeddings=False)
    else:
        config = Qwen2Config(**SIZES, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return str(folder)


def make_adapter(folder: Path, base: str, seed: int = 1, **settings: Any) -> Path:
    """A real PEFT adapter of `base` whose every trained number was moved away from where it began."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    body = {"r": 4, "lora_alpha": 8, "target_modules": ALL, "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**body)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(str(folder))
    return folder


def logits(base: str | Path, adapter: Path | None = None) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    with torch.inference_mode():
        result: torch.Tensor = model.eval()(torch.arange(40)[None]).logits
    return result


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_base(tmp_path_factory.mktemp(request.param) / "base", request.param, shard="100KB")


# A Llama has no biases that a LoRA could train: that is refused, below.
CASES = [
    (model, kind) for model in ("qwen2", "llama") for kind in KINDS if (model, kind) != ("llama", "bias of B")
]


@pytest.mark.parametrize(("base", "kind"), CASES, indirect=["base"])
def test_every_kind_of_lora_computes_what_peft_computes(base: str, kind: str, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, **KINDS[kind])
    expected = logits(base, adapter)
    merge(adapter, base, tmp_path / "merged")
    torch.testing.assert_close(logits(tmp_path / "merged"), expected, atol=2e-4, rtol=1e-4)
    assert not torch.allclose(expected, logits(base), atol=1e-2)
    names = {path.name for path in Path(base).glob("model*")}
    assert {path.name for path in (tmp_path / "merged").glob("model*")} == names and len(names) > 3


@pytest.mark.parametrize("kind", ["embedding", "head", "embedding and head", "embedding saved", "head saved"])
def test_a_tied_head_becomes_a_tensor_of_its_own_when_only_one_of_both_changed(
    kind: str, tmp_path: Path
) -> None:
    from safetensors import safe_open

    base = make_base(tmp_path / "base", "qwen2", shard="100KB")
    merge(make_adapter(tmp_path / "adapter", base, **KINDS[kind]), base, tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    shard = index["weight_map"]["lm_head.weight"]
    assert shard == index["weight_map"]["model.embed_tokens.weight"]
    sizes = 0
    for name in set(index["weight_map"].values()):
        with safe_open(tmp_path / "merged" / name, "pt") as file:
            assert set(file.keys()) == {key for key, at in index["weight_map"].items() if at == name}
            sizes += sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    assert index["metadata"]["total_size"] == sizes


@pytest.mark.parametrize("kind", ["plain", "tied", "tokens", "tokens of both"])
def test_a_tie_that_still_holds_is_kept(kind: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen2")
    merge(make_adapter(tmp_path / "adapter", base, **KINDS[kind]), base, tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_conv1d_of_gpt2_lies_the_other_way_round(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "gpt2")
    targets = ["c_attn", "c_proj", "c_fc"]
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=targets, fan_in_fan_out=True)
    expected = logits(base, adapter)
    merge(adapter, base, tmp_path / "merged")
    torch.testing.assert_close(logits(tmp_path / "merged"), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_number_is_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    """Bit-equal to the rounded sum in float64, but for the few sums where the last bit of float32 decides."""
    from safetensors.torch import load_file

    base = make_base(tmp_path / "base", "llama", dtype=dtype)
    adapter = make_adapter(tmp_path / "adapter", base)
    merge(adapter, base, tmp_path / "merged")
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (base, tmp_path / "merged"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    equal = count = 0
    for name, weight in after.items():
        assert weight.dtype == dtype
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" not in tensors:
            assert torch.equal(weight, before[name])
            continue
        b, a = (tensors[f"{stem}.lora_{side}.weight"].double() for side in "BA")
        exact = (before[name].double() + 2.0 * b @ a).to(dtype)
        equal, count = equal + int((weight == exact).sum()), count + weight.numel()
    assert count > 50_000 and equal / count > 0.9995


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_foreign_pissa_is_refused_for_its_base_was_changed(init: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(tmp_path / "adapter", base, init_lora_weights=init)
    with pytest.raises(BadInput, match="init_unsupported"):
        merge(adapter, base, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def _ia3(folder: Path, base: str) -> Path:
    from peft import IA3Config, get_peft_model
    from transformers import AutoModelForCausalLM

    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(str(folder))
    return folder


def _loha(folder: Path, base: str) -> Path:
    from peft import LoHaConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoHaConfig(r=4, target_modules=["q_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_ia3, "PEFT type 'IA3', and merge takes LORA"),
        (_loha, "PEFT type 'LOHA', and merge takes LORA"),
        (
            lambda folder, base: make_adapter(folder, base, alora_invocation_tokens=[1, 2]),
            "alora_invocation_tokens, and merge takes LORA",
        ),
        (
            lambda folder, base: make_adapter(folder, base, target_modules=["q_proj"], lora_bias=True),
            "q_proj.bias, which .* does not hold",
        ),
        (
            lambda folder, base: make_adapter(folder, base, target_modules=["embed_tokens"], use_dora=True),
            "is a DoRA of model.embed_tokens",
        ),
    ],
)
def test_what_cannot_be_merged_is_named(make: Callable[[Path, str], Path], said: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    with pytest.raises(BadInput, match=said):
        merge(make(tmp_path / "adapter", base), base, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_a_copy_of_the_embedding_that_is_not_the_base_s_is_noticed(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = make_base(tmp_path / "base", "qwen2")
    adapter = make_adapter(tmp_path / "adapter", base, **KINDS["embedding"])
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    assert name in tensors, "PEFT no longer puts it there"
    save_file({**tensors, name: tensors[name] + 0.1}, weights, metadata={"format": "pt"})
    with pytest.raises(BadInput, match="is not the tensor of"):
        merge(adapter, base, tmp_path / "merged")


def test_what_is_read_of_an_adapter_is_only_what_is_used(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    with open_adapter(adapter, read_base_model(base)) as opened:
        assert {piece.tensor for piece in opened.pieces} == {
            f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)
        }


OTHERS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "phi3": {"pad_token_id": 0},
}


@pytest.mark.parametrize("model_type", OTHERS)
def test_other_architectures_merge_as_well(model_type: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    base = tmp_path / "base"
    config = AutoConfig.for_model(model_type, **SIZES, **OTHERS[model_type])
    AutoModelForCausalLM.from_config(config).save_pretrained(base, max_shard_size="100KB")
    targets = ["embed_tokens", "q_proj", "o_proj", "qkv_proj"]
    adapter = make_adapter(tmp_path / "adapter", str(base), target_modules=targets)
    expected = logits(base, adapter)
    merge(adapter, str(base), tmp_path / "merged")
    torch.testing.assert_close(logits(tmp_path / "merged"), expected, atol=2e-4, rtol=1e-4)


def test_the_decoder_inside_a_vision_language_model_is_found_under_the_names_of_its_files(
    tmp_path: Path,
) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**small, image_size=28, patch_size=14)
    config = LlavaConfig(text_config=LlamaConfig(**SIZES), vision_config=vision, image_token_index=299)
    base, kind = tmp_path / "base", LlavaForConditionalGeneration
    kind(config).save_pretrained(base)
    settings = LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|down_proj|embed_tokens)")
    model = get_peft_model(kind.from_pretrained(base), settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(str(tmp_path / "adapter"))
    merge(tmp_path / "adapter", str(base), tmp_path / "merged")
    ids = torch.arange(1, 40)[None]
    with torch.inference_mode():
        adapted = PeftModel.from_pretrained(kind.from_pretrained(base), str(tmp_path / "adapter"))
        expected = adapted.eval()(input_ids=ids).logits
        found = kind.from_pretrained(tmp_path / "merged").eval()(input_ids=ids).logits
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
