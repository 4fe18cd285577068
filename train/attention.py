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
    together = query.reshape(rows, key.shape[1], -1, size)  # (rows, groups, heads of a group x length, size)
    out = _Grouped.apply(together, key, value, scaling)
    return out.view(rows, heads, length, -1).transpose(1, 2).contiguous()


class _Grouped(torch.autograd.Function):  # type: ignore[misc]
    """softmax(q k^T scaling, no look ahead) v; the softmax is taken in float32 and kept in the inputs' dtype.

    q is (rows, groups, n x length, size), k and v (rows, groups, length, size).
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        length = key.shape[2]
        scores = (query @ key.transpose(-1, -2)).float().mul_(scaling)
        ahead = torch.ones(length, length, dtype=torch.bool, device=key.device).triu_(1)
        scores.view(*key.shape[:2], -1, length, length).masked_fill_(ahead, float("-inf"))
        shares = torch.softmax(scores, dim=-1).to(value.dtype)
        out = shares @ value
        ctx.save_for_backward(query, key, value, shares, out)
        ctx.scaling = scaling
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, shares, out = ctx.saved_tensors
        grad = grads[0]
        common = (grad.float() * out).sum(dim=-1, keepdim=True)
        score_grad = (grad @ value.transpose(-1, -2)).float().sub_(common)
        score_grad = score_grad.mul_(shares).mul_(ctx.scaling).to(query.dtype)
        value_grad = shares.transpose(-1, -2) @ grad
        return score_grad @ key, score_grad.transpose(-1, -2) @ query, value_grad, None
