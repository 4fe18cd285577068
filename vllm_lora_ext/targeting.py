"""Which modules an adapter's config targets, by PEFT's own rule.

`target_modules` and `exclude_modules` may be one regular expression. A tenant's can run for ever, so it
is tried with a deadline and never handed on.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vllm_lora_ext.peft_config import dotted_suffixes

_EXPRESSION_BUDGET_S, _MAX_EXPRESSION = 0.05, 4096
_FIRST_NUMBER = re.compile(r"\.[^.]*\.(\d+)\.")


def untargeted(config: Mapping[str, Any], modules: Sequence[str]) -> list[str]:
    """The modules that PEFT would not load, because the config does not target them.

    The rule is PEFT's own (peft/tuners/tuners_utils.py, `check_target_module_exists`). An
    expression that takes too long targets everything: nobody here runs it again.
    """
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    heads = set(config.get("modules_to_save") or ())
    has_parameters = bool(config.get("target_parameters"))
    names = [module for module in modules if not (has_parameters and ".experts" in module)]
    hit = _selected(targets, names)
    missed = _selected(excluded, names) if excluded else set()
    if heads:
        missed |= {name for name in names if not heads.isdisjoint(name.split("."))}
    if isinstance(targets, list) and config.get("layers_to_transform") not in (None, []):
        by_ending = hit.difference(targets)
        missed |= by_ending - _in_layers(config, by_ending)
    return [name for name in names if name not in hit or name in missed]


def _selected(targets: Any, modules: Iterable[str]) -> set[str]:
    """The modules that a list of names or an expression selects; all of them if it cannot be told in time."""
    if isinstance(targets, list):
        wanted = set(targets)
        return {module for module in modules if not wanted.isdisjoint(dotted_suffixes(module))}
    if not isinstance(targets, str):
        return set()
    if targets.lower() == "all-linear":
        return set(modules)
    if len(targets) > _MAX_EXPRESSION:
        return set(modules)
    import regex  # unlike re, it can be given a deadline

    selected, deadline = set(), time.monotonic() + _EXPRESSION_BUDGET_S
    try:
        expression = regex.compile(targets)
        for module in modules:
            if (left := deadline - time.monotonic()) <= 0:
                return set(modules)
            if expression.fullmatch(module, timeout=left):
                selected.add(module)
    except TimeoutError:
        return set(modules)
    except (regex.error, RecursionError, OverflowError):
        return set()
    return selected


def _in_layers(config: Mapping[str, Any], modules: Iterable[str]) -> set[str]:
    """The modules of the layers that `layers_to_transform` lists: the first number in a name, or the first
    behind the first name of `layers_pattern` that has one."""
    layers, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
    wanted = set(layers) if isinstance(layers, list) else {layers}
    names = [pattern] if isinstance(pattern, str) else pattern
    # Begins with a fixed text, which is found without trying every place.
    expressions = [re.compile(rf"\.{re.escape(name)}\.(\d+)\.") for name in names or () if name]
    found = set()
    for module in modules:
        if expressions:
            match = next((item for e in expressions if (item := e.search("." + module))), None)
        else:
            match = _FIRST_NUMBER.search(module)
        if match and int(match[1]) in wanted:
            found.add(module)
    return found
