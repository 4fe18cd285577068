"""Slows our adapter reader in the processes of a server that has this folder on its PYTHONPATH.

With `BENCH_READ_LIMIT` (bytes per second) set, `vllm_lora_ext.files.read_chunk`
takes at least that long for a file whose path contains one of the words in `BENCH_READ_MATCH`,
separated by commas; by default `throttled`. The module is patched when it is imported, and nothing is
imported earlier than it would be.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

MODULE = "vllm_lora_ext.files"
LIMIT_BYTES_PER_S = float(os.environ.get("BENCH_READ_LIMIT", "0"))
WORDS = os.environ.get("BENCH_READ_MATCH", "throttled").split(",")


def throttle(module: ModuleType) -> None:
    """Put the limit around `module.read_chunk(fd, target) -> int`."""
    read_chunk: Any = vars(module)["read_chunk"]

    def read_slowly(fd: int, target: memoryview) -> int:
        started = time.monotonic()
        count: int = read_chunk(fd, target)
        path = str(Path(f"/proc/self/fd/{fd}").readlink())
        if any(word in path for word in WORDS):
            time.sleep(max(0.0, started + count / LIMIT_BYTES_PER_S - time.monotonic()))
        return count

    vars(module)["read_chunk"] = read_slowly


class ThrottleOnImport(importlib.abc.MetaPathFinder):
    """Finds `MODULE` as it would be found without us, and patches it once it has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """None for every other module."""
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                throttle(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if LIMIT_BYTES_PER_S > 0:
    sys.meta_path.insert(0, ThrottleOnImport())
