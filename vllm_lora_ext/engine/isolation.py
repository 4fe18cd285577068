"""The check before a server says that it is ready: no row of a mixed batch sees another row's adapter.

Two markers are made, loaded like any adapter, and asked beside the base model. A marker forces one
of its own tokens: in the last layer it adds a vector to the hidden state that outweighs all else
and points to that token, and it disturbs every layer before. So a row that got a marker's weights
anywhere could not hide it.
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

LEAD = 20.0  # wanted between a marker's own token and all others, so that no rounding turns it
MARKERS = 2
_FIRST_ID = 2**30  # adapter ids from here on are such that no server counts up to
_STRENGTH = 1e5  # against the size of a hidden state
_STRENGTH_FLOAT16 = 1e3  # whose numbers end at 65504
_PUSH = 2 * LEAD  # on a token's logit, where `lm_head` takes LoRA
_PROMPT_TOKENS, _ANSWER_TOKENS = 8, 3


@dataclass(frozen=True)
class Direction:
    """A vector (hidden_size,) that makes the model say `up`, and `down` when it is turned round.

    `lead` is how far the two tokens are then before all others, in natural logarithms.
    """

    up: int
    down: int
    vector: Sequence[float]
    lead: float


@dataclass(frozen=True)
class MarkerPlan:
    """What the model's own weights say of how to mark it: see `plan_markers`.

    `module` is the last module that adds to the hidden state, `in_features` its input. With
    `unembeds` the model takes LoRA on `lm_head` too; `norm` is then the weight of the last norm.
    """

    module: str
    in_features: int
    directions: Sequence[Direction]
    unembeds: bool = False
    norm: Sequence[float] | None = None

    def lead(self) -> float:
        """The smallest lead of a marker's token; what the weights do not allow, `lm_head` adds if it can."""
        return min(direction.lead for direction in self.directions) + (_PUSH if self.unembeds else 0.0)

    def tokens(self, number: int) -> set[int]:
        """The two tokens that marker `number` may force."""
        return {self.directions[number].up, self.directions[number].down}


@dataclass(frozen=True)
class Engine:
    """An engine to check: `linears` are the modules to disturb, name -> (out_features, in_features)."""

    client: Any
    vocab_size: int
    max_loras: int
    float16: bool
    linears: Mapping[str, tuple[int, int]]


def plan_markers(unembedding: torch.Tensor, norm: torch.Tensor | None) -> list[Direction]:
    """For each marker a direction that makes its token as far ahead as the model's weights allow.

    `unembedding` is (vocabulary, hidden), `norm` the weight of the last norm, (hidden,), which
    scales the hidden state before it. A state that is all one direction d has the logits
    unembedding @ (norm * d) * sqrt(hidden) / |d|.
    """
    vocabulary, hidden = unembedding.shape
    scale = torch.ones(hidden) if norm is None else norm.float()
    tokens = torch.linspace(0, vocabulary - 1, 64).long().unique()
    rows = unembedding[tokens].float() * scale
    ups, downs = torch.arange(0, len(tokens) - 1, 2), torch.arange(1, len(tokens), 2)
    vectors = rows[ups] - rows[downs]
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    logits = (unembedding @ (vectors * scale).t().to(unembedding.dtype)).float() * hidden**0.5
    leads = torch.minimum(_lead_of(logits, tokens[ups]), _lead_of(-logits, tokens[downs]))
    best = leads.argsort(descending=True)[:MARKERS].tolist()
    return [
        Direction(int(tokens[ups[i]]), int(tokens[downs[i]]), vectors[i].tolist(), float(leads[i]))
        for i in best
    ]


def _lead_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """For each column of `logits` (vocabulary, directions), how far its token is before the best other."""
    columns = torch.arange(logits.shape[1])
    others = logits.clone()
    others[tokens, columns] = -torch.inf
    return logits[tokens, columns] - others.max(dim=0).values


async def check_isolation(engine: Engine, plan: MarkerPlan) -> bool:
    """Ask base and markers in one batch; nothing of the markers is left afterwards.

    False: this model does not take the markers, and nothing was checked.

    Raises:
        IsolationBroken: a row shows another adapter's weights, or a marker did not act.
    """
    from vllm.lora.request import LoRARequest

    with tempfile.TemporaryDirectory(prefix="vllm-lora-markers-") as folder:
        markers = []
        for number in range(MARKERS):
            path = Path(folder) / f"marker-{number}"
            write_marker(path, engine, plan, number)
            adapter_id = _FIRST_ID + secrets.randbelow(_FIRST_ID - 1)  # several servers may share an engine
            markers.append(LoRARequest(f"isolation-marker-{number}", adapter_id, str(path)))
        try:
            try:
                for marker in markers:
                    await engine.client.add_lora(marker)
            except Exception as error:
                logger.warning("No isolation check: this model does not take the markers (%s)", error)
                return False
            await _compare(engine, plan, markers)
            return True
        finally:
            for marker in markers:
                await engine.client.remove_lora(marker.lora_int_id)


async def _compare(engine: Engine, plan: MarkerPlan, markers: Sequence[Any]) -> None:
    alone = await _ask(engine, [None] * (2 * MARKERS))
    together = min(MARKERS, engine.max_loras)
    for first in range(0, MARKERS, together):
        numbers = range(first, first + together)
        rows = await _ask(engine, [row for number in numbers for row in (None, markers[number])])
        for position, number in enumerate(numbers):
            judge_base(rows[2 * position], alone[0], plan)
            judge_marker(rows[2 * position + 1], plan.tokens(number))


def write_marker(folder: Path, engine: Engine, plan: MarkerPlan, number: int) -> None:
    """A marker, as PEFT writes an adapter, of rank 1."""
    chance = torch.Generator().manual_seed(number)
    strength = _STRENGTH_FLOAT16 if engine.float16 else _STRENGTH
    modules = {
        name: (_normal(chance, 1, in_features), _normal(chance, out_features, 1))
        for name, (out_features, in_features) in engine.linears.items()
    }
    vector = torch.tensor(plan.directions[number].vector).unsqueeze(1)
    modules[plan.module] = (_normal(chance, 1, plan.in_features), vector * strength)
    if plan.unembeds:
        modules["lm_head"] = _push(engine.vocab_size, plan, number)
    tensors = {}
    for name, (a, b) in modules.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
    config = {
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 1,
        "bias": "none",
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in modules}),
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def _push(vocab_size: int, plan: MarkerPlan, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of `lm_head` that push the marker's own two tokens apart, by what the weights may not allow."""
    direction = plan.directions[number]
    state = torch.tensor(direction.vector)
    state = state * len(state) ** 0.5 / state.norm()
    if plan.norm is not None:
        state = state * torch.tensor(plan.norm)
    push = torch.zeros(vocab_size, 1)
    push[direction.up], push[direction.down] = _PUSH, -_PUSH
    return (state / state.norm() ** 2).unsqueeze(0), push


def _normal(chance: torch.Generator, rows: int, columns: int) -> torch.Tensor:
    """Random numbers, of about unit length as a whole; float32, so that no dtype loses any."""
    return torch.randn(rows, columns, generator=chance) / (rows * columns) ** 0.5


async def _ask(engine: Engine, adapters: Sequence[Any]) -> list[list[int]]:
    """Token ids for each adapter (None: the base), asked all at once; nothing stays in the prefix cache."""
    return list(await asyncio.gather(*(_answer(engine, adapter) for adapter in adapters)))


async def _answer(engine: Engine, adapter: Any) -> list[int]:
    from vllm.sampling_params import SamplingParams

    prompt = [(i + 1) * engine.vocab_size // (_PROMPT_TOKENS + 2) for i in range(_PROMPT_TOKENS)]
    unique = f"isolation-{uuid.uuid4().hex}"
    parameters = SamplingParams(temperature=0.0, max_tokens=_ANSWER_TOKENS, ignore_eos=True, detokenize=False)
    last = None
    request = {"prompt_token_ids": prompt, "cache_salt": unique}
    async for output in engine.client.generate(request, parameters, unique, lora_request=adapter):
        last = output
    assert last is not None, "the engine ended a request without an answer"
    return list(last.outputs[0].token_ids)


def judge_base(row: Sequence[int], alone: Sequence[int], plan: MarkerPlan) -> None:
    """A base row must be as it is among base rows.

    Two tokens may be about equally likely and change places with the shape of a batch; a marker's
    tokens are never that.

    Raises:
        IsolationBroken: a marker shows in it.
    """
    forced = set().union(*map(plan.tokens, range(MARKERS)))
    if row != alone and forced & set(row) - set(alone):
        raise IsolationBroken("a base row", "was answered with an adapter's weights")


def judge_marker(row: Sequence[int], own: set[int]) -> None:
    """A marker's row must show its own tokens only.

    Raises:
        IsolationBroken: it shows others.
    """
    if not set(row) <= own:
        raise IsolationBroken("a row with an adapter", "was answered without it, or with another's weights")
