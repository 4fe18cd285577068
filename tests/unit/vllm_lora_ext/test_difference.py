"""Norms, cosine and overlaps of two adapters are those of dense float64 arithmetic; odd pairs are told."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from vllm_lora_ext.difference import (
    Weights,
    WeightsDifference,
    compare_tensors,
    compare_weights,
    space_overlap,
)
from vllm_lora_ext.files import RegularFile
from vllm_lora_ext.peft_format import WEIGHTS_FILE, read_adapter

Tensors = Mapping[str, np.ndarray]
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
OUT, IN = 24, 40


def factors(module: str = Q, rank: int = 4, seed: int = 0, rows: int = OUT, columns: int = IN) -> Tensors:
    chance = np.random.default_rng(seed)
    return {
        f"base_model.model.{module}.lora_A.weight": chance.normal(size=(rank, columns)).astype(np.float32),
        f"base_model.model.{module}.lora_B.weight": chance.normal(size=(rows, rank)).astype(np.float32),
    }


@contextmanager
def weights(folder: Path, tensors: Tensors, **config: Any) -> Iterator[Weights]:
    folder.mkdir()
    body = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj"], **config}
    folder.joinpath("adapter_config.json").write_text(json.dumps(body))
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, folder / WEIGHTS_FILE)
    reading = read_adapter(folder)
    assert reading.spec is not None
    with RegularFile(folder / WEIGHTS_FILE) as file:
        yield Weights(file, reading.places, reading.spec)


def compare(
    place: Path, first: Tensors, second: Tensors, ours: Any = None, theirs: Any = None
) -> WeightsDifference:
    with (
        weights(place / "first", first, **(ours or {})) as one,
        weights(place / "second", second, **(theirs or {})) as other,
    ):
        return compare_weights(one, other)


def update(tensors: Tensors, scaling: float) -> np.ndarray:
    a, b = (value.astype(np.float64) for value in tensors.values())
    return scaling * b.reshape(len(b), -1) @ a.reshape(len(a), -1)


def dense_overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Mean squared cosine of the principal angles of two column spaces, from projectors onto them."""
    ranks = [np.linalg.matrix_rank(one) for one in (first, second)]
    projectors = [one @ np.linalg.pinv(one) for one in (first, second)]
    return float(np.trace(projectors[0] @ projectors[1])) / min(ranks)


@pytest.mark.parametrize(
    ("rank", "config", "scaling"),
    [
        (4, {}, 2.0),
        (7, {"r": 7, "lora_alpha": 7}, 1.0),
        (2, {"r": 16, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 6}}, 3.0),
        (9, {"r": 9, "lora_alpha": 6, "use_rslora": True}, 2.0),
    ],
)
def test_the_numbers_are_those_of_dense_updates(
    tmp_path: Path, rank: int, config: dict[str, Any], scaling: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_lora_ext.difference._PIECE_ROWS", 7)
    first, second = factors(), factors(rank=rank, seed=1)
    found = compare(tmp_path, first, second, None, config)
    (module,) = found.modules
    one, other = update(first, 2.0), update(second, scaling)
    assert (module.module, module.kind, module.state) == (Q, "q_proj", "differs")
    assert (module.ranks, module.note) == ((4, rank), "")
    assert module.scalings == pytest.approx((2.0, scaling))
    norms = np.linalg.norm(one), np.linalg.norm(other)
    assert module.norms == pytest.approx(norms)
    assert module.difference_norm == pytest.approx(np.linalg.norm(one - other))
    assert module.relative == pytest.approx(np.linalg.norm(one - other) / max(norms))
    assert module.cosine == pytest.approx((one * other).sum() / math.prod(norms))
    assert module.inputs and module.outputs
    assert module.inputs.value == pytest.approx(dense_overlap(one.T, other.T))
    assert module.outputs.value == pytest.approx(dense_overlap(one, other))
    assert (module.inputs.chance, module.outputs.chance) == (max(4, rank) / IN, max(4, rank) / OUT)
    assert found.difference_norm == pytest.approx(module.difference_norm)
    assert found.norms == pytest.approx(norms) and found.cosine == pytest.approx(module.cosine)


def test_a_tiny_difference_is_not_lost_in_the_norms(tmp_path: Path) -> None:
    """Of norms that are subtracted, one in ten million would be nothing but rounding."""
    first = {name: value.astype(np.float64) for name, value in factors().items()}
    second = {name: value.copy() for name, value in first.items()}
    second[f"base_model.model.{Q}.lora_B.weight"][3, 2] += 1e-9
    (module,) = compare(tmp_path, first, second).modules
    exact = 2.0 * 1e-9 * np.linalg.norm(first[f"base_model.model.{Q}.lora_A.weight"][2])
    assert module.difference_norm == pytest.approx(exact, rel=1e-4)
    assert module.state == "differs" and module.cosine == pytest.approx(1)


def test_equal_numbers_are_the_same_and_a_scaling_may_be_written_in_many_ways(tmp_path: Path) -> None:
    theirs = {"lora_alpha": 4, "use_rslora": True}
    found = compare(tmp_path, factors(), factors(), None, theirs)
    (module,) = found.modules
    assert (module.state, module.difference_norm, module.relative) == ("same", 0, 0)
    assert module.cosine == pytest.approx(1) and module.inputs and module.inputs.value == pytest.approx(1)
    assert not found.differs and found.difference_norm == 0


def test_one_scaling_more_is_a_difference_in_size_only(tmp_path: Path) -> None:
    (module,) = compare(tmp_path, factors(), factors(), None, {"lora_alpha": 12}).modules
    assert module.state == "differs" and module.relative == pytest.approx(1 / 3)
    assert module.cosine == pytest.approx(1) and module.outputs and module.outputs.value == pytest.approx(1)


def test_other_factors_of_one_update_differ_by_rounding(tmp_path: Path) -> None:
    """B M and M^-1 A are another pair for the same product."""
    first = {name: value.astype(np.float64) for name, value in factors().items()}
    a, b = first.values()
    mix = np.random.default_rng(3).normal(size=(4, 4)) + 4 * np.eye(4)
    second = dict(zip(first, (np.linalg.solve(mix, a), b @ mix), strict=True))
    (module,) = compare(tmp_path, first, second).modules
    assert module.state == "differs" and module.relative is not None and module.relative < 1e-14
    assert module.inputs and module.inputs.value == pytest.approx(1)


def test_a_space_inside_a_larger_one_overlaps_wholly(tmp_path: Path) -> None:
    first, second = factors(rank=2), factors(rank=6, seed=1)
    a, b = (value.copy() for value in second.values())
    a[:2] = next(iter(first.values()))
    second = dict(zip(second, (a, b), strict=True))
    (module,) = compare(tmp_path, first, second, {"r": 2}, {"r": 6}).modules
    assert module.inputs and module.inputs.value == pytest.approx(1)
    assert module.outputs and module.outputs.value < 0.9


def test_disjoint_directions_do_not_overlap(tmp_path: Path) -> None:
    first, second = factors(), factors(seed=1)
    next(iter(first.values()))[:, 20:] = 0
    next(iter(second.values()))[:, :20] = 0
    (module,) = compare(tmp_path, first, second).modules
    assert module.cosine == pytest.approx(0, abs=1e-12)
    assert module.inputs and module.inputs.value == pytest.approx(0, abs=1e-12)


def test_directions_that_are_rounding_do_not_count(tmp_path: Path) -> None:
    """Of rank 4 on paper, of rank 1 in fact: the other three directions are float32's last digits."""
    first, second = factors(seed=1), factors()
    (a, b), shared = first.values(), next(iter(second.values()))[0]
    a[0], b[:, 1:] = shared, b[:, 1:] * 1e-8
    (module,) = compare(tmp_path, first, second).modules
    assert module.inputs and module.inputs.value == pytest.approx(1)
    assert space_overlap(np.eye(5)[:, :1], np.eye(5)[:, 1:3], 5) == type(module.inputs)(0.0, 0.4)
    assert space_overlap(np.eye(5)[:, :0], np.eye(5), 5) is None


def test_a_dead_module_has_no_directions(tmp_path: Path) -> None:
    second = factors(seed=1)
    list(second.values())[1][:] = 0
    (module,) = compare(tmp_path, factors(), second).modules
    norm = np.linalg.norm(update(factors(), 2.0))
    assert module.norms == pytest.approx((norm, 0)) and module.difference_norm == pytest.approx(norm)
    assert (module.cosine, module.inputs, module.outputs, module.relative) == (None, None, None, 1)


def test_two_dead_modules_with_other_numbers(tmp_path: Path) -> None:
    first, second = factors(), factors(seed=1)
    for tensors in (first, second):
        list(tensors.values())[1][:] = 0
    (module,) = compare(tmp_path, first, second).modules
    assert (module.state, module.difference_norm, module.relative) == ("differs", 0, 0)


def test_modules_of_one_side_count_whole_and_layers_are_in_order(tmp_path: Path) -> None:
    late, early = "model.layers.10.self_attn.q_proj", "model.layers.2.self_attn.q_proj"
    first, second = {**factors(late), **factors(Q)}, {**factors(early, seed=2), **factors(Q)}
    found = compare(tmp_path, first, second)
    states = [(module.module, module.state) for module in found.modules]
    assert states == [(Q, "same"), (early, "only in the second"), (late, "only in the first")]
    only = found.modules[1]
    assert (only.ranks, only.scalings) == ((None, 4), (None, 2.0))
    norms = [np.linalg.norm(update(factors(seed=seed), 2.0)) for seed in (0, 2)]
    assert only.difference_norm == pytest.approx(norms[1]) and only.relative == 1 and only.cosine is None
    assert found.norms == pytest.approx((math.sqrt(2) * norms[0], math.hypot(*norms)))
    assert found.difference_norm == pytest.approx(math.hypot(*norms))
    assert found.cosine == pytest.approx(norms[0] ** 2 / math.prod(found.norms))
    assert (found.compared, found.unknown, found.differs) == (3, 0, True)


@pytest.mark.parametrize(
    ("second", "note"),
    [
        (factors(rows=32), "24 x 40 against 32 x 40: not of one base"),
        (factors(rank=6), "the second: A has 6 rows, the config says 4"),
        (dict(list(factors().items())[:1]), "the second: has no B"),
        (
            {name: value * np.float32(np.nan) for name, value in factors().items()},
            "the second: holds NaN, infinity or numbers near it",
        ),
    ],
)
def test_what_cannot_be_compared_has_a_note(tmp_path: Path, second: Tensors, note: str) -> None:
    found = compare(tmp_path, {**factors(), **factors(K)}, {**second, **factors(K)})
    good, odd = found.modules
    assert good.state == "same"
    assert (odd.state, odd.note, odd.difference_norm, odd.cosine) == ("differs", note, None, None)
    assert (found.compared, found.unknown) == (1, 1)


def test_what_cannot_be_looked_into_may_still_be_the_same(tmp_path: Path) -> None:
    experts = {"target_parameters": ["experts.down_proj"]}
    tensors = factors("model.layers.0.mlp.experts", rank=8)
    found = compare(tmp_path, tensors, tensors, experts, experts)
    assert (found.modules[0].state, found.unknown) == ("same", 0)
    assert found.modules[0].note == "both: the experts' matrices lie in one"
    other = {name: value + np.float32(1) for name, value in tensors.items()}
    tmp_path.joinpath("again").mkdir()
    found = compare(tmp_path / "again", tensors, other, experts, experts)
    assert (found.modules[0].state, found.unknown) == ("differs", 1)


def test_other_dtypes_and_dora_are_told(tmp_path: Path) -> None:
    first = factors()
    second = {name: value.astype(np.float64) for name, value in first.items()}
    second[f"base_model.model.{Q}.lora_magnitude_vector"] = np.ones(OUT, np.float32)
    found = compare(tmp_path, first, second, None, {"use_dora": True})
    (module,) = found.modules
    assert module.state == "same"
    assert module.note == "DoRA's magnitude is not in these numbers; stored as F32 and F64"
    (other,) = found.others
    assert (other.what, other.state) == ("DoRA magnitude", "only in the second") and found.differs


def test_other_tensors_are_listed_where_they_are_not_the_same(tmp_path: Path) -> None:
    heads = {"modules_to_save": ["score"]}
    one, wide = np.ones((2, 3), np.float32), np.ones((2, 4), np.float32)
    stem = "base_model.model"
    first = {**factors(), f"{stem}.score.weight": one, f"{stem}.a.bias": one, f"{stem}.b.bias": one}
    second = {**factors(), f"{stem}.score.weight": one * 2, f"{stem}.a.bias": wide, f"{stem}.b.bias": one}
    found = compare(tmp_path, first, {**second, f"{stem}.c.bias": one}, heads, heads)
    assert [(other.name.removeprefix(f"{stem}."), other.what, other.state) for other in found.others] == [
        ("a.bias", "bias", "differs"),
        ("c.bias", "bias", "only in the second"),
        ("score.weight", "module saved whole", "differs"),
    ]
    assert found.others[0].note == "2 x 3 F32 against 2 x 4 F32"


def test_embeddings_and_convolutions_are_compared_as_matrices(tmp_path: Path) -> None:
    def odd(seed: int) -> Tensors:
        chance = np.random.default_rng(seed)
        return {
            "base_model.model.model.layers.0.conv.lora_A.weight": chance.normal(size=(4, 3, 2, 2)),
            "base_model.model.model.layers.0.conv.lora_B.weight": chance.normal(size=(5, 4, 1, 1)),
            "base_model.model.model.embed_tokens.lora_embedding_A": chance.normal(size=(4, 50)),
            "base_model.model.model.embed_tokens.lora_embedding_B": chance.normal(size=(8, 4)),
        }

    first, second = odd(0), odd(1)
    for module, place in zip(
        compare(tmp_path, first, second).modules, (slice(2, 4), slice(0, 2)), strict=True
    ):
        one, other = (update(dict(list(side.items())[place]), 2.0) for side in (first, second))
        assert module.difference_norm == pytest.approx(np.linalg.norm(one - other))
        assert module.inputs and module.inputs.value == pytest.approx(dense_overlap(one.T, other.T))


def test_tensors_of_no_lora_are_compared_byte_by_byte(tmp_path: Path) -> None:
    tensors = {name: np.arange(6, dtype=np.float32) for name in ("a", "b")}
    with weights(tmp_path / "one", tensors) as one, weights(tmp_path / "two", tensors) as two:
        found = compare_tensors((one.file, one.places), (two.file, two.places))
        assert not found.differs and found.cosine is None
    tensors["b"][5] = 7
    with weights(tmp_path / "three", tensors) as three, weights(tmp_path / "four", {}) as four:
        with RegularFile(tmp_path / "one" / WEIGHTS_FILE) as file:
            found = compare_tensors((file, one.places), (three.file, three.places))
        assert [(item.name, item.what, item.state) for item in found.others] == [("b", "tensor", "differs")]
        found = compare_tensors((three.file, three.places), (four.file, four.places))
    assert [item.state for item in found.others] == ["only in the first"] * 2
