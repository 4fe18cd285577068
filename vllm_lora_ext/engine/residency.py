"""Which adapters are in the worker's memory and in its slots. A load that fails harms only its own adapter.

vLLM 0.32 lets every error of a load or an activation escape from the step, which
ends the engine (vllm/lora/worker_manager.py, vllm/lora/model_manager.py).
"""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import Any

import msgspec
from vllm.distributed import get_pp_group, get_tp_group
from vllm.lora.layers import BaseLayerWithLoRA, LoRAMapping
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from vllm_lora_ext.engine.loading import AdapterLoader, load_adapter

# A child of vLLM's logger, so that its handler and format apply.
logger = logging.getLogger("vllm.vllm_lora")

SLICE_S = 0.005  # the longest that one call may keep the engine from its streams
_SLICE_BYTES = 50 << 20  # what a GPU takes in that time, at 10 GB/s; its copies return before they are done


class AdapterSlots(LRUCacheLoRAModelManager):  # type: ignore[misc]
    """vLLM's manager of slots, with slots that are filled in slices and emptied again when that fails."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._unfilled: dict[int, list[str]] = {}  # adapter -> modules that its slot still lacks
        self._pointing: list[BaseLayerWithLoRA] = []  # modules whose slots are no memory of their own
        super().__init__(*args, **kwargs)

    def register_module(self, module_name: str, module: BaseLayerWithLoRA) -> None:
        """As upstream; on the CPU the module's stacked tensors give way to slot tables."""
        super().register_module(module_name, module)
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            from vllm_lora_ext.engine.cpu_lora import use_slot_tables

            if use_slot_tables(module_name, module, self._get_punica_wrapper(module_name)):
                self._pointing.append(module)

    def _add_adapter(self, lora: LoRAModel) -> None:
        # `load_adapter` has merged and checked it, away from the engine loop. A warm-up adapter is made here.
        if not getattr(lora, "is_prepared", False):
            super()._add_adapter(lora)
        else:
            self._registered_adapters[lora.id] = lora

    def activate_adapter(self, lora_id: int) -> bool:
        """As upstream, all at once; a slot that could not be filled is free again."""
        newly = self.begin_activation(lora_id)
        while not self.fill_some(lora_id, SLICE_S):
            pass
        return newly

    def begin_activation(self, lora_id: int) -> bool:
        """Give the adapter a slot; False if it has one. The least recently used adapter leaves if need be.

        Raises:
            RuntimeError: every slot is pinned.
        """
        if lora_id in self._active_adapters:
            self._active_adapters.touch(lora_id)
            return False
        if len(self._active_adapters) >= self.lora_slots:
            self._active_adapters.remove_oldest()
        self.lora_index_to_id[self.lora_index_to_id.index(None)] = lora_id
        self._active_adapters[lora_id] = None
        self._unfilled[lora_id] = list(reversed(self.modules))
        return True

    def fill_some(self, lora_id: int, budget_s: float) -> bool:
        """Write modules into the adapter's slot for `budget_s` seconds; True once all are there.

        Raises:
            Exception: whatever vLLM's layers raise; the slot is free again then.
        """
        deadline = time.monotonic() + budget_s
        modules = self._unfilled.get(lora_id, [])
        written = 0
        try:
            while modules:
                written += self._fill(lora_id, modules.pop())
                if time.monotonic() > deadline or written > _SLICE_BYTES:
                    break
        except Exception:
            self.deactivate_adapter(lora_id)
            raise
        if not modules:
            self._unfilled.pop(lora_id, None)
        return not modules

    def _fill(self, lora_id: int, module_name: str) -> int:
        """One module of upstream's `activate_adapter` (vllm/lora/model_manager.py); the bytes it copies."""
        slot, module = self.lora_index_to_id.index(lora_id), self.modules[module_name]
        adapter = self._registered_adapters[lora_id]
        if hasattr(module, "set_module_to_save"):
            full = self._get_module_to_save_weights(adapter, module_name)
            if full is None:
                module.reset_module_to_save(slot)
            else:
                module.set_module_to_save(slot, full.weight, full.bias)
        weights = self._get_lora_layer_weights(adapter, module_name)
        if weights is None:
            module.reset_lora(slot)
            return 0
        module.set_lora(slot, weights.lora_a, weights.lora_b)
        return 0 if module in self._pointing else _size(weights.lora_a) + _size(weights.lora_b)

    def _deactivate_adapter(self, lora_id: int) -> None:
        # Also called by the cache of active adapters when it lets one go.
        self._unfilled.pop(lora_id, None)
        if lora_id in self.lora_index_to_id:
            slot = self.lora_index_to_id.index(lora_id)
            for module in self._pointing:
                module.reset_lora(slot)  # or the slot would keep the weights in memory
        super()._deactivate_adapter(lora_id)

    def pin_adapter(self, lora_id: int) -> bool:
        """As upstream, but one slot always stays free to move.

        Raises:
            ValueError: this would pin the last slot, and every other adapter would fail from then on.
        """
        pinned = set(self._active_adapters.pinned_items) | {lora_id}
        if len(pinned) >= self.lora_slots:
            raise ValueError(
                f"adapter {lora_id}: {self.lora_slots - 1} of {self.lora_slots} slots can be pinned, "
                "the last one serves all other adapters. Start with more --max-loras."
            )
        return bool(super().pin_adapter(lora_id))


class SafeWorkerLoRAManager(LRUCacheWorkerLoRAManager):  # type: ignore[misc]
    """vLLM's manager of a worker's adapters; what it cannot load or activate it remembers, and goes on."""

    _manager_cls = AdapterSlots

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loader = AdapterLoader(self._load)
        self._failed: dict[int, str] = {}
        # Whether the front decides what is in memory. Then nothing leaves by itself, and no step loads.
        self.is_owned = False

    def _load(self, request: LoRARequest) -> LoRAModel:
        from vllm.platforms import current_platform

        lora = load_adapter(
            request, self._adapter_manager, self.max_position_embeddings, current_platform.is_cpu()
        )
        lora.is_prepared = True
        return lora

    def _load_adapter(self, lora_request: LoRARequest) -> LoRAModel:
        """The staged adapter, or one read here and now if nobody staged it."""
        staged = self.loader.take(lora_request.lora_int_id)
        return self._load(lora_request) if staged is None else staged

    def set_active_adapters(self, requests: set[LoRARequest], mapping: LoRAMapping | None) -> None:
        """Make the batch's adapters active. The rows of one that cannot be are computed as the base's.

        Their tokens are never sent: the reasons wait for `take_failed`.
        """
        failed = self._activate(requests)
        self._failed.update(failed)
        if mapping is None:
            return
        if failed:
            mapping = dataclasses.replace(
                mapping,
                index_mapping=tuple(0 if i in failed else i for i in mapping.index_mapping),
                prompt_mapping=tuple(0 if i in failed else i for i in mapping.prompt_mapping),
            )
        self._adapter_manager.set_adapter_mapping(mapping)

    def take_failed(self) -> dict[int, str]:
        """Adapter ids that could not be used since the last call, each with its reason."""
        failed, self._failed = self._failed, {}
        return failed

    def _activate(self, requests: set[LoRARequest]) -> dict[int, str]:
        resident = self.list_adapters()
        new = [request for request in requests if request.lora_int_id not in resident]
        # Those in memory come first: an adapter of this batch must not leave to make room for another of it.
        ordered = [request for request in requests if request.lora_int_id in resident] + new
        failed = {}
        if self.is_owned:  # a request that was aborted may still be in a step after its adapter left
            failed = {request.lora_int_id: f"adapter {request.lora_name} is not loaded" for request in new}
            ordered = ordered[: len(ordered) - len(new)]
        for request in ordered:
            try:
                self.add_adapter(_without_reload(request))
            except Exception as error:
                failed[request.lora_int_id] = describe(request, error)
                logger.exception("Adapter %s could not be used; its requests fail", request.lora_name)
        if new:
            failed = _agreed(failed)
            for adapter_id in failed:
                self.remove_adapter(adapter_id)
        return failed

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        """As upstream; a replacement in place that fails leaves the old adapter as it was."""
        adapter_id = lora_request.lora_int_id
        old = self._adapter_manager.get_adapter(adapter_id) if lora_request.load_inplace else None
        try:
            return bool(super().add_adapter(lora_request))
        except Exception:
            self._adapter_manager.remove_adapter(adapter_id)
            if old is not None:
                self._adapter_manager.add_adapter(old)
                self._adapter_manager.activate_adapter(adapter_id)
            raise

    def insert(self, request: LoRARequest, activate: bool = True) -> bool:
        """Take a staged adapter over; with `activate` into a slot, a slice at a time. True once that is done.

        Raises:
            Exception: it could not be loaded or activated, or there is no room; nothing of it is left.
        """
        manager, adapter_id = self._adapter_manager, request.lora_int_id
        if request.load_inplace:  # the old version serves until the new one is whole
            return self.add_adapter(request)
        try:
            if adapter_id not in self.list_adapters():
                lora = self._load_adapter(request)
                self._make_room()
                manager.add_adapter(lora)
            if not activate:
                return True
            manager.begin_activation(adapter_id)
            return bool(manager.fill_some(adapter_id, SLICE_S))
        except Exception:
            manager.remove_adapter(adapter_id)
            raise

    def _make_room(self) -> None:
        manager = self._adapter_manager
        if len(manager) + 1 <= manager.capacity:
            return
        if self.is_owned:
            raise RuntimeError(f"all {manager.capacity} places of --max-cpu-loras are taken")
        manager.remove_oldest_adapter()


def _size(weights: Any) -> int:
    """Bytes of a tensor, or of the tensors of a packed layer."""
    tensors = weights if isinstance(weights, list) else [weights]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def describe(request: LoRARequest, error: Exception) -> str:
    """What a client may read: the adapter's name and the reason, without paths of this machine."""
    reason = str(error).replace(request.lora_path, "its folder") or type(error).__name__
    return f"adapter {request.lora_name} could not be used: {reason}"


def _without_reload(request: LoRARequest) -> LoRARequest:
    """vLLM keeps `load_inplace` set in the request, and would read the files again in every step."""
    return msgspec.structs.replace(request, load_inplace=False) if request.load_inplace else request


def _agreed(failed: dict[int, str]) -> dict[int, str]:
    """All failures of all ranks: what one cannot use, none does, or their parts would not fit together."""
    import torch.distributed

    for group in (get_tp_group(), get_pp_group()):
        if group.world_size > 1:
            gathered: list[dict[int, str]] = [{}] * group.world_size
            torch.distributed.all_gather_object(gathered, failed, group=group.cpu_group)
            failed = {adapter: reason for part in gathered for adapter, reason in part.items()}
    return failed
