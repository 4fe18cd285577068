"""What is inferred, and that whatever the user states wins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from serve.plan import Inferred, infer, plain_command
from vllm_lora_ext.spec import AdapterSpec


def specs(*ranks: int) -> list[AdapterSpec]:
    return [AdapterSpec(f"a{i}", Path(), None, rank, 16, (), (), 1) for i, rank in enumerate(ranks)]


def values(items: list[Inferred]) -> dict[str, Any]:
    return {item.name: item.value for item in items}


def test_a_small_fleet() -> None:
    assert values(infer(specs(8, 16), 0, "base", {})) == {
        "host": "127.0.0.1",
        "served_model_name": ["base"],
        "enable_lora": True,
        "max_lora_rank": 32,
        "max_loras": 2,
        "max_cpu_loras": 2,
    }


def test_the_largest_rank_is_rounded_up_to_one_that_vllm_allows() -> None:
    assert values(infer(specs(8, 100), 0, "base", {}))["max_lora_rank"] == 128


def test_many_adapters_share_eight_slots_and_all_stay_in_memory() -> None:
    found = values(infer(specs(*[8] * 20), 0, "base", {}))
    assert (found["max_loras"], found["max_cpu_loras"]) == (8, 20)


def test_no_adapter_yet_still_leaves_room_for_one() -> None:
    found = values(infer([], 0, "base", {}))
    assert (found["max_loras"], found["max_cpu_loras"], found["max_lora_rank"]) == (1, 1, 32)


def test_what_the_user_states_wins_and_the_rest_fits_to_it() -> None:
    stated = {"host": "0.0.0.0", "max_loras": 4, "max_lora_rank": 16, "served_model_name": ["m"]}
    assert values(infer(specs(8), 0, "base", stated)) == {"enable_lora": True, "max_cpu_loras": 4}


def test_every_value_has_a_reason() -> None:
    assert all(item.reason for item in infer(specs(8), 1, "base", {}))


def test_the_plain_command_can_be_pasted() -> None:
    inferred = [Inferred("enable_lora", True, ""), Inferred("served_model_name", ["b"], "")]
    line = plain_command("my base", inferred, [("x", "/a b")], ["--port", "1"])
    assert line == (
        "vllm serve 'my base' --enable-lora --served-model-name b --port 1 --lora-modules 'x=/a b'"
    )
