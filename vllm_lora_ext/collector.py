"""Python's garbage collector in processes that import much."""

from __future__ import annotations

import gc


def collect_seldom() -> None:
    """Look for garbage a dozen times less often than Python does by default; to be called before the imports.

    vLLM, torch and transformers make a million objects when they are imported, and hardly any garbage: by
    Python's thresholds a quarter of that time goes into looking for some. vLLM's processes freeze what they
    have once they are ready (vllm/utils/gc_utils.py).
    """
    gc.set_threshold(10_000, 20, 50)
