"""Which tensor of a base an adapter's module is, by names and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from train.merge_adapter import MergeAdapter, Piece
from train.merge_base import MergeBase, Stored
from train.merge_plan import make_plan
from vllm_lora_ext.errors import BadInput
from vllm_lora_ext.spec import TensorSpec
from vllm_lora_ext.tensor_file import ITEM_BYTES, TensorPlace

Shapes = Mapping[str, tuple[int, ...]]


def stored(name: str, shape: tuple[int, ...], dtype: str = "BF16") -> Stored:
    size = ITEM_BYTES[dtype]
    for number in shape:
        size *= number
    return Stored(cast(Any, None), TensorPlace(TensorSpec(name, dtype, shape), 0, size))


def base_of(shards: Mapping[str, Shapes], dtype: str = "BF16", **config: Any) -> MergeBase:
    files = {
        file: {name: stored(name, shape, dtype) for name, shape in tensors.items()}
        for file, tensors in shards.items()
    }
    return MergeBase("base", Path("base"), config, files, None)


def adapter_of(*pieces: Piece, is_tied: bool = False) -> MergeAdapter:
    return MergeAdapter(Path("adapter"), cast(Any, None), pieces, {}, "digest", is_tied)


def low_rank(module: str, rows: int, width: int, kind: str = "low_rank") -> Piece:
    a, b = ((2, rows), (width, 2)) if kind == "embedding" else ((2, width), (rows, 2))
    return Piece(f"{module}.weight", kind, (stored("a", a), stored("b", b)))


@pytest.mark.parametrize(
    ("trained", "kept"),
    [
        ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
        ("model.language_model.layers.0.self_attn.q_proj", "language_model.model.layers.0.self_attn.q_proj"),
        ("model.language_model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
        ("transformer.h.0.mlp.c_fc", "h.0.mlp.c_fc"),
        ("model.layers.0.mlp.experts.3.up_proj", "model.layers.0.mlp.experts.3.up_proj"),
    ],
)
def test_names_of_earlier_versions_are_found(trained: str, kept: str) -> None:
    others = {"vision_tower.layers.0.self_attn.q_proj.weight": (8, 8)}
    base = base_of({"model.safetensors": {f"{kept}.weight": (8, 4), **others}})
    plan = make_plan(base, [adapter_of(low_rank(trained, 8, 4))])
    changed = [target.spec.name for targets in plan.shards.values() for target in targets if target.pieces]
    assert changed == [f"{kept}.weight"]


@pytest.mark.parametrize(
    ("shapes", "dtype", "said"),
    [
        ({"model.layers.1.q_proj.weight": (8, 4)}, "BF16", "does not hold"),
        ({"model.layers.0.q_proj.weight": (4, 8)}, "BF16", r"of shape \(8, 4\), base has \(4, 8\)"),
        ({"model.layers.0.q_proj.weight": (8, 4)}, "F8_E4M3", "as F8_E4M3, whose steps are larger"),
        (
            dict.fromkeys(("layers.0.q_proj.weight", "transformer.layers.0.q_proj.weight"), (8, 4)),
            "BF16",
            "does not hold",
        ),
    ],
)
def test_what_does_not_fit_or_is_not_clear_is_refused(shapes: Shapes, dtype: str, said: str) -> None:
    base = base_of({"model.safetensors": shapes}, dtype)
    with pytest.raises(BadInput, match=said):
        make_plan(base, [adapter_of(low_rank("model.layers.0.q_proj", 8, 4))])


EMBEDDING = {"model.embed_tokens.weight": (16, 4)}


@pytest.mark.parametrize(("module", "kind"), [("model.embed_tokens", "embedding"), ("lm_head", "low_rank")])
@pytest.mark.parametrize("has_copy", [False, True])
def test_a_tied_head_is_written_beside_the_embedding_once_they_differ(
    module: str, kind: str, has_copy: bool
) -> None:
    shards: dict[str, Shapes] = {"1": EMBEDDING, "2": {"x": (3,)}}
    if has_copy:
        shards["2"] = {**shards["2"], "lm_head.weight": (16, 4)}
    base = base_of(shards, tie_word_embeddings=True)
    plan = make_plan(base, [adapter_of(low_rank(module, 16, 4, kind))])
    assert plan.is_untied
    names = {file: [target.spec.name for target in targets] for file, targets in plan.shards.items()}
    assert names == {"1": ["model.embed_tokens.weight", "lm_head.weight"], "2": ["x"]}
    (changed,) = [target.spec.name for target in plan.shards["1"] if target.pieces]
    assert changed == f"{module}.weight"
    assert plan.size_bytes == 2 * 16 * 4 * 2 + 3 * 2


def test_what_was_trained_as_one_stays_one() -> None:
    base = base_of({"1": EMBEDDING}, tie_word_embeddings=True)
    both = (low_rank("model.embed_tokens", 16, 4, "embedding"), low_rank("lm_head", 16, 4))
    plan = make_plan(base, [adapter_of(*both, is_tied=True)])
    assert not plan.is_untied
    assert [(target.spec.name, len(target.pieces)) for target in plan.shards["1"]] == [
        ("model.embed_tokens.weight", 1)
    ]


@pytest.mark.parametrize(
    ("config", "has_head", "is_tied"),
    [
        ({}, False, True),
        ({}, True, False),
        ({"tie_word_embeddings": False}, True, False),
        ({"text_config": {"tie_word_embeddings": True}}, False, True),
    ],
)
def test_whether_a_head_is_tied_is_in_the_config_or_in_the_files(
    config: dict[str, Any], has_head: bool, is_tied: bool
) -> None:
    head = {"lm_head.weight": (16, 4)} if has_head else {}
    plan = make_plan(
        base_of({"1": {**EMBEDDING, **head}}, **config), [adapter_of(low_rank("lm_head", 16, 4))]
    )
    assert plan.is_untied == is_tied


def test_the_head_of_an_inner_decoder_stands_beside_it() -> None:
    base = base_of({"1": {"language_model.model.embed_tokens.weight": (16, 4)}})
    plan = make_plan(base, [adapter_of(low_rank("lm_head", 16, 4))])
    assert plan.new_head == "language_model.lm_head.weight"
