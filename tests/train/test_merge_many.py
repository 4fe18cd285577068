"""Several adapters in one model: against PEFT's functions on whole changes, at once and not in pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import merge_utils

from tests.train.test_merge import KINDS, logits, make_adapter, make_base
from train import merge_combine
from train.merge import main, merge
from train.merge_check import compare
from train.merge_combine import Recipe
from vllm_lora_ext.errors import BadSetting

WEIGHTS = (0.7, -0.4)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_base(tmp_path_factory.mktemp("many") / "base", "llama", shard="100KB")


@pytest.fixture(scope="module")
def pair(base: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of different ranks, of which one leaves some modules alone."""
    folder = tmp_path_factory.mktemp("pair")
    one = make_adapter(folder / "one", base)
    return [one, make_adapter(folder / "two", base, seed=2, r=8, target_modules=["q_proj", "down_proj"])]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many pieces to a tensor, even to these."""
    monkeypatch.setattr(merge_combine, "_BLOCK_ELEMENTS", 700)


def weights_of(folder: str | Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    files = sorted(Path(folder).glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def changes_of(adapter: Path) -> dict[str, torch.Tensor]:
    """Name of the base's tensor -> scaling * B A; alpha is 8."""
    from safetensors.torch import load_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for name, a in tensors.items():
        if ".lora_A." in name:
            b = tensors[name.replace(".lora_A.", ".lora_B.")]
            short = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            found[short] = 8 / len(a) * b @ a
    return found


def expected_weights(base: str, pair: list[Path], mix: Any) -> dict[str, torch.Tensor]:
    expected = weights_of(base)
    changes = [changes_of(adapter) for adapter in pair]
    for name in changes[0].keys() | changes[1].keys():
        there = [
            (change[name], weight) for change, weight in zip(changes, WEIGHTS, strict=True) if name in change
        ]
        expected[name] = expected[name] + mix(
            [change for change, _ in there], torch.tensor([weight for _, weight in there])
        )
    return expected


@pytest.mark.parametrize("combination", ["linear", "cat", "ties", "magnitude_prune"])
@pytest.mark.parametrize("density", [0.2, 0.9, 1.0])
def test_adapters_are_combined_as_peft_combines_whole_changes(
    base: str, pair: list[Path], combination: str, density: float, tmp_path: Path
) -> None:
    is_sparse = combination in ("ties", "magnitude_prune")
    recipe = Recipe(WEIGHTS, combination, density if is_sparse else None)
    merge(pair, base, tmp_path / "merged", recipe)
    functions: dict[str, Any] = {
        "ties": lambda changes, weights: merge_utils.ties(changes, weights, density),
        "magnitude_prune": lambda changes, weights: merge_utils.magnitude_prune(changes, weights, density),
    }
    expected = expected_weights(base, pair, functions.get(combination, merge_utils.task_arithmetic))
    for name, weight in weights_of(tmp_path / "merged").items():
        differing = (weight - expected[name]).abs() > 1e-5
        # At the very edge of what is kept, the last bit of a product in pieces may decide otherwise.
        assert int(differing.sum()) <= (2 if is_sparse else 0), name


def test_the_sum_is_that_of_peft_s_cat(base: str, pair: list[Path], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    merge(pair, base, tmp_path / "merged", Recipe(WEIGHTS))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(pair[0]), "one")
    model.load_adapter(str(pair[1]), "two")
    model.base_model.add_weighted_adapter(["one", "two"], list(WEIGHTS), "both", combination_type="cat")
    model.set_adapter("both")
    with torch.inference_mode():
        expected = model.eval()(torch.arange(40)[None]).logits
    torch.testing.assert_close(logits(tmp_path / "merged"), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("combination", ["dare_linear", "dare_ties"])
def test_dare_drops_at_random_and_keeps_the_mean(
    base: str, pair: list[Path], combination: str, tmp_path: Path
) -> None:
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        merge(pair[:1], base, tmp_path / name, Recipe((1.0,), combination, 0.5, seed))
    a, b, c = (weights_of(tmp_path / name) for name in "abc")
    before, changes = weights_of(base), changes_of(pair[0])
    kept = total = 0
    sums = torch.zeros(2, dtype=torch.float64)
    for name, change in changes.items():
        assert torch.equal(a[name], b[name])
        assert not torch.equal(a[name], c[name])
        delta = a[name] - before[name]
        is_kept = delta.abs() > 1e-6
        torch.testing.assert_close(delta[is_kept], 2 * change[is_kept], atol=1e-5, rtol=1e-4)
        kept, total = kept + int(is_kept.sum()), total + change.numel()
        sums += torch.tensor([float(delta.abs().sum()), float(change.abs().sum())])
    assert kept / total == pytest.approx(0.5, abs=0.01)
    assert float(sums[0] / sums[1]) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    "kind", ["dora", "tokens", "embedding saved", "norms saved", "embedding", "biases of all"]
)
def test_what_is_no_product_of_two_matrices_is_combined_by_its_change(kind: str, tmp_path: Path) -> None:
    """Half of it is half the way from the base's weight to the merged one, for whatever kind."""
    base = make_base(tmp_path / "base", "qwen2")
    adapter = make_adapter(tmp_path / "adapter", base, **KINDS[kind])
    merge(adapter, base, tmp_path / "whole")
    merge([adapter], base, tmp_path / "half", Recipe((0.5,)))
    merge([adapter, adapter], base, tmp_path / "twice", Recipe((0.25, 0.25)))
    before, whole, half, twice = (
        weights_of(folder) for folder in (base, *(tmp_path / name for name in ("whole", "half", "twice")))
    )
    moved = 0
    for name, weight in whole.items():
        start = before.get(name, before["model.embed_tokens.weight"])
        moved += not torch.equal(start, weight)
        torch.testing.assert_close(half[name], (start + weight) / 2, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(twice[name], half[name], atol=1e-5, rtol=1e-5)
    assert moved > 0


@pytest.mark.parametrize(
    ("combination", "density"), [("linear", None), ("cat", None), ("ties", 0.3), ("magnitude_prune", 0.3)]
)
def test_the_check_finds_what_is_right_and_what_is_not(
    base: str, pair: list[Path], combination: str, density: float | None, tmp_path: Path
) -> None:
    recipe = Recipe(WEIGHTS, combination, density)
    merge(pair, base, tmp_path / "merged", recipe)
    good = compare(pair, base, tmp_path / "merged", recipe)
    assert good.difference < 1e-3 * good.spread and "warning" not in str(good)
    assert good.agreeing == good.positions
    bad = compare(pair, base, Path(base), recipe)
    assert bad.difference > 0.05 * bad.spread and "warning" in str(bad)


@pytest.mark.parametrize("kind", ["embedding", "head", "embedding and head"])
@pytest.mark.parametrize(("combination", "density"), [("linear", None), ("ties", 0.5)])
def test_the_check_knows_tied_tensors(
    kind: str, combination: str, density: float | None, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", "qwen2")
    pair = [make_adapter(tmp_path / name, base, seed, **KINDS[kind]) for seed, name in enumerate("ab")]
    recipe = Recipe(WEIGHTS, combination, density)
    merge(pair, base, tmp_path / "merged", recipe)
    check = compare(pair, base, tmp_path / "merged", recipe)
    assert check.difference < 1e-3 * check.spread


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"combination": "svd"}, "--combination"),
        ({"combination": "ties"}, "--density"),
        ({"combination": "ties", "density": 0.0}, "--density"),
        ({"combination": "ties", "density": 1.5}, "--density"),
        ({"density": 0.5}, "--density"),
        ({"weights": (1.0, 0.0)}, "--weights"),
        ({"weights": (float("nan"), 1.0)}, "--weights"),
        ({"weights": (1.0, 1.0, 1.0)}, "--weights"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(
    base: str, pair: list[Path], settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(BadSetting, match=said):
        merge(pair, base, tmp_path / "merged", Recipe(**{"weights": WEIGHTS, **settings}))
    assert not list(tmp_path.iterdir())


def test_the_command_takes_several_and_says_what_the_check_found(
    base: str, pair: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    flags = ["--base-model", base, "--output-dir", str(out), "--combination", "ties", "--density", "0.5"]
    assert main([*map(str, pair), *flags, "--weights", "0.7", "-0.4"]) == 0
    told = capsys.readouterr()
    assert told.out.strip() == str(out)
    assert "check: largest logit difference" in told.err
    assert main([str(pair[0]), "--output-dir", str(tmp_path / "alone"), "--no-check"]) == 0
    assert "check" not in capsys.readouterr().err
