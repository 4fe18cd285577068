"""LoRA on the CPU: rows of the base model keep their values, bit for bit.

vLLM's CPU kernels index the slots with -1 for a row without an adapter, which
is the last slot (vllm/lora/ops/torch_ops/lora_ops.py): a base-model request in
a batch with adapter requests was answered with somebody else's weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

_NO_ADAPTER = -1


class BaseSafePunicaWrapper(PunicaWrapperCPU):  # type: ignore[misc]
    """vLLM's CPU step, which leaves rows without an adapter untouched whatever the slots hold."""

    def add_lora_linear(self, y: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """As upstream: `y` is (tokens, out_features), changed in place."""
        self._spare_base_rows(y, self.token_lora_indices, super().add_lora_linear, args, kwargs)

    def add_lora_embedding(self, y: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """As upstream: `y` is (tokens, hidden), changed in place."""
        self._spare_base_rows(y, self.token_lora_indices, super().add_lora_embedding, args, kwargs)

    def add_lora_logits(self, y: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """As upstream: `y` is (samples, vocabulary), changed in place."""
        self._spare_base_rows(y, self.sampler_indices, super().add_lora_logits, args, kwargs)

    def _spare_base_rows(
        self,
        y: torch.Tensor,
        slots: torch.Tensor,
        step: Callable[..., None],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Run `step` on `y`, then put back the rows whose slot is -1. All base: nothing runs.

        Restoring instead of masking the update keeps the rows right even when a
        slot holds NaN, since NaN times zero is NaN.
        """
        rows = y.view(-1, y.shape[-1])[: slots.shape[0]]
        is_base = slots == _NO_ADAPTER
        if bool(is_base.all()):
            return
        kept = rows[is_base] if bool(is_base.any()) else None
        step(y, *args, **kwargs)
        if kept is not None:
            rows[is_base] = kept
