"""The only reader of PEFT adapter folders: `adapter_config.json` and the header of the weights.

Reading never stops at the first problem: what is wrong comes back as findings,
all of them at once. Weights stay on disk; only the safetensors header is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_lora_ext.spec import AdapterSpec, Finding, TensorSpec

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLES = ("adapter_model.bin", "adapter_model.pt")
_MAX_CONFIG_BYTES = 1 << 20

# Config keys that vLLM cannot serve when they are switched on, with the fix.
_UNSUPPORTED = {
    "use_dora": "Train without DoRA, or merge the adapter into its base.",
    "lora_bias": "Train with lora_bias=False.",
    "modules_to_save": "Train without modules_to_save, or merge the adapter into its base.",
    "trainable_token_indices": "Train without new tokens.",
    "layer_replication": "Train without layer_replication.",
    "alora_invocation_tokens": "Train an ordinary LoRA.",
}


@dataclass(frozen=True)
class AdapterReading:
    """What a folder holds: `spec` unless it is unreadable, and every finding on the way."""

    spec: AdapterSpec | None
    findings: tuple[Finding, ...]


def is_adapter_folder(path: Path) -> bool:
    """Whether a folder means to be an adapter: it has a config or weights of one."""
    return any((path / name).exists() for name in (CONFIG_FILE, WEIGHTS_FILE, *_PICKLES))


def adapter_folders(directory: Path) -> list[Path]:
    """The adapters of a directory, by name: the directory itself if it is one, else its visible folders."""
    if is_adapter_folder(directory):
        return [directory]
    return sorted(entry for entry in directory.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def read_adapter(path: Path, name: str | None = None) -> AdapterReading:
    """Read one adapter folder; `name` is its public name, by default the folder's."""
    name = name or path.resolve().name
    if not path.is_dir():
        finding = Finding("adapter_missing", str(path), "no such folder", "Check the path.")
        return AdapterReading(None, (finding,))
    config, findings = _read_config(path / CONFIG_FILE)
    tensors, size, weight_findings = _read_weights(path)
    findings += weight_findings
    if config is None or tensors is None:
        return AdapterReading(None, tuple(findings))
    findings += _judge_config(config)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        return AdapterReading(None, tuple(findings))
    base_model = config.get("base_model_name_or_path")
    spec = AdapterSpec(
        name=name,
        path=path,
        base_model=base_model if isinstance(base_model, str) and base_model else None,
        rank=rank,
        alpha=float(alpha),
        target_modules=_target_modules(config),
        tensors=tensors,
        size_bytes=size,
        rank_pattern=_rank_pattern(config),
    )
    return AdapterReading(spec, tuple(findings))


def _read_config(path: Path) -> tuple[Mapping[str, Any] | None, list[Finding]]:
    if not path.is_file():
        rule = "the folder holds no adapter_config.json, so it is not a PEFT adapter"
        return None, [Finding("config_missing", str(path.parent), rule, "Save it with PEFT again.")]
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        rule = f"is larger than {_MAX_CONFIG_BYTES} bytes"
        return None, [Finding("config_too_large", str(path), rule, "Save it with PEFT again.")]
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        rule = f"cannot be read as JSON ({error})"
        return None, [Finding("config_not_json", str(path), rule, "Save it with PEFT again.")]
    if not isinstance(config, dict):
        rule = f"must hold an object, holds a {type(config).__name__}"
        return None, [Finding("config_not_object", str(path), rule, "Save it with PEFT again.")]
    return config, []


def _read_weights(path: Path) -> tuple[tuple[TensorSpec, ...] | None, int, list[Finding]]:
    from safetensors import SafetensorError, safe_open

    weights = path / WEIGHTS_FILE
    pickles = [name for name in _PICKLES if (path / name).exists()]
    if not weights.is_file():
        if pickles:
            rule = "is a pickle, which can run code when it is loaded"
            fix = (
                "Convert it where you trust it: PeftModel.from_pretrained(base, folder)"
                ".save_pretrained(folder, safe_serialization=True)."
            )
            return None, 0, [Finding("pickle_refused", pickles[0], rule, fix)]
        rule = f"the folder holds no {WEIGHTS_FILE}"
        fix = "Copy the weights, or save the adapter with PEFT again."
        return None, 0, [Finding("weights_missing", str(path), rule, fix)]
    try:
        with safe_open(weights, framework="numpy") as file:
            slices = [(name, file.get_slice(name)) for name in sorted(file.keys())]
            tensors = tuple(
                TensorSpec(name, part.get_dtype(), tuple(part.get_shape())) for name, part in slices
            )
    except (SafetensorError, OSError) as error:
        rule = f"is not a whole safetensors file ({error})"
        fix = "Copy it again, or save the adapter with PEFT again."
        return None, 0, [Finding("weights_corrupt", WEIGHTS_FILE, rule, fix)]
    if not tensors:
        finding = Finding("adapter_empty", WEIGHTS_FILE, "holds no tensor", "Train it again.")
        return tensors, 0, [finding]
    return tensors, weights.stat().st_size, []


def _judge_config(config: Mapping[str, Any]) -> list[Finding]:
    findings = []
    if config.get("peft_type") != "LORA":
        rule = f"is {config.get('peft_type')!r}; vLLM serves LORA only"
        fix = "Train a LoRA, or merge the adapter into its base."
        findings.append(Finding("peft_type_unsupported", "peft_type", rule, fix))
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        rule = f"must be a whole number of at least 1, is {rank!r}"
        findings.append(Finding("rank_invalid", "r", rule, "Save it with PEFT again."))
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < 1e6:
        rule = f"must be a positive number, is {alpha!r}"
        findings.append(Finding("alpha_invalid", "lora_alpha", rule, "Save it with PEFT again."))
    if config.get("bias", "none") != "none":
        rule = f"is {config['bias']!r}; vLLM serves adapters without trained biases only"
        findings.append(Finding("feature_unsupported", "bias", rule, "Train with bias='none'."))
    for key, fix in _UNSUPPORTED.items():
        if config.get(key):
            rule = "is set, and vLLM cannot serve it"
            findings.append(Finding("feature_unsupported", key, rule, fix))
    if not isinstance(config.get("init_lora_weights", True), bool | None) and config[
        "init_lora_weights"
    ] not in ("gaussian", "eva", "orthogonal"):
        rule = f"is {config['init_lora_weights']!r}, which changed the base during training"
        fix = "Save it with path_initial_model_for_weight_conversion, which makes a plain LoRA."
        findings.append(Finding("init_unsupported", "init_lora_weights", rule, fix))
    return findings


def _target_modules(config: Mapping[str, Any]) -> tuple[str, ...]:
    targets = config.get("target_modules")
    if isinstance(targets, str):
        return (targets,)
    return tuple(sorted(str(target) for target in targets)) if isinstance(targets, list) else ()


def _rank_pattern(config: Mapping[str, Any]) -> dict[str, int]:
    pattern = config.get("rank_pattern")
    if not isinstance(pattern, dict):
        return {}
    return {str(key): rank for key, rank in pattern.items() if isinstance(rank, int)}
