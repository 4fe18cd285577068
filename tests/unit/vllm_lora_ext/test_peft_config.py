"""Patterns and targets: our reading of them is PEFT's."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from tests.work import Work
from vllm_lora_ext.peft_config import LiteralPattern, judge_config, judge_patterns, resolve_pattern
from vllm_lora_ext.targeting import untargeted

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


@pytest.mark.timeout(20)  # one expression of all names: some milliseconds for every module
@pytest.mark.parametrize(
    ("keys", "modules"),
    [
        (
            [f"layers.{i}.m{j}" for i in range(80) for j in range(7)],
            [(i, j) for i in range(80) for j in range(7)],
        ),
        ([f"m{j}" for j in range(7)], [(i, j) for i in range(10_430) for j in range(7)]),
        (["|".join(f"m1{i}" for i in range(40_000)) + "|m1"], [(i, 1) for i in range(50_000)]),
    ],
    ids=["EVA on 80 layers", "73,000 modules", "40,000 names in a key"],
)
def test_many_names_and_modules_take_work_in_proportion(
    keys: list[str], modules: list[tuple[int, int]]
) -> None:
    names = [f"model.layers.{layer}.m{module}" for layer, module in modules]
    pattern = dict(zip(keys, range(1, 1000), strict=False))
    assert judge_patterns({"rank_pattern": pattern}) == []
    with Work() as work:
        resolved = resolve_pattern(pattern, names)
    size = len(names) + sum(key.count("|") + 1 for key in pattern)
    assert work.calls < 40 * size, "work that an attacker chooses has a bound"
    assert set(resolved) == set(names)
    assert resolved[names[0]] == 1


@pytest.mark.parametrize("targets", [None, []])
def test_parameters_alone_may_be_targeted(targets: list[str] | None) -> None:
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": targets}
    assert judge_config({**config, "target_parameters": ["mlp.experts.down_proj"]}) == []
    assert {finding.code for finding in judge_config(config)} == {"target_modules_invalid"}


@pytest.mark.timeout(20)  # of each module it would be hours
def test_an_expression_that_takes_its_time_has_it_once() -> None:
    """Not a little for every module: there may be fifty thousand."""
    modules = [f"model.layers.{i}.{'a' * 22}" for i in range(20_000)]
    assert untargeted({"target_modules": r"(\w|\.)+(a|a){9}(a|a)*x|.*"}, modules) == []


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
