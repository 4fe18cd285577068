"""The same computation in fewer passes over memory, for training on the CPU.

A base in bfloat16 computes its matrices so fast there that what stands between them takes as long:
conversions to float32 and back, and one pass over memory for each step of a norm. Each module is exchanged
only if it computes, on a random input, what it computed before.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

_CLOSE = 2e-2  # relative; bfloat16 has 8 bits, and sums are taken in another order


class _LoraLinear(torch.autograd.Function):  # type: ignore[misc]
    """x W^T + b + scaling (x A^T) B^T, with A and B in the dtype of x; their gradients are float32.

    x is (..., in), A (rank, in), B (out, rank). `x_adapter` is x with dropout, or None where there is none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        x_adapter: torch.Tensor | None,
        base: tuple[torch.Tensor, torch.Tensor | None],
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        seen = rows if x_adapter is None else x_adapter.reshape(-1, x.shape[-1])
        a, b = a.to(x.dtype), b.to(x.dtype) * scaling
        out = functional.linear(rows, *base)
        low = seen @ a.t()
        out.addmm_(low, b.t())
        ctx.save_for_backward(seen, base[0], a, b, low)
        ctx.scaling, ctx.has_dropout = scaling, x_adapter is not None
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        seen, weight, a, b, low = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        low_grad = grad @ b
        x_grad = dropped_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = grad @ weight
        if ctx.has_dropout:
            dropped_grad = (low_grad @ a).view(*grads[0].shape[:-1], -1)
        elif x_grad is not None:
            x_grad.addmm_(low_grad, a)
        if x_grad is not None:
            x_grad = x_grad.view(*grads[0].shape[:-1], -1)
        a_grad = (low_grad.t() @ seen).float()
        b_grad = (grad.t() @ low).float() * ctx.scaling
        return x_grad, dropped_grad, None, a_grad, b_grad, None


class _RmsNorm(torch.autograd.Function):  # type: ignore[misc]
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension; x in any dtype, the mean in float32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        scale = scale.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide.mul_(scale) if wide is not x else wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        grad, wide = (grads[0] * weight).float(), x.float()
        along = (grad * wide).mean(dim=-1, keepdim=True).mul_(scale).mul_(scale)
        return torch.addcmul(grad, wide, along, value=-1).mul_(scale).to(x.dtype), None, None


class _SwiGlu(torch.autograd.Function):  # type: ignore[misc]
    """silu(gate) * up; only these two are kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        up_grad = functional.silu(gate).mul_(grads[0])
        return torch.ops.aten.silu_backward(grads[0] * up, gate), up_grad


def fuse(model: nn.Module) -> int:
    """Exchange what can be exchanged in a model on the CPU; gives back how many modules it was.

    The parameters stay where they are. With its adapter switched off or merged, or with a trainable norm, a
    module does what it did.
    """
    exchanged = 0
    for module in model.modules():
        fused = _fused_forward(module)
        if fused is not None:
            module.forward = types.MethodType(fused, module)
            exchanged += 1
    return exchanged


def _fused_forward(module: nn.Module) -> Callable[..., Any] | None:
    if next(iter(module.parameters()), torch.empty(0, device="meta")).device.type != "cpu":
        return None
    if _is_plain_lora(module):
        return _lora_forward(module)
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if isinstance(weight, nn.Parameter) and weight.ndim == 1 and eps is not None and not weight.requires_grad:
        return _if_same(module, weight.shape[0], lambda self, x: _RmsNorm.apply(x, self.weight, eps))
    if all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        width = getattr(module.gate_proj, "in_features", 0)
        return _if_same(
            module, width, lambda self, x: self.down_proj(_SwiGlu.apply(self.gate_proj(x), self.up_proj(x)))
        )
    return None


def _if_same(module: nn.Module, width: int, fused: Callable[..., Any]) -> Callable[..., Any] | None:
    """`fused`, if it computes what the module does on a random input of that width."""
    dtype = next(module.parameters()).dtype
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    try:
        with torch.no_grad():
            before, after = module(x).float(), fused(module, x).float()
    except Exception:  # a module that only looks like one of these
        return None
    return fused if bool((before - after).norm() <= _CLOSE * before.norm()) else None


def _is_plain_lora(module: nn.Module) -> bool:
    from peft.tuners.lora import Linear

    if type(module) is not Linear or type(module.base_layer) is not nn.Linear:
        return False
    (name,) = module.active_adapters if len(module.active_adapters) == 1 else ("",)
    if name not in module.lora_A or module.lora_variant or module.fan_in_fan_out:
        return False
    return module.lora_A[name].bias is None and module.lora_B[name].bias is None


def _lora_forward(module: Any) -> Callable[..., Any]:
    (name,), plain, base = module.active_adapters, module.forward, module.base_layer
    a, b, dropout = module.lora_A[name].weight, module.lora_B[name].weight, module.lora_dropout[name]
    has_dropout = not isinstance(dropout, nn.Identity)

    def forward(self: Any, x: torch.Tensor, *args: Any, **options: Any) -> Any:
        if self.disable_adapters or self.merged or base.weight.requires_grad or x.dtype != base.weight.dtype:
            return plain(x, *args, **options)
        seen = dropout(x) if has_dropout and self.training else None
        return _LoraLinear.apply(x, seen, (base.weight, base.bias), a, b, self.scaling[name])

    return forward
