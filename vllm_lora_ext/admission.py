"""May this adapter be served on this base? Pure checks: specs in, findings out, no I/O."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from vllm_lora_ext.base_model import BaseModel
from vllm_lora_ext.findings import fold
from vllm_lora_ext.peft_config import SERVED_HEADS, shown
from vllm_lora_ext.peft_format import PREFIX, TENSOR_NAME
from vllm_lora_ext.spec import (
    AdapterSpec,
    EngineLimits,
    Finding,
    Severity,
    TensorSpec,
    allowed_rank,
    last_part,
)

SERVED_DTYPES = ("F64", "F32", "F16", "BF16")
_SHOWN = 3  # examples per finding; the count says how many there are
_ENGINE_DECIDES = "The engine decides when it loads it."
_OTHER_BASE = "Serve it on the base that it was trained on."
_SAVE_AGAIN = "Save the adapter with PEFT (save_pretrained), without other weights."
_PAIR, _EMBEDDING_PAIR = frozenset("AB"), frozenset(("embedding_A", "embedding_B"))
_EMBEDDING = "embed_tokens"
_CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification")

# What `--allow` does not lift: the adapter cannot be read at all, or reading it may harm others.
NOT_ALLOWABLE = frozenset(
    {
        *("adapter_missing", "adapter_name_invalid", "adapter_name_reserved", "adapter_exists"),
        *("config_missing", "config_not_json", "config_not_object", "config_duplicate_key"),
        *("config_not_finite", "config_too_large", "weights_missing", "weights_corrupt"),
        *("weights_duplicate_key", "adapter_empty", "pattern_unsupported", "template_refused"),
        *("not_regular_file", "link_refused", "pickle_refused", "too_large", "too_many_files"),
        "dtype_unsupported",  # such a tensor is not stored, and nobody would miss it
        *("permission_denied", "read_failed", "changed_while_reading", "signature_invalid", "quota_exceeded"),
        "stated_chat_invalid",  # who states chat settings does not want to be served without them
    }
)

_Pairs = dict[str, dict[str, TensorSpec]]


def judge(spec: AdapterSpec, base: BaseModel | None, limits: EngineLimits | None = None) -> list[Finding]:
    """Everything that speaks against `spec`, at once; an empty list admits it.

    Without a base, or with an architecture that we do not know, the module names are left to the
    engine (`Severity.UNPROVEN`).
    """
    pairs, heads, findings = _pair_up(spec, base.vocabulary_shapes() if base else {})
    if not heads and not any(map(_is_whole, pairs.values())):
        rule = "holds no pair of lora_A and lora_B, so it would answer like the base model"
        findings.append(Finding("adapter_empty", spec.name, rule, "Train it again, and save it with PEFT."))
    findings += _judge_heads(spec, heads, base)
    findings += judge_rank(spec.name, spec.max_rank, limits or EngineLimits())
    shapes = base.module_shapes() if base else None
    if base is None or shapes is None:
        subject = base.config.get("model_type") if base else "no base model"
        rule = f"module names and widths were not checked ({subject})"
        fix = _ENGINE_DECIDES if base else "The engine decides; --base-model says which base to check."
        findings.append(Finding("base_unknown", spec.name, rule, fix, Severity.UNPROVEN))
        known: dict[str, tuple[int, int]] = {}
    else:
        known = shapes | base.vocabulary_shapes()
        findings += _judge_modules(spec, pairs, known, base)
    return fold(findings + _judge_shapes(spec, pairs, known))


def refused(findings: Iterable[Finding]) -> bool:
    """Whether any finding is a refusal."""
    return any(finding.severity is Severity.REFUSED for finding in findings)


def allow(findings: Sequence[Finding], codes: Collection[str]) -> list[Finding]:
    """The findings with those of `codes` turned into warnings, as far as that is safe."""
    return [
        dataclasses.replace(finding, severity=Severity.WARNING)
        if finding.severity is Severity.REFUSED
        and finding.code in codes
        and finding.code not in NOT_ALLOWABLE
        else finding
        for finding in findings
    ]


def judge_rank(name: str, rank: int, limits: EngineLimits) -> list[Finding]:
    """Whether the engine has room for the largest rank of an adapter."""
    if rank <= limits.max_lora_rank:
        return []
    needed = allowed_rank(rank)
    fix = (
        f"Start the server with --max-lora-rank {needed}."
        if needed
        else f"vLLM serves ranks up to {EngineLimits().max_lora_rank}; train with a smaller one."
    )
    rule = f"rank {rank} is above the engine's max_lora_rank {limits.max_lora_rank}"
    return [Finding("rank_too_large", name, rule, fix)]


def _pair_up(
    spec: AdapterSpec, vocabulary: Mapping[str, tuple[int, int]]
) -> tuple[_Pairs, list[TensorSpec], list[Finding]]:
    """Tensors as module -> side (A, B) -> tensor, those of heads, and findings for what is neither.

    Of a kind of finding only the first is worked out: whoever made the file chose how many there are.
    """
    pairs: _Pairs = defaultdict(dict)
    heads, first, findings = [], _First(), []
    head_names = {f"{PREFIX}{head}" for head in spec.heads if head in SERVED_HEADS}
    for tensor in spec.tensors:
        if tensor.dtype not in SERVED_DTYPES:
            findings.append(first.get("dtype") or first.keep("dtype", _foreign_dtype(tensor)))
        if match := TENSOR_NAME.fullmatch(tensor.name):
            module, side, embedding = match.groups()
            pairs[module][side or f"embedding_{embedding}"] = tensor
            if (embedding is not None) != (module.rpartition(".")[2] == _EMBEDDING):
                kind = f"misplaced {side is None}"
                findings.append(first.get(kind) or first.keep(kind, _misplaced(tensor, side is None)))
        elif _is_head(tensor, head_names):
            heads.append(tensor)
        else:
            kind = _kind_of_stray(tensor, vocabulary)
            findings.append(first.get(kind) or first.keep(kind, _stray(tensor, kind)))
    for module, sides in pairs.items():
        if not _is_whole(sides):
            findings.append(first.get("pair") or first.keep("pair", _half(module, sides)))
    return dict(pairs), heads, findings


class _First(dict[str, Finding]):
    """The first finding of each kind."""

    def keep(self, kind: str, finding: Finding) -> Finding:
        self[kind] = finding
        return finding


def _is_whole(sides: Mapping[str, TensorSpec]) -> bool:
    return sides.keys() == _PAIR or sides.keys() == _EMBEDDING_PAIR


def _half(module: str, sides: Iterable[str]) -> Finding:
    rule = f"has {' and '.join(f'lora_{side}' for side in sorted(sides))}, which is no pair"
    return Finding("pair_incomplete", module[:120], rule, "Save the adapter again.")


def _foreign_dtype(tensor: TensorSpec) -> Finding:
    rule = f"is stored as {tensor.dtype}; weights must be {', '.join(SERVED_DTYPES)}"
    fix = "Save the adapter in bfloat16, float16 or float32."
    return Finding("dtype_unsupported", _item(tensor), rule, fix)


def _misplaced(tensor: TensorSpec, is_embedding: bool) -> Finding:
    """PEFT writes an embedding's matrices under names of their own; vLLM reads them the other way round."""
    rule = (
        f"is a matrix of an embedding, on a module that is not called {_EMBEDDING}"
        if is_embedding
        else "is a matrix of a linear layer, on an embedding; its own are lora_embedding_A and _B"
    )
    return Finding("module_unknown", _item(tensor), rule, "Save the adapter with PEFT (save_pretrained).")


def _item(tensor: TensorSpec) -> str:
    return repr(tensor.name)[:120]


def _is_head(tensor: TensorSpec, names: Collection[str]) -> bool:
    """`base_model.model.score.weight`, (labels, hidden), or its bias."""
    module, _, kind = tensor.name.rpartition(".")
    dimensions = {"weight": 2, "bias": 1}.get(kind)
    return module in names and len(tensor.shape) == dimensions and 0 not in tensor.shape


def _judge_heads(spec: AdapterSpec, heads: Sequence[TensorSpec], base: BaseModel | None) -> list[Finding]:
    """A head replaces the base's own, so the base must be a classifier. If it fits, the engine decides."""
    if not spec.heads:
        return []
    item, names = "modules_to_save", [tensor.name.removeprefix(PREFIX) for tensor in heads]
    if not heads:
        rule = f"names {shown(list(spec.heads))}, of which no weight is stored, so the base's own is used"
        return [Finding("head_unproven", item, rule, _ENGINE_DECIDES, Severity.UNPROVEN)]
    weights = [name for name in names if name.endswith(".weight")]
    if len(weights) != 1 or any(name.partition(".")[0] != weights[0].partition(".")[0] for name in names):
        rule = f"needs the weight of one head, the file holds {', '.join(names)}"
        return [Finding("pair_incomplete", item, rule, "Save the adapter again, with one head.")]
    if base and base.architectures and not any(mark in base.architectures for mark in _CLASSIFIERS):
        rule = f"brings {weights[0]}, and the base is no classifier but {shown(base.architectures)}"
        fix = "Serve it on the classification model that it was trained on, or train without a head."
        return [Finding("feature_unsupported", item, rule, fix)]
    rule = f"brings {weights[0]}, which is not compared with the base's own head"
    return [Finding("head_unproven", item, rule, _ENGINE_DECIDES, Severity.UNPROVEN)]


def is_base_weight(name: str) -> bool:
    """Whether PEFT put a copy of the base's own vocabulary weights here (`save_embedding_layers`)."""
    return name.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight"))


def _kind_of_stray(tensor: TensorSpec, vocabulary: Mapping[str, tuple[int, int]]) -> str:
    module = tensor.name.removeprefix(PREFIX).removesuffix(".base_layer.weight")
    if is_base_weight(tensor.name) and vocabulary.get(module, tensor.shape) == tensor.shape:
        return "base_weights_ignored"
    if "embed_tokens" in tensor.name or "lm_head" in tensor.name or "trainable_tokens" in tensor.name:
        return "vocab_unsupported"
    return "module_unknown"


def _stray(tensor: TensorSpec, kind: str) -> Finding:
    if kind == "base_weights_ignored":
        rule = "is a copy of the base's own weights and is left out"
        fix = "Save with save_embedding_layers=False. If tokens were added, they are not served."
        return Finding(kind, _item(tensor), rule, fix, Severity.WARNING)
    if kind == "vocab_unsupported":
        rule, fix = (
            "changes the vocabulary, and the engine's stays as it is",
            "Train without new tokens, or merge it into its base.",
        )
        return Finding(kind, _item(tensor), rule, fix)
    return Finding(kind, _item(tensor), "is not the A or B matrix of a LoRA module", _SAVE_AGAIN)


def _judge_modules(
    spec: AdapterSpec,
    pairs: _Pairs,
    known: dict[str, tuple[int, int]],
    base: BaseModel,
) -> list[Finding]:
    findings = []
    unjudged = [module for module in pairs if base.is_unjudged(module)]
    if unjudged:
        rule = f"{len(unjudged)} of {len(pairs)} modules are not judged here, for example {unjudged[0]}"
        findings.append(Finding("module_unproven", spec.name, rule, _ENGINE_DECIDES, Severity.UNPROVEN))
    left_out = known.keys() | unjudged
    unknown = [module for module in pairs if module not in left_out]
    if unknown:
        matched = len(pairs) - len(unknown)
        trained_on = f"; it was trained on {last_part(spec.base_model)}" if spec.base_model else ""
        examples = ", ".join(module[:100] for module in unknown[:_SHOWN])
        rule = (
            f"{_count_tensors(pairs, unknown)} of {len(spec.tensors)} tensors match this base "
            f"({matched} of {len(pairs)} modules; unknown: {examples})"
        )
        fix = f"Serve it on the base that it was trained on{trained_on}."
        findings.append(Finding("module_unknown", spec.name, rule, fix))
    layers, of_base = _layers_of(pairs), _layers_of(known)
    if layers and layers < of_base:
        rule = f"changes {len(layers)} of the base's {len(of_base)} layers"
        findings.append(Finding("layers_fewer", spec.name, rule, "Nothing, if that is meant.", Severity.NOTE))
    return findings


def _layers_of(modules: Iterable[str]) -> set[str]:
    """The numbers behind `.layers.` in names of modules."""
    parts = (module.partition(".layers.")[2] for module in modules)
    return {part.partition(".")[0] for part in parts if part}


def _count_tensors(pairs: _Pairs, unknown: list[str]) -> int:
    without = set(unknown)
    return sum(len(sides) for module, sides in pairs.items() if module not in without)


def _judge_shapes(spec: AdapterSpec, pairs: _Pairs, known: Mapping[str, tuple[int, int]]) -> list[Finding]:
    """A is (rank, in_features), B (out_features, rank); of embeddings (rank, vocab) and (hidden, rank)."""
    first, findings = _First(), []
    for module, sides in pairs.items():
        is_expert, shape, rank = ".experts" in module, known.get(module), spec.rank_of(module)
        for side, tensor in sides.items():
            rank_axis = 0 if side[-1] == "A" else 1
            width = None if shape is None else shape[_WIDTH_AXIS[side]]
            if not (_is_expert(tensor) if is_expert else _has_width(tensor, 1 - rank_axis, width)):
                kind = "expert" if is_expert else "shape"
                findings.append(first.get(kind) or first.keep(kind, _misshapen(module, side, tensor, width)))
            elif not is_expert and tensor.shape[rank_axis] != rank:
                rule = f"lora_{side} has rank {tensor.shape[rank_axis]}, the config says {rank}"
                fix = "Save the adapter again, with the config that it was trained with."
                findings.append(
                    first.get("rank") or first.keep("rank", Finding("rank_mismatch", module[:120], rule, fix))
                )
    return findings


def _misshapen(module: str, side: str, tensor: TensorSpec, width: int | None) -> Finding:
    rule = f"lora_{side} has shape {tensor.shape}"
    if ".experts" not in module:
        features = "features" if width is None else str(width)
        rule += f", this base needs {f'(rank, {features})' if side[-1] == 'A' else f'({features}, rank)'}"
    return Finding("shape_mismatch", module[:120], rule, _OTHER_BASE)


# Which of (out_features, in_features) a side has; an embedding is a table (vocab, hidden).
_WIDTH_AXIS = {"A": 1, "B": 0, "embedding_A": 0, "embedding_B": 1}


def _has_width(tensor: TensorSpec, axis: int, width: int | None) -> bool:
    if len(tensor.shape) != 2 or 0 in tensor.shape:
        return False
    return width is None or tensor.shape[axis] == width


def _is_expert(tensor: TensorSpec) -> bool:
    return len(tensor.shape) in (2, 3) and 0 not in tensor.shape
