"""Puts our parts where vLLM looks for its own, once per process. No file of vLLM is edited."""

from __future__ import annotations

from functools import cache
from types import MethodType

from vllm_lora_ext.engine import compat


@cache
def install() -> None:
    """All parts that the installed vLLM and the platform take.

    Raises:
        MissingPackage: this vLLM lacks what keeps adapters apart or the engine alive.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        compat.check(compat.CPU_SYMBOLS)
        _install_cpu()
    _install_everywhere()


def _install_cpu() -> None:
    from vllm.platforms.cpu import CpuPlatform

    from vllm_lora_ext.engine.compilation import keeps_compiling

    wrapper = "vllm_lora_ext.engine.cpu_lora.GroupedPunicaWrapper"
    CpuPlatform.get_punica_wrapper = classmethod(lambda cls: wrapper)
    CpuPlatform.check_and_update_config = MethodType(
        keeps_compiling(CpuPlatform.check_and_update_config), CpuPlatform
    )


def _install_everywhere() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.worker import lora_model_runner_mixin
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from vllm_lora_ext.engine import calls, failures
    from vllm_lora_ext.engine.residency import SafeWorkerLoRAManager

    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = SafeWorkerLoRAManager
    GPUModelRunner.execute_model = failures.marks_failures(GPUModelRunner.execute_model)
    GPUModelRunner.sample_tokens = failures.marks_failures(GPUModelRunner.sample_tokens)
    Scheduler.update_from_output = failures.ends_failed_requests(Scheduler.update_from_output)
    AsyncLLM.generate = failures.raises_reasons(AsyncLLM.generate)
    AsyncLLM.add_lora = calls.add_lora_staged
    calls.install_worker_calls()
