"""Our packages `serve` and `train`, found whatever the working folder holds.

People keep a `serve.py` or a `train.py` in the folder they work in. Python may
look there first (`python -m`, PYTHONPATH), and would take their file for our
package. Here the two are loaded from where this package was installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
_OURS = ("serve", "train")


def claim_packages() -> None:
    """Make `import serve` and `import train` mean our packages in this process."""
    for name in _OURS:
        init = _ROOT / name / "__init__.py"
        loaded = sys.modules.get(name)
        if loaded is not None and Path(str(getattr(loaded, "__file__", ""))) == init:
            continue
        spec = importlib.util.spec_from_file_location(
            name, init, submodule_search_locations=[str(init.parent)]
        )
        if spec is None or spec.loader is None:
            raise ImportError(f"{init} is missing: install vllm-lora again")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)


def endpoint_plugin() -> Any:
    """Factory of the `vllm.endpoint_plugins` entry point."""
    claim_packages()
    return importlib.import_module("serve.endpoint").AdapterEndpoint()
