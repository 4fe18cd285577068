"""Before against after: does the converted adapter do what the one that it was made of did?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from train.conversion.factors import Factors
from train.conversion.known import Change
from train.model import attach_adapter, load_base
from vllm_lora_ext.base_model import read_base_model
from vllm_lora_ext.contract import read_provenance
from vllm_lora_ext.errors import BadInput, VllmLoraError

_PROMPTS, _TOKENS, _INPUTS = 4, 16, 8
# Two ways through a model in float32 differ by rounding: of logits, and of what the adapter adds to them.
_OF_LOGITS, _OF_EFFECT = 2e-5, 2e-3
_OF_OUTPUTS = 1e-4


@dataclass(frozen=True)
class Verdict:
    """`difference` is the largest one found, `effect` the largest one that the adapter makes, in one unit."""

    of: str
    difference: float
    effect: float

    def __str__(self) -> str:
        return f"{self.of}: {self.difference:.2g} at most, where the adapter changes up to {self.effect:.2g}"


def compare_logits(
    before: Path, after: Path, base_model: str, is_exact: bool, tokens: Sequence[int] = ()
) -> Verdict:
    """Of the base with either adapter, through PEFT in float32, on the adapter's probes or on random tokens.

    `tokens` are asked as well: those whose embedding the adapter changes.

    Raises:
        VllmLoraError: the conversion is called exact, and is not.
        BadInput: PEFT cannot load the adapter that was converted.
    """
    prompts = _prompts(before, base_model) + ([list(tokens)] if tokens else [])
    was = _logits(base_model, before, prompts)
    base = _logits(base_model, None, prompts)
    now = _logits(base_model, after, prompts)
    effect = _largest(was, base)
    bound = _OF_LOGITS * max(float(one.abs().max()) for one in was) + _OF_EFFECT * effect
    return _judged(Verdict("logits", _largest(was, now), effect), bound, is_exact)


def compare_outputs(before: Mapping[str, Change], after: Mapping[str, Factors], is_exact: bool) -> Verdict:
    """Of each module's change on random inputs, as a share of its largest output; needs no base.

    Raises:
        VllmLoraError: the conversion is called exact, and is not.
    """
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for module, change in before.items():
        x = torch.randn(change.factors.a.shape[1], _INPUTS, generator=generator, dtype=torch.float64)
        wanted = change.apply(x)
        got = after[module].apply(x) if module in after else torch.zeros_like(wanted)
        largest = float(wanted.abs().max())
        if largest:
            worst = max(worst, float((got - wanted).abs().max()) / largest)
    return _judged(Verdict("outputs of modules on random inputs", worst, 1.0), _OF_OUTPUTS, is_exact)


def most_changed(embedding: Factors) -> list[int]:
    """The tokens whose embedding changes most, at most as many as a prompt has."""
    changed = embedding.a.norm(dim=0)
    count = min(_TOKENS, int((changed > 0).sum()))
    return [int(token) for token in changed.topk(count).indices]


def _judged(verdict: Verdict, bound: float, is_exact: bool) -> Verdict:
    if is_exact and not verdict.difference <= bound:
        rule = f"the converted adapter does not do what the first one did ({verdict}; bound {bound:.2g})"
        raise VllmLoraError(
            "conversion", rule, "Nothing was written. Please report it, with the adapter's config."
        )
    return verdict


def _largest(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def _prompts(adapter: Path, base_model: str) -> list[list[int]]:
    try:
        probes = read_provenance(adapter).get("probes") or []
    except BadInput:
        probes = []
    stored = [found for probe in probes if (found := _token_ids(probe))][:_PROMPTS]
    if stored:
        return stored
    size = read_base_model(base_model).config.get("vocab_size", 1000)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, int(size), (_PROMPTS, _TOKENS), generator=generator)
    return [[int(one) for one in prompt] for prompt in ids]


def _token_ids(probe: Any) -> list[int]:
    ids = probe.get("prompt_ids") if isinstance(probe, dict) else None
    is_ids = isinstance(ids, list) and all(type(one) is int for one in ids)
    return list(ids) if is_ids and ids is not None else []


def _logits(base_model: str, adapter: Path | None, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    model: Any = load_base(base_model, torch.float32)
    if adapter is not None:
        model = attach_adapter(model, adapter)
    model.eval()
    with torch.no_grad():
        return [model(torch.tensor([prompt], device=model.device)).logits[0].cpu() for prompt in prompts]
