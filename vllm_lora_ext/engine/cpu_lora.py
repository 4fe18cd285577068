"""LoRA on the CPU: rows grouped by adapter once per step, and nothing at all for rows without one.

vLLM's CPU kernels gather the weights of every token in every layer, and take slot
-1 (no adapter) for the last slot (vllm/lora/ops/torch_ops/lora_ops.py). Here the
model calls one opaque operator per module, so that the rest of it still compiles.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import library as torch_library
from vllm.lora.layers import BaseLayerWithLoRA, LoRAMapping, VocabParallelEmbeddingWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.layers.logits_processor import LogitsProcessorWithLoRA
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from vllm_lora_ext.engine import native
from vllm_lora_ext.engine.slots import LoraModule, SlotTable, Step

# The operators can be handed numbers only, which the compiled model keeps: this is what they
# stand for. One model per process, filled while it is built and never changed after.
_CALLED: list[tuple[LoraModule, Step]] = []

_operators = torch_library.Library("vllm_lora", "FRAGMENT")
_operators.define("add_lora(Tensor(a!) y, Tensor x, int module) -> ()")
_operators.define("add_embedding(Tensor(a!) y, Tensor tokens, int module) -> ()")


def _add_lora(y: torch.Tensor, x: torch.Tensor, module: int) -> None:
    lora, step = _CALLED[module]
    if step.groups:
        lora.add_lora(step, y, x)


def _add_embedding(y: torch.Tensor, tokens: torch.Tensor, module: int) -> None:
    lora, step = _CALLED[module]
    if step.groups:
        lora.add_embedding(step, y, tokens)


def _nothing(y: torch.Tensor, other: torch.Tensor, module: int) -> None:
    """What the compiler sees: `y` is written, nothing is returned."""


_operators.impl("add_lora", _add_lora, "CPU")
_operators.impl("add_embedding", _add_embedding, "CPU")
torch_library.register_fake("vllm_lora::add_lora", _nothing, lib=_operators)
torch_library.register_fake("vllm_lora::add_embedding", _nothing, lib=_operators)


class GroupedPunicaWrapper(PunicaWrapperCPU):  # type: ignore[misc]
    """What vLLM's LoRA layers call, by its name for it (vllm/lora/punica_wrapper/punica_base.py)."""

    def __init__(self, max_num_batched_tokens: int, max_batches: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(max_num_batched_tokens, max_batches, *args, **kwargs)
        self.tokens = Step(max_num_batched_tokens)
        self.samples = Step(max_num_batched_tokens)
        native.kernels()  # built now, not during somebody's request

    def update_metadata(
        self, mapping: LoRAMapping, lora_index_to_id: list[int | None], *args: Any, **kwargs: Any
    ) -> None:
        """Group the step's rows; called once per step, and only if the batch or the slots changed."""
        slot_of = {adapter: slot for slot, adapter in enumerate(lora_index_to_id) if adapter is not None}
        self.tokens.group(_slots(mapping.index_mapping, slot_of))
        samples = _slots(mapping.prompt_mapping, slot_of)
        self.samples.group(samples)
        self._sampler_indices[: len(samples)] = torch.from_numpy(samples)  # a classification head's
        self.indices_len[1] = len(samples)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[SlotTable, ...],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """As upstream: `y` is (tokens, out_features), changed in place; `x` is (tokens, in_features)."""
        torch.ops.vllm_lora.add_lora(y, x, lora_a_stacked[0].number)

    def add_lora_logits(
        self, y: torch.Tensor, x: torch.Tensor, lora_a_stacked: SlotTable, *args: Any, **kwargs: Any
    ) -> None:
        """As upstream: `y` is (samples, vocabulary), changed in place; `x` is (samples, hidden)."""
        torch.ops.vllm_lora.add_lora(y, x, lora_a_stacked.number)


def _slots(adapter_ids: tuple[int, ...], slot_of: dict[int, int]) -> np.ndarray:
    """Slot of each row, (rows,); -1 for a row without an adapter (id 0)."""
    ids = np.asarray(adapter_ids, np.int64)
    slots = np.full(len(ids), -1, np.int64)
    for adapter in np.unique(ids[ids > 0]):
        slots[ids == adapter] = slot_of[int(adapter)]
    return slots


def embed_with_lora(self: VocabParallelEmbeddingWithLoRA, x: torch.Tensor) -> torch.Tensor:
    """In place of the layer's `forward`, which gathers A for every token, adapter or not."""
    output = self.base_layer.forward(x)
    torch.ops.vllm_lora.add_embedding(
        output.view(-1, output.shape[-1]), x.view(-1), self.lora_a_stacked.number
    )
    return output


def use_slot_tables(name: str, module: BaseLayerWithLoRA, wrapper: GroupedPunicaWrapper) -> LoraModule | None:
    """Put slot tables where vLLM stacked tensors; None for a kind of layer that it does not serve on the CPU.

    Called while the model is built, once for each layer with LoRA.
    """
    if isinstance(module, BaseLinearLayerWithLoRA):
        a, b, part, step = module.lora_a_stacked, module.lora_b_stacked, "a", wrapper.tokens
        in_features = a[0].shape[-1]
    elif isinstance(module, LogitsProcessorWithLoRA):
        a, b, part, step = (module.lora_a_stacked,), (module.lora_b_stacked,), "a", wrapper.samples
        in_features = a[0].shape[-1]
    elif isinstance(module, VocabParallelEmbeddingWithLoRA):
        a, b, part, step = (module.lora_a_stacked,), (module.lora_b_stacked,), "a_t", wrapper.tokens
        in_features = a[0].shape[-2]
        module.lora_a_stacked_2d = None
    else:
        return None
    lora = LoraModule(
        name, in_features, [table.shape[-2] for table in b], len(b[0]), b[0].shape[-1], b[0].dtype
    )
    tables_a = tuple(SlotTable(lora, i, part, t.shape, t.dtype) for i, t in enumerate(a))
    tables_b = tuple(SlotTable(lora, i, "b", t.shape, t.dtype) for i, t in enumerate(b))
    tables_a[0].number = len(_CALLED)
    _CALLED.append((lora, step))
    packed = isinstance(module, BaseLinearLayerWithLoRA)
    module.lora_a_stacked = tables_a if packed else tables_a[0]
    module.lora_b_stacked = tables_b if packed else tables_b[0]
    return lora


def count_kernel_calls() -> int:
    """How often the LoRA step of any module has run in this process; tests rely on it."""
    return sum(lora.kernel_calls for lora, _ in _CALLED)
