"""Two configs and two ways to be asked: what is the same in other words is no difference."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_lora_ext.config_difference import (
    IN_MODULES,
    OF_TRAINING,
    NamedBase,
    compare_bases,
    compare_chats,
    compare_configs,
    template_lines,
)
from vllm_lora_ext.contract import ChatSettings

LORA = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize(
    "said",
    [
        {"bias": "none", "lora_dropout": 0.0, "init_lora_weights": True},
        {"use_dora": False, "rank_pattern": {}, "modules_to_save": None, "layers_pattern": []},
        {"target_modules": ["v_proj", "q_proj"]},
        {"base_model_name_or_path": "elsewhere"},  # which is compared as a base
    ],
)
def test_defaults_order_and_empty_settings_are_no_difference(said: dict[str, Any]) -> None:
    assert compare_configs(LORA, {**LORA, **said}) == []
    assert compare_configs({**LORA, **said}, LORA) == []


@pytest.mark.parametrize(
    ("said", "note"),
    [
        ({"use_dora": True}, ""),
        ({"peft_type": "LOHA"}, ""),
        ({"bias": "all"}, ""),
        ({"init_lora_weights": "pissa"}, ""),
        ({"a_new_setting": 0}, ""),
        ({"init_lora_weights": "gaussian"}, OF_TRAINING),
        ({"lora_dropout": 0.1}, OF_TRAINING),
        ({"peft_version": "0.20"}, OF_TRAINING),
        ({"r": 16}, IN_MODULES),
        ({"alpha_pattern": {"q_proj": 3}}, IN_MODULES),
    ],
)
def test_what_says_nothing_of_the_answers_does_not_count(said: dict[str, Any], note: str) -> None:
    (found,) = compare_configs(LORA, {**LORA, **said})
    ((name, value),) = said.items()
    assert (found.name, found.second, found.note, found.counts) == (name, value, note, not note)


def test_of_other_types_every_setting_counts_since_no_modules_are_compared() -> None:
    first = {**LORA, "peft_type": "ADALORA"}
    (found,) = compare_configs(first, {**first, "lora_alpha": 32})
    assert found.counts


@pytest.mark.parametrize(
    ("first", "second", "state"),
    [
        (NamedBase("org/base", "1"), NamedBase("org/base", "1"), "same"),
        (NamedBase("/here/base", "1"), NamedBase("./there/base"), "same"),  # a folder that was moved
        (NamedBase("org/base", "1"), NamedBase("org/base", "2"), "other"),
        (NamedBase("org/base", "1"), NamedBase("org/base-instruct", "1"), "unknown"),  # of one shape
        (NamedBase("org/base"), NamedBase("org/else"), "unknown"),
        (NamedBase(None), NamedBase(None), "unknown"),
    ],
)
def test_bases_are_the_same_by_name_and_other_by_their_configs(
    first: NamedBase, second: NamedBase, state: str
) -> None:
    assert compare_bases(first, second).state == state
    assert compare_bases(second, first).state == state


def test_a_path_is_told_by_its_last_part() -> None:
    found = compare_bases(NamedBase("/home/me/base"), NamedBase(None))
    assert (found.first, found.second) == ("base", None)


def test_every_chat_setting_is_compared() -> None:
    first = ChatSettings("a\nb\nc\n", True, "Be kind.", ("END", "STOP"), {"temperature": 0.5, "top_k": 4})
    assert compare_chats(first, first) == []
    found = compare_chats(first, ChatSettings("a\nB\nc\n", False, None, ("STOP",), {"temperature": 0.7}))
    assert [(item.name, item.first, item.second) for item in found] == [
        ("chat_template", "a\nb\nc\n", "a\nB\nc\n"),
        ("system_prompt", "Be kind.", None),
        ("stop", ["END", "STOP"], ["STOP"]),
        ("temperature", 0.5, 0.7),
        ("top_k", 4, None),
    ]
    assert all(item.counts for item in found)


def test_who_vouches_for_a_template_and_the_order_of_stops_change_no_answer() -> None:
    first = ChatSettings("a", True, None, ("END", "STOP"))
    (found,) = compare_chats(first, ChatSettings("a", False, None, ("STOP", "END")))
    assert (found.name, found.first, found.second, found.counts) == (
        "template_state",
        "trained",
        "unproven",
        False,
    )


def test_templates_are_told_line_by_line() -> None:
    assert template_lines("a\nb\nc\nd\n", "a\nb\nC\nd\n") == ["@@ -2,3 +2,3 @@", " b", "-c", "+C", " d"]
    assert template_lines("a\n", "a") == []
