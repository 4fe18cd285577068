"""The check before a server says that it is ready: no row of a mixed batch sees another row's adapter.

Two markers are made, loaded like any adapter, and asked beside the base model. A marker forces one
of its own tokens, by a lead that no rounding can turn, and disturbs every layer besides; so a base
row that got a marker's weights anywhere could not hide it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vllm_lora_ext.errors import IsolationBroken

# A child of vLLM's logger, so that its handler and format apply.
logger = logging.getLogger("vllm.vllm_lora")

LEAD = 20.0  # natural logarithms between a marker's own tokens and all others
_MARKERS = 2
_DIRECTIONS = 8  # of which one is nearly certain to lie along the model's last hidden state
_FIRST_ID = 2**30  # adapter ids from here on are such that no server counts up to
_STRENGTH = 400.0
_TOLERANCE = 1.0  # logprob of a base row between two batches of one shape, a leak moves it by far more
_PROMPT_TOKENS, _ANSWER_TOKENS = 8, 3


@dataclass(frozen=True)
class ModelShape:
    """What markers are made for; `linears` maps module names to (out_features, in_features)."""

    hidden_size: int
    vocab_size: int
    linears: Mapping[str, tuple[int, int]]
    max_rank: int
    max_loras: int
    max_logprobs: int

    @property
    def directions(self) -> int:
        """Rank of a marker: two own tokens for each direction, all of which must show in the logprobs."""
        limit = self.max_logprobs if self.max_logprobs > 0 else 2 * _DIRECTIONS + 1
        return max(1, min(_DIRECTIONS, self.max_rank, (limit - 1) // 2, self.vocab_size // (4 * _MARKERS)))

    def own_tokens(self, marker: int) -> list[int]:
        """The tokens that a marker forces; no two markers share one."""
        return [_MARKERS * i + marker for i in range(2 * self.directions)]


async def check_isolation(engine: Any, shape: ModelShape) -> bool:
    """Ask base and markers in one batch; nothing of the markers is left afterwards.

    False: the model takes no LoRA on `lm_head`, so no token can be forced and nothing was checked.

    Raises:
        IsolationBroken: a row shows another adapter's weights, or a marker did not act.
    """
    from vllm.lora.request import LoRARequest

    with tempfile.TemporaryDirectory(prefix="vllm-lora-markers-") as folder:
        markers = []
        for number in range(_MARKERS):
            path = Path(folder) / f"marker-{number}"
            write_marker(path, shape, number)
            adapter_id = _FIRST_ID + secrets.randbelow(_FIRST_ID - 1)  # several servers may share an engine
            markers.append(LoRARequest(f"isolation-marker-{number}", adapter_id, str(path)))
        try:
            try:
                for marker in markers:
                    await engine.add_lora(marker)
            except Exception as error:
                logger.warning("No isolation check: this model does not take the markers (%s)", error)
                return False
            alone = await _ask(engine, shape, [None] * (2 * _MARKERS))
            together = min(_MARKERS, shape.max_loras)
            for first in range(0, _MARKERS, together):
                numbers = range(first, first + together)
                asked = [row for number in numbers for row in (None, markers[number])]
                rows = await _ask(engine, shape, asked)
                for position, number in enumerate(numbers):
                    judge_base(rows[2 * position], alone[0], shape)
                    judge_marker(rows[2 * position + 1], number, shape)
            return True
        finally:
            for marker in markers:
                await engine.remove_lora(marker.lora_int_id)


def write_marker(folder: Path, shape: ModelShape, number: int) -> None:
    """An adapter as PEFT writes it: `lm_head` forces own tokens, all linear modules are disturbed.

    Along each random direction of the last hidden state one own token gains what another loses, so
    one of the two is far ahead, whichever way the state points.
    """
    chance = torch.Generator().manual_seed(number)
    rank = shape.directions
    up, down = shape.own_tokens(number)[:rank], shape.own_tokens(number)[rank:]
    push = torch.zeros(shape.vocab_size, rank)
    push[up, range(rank)], push[down, range(rank)] = _STRENGTH, -_STRENGTH
    modules = {"lm_head": (_normal(chance, rank, shape.hidden_size), push)}
    for name, (out_features, in_features) in shape.linears.items():
        modules[name] = (_normal(chance, rank, in_features), _normal(chance, out_features, rank))
    tensors = {}
    for name, (a, b) in modules.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "bias": "none",
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in modules}),
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def _normal(chance: torch.Generator, rows: int, columns: int) -> torch.Tensor:
    """Random rows of about unit length, half precision."""
    return (torch.randn(rows, columns, generator=chance) / columns**0.5).to(torch.bfloat16)


Logprobs = Sequence[Mapping[int, float]]  # for each token of an answer: token id -> logprob of the likeliest


@dataclass(frozen=True)
class Answer:
    """Token ids of one row's answer, and the logprobs of the likeliest tokens at each place."""

    tokens: Sequence[int]
    logprobs: Logprobs


async def _ask(engine: Any, shape: ModelShape, adapters: Sequence[Any]) -> list[Answer]:
    """One request for each adapter (None: the base), all at once; nothing stays in the prefix cache."""
    return list(await asyncio.gather(*(_answer(engine, shape, adapter) for adapter in adapters)))


async def _answer(engine: Any, shape: ModelShape, adapter: Any) -> Answer:
    from vllm.sampling_params import SamplingParams

    prompt = [(i + 1) * shape.vocab_size // (_PROMPT_TOKENS + 2) for i in range(_PROMPT_TOKENS)]
    unique = f"isolation-{uuid.uuid4().hex}"
    parameters = SamplingParams(
        temperature=0.0,
        max_tokens=_ANSWER_TOKENS,
        ignore_eos=True,
        detokenize=False,
        logprobs=2 * shape.directions + 1,
    )
    last = None
    request = {"prompt_token_ids": prompt, "cache_salt": unique}
    async for output in engine.generate(request, parameters, unique, lora_request=adapter):
        last = output
    assert last is not None, "the engine ended a request without an answer"
    completion = last.outputs[0]
    logprobs = [{token: entry.logprob for token, entry in place.items()} for place in completion.logprobs]
    return Answer(list(completion.token_ids), logprobs)


def judge_base(row: Answer, alone: Answer, shape: ModelShape) -> None:
    """A base row must be as it is among base rows.

    Raises:
        IsolationBroken: it is not.
    """
    forced = {token for number in range(_MARKERS) for token in shape.own_tokens(number)}
    for token, place, token_alone, place_alone in zip(
        row.tokens, row.logprobs, alone.tokens, alone.logprobs, strict=True
    ):
        if token != token_alone:
            if token in forced and lead(place, forced) > LEAD / 2:
                raise IsolationBroken("a base row", "was answered with an adapter's weights")
            return  # two tokens that are about equally likely; from here on the texts differ
        if abs(place[token] - place_alone[token]) > _TOLERANCE:
            raise IsolationBroken("a base row", "changes when other rows of its batch have adapters")


def judge_marker(row: Answer, number: int, shape: ModelShape) -> None:
    """A marker's row must show its own tokens only.

    Raises:
        IsolationBroken: it shows others, or its lead is too small.
    """
    own = set(shape.own_tokens(number))
    for token, place in zip(row.tokens, row.logprobs, strict=True):
        if token not in own:
            raise IsolationBroken(
                "a row with an adapter", "was answered without it, or with another's weights"
            )
        if lead(place, own) < LEAD:
            raise IsolationBroken("a row with an adapter", f"shows it by less than {LEAD:.0f} in logits")


def lead(place: Mapping[int, float], own: set[int]) -> float:
    """How far the best of `own` is before the best other token, in natural logarithms."""
    best = max((value for token, value in place.items() if token in own), default=-float("inf"))
    other = max((value for token, value in place.items() if token not in own), default=-float("inf"))
    return best - other
