"""The command `vllm-lora`.

A process that `multiprocessing` starts imports its parent's main module first, unless that was started by
`python -m` with a package. So this is the first module of ours in the processes of vLLM's engine, too.
"""

from __future__ import annotations

import importlib
import sys

from vllm_lora_ext.collector import collect_seldom
from vllm_lora_ext.packages import claim_packages

collect_seldom()


def command_line() -> int:
    """Console script `vllm-lora`."""
    claim_packages()
    code: int = importlib.import_module("serve.cli").main(sys.argv[1:])
    return code


if __name__ == "__main__":
    sys.exit(command_line())
