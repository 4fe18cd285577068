"""May this adapter be served on this base? Pure checks: specs in, findings out, no I/O."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from vllm_lora_ext.base_model import BaseModel
from vllm_lora_ext.peft_format import PREFIX, TENSOR_NAME, fold
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

# What `--allow` does not lift: the adapter cannot be read at all, or reading it may harm others.
NOT_ALLOWABLE = frozenset(
    {
        *("adapter_missing", "adapter_name_invalid", "adapter_name_reserved", "adapter_exists"),
        *("config_missing", "config_not_json", "config_not_object", "config_duplicate_key"),
        *("config_not_finite", "config_too_large", "weights_missing", "weights_corrupt"),
        *("weights_duplicate_key", "adapter_empty", "pattern_unsupported", "template_refused"),
        *("not_regular_file", "link_refused", "pickle_refused", "too_large", "too_many_files"),
        *("permission_denied", "read_failed", "changed_while_reading", "signature_invalid", "quota_exceeded"),
    }
)


def judge(spec: AdapterSpec, base: BaseModel | None, limits: EngineLimits | None = None) -> list[Finding]:
    """Everything that speaks against `spec`, at once; an empty list admits it.

    Without a base, or with an architecture that we do not know, the module names are left to the
    engine (`Severity.UNPROVEN`).
    """
    pairs, findings = _pair_up(spec, base.vocabulary_shapes() if base else {})
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
    for module, sides in pairs.items():
        findings += _judge_shapes(spec, module, sides, known.get(module))
    return fold(findings)


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
) -> tuple[dict[str, dict[str, TensorSpec]], list[Finding]]:
    """Tensors as module -> side (A, B) -> tensor, with a finding for what is no pair."""
    pairs: dict[str, dict[str, TensorSpec]] = defaultdict(dict)
    findings = []
    for tensor in spec.tensors:
        if tensor.dtype not in SERVED_DTYPES:
            rule = f"is stored as {tensor.dtype}; weights must be {', '.join(SERVED_DTYPES)}"
            fix = "Save the adapter in bfloat16, float16 or float32."
            findings.append(Finding("dtype_unsupported", repr(tensor.name)[:120], rule, fix))
        if match := TENSOR_NAME.fullmatch(tensor.name):
            kind = match["side"] or f"embedding_{match['embedding']}"
            pairs[match["module"]][kind] = tensor
        elif not _is_head(spec, tensor.name):
            findings.append(_stray(tensor, vocabulary))
    for module, sides in pairs.items():
        if set(sides) not in ({"A", "B"}, {"embedding_A", "embedding_B"}):
            rule = f"has {' and '.join(f'lora_{side}' for side in sorted(sides))}, which is no pair"
            findings.append(Finding("pair_incomplete", module[:120], rule, "Save the adapter again."))
    return dict(pairs), findings


def _is_head(spec: AdapterSpec, name: str) -> bool:
    return name.startswith(PREFIX) and name.removeprefix(PREFIX).split(".")[0] in spec.heads


def is_base_weight(name: str) -> bool:
    """Whether PEFT put a copy of the base's own vocabulary weights here (`save_embedding_layers`)."""
    return name.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight"))


def _stray(tensor: TensorSpec, vocabulary: Mapping[str, tuple[int, int]]) -> Finding:
    item = repr(tensor.name)[:120]
    module = tensor.name.removeprefix(PREFIX).removesuffix(".base_layer.weight")
    if is_base_weight(tensor.name) and vocabulary.get(module, tensor.shape) == tensor.shape:
        rule = "is a copy of the base's own weights and is left out"
        fix = "Save with save_embedding_layers=False. If tokens were added, they are not served."
        return Finding("base_weights_ignored", item, rule, fix, Severity.WARNING)
    if "embed_tokens" in tensor.name or "lm_head" in tensor.name or "trainable_tokens" in tensor.name:
        rule = "changes the vocabulary, and the engine's stays as it is"
        return Finding(
            "vocab_unsupported", item, rule, "Train without new tokens, or merge it into its base."
        )
    rule = "is not the A or B matrix of a LoRA module"
    fix = "Save the adapter with PEFT (save_pretrained), without other weights."
    return Finding("module_unknown", item, rule, fix)


def _judge_modules(
    spec: AdapterSpec,
    pairs: dict[str, dict[str, TensorSpec]],
    known: dict[str, tuple[int, int]],
    base: BaseModel,
) -> list[Finding]:
    findings = []
    unjudged = [module for module in pairs if base.is_unjudged(module)]
    if unjudged:
        rule = f"{len(unjudged)} of {len(pairs)} modules are not judged here, for example {unjudged[0]}"
        findings.append(Finding("module_unproven", spec.name, rule, _ENGINE_DECIDES, Severity.UNPROVEN))
    unknown = [module for module in pairs if module not in known and not base.is_unjudged(module)]
    if unknown:
        matched = len(pairs) - len(unknown)
        trained_on = f"; it was trained on {last_part(spec.base_model)}" if spec.base_model else ""
        shown = ", ".join(module[:100] for module in unknown[:_SHOWN])
        rule = (
            f"{_count_tensors(pairs, unknown)} of {len(spec.tensors)} tensors match this base "
            f"({matched} of {len(pairs)} modules; unknown: {shown})"
        )
        fix = f"Serve it on the base that it was trained on{trained_on}."
        findings.append(Finding("module_unknown", spec.name, rule, fix))
    layers = {module.split(".layers.")[1].split(".")[0] for module in pairs if ".layers." in module}
    of_base = {module.split(".layers.")[1].split(".")[0] for module in known if ".layers." in module}
    if layers and layers < of_base:
        rule = f"changes {len(layers)} of the base's {len(of_base)} layers"
        findings.append(Finding("layers_fewer", spec.name, rule, "Nothing, if that is meant.", Severity.NOTE))
    return findings


def _count_tensors(pairs: dict[str, dict[str, TensorSpec]], unknown: list[str]) -> int:
    without = set(unknown)
    return sum(len(sides) for module, sides in pairs.items() if module not in without)


def _judge_shapes(
    spec: AdapterSpec, module: str, sides: dict[str, TensorSpec], shape: tuple[int, int] | None
) -> list[Finding]:
    """A is (rank, in_features), B (out_features, rank); of embeddings (rank, vocab) and (hidden, rank)."""
    if ".experts" in module:
        return _judge_expert_shapes(module, sides)
    findings = []
    for side, tensor in sides.items():
        rank_axis = 0 if side.endswith("A") else 1
        width = None if shape is None else shape[_width_axis(side)]
        if not _has_width(tensor, 1 - rank_axis, width):
            known = "features" if width is None else str(width)
            wanted = f"({known}, rank)" if rank_axis else f"(rank, {known})"
            rule = f"lora_{side} has shape {tensor.shape}, this base needs {wanted}"
            findings.append(Finding("shape_mismatch", module[:120], rule, _OTHER_BASE))
        elif tensor.shape[rank_axis] != spec.rank_of(module):
            rule = f"lora_{side} has rank {tensor.shape[rank_axis]}, the config says {spec.rank_of(module)}"
            fix = "Save the adapter again, with the config that it was trained with."
            findings.append(Finding("rank_mismatch", module[:120], rule, fix))
    return findings


def _width_axis(side: str) -> int:
    """Which of (out_features, in_features) a side has; an embedding is a table (vocab, hidden)."""
    return {"A": 1, "B": 0, "embedding_A": 0, "embedding_B": 1}[side]


def _has_width(tensor: TensorSpec, axis: int, width: int | None) -> bool:
    if len(tensor.shape) != 2 or 0 in tensor.shape:
        return False
    return width is None or tensor.shape[axis] == width


def _judge_expert_shapes(module: str, sides: dict[str, TensorSpec]) -> list[Finding]:
    return [
        Finding("shape_mismatch", module[:120], f"lora_{side} has shape {tensor.shape}", _OTHER_BASE)
        for side, tensor in sides.items()
        if len(tensor.shape) not in (2, 3) or 0 in tensor.shape
    ]
