"""Norms and ranks from small factors are those of the dense update; odd tensors are told, not read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from vllm_lora_ext.anatomy import Anatomy, ModuleAnatomy, dissect, effective_rank
from vllm_lora_ext.files import RegularFile
from vllm_lora_ext.peft_format import WEIGHTS_FILE, read_adapter
from vllm_lora_ext.tensor_file import canonical_header, read_header
from vllm_lora_ext.values import floats_of

PREFIX = "base_model.model.model.layers"
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"


def factors(
    module: str = Q, rank: int = 4, out_features: int = 24, in_features: int = 40, seed: int = 0
) -> dict[str, np.ndarray]:
    chance = np.random.default_rng(seed)
    stem = f"base_model.model.{module}"
    return {
        f"{stem}.lora_A.weight": chance.normal(size=(rank, in_features)).astype(np.float32),
        f"{stem}.lora_B.weight": chance.normal(size=(out_features, rank)).astype(np.float32),
    }


def look_inside(folder: Path, tensors: dict[str, np.ndarray], **config: Any) -> Anatomy:
    body = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj"], **config}
    folder.joinpath("adapter_config.json").write_text(json.dumps(body))
    save_file(tensors, folder / WEIGHTS_FILE)
    reading = read_adapter(folder)
    with RegularFile(folder / WEIGHTS_FILE) as file:
        return dissect(file, reading.places or read_header(file), reading.spec)


def assert_is_dense(found: ModuleAnatomy, a: np.ndarray, b: np.ndarray, scaling: float) -> None:
    a, b = a.astype(np.float64), b.astype(np.float64)
    singular = np.linalg.svd(scaling * b @ a, compute_uv=False)
    parts = singular / singular.sum()
    parts = parts[parts > 1e-12]
    assert found.scaling == pytest.approx(scaling)
    assert (found.a_norm, found.b_norm) == pytest.approx((np.linalg.norm(a), np.linalg.norm(b)))
    assert found.delta_norm == pytest.approx(np.linalg.norm(scaling * b @ a))
    assert found.spectral_norm == pytest.approx(singular[0])
    assert found.effective_rank == pytest.approx(math.exp(-(parts * np.log(parts)).sum()))
    assert (found.is_dead, found.note) == (False, "")


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4.0),
        ({"r": 32, "rank_pattern": {"q_proj": 4}}, 2.0),
        ({"alpha_pattern": {Q: 6}}, 1.5),
        ({"r": 9, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 6}, "use_rslora": True}, 3.0),
    ],
)
def test_the_numbers_are_those_of_the_dense_update(
    tmp_path: Path, config: dict[str, Any], scaling: float
) -> None:
    tensors = factors()
    (found,) = look_inside(tmp_path, tensors, **config).modules
    assert (found.module, found.kind, found.dtype) == (Q, "q_proj", "F32")
    assert (found.a_shape, found.b_shape, found.parameters, found.share) == ((4, 40), (24, 4), 256, 1.0)
    assert_is_dense(found, *tensors.values(), scaling)


def test_a_matrix_is_taken_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_lora_ext.anatomy._PIECE_ROWS", 7)
    tensors = factors()
    (found,) = look_inside(tmp_path, tensors).modules
    assert_is_dense(found, *tensors.values(), 2.0)


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_every_float_is_read(tmp_path: Path, dtype: Any) -> None:
    tensors = {name: tensor.astype(dtype) for name, tensor in factors().items()}
    (found,) = look_inside(tmp_path, tensors).modules
    assert_is_dense(found, *tensors.values(), 2.0)


def test_bfloat16_is_the_upper_half_of_a_float32(tmp_path: Path) -> None:
    whole = {name: tensor.view(np.uint32) & 0xFFFF0000 for name, tensor in factors().items()}
    look_inside(tmp_path, factors())  # the config, and a spec for each tensor
    spec = read_adapter(tmp_path).spec
    assert spec is not None
    specs = {tensor.name: tensor.__class__(tensor.name, "BF16", tensor.shape) for tensor in spec.tensors}
    header, order = canonical_header(specs)
    halves = b"".join((whole[name] >> 16).astype(np.uint16).tobytes() for name in order)
    (tmp_path / WEIGHTS_FILE).write_bytes(header + halves)
    reading = read_adapter(tmp_path)
    with RegularFile(tmp_path / WEIGHTS_FILE) as file:
        (found,) = dissect(file, reading.places, reading.spec).modules
    assert found.dtype == "BF16"
    assert_is_dense(found, *(bits.view(np.float32) for bits in whole.values()), 2.0)


def test_stored_numbers_become_floats_in_their_shape() -> None:
    one_and_two = np.array([[0x3F80, 0x4000]], np.uint16)
    assert floats_of(one_and_two, "BF16").tolist() == [[1.0, 2.0]]
    assert floats_of(np.array([1.5]).view(np.uint8), "F64").tolist() == [1.5]
    with pytest.raises(KeyError):
        floats_of(one_and_two, "I16")


@pytest.mark.parametrize("side", ["A", "B", "disjoint"])
def test_a_module_that_adds_nothing_is_dead(tmp_path: Path, side: str) -> None:
    tensors = factors()
    a, b = tensors.values()
    if side == "disjoint":  # every row of A meets a column of B that is zero, or is zero itself
        a[:2], b[:, 2:] = 0, 0
    else:
        tensors[f"{PREFIX}.0.self_attn.q_proj.lora_{side}.weight"][:] = 0
    (found,) = look_inside(tmp_path, tensors).modules
    assert (found.is_dead, found.delta_norm, found.spectral_norm, found.effective_rank) == (True, 0, 0, 0)


def test_without_alpha_all_is_dead(tmp_path: Path) -> None:
    (found,) = look_inside(tmp_path, factors(), lora_alpha=0).modules
    assert found.is_dead and found.a_norm


def test_one_direction_has_effective_rank_1(tmp_path: Path) -> None:
    tensors = factors()
    a = next(iter(tensors.values()))
    a[1:] = a[0]
    (found,) = look_inside(tmp_path, tensors).modules
    assert found.effective_rank == pytest.approx(1.0)
    assert found.spectral_norm == pytest.approx(found.delta_norm)
    assert effective_rank(np.ones(5)) == pytest.approx(5)
    assert effective_rank(np.zeros(5)) == 0


def test_convolutions_and_embeddings_are_matrices_too(tmp_path: Path) -> None:
    chance = np.random.default_rng(1)
    a, b = chance.normal(size=(4, 3, 2, 2)), chance.normal(size=(5, 4, 1, 1))
    wide, tall = chance.normal(size=(4, 50)), chance.normal(size=(8, 4))
    tensors = {
        f"{PREFIX}.0.conv.lora_A.weight": a,
        f"{PREFIX}.0.conv.lora_B.weight": b,
        "base_model.model.model.embed_tokens.lora_embedding_A": wide,
        "base_model.model.model.embed_tokens.lora_embedding_B": tall,
    }
    embedding, convolution = look_inside(tmp_path, tensors).modules
    assert_is_dense(convolution, a.reshape(4, 12), b.reshape(5, 4), 2.0)
    assert_is_dense(embedding, wide, tall, 2.0)


def test_layers_are_in_their_order_and_shares_add_up(tmp_path: Path) -> None:
    tensors = {}
    for layer in (10, 2, 0):
        tensors |= factors(f"model.layers.{layer}.self_attn.q_proj")
    found = look_inside(tmp_path, {**tensors, "base_model.model.score.weight": np.ones((2, 3), np.float32)})
    assert [module.module.split(".")[2] for module in found.modules] == ["0", "2", "10"]
    assert sum(item.share for item in (*found.modules, *found.others)) == pytest.approx(1)


def test_what_is_no_lora_is_listed_as_what_it_is(tmp_path: Path) -> None:
    one = np.ones(24, np.float32)
    stem = f"base_model.model.{Q}"
    others = {
        f"{stem}.lora_magnitude_vector": "DoRA magnitude",
        f"{stem}.lora_B.bias": "bias",
        "base_model.model.score.weight": "module saved whole",
        "base_model.model.lm_head.base_layer.weight": "copy of the base's weights",
        "base_model.model.model.embed_tokens.trainable_tokens_delta": "new tokens",
        f"{stem}.lora_A.default.weight": "no LoRA matrix",
    }
    tensors = {**factors(), **dict.fromkeys(others, one)}
    found = look_inside(tmp_path, tensors, modules_to_save=["score"], use_dora=True)
    assert {item.name: item.what for item in found.others} == others
    assert len(found.modules) == 1


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"lora_B.weight": None}, "has no B"),
        ({"lora_A.weight": None}, "has no A"),
        ({"lora_A.weight": np.ones((3, 40), np.float32)}, "A has 3 rows, B 4 columns"),
        ({"lora_A.weight": np.ones((4, 40), np.int8)}, "lora_A is I8, which is not read"),
        ({"lora_A.weight": np.ones(4, np.float32)}, "lora_A is no matrix"),
        ({"lora_A.weight": np.ones((4, 0), np.float32)}, "lora_A is no matrix"),
        ({"lora_A.weight": np.full((4, 40), np.nan, np.float32)}, "holds NaN, infinity or numbers near it"),
        ({"lora_A.weight": np.full((4, 40), 1e308)}, "holds NaN, infinity or numbers near it"),
        ({"lora_A.weight": np.ones((2048, 2), np.float32)}, "lora_A is too large to look into"),
    ],
)
def test_what_cannot_be_told_has_a_note_and_no_numbers(
    tmp_path: Path, changes: dict[str, Any], note: str
) -> None:
    tensors = factors() | factors(K)
    stem = f"base_model.model.{Q}"
    tensors |= {f"{stem}.{name}": tensor for name, tensor in changes.items()}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    good, odd = look_inside(tmp_path, kept).modules
    assert (odd.note, odd.delta_norm, odd.effective_rank, odd.is_dead) == (note, None, None, False)
    assert good.delta_norm and not good.note


def test_a_rank_that_the_config_does_not_say(tmp_path: Path) -> None:
    (found,) = look_inside(tmp_path, factors(), r=8).modules
    assert found.note == "A has 4 rows, the config says 8"


def test_matrices_of_experts_in_one_are_not_one_update(tmp_path: Path) -> None:
    tensors = factors("model.layers.0.mlp.experts", rank=8)
    (found,) = look_inside(tmp_path, tensors, target_parameters=["experts.down_proj"]).modules
    assert found.note == "the experts' matrices lie in one"


def test_without_a_config_the_matrices_are_still_read(tmp_path: Path) -> None:
    (found,) = look_inside(tmp_path, factors(), r="four").modules
    assert found.scaling is None and found.a_norm and found.delta_norm is None
    assert "config" in found.note
