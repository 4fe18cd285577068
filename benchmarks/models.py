"""Base models and adapters with random weights: as large as real ones, made here, the same on every machine.

A folder is written beside its final place and renamed, and carries its recipe:
one that was made by the same recipe is used again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vllm_lora_ext.base_model import read_base_model

RECIPE_FILE = "recipe.json"
RECIPE_VERSION = 1
STD = 0.02
BYTES_PER_WEIGHT = 2  # bfloat16
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """A Qwen2 base with tied embeddings."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    max_position: int = 4096


SHAPES = {
    "qwen2-0.5b": Shape(24, 896, 4864, 14, 2, 151_936),
    "tiny": Shape(2, 128, 256, 4, 2, 512),  # heads of 32: the smallest that vLLM serves on the CPU
    "many-words": Shape(2, 128, 256, 4, 2, 4096),  # as tiny, with words for two thousand markers
}


def make_random_base(folder: Path, shape: str) -> Path:
    """Write a bfloat16 Qwen2 base of one of `SHAPES`, without tokenizer; gives back `folder`."""
    recipe = {"version": RECIPE_VERSION, "shape": asdict(SHAPES[shape])}
    return _make_once(folder, recipe, lambda place: _write_base(place, SHAPES[shape]))


def make_random_adapter(
    folder: Path, base: Path, rank: int, seed: int, modules: Sequence[str] = MODULES
) -> Path:
    """Write a bfloat16 PEFT folder for `modules` of every layer of `base`; gives back `folder`."""
    recipe = {
        "version": RECIPE_VERSION,
        "base": read_base_model(str(base)).fingerprint,
        "rank": rank,
        "seed": seed,
        "modules": list(modules),
    }
    return _make_once(folder, recipe, lambda place: _write_adapter(place, base, rank, seed, modules))


def rank_of_size(base: Path, size_bytes: int, max_rank: int) -> int:
    """The rank, at most `max_rank`, whose bfloat16 adapter on all modules is nearest to `size_bytes`."""
    weights = sum(sum(shape) for shape in _shapes_of(base, MODULES).values())
    return max(1, min(max_rank, round(size_bytes / (BYTES_PER_WEIGHT * weights))))


def add_tokenizer(base: Path) -> None:
    """Give `base` a tokenizer without which vLLM's HTTP server does not stream: a text for every id.

    It reads bytes, and is of Qwen2's kind, since transformers reads that of every Qwen2 as such.
    """
    if (base / "tokenizer.json").exists():
        return
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    size = json.loads((base / "config.json").read_text())["vocab_size"]
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*signs, *(f"w{number}" for number in range(len(signs), size))]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(base)


def _make_once(folder: Path, recipe: dict[str, object], write: Callable[[Path], None]) -> Path:
    mark = folder / RECIPE_FILE
    if mark.is_file() and json.loads(mark.read_text()) == recipe:
        return folder
    place = folder.with_name(f".{folder.name}.{os.getpid()}")
    place.mkdir(parents=True)
    try:
        write(place)
        (place / RECIPE_FILE).write_text(json.dumps(recipe))
        if mark.is_file():  # ours, of another recipe
            shutil.rmtree(folder)
        place.rename(folder)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return folder


def _write_base(place: Path, shape: Shape) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.max_position,
        tie_word_embeddings=True,
        initializer_range=STD,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(place)


def _write_adapter(place: Path, base: Path, rank: int, seed: int, modules: Sequence[str]) -> None:
    import torch
    from safetensors.torch import save_file

    chance = torch.Generator().manual_seed(seed)

    def weight(*size: int) -> torch.Tensor:
        return (torch.randn(size, generator=chance) * STD).to(torch.bfloat16)

    tensors = {}
    for name, (out_features, in_features) in _shapes_of(base, modules).items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = weight(rank, in_features)
        tensors[f"base_model.model.{name}.lora_B.weight"] = weight(out_features, rank)
    save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(modules),
    }
    (place / "adapter_config.json").write_text(json.dumps(config, indent=2))


def _shapes_of(base: Path, modules: Sequence[str]) -> dict[str, tuple[int, int]]:
    """The chosen modules of every layer as name -> (out_features, in_features)."""
    shapes = read_base_model(str(base)).module_shapes() or {}
    return {name: shape for name, shape in shapes.items() if name.rpartition(".")[2] in modules}
