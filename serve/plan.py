"""What the server is started with: each value that the user did not state, inferred with its reason. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_lora_ext.spec import allowed_rank

MIN_MAX_LORA_RANK = 32
MIN_SLOTS, MAX_SLOTS = 4, 8
MAX_CACHE_BYTES, MAX_CACHED = 8 << 30, 1024
ASSUMED_ADAPTER_BYTES = 64 << 20
MAX_CPU_KV_CACHE_BYTES = 4 << 30
SMALL_MODEL_BYTES = 200_000_000


@dataclass(frozen=True)
class Inferred:
    """One value for one of vLLM's settings (`name` as in its Python API), and why."""

    name: str
    value: Any
    reason: str


def infer_server(public_name: str, stated: Mapping[str, Any]) -> list[Inferred]:
    """Values that any server needs, with adapters or without; what the user states always wins."""
    values = [
        Inferred("host", "127.0.0.1", "this machine only, unless --host says otherwise"),
        Inferred("served_model_name", [public_name], "the base model's public name, never a path"),
    ]
    return _unstated(values, stated)


def infer_kv_cache(available_bytes: int, stated: Mapping[str, Any]) -> list[Inferred]:
    """Memory for the KV cache on the CPU.

    vLLM asks for 92 % of all memory there, and ends when other programs use
    more than the rest.
    """
    if "gpu_memory_utilization" in stated:
        return []
    size = min(available_bytes // 4, MAX_CPU_KV_CACHE_BYTES)
    reason = f"a quarter of the {available_bytes / 2**30:.1f} GiB that are free, at most 4 GiB"
    return _unstated([Inferred("kv_cache_memory_bytes", size, reason)], stated)


def infer_compilation(
    weights_bytes: int | None, has_compiler: bool, stated: Mapping[str, Any]
) -> list[Inferred]:
    """On the CPU: no compilation where there is no compiler, or where it costs more time than it saves."""
    if not has_compiler:
        reason = "there is no C++ compiler (install g++), so nothing is compiled and answers are slower"
    elif weights_bytes is not None and weights_bytes <= SMALL_MODEL_BYTES:
        reason = f"compiling a model of {weights_bytes / 1e6:.0f} MB takes longer than it saves"
    else:
        return []
    return _unstated([Inferred("enforce_eager", True, reason)], stated)


def infer_adapters(
    ranks: Sequence[int | None], sizes: Sequence[int | None], available_bytes: int, stated: Mapping[str, Any]
) -> list[Inferred]:
    """Room for the adapters and for those that come later; what the user states always wins.

    `ranks` and `sizes` (bytes) are those of the admitted adapters, None where it is not known yet.
    """
    count = len(ranks)
    largest = max([rank for rank in ranks if rank is not None], default=0)
    slots = stated.get("max_loras") or max(MIN_SLOTS, min(count, MAX_SLOTS))
    rank = allowed_rank(max(largest, MIN_MAX_LORA_RANK))
    size = max([size for size in sizes if size is not None], default=0) or ASSUMED_ADAPTER_BYTES
    budget = min(available_bytes // 4, MAX_CACHE_BYTES)
    cached = max(slots, min(budget // size, MAX_CACHED))
    values = [
        Inferred("enable_lora", True, "adapters were asked for"),
        Inferred(
            "max_lora_rank",
            rank,
            f"largest admitted rank is {largest or 'unknown'}, at least {MIN_MAX_LORA_RANK} for later ones",
        ),
        Inferred(
            "max_loras",
            slots,
            f"adapters in one batch: there are {count}, more may come, {MIN_SLOTS} to {MAX_SLOTS} fit",
        ),
        Inferred(
            "max_cpu_loras",
            cached,
            f"adapters in memory: as many of {size / 1e6:.1f} MB as fit {budget / 2**30:.1f} GiB, "
            f"at most {MAX_CACHED}",
        ),
    ]
    return _unstated(values, stated)


def _unstated(values: Sequence[Inferred], stated: Mapping[str, Any]) -> list[Inferred]:
    return [value for value in values if value.name not in stated]


def flag_of(item: Inferred) -> str:
    """The value as it is written on a command line."""
    flag = f"--{item.name.replace('_', '-')}"
    values = item.value if isinstance(item.value, list) else [item.value]
    return flag if item.value is True else shlex.join([flag, *map(str, values)])


def plain_command(
    base_model: str,
    inferred: Sequence[Inferred],
    modules: Sequence[tuple[str, str]],
    passed_on: Sequence[str],
) -> str:
    """The `vllm serve` line that does the same, as far as plain vLLM can."""
    line = [shlex.join(["vllm", "serve", base_model]), *map(flag_of, inferred)]
    line += [shlex.join(passed_on)] if passed_on else []
    if modules:
        line.append(shlex.join(["--lora-modules", *(f"{name}={path}" for name, path in modules)]))
    return " ".join(line)
