"""What an adapter is made of, module by module: shapes, norms, effective rank, scaling, share. numpy only.

A module adds `scaling * B @ A` to its base's weight. That product is as large as the weight itself and is
never made: with A^T = Q_a R_a and B = Q_b R_b its singular values are those of the small `R_b @ R_a^T`.
One module at a time is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_lora_ext.admission import is_base_weight
from vllm_lora_ext.files import RegularFile
from vllm_lora_ext.peft_format import TENSOR_NAME
from vllm_lora_ext.spec import AdapterSpec, TensorSpec
from vllm_lora_ext.tensor_file import TensorPlace
from vllm_lora_ext.values import floats_of

_LARGEST_RANK = 1024  # vLLM serves up to 512
_LARGEST_BYTES = 1 << 30  # of one matrix
_PIECE_ROWS = 4096
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class ModuleAnatomy:
    """One LoRA module. What is None cannot be told, and `note` says why.

    `a_shape` is (rank, in_features), `b_shape` (out_features, rank). Norms are Frobenius norms, only
    `spectral_norm` is the largest singular value; `delta_norm`, `spectral_norm` and `effective_rank` are
    those of the update, scaling * B @ A. `share` is that of all numbers in the file.
    """

    module: str
    a_shape: tuple[int, ...] | None
    b_shape: tuple[int, ...] | None
    dtype: str
    parameters: int
    share: float
    scaling: float | None
    a_norm: float | None = None
    b_norm: float | None = None
    delta_norm: float | None = None
    spectral_norm: float | None = None
    effective_rank: float | None = None
    is_dead: bool = False  # the update is exactly zero
    note: str = ""

    @property
    def kind(self) -> str:
        """The last part of its name, such as `q_proj`."""
        return self.module.rpartition(".")[2]


@dataclass(frozen=True)
class OtherTensor:
    """A tensor that is no LoRA matrix; `what` says what it is."""

    name: str
    what: str
    dtype: str
    shape: tuple[int, ...]
    parameters: int
    share: float


@dataclass(frozen=True)
class Anatomy:
    """All tensors of a file: modules in the order of their layers, then what is no LoRA."""

    modules: tuple[ModuleAnatomy, ...] = ()
    others: tuple[OtherTensor, ...] = ()


def dissect(file: RegularFile, places: Sequence[TensorPlace], spec: AdapterSpec | None) -> Anatomy:
    """Look into every tensor of an open file.

    Args:
        spec: what its config says; None if that cannot be read, and then there is no scaling.

    Raises:
        ValueError: the file became shorter.
        ReadFailed: the disk failed.
    """
    pairs: dict[str, dict[str, TensorPlace]] = {}
    rest: list[TensorSpec] = []
    for place in places:
        match = TENSOR_NAME.fullmatch(place.spec.name)
        side = match and (match["side"] or match["embedding"])
        if match and side and side not in pairs.get(match["module"], {}):
            pairs.setdefault(match["module"], {})[side] = place
        else:
            rest.append(place.spec)
    total = sum(_count(place.spec) for place in places) or 1
    modules = (_dissect_module(file, name, pairs[name], spec, total) for name in sorted(pairs, key=_by_layer))
    heads = frozenset(spec.heads) if spec else frozenset[str]()
    others = (
        OtherTensor(t.name, _what(t.name, heads), t.dtype, t.shape, _count(t), _count(t) / total)
        for t in sorted(rest, key=lambda tensor: _by_layer(tensor.name))
    )
    return Anatomy(tuple(modules), tuple(others))


def effective_rank(singular_values: np.ndarray) -> float:
    """How many directions matter: exp of the entropy of the normalised singular values; 0 for none.

    Between 1 and the rank. O. Roy and M. Vetterli, "The effective rank: a measure of effective
    dimensionality", EUSIPCO 2007.
    """
    total = singular_values.sum()
    if not total > 0:
        return 0.0
    parts = singular_values / total
    parts = parts[parts > 0]
    return float(np.exp(-(parts * np.log(parts)).sum()))


def _by_layer(name: str) -> list[tuple[bool, int, str]]:
    """Layer 2 comes before layer 10."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in name.split(".")]


def _count(tensor: TensorSpec) -> int:
    return math.prod(tensor.shape)


def _dissect_module(
    file: RegularFile, name: str, sides: Mapping[str, TensorPlace], spec: AdapterSpec | None, total: int
) -> ModuleAnatomy:
    tensors = {side: place.spec for side, place in sides.items()}
    parameters = sum(map(_count, tensors.values()))
    stated: dict[str, Any] = {
        "module": name,
        "a_shape": tensors["A"].shape if "A" in tensors else None,
        "b_shape": tensors["B"].shape if "B" in tensors else None,
        "dtype": "/".join(sorted({tensor.dtype for tensor in tensors.values()})),
        "parameters": parameters,
        "share": parameters / total,
        "scaling": spec.scaling_of(name) if spec else None,
    }
    note = next(_unreadable(tensors.values()), "")
    if note:
        return ModuleAnatomy(**stated, note=note)
    factors = {side: _factor(file, place, side) for side, place in sides.items()}
    norms = {side: float(np.linalg.norm(factor)) for side, factor in factors.items()}
    if not math.isfinite(math.prod(norms.values()) * (stated["scaling"] or 1.0)):
        return ModuleAnatomy(**stated, note="holds NaN, infinity or numbers near it")
    stated |= {"a_norm": norms.get("A"), "b_norm": norms.get("B")}
    note = _no_update(name, tensors, spec)
    if note:
        return ModuleAnatomy(**stated, note=note)
    return ModuleAnatomy(**stated, **_update(factors["A"], factors["B"], stated["scaling"]))


def _unreadable(tensors: Iterable[TensorSpec]) -> Iterator[str]:
    """Why the numbers of a module are not looked at."""
    for tensor in tensors:
        side = tensor.name.removesuffix(".weight").rpartition(".")[2]
        if tensor.dtype not in _FLOATS:
            yield f"{side} is {tensor.dtype}, which is not read"
        elif len(tensor.shape) < 2 or not _count(tensor):
            yield f"{side} is no matrix"
        elif _rank_of(tensor) > _LARGEST_RANK or 8 * _count(tensor) > _LARGEST_BYTES:
            yield f"{side} is too large to look into"


def _no_update(name: str, tensors: Mapping[str, TensorSpec], spec: AdapterSpec | None) -> str:
    """Why A and B do not make one update."""
    if missing := {"A", "B"} - set(tensors):
        return f"has no {missing.pop()}"
    a_rank, b_rank = tensors["A"].shape[0], tensors["B"].shape[1]
    if a_rank != b_rank or math.prod(tensors["B"].shape[2:]) != 1:
        return f"A has {a_rank} rows, B {b_rank} columns"
    if spec is None:
        return "its config cannot be read, so the scaling is unknown"
    if spec.target_parameters and ".experts" in name:
        return "the experts' matrices lie in one"
    if spec.rank_of(name) != a_rank:
        return f"A has {a_rank} rows, the config says {spec.rank_of(name)}"
    return ""


def _rank_of(tensor: TensorSpec) -> int:
    """The rank that one side has room for: rows of an A, columns of a B."""
    is_a = tensor.name.removesuffix(".weight").endswith("A")
    return tensor.shape[0 if is_a else 1]


def _factor(file: RegularFile, place: TensorPlace, side: str) -> np.ndarray:
    """R of the QR decomposition of A^T or B, (at most rank, rank) in float64, taken piece by piece.

    A convolution's kernel counts as further inputs. NaN where the matrix is not finite.
    """
    stored = np.empty(place.size, np.uint8)
    file.fill(stored.data, place.offset)
    rank = _rank_of(place.spec)
    values = floats_of(stored, place.spec.dtype)
    tall = values.reshape(rank, -1).T if side == "A" else values.reshape(-1, rank)
    factor: np.ndarray = np.empty((0, rank))
    for first in range(0, len(tall), _PIECE_ROWS):
        piece = tall[first : first + _PIECE_ROWS].astype(np.float64)
        if not np.isfinite(piece).all():
            return np.full((1, rank), np.nan)
        factor = np.linalg.qr(np.concatenate([factor, piece])).R
    return factor


def _update(a: np.ndarray, b: np.ndarray, scaling: float) -> dict[str, Any]:
    """Norms and effective rank of scaling * B @ A from the factors of both."""
    # A zero column of a matrix is one of its factor, exactly; the rest of a product that is zero is rounding.
    if not (a.any(axis=0) & b.any(axis=0)).any() or not scaling:
        return {"delta_norm": 0.0, "spectral_norm": 0.0, "effective_rank": 0.0, "is_dead": True}
    singular = np.linalg.svd(scaling * (b @ a.T), compute_uv=False)
    return {
        "delta_norm": float(np.linalg.norm(singular)),
        "spectral_norm": float(singular[0]),
        "effective_rank": effective_rank(singular),
    }


def _what(name: str, heads: frozenset[str]) -> str:
    if "lora_magnitude_vector" in name:
        return "DoRA magnitude"
    if is_base_weight(name):
        return "copy of the base's weights"
    if name.endswith(".bias"):
        return "bias"
    if not heads.isdisjoint(name.split(".")):
        return "module saved whole"
    if "trainable_tokens" in name:
        return "new tokens"
    return "no LoRA matrix"
