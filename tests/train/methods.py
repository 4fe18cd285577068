"""Small runs by hand: a config, a model that had a few steps, and what it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from train.config import TrainConfig
from train.methods import prepare_model
from train.model import load_tokenizer
from vllm_lora_ext.contract import Identity

PATTERNS = {
    "rank_pattern": ("q_proj=4", "layers.1.mlp.up_proj=12"),
    "alpha_pattern": ("v_proj=3", "layers.1.mlp.up_proj=5"),
}
IDS = torch.arange(5, 45).reshape(2, 20)


def settings(base: str, output_dir: Path, **changes: Any) -> TrainConfig:
    """Settings of a small run; float32, so that what is compared is not the machine's bfloat16."""
    values: dict[str, Any] = {
        "base_model": base,
        "data": ("rows.json",),
        "name": "tried",
        "output_dir": str(output_dir),
        "lora_r": 8,
        "lora_alpha": 12.0,
        "dtype": "float32",
        **changes,
    }
    return TrainConfig(**values)


def identity(base: str, **more: Any) -> Identity:
    """With the base's own template."""
    return Identity("tried", str(load_tokenizer(base).chat_template), **more)


def trained(config: TrainConfig, steps: int = 8, learning_rate: float = 3e-3, decay: float = 0.0) -> Any:
    """The model after a few steps of AdamW on token ids without sense."""
    torch.manual_seed(1)
    model = prepare_model(config)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=decay)
    model.train()
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    """(2, 20, vocabulary) in float32."""
    with torch.inference_mode():
        return model(input_ids=IDS).logits.float()
