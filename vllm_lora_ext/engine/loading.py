"""Staged loading: adapters are read and converted beside the engine loop, not in it.

vLLM reads, converts and copies an adapter inside its single-threaded loop
(vllm/lora/worker_manager.py), so that a slow disk stops every stream. Here a
background thread does all of it, at idle priority, and the loop only takes over
what is ready.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from vllm.distributed import get_pp_group
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path, is_base_embedding_weights, parse_fine_tuned_lora_name

from vllm_lora_ext.background import lower_priority
from vllm_lora_ext.engine.weights import read_adapter_files
from vllm_lora_ext.peft_config import LiteralPattern
from vllm_lora_ext.peft_format import WEIGHTS_FILE

_LOADERS = 4  # so that one disk that hangs does not keep the others waiting
# The load of a small adapter takes some 50 ms of one core. At the lowest priority, beside workers that
# never rest, that was 3 s, in which its request waits; a large one would be felt by every stream.
_SMALL_BYTES, _NICE_SMALL, _NICE_LARGE = 32 << 20, 5, 19


def load_adapter(
    request: LoRARequest, manager: LoRAModelManager, max_positions: int | None, keep_transposed: bool
) -> LoRAModel:
    """Read an adapter and make it ready for `manager`, which is only read.

    Slices of packed layers are together and scaling is merged into B, as upstream does it in the
    engine loop (vllm/lora/model_manager.py, `_create_merged_loras_inplace`). With `keep_transposed`
    every B lies as (rank, out_features) in memory, as the CPU kernels want it.

    Raises:
        LoRAAdapterNotFoundError: the folder or one of its files is not there.
        ValueError: vLLM cannot serve this adapter.
    """
    try:
        folder = Path(get_adapter_absolute_path(request.lora_path))
        config, tensors = read_adapter_files(folder)
    except FileNotFoundError as error:
        raise LoRAAdapterNotFoundError(request.lora_name, request.lora_path) from error
    peft = PEFTHelper.from_dict({**config, "vllm_max_position_embeddings": max_positions})
    peft.validate_legal(manager.lora_config)
    # vLLM tries every pattern on every module, compiling it anew once there are more than a few hundred.
    patterns = {id(peft.rank_pattern): peft.rank_pattern, id(peft.alpha_pattern): peft.alpha_pattern}
    literal = {key: LiteralPattern(pattern) for key, pattern in patterns.items()}
    peft._match_pattern = lambda pattern, module: literal[id(pattern)].value_of(module)
    mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
    mapper = mapper.get_rename_mapper() if mapper is not None else None
    skipped = getattr(manager.model, "lora_skip_prefixes", None)
    _check_modules(tensors, manager, peft, mapper, skipped)
    lora = LoRAModel.from_lora_tensors(
        request.lora_int_id,
        tensors,
        peft,
        device="cpu",
        dtype=manager.lora_config.lora_dtype,
        model_vocab_size=manager.vocab_size,
        weights_mapper=mapper,
        skip_prefixes=skipped,
    )
    _check_pairs(lora)
    lora.is_3d_lora_weight = request.is_3d_lora_weight
    manager._validate_moe_lora_format(lora)
    manager._validate_modules_to_save(lora)
    manager._validate_token_classification_lora(lora)
    manager._create_merged_loras_inplace(lora)
    if not peft.modules_to_save and get_pp_group().world_size == 1:
        _check_effect(lora, manager)
    if keep_transposed:
        _transpose(lora)
    return lora


def _check_modules(
    tensors: dict[str, torch.Tensor],
    manager: LoRAModelManager,
    peft: PEFTHelper,
    mapper: object,
    skipped: object,
) -> None:
    """Every tensor must belong to a module that takes LoRA (vllm/lora/lora_model.py has the same rule)."""
    packed = manager.packed_modules_mapping
    expected = {"experts"} & set(manager.supported_lora_modules)
    for module in manager.supported_lora_modules:
        expected.update(packed.get(module, [module]))
    unknown = set()
    for name in tensors:
        if is_base_embedding_weights(name) or "base_layer" in name:
            continue
        if skipped and LoRAModel._should_skip_module(name, skipped):
            continue
        module, _ = parse_fine_tuned_lora_name(name, mapper)
        _, found, experts = module.partition(".experts")
        last = "experts" + experts if found else module.rsplit(".", 1)[-1]
        if last not in expected and last not in (peft.modules_to_save or ()):
            unknown.add(module)
    if unknown:
        shown = ", ".join(sorted(unknown)[:3])
        raise ValueError(f"{len(unknown)} modules take no LoRA in this model, for example {shown}")
    if not tensors:
        raise ValueError("the adapter holds no tensor")


def _check_pairs(lora: LoRAModel) -> None:
    for name, weights in lora.loras.items():
        if weights.lora_a is None or weights.lora_b is None:
            raise ValueError(f"{name} has only one of lora_A and lora_B")


def _check_effect(lora: LoRAModel, manager: LoRAModelManager) -> None:
    """An adapter that no module of this model uses would be answered by the base, with nobody told."""
    if not any(manager._get_lora_layer_weights(lora, name) is not None for name in manager.modules):
        raise ValueError(f"none of its {len(lora.loras)} modules is one of this model, so it changes nothing")


def _transpose(lora: LoRAModel) -> None:
    for weights in lora.loras.values():
        if isinstance(weights.lora_b, list):
            weights.lora_b = [None if b is None else _transposed(b) for b in weights.lora_b]
        else:
            weights.lora_b = _transposed(weights.lora_b)


def _transposed(b: torch.Tensor) -> torch.Tensor:
    """The same tensor with its first dimension contiguous in memory."""
    return b.t().contiguous().t() if b.ndim == 2 else b


class AdapterLoader:
    """Loads adapters in background threads; each load is taken once, by whoever inserts it."""

    def __init__(self, load: Callable[[LoRARequest], LoRAModel]) -> None:
        self._load = load
        # A thread cannot take a priority back that it gave up, so there are some of each.
        self._quick = ThreadPoolExecutor(_LOADERS, "adapter-loader", give_way, (_NICE_SMALL,))
        self._slow = ThreadPoolExecutor(_LOADERS, "large-adapter-loader", give_way, (_NICE_LARGE,))
        self._loads: dict[int, Future[LoRAModel]] = {}

    def start(self, request: LoRARequest) -> None:
        """Begin to load; a load of the same id that nobody took is forgotten."""
        self.forget(request.lora_int_id)
        threads = self._quick if _is_small(request) else self._slow
        self._loads[request.lora_int_id] = threads.submit(self._load, request)

    def is_finished(self, adapter_id: int) -> bool:
        """Whether `take` will not wait: the load ended, well or not, or there is none."""
        load = self._loads.get(adapter_id)
        return load is None or load.done()

    def take(self, adapter_id: int) -> LoRAModel | None:
        """The loaded adapter; None if no load was started. Raises what the load raised."""
        load = self._loads.pop(adapter_id, None)
        return None if load is None else load.result()

    def forget(self, adapter_id: int) -> None:
        """Drop a load that nobody will take."""
        load = self._loads.pop(adapter_id, None)
        if load is not None:
            load.cancel()


def _is_small(request: LoRARequest) -> bool:
    try:
        return (Path(request.lora_path) / WEIGHTS_FILE).stat().st_size <= _SMALL_BYTES
    except OSError:  # the load will say what is wrong
        return True


def give_way(nice: int) -> None:
    """Let this thread compute where others leave it room, alone, and on any core.

    The worker's main thread is bound to one core, and a new thread inherits that.
    """
    with contextlib.suppress(OSError, AttributeError):  # vLLM has switched off torch.set_num_threads
        ctypes.CDLL(None).omp_set_num_threads(1)
    with contextlib.suppress(OSError, AttributeError):  # not on Linux, or not allowed
        os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()))
    lower_priority(nice)
