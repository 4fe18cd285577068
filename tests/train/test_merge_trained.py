"""What `vllm-lora train` writes, merged: however the adapter began, the model computes what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.methods import PATTERNS, identity, logits, settings, trained
from train.export import export_adapter
from train.merge import merge


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True, **PATTERNS},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4", "use_rslora": True, **PATTERNS},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "orthogonal"},
        {"method": "dora", "serve_check": False},
    ],
    ids=str,
)
def test_a_trained_adapter_merges_into_what_was_trained(
    random_base: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = trained(settings(random_base, tmp_path, **changes), learning_rate=1e-2)
    export_adapter(model, tmp_path / "tried", identity(random_base), overwrite=False)
    merge(tmp_path / "tried", random_base, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(model), atol=2e-3, rtol=1e-3)
    base = AutoModelForCausalLM.from_pretrained(random_base, dtype=torch.float32)
    assert not torch.allclose(logits(model), logits(base), atol=0.05)
