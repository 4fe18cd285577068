"""Loss and token accuracy on trained tokens only, the head's work done in pieces.

The usual way computes logits for every token over the whole vocabulary and keeps them for the backward
pass. Here the head sees only the positions that predict a trained token, a piece at a time, and the
gradient of the hidden states is made while the piece's logits exist (the idea of Liger Kernel's fused
linear cross-entropy, and of TRL's chunked loss).
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from train.prompts import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PIECE_BYTES = 96 << 20  # of float32 logits; enough rows for the product with the head to be fast
_SOFTMAX_ROWS = 16  # of a piece: what is float32 for a moment stays small, and in the cache
# Settings of models that do something to their logits behind the head (Gemma, Granite, Cohere).
_AFTER_THE_HEAD = ("final_logit_softcapping", "logits_scaling", "logit_scale")


class _HeadLoss(torch.autograd.Function):  # type: ignore[misc]
    """Cross-entropy (tokens,) of `hidden` (tokens, width) through `weight` (vocabulary, width), and which
    labels were the likeliest (tokens,).

    The head's own gradients, where it is trained, are those of the sum of all.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, wanted: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wants_weight, wants_bias = ctx.needs_input_grad[1], ctx.needs_input_grad[2]
        losses = torch.empty(len(wanted), dtype=torch.float32, device=hidden.device)
        rights = torch.empty(len(wanted), dtype=torch.bool, device=hidden.device)
        hidden_grad = torch.empty_like(hidden)
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        bias_grad = torch.zeros_like(bias, dtype=torch.float32) if wants_bias and bias is not None else None
        rows = max(1, _PIECE_BYTES // (4 * weight.shape[0]))
        for start in range(0, len(wanted), rows):
            piece, labels = hidden[start : start + rows], wanted[start : start + rows]
            logits = functional.linear(piece, weight, bias)
            for first in range(0, len(labels), _SOFTMAX_ROWS):
                part = slice(first, min(first + _SOFTMAX_ROWS, len(labels)))
                told = slice(start + part.start, start + part.stop)
                losses[told], rights[told] = _to_gradient(logits[part], labels[part])
            grad = logits  # by now
            hidden_grad[start : start + rows] = grad @ weight
            if weight_grad is not None:
                weight_grad += grad.t() @ piece
            if bias_grad is not None:
                bias_grad += grad.sum(dim=0)
        ctx.save_for_backward(hidden_grad, weight_grad, bias_grad)
        ctx.mark_non_differentiable(rights)
        return losses, rights

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        grad = grads[0][:, None]
        of_hidden = (hidden * grad).to(hidden.dtype)
        of_head = (None if saved is None else saved * grad[:1].sum() for saved in (weight, bias))
        return of_hidden, *of_head, None


def _to_gradient(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Exchange logits (tokens, vocabulary) in place for the gradient of the summed loss; gives back each
    token's loss, and whether its label was the likeliest."""
    most, likeliest = logits.max(dim=-1)
    here = torch.arange(len(labels), device=labels.device)
    of_label = logits[here, labels].float()
    grad = torch.softmax(logits, dim=-1, dtype=torch.float32)
    # The likeliest token's probability is never tiny, so its logarithm tells the sum of all.
    log_sum = most.float() - grad[here, likeliest].log()
    grad[here, labels] -= 1
    logits.copy_(grad)
    return log_sum - of_label, likeliest == labels


def use_answer_loss(model: PreTrainedModel) -> None:
    """Let `model`, a causal language model, answer a call with `labels` by `loss`, `right` and `counted`.

    `loss` is the sum over trained tokens, `counted` their number and `right` how many of them were the
    likeliest; `losses` and `rights` (tokens,) are those of each trained token, row after row. Calls without
    labels are as they were. A model that changes its logits behind the head, or whose head is no plain
    linear layer, computes its logits itself, at trained positions only.
    """
    plain = model.forward
    head = model.get_output_embeddings()
    is_plain = type(head) is torch.nn.Linear and not any(
        getattr(model.config, name, None) not in (None, 1, 1.0) for name in _AFTER_THE_HEAD
    )

    def forward(self: Any, *args: Any, labels: torch.Tensor | None = None, **inputs: Any) -> Any:
        if labels is None:
            return plain(*args, **inputs)
        predicting = labels[:, 1:] != IGNORED
        wanted = labels[:, 1:][predicting]
        inputs = {**inputs, "use_cache": False}
        if is_plain:
            hidden = self.base_model(*args, **inputs).last_hidden_state[:, :-1][predicting]
            losses, rights = _HeadLoss.apply(hidden, head.weight, head.bias, wanted)
        else:
            logits = _logits_at(head, predicting, lambda: plain(*args, **inputs).logits)
            losses = functional.cross_entropy(logits.float(), wanted, reduction="none")
            rights = logits.argmax(dim=-1) == wanted
        told = {"losses": losses, "rights": rights, "counted": wanted.numel()}
        return {"loss": losses.sum(), "right": rights.sum(), **told}

    model.forward = types.MethodType(forward, model)


def _logits_at(
    head: torch.nn.Module, predicting: torch.Tensor, logits: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """Logits (tokens, vocabulary) of the chosen positions: the head is shown no other."""
    hook = head.register_forward_pre_hook(lambda _, args: (args[0][:, :-1][predicting][None],))
    try:
        return logits()[0]
    finally:
        hook.remove()
