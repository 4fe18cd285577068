"""What is inferred, and that whatever the user states wins."""

from __future__ import annotations

from typing import Any

from serve.plan import (
    Inferred,
    infer_adapters,
    infer_compilation,
    infer_kv_cache,
    infer_server,
    plain_command,
)


def values(items: list[Inferred]) -> dict[str, Any]:
    return {item.name: item.value for item in items}


FREE = 16 << 30


def test_a_small_fleet() -> None:
    assert values(infer_adapters([8, 16], [1_000_000, 2_000_000], FREE, {})) == {
        "enable_lora": True,
        "max_lora_rank": 32,
        "max_loras": 4,
        "max_cpu_loras": 1024,
    }


def test_the_largest_rank_is_rounded_up_to_one_that_vllm_allows() -> None:
    assert values(infer_adapters([8, 100], [1, 1], FREE, {}))["max_lora_rank"] == 128


def test_many_adapters_share_eight_slots_and_as_many_stay_in_memory_as_fit() -> None:
    found = values(infer_adapters([8] * 2000, [10 << 20] * 2000, FREE, {}))
    assert (found["max_loras"], found["max_cpu_loras"]) == (8, (4 << 30) // (10 << 20))


def test_what_is_in_memory_is_bounded_on_a_large_machine_and_never_below_the_slots() -> None:
    large = values(infer_adapters([512], [4 << 30], 1 << 40, {"max_loras": 3}))
    assert large["max_cpu_loras"] == 3, "2 of 4 GiB fit 8 GiB, and 3 have to be there at once"
    assert values(infer_adapters([8], [1], 1 << 40, {}))["max_cpu_loras"] == 1024


def test_no_adapter_yet_still_leaves_room_for_some() -> None:
    found = values(infer_adapters([], [], FREE, {}))
    assert (found["max_loras"], found["max_lora_rank"]) == (4, 32)
    assert found["max_cpu_loras"] == (4 << 30) // (64 << 20)


def test_a_server_is_for_this_machine_and_named_after_its_base() -> None:
    found = values(infer_server("base", {}))
    assert found == {"host": "127.0.0.1", "served_model_name": ["base"]}


def test_the_kv_cache_takes_a_share_of_what_is_free() -> None:
    assert values(infer_kv_cache(8 << 30, {})) == {"kv_cache_memory_bytes": 2 << 30}
    assert values(infer_kv_cache(512 << 30, {})) == {"kv_cache_memory_bytes": 4 << 30}


def test_a_small_model_and_a_machine_without_a_compiler_are_not_compiled() -> None:
    assert values(infer_compilation(7_000_000, True, {})) == {"enforce_eager": True}
    assert infer_compilation(1_000_000_000, True, {}) == []
    assert infer_compilation(None, True, {}) == []
    assert infer_compilation(7_000_000, True, {"enforce_eager": False}) == []
    (missing,) = infer_compilation(1_000_000_000, False, {})
    assert missing.value is True and "install g++" in missing.reason


def test_what_the_user_states_wins_and_the_rest_fits_to_it() -> None:
    stated = {"host": "0.0.0.0", "max_loras": 4, "max_lora_rank": 16, "served_model_name": ["m"]}
    assert values(infer_adapters([8], [None], 0, stated)) == {"enable_lora": True, "max_cpu_loras": 4}
    assert infer_server("base", stated) == []
    assert infer_kv_cache(8 << 30, {"gpu_memory_utilization": 0.5}) == []
    assert infer_kv_cache(8 << 30, {"kv_cache_memory_bytes": 1}) == []


def test_every_value_has_a_reason() -> None:
    inferred = [
        *infer_server("b", {}),
        *infer_adapters([8, None], [1, None], FREE, {}),
        *infer_kv_cache(1, {}),
    ]
    assert all(item.reason for item in inferred)


def test_the_plain_command_can_be_pasted() -> None:
    inferred = [Inferred("enable_lora", True, ""), Inferred("served_model_name", ["b"], "")]
    line = plain_command("my base", inferred, [("x", "/a b")], ["--port", "1"])
    assert line == (
        "vllm serve 'my base' --enable-lora --served-model-name b --port 1 --lora-modules 'x=/a b'"
    )
