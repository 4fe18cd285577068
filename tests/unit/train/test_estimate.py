"""Counts agree with the real model and with PEFT; the estimate goes up and down with what it depends on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train import estimate as estimates
from train.config import TrainConfig
from train.dry_run import as_text, dry_run, histogram
from train.estimate import Estimate, estimate, model_size
from train.lint import RowFinding
from train.prepare import Prepared
from train.prompts import Example, PromptForm
from vllm_lora_ext.errors import BadBaseModel

EXAMPLES = [
    Example(tuple(range(length)), ((length // 2, length),), f"row {length}") for length in (8, 20, 12)
]


def config(base: Path, **settings: Any) -> TrainConfig:
    options = {"base_model": str(base), "data": ("a.json",), "name": "x", "output_dir": "out", **settings}
    return TrainConfig(**options)


@pytest.fixture(autouse=True)
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 GFLOP/s, and a microsecond for each operation."""
    monkeypatch.setattr(estimates, "measure", lambda *_: (1e9, 1e-6))


def estimated(base: Path, **settings: Any) -> Estimate:
    import torch

    wanted = config(base, **settings)
    return estimate(EXAMPLES, model_size(wanted), wanted, torch.float32)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora_r": 4, "target_modules": ("q_proj", "mlp.down_proj")},
        {"target_modules": ("all-linear",), "rank_pattern": ("up_proj=2", "layers.0.self_attn.q_proj=64")},
        {"method": "dora", "serve_check": False},
        {"method": "full"},
    ],
)
def test_counts_are_those_of_the_real_model(base_folder: Path, settings: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from train.methods import add_adapter

    wanted = config(base_folder, **settings)
    size = model_size(wanted)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base_folder))
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert size.head == model.lm_head.weight.numel()
    assert size.active == sum(p.numel() for p in model.model.layers.parameters()) + size.hidden
    if wanted.method != "full":
        model = add_adapter(model.to(torch.float32), wanted)
    assert size.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_what_costs_more_is_estimated_to_cost_more(base_folder: Path) -> None:
    def small(**settings: Any) -> Estimate:
        return estimated(base_folder, lora_r=2, **settings)

    plain, longer = small(), small(num_train_epochs=40.0)
    checkpointed, full, quantised = (
        small(gradient_checkpointing=True),
        small(method="full"),
        small(method="qlora"),
    )
    assert (longer.flops, longer.steps) == (2 * plain.flops, 2 * plain.steps)
    assert longer.memory_bytes == plain.memory_bytes
    assert checkpointed.flops > plain.flops and checkpointed.activation_bytes < plain.activation_bytes
    assert full.flops > plain.flops and full.memory_bytes > plain.memory_bytes
    assert full.weights_bytes == 0 and full.trained_bytes == 16 * model_size(config(base_folder)).parameters
    assert quantised.weights_bytes < plain.weights_bytes
    assert plain.weights_bytes == 4 * model_size(config(base_folder)).parameters


def test_steps_stated_are_steps_counted(base_folder: Path) -> None:
    once = estimated(base_folder, num_train_epochs=1.0, per_device_train_batch_size=3)
    by_steps = estimated(base_folder, max_steps=1, per_device_train_batch_size=3)
    assert (by_steps.steps, by_steps.flops) == (once.steps, once.flops) == (1, by_steps.flops)


def test_a_base_that_cannot_be_built_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "hidden_size": "wide"}')
    with pytest.raises(BadBaseModel, match="cannot be built from its config"):
        model_size(config(tmp_path))


@given(lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=60))
def test_each_length_is_in_one_bin(lengths: list[int]) -> None:
    bins = histogram(lengths)
    assert len(bins) <= 10
    for low, high, count in bins:
        assert count == sum(low <= length <= high for length in lengths)
    assert sum(count for _, _, count in bins) == len(lengths)


def test_a_dry_run_counts_everything(base_folder: Path) -> None:
    import torch

    finding = RowFinding("duplicate", ("row 8",), "is there twice", "Remove it.")
    prepared = Prepared(PromptForm(""), EXAMPLES, [], 4, 1, [], [], [finding])
    wanted = config(base_folder, per_device_train_batch_size=2, num_train_epochs=5.0)
    report = dry_run(prepared, wanted, torch.float32)
    assert report["tokens"] == {"per_epoch": 40, "trained": 20, "longest": 20}
    assert report["steps"] == report["estimate"]["steps"] == 10
    assert report["rows"] == {"training": 4, "held_out": 1, "bad": 0, "too_long": 0, "truncated": 0}
    assert report["findings"] == [finding.as_dict()]
    text = as_text(report, wanted)
    for part in ("4 rows to train on, 1 held out", "50.0% of them trained", "10 steps", "estimate: ", "####"):
        assert part in text


def test_the_machine_is_measured(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.undo()
    monkeypatch.setattr(estimates, "_MEASURE_S", 0.001)
    size = dataclasses.replace(model_size(config(base_folder)), hidden=64)
    rate, call_s = estimates.measure(size, 16, torch.float32)
    assert rate > 0 and call_s > 0
