"""The only reader of PEFT adapter folders: `adapter_config.json` and the header of the weights.

Reading never stops at the first problem: what is wrong comes back as findings,
all of them at once. Weights stay on disk; only the safetensors header is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_lora_ext.spec import AdapterSpec, Finding, TensorSpec, folder_name

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
    "use_bdlora": "Train an ordinary LoRA.",
    "use_qalora": "Train an ordinary LoRA.",
}
# These only choose the first weights of the adapter (vllm/lora/peft_helper.py).
_HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_LITERAL_KEY = re.compile(r"[\w.]+(\|[\w.]+)*")
_SAVE_AGAIN = "Save it with PEFT again."


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
    name = name or folder_name(path)
    if not path.is_dir():
        finding = Finding("adapter_missing", str(path), "no such folder", "Check the path.")
        return AdapterReading(None, (finding,))
    config, findings = _read_config(path / CONFIG_FILE)
    tensors, size, weight_findings = _read_weights(path)
    findings += weight_findings
    if config is not None:
        findings += _judge_config(config)
    if config is None or tensors is None or not _is_rank(config.get("r")):
        return AdapterReading(None, tuple(findings))
    base_model = config.get("base_model_name_or_path")
    spec = AdapterSpec(
        name=name,
        path=path,
        base_model=base_model if isinstance(base_model, str) and base_model else None,
        rank=config["r"],
        tensors=tensors,
        size_bytes=size,
        rank_pattern=_rank_pattern(config),
    )
    return AdapterReading(spec, tuple(findings))


def _read_config(path: Path) -> tuple[Mapping[str, Any] | None, list[Finding]]:
    if not path.is_file():
        rule = "the folder holds no adapter_config.json, so it is not a PEFT adapter"
        return None, [Finding("config_missing", str(path.parent), rule, _SAVE_AGAIN)]
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        rule = f"is larger than {_MAX_CONFIG_BYTES} bytes"
        return None, [Finding("config_too_large", str(path), rule, _SAVE_AGAIN)]
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        rule = f"cannot be read as JSON ({error})"
        return None, [Finding("config_not_json", str(path), rule, _SAVE_AGAIN)]
    if not isinstance(config, dict):
        rule = f"must hold an object, holds a {type(config).__name__}"
        return None, [Finding("config_not_object", str(path), rule, _SAVE_AGAIN)]
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
        if weights.exists():
            rule = "is no regular file"
            return None, 0, [Finding("not_regular_file", WEIGHTS_FILE, rule, "Copy the weights again.")]
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
        rule = f"is {_shown(config.get('peft_type'))}; vLLM serves LORA only"
        fix = "Train a LoRA, or merge the adapter into its base."
        findings.append(Finding("peft_type_unsupported", "peft_type", rule, fix))
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not _is_rank(rank):
        rule = f"must be a whole number of at least 1, is {_shown(rank)}"
        findings.append(Finding("rank_invalid", "r", rule, _SAVE_AGAIN))
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < 1e6:
        rule = f"must be a positive number, is {_shown(alpha)}"
        findings.append(Finding("alpha_invalid", "lora_alpha", rule, _SAVE_AGAIN))
    if not isinstance(config.get("target_modules"), str | list):
        rule = f"must name the modules, is {_shown(config.get('target_modules'))}"
        findings.append(Finding("target_modules_invalid", "target_modules", rule, _SAVE_AGAIN))
    if config.get("bias", "none") != "none":
        rule = f"is {_shown(config['bias'])}; vLLM serves adapters without trained biases only"
        findings.append(Finding("feature_unsupported", "bias", rule, "Train with bias='none'."))
    for key, fix in _UNSUPPORTED.items():
        if config.get(key):
            rule = "is set, and vLLM cannot serve it"
            findings.append(Finding("feature_unsupported", key, rule, fix))
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _HARMLESS_INITS:
        rule = f"is {_shown(init)}, which changed the base during training"
        fix = "Save it with path_initial_model_for_weight_conversion, which makes a plain LoRA."
        findings.append(Finding("init_unsupported", "init_lora_weights", rule, fix))
    return findings + judge_patterns(config)


def judge_patterns(config: Mapping[str, Any]) -> list[Finding]:
    """PEFT and vLLM read the keys as regular expressions; names and `a|b` are all that is needed."""
    findings = []
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name)
        if pattern is None:
            continue
        if not isinstance(pattern, dict):
            rule = f"must be an object, is {_shown(pattern)}"
            findings.append(Finding("pattern_unsupported", name, rule, _SAVE_AGAIN))
            continue
        for key, value in pattern.items():
            if not _LITERAL_KEY.fullmatch(key):
                rule = f"key {_shown(key)} is more than module names"
                fix = "Write the names of the modules, as PEFT's own examples do."
                findings.append(Finding("pattern_unsupported", name, rule, fix))
            elif name == "rank_pattern" and not _is_rank(value):
                rule = f"{key} must be a whole number of at least 1, is {_shown(value)}"
                findings.append(Finding("rank_invalid", name, rule, _SAVE_AGAIN))
    return findings


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _shown(value: object) -> str:
    """A value as it may stand in a message: not endless."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        return "a number without end"
    return text if len(text) <= 60 else text[:57] + "..."


def _rank_pattern(config: Mapping[str, Any]) -> dict[str, int]:
    pattern = config.get("rank_pattern")
    if not isinstance(pattern, dict):
        return {}
    return {suffix: rank for key, rank in pattern.items() if _is_rank(rank) for suffix in key.split("|")}
