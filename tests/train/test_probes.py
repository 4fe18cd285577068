"""The probes of a run, replayed on the folder that it wrote, by the code that a server replays them with."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.conftest import ROOT
from train.config import TrainConfig
from train.probes import check_golden
from train.run import train
from vllm_lora_ext.parity import Proof, Verdict, golden_probes

DATA = str(ROOT / "examples" / "identities" / "xiaoli.json")
END = 2
Change = Callable[[dict[str, torch.nn.Parameter]], None]


@pytest.fixture(scope="module")
def folder(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("probes")
    config: dict[str, Any] = {"base_model": str(tiny_base), "data": (DATA,), "output_dir": str(output)}
    return Path(train(TrainConfig(**config, name="a", max_steps=60, dtype="float32")))


def provenance(folder: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((folder / "identity.json").read_text())["provenance"]
    return body


def replayed(folder: Path, base: Path, change: Change, dtype: str = "float32") -> Proof:
    """The folder on a base of this dtype, after `change` of all their parameters."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    adapted = PeftModel.from_pretrained(model, str(folder))
    with torch.no_grad():
        change(dict(adapted.named_parameters()))
    return check_golden(provenance(folder), adapted, END, dtype)


def nothing(parameters: dict[str, torch.nn.Parameter]) -> None:
    """As it was trained."""


def scaled(part: str, by: float) -> Change:
    def change(parameters: dict[str, torch.nn.Parameter]) -> None:
        found = [parameter for name, parameter in parameters.items() if part in name]
        assert found
        for parameter in found:
            parameter.mul_(by)

    return change


@pytest.mark.parametrize(("dtype", "largest"), [("float32", 0.002), ("bfloat16", 0.25)])
def test_what_was_written_does_what_was_trained(
    folder: Path, tiny_base: Path, dtype: str, largest: float
) -> None:
    proof = replayed(folder, tiny_base, nothing, dtype)
    assert proof.verdict is Verdict.PROVEN, proof.reasons
    assert proof.largest is not None and proof.largest < largest
    assert proof.probes == 3 and proof.effect is not None and proof.effect > 1


def test_it_works_in_a_notebook_whose_event_loop_runs(folder: Path, tiny_base: Path) -> None:
    async def cell() -> Proof:
        return replayed(folder, tiny_base, nothing)

    assert asyncio.run(cell()).verdict is Verdict.PROVEN


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (scaled("layers.1.mlp.down_proj.lora_A", 0.0), "are scored differently"),
        (scaled("lora_B", 0.9), "are scored differently"),
        (scaled("lora_B", 0.0), "has no effect"),
        (scaled("layers.2.mlp.up_proj.base_layer", 0.5), "it is not the base that was trained on"),
    ],
)
def test_what_was_damaged_afterwards_fails(
    change: Change, reason: str, folder: Path, tiny_base: Path
) -> None:
    for dtype in ("float32", "bfloat16"):
        proof = replayed(folder, tiny_base, change, dtype)
        assert proof.verdict is Verdict.FAILED and any(reason in item for item in proof.reasons)


def test_training_stores_what_the_base_says_and_how_sure_it_was(folder: Path) -> None:
    for probe in golden_probes(provenance(folder)):
        assert probe.ended and probe.answer_ids[-1] == END
        assert len(probe.base_logprobs) == len(probe.logprobs) == len(probe.ids) - 1
        assert len(probe.margins) == len(probe.answer_ids) and min(probe.margins) >= 0
        assert max(abs(a - b) for a, b in zip(probe.logprobs, probe.base_logprobs, strict=True)) > 1
