"""What each method trains, what it leaves alone, and that a server would compute what was trained."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.methods import IDS, PATTERNS, identity, logits, settings, trained
from train.adapter_files import adapter_tensors
from train.export import export_adapter
from train.methods import add_adapter, base_dtype, count_parameters, prepare_model
from train.model import attach_adapter, cpu_computes_in_bf16, load_base, training_dtype
from train.principal import PRINCIPAL_INITS, balance
from vllm_lora_ext.base_model import read_base_model
from vllm_lora_ext.errors import BadSetting, MissingPackage
from vllm_lora_ext.inspection import Rules, inspect_adapter, inspect_values
from vllm_lora_ext.spec import Severity

ADAPTERS: dict[str, dict[str, Any]] = {
    "default": {},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "rslora": {"use_rslora": True},
    "patterns": PATTERNS,
    "patterns and rslora": {**PATTERNS, "use_rslora": True},
    "all-linear": {"target_modules": ("all-linear",)},
    "one target": {"target_modules": ("layers.1.self_attn.v_proj",)},
    **{init: {"init_lora_weights": init} for init in PRINCIPAL_INITS},
    "pissa with all": {**PATTERNS, "use_rslora": True, "init_lora_weights": "pissa"},
    "olora with all": {**PATTERNS, "use_rslora": True, "init_lora_weights": "olora"},
}


@pytest.mark.parametrize("changes", ADAPTERS.values(), ids=ADAPTERS)
def test_base_and_exported_adapter_compute_what_was_trained(
    random_base: str, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = settings(random_base, tmp_path, **changes)
    model = trained(config)
    export_adapter(model, config.adapter_dir, identity(random_base), overwrite=False)
    rules = Rules(read_base_model(random_base))
    inspection = inspect_values(inspect_adapter(config.adapter_dir, rules), rules)
    assert inspection.state == "admitted"
    assert {finding.severity for finding in inspection.findings} <= {Severity.NOTE}
    served = attach_adapter(load_base(random_base, torch.float32), config.adapter_dir)
    torch.testing.assert_close(logits(served), logits(model), atol=2e-5, rtol=0)
    with served.disable_adapter():
        assert (logits(served) - logits(model)).abs().max() > 1e-2  # there is something to compare


@pytest.mark.parametrize("init", PRINCIPAL_INITS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_principal_start_is_the_base_and_its_held_half_stays(
    random_base: str, tmp_path: Path, init: str, dtype: str
) -> None:
    config = settings(random_base, tmp_path, init_lora_weights=init, dtype=dtype)
    base = load_base(random_base, base_dtype(config))
    before, weights = logits(base), {name: p.clone() for name, p in base.named_parameters()}
    model = add_adapter(base, config)
    assert all(torch.equal(p, weights[n.replace(".base_layer", "")]) for n, p in _base_of(model).items())
    torch.testing.assert_close(logits(model), before, atol=2e-5, rtol=0)
    start, after = (dict(trained(config, steps).named_parameters()) for steps in (0, 4))
    for name, parameter in start.items():
        if parameter.requires_grad:
            moved = (after[name] - parameter).abs().chunk(2, 0 if "lora_A" in name else 1)
            assert moved[0].max() > 0
            assert moved[1].max() == 0


def _base_of(model: Any) -> dict[str, torch.Tensor]:
    named = model.get_base_model().named_parameters()
    return {name: parameter for name, parameter in named if "lora_" not in name}


def test_the_principal_part_is_that_of_the_papers(random_base: str, tmp_path: Path) -> None:
    """PEFT's own start, which moves the base, has the same factors."""
    from peft import LoraConfig, get_peft_model

    for init in ("pissa", "olora"):
        ours = trained(settings(random_base, tmp_path, init_lora_weights=init), steps=0)
        targets = ["q_proj", "down_proj"]
        lora = LoraConfig(r=8, lora_alpha=12, target_modules=targets, init_lora_weights=init)
        theirs = dict(get_peft_model(load_base(random_base, torch.float32), lora).named_parameters())
        for name, parameter in ours.named_parameters():
            if "lora_" in name and name in theirs:
                half = parameter.chunk(2, 0 if "lora_A" in name else 1)[0]
                torch.testing.assert_close(half.abs(), theirs[name].abs(), atol=1e-4, rtol=1e-3)


def test_balanced_factors_lose_less_when_a_server_rounds_them() -> None:
    """Halves that nearly cancel, as PiSSA leaves them: the product is a hundredth of each."""
    torch.manual_seed(0)
    a0, b0 = torch.randn(8, 64), torch.randn(48, 8)
    a = torch.cat([a0 + 0.01 * torch.randn(8, 64), a0])
    b = torch.cat([b0 + 0.01 * torch.randn(48, 8), -b0], dim=1)
    want = 1.5 * (b.double() @ a.double())
    new_a, new_b = balance(a, b, 1.5)
    assert (new_a.shape, new_b.shape) == (a.shape, b.shape)
    torch.testing.assert_close(new_b.double() @ new_a.double(), want, atol=1e-5, rtol=0)
    rounded = 1.5 * (b.bfloat16().double() @ a.bfloat16().double())
    balanced = new_b.bfloat16().double() @ new_a.bfloat16().double()
    assert (balanced - want).norm() < (rounded - want).norm() / 20
    wide = balance(torch.randn(40, 64), torch.randn(32, 40), 2.0)  # more rank than the module has
    assert [tensor.shape for tensor in wide] == [(40, 64), (32, 40)]


def test_weight_decay_pulls_a_principal_start_towards_the_base(random_base: str, tmp_path: Path) -> None:
    model = prepare_model(settings(random_base, tmp_path, init_lora_weights="pissa"))
    before = logits(model.eval())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(0.7)  # what decay does to both halves
    torch.testing.assert_close(logits(model), before, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "changes", [{}, {"init_lora_weights": "pissa"}, {"target_modules": ("all-linear",)}], ids=str
)
def test_parameters_are_counted_against_the_base(
    random_base: str, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = settings(random_base, tmp_path, **changes)
    count = count_parameters(prepare_model(config))
    whole = count_parameters(prepare_model(settings(random_base, tmp_path, method="full")))
    shapes = (read_base_model(random_base).module_shapes() or {}).values()
    assert count.trained == sum(config.lora_r * sum(shape) for shape in shapes)
    assert count.base == whole.trained == whole.base
    assert "100.00%" in str(whole)


def test_names_that_meet_no_module_are_refused(random_base: str, tmp_path: Path) -> None:
    for changes, told in (
        ({"target_modules": ("q_proj", "w_proj")}, "--target-modules w_proj"),
        ({"target_modules": ("nothing",)}, "all-linear"),
        ({"rank_pattern": ("q_porj=4",)}, "--rank-pattern q_porj"),
        ({"alpha_pattern": ("lm_head=4",)}, "--alpha-pattern lm_head"),
        ({"init_lora_weights": "pissa", "lora_r": 60}, "Lower --lora-r to 32"),
        ({"init_lora_weights": "olora", "target_modules": ("embed_tokens",)}, "embed_tokens is none"),
    ):
        with pytest.raises(BadSetting, match=told):
            prepare_model(settings(random_base, tmp_path, **changes))


def test_dora_is_trained_and_is_what_peft_loads(random_base: str, tmp_path: Path) -> None:
    config = settings(random_base, tmp_path, method="dora", serve_check=False)
    model = trained(config)
    export_adapter(model, config.adapter_dir, identity(random_base), overwrite=False)
    again = attach_adapter(load_base(random_base, torch.float32), config.adapter_dir)
    torch.testing.assert_close(logits(again), logits(model), atol=2e-5, rtol=0)
    inspection = inspect_adapter(config.adapter_dir, Rules(read_base_model(random_base)))
    assert "use_dora" in [finding.item for finding in inspection.findings]


def test_gradient_checkpointing_changes_no_gradient(random_base: str, tmp_path: Path) -> None:
    for method in ("lora", "full"):
        plain, saving = (
            trained(settings(random_base, tmp_path, method=method, gradient_checkpointing=on), steps=3)
            for on in (False, True)
        )
        assert torch.equal(logits(plain), logits(saving))


def test_adapters_are_float32_over_a_base_of_16_bits(random_base: str, tmp_path: Path) -> None:
    model = trained(settings(random_base, tmp_path, dtype="bfloat16"), steps=2)
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert {tensor.dtype for tensor in adapter_tensors(model).values()} == {torch.float32}


def test_auto_is_bf16_where_the_cpu_has_it(random_base: str, tmp_path: Path) -> None:
    auto = base_dtype(settings(random_base, tmp_path, dtype="auto"))
    if not torch.cuda.is_available():
        assert auto == (torch.bfloat16 if cpu_computes_in_bf16() else torch.float32)
        assert training_dtype("auto") == torch.float32  # what answers are computed in
    assert base_dtype(settings(random_base, tmp_path, dtype="auto", method="full")) == torch.float32


def test_qlora_says_what_it_needs(random_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match="pip install bitsandbytes"):
        prepare_model(settings(random_base, tmp_path, method="qlora"))


@pytest.fixture
def base_of_64s(random_base: str, tmp_path: Path) -> str:
    """Every width a multiple of bitsandbytes' blocks of 64, which its CPU kernels want."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path / "base"
    shutil.copytree(random_base, folder)
    wider = AutoConfig.from_pretrained(random_base, intermediate_size=128)
    AutoModelForCausalLM.from_config(wider).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_qlora_trains_over_four_bits(base_of_64s: str, tmp_path: Path, init: str) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra `qlora` is not installed")
    config = settings(base_of_64s, tmp_path, method="qlora", init_lora_weights=init)
    start, model = trained(config, steps=0), trained(config)
    packed = start.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    assert packed.dtype == torch.uint8
    assert count_parameters(start) == count_parameters(prepare_model(settings(base_of_64s, tmp_path)))
    assert {p.dtype for p in start.parameters() if p.requires_grad} == {torch.float32}
    with torch.inference_mode():
        first, last = (m(input_ids=IDS, labels=IDS).loss for m in (start, model))
    assert last < first - 0.1
    export_adapter(model, config.adapter_dir, identity(base_of_64s), overwrite=False)
    inspection = inspect_adapter(config.adapter_dir, Rules(read_base_model(base_of_64s)))
    assert inspection.state == "admitted"
