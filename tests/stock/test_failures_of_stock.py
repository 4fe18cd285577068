"""What plain vLLM 0.32 does wrong with adapters on the CPU, and that it is right with our plugin.

Each test has a stock arm that must show the failure. If one does not any more, vLLM was mended: the
test fails and says so.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.arm import Arm, ArmDied, ArmHangs, EngineFailed
from tests.stock.conftest import MENDED, SLOTS

PROMPT = [3, 14, 15, 92, 65, 35]
OTHER = [271, 82, 81, 82, 84]
_numbers = itertools.count(1)

Arms = Callable[[str], Arm]
MakeAdapter = Callable[..., Path]


def named(arm: Arm, name: str, folder: Path, **options: bool) -> str:
    """Make an adapter known to an arm under a name of its own."""
    number = next(_numbers)
    arm("name", name=f"{name}-{number}", path=str(folder), number=number, **options)
    return f"{name}-{number}"


def tokens(arm: Arm, adapter: str | None = None) -> list[int]:
    (answer,) = arm.generate([(PROMPT, adapter)])
    found: list[int] = answer["tokens"]
    return found


def fill_slots(arm: Arm, make_adapter: MakeAdapter) -> list[str]:
    names = [named(arm, f"full-{i}", make_adapter(f"full-{i}", seed=i + 1)) for i in range(SLOTS)]
    arm.generate([(PROMPT, name) for name in names])
    return names


@pytest.mark.parametrize("kind", ["stock", "ours"])
def test_s1_f01_a_base_request_beside_adapters_is_the_base(
    kind: str, arms: Arms, make_adapter: MakeAdapter
) -> None:
    arm = arms(kind)
    alone = tokens(arm)
    names = fill_slots(arm, make_adapter)
    answers = arm.generate([(PROMPT, None), *((OTHER, name) for name in names)])
    if kind == "stock":
        assert answers[0]["tokens"] != alone, MENDED
    else:
        assert answers[0]["tokens"] == alone
        assert all(answer["finish_reason"] == "length" for answer in answers)


def lose_an_evicted_adapter(arm: Arm, make_adapter: MakeAdapter) -> str:
    """An adapter that served, left memory, and whose files are gone."""
    folder = make_adapter("lost", seed=9)
    lost = named(arm, "lost", folder)
    tokens(arm, lost)
    fill_slots(arm, make_adapter)  # there is room for as many in memory, so `lost` leaves
    shutil.rmtree(folder)
    return lost


def test_s3_f02_stock_dies_of_an_adapter_whose_files_are_gone(doomed: Arm, make_adapter: MakeAdapter) -> None:
    lost = lose_an_evicted_adapter(doomed, make_adapter)
    with pytest.raises((EngineFailed, ArmDied)):
        tokens(doomed, lost)
        pytest.fail(MENDED)
    with pytest.raises((EngineFailed, ArmDied)):
        tokens(doomed)  # nobody is served any more
        pytest.fail(MENDED)


def test_s3_f02_ours_fails_its_requests_only(arms: Arms, make_adapter: MakeAdapter) -> None:
    ours = arms("ours")
    alone = tokens(ours)
    lost = lose_an_evicted_adapter(ours, make_adapter)
    kept = named(ours, "kept", make_adapter("kept", seed=3))
    of_kept = tokens(ours, kept)
    answers = ours.generate([(PROMPT, None), (PROMPT, lost), (PROMPT, kept), (OTHER, lost)])
    assert answers[0]["tokens"] == alone
    assert answers[2]["tokens"] == of_kept
    for failed in (answers[1], answers[3]):
        assert failed["finish_reason"] == "error" and failed["tokens"] == []
        assert lost in failed["stop_reason"], "the reason names the adapter"


def test_ours_a_repaired_adapter_serves_again_and_no_wrong_block_is_reused(
    arms: Arms, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    ours = arms("ours")
    folder = make_adapter("flaky", seed=21)
    prompt = [(7 * i) % 512 for i in range(200)]  # more than one block of the prefix cache
    twin = named(ours, "twin", folder)
    (expected,) = ours.generate([(prompt, twin)])
    hidden = folder.rename(tmp_path / "hidden")
    flaky = named(ours, "flaky", folder)
    (failed,) = ours.generate([(prompt, flaky)])
    assert failed["finish_reason"] == "error"
    hidden.rename(folder)
    (answer,) = ours.generate([(prompt, flaky)])
    assert answer["tokens"] == expected["tokens"]


def test_f03_stock_keeps_weights_in_a_file_that_can_change(base: Path, tmp_path: Path) -> None:
    """With room in memory for more adapters than slots, a truncated file is a signal nobody can catch."""
    settings = {"max_loras": 1, "max_cpu_loras": 4, "max_lora_rank": 16, "dtype": "bfloat16"}
    with Arm(base, tmp_path / "f03.log", plugin=False, one_process=True, **settings) as stock:
        code = _cut_a_cached_adapter_short(stock, base, tmp_path)
        assert code is not None, MENDED
        assert code == -7, "SIGBUS"


def test_f03_ours_owns_its_weights(base: Path, tmp_path: Path) -> None:
    settings = {"max_loras": 1, "max_cpu_loras": 4, "max_lora_rank": 16, "dtype": "bfloat16"}
    with Arm(base, tmp_path / "f03.log", plugin=True, one_process=True, **settings) as ours:
        assert _cut_a_cached_adapter_short(ours, base, tmp_path) is None


def _cut_a_cached_adapter_short(arm: Arm, base: Path, folder: Path) -> int | None:
    """Exit code of the engine when the adapter is asked again; None if it answers as before."""
    from benchmarks.models import make_random_adapter

    names = []
    for seed in (1, 2):
        path = make_random_adapter(folder / f"cut-{seed}", base, 16, seed)
        names.append(named(arm, f"cut-{seed}", path))
    before = tokens(arm, names[0])
    tokens(arm, names[1])  # takes the only slot
    weights = folder / "cut-1" / "adapter_model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(0)
    try:
        after = tokens(arm, names[0])
    except ArmDied as error:
        return error.code
    assert after == before
    return None


@pytest.mark.parametrize("kind", ["stock", "ours"])
def test_f04_a_failed_reload_in_place_leaves_the_old_adapter(
    kind: str, arms: Arms, make_adapter: MakeAdapter
) -> None:
    arm = arms(kind)
    folder = make_adapter("reloaded", seed=11)
    name = named(arm, "reloaded", folder)
    before = tokens(arm, name)
    spoil_last_tensor(make_adapter("spoiled", seed=12), folder)
    arm("name", name=name, path=str(folder), number=int(name.rsplit("-", 1)[1]), reload=True)
    with pytest.raises(EngineFailed):
        arm("load", name=name)
    arm("name", name=name, path=str(folder), number=int(name.rsplit("-", 1)[1]))
    if kind == "stock":
        with contextlib.suppress(EngineFailed):  # it may die of it, which is no better
            assert tokens(arm, name) != before, MENDED
    else:
        assert tokens(arm, name) == before


def spoil_last_tensor(source: Path, target: Path) -> None:
    """Other weights in place of `target`'s, the last of which is too wide for the model."""
    tensors = load_file(source / "adapter_model.safetensors")
    last = sorted(name for name in tensors if "down_proj.lora_B" in name)[-1]
    tensors[last] = torch.cat([tensors[last], tensors[last]])
    (target / "adapter_model.safetensors").unlink()
    save_file(tensors, target / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", ["stock", "ours"])
def test_s8_an_adapter_that_no_module_uses_is_not_loaded(
    kind: str, arms: Arms, make_adapter: MakeAdapter
) -> None:
    """Straight into the engine, past admission, as for an architecture that admission does not know."""
    arm = arms(kind)
    folder = make_adapter("beyond", seed=15)
    weights = folder / "adapter_model.safetensors"
    tensors = {name.replace("layers.", "layers.4"): tensor for name, tensor in load_file(weights).items()}
    weights.unlink()
    save_file(tensors, weights)
    name = named(arm, "beyond", folder)
    if kind == "stock":
        assert arm("load", name=name), MENDED
        assert tokens(arm, name) == tokens(arm), MENDED
    else:
        with pytest.raises(EngineFailed, match="it changes nothing"):
            arm("load", name=name)


@pytest.mark.parametrize("kind", ["ours", "stock"])
def test_f11_a_hostile_pattern_is_refused_at_once(kind: str, arms: Arms, make_adapter: MakeAdapter) -> None:
    """Last of the stock arm's shared engine: it never comes back."""
    arm = arms(kind)
    folder = make_adapter("hostile", seed=13)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["rank_pattern"] = {r"(.|.)+\d\d\d": 8}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    name = named(arm, "hostile", folder)
    if kind == "stock":
        with pytest.raises(ArmHangs):
            arm("load", name=name, timeout_s=20.0)
            pytest.fail(MENDED)
        arm.stop()  # else it keeps a core busy until the last test
    else:
        with pytest.raises(EngineFailed, match="pattern_unsupported"):
            arm("load", name=name, timeout_s=20.0)


def test_f18_stock_dies_when_every_slot_is_pinned(doomed: Arm, make_adapter: MakeAdapter) -> None:
    names = fill_slots(doomed, make_adapter)
    for name in names:
        doomed("pin", name=name)
    late = named(doomed, "late", make_adapter("late", seed=7))
    with pytest.raises((EngineFailed, ArmDied)):
        tokens(doomed, late)
        pytest.fail(MENDED)
    with pytest.raises((EngineFailed, ArmDied)):
        tokens(doomed)
        pytest.fail(MENDED)


def test_f18_ours_keeps_one_slot_free_to_move(arms: Arms, make_adapter: MakeAdapter) -> None:
    ours = arms("ours")
    names = fill_slots(ours, make_adapter)
    ours("pin", name=names[0])
    with pytest.raises(EngineFailed, match="the last one serves all other adapters"):
        ours("pin", name=names[1])
    late = named(ours, "late", make_adapter("late", seed=7))
    assert len(tokens(ours, late)) == 8


def test_s2_lora_neither_stops_compilation_nor_costs_a_step_without_adapters(
    base: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    """Causes, not times: stock compiles nothing with LoRA on; ours does, and base steps call no kernel."""
    modes = {}
    for plugin in (False, True):
        settings = {"enforce_eager": False, "max_loras": 1, "max_lora_rank": 8, "dtype": "float32"}
        with Arm(base, tmp_path / f"compiled-{plugin}.log", plugin=plugin, **settings) as arm:
            modes[plugin] = arm("compile_mode")
            if plugin:
                before = arm("call", method="vllm_lora_kernel_calls")
                alone = tokens(arm)
                assert arm("call", method="vllm_lora_kernel_calls") == before
                name = named(arm, "compiled", make_adapter("compiled", seed=2))
                assert tokens(arm, name) != alone
                assert arm("call", method="vllm_lora_kernel_calls") > before
    assert modes[False] == "NONE", MENDED
    assert modes[True] != "NONE"
