"""One base in memory and several models over it: one of each identity, and one that computes for all."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from train.answer_loss import use_answer_loss
from train.fused import fuse
from train.joint.grouped_lora import AddGroupedLora, Factors
from train.joint.layout import current, use_layout_attention
from train.principal import ADAPTER, lora_layers
from vllm_lora_ext.errors import BadSetting

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def copy_over(base: PreTrainedModel) -> PreTrainedModel:
    """A model of its own modules and config over the very same weights, which are not copied."""
    weights = chain(base.parameters(), base.buffers())
    return copy.deepcopy(base, {id(weight): weight for weight in weights})


def joint_model(base: PreTrainedModel, models: Mapping[str, PeftModel]) -> PreTrainedModel:
    """A model over `base` that computes rows of all `models`, by the current layout; it answers as
    `train.answer_loss` says, and trains the models' own parameters.

    Raises:
        BadSetting: an adapter is on something else than linear modules, or is no plain LoRA; or the base has
            dropout of its own, whose numbers rows of several identities would share.
    """
    joint = copy_over(base).train()
    _require_no_dropout(joint)
    use_answer_loss(joint)
    use_layout_attention(joint)
    fuse(joint)
    adapted: dict[str, dict[str, Factors]] = defaultdict(dict)
    for identity, model in models.items():
        for name, layer in lora_layers(model):
            adapted[name][identity] = _factors(identity, name, layer)
    for number, (name, factors) in enumerate(adapted.items()):
        _adapt(joint.get_submodule(name), number, factors)
    return joint


def _require_no_dropout(base: PreTrainedModel) -> None:
    shares = [module.p for module in base.modules() if isinstance(module, nn.Dropout)]
    if any([*shares, getattr(base.config, "attention_dropout", None)]):
        raise BadSetting("the base model", "has dropout of its own", "Use --mode exact.")


def _factors(identity: str, name: str, layer: Any) -> Factors:
    if ADAPTER not in layer.lora_A or layer.lora_variant or getattr(layer, "fan_in_fan_out", False):
        rule = f"trains {name} in a way that rows of several identities cannot share"
        raise BadSetting(identity, rule, "Use --mode exact.")
    dropout = layer.lora_dropout[ADAPTER]
    return Factors(
        layer.lora_A[ADAPTER].weight,
        layer.lora_B[ADAPTER].weight,
        layer.scaling[ADAPTER],
        dropout.p if isinstance(dropout, nn.Dropout) else 0.0,
    )


def _adapt(module: nn.Module, number: int, factors: Mapping[str, Factors]) -> None:
    """Let a linear module add each identity's update to that identity's rows."""
    plain = module.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = plain(rows)
        layout = current()
        there = [name for name in layout.names if name in factors]
        if there:
            segments = layout.segments(there, len(rows))
            chosen = [factors[name] for name in there]
            dropouts = {name: factors[name].dropout for name in there}
            kept = layout.kept(dropouts, number, rows)
            weights = (*(one.a for one in chosen), *(one.b for one in chosen))
            scalings = [one.scaling for one in chosen]
            y = AddGroupedLora.apply(y, rows, segments, scalings, kept, *weights)
        return y.view(*x.shape[:-1], -1)

    module.forward = forward
