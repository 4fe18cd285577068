"""Which tensor of which file of the merged model comes from what. Pure: names and shapes, no weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from train.merge_adapter import MergeAdapter, Piece
from train.merge_base import FLOATS, MergeBase, Stored
from vllm_lora_ext.errors import BadInput
from vllm_lora_ext.spec import TensorSpec

# What transformers calls the decoder inside a model, now and in the files of earlier versions.
_STEMS = ("model.language_model.", "language_model.model.", "model.", "transformer.", "language_model.", "")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Target:
    """One tensor of the merged model: that of the base, and each adapter's change by the adapter's number."""

    spec: TensorSpec
    stored: Stored
    pieces: tuple[tuple[int, Piece], ...] = ()


@dataclass(frozen=True)
class MergePlan:
    """`shards` are file names -> tensors. `new_head` is set when a tied head becomes a tensor of its own."""

    shards: Mapping[str, tuple[Target, ...]]
    new_head: str | None = None

    @property
    def is_untied(self) -> bool:
        """Whether embedding and head are no longer one."""
        return self.new_head is not None

    @property
    def size_bytes(self) -> int:
        """All tensors together."""
        sizes = (target.stored.place.size for targets in self.shards.values() for target in targets)
        return sum(sizes)


def make_plan(base: MergeBase, adapters: Sequence[MergeAdapter]) -> MergePlan:
    """Find the tensor of the base for everything that an adapter brings.

    Raises:
        BadInput: the base has no such tensor, or one of another shape or dtype.
    """
    tensors = base.tensors
    embedding = next((name for name in tensors if name.endswith(_EMBEDDINGS)), None)
    is_tied = _is_tied(base.config, tensors)
    changes: dict[str, list[tuple[int, Piece]]] = {}
    of_both: list[tuple[int, Piece]] = []  # changes of the embedding that are the head's as well
    for number, adapter in enumerate(adapters):
        for piece in adapter.pieces:
            if is_tied and (adapter.is_tied or piece.kind == "rows") and piece.tensor.endswith(_HEAD):
                continue  # the embedding's change once more
            name = _stored_name(piece.tensor, tensors)
            if name is None and piece.tensor.endswith(_HEAD) and is_tied and embedding:
                name = _head_name(embedding)
            if name is None:
                rule = f"changes {piece.tensor}, which {base.name} does not hold"
                raise BadInput(str(adapter.path), rule, "Merge it into the base that it was trained on.")
            stored = tensors[name] if name in tensors and not _is_tied_head(name, is_tied) else None
            _judge_fit(adapter, piece, stored or tensors[str(embedding)], base)
            changes.setdefault(name, []).append((number, piece))
            if is_tied and name == embedding and (adapter.is_tied or piece.kind == "rows"):
                of_both.append((number, piece))
    new_head = _untied(changes, embedding, is_tied, of_both)
    if new_head is not None:
        changes[new_head] = sorted([*changes.get(new_head, ()), *of_both], key=itemgetter(0))
    return MergePlan(dict(_shards(base, changes, new_head, embedding)), new_head)


def _is_tied_head(name: str, is_tied: bool) -> bool:
    return is_tied and name.endswith(_HEAD)


def _is_tied(config: Mapping[str, Any], tensors: Mapping[str, Stored]) -> bool:
    """What the config says, and where it says nothing, whether there is a head in the files."""
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, Mapping) else {}):
        if isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return not any(name.endswith(_HEAD) for name in tensors)


def _untied(
    changes: Mapping[str, Any], embedding: str | None, is_tied: bool, of_both: Sequence[object]
) -> str | None:
    """The name of the head, if a tied one has to become a tensor of its own."""
    if not is_tied or embedding is None:
        return None
    head = _head_name(embedding)
    is_one = head not in changes and len(changes.get(embedding, ())) == len(of_both)
    return None if is_one else head


def _head_name(embedding: str) -> str:
    """Beside the decoder: in files of earlier versions inside `language_model`, else at the top."""
    return "language_model." + _HEAD if embedding.startswith("language_model.model.") else _HEAD


def _stored_name(name: str, tensors: Mapping[str, Stored]) -> str | None:
    """PEFT names modules as transformers does now; files may have the names of an earlier version."""
    if name in tensors:
        return name
    found = set()
    for stem in _STEMS:
        if name.startswith(stem):
            rest = name.removeprefix(stem)
            found |= {other + rest for other in _STEMS if other + rest in tensors}
    return found.pop() if len(found) == 1 else None


def _judge_fit(adapter: MergeAdapter, piece: Piece, stored: Stored, base: MergeBase) -> None:
    spec = stored.place.spec
    if not piece.fits(spec.shape):
        rule = f"brings {piece.tensor} of shape {piece.shape}, {base.name} has {spec.shape}"
        fix = (
            "Merge it into the base that it was trained on; a vocabulary that was extended cannot be merged."
        )
        raise BadInput(str(adapter.path), rule, fix)
    if piece.magnitude is not None and piece.magnitude.shape != spec.shape[:1]:
        rule = f"brings {piece.magnitude.shape} magnitudes for {piece.tensor} of shape {spec.shape}"
        raise BadInput(str(adapter.path), rule, "Save it with PEFT again.")
    if spec.dtype not in FLOATS:
        rule = f"stores {spec.name} as {spec.dtype}, whose steps are larger than an adapter's change"
        raise BadInput(base.name, rule, "Merge into a base of float32, bfloat16 or float16.")


def _shards(
    base: MergeBase,
    changes: Mapping[str, list[tuple[int, Piece]]],
    new_head: str | None,
    embedding: str | None,
) -> Iterator[tuple[str, tuple[Target, ...]]]:
    for shard, tensors in base.shards.items():
        targets = [
            Target(stored.place.spec, stored, tuple(changes.get(name, ())))
            for name, stored in tensors.items()
            if name != new_head  # a copy that a tied base carries
        ]
        if new_head is not None and embedding is not None and embedding in tensors:
            stored = tensors[embedding]
            spec = TensorSpec(new_head, stored.place.spec.dtype, stored.shape)
            targets.append(Target(spec, stored, tuple(changes.get(new_head, ()))))
        yield shard, tuple(targets)
