"""Converted adapters in a real engine say what PEFT says with the ones that they were made of."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from tests.arm import Arm
from tests.engine.test_exactness import peft_logprobs
from tests.train.peft_zoo import KINDS, RANK, Kind, make_adapter, make_bases
from train.conversion.reduction import Limits
from train.convert import convert

pytestmark = pytest.mark.filterwarnings("ignore")
PROMPT, ANSWER = list(range(5, 29)), 6
# vLLM takes LoRA on embedding and head for some model classes only, and Qwen2 is none of them.
_VOCABULARY = ("LoRA on the embedding", "LoRA on the head", "LoRA, trained tokens", "Trainable tokens")


def served_by(name: str) -> list[Kind]:
    """The kinds that are claimed to be exact there."""
    claims = {kind.title: kind.biased if name == "qwen2" and kind.biased else kind.claim for kind in KINDS}
    vocabulary = () if name == "llama" else _VOCABULARY
    return [kind for kind in KINDS if claims[kind.title] == "exact" and kind.title not in vocabulary]


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_served_logits_are_those_of_peft(name: str, tmp_path: Path) -> None:
    """Log-probabilities of the greedy answer, in float32, within 1e-3."""
    torch.set_num_threads(1)
    base, kinds = make_bases(tmp_path)[name], served_by(name)
    made = {kind.title: tmp_path / f"adapter-{number}" for number, kind in enumerate(kinds)}
    converted = {kind.title: tmp_path / f"converted-{number}" for number, kind in enumerate(kinds)}
    for kind in kinds:
        make_adapter(kind, base, made[kind.title])
        convert(made[kind.title], converted[kind.title], base, Limits(RANK))
    settings = {"dtype": "float32", "max_loras": 4, "max_lora_rank": 32, "max_cpu_loras": len(kinds)}
    with Arm(Path(base), tmp_path / "log", plugin=True, one_process=True, **settings) as arm:
        for number, (title, folder) in enumerate(converted.items(), 1):
            arm("name", name=title, path=str(folder), number=number)
        rows = [(PROMPT, kind.title) for kind in kinds]
        answers = arm.generate(rows, max_tokens=ANSWER)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind, answer in zip(kinds, answers, strict=True):
            expected = peft_logprobs(Path(base), made[kind.title], PROMPT, answer["tokens"])
            assert answer["logprobs"] == pytest.approx(expected, abs=1e-3), kind.title
