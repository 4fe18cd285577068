"""An adapter as merging sees it: for every tensor of the base that it changes, how it changes it.

Nothing of the weights is read here but what one `Change` needs, when it is needed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.merge_base import FLOATS, Stored
from vllm_lora_ext.admission import is_base_weight
from vllm_lora_ext.base_model import BaseModel
from vllm_lora_ext.errors import BadInput
from vllm_lora_ext.files import RegularFile, read_whole
from vllm_lora_ext.inspection import Inspection, Rules, inspect_adapter, inspect_values, require_admitted
from vllm_lora_ext.peft_format import CONFIG_FILE, MAX_CONFIG_BYTES, PREFIX, TENSOR_NAME, WEIGHTS_FILE
from vllm_lora_ext.spec import AdapterSpec
from vllm_lora_ext.strict_json import JsonRefused, parse_object

if TYPE_CHECKING:
    from train.merge_changes import Change

# What a server cannot serve beside an unchanged base, and a merged one can.
_MERGED_ONLY = ("feature_unsupported", "module_unknown", "vocab_unsupported", "rank_too_large")
SUPPORTED = (
    "LORA: plain, rsLoRA, DoRA, with rank and alpha patterns, trained biases, on embeddings and lm_head, "
    "with modules_to_save and trainable_token_indices"
)
# Settings of LoRA under which the weights mean something else than W + scaling * B A.
_OTHER_ARITHMETIC = (
    *("layer_replication", "alora_invocation_tokens", "use_bdlora", "use_qalora", "arrow_config"),
    *("kasa_config", "monteclora_config", "megatron_config", "target_parameters"),
)
_TOKENS = ".token_adapter.trainable_tokens_delta"  # which are the rows as they are now, and no difference
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.weight)?")
# Models of transformers whose linear layers are Conv1D: their weights lie as (in_features, out_features).
_CONV1D = {"gpt2": ("c_attn", "c_proj", "c_fc", "q_attn"), "openai-gpt": ("c_attn", "c_proj", "c_fc")}


@dataclass(frozen=True)
class Piece:
    """What one adapter brings for one tensor of the base, `tensor` by the name that PEFT has for it.

    `kind` is low_rank, embedding, whole, rows (of an embedding, `rows` says which), or shift (of a bias);
    `parts` are the adapter's own tensors.
    """

    tensor: str
    kind: str
    parts: tuple[Stored, ...]
    scaling: float = 1.0
    magnitude: Stored | None = None
    is_transposed: bool = False
    rows: tuple[int, ...] = ()

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the base's tensor may have this shape."""
        if self.kind == "rows":
            return self.shape == (len(self.rows), *shape[1:]) and max(self.rows) < shape[0]
        return self.shape == shape

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that the base's tensor must have, or the rows of it that are named."""
        if self.kind in ("whole", "shift", "rows"):
            return self.parts[0].shape
        a, b = (part.shape for part in self.parts)
        return (a[1], b[0]) if self.kind == "embedding" or self.is_transposed else (b[0], a[1])

    def load(self) -> Change:
        """With the numbers in float32."""
        from train.merge_changes import Dora, LowRank, Rows, Shift, Whole

        if self.kind == "whole":
            return Whole(self.parts[0])
        if self.kind == "rows":
            return Rows(self.rows, self.parts[0].read())
        if self.kind == "shift":
            return Shift(self.parts[0].read(), self.scaling)
        a, b = (part.read() for part in self.parts)
        if self.kind == "embedding" or self.is_transposed:
            a, b = b.T.contiguous(), a.T.contiguous()
        change = LowRank(b, a, self.scaling)
        return change if self.magnitude is None else Dora(change, self.magnitude.read())


@dataclass(frozen=True)
class MergeAdapter:
    """One adapter, open: what it changes, how it wants to be asked, and the digest of config and weights.

    `is_tied`: embedding and head were trained as one, by PEFT's `ensure_weight_tying`.
    """

    path: Path
    inspection: Inspection
    pieces: tuple[Piece, ...]
    copies: Mapping[str, Stored]  # of the base's own tensors, which are to be the same
    digest: str
    is_tied: bool = False


@contextmanager
def open_adapter(path: Path, base: BaseModel) -> Iterator[MergeAdapter]:
    """The adapter, admitted, with its weights open.

    Raises:
        BadInput: no LoRA that merging knows, or damaged.
        AdapterRefused: it does not fit the base.
    """
    config = _config_of(path)
    _judge_config(path, config)
    is_tied = config.get("ensure_weight_tying") is True
    # Of a tied head PEFT stores the matrices without naming it among the targets.
    allow = frozenset((*_MERGED_ONLY, *(("target_modules_mismatch",) if is_tied else ())))
    rules = Rules(base, allow=allow)
    inspection = inspect_values(inspect_adapter(path, rules), rules)
    spec = require_admitted(inspection)
    with RegularFile(path / WEIGHTS_FILE) as file:
        stored = {place.spec.name: Stored(file, place) for place in inspection.places}
        foreign = next(
            (item.place.spec for item in stored.values() if item.place.spec.dtype not in FLOATS), None
        )
        if foreign is not None:
            rule = f"holds {foreign.name!r} as {foreign.dtype}"
            raise BadInput(str(path), rule, f"Save it in one of {', '.join(FLOATS)}.")
        copies = {name.removeprefix(PREFIX): item for name, item in stored.items() if is_base_weight(name)}
        pieces = _pieces(path, spec, config, stored, str(base.config.get("model_type")))
        yield MergeAdapter(path, inspection, pieces, copies, _digest(path), is_tied)


def _config_of(path: Path) -> Mapping[str, Any]:
    """Empty if it cannot be read: admission says why."""
    try:
        return parse_object(read_whole(path / CONFIG_FILE, MAX_CONFIG_BYTES))
    except (OSError, ValueError, JsonRefused):
        return {}


def _judge_config(path: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        rule = f"is of PEFT type {str(kind)[:40]!r}, and merge takes {SUPPORTED}"
        fix = "Make a LoRA of it with `vllm-lora convert`, or merge it with PEFT's merge_and_unload."
        raise BadInput(str(path), rule, fix)
    for key in _OTHER_ARITHMETIC:
        if config.get(key):
            rule = f"sets {key}, and merge takes {SUPPORTED}"
            raise BadInput(str(path), rule, "Merge it with PEFT's merge_and_unload, if PEFT can.")


def _pieces(
    path: Path,
    spec: AdapterSpec,
    config: Mapping[str, Any],
    stored: Mapping[str, Stored],
    model_type: str,
) -> tuple[Piece, ...]:
    sides: dict[str, dict[str, Stored]] = {}
    magnitudes: dict[str, Stored] = {}
    pieces = []
    for name, item in stored.items():
        if is_base_weight(name):
            continue
        if match := TENSOR_NAME.fullmatch(name):
            side = match["side"] or f"embedding_{match['embedding']}"
            sides.setdefault(match["module"], {})[side] = item
        elif match := _MAGNITUDE.fullmatch(name.removeprefix(PREFIX)):
            magnitudes[match["module"]] = item
        else:
            pieces.append(_other_piece(path, name, item, spec, config))
    for module, pair in sides.items():
        pieces.append(_pair_piece(path, module, pair, spec, magnitudes.pop(module, None), model_type))
    if config.get("use_dora") and magnitudes:
        rule = f"has a magnitude for {min(magnitudes)} and no matrices"
        raise BadInput(str(path), rule, "Save it with PEFT again.")
    return tuple(pieces)


def _pair_piece(
    path: Path,
    module: str,
    pair: Mapping[str, Stored],
    spec: AdapterSpec,
    magnitude: Stored | None,
    model_type: str,
) -> Piece:
    is_embedding = "embedding_A" in pair
    mark = "embedding_" if is_embedding else ""
    parts = (pair[f"{mark}A"], pair[f"{mark}B"])
    is_transposed = module.rpartition(".")[2] in _CONV1D.get(model_type, ())
    if magnitude is not None and (is_embedding or is_transposed):
        rule = f"is a DoRA of {module}, whose norms run across its rows as they lie"
        raise BadInput(str(path), rule, "Merge it with PEFT's merge_and_unload.")
    if any(len(part.shape) != 2 for part in parts):
        rule = f"has matrices of experts for {module}, and merge takes {SUPPORTED}"
        raise BadInput(str(path), rule, "Merge it with PEFT's merge_and_unload.")
    kind = "embedding" if is_embedding else "low_rank"
    return Piece(f"{module}.weight", kind, parts, spec.scaling_of(module), magnitude, is_transposed)


def _other_piece(path: Path, name: str, item: Stored, spec: AdapterSpec, config: Mapping[str, Any]) -> Piece:
    """A bias, or a tensor of a module that was trained whole."""
    short = name.removeprefix(PREFIX)
    if short.endswith(".lora_B.bias"):
        module = short.removesuffix(".lora_B.bias")
        return Piece(f"{module}.bias", "shift", (item,), spec.scaling_of(module))
    if short.endswith(_TOKENS):
        module = short.removesuffix(_TOKENS)
        rows = _token_rows(config.get("trainable_token_indices"), module)
        if rows:
            return Piece(f"{module}.weight", "rows", (item,), rows=rows)
    if _is_saved(short, tuple(config.get("modules_to_save") or ())):
        return Piece(short, "whole", (item,))
    if short.endswith(".bias") and config.get("bias", "none") != "none":
        return Piece(short.replace(".base_layer.", "."), "whole", (item,))
    rule = f"holds {name[:120]!r}, and merge takes {SUPPORTED}"
    raise BadInput(str(path), rule, "Save it with PEFT (save_pretrained).")


def _token_rows(indices: Any, module: str) -> tuple[int, ...]:
    """Whose rows were trained; without names those of the embedding. Empty if that is not said."""
    if isinstance(indices, dict):
        indices = next((rows for name, rows in indices.items() if module.endswith(name)), None)
    listed = isinstance(indices, list) and all(type(row) is int and row >= 0 for row in indices)
    return tuple(indices) if listed else ()


def _is_saved(tensor: str, saved: tuple[str, ...]) -> bool:
    """Whether the tensor is in a module that was trained whole; PEFT takes the end of a name for the name."""
    parts = tensor.split(".")
    modules = (".".join(parts[:count]) for count in range(1, len(parts)))
    return bool(saved) and any(module.endswith(saved) for module in modules)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        with (path / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
