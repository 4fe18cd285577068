"""May this adapter be served on this base? Pure checks: specs in, findings out, no I/O."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection

from vllm_lora_ext.base_model import BaseModel
from vllm_lora_ext.spec import (
    AdapterSpec,
    EngineLimits,
    Finding,
    Severity,
    TensorSpec,
    allowed_rank,
)

_TENSOR = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?:(?P<side>[AB])\.weight|embedding_(?P<embedding>[AB]))"
)
_VOCABULARY_MODULES = ("model.embed_tokens", "lm_head")  # some of vLLM's classes take them, some do not
_NAME = re.compile(r"[^\W.][\w.-]{0,63}")
# Words that vLLM gives a meaning of its own (content types, its warm-up adapter).
_RESERVED = frozenset({"text", "image", "audio", "video", "input", "warmup_1"})
_SHOWN = 3  # examples per finding; the count says how many there are


def admit(spec: AdapterSpec, base: BaseModel | None, limits: EngineLimits | None = None) -> list[Finding]:
    """Everything that speaks against `spec`, at once; an empty list admits it.

    Without a base, or with an architecture that we do not know, the module
    names and shapes are left to the engine (`Severity.UNPROVEN`).
    """
    findings = _judge_rank(spec, limits or EngineLimits())
    pairs, findings_pairs = _pair_up(spec)
    findings += findings_pairs
    shapes = base.module_shapes() if base else None
    if shapes is None:
        subject = base.config.get("model_type") if base else "no base model"
        findings.append(
            Finding(
                "base_unknown",
                spec.name,
                f"module names and shapes were not checked ({subject})",
                "The engine decides when it loads it"
                + ("." if base else "; --base-model says which base to check."),
                Severity.UNPROVEN,
            )
        )
        return findings
    vocabulary = [module for module in pairs if module in _VOCABULARY_MODULES]
    if vocabulary:
        rule = "whether vLLM takes LoRA on it depends on the model's class"
        fix = "The engine decides when it loads it."
        findings.append(Finding("vocabulary_unproven", ", ".join(vocabulary), rule, fix, Severity.UNPROVEN))
    unknown = [module for module in pairs if module not in shapes and module not in vocabulary]
    if unknown:
        findings.append(_unknown_modules(spec, pairs, unknown, shapes))
    for module, sides in pairs.items():
        if module in shapes:
            findings += _judge_shapes(spec, module, sides, shapes[module])
    return _fold(findings)


def judge_name(name: str, base_names: Collection[str] = ()) -> list[Finding]:
    """A public name must work as folder, as `model` in a request and in a URL, and be nobody else's."""
    if not _NAME.fullmatch(name):
        rule = "must be 1 to 64 letters, digits, '-', '_' or '.', and begin with a letter or digit"
        return [Finding("adapter_name_invalid", repr(name), rule, "Rename the folder, or give name=path.")]
    if name in _RESERVED or name in base_names:
        taken = name in base_names
        rule = "is the base model's name" if taken else "is a word with a meaning of its own"
        return [Finding("adapter_name_reserved", name, rule, "Rename the folder, or give name=path.")]
    return []


def refused(findings: list[Finding] | tuple[Finding, ...]) -> bool:
    """Whether any finding is a refusal."""
    return any(finding.severity is Severity.REFUSED for finding in findings)


def _judge_rank(spec: AdapterSpec, limits: EngineLimits) -> list[Finding]:
    if spec.max_rank <= limits.max_lora_rank:
        return []
    needed = allowed_rank(spec.max_rank)
    fix = (
        f"Start the server with --max-lora-rank {needed}."
        if needed
        else f"vLLM serves ranks up to {EngineLimits().max_lora_rank}; train with a smaller one."
    )
    rule = f"rank {spec.max_rank} is above the engine's max_lora_rank {limits.max_lora_rank}"
    return [Finding("rank_too_large", spec.name, rule, fix)]


def _pair_up(spec: AdapterSpec) -> tuple[dict[str, dict[str, TensorSpec]], list[Finding]]:
    """Tensors as module -> side (A, B) -> tensor, with a finding for what is no pair."""
    pairs: dict[str, dict[str, TensorSpec]] = defaultdict(dict)
    findings = []
    for tensor in spec.tensors:
        match = _TENSOR.fullmatch(tensor.name)
        if match:
            pairs[match["module"]][match["side"] or match["embedding"]] = tensor
        else:
            rule = "is not the A or B matrix of a LoRA module"
            fix = "Save the adapter with PEFT, without other weights."
            findings.append(Finding("module_unknown", tensor.name, rule, fix))
    for module, sides in pairs.items():
        if len(sides) == 1:
            (side,) = sides
            rule = f"has lora_{side} and no lora_{'B' if side == 'A' else 'A'}"
            findings.append(Finding("pair_incomplete", module, rule, "Save the adapter again."))
    return dict(pairs), findings


def _unknown_modules(
    spec: AdapterSpec,
    pairs: dict[str, dict[str, TensorSpec]],
    unknown: list[str],
    shapes: dict[str, tuple[int, int]],
) -> Finding:
    matched = len(pairs) - len(unknown)
    trained_on = f"; it was trained on {spec.base_model}" if spec.base_model else ""
    return Finding(
        "module_unknown",
        spec.name,
        f"{matched} of {len(pairs)} modules are modules of this base "
        f"({len(shapes)} known; unknown: {', '.join(unknown[:_SHOWN])})",
        f"Serve it on the base that it was trained on{trained_on}.",
    )


def _judge_shapes(
    spec: AdapterSpec, module: str, sides: dict[str, TensorSpec], shape: tuple[int, int]
) -> list[Finding]:
    """A must be (rank, in_features) and B (out_features, rank)."""
    out_features, in_features = shape
    findings = []
    for side, tensor in sides.items():
        rank_axis, width_axis = (0, 1) if side == "A" else (1, 0)
        width = in_features if side == "A" else out_features
        if len(tensor.shape) != 2 or tensor.shape[width_axis] != width:
            wanted = f"(rank, {width})" if side == "A" else f"({width}, rank)"
            rule = f"lora_{side} has shape {tensor.shape}, this base needs {wanted}"
            fix = "Serve it on the base that it was trained on."
            findings.append(Finding("shape_mismatch", module, rule, fix))
        elif tensor.shape[rank_axis] != spec.rank_of(module):
            rule = (
                f"lora_{side} has rank {tensor.shape[rank_axis]}, "
                f"adapter_config.json says {spec.rank_of(module)}"
            )
            fix = "Save the adapter again, with the config that it was trained with."
            findings.append(Finding("rank_mismatch", module, rule, fix))
    return findings


def _fold(findings: list[Finding]) -> list[Finding]:
    """One finding per code and fix when many modules break the same rule, with the count."""
    groups: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        groups[finding.code, finding.fix].append(finding)
    folded = []
    for (code, fix), group in groups.items():
        first = group[0]
        more = f" (and {len(group) - 1} more)" if len(group) > 1 else ""
        folded.append(Finding(code, first.item, first.rule + more, fix, first.severity))
    return folded
