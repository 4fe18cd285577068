"""Causal attention over short rows: three matrix products, with the query heads of a group side by side.

torch's attention on the CPU takes several times as long for rows of a hundred tokens in bfloat16, most of
it in the backward pass. Longer rows, and whatever has a mask, go to torch's, as transformers calls it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "vllm_lora_short_rows"
LONGEST = 256  # tokens; from there on torch's blocks are as fast, and need no (length, length) matrix


def use_short_row_attention(model: PreTrainedModel) -> bool:
    """Switch a model that runs on torch's attention on the CPU; False if it runs on something else."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    if model.device.type != "cpu" or model.config._attn_implementation != "sdpa":
        return False
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return True


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers asks for it: query (rows, heads, length, size), key and value with as many
    or fewer heads; gives back (rows, length, heads, size)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    length, causal = query.shape[2], options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    short = 1 < length == key.shape[2] <= LONGEST and causal and attention_mask is None and dropout == 0
    if not short or options.get("softcap") is not None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return out, None
    return _short(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling), None


def _short(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    rows, heads, length, size = query.shape
    groups = key.shape[1]
    ahead = torch.full((length, length), float("-inf"), device=query.device).triu(1)
    together = query.reshape(rows, groups, heads // groups * length, size)
    scores = (together @ key.transpose(-1, -2)).view(rows, groups, -1, length, length)
    shares = torch.softmax(scores.float().mul_(scaling).add_(ahead), dim=-1).to(value.dtype)
    out = shares.view(rows, groups, -1, length) @ value
    return out.view(rows, heads, length, -1).transpose(1, 2).contiguous()
