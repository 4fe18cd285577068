"""LoRA of several identities in one linear module: the base computes all rows, batched products the rest.

Each identity's rows lie together. Its factors are its own parameters, of its own rank, and get their
gradients as in a run alone: from its own rows only, and none in a pass that holds none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vllm_lora_ext.grouped import Segments


@dataclass(frozen=True)
class Factors:
    """One identity's adapter on one module: A (rank, in), B (out, rank), float32."""

    a: nn.Parameter
    b: nn.Parameter
    scaling: float
    dropout: float


class AddGroupedLora(torch.autograd.Function):  # type: ignore[misc]
    """y + scaling_i (x A_i^T) B_i^T for the rows of each identity i; y is changed in place.

    y is (rows, out), x (rows, in), `segments` say which rows are whose, `kept` is None or (rows, in), what
    dropout multiplies x by. `weights` are all A, then all B. Products are taken in the dtype of x, the
    gradients of A and B are float32, as in `train.fused`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        segments: Segments,
        scalings: Sequence[float],
        kept: torch.Tensor | None,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        ctx.mark_dirty(y)
        scale = torch.tensor(scalings, device=y.device)[:, None, None]
        half = len(weights) // 2
        a = _side_by_side(weights[:half]).to(x.dtype)  # (identities, rank, in)
        b = _side_by_side([weight.t() for weight in weights[half:]]).mul(scale).to(x.dtype)  # (.., rank, out)
        seen = segments.pad(x if kept is None else x * kept)
        low = torch.bmm(seen, a.transpose(1, 2))
        if segments.real is not None:
            low.mul_(segments.real)
        if segments.is_view:
            segments.pad(y).baddbmm_(low, b)
        else:
            y.add_(segments.unpad(torch.bmm(low, b)))
        ctx.save_for_backward(seen, a, b, low, scale, kept)
        ctx.segments, ctx.shapes = segments, [weight.shape for weight in weights]
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        seen, a, b, low, scale, kept = ctx.saved_tensors
        segments: Segments = ctx.segments
        grad = segments.pad(grads[0].contiguous())
        low_grad = torch.bmm(grad, b.transpose(1, 2))
        if segments.real is not None:
            low_grad.mul_(segments.real)
        x_grad = None
        if ctx.needs_input_grad[1]:
            x_grad = segments.unpad(torch.bmm(low_grad, a))
            x_grad = x_grad if kept is None else x_grad * kept
        a_grads = torch.bmm(low_grad.transpose(1, 2), seen).float()
        b_grads = (torch.bmm(low.transpose(1, 2), grad).float() * scale).transpose(1, 2)
        half = len(ctx.shapes) // 2
        given = [
            *(whole[: shape[0]] for whole, shape in zip(a_grads, ctx.shapes[:half], strict=True)),
            *(whole[:, : shape[1]] for whole, shape in zip(b_grads, ctx.shapes[half:], strict=True)),
        ]
        return grads[0], x_grad, None, None, None, *given


def _side_by_side(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """(n, rows, columns) of n matrices, those with fewer rows filled up with zeros, which changes nothing."""
    if len({len(matrix) for matrix in matrices}) == 1:
        return torch.stack(tuple(matrices))
    return nn.utils.rnn.pad_sequence(list(matrices), batch_first=True)
