"""Entry point of `vllm.general_plugins`: runs in every vLLM process, any number of times."""

from __future__ import annotations

from vllm_lora_ext.engine import compat

_WRAPPER = "vllm_lora_ext.engine.cpu_lora.BaseSafePunicaWrapper"


def register() -> None:
    """Give vLLM our CPU LoRA step, through the seam that it offers. Inert on any other platform.

    Raises:
        MissingPackage: this vLLM lacks what we replace; better no server than wrong answers.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    compat.check(compat.CPU_SYMBOLS)
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.get_punica_wrapper = classmethod(lambda cls: _WRAPPER)
