"""What sets two adapters apart besides their weights: config, base and chat settings. Pure.

A config is compared setting by setting, as PEFT reads it: what is not stated has PEFT's default, a list of
modules has no order. Two sorts of settings are told and do not count as a difference: those that say how an
adapter was trained and nothing of what it computes, and those whose effect is seen in the modules, where one
scaling may be written in many ways.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_lora_ext.contract import ChatSettings
from vllm_lora_ext.spec import last_part

# What PEFT takes where a config does not say (peft/tuners/lora/config.py); all others are empty or off.
_DEFAULTS: dict[str, Any] = {"bias": "none", "init_lora_weights": True, "lora_dropout": 0.0}
_UNORDERED = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters")
# They make ranks, scalings and the list of modules, which are compared as such.
_IN_MODULES = frozenset(
    (
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules"),
        *("exclude_modules", "layers_to_transform", "layers_pattern"),
    )
)
# How it was trained and by what, and how it is loaded.
_OF_TRAINING = frozenset(
    (
        *("peft_version", "inference_mode", "auto_mapping", "revision", "lora_dropout", "task_type"),
        "runtime_config",
    )
)
# Inits that say only where training began; any other changed the base, and so belongs to the adapter.
_HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
_INITS = frozenset(("init_lora_weights", "eva_config", "loftq_config", "corda_config", "lora_ga_config"))
IN_MODULES, OF_TRAINING = "seen in the modules", "of training"
_VOUCHED = "one template, of which only one says that it was trained"
_BASE = "base_model_name_or_path"


@dataclass(frozen=True)
class SettingDifference:
    """A setting that two adapters do not share, None where not set; `note` says why it does not count."""

    name: str
    first: Any
    second: Any
    note: str = ""

    @property
    def counts(self) -> bool:
        """Whether it makes two adapters different."""
        return not self.note


@dataclass(frozen=True)
class NamedBase:
    """The base that an adapter names, None if it names none.

    `fingerprint` is that of the base's config, None if neither the adapter states it nor the base is here.
    """

    name: str | None
    fingerprint: str | None = None


@dataclass(frozen=True)
class BaseDifference:
    """The bases that two adapters name. `state` is "same", "other", or "unknown" where that cannot be told.

    Two models may have one shape and other weights, which nobody sees in a config: so they are the same only
    if their names are, and other only if their configs are.
    """

    first: str | None
    second: str | None
    state: str


def compare_configs(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[SettingDifference]:
    """The settings of two `adapter_config.json` that are not the same, by name; but for the base's name."""
    inits = [config.get("init_lora_weights", True) for config in (first, second)]
    of_training = _OF_TRAINING | (_INITS if all(init in _HARMLESS_INITS for init in inits) else frozenset())
    # Of no other type are modules compared.
    in_modules = _IN_MODULES if first.get("peft_type") == second.get("peft_type") == "LORA" else frozenset()
    found = []
    for name in sorted({*first, *second} - {_BASE}):
        ours, theirs = _read(name, first), _read(name, second)
        if _canonical(name, ours) != _canonical(name, theirs):
            note = IN_MODULES if name in in_modules else OF_TRAINING if name in of_training else ""
            found.append(SettingDifference(name, ours, theirs, note))
    return found


def compare_bases(first: NamedBase, second: NamedBase) -> BaseDifference:
    """Do two adapters name one base? A path counts by its last part, since folders are moved."""
    names = [base.name and last_part(base.name) for base in (first, second)]
    prints = [base.fingerprint for base in (first, second)]
    if None not in prints and prints[0] != prints[1]:
        state = "other"
    elif None not in names and names[0] == names[1]:
        state = "same"
    else:
        state = "unknown"
    return BaseDifference(names[0], names[1], state)


def compare_chats(first: ChatSettings, second: ChatSettings) -> list[SettingDifference]:
    """The chat settings that are not the same: template, system prompt, stop strings, sampling defaults."""
    found = []
    if first.template != second.template:
        found.append(SettingDifference("chat_template", first.template, second.template))
    elif first.state != second.state:
        found.append(SettingDifference("template_state", first.state, second.state, _VOUCHED))
    if first.system_prompt != second.system_prompt:
        found.append(SettingDifference("system_prompt", first.system_prompt, second.system_prompt))
    if set(first.stop) != set(second.stop):
        found.append(SettingDifference("stop", list(first.stop) or None, list(second.stop) or None))
    for name in sorted({*first.sampling, *second.sampling}):
        values = first.sampling.get(name), second.sampling.get(name)
        if values[0] != values[1]:
            found.append(SettingDifference(name, *values))
    return found


def template_lines(first: str, second: str) -> list[str]:
    """The lines in which two templates differ, as `diff -u` writes them, without its head."""
    lines = difflib.unified_diff(first.splitlines(), second.splitlines(), lineterm="", n=1)
    return list(lines)[2:]


def _read(name: str, config: Mapping[str, Any]) -> Any:
    """A setting; None where it is empty or off."""
    value = config.get(name, _DEFAULTS.get(name))
    return None if value is False or value in ("", [], {}) else value


def _canonical(name: str, value: Any) -> Any:
    return sorted(map(str, value)) if name in _UNORDERED and isinstance(value, list) else value
