"""Markers force their own tokens, and what the check makes of the answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vllm_lora_ext.engine.isolation import (
    LEAD,
    Direction,
    Engine,
    MarkerPlan,
    judge_base,
    judge_marker,
    plan_markers,
    write_marker,
)
from vllm_lora_ext.errors import IsolationBroken

HIDDEN, VOCABULARY = 64, 300
PLAN = MarkerPlan("m", 8, [Direction(1, 2, [1.0], 9.0), Direction(3, 4, [1.0], 8.0)])


@pytest.fixture
def directions() -> list[Direction]:
    torch.manual_seed(0)
    return plan_markers(torch.randn(VOCABULARY, HIDDEN), torch.rand(HIDDEN) + 0.5)


def test_a_direction_makes_the_model_say_its_token_either_way(directions: list[Direction]) -> None:
    torch.manual_seed(0)
    unembedding, norm = torch.randn(VOCABULARY, HIDDEN), torch.rand(HIDDEN) + 0.5
    for direction in directions:
        state = torch.tensor(direction.vector)
        state = state / state.norm() * HIDDEN**0.5 * norm
        logits = unembedding @ state
        assert logits.argmax() == direction.up
        assert (-logits).argmax() == direction.down
        best, second = logits.topk(2).values
        assert best - second >= direction.lead - 1e-3
    tokens = {token for direction in directions for token in (direction.up, direction.down)}
    assert len(tokens) == 4, "no two markers share a token"


def test_lm_head_adds_the_lead_that_the_weights_do_not_allow(
    directions: list[Direction], tmp_path: Path
) -> None:
    norm = torch.rand(HIDDEN) + 0.5
    plan = MarkerPlan("model.layers.1.mlp.down_proj", 32, directions, unembeds=True, norm=norm.tolist())
    assert plan.lead() > LEAD
    engine = Engine(None, VOCABULARY, 2, False, {"model.layers.0.self_attn.q_proj": (64, 64)})
    write_marker(tmp_path / "marker", engine, plan, 0)
    tensors = load_file(tmp_path / "marker" / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.lm_head.lora_{part}.weight"] for part in "AB")
    state = torch.tensor(directions[0].vector)
    state = state / state.norm() * HIDDEN**0.5 * norm  # what the last norm makes of it
    push = (b @ a @ state)[[directions[0].up, directions[0].down]]
    assert push.tolist() == pytest.approx([2 * LEAD, -2 * LEAD], rel=1e-3)
    config = json.loads((tmp_path / "marker" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "lm_head", "q_proj"]


def test_a_base_row_may_change_by_a_tie_but_never_to_a_markers_token() -> None:
    judge_base([7, 8], [7, 8], PLAN)
    judge_base([7, 9], [7, 8], PLAN)
    judge_base([1, 9], [1, 8], PLAN)  # the base says 1 by itself
    with pytest.raises(IsolationBroken, match="adapter's weights"):
        judge_base([7, 3], [7, 8], PLAN)


def test_a_marker_row_shows_its_own_tokens_only() -> None:
    judge_marker([1, 2, 1], PLAN.tokens(0))
    for row in ([7, 7, 7], [1, 3, 1]):
        with pytest.raises(IsolationBroken, match="without it, or with another's"):
            judge_marker(row, PLAN.tokens(0))
