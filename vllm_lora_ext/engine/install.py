"""Puts our parts where vLLM looks for its own, once per process. No file of vLLM is edited."""

from __future__ import annotations

import logging
from collections.abc import Collection
from functools import cache
from types import MethodType

from vllm_lora_ext.engine import compat

# A child of vLLM's logger, so that its handler and format apply.
logger = logging.getLogger("vllm.vllm_lora")


@cache
def install() -> None:
    """All features that the installed vLLM and the platform take; one line for each that stays off.

    Raises:
        MissingPackage: this vLLM lacks what keeps adapters apart or the engine alive.
    """
    from vllm.platforms import current_platform

    usable = compat.usable_features("cpu" if current_platform.is_cpu() else "cuda")
    for warning in usable.warnings:
        logger.warning("%s", warning)
    if current_platform.is_cpu():
        _install_on_cpu(usable.names)
    _install_everywhere(usable.names)


def _install_on_cpu(features: Collection[str]) -> None:
    from vllm.platforms.cpu import CpuPlatform

    from vllm_lora_ext.engine.compilation import keeps_compiling

    if "isolation" in features:
        wrapper = "vllm_lora_ext.engine.cpu_lora.GroupedPunicaWrapper"
        CpuPlatform.get_punica_wrapper = classmethod(lambda cls: wrapper)
        _install_embedding()
    # vLLM's own LoRA step cannot be compiled: the two belong together.
    if {"isolation", "compile"} <= set(features):
        check = keeps_compiling(CpuPlatform.check_and_update_config)
        CpuPlatform.check_and_update_config = MethodType(check, CpuPlatform)


def _install_embedding() -> None:
    from vllm.lora.layers import VocabParallelEmbeddingWithLoRA

    from vllm_lora_ext.engine.cpu_lora import embed_with_lora

    VocabParallelEmbeddingWithLoRA.forward = embed_with_lora


def _install_everywhere(features: Collection[str]) -> None:
    if "no-fatal-load" not in features:
        return
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.worker import gpu_model_runner, lora_model_runner_mixin
    from vllm.v1.worker.gpu import model_runner

    from vllm_lora_ext.engine import calls, failures
    from vllm_lora_ext.engine.residency import SafeWorkerLoRAManager

    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = SafeWorkerLoRAManager
    for runner in (gpu_model_runner.GPUModelRunner, model_runner.GPUModelRunner):
        runner.execute_model = failures.marks_failures(runner.execute_model)
        runner.sample_tokens = failures.marks_failures(runner.sample_tokens)
    Scheduler.update_from_output = failures.ends_failed_requests(Scheduler.update_from_output)
    AsyncLLM.generate = failures.raises_reasons(AsyncLLM.generate)
    calls.install_worker_calls()
    if "staged-loading" in features:
        AsyncLLM.add_lora = calls.add_lora_staged
