"""Compilation with LoRA on: vLLM switches it off on the CPU (vllm/platforms/cpu.py), which slows everybody.

Our LoRA step is one opaque operator per module, so the rest of the model compiles as it does
without LoRA. All other compile settings were already made when the mode is taken away.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from vllm_lora_ext.engine import native

logger = logging.getLogger("vllm.vllm_lora")


# A module's input is read twice now, by the base and by LoRA; with inductor's own threshold (4) it would
# be computed and stored twice as well.
_READS = 2


def keeps_compiling(check_and_update_config: Callable[[Any], None]) -> Callable[[type, Any], None]:
    """Wrap the CPU platform's `check_and_update_config` (bound): with LoRA on the compile mode stays."""

    def wrapped(platform: type, vllm_config: Any) -> None:
        from vllm.config import CompilationMode

        compilation, lora = vllm_config.compilation_config, vllm_config.lora_config
        wanted = compilation.mode
        if lora is not None and lora.fully_sharded_loras:
            logger.warning(
                "--fully-sharded-loras has no use on the CPU, where slots take no memory: it is off"
            )
            lora.fully_sharded_loras = False
        check_and_update_config(vllm_config)
        if lora is None or wanted in (None, CompilationMode.NONE):
            return
        if native.compiler() is None:
            logger.warning("Compilation is off: it needs a C++ compiler (install g++)")
            return
        compilation.inductor_compile_config["realize_reads_threshold"] = _READS
        compiled = CompilationMode.DYNAMO_TRACE_ONCE
        compilation.mode = compiled if wanted == CompilationMode.VLLM_COMPILE else wanted

    return wrapped
