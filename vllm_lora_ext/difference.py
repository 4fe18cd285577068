"""What sets the weights of two adapters apart, module by module: norms, angle, overlap. numpy only.

Neither update, scaling * B @ A, is ever made. With the factors of both adapters side by side,
[B1 B2] = Q_b [R_b1 R_b2] and [A1^T A2^T] = Q_a [R_a1 R_a2], both updates are small matrices in the same
coordinates, R_b1 @ R_a1^T and R_b2 @ R_a2^T: norms and angles are those of the small ones. No norm is
subtracted from another, so of two updates that are nearly equal the difference is right, too. One module at
a time is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_lora_ext.anatomy import ModuleAnatomy, dissect
from vllm_lora_ext.files import CHUNK_BYTES, RegularFile
from vllm_lora_ext.peft_format import PREFIX, TENSOR_NAME
from vllm_lora_ext.spec import AdapterSpec, TensorSpec
from vllm_lora_ext.tensor_file import TensorPlace
from vllm_lora_ext.values import floats_of

SAME, DIFFERS, ONLY_FIRST, ONLY_SECOND = "same", "differs", "only in the first", "only in the second"
ROUNDING = 1e-6  # of the largest singular value: smaller directions are the rounding of stored factors
_PIECE_ROWS = 4096


@dataclass(frozen=True)
class Weights:
    """An adapter's open file, where its tensors are, and what its config says."""

    file: RegularFile
    places: tuple[TensorPlace, ...]
    spec: AdapterSpec


@dataclass(frozen=True)
class Overlap:
    """Two spaces of directions: `value` is the mean squared cosine of the principal angles between them.

    1 where the smaller lies in the larger, 0 where they are orthogonal. `chance` is what two random spaces
    of these sizes have on average: the larger one's number of directions, divided by that of all.
    """

    value: float
    chance: float


@dataclass(frozen=True)
class ModuleDifference:
    """One LoRA module of two adapters. What is None cannot be told, and `note` says why.

    All norms are Frobenius norms of the updates, scaling * B @ A. `relative` is `difference_norm` divided by
    the larger of the two norms, `cosine` that of the two updates as vectors. `inputs` are the directions that
    an update reads (its row space), `outputs` those that it writes (its column space); an update that is zero
    has none. `state` is "same" where the numbers and the scaling are equal.
    """

    module: str
    state: str
    ranks: tuple[int | None, int | None]
    scalings: tuple[float | None, float | None]
    norms: tuple[float | None, float | None]
    difference_norm: float | None = None
    relative: float | None = None
    cosine: float | None = None
    inputs: Overlap | None = None
    outputs: Overlap | None = None
    note: str = ""

    @property
    def kind(self) -> str:
        """The last part of its name, such as `q_proj`."""
        return self.module.rpartition(".")[2]


@dataclass(frozen=True)
class OtherDifference:
    """A tensor that is no LoRA matrix and is not the same in both; `what` says what it is."""

    name: str
    what: str
    state: str
    note: str = ""


@dataclass(frozen=True)
class WeightsDifference:
    """All of two files: modules in the order of their layers, then other tensors that are not the same.

    The norms are those of all updates that can be compared, as one vector; a module that only one adapter
    has counts as zero in the other. `compared` says how many modules that are, `unknown` how many are left.
    """

    modules: tuple[ModuleDifference, ...]
    others: tuple[OtherDifference, ...]
    compared: int
    unknown: int
    norms: tuple[float, float]
    difference_norm: float
    cosine: float | None

    @property
    def differs(self) -> bool:
        """Whether any number is another."""
        return any(module.state != SAME for module in self.modules) or bool(self.others)


def compare_weights(first: Weights, second: Weights) -> WeightsDifference:
    """Compare every tensor of two open files.

    Raises:
        ValueError: a file became shorter.
        ReadFailed: the disk failed.
    """
    sides = _Side(first), _Side(second)
    names = sorted({*sides[0].modules, *sides[1].modules}, key=_by_layer)
    modules = tuple(_compare_module(name, *sides) for name in names)
    return _sum_up(modules, tuple(_compare_others(*sides)))


def compare_tensors(
    first: tuple[RegularFile, Sequence[TensorPlace]], second: tuple[RegularFile, Sequence[TensorPlace]]
) -> WeightsDifference:
    """Of adapters that are no LoRA: which tensors are not the same, byte for byte. Raises as above."""
    sides = [(file, {place.spec.name: place for place in places}) for file, places in (first, second)]
    return _sum_up((), tuple(_unlike(*sides[0], *sides[1], {})))


def space_overlap(first: np.ndarray, second: np.ndarray, dimensions: int) -> Overlap | None:
    """Of the spaces that the orthonormal columns of two matrices span; None if one has no column.

    `dimensions` is that of the space in which both lie.
    """
    sizes = first.shape[1], second.shape[1]
    if not min(sizes):
        return None
    squares = float(np.square(first.T @ second).sum())
    return Overlap(min(squares / min(sizes), 1.0), max(sizes) / dimensions)


class _Side:
    """One adapter: its tensors by name, and what `dissect` says of each module."""

    def __init__(self, weights: Weights) -> None:
        anatomy = dissect(weights.file, weights.places, weights.spec)
        self.file = weights.file
        self.modules = {module.module: module for module in anatomy.modules}
        self.others = {other.name: other for other in anatomy.others}
        self.places = {place.spec.name: place for place in weights.places}
        self.pairs: dict[str, dict[str, TensorPlace]] = {}
        for place in weights.places:
            if place.spec.name not in self.others and (match := TENSOR_NAME.fullmatch(place.spec.name)):
                self.pairs.setdefault(match["module"], {})[match["side"] or match["embedding"]] = place

    def matrix(self, module: str, side: str) -> np.ndarray:
        """A^T or B as stored, (features, rank); a convolution's kernel counts as further inputs."""
        place = self.pairs[module][side]
        stored = np.empty(place.size, np.uint8)
        self.file.fill(stored.data, place.offset)
        values = floats_of(stored, place.spec.dtype)
        shape = place.spec.shape
        return values.reshape(shape[0], -1).T if side == "A" else values.reshape(-1, shape[1])


def _by_layer(name: str) -> list[tuple[bool, int, str]]:
    """Layer 2 comes before layer 10."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in name.split(".")]


def _compare_module(name: str, first: _Side, second: _Side) -> ModuleDifference:
    ours, theirs = first.modules.get(name), second.modules.get(name)
    stated: dict[str, Any] = {
        "module": name,
        "ranks": (_rank(ours), _rank(theirs)),
        "scalings": (ours and ours.scaling, theirs and theirs.scaling),
        "norms": (ours and ours.delta_norm, theirs and theirs.delta_norm),
    }
    if ours is None or theirs is None:
        only = ours or theirs
        assert only is not None
        norm, state = only.delta_norm, ONLY_SECOND if ours is None else ONLY_FIRST
        relative = None if norm is None else float(norm > 0)
        return ModuleDifference(
            state=state, difference_norm=norm, relative=relative, note=only.note, **stated
        )
    if note := _incomparable(ours, theirs):
        alike = ours.scaling == theirs.scaling and _stored_alike(name, first, second)
        return ModuleDifference(state=SAME if alike else DIFFERS, note=note, **stated)
    a, b = ([side.matrix(name, matrix) for side in (first, second)] for matrix in "AB")
    same = ours.scaling == theirs.scaling and all(map(np.array_equal, *zip(a, b, strict=True)))
    numbers = _of_updates(a, b, ours, theirs)
    if same:
        numbers |= {"difference_norm": 0.0, "relative": 0.0}
    note = _aside(name, first, second)
    return ModuleDifference(state=SAME if same else DIFFERS, note=note, **stated, **numbers)


def _rank(module: ModuleAnatomy | None) -> int | None:
    return module.a_shape[0] if module and module.a_shape else None


def _incomparable(ours: ModuleAnatomy, theirs: ModuleAnatomy) -> str:
    """Why two updates cannot be set against each other."""
    notes = [module.note for module in (ours, theirs)]
    if any(notes):
        which = "both" if all(notes) else "the first" if notes[0] else "the second"
        return f"{which}: {notes[0] or notes[1]}"
    shapes = [_update_shape(module) for module in (ours, theirs)]
    if shapes[0] != shapes[1]:
        return f"{shapes[0][0]} x {shapes[0][1]} against {shapes[1][0]} x {shapes[1][1]}: not of one base"
    return ""


def _update_shape(module: ModuleAnatomy) -> tuple[int, int]:
    """(out_features, in_features) of a module without a note, which has both matrices."""
    a, b = module.a_shape or (0,), module.b_shape or (0,)
    return b[0], math.prod(a[1:])


def _aside(name: str, first: _Side, second: _Side) -> str:
    """What the numbers of two updates leave out."""
    notes = []
    if any(f"{PREFIX}{name}.lora_magnitude_vector" in side.others for side in (first, second)):
        notes.append("DoRA's magnitude is not in these numbers")
    dtypes = [side.modules[name].dtype for side in (first, second)]
    if dtypes[0] != dtypes[1]:
        notes.append(f"stored as {dtypes[0]} and {dtypes[1]}")
    return "; ".join(notes)


def _of_updates(
    a: Sequence[np.ndarray], b: Sequence[np.ndarray], ours: ModuleAnatomy, theirs: ModuleAnatomy
) -> dict[str, Any]:
    """Norm of the difference, cosine and overlaps of two updates; `a` holds both A^T, `b` both B."""
    of_a, of_b = _common_factors(*a), _common_factors(*b)
    updates = [
        np.zeros((len(of_b[0]), len(of_a[0]))) if module.is_dead else (module.scaling or 0.0) * (out @ into.T)
        for module, into, out in zip((ours, theirs), of_a, of_b, strict=True)
    ]
    norm = float(np.linalg.norm(updates[0] - updates[1]))
    norms = [float(np.linalg.norm(update)) for update in updates]
    product = math.prod(norms)
    cosine = float((updates[0] * updates[1]).sum()) / product if product else None
    (outputs, inputs), (their_outputs, their_inputs) = map(_spaces, updates)
    return {
        "difference_norm": norm,
        "relative": norm / max(norms) if any(norms) else 0.0,
        "cosine": None if cosine is None else max(-1.0, min(1.0, cosine)),
        "inputs": space_overlap(inputs, their_inputs, len(a[0])),
        "outputs": space_overlap(outputs, their_outputs, len(b[0])),
    }


def _common_factors(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """R of the QR decomposition of two tall matrices side by side, cut into the parts of each; in float64.

    Taken piece by piece. Both parts are the matrices themselves in one orthonormal basis of at most
    rank + rank directions.
    """
    cut = first.shape[1]
    factor: np.ndarray = np.empty((0, cut + second.shape[1]))
    for start in range(0, len(first), _PIECE_ROWS):
        piece = [matrix[start : start + _PIECE_ROWS].astype(np.float64) for matrix in (first, second)]
        stacked = np.concatenate([factor, np.concatenate(piece, axis=1)])
        factor = np.asarray(np.linalg.qr(stacked, mode="r"))  # whose type is said to be that of Q and R
    return factor[:, :cut], factor[:, cut:]


def _spaces(update: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal columns that span what an update writes, and what it reads."""
    left, singular, right = np.linalg.svd(update, full_matrices=False)
    count = int((singular > ROUNDING * singular[0]).sum()) if len(singular) else 0
    return left[:, :count], right[:count].T


def _stored_alike(name: str, first: _Side, second: _Side) -> bool:
    pairs = first.pairs[name], second.pairs[name]
    return pairs[0].keys() == pairs[1].keys() and all(
        _is_alike(first.file, place, second.file, pairs[1][side]) for side, place in pairs[0].items()
    )


def _is_alike(first: RegularFile, ours: TensorPlace, second: RegularFile, theirs: TensorPlace) -> bool:
    if (ours.spec.dtype, ours.spec.shape) != (theirs.spec.dtype, theirs.spec.shape):
        return False
    pieces = ((start, min(CHUNK_BYTES, ours.size - start)) for start in range(0, ours.size, CHUNK_BYTES))
    return all(
        first.read(size, ours.offset + start) == second.read(size, theirs.offset + start)
        for start, size in pieces
    )


def _compare_others(first: _Side, second: _Side) -> Iterator[OtherDifference]:
    what = {name: other.what for side in (second, first) for name, other in side.others.items()}
    places = [{name: side.places[name] for name in side.others} for side in (first, second)]
    return _unlike(first.file, places[0], second.file, places[1], what)


def _unlike(
    first: RegularFile,
    ours: Mapping[str, TensorPlace],
    second: RegularFile,
    theirs: Mapping[str, TensorPlace],
    what: Mapping[str, str],
) -> Iterator[OtherDifference]:
    for name in sorted({*ours, *theirs}, key=_by_layer):
        kind = what.get(name, "tensor")
        if name not in ours or name not in theirs:
            yield OtherDifference(name, kind, ONLY_FIRST if name in ours else ONLY_SECOND)
        elif (forms := [_form(side[name].spec) for side in (ours, theirs)])[0] != forms[1]:
            yield OtherDifference(name, kind, DIFFERS, f"{forms[0]} against {forms[1]}")
        elif not _is_alike(first, ours[name], second, theirs[name]):
            yield OtherDifference(name, kind, DIFFERS)


def _form(tensor: TensorSpec) -> str:
    return f"{' x '.join(map(str, tensor.shape))} {tensor.dtype}"


def _sum_up(modules: tuple[ModuleDifference, ...], others: tuple[OtherDifference, ...]) -> WeightsDifference:
    compared = [module for module in modules if module.difference_norm is not None]
    first, second = (math.hypot(*(module.norms[side] or 0.0 for module in compared)) for side in (0, 1))
    norm = math.hypot(*(module.difference_norm or 0.0 for module in compared))
    product = first * second
    cosine = (first * first + second * second - norm * norm) / (2 * product) if product else None
    unknown = sum(module.difference_norm is None and module.state != SAME for module in modules)
    return WeightsDifference(modules, others, len(compared), unknown, (first, second), norm, cosine)
