"""What the front asks of every worker by `collective_rpc`, and the staged `add_lora` made of it."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from typing import Any

import torch
from vllm.lora.layers import RowParallelLinearWithLoRA
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.worker.worker_base import WorkerBase

from vllm_lora_ext.engine.isolation import Direction, Engine, MarkerPlan, check_isolation, plan_markers
from vllm_lora_ext.engine.residency import SafeWorkerLoRAManager
from vllm_lora_ext.errors import ServerFailed

# A child of vLLM's logger, so that its handler and format apply.
logger = logging.getLogger("vllm.vllm_lora")

# Each question costs the engine a moment between two steps, so a long load is asked for less often.
_POLL_S, _POLL_SHARE, _LONGEST_POLL_S = 0.02, 0.05, 0.5
_PREFIX = "vllm_lora_"


def stage_adapter(worker: WorkerBase, request: dict[str, Any]) -> None:
    """Begin to load an adapter in the background."""
    _manager(worker).loader.start(LoRARequest(**request))


def is_staged(worker: WorkerBase, adapter_id: int) -> bool:
    """Whether the load has ended, well or not."""
    return _manager(worker).loader.is_finished(adapter_id)


def insert_adapter(worker: WorkerBase, request: dict[str, Any], activate: bool = True) -> bool:
    """Take over the next slice of a staged adapter; True once it is whole."""
    return _manager(worker).insert(LoRARequest(**request), activate)


def own_residency(worker: WorkerBase) -> None:
    """From now on nothing leaves the memory by itself, and no step loads: the caller adds and removes."""
    _manager(worker).is_owned = True


def forget_adapter(worker: WorkerBase, adapter_id: int) -> None:
    """Nobody will take this load."""
    _manager(worker).loader.forget(adapter_id)


def installed_parts(worker: WorkerBase) -> list[str]:
    """What of ours is at work in this process."""
    runner = worker.model_runner
    manager = getattr(runner, "lora_manager", None)
    parts = [type(manager).__name__] if manager is not None else []
    if manager is not None:
        wrappers = manager._adapter_manager.punica_wrapper_mapping.values()
        parts += sorted({type(wrapper).__name__ for wrapper in wrappers})
    parts.append(f"compile={worker.vllm_config.compilation_config.mode.name}")
    return parts


def kernel_calls(worker: WorkerBase) -> int:
    """How often a LoRA kernel of ours has run in this process since it started."""
    from vllm_lora_ext.engine.cpu_lora import count_kernel_calls

    return count_kernel_calls()


def plan_isolation_markers(worker: WorkerBase) -> dict[str, Any] | None:
    """How to mark this model, see `isolation.MarkerPlan`; None where its parts are not found."""
    model, modules = worker.get_model(), _manager(worker)._adapter_manager.modules
    inner = getattr(model, "model", None)
    head = getattr(model, "lm_head", None) or getattr(inner, "embed_tokens", None)
    weight = getattr(getattr(head, "base_layer", head), "weight", None)
    norm = getattr(getattr(inner, "norm", None), "weight", None)
    ends = [(n, m.base_layer) for n, m in modules.items() if isinstance(m, RowParallelLinearWithLoRA)]
    if not ends or not isinstance(weight, torch.Tensor):
        return None
    name, last = ends[-1]
    with torch.inference_mode():
        directions = plan_markers(weight, norm)
    return {
        "module": name,
        "in_features": last.input_size,
        "directions": [dataclasses.asdict(direction) for direction in directions],
        "unembeds": "lm_head" in modules,
        "norm": None if norm is None else norm.float().tolist(),
    }


WORKER_CALLS = (
    *(stage_adapter, is_staged, insert_adapter, forget_adapter, own_residency),
    *(installed_parts, kernel_calls, plan_isolation_markers),
)


def install_worker_calls() -> None:
    """Give vLLM's workers our calls, as methods whose names begin with `vllm_lora_`."""
    for call in WORKER_CALLS:
        setattr(WorkerBase, _PREFIX + call.__name__, call)


def _manager(worker: WorkerBase) -> SafeWorkerLoRAManager:
    manager = worker.model_runner.lora_manager
    assert isinstance(manager, SafeWorkerLoRAManager), "the plugin is not active in this worker"
    return manager


async def call_workers(engine: AsyncLLM, call: Any, *arguments: Any) -> list[Any]:
    """One of `WORKER_CALLS` in every worker; their answers."""
    answers: list[Any] = await engine.collective_rpc(_PREFIX + call.__name__, args=arguments)
    return answers


async def require_parts(engine: AsyncLLM) -> None:
    """Every worker must run with our parts.

    Raises:
        ServerFailed: one does not, or does not know our calls at all.
    """
    from vllm.platforms import current_platform

    needed = {SafeWorkerLoRAManager.__name__} | (
        {"GroupedPunicaWrapper"} if current_platform.is_cpu() else set()
    )
    fix = "Is vllm-lora installed where the engine runs, and named in VLLM_PLUGINS?"
    try:
        answers = await call_workers(engine, installed_parts)
    except Exception as error:
        raise ServerFailed("a worker of the engine", f"does not answer ({error})", fix) from error
    for parts in answers:
        if missing := needed - set(parts):
            raise ServerFailed("a worker of the engine", f"runs without {', '.join(sorted(missing))}", fix)


async def prove_isolation(engine: Engine) -> float | None:
    """`isolation.check_isolation` with markers made for the engine's own weights.

    Returns their lead; None when nothing could be checked.
    """
    plan = (await call_workers(engine.client, plan_isolation_markers))[0]
    if plan is None:
        logger.warning("No isolation check: the parts of this model that it needs were not found")
        return None
    directions = [Direction(**fields) for fields in plan.pop("directions")]
    markers = MarkerPlan(**plan, directions=directions)
    return markers.lead() if await check_isolation(engine, markers) else None


async def add_lora_staged(engine: AsyncLLM, lora_request: LoRARequest, activate: bool = True) -> bool:
    """In place of `AsyncLLM.add_lora`: no step of the engine waits for a file or a conversion.

    The adapter is loaded in the background of each worker, then taken over between steps. With `activate`
    it also gets a slot, in slices; without, it waits in memory, and gets one with its first request.

    Raises:
        Exception: it could not be loaded; nothing of it is left.
    """
    fields = {name: getattr(lora_request, name) for name in lora_request.__struct_fields__}
    adapter_id = lora_request.lora_int_id
    try:
        await call_workers(engine, stage_adapter, fields)
        started = time.monotonic()
        while not all(await call_workers(engine, is_staged, adapter_id)):
            waited = time.monotonic() - started
            await asyncio.sleep(min(_POLL_S + _POLL_SHARE * waited, _LONGEST_POLL_S))
        while not all(await call_workers(engine, insert_adapter, fields, activate)):
            pass
    except BaseException:
        await asyncio.shield(call_workers(engine, forget_adapter, adapter_id))
        raise
    return True


async def place_adapter(engine: AsyncLLM, lora_request: LoRARequest) -> None:
    """Copy an adapter that is in memory into a slot, in slices between steps.

    Raises:
        Exception: it could not be; nothing of it is left.
    """
    fields = {name: getattr(lora_request, name) for name in lora_request.__struct_fields__}
    while not all(await call_workers(engine, insert_adapter, fields)):
        pass
