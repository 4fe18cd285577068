"""Patterns and targets: our reading of them is PEFT's."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from vllm_lora_ext.peft_config import LiteralPattern, resolve_pattern, untargeted

MODULES = [
    f"model.layers.{layer}.{name}"
    for layer in (0, 1, 11)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.experts.1.up_proj")
] + ["lm_head", "model.embed_tokens"]

parts = st.sampled_from(
    [
        "q_proj",
        "k_proj",
        "up_proj",
        "self_attn.q_proj",
        "layers.1.self_attn.q_proj",
        "1.up_proj",
        "proj",
        "lm_head",
    ]
) | st.sampled_from(MODULES).map(lambda module: f"^{module}")
keys = st.lists(parts, min_size=1, max_size=3).map("|".join)
patterns = st.dictionaries(keys, st.integers(1, 64), max_size=4)


def as_peft(pattern: dict[str, int], module: str) -> int | None:
    return pattern.get(get_pattern_key(pattern.keys(), module))


@given(pattern=patterns)
def test_a_pattern_means_what_it_means_in_peft(pattern: dict[str, int]) -> None:
    resolved, literal = resolve_pattern(pattern, MODULES), LiteralPattern(pattern)
    for module in MODULES:
        assert resolved.get(module) == as_peft(pattern, module) == literal.value_of(module)


def test_a_pattern_that_would_take_seconds_is_told() -> None:
    modules = [f"model.layers.{i}.x" for i in range(2000)]
    with pytest.raises(ValueError, match="too much"):
        resolve_pattern(dict.fromkeys(modules, 1), modules)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "up_proj"]},
        {"target_modules": ["model.layers.1.self_attn.q_proj", "lm_head"]},
        {"target_modules": r"model\.layers\.(0|11)\..*_proj"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1, 11]},
        {"target_modules": ["up_proj"], "layers_to_transform": 1},
        {"target_modules": ["up_proj"], "layers_to_transform": [1], "layers_pattern": "experts"},
        {
            "target_modules": ["q_proj", "k_proj"],
            "layers_to_transform": [0],
            "layers_pattern": ["layers", "x"],
        },
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.1.self_attn.q_proj", "k_proj"]},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.1\..*"},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["nothing"]},
    ],
)
def test_what_is_targeted_is_what_peft_targets(config: dict[str, Any]) -> None:
    of_peft = LoraConfig(**config)
    taken = [module for module in MODULES if check_target_module_exists(of_peft, module)]
    missed = untargeted(config, MODULES)
    assert [module for module in MODULES if module not in missed] == taken
