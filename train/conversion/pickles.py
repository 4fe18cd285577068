"""A pickle of tensors becomes a safetensors file, in a process of its own that can do little harm.

`torch.load(weights_only=True)` builds tensors and nothing else. That it holds is not taken for granted:
the process has no more memory and time than the file needs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from vllm_lora_ext.errors import BadInput

_SECONDS = 300
_SPARE_BYTES = 8 << 30  # address space of the interpreter and torch, most of which is never touched


def tensors_from_pickle(source: Path, target: Path) -> None:
    """Write the tensors of `source` to `target`.

    Raises:
        BadInput: it holds anything but tensors, or is damaged.
    """
    command = [sys.executable, "-m", "train.conversion.pickles", str(source.absolute()), str(target)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    fix = "Save it with safetensors where you trust it."
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise BadInput(source.name, f"takes more than {_SECONDS} s to read", fix) from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"its reader ended with {done.returncode}"]
        raise BadInput(source.name, f"cannot be read as tensors ({lines[-1][:300]})", fix)


def _limit_this_process(size: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    most = _SPARE_BYTES + 4 * size
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _main(source: Path, target: Path) -> None:
    import torch
    from safetensors.torch import save_file

    if os.name == "posix":
        _limit_this_process(source.stat().st_size)
    try:
        found = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling damaged bytes raises whatever it comes upon
        sys.exit(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")
    tensors = isinstance(found, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in found.items()
    )
    if not tensors:
        sys.exit("not a table of names and tensors")
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in found.items()}, target)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
