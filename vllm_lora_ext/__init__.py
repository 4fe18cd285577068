"""Adapters and the engine side of vllm-lora; importing this is instant.

For notebooks, without vLLM: `admit` an adapter folder into an `AdapterStore`, keep names and versions in
a `Catalog`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_lora_ext.catalog import Catalog as Catalog
    from vllm_lora_ext.inspection import Rules as Rules
    from vllm_lora_ext.intake import admit as admit
    from vllm_lora_ext.store import AdapterStore as AdapterStore

__version__ = "0.1.0"

_PUBLIC = {
    "AdapterStore": "vllm_lora_ext.store",
    "Catalog": "vllm_lora_ext.catalog",
    "Rules": "vllm_lora_ext.inspection",
    "admit": "vllm_lora_ext.intake",
}
__all__ = ("AdapterStore", "Catalog", "Rules", "admit")


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
