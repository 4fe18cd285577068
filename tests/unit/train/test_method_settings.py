"""Settings of the method that are each in range, and which of them go together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from train.config import TrainConfig
from train.methods import lora_config, next_command, serving_note
from vllm_lora_ext.errors import BadSetting


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig("base", ("id.json",), "xiaoli", "adapters", **changes)


def test_patterns_are_modules_and_numbers() -> None:
    config = settings(rank_pattern=("q_proj=4", "a|b=2"), alpha_pattern=("layers.0.mlp.up_proj=1.5",))
    assert config.ranks == {"q_proj": 4, "a|b": 2}
    assert config.alphas == {"layers.0.mlp.up_proj": 1.5}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rank_pattern": ("q_proj",)}, "q_proj: is not MODULE=NUMBER"),
        ({"rank_pattern": ("q_proj=4.5",)}, "q_proj=4.5"),
        ({"rank_pattern": ("q_proj=0",)}, "at least 1, is 0"),
        ({"rank_pattern": ("q_proj=4", "q_proj=5")}, "a second time"),
        ({"rank_pattern": ("(.|.)+x=4",)}, "more than module names"),
        ({"rank_pattern": ("=4",)}, "more than module names"),
        ({"alpha_pattern": ("q_proj=nan",)}, "above 0"),
        ({"alpha_pattern": ("q_proj=-1",)}, "above 0"),
        ({"target_modules": ("all-linear", "q_proj")}, "already means every module"),
        ({"method": "full", "use_rslora": True}, "--use-rslora"),
        ({"method": "full", "rank_pattern": ("q_proj=4",)}, "--rank-pattern"),
        ({"method": "full", "init_lora_weights": "pissa"}, "--init-lora-weights"),
        ({"method": "full", "dtype": "bfloat16"}, "--dtype bfloat16"),
        ({"method": "dora"}, "--no-serve-check"),
        ({"method": "dora", "serve_check": False, "init_lora_weights": "olora"}, "gaussian"),
        ({"init_lora_weights": "orthogonal", "lora_r": 7}, "even"),
        ({"init_lora_weights": "orthogonal", "rank_pattern": ("q_proj=3",)}, "even"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(BadSetting, match=told.replace("(", r"\(")):
        settings(**changes)


@pytest.mark.parametrize(("use_rslora", "alpha"), [(False, 64), (True, 32 * 2**0.5)])
def test_pissa_has_twice_the_rank_at_the_same_scaling(use_rslora: bool, alpha: float) -> None:
    pattern = {"rank_pattern": ("q_proj=4",), "alpha_pattern": ("q_proj=10",)}
    lora = lora_config(settings(init_lora_weights="pissa", use_rslora=use_rslora, **pattern))
    assert (lora.r, lora.rank_pattern, lora.init_lora_weights) == (32, {"q_proj": 8}, True)
    assert lora.lora_alpha == pytest.approx(alpha)
    assert lora.alpha_pattern["q_proj"] == pytest.approx(10 * alpha / 32)


def test_what_to_do_next_depends_on_the_method() -> None:
    folder = str(Path("adapters") / "xiaoli")
    assert serving_note(settings()) is None
    assert next_command(settings()) == "vllm-lora serve --adapters adapters"
    assert next_command(settings(method="full")) == f"vllm-lora serve {folder}"
    assert "4 bits" in str(serving_note(settings(method="qlora")))
    dora = settings(method="dora", serve_check=False)
    assert "cannot serve DoRA" in str(serving_note(dora))
    assert next_command(dora).startswith(f"vllm-lora merge {folder}")
